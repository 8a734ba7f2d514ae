"""The arguments that make a gate score as another family's router does, checked."""

from typing import Literal

from .bounds import check_int, check_one_of, check_real
from .kernels.checks import check_groups
from .kernels.score_ref import GroupScore, Score, ScoreRule

SMALLEST = 2.0**-126  # below, float32 loses digits
SCORES = {score.name.lower(): score for score in Score}
GROUP_SCORES = {score.name.lower(): score for score in GroupScore}


def make_score_rule(
    num_experts: int,
    top_k: int,
    *,
    score: Literal["softmax", "sigmoid", "sparsemixer"],
    renormalize: bool,
    scaling_factor: float,
    num_groups: int,
    top_groups: int,
    group_score: Literal["top2_sum", "max"],
    softcap: float,
    jitter_eps: float,
    correction_bias: bool,
) -> ScoreRule:
    """Return the score rule of a gate; the arguments are :class:`~moe_gpu.gate.MoEGate`'s.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: An argument outside its bounds, or two that do not go together.
    """
    for name, value in (("renormalize", renormalize), ("correction_bias", correction_bias)):
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r}")
    check_one_of("score", score, SCORES)
    check_one_of("group_score", group_score, GROUP_SCORES)
    check_real("scaling_factor", scaling_factor, SMALLEST)
    check_int("num_groups", num_groups, 1)
    check_int("top_groups", top_groups, 1)
    if softcap != 0:
        check_real("softcap", softcap, SMALLEST)
    check_real("jitter_eps", jitter_eps, 0.0)
    if score == "sparsemixer" and correction_bias:
        raise ValueError("correction_bias=True has no meaning with score='sparsemixer'")
    rule = ScoreRule(
        score=SCORES[score],
        renormalize=renormalize,
        scaling_factor=float(scaling_factor),
        num_groups=num_groups,
        top_groups=top_groups,
        group_score=GROUP_SCORES[group_score],
        softcap=float(softcap),
        jitter_eps=float(jitter_eps) if score == "sparsemixer" else 0.0,
    )
    check_groups(rule, num_experts, top_k)
    return rule
