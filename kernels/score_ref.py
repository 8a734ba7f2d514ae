"""How a router's logits become scores and weights, in plain PyTorch: what differs by model family.

With ``x`` a token's logits in float32, soft-capped first where the rule says so
(``cap * tanh(x / cap)``), and ``b`` a correction bias, zero where there is none:

=============  ====================  ==================  =======================================
score          selection score s     mass p              mixing weight, before scaling_factor
=============  ====================  ==================  =======================================
SOFTMAX        x                     softmax of x        p, or p / sum(p of the executed)
SOFTMAX and b  softmax of x, plus b  softmax of x        the same
SIGMOID        x                     sigmoid(x)          p, or p / (sum(p of the executed) + 1e-20)
SIGMOID and b  sigmoid(x) + b        sigmoid(x)          the same
SPARSEMIXER    x                     softmax of x        one masked softmax per executed expert
=============  ====================  ==================  =======================================

Sigmoid with groups but no bias scores as with one that is zero: sums of logits would be others.
Without either, large logits, whose sigmoids are all 1, keep their order.

Experts are chosen by s. What a swap costs is told by p, also where the two differ (:class:`Rule`
of :mod:`.route_ref`). An expert whose logit or s is not finite ranks last; whose logit is not, it
weighs nothing.

*Groups.* E experts are ``num_groups`` runs of equal length. A token may only visit the
``top_groups`` best of them, lower number first among equals: by the largest s of a group
(DeepSeek-V2), or by the sum of its two largest (DeepSeek-V3). Experts of other groups are no
candidates: neither demanded nor a stand-in.

*Sparsemixer* (Phi-3.5-MoE, arXiv 2409.12136; inference). The executed expert ``e`` weighs
``1 / sum(exp(x(j) - x(e)))`` over the experts ``j`` from ``e`` on in rank that are near enough:
``(x(e) - x(j)) / max(|x(j)|, x(e)) <= 2 * jitter_eps``. Without swaps that is the model's own rule,
whose second round leaves out the first expert; after a swap it is what that rule would give had
the experts that rank before ``e`` and were not executed not been there.

Shape suffixes: T tokens, E experts, K experts per token, G groups.
"""

import enum
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import torch

SIGMOID_EPS = 1e-20  # DeepSeek-V3's: a sum of sigmoids that underflows is not divided by


class Score(enum.IntEnum):
    """What scores and weights are made of; the table above."""

    SOFTMAX = 0
    SIGMOID = 1
    SPARSEMIXER = 2


class GroupScore(enum.IntEnum):
    """By what the groups of a token rank."""

    TOP2_SUM = 0
    MAX = 1


