"""Route tokens: the public function, the registered op and the launch of the fused kernel.

One call scores, selects, swaps, weighs, counts, ages the affinity and writes the step record
in exactly one kernel launch. CUDA tensors take the Triton kernel, CPU tensors the reference;
under ``TRITON_INTERPRET=1`` the kernel runs in Triton's interpreter for both.
"""

import operator
import os

import torch

from . import layout
from .checks import check_call, check_out, check_scores
from .route_ref import AffinityFrom, Rule, route_ref
from .score_ref import GroupScore, Score, ScoreRule

try:
    from .launch import launch
except ModuleNotFoundError as error:  # no Triton wheel for this platform: the CPU path remains
    if error.name != "triton":
        raise
    launch = None

_INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"


def route_path(device: torch.device) -> str:
    """Return what runs a route call for tensors on ``device``: ``"triton"`` or ``"reference"``."""
    return "triton" if device.type == "cuda" or _INTERPRET else "reference"


PLAIN = ScoreRule()
EVERY = 2**62  # more tokens than any call has
_STATE = (
    "slot_of_LE", "strength_L", "affinity_LE", "activations_LE", "counters_LC", "record_LR",
    "scratch", "control_LP", "control_state_LS", "meters_LM",
)  # fmt: skip
_of_buffers = operator.itemgetter(*_STATE)


def _tensors_of(state: layout.RouteState) -> tuple[torch.Tensor, ...]:
    # a module looks its buffers up last, and slowly; a trace does not mind, nor knows itemgetter
    if isinstance(state, torch.nn.Module) and not torch.compiler.is_compiling():
        return _of_buffers(state._buffers)
    return tuple(getattr(state, name) for name in _STATE)


