"""How a route call refuses bad arguments: before anything is written, naming value and bound."""

import torch

from . import layout
from .route_ref import affinity_window

MAX_EXPERTS = 1024
MAX_TOP_K = 16
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def check_call(logits_TE, state, layer, top_k, decay, num_valid):
    """Refuse what the kernel cannot take; see :func:`moe_gpu.kernels.route.route`."""
    if logits_TE.ndim != 2:
        raise ValueError(
            f"logits must be 2-D (tokens, experts), got shape {tuple(logits_TE.shape)}"
        )
    if logits_TE.dtype not in _FLOATS:
        raise TypeError(f"logits must be float32, float16 or bfloat16, got {logits_TE.dtype}")
    L, E = state.slot_of_LE.shape
    if logits_TE.shape[1] != E:
        raise ValueError(f"logits must have {E} columns, one per expert, got {logits_TE.shape[1]}")
    if E > MAX_EXPERTS:
        raise ValueError(f"num_experts must lie in [1, {MAX_EXPERTS}], got {E}")
    if not 1 <= top_k <= min(E, MAX_TOP_K):
        raise ValueError(f"top_k must lie in [1, {min(E, MAX_TOP_K)}] for {E} experts, got {top_k}")
    if not 0 <= layer < L:
        raise ValueError(f"layer must lie in [0, {L - 1}], got {layer}")
    if logits_TE.device != state.slot_of_LE.device:
        raise ValueError(
            f"logits are on {logits_TE.device}, but the router state is on "
            f"{state.slot_of_LE.device}: move one of them"
        )
    aging = min(logits_TE.shape[0], affinity_window(decay))
    if state.scratch.numel() < layout.scratch_words(E, aging):
        raise ValueError(
            f"state.scratch holds {state.scratch.numel()} words, a call of {logits_TE.shape[0]} "
            f"tokens with decay={decay} needs {layout.scratch_words(E, aging)}: reserve them first"
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


def check_out(out, T, top_k, device):
    """Refuse output tensors that do not fit a call of T tokens."""
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