@dataclass(frozen=True, kw_only=True)
class ScoreRule:
    """The score rule of a router; the module docstring says what it means.

    Attributes:
        score: See :class:`Score`.
        renormalize: Weights of the executed experts sum to 1 (before ``scaling_factor``); always
            False for sparsemixer, whose weights do not.
        scaling_factor: What weights are multiplied by.
        num_groups: Groups that E divides into; 1: none.
        top_groups: How many of them a token may visit.
        group_score: See :class:`GroupScore`.
        softcap: Bound of the logits; 0: none.
        jitter_eps: Half the relative distance within which sparsemixer's experts share a softmax.
        is_plain: Nothing but ``renormalize`` differs from the defaults.
    """

    score: Score = Score.SOFTMAX
    renormalize: bool = True
    scaling_factor: float = 1.0
    num_groups: int = 1
    top_groups: int = 1
    group_score: GroupScore = GroupScore.TOP2_SUM
    softcap: float = 0.0
    jitter_eps: float = 0.0
    is_plain: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("scaling_factor", "softcap", "jitter_eps"):  # an int compiles another kernel
            object.__setattr__(self, name, float(getattr(self, name)))
        if self.score == Score.SPARSEMIXER:
            object.__setattr__(self, "renormalize", False)
        own = [getattr(self, f.name) for f in fields(self) if f.init and f.name != "renormalize"]
        plain = [f.default for f in fields(self) if f.init and f.name != "renormalize"]
        object.__setattr__(self, "is_plain", own == plain)

    def as_dict(self) -> dict[str, object]:
        """Return the attributes by name, ready for JSON."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.init}

    @classmethod
    def from_dict(cls, described: dict[str, object]) -> "ScoreRule":
        """Undo :meth:`as_dict`.

        Raises:
            TypeError, ValueError: Not what that method returns.
        """
        kinds = {f.name: type(f.default) for f in fields(cls) if f.init}
        return cls(**{n: kinds.get(n, lambda value: value)(v) for n, v in described.items()})

    @property
    def has_groups(self) -> bool:
        """Whether some experts are no candidates of a token."""
        return self.top_groups < self.num_groups


class Scores(NamedTuple):
    """What T tokens are routed by."""

    selection_TE: torch.Tensor  # float32, s; not finite where the expert ranks last
    mass_TE: torch.Tensor  # float32, p up to a factor per row; 0 where the logit is not finite
    candidate_TE: torch.Tensor | None  # bool, who may be visited; None: everybody


def capped(logits_TE: torch.Tensor, softcap: float) -> torch.Tensor:
    """Return the soft-capped logits; what is not finite stays so."""
    if not softcap:
        return logits_TE
    bounded_TE = softcap * (logits_TE / softcap).tanh()
    return torch.where(logits_TE.isfinite(), bounded_TE, logits_TE)


def exp_mass(x_TE: torch.Tensor) -> torch.Tensor:
    """``exp(x - max)`` over the finite ones, 0 elsewhere: the softmax without its divisor."""
    finite_TE = torch.where(x_TE.isfinite(), x_TE, -torch.inf)
    top_T1 = finite_TE.amax(1, keepdim=True)
    top_T1 = torch.where(top_T1.isfinite(), top_T1, 0.0)
    return (finite_TE - top_T1).exp()


def score_ref(
    logits_TE: torch.Tensor, rule: ScoreRule, bias_E: torch.Tensor | None = None
) -> Scores:
    """Return what tokens are routed by.

    Args:
        logits_TE: ``(T, E)`` float32.
        rule: The score rule.
        bias_E: Correction bias b, ``(E,)``.
    """
    x_TE = capped(logits_TE, rule.softcap)
    if rule.score == Score.SIGMOID:
        mass_TE = torch.where(x_TE.isfinite(), x_TE, -torch.inf).sigmoid()
        is_ranked_by_it = bias_E is not None or rule.has_groups
        selection_TE = mass_TE if is_ranked_by_it else x_TE
    else:
        mass_TE = exp_mass(x_TE)
        selection_TE = x_TE
        if bias_E is not None:
            total_T1 = mass_TE.sum(1, keepdim=True)
            selection_TE = mass_TE = mass_TE / torch.where(total_T1 > 0, total_T1, 1.0)
    if bias_E is not None:
        selection_TE = selection_TE + bias_E.float()
    selection_TE = torch.where(x_TE.isfinite(), selection_TE, -torch.inf)
    candidate_TE = _in_best_groups(selection_TE, rule) if rule.has_groups else None
    return Scores(selection_TE, mass_TE, candidate_TE)


def _in_best_groups(selection_TE, rule):
    T, E = selection_TE.shape
    groups = rule.num_groups
    finite_TE = torch.where(selection_TE.isfinite(), selection_TE, -torch.inf)
    best_TGn = finite_TE.view(T, groups, -1).sort(dim=2, descending=True).values
    score_TG = best_TGn[:, :, 0]
    if rule.group_score == GroupScore.TOP2_SUM:
        score_TG = score_TG + best_TGn[:, :, 1]
    score_TG = torch.where(score_TG.isfinite(), score_TG, -torch.inf)
    order_TG = score_TG.sort(dim=1, descending=True, stable=True).indices
    chosen_TG = torch.zeros(T, groups, dtype=torch.bool, device=selection_TE.device)
    chosen_TG.scatter_(1, order_TG[:, : rule.top_groups], True)
    return chosen_TG.repeat_interleave(E // groups, dim=1)


def rank_experts(
    selection_TE: torch.Tensor, candidate_TE: torch.Tensor | None = None
) -> torch.Tensor:
    """Return expert ids ``(T, E)`` by score descending, lower id first.

    Scores that are not finite come after all that are, experts that are no candidates after all
    that are.
    """
    finite_TE = torch.where(selection_TE.isfinite(), selection_TE, -torch.inf)
    order_TE = finite_TE.sort(dim=1, descending=True, stable=True).indices
    if candidate_TE is None:
        return order_TE
    last_TE = (~candidate_TE.gather(1, order_TE)).to(torch.int8)
    return order_TE.gather(1, last_TE.sort(dim=1, stable=True).indices)


def mixing_weights(
    logits_TE: torch.Tensor,
    ids_TK: torch.Tensor,
    rule: ScoreRule = ScoreRule(),  # noqa: B008 - frozen dataclass
) -> torch.Tensor:
    """Return the weights of the executed experts, ``(T, K)`` float32; differentiable.

    A correction bias never reaches a weight, so none is asked for. A row with no finite logit is
    uniform, and so is one whose sigmoids all underflow to 0.

    Args:
        logits_TE: ``(T, E)`` float32 (float64 stays so).
        ids_TK: Executed experts, int64, best first.
        rule: The score rule.
    """
    x_TE = capped(logits_TE, rule.softcap)
    finite_TE = torch.where(x_TE.isfinite(), x_TE, -torch.inf)
    uniform = 1.0 / ids_TK.shape[1]
    if rule.score == Score.SPARSEMIXER:
        weights_TK = _sparsemixer_weights(finite_TE, ids_TK, rule.jitter_eps)
    elif rule.score == Score.SIGMOID:
        weights_TK = finite_TE.gather(1, ids_TK).sigmoid()
        total_T1 = weights_TK.sum(1, keepdim=True)
        if rule.renormalize:
            weights_TK = weights_TK / (total_T1 + SIGMOID_EPS)
        weights_TK = torch.where(total_T1 > 0, weights_TK, uniform)
    elif rule.renormalize:
        logits_TK = finite_TE.gather(1, ids_TK)
        none_T1 = (logits_TK == -torch.inf).all(1, keepdim=True)
        # the dead row is replaced before the softmax, so that no NaN reaches a gradient
        weights_TK = torch.where(none_T1, torch.zeros_like(logits_TK), logits_TK).softmax(1)
    else:
        none_T1 = (finite_TE == -torch.inf).all(1, keepdim=True)
        weights_TE = torch.where(none_T1, torch.zeros_like(finite_TE), finite_TE).softmax(1)
        weights_TK = torch.where(none_T1, uniform, weights_TE.gather(1, ids_TK))
    return weights_TK if rule.scaling_factor == 1 else weights_TK * rule.scaling_factor


def _sparsemixer_weights(x_TE, ids_TK, jitter_eps):
    order_TE = rank_experts(x_TE)
    rank_TE = order_TE.argsort(dim=1)
    weights = []
    for own_T1 in x_TE.gather(1, ids_TK).split(1, dim=1):
        k = len(weights)
        is_after_TE = rank_TE >= rank_TE.gather(1, ids_TK[:, k : k + 1])
        far_TE = (own_T1 - x_TE) / torch.maximum(x_TE.abs(), own_T1) > 2 * jitter_eps
        near_TE = is_after_TE & ~far_TE & x_TE.isfinite()
        mass_TE = torch.where(near_TE, x_TE - own_T1, -torch.inf).exp()
        total_T1 = mass_TE.sum(1, keepdim=True)
        weights.append(torch.where(total_T1 > 0, 1 / total_T1, 0.0))
    weights_TK = torch.cat(weights, dim=1)
    return torch.where(weights_TK.sum(1, keepdim=True) > 0, weights_TK, 1.0 / ids_TK.shape[1])