def route(
    logits_TE: torch.Tensor,
    state: layout.RouteState,
    layer: int,
    *,
    top_k: int,
    rule: Rule = Rule.EXACT,
    protect: int = 0,
    max_policy_tokens: int = EVERY,
    score_rule: ScoreRule = PLAIN,
    correction_bias: torch.Tensor | None = None,
    affinity_from: AffinityFrom = AffinityFrom.DEMAND,
    decay: float = 0.99,
    boost: float = 1.0,
    max_score: float = 1.0,
    num_valid: torch.Tensor | None = None,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
    weights_dtype: torch.dtype = torch.float32,
    control: bool = False,
    meters: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose K experts for every token and advance the state of ``layer``.

    Not differentiable: where a gradient is needed, recompute the weights from the logits with
    :func:`~moe_gpu.kernels.score_ref.mixing_weights` at the returned ids.

    Args:
        logits_TE: Router logits, ``(T, E)``, float32, float16 or bfloat16, any strides,
            ``1 <= E <= 1024``.
        state: Device state, see :class:`~moe_gpu.kernels.layout.RouteState`. Its scratch must
            hold ``scratch_words(E, tokens that age the affinity)`` zeros.
        layer: Row of the state.
        top_k: K, ``1 <= K <= min(E, 16)``.
        rule: Which swaps are allowed; its strength is ``state.strength_L[layer]``.
        protect: Leading ranks that are never swapped away.
        max_policy_tokens: A call of more tokens is routed by ``Rule.EXACT``, without ``control`` and
            ``meters``. Decided where the kernel is launched: a trace has no graph for each side.
        score_rule: How logits become scores and weights (:mod:`moe_gpu.kernels.score_ref`).
        correction_bias: ``(E,)``, float32, float16 or bfloat16, contiguous: added to the selection
            scores, never to a weight.
        affinity_from: Which choices age the affinity.
        decay: Affinity factor per token, in [0, 1].
        boost: Affinity added per choice, ``>= 0``.
        max_score: Affinity clamp, ``> 0``.
        num_valid: Device scalar int32: rows from there on are padding, get weight 0 and touch no
            state. None: all rows count.
        out: ``(weights, ids)`` to write to, unit stride along K: weights any supported float
            dtype, ids int32 or int64. None allocates ``weights_dtype`` and int64.
        weights_dtype: Float dtype of allocated weights.
        control: Adapt ``state.strength_L[layer]`` for the next call as ``state.control_LP`` says
            (:mod:`moe_gpu.kernels.control_ref`). Not with ``Rule.EXACT``, which needs no strength.
        meters: Add to ``state.meters_LM`` (:mod:`moe_gpu.kernels.meters_ref`), likewise.

    Returns:
        weights_TK: Mixing weights, best unbiased score first.
        ids_TK: K distinct expert ids in [0, E) per row, for every input bit pattern.

    Raises:
        ValueError: A shape, bound or device that does not fit, before anything is written.
        TypeError: A dtype that does not fit.
    """
    (
        slot_of_LE, strength_L, affinity_LE, activations_LE, counters_LC, record_LR, scratch,
        control_LP, control_state_LS, meters_LM,
    ) = _tensors_of(state)  # fmt: skip
    check_call(logits_TE, slot_of_LE, scratch, layer, top_k, decay, num_valid)
    is_plain = correction_bias is None and score_rule.is_plain
    if not is_plain:
        check_scores(score_rule, correction_bias, logits_TE, top_k)
    T, device = logits_TE.shape[0], logits_TE.device
    if out is None:
        weights_TK = torch.empty(T, top_k, dtype=weights_dtype, device=device)
        ids_TK = torch.empty(T, top_k, dtype=torch.int64, device=device)
        out = weights_TK, ids_TK
    else:
        check_out(out, T, top_k, device)
        weights_TK, ids_TK = out
    if T == 0:
        return out
    plain_TE = logits_TE
    if logits_TE.requires_grad or type(logits_TE) is torch.nn.Parameter:
        plain_TE = logits_TE.detach()
    args = (
        plain_TE, weights_TK, ids_TK, num_valid,
        slot_of_LE, strength_L, affinity_LE, activations_LE, counters_LC, record_LR, scratch,
        layer, top_k, int(rule), min(protect, top_k), max_policy_tokens,
        score_rule.renormalize, int(affinity_from),
        float(decay), float(boost), float(max_score),
    )  # fmt: skip
    control, meters = control and rule != Rule.EXACT, meters and rule != Rule.EXACT
    if control or meters or not is_plain:
        args += (control_LP, control_state_LS) if control else (None, None)
        args += (meters_LM if meters else None,)
    if not is_plain:
        args += (
            correction_bias, int(score_rule.score), score_rule.scaling_factor,
            score_rule.num_groups, score_rule.top_groups, int(score_rule.group_score),
            score_rule.softcap, score_rule.jitter_eps,
        )  # fmt: skip
    # the dispatcher costs more than the launch it leads to; only a traced graph needs it, and
    # tensors without values (meta, FakeTensor), of which only shapes come out
    has_no_values = logits_TE.is_meta or type(plain_TE) is not torch.Tensor
    if torch.compiler.is_compiling() or has_no_values:
        torch.ops.moe_gpu.route_(*args)
    else:
        _route(*args)
    return out


def _route(
    logits_TE, weights_TK, ids_TK, num_valid, slot_of_LE, strength_L, affinity_LE,
    activations_LE, counters_LC, record_LR, scratch,
    layer, top_k, rule, protect, max_policy_tokens, renormalize, affinity_from,
    decay, boost, max_score,
    control_LP=None, control_state_LS=None, meters_LM=None,
    bias_E=None, score=0, scaling_factor=1.0, num_groups=1, top_groups=1, group_score=0,
    softcap=0.0, jitter_eps=0.0,
):  # fmt: skip
    if logits_TE.is_cuda and launch is None:
        raise RuntimeError("routing on CUDA needs triton, which is not installed")
    if logits_TE.shape[0] > max_policy_tokens:
        rule, protect = int(Rule.EXACT), 0
        control_LP = control_state_LS = meters_LM = None
    if route_path(logits_TE.device) == "reference":
        state = _State(
            slot_of_LE, strength_L, affinity_LE, activations_LE, counters_LC, record_LR, scratch,
            control_LP, control_state_LS, meters_LM,
        )  # fmt: skip
        route_ref(
            logits_TE, weights_TK, ids_TK, num_valid, state, layer,
            top_k=top_k, rule=Rule(rule), protect=protect,
            correction_bias=bias_E,
            score_rule=ScoreRule(
                score=Score(score), renormalize=renormalize, scaling_factor=scaling_factor,
                num_groups=num_groups, top_groups=top_groups,
                group_score=GroupScore(group_score), softcap=softcap, jitter_eps=jitter_eps,
            ),
            affinity_from=AffinityFrom(affinity_from),
            decay=decay, boost=boost, max_score=max_score,
            control=control_LP is not None, meters=meters_LM is not None,
        )  # fmt: skip
        return
    launch(
        logits_TE, weights_TK, ids_TK, num_valid, slot_of_LE, strength_L, affinity_LE,
        activations_LE, counters_LC, record_LR, scratch,
        layer, top_k, rule, protect, renormalize, affinity_from, decay, boost, max_score,
        control_LP, control_state_LS, meters_LM,
        bias_E, score, scaling_factor, num_groups, top_groups, group_score, softcap, jitter_eps,
    )  # fmt: skip


class _State:
    __slots__ = _STATE

    def __init__(self, *tensors):
        for name, tensor in zip(_STATE, tensors, strict=True):
            setattr(self, name, tensor)


# define + impl costs a third of torch.library.custom_op per eager call
_library = torch.library.Library("moe_gpu", "FRAGMENT")
_library.define(
    "route_(Tensor logits, Tensor(a!) weights, Tensor(b!) ids, Tensor? num_valid, "
    "Tensor slot_of, Tensor(h!) strength, Tensor(c!) affinity, Tensor(d!) activations, "
    "Tensor(e!) counters, Tensor(f!) record, Tensor(g!) scratch, SymInt layer, SymInt top_k, "
    "SymInt rule, SymInt protect, SymInt max_policy_tokens, bool renormalize, SymInt affinity_from, float decay, "
    "float boost, float max_score, Tensor? control=None, Tensor(i!)? control_state=None, "
    "Tensor(j!)? meters=None, Tensor? bias=None, SymInt score=0, float scaling_factor=1.0, "
    "SymInt num_groups=1, SymInt top_groups=1, SymInt group_score=0, float softcap=0.0, "
    "float jitter_eps=0.0) -> ()"
)
_library.impl("route_", _route, "CPU")
_library.impl("route_", _route, "CUDA")


@torch.library.register_fake("moe_gpu::route_", lib=_library)
def _(*args):
    return None
