"""How a route call refuses bad arguments: before anything is written, naming value and bound."""

import torch

from . import layout
from .route_ref import affinity_window
from .score_ref import GroupScore, Score

MAX_EXPERTS = 1024
MAX_TOP_K = 16
MAX_GROUPS = 32  # the kernel keeps a bit for each in one word
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def check_call(logits_TE, slot_of_LE, scratch, layer, top_k, decay, num_valid):
    """Refuse what the kernel cannot take; see :func:`moe_gpu.kernels.route.route`."""
    shape = logits_TE.shape
    if len(shape) != 2:
        raise ValueError(
            f"logits must be 2-D (tokens, experts), got shape {tuple(logits_TE.shape)}"
        )
    if logits_TE.dtype not in _FLOATS:
        raise TypeError(f"logits must be float32, float16 or bfloat16, got {logits_TE.dtype}")
    L, E = slot_of_LE.shape
    if logits_TE.shape[1] != E:
        raise ValueError(f"logits must have {E} columns, one per expert, got {logits_TE.shape[1]}")
    if E > MAX_EXPERTS:
        raise ValueError(f"num_experts must lie in [1, {MAX_EXPERTS}], got {E}")
    if not 1 <= top_k <= min(E, MAX_TOP_K):
        raise ValueError(f"top_k must lie in [1, {min(E, MAX_TOP_K)}] for {E} experts, got {top_k}")
    if not 0 <= layer < L:
        raise ValueError(f"layer must lie in [0, {L - 1}], got {layer}")
    if logits_TE.device != slot_of_LE.device:
        raise ValueError(
            f"logits are on {logits_TE.device}, but the router state is on "
            f"{slot_of_LE.device}: move one of them"
        )
    words, window = scratch.numel(), affinity_window(decay)
    if words < layout.scratch_words(E, window):  # enough for every T otherwise
        T = logits_TE.shape[0]
        needed = layout.scratch_words(E, min(T, window))
        if words < needed:
            raise ValueError(
                f"state.scratch holds {words} words, a call of {T} tokens with decay={decay} needs "
                f"{needed}: reserve them first"
            )
    if num_valid is not None:
        if num_valid.dtype != torch.int32 or num_valid.numel() != 1:
            raise TypeError(
                f"num_valid must be one int32, got {num_valid.dtype} "
                f"of shape {tuple(num_valid.shape)}"
            )
        if num_valid.device != logits_TE.device:
            raise ValueError(
                f"num_valid is on {num_valid.device}, but logits are on {logits_TE.device}"
            )


def check_scores(rule, correction_bias, logits_TE, top_k):
    """Refuse a score rule that does not fit E experts, and a bias that does not fit the logits."""
    E = logits_TE.shape[1]
    check_groups(rule, E, top_k)
    if correction_bias is None:
        return
    if not isinstance(correction_bias, torch.Tensor) or correction_bias.dtype not in _FLOATS:
        found = getattr(correction_bias, "dtype", type(correction_bias).__name__)
        raise TypeError(
            f"correction_bias must be a float32, float16 or bfloat16 tensor, got {found}"
        )
    if tuple(correction_bias.shape) != (E,) or not correction_bias.is_contiguous():
        raise ValueError(
            f"correction_bias must be contiguous of shape {(E,)}, got "
            f"{tuple(correction_bias.shape)}"
        )
    if correction_bias.device != logits_TE.device:
        raise ValueError(
            f"correction_bias is on {correction_bias.device}, but logits are on {logits_TE.device}"
        )
    if rule.score == Score.SPARSEMIXER:
        raise ValueError("correction_bias has no meaning for a sparsemixer router")


def check_groups(rule, num_experts, top_k):
    """Refuse groups into which the experts do not divide, or too few experts to choose from."""
    groups, best = rule.num_groups, rule.top_groups
    if not 1 <= groups <= min(num_experts, MAX_GROUPS) or num_experts % groups:
        raise ValueError(
            f"num_groups must divide num_experts={num_experts} and lie in [1, {MAX_GROUPS}], "
            f"got {groups}"
        )
    if not 1 <= best <= groups:
        raise ValueError(f"top_groups must lie in [1, {groups}], the number of groups, got {best}")
    size = num_experts // groups
    if best * size < top_k:
        raise ValueError(
            f"top_groups={best} groups of {size} experts hold fewer than top_k={top_k}"
        )
    if rule.has_groups and size == 1 and rule.group_score == GroupScore.TOP2_SUM:
        raise ValueError(f"group_score of the top 2 needs groups of at least 2 experts, got {size}")


def check_out(out, T, top_k, device):
    """Refuse output tensors that do not fit a call of T tokens."""
    if not (isinstance(out, (tuple, list)) and len(out) == 2) or not all(
        isinstance(tensor, torch.Tensor) for tensor in out
    ):
        raise TypeError(f"out must be (weights, ids), two tensors, got {out!r}")
    weights_TK, ids_TK = out
    for name, tensor in (("out weights", weights_TK), ("out ids", ids_TK)):
        if tuple(tensor.shape) != (T, top_k):
            raise ValueError(f"{name} must have shape {(T, top_k)}, got {tuple(tensor.shape)}")
        if tensor.device != device:
            raise ValueError(f"{name} are on {tensor.device}, but logits are on {device}")
        if top_k > 1 and tensor.stride(1) != 1:
            raise ValueError(f"{name} must have unit stride along K, got {tensor.stride(1)}")
    if weights_TK.dtype not in _FLOATS:
        raise TypeError(f"out weights must be floating point, got {weights_TK.dtype}")
    if ids_TK.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"out ids must be int32 or int64, got {ids_TK.dtype}")
