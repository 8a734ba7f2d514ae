"""Launch the fused route kernel: its shape, its compile options, and the way past Triton's front door.

``kernel[grid](...)`` finds the compiled kernel for its arguments anew in every call, which costs
several times the launch itself: it classifies each of 45 arguments and compares every global that
the sources name. What can differ between two calls here is known, so the first call of a kind goes
that way, and those after it go straight to the compiled kernel that came of it.
"""

import functools

import torch
import triton
from triton import knobs
from triton.runtime import driver

from . import layout
from ._route_kernel import route_kernel
from .route_ref import affinity_window, aging_of, units_of

PROGRAMS_PER_PROCESSOR = (
    16  # beyond it programs take several tiles each: fewer atomics on the same words
)
_ALIGNMENT = 16  # bytes: what Triton distinguishes

_compiled: dict[tuple, tuple] = {}  # by kind of call: the kernel, and what it takes to run it


@functools.lru_cache(4096)
def tile_of(T: int, E: int, K: int) -> tuple[int, int, int]:
    """Return ``(BLOCK_T, BLOCK_E, num_warps)`` for a call of T tokens.

    One warp up to 512 experts: then nothing waits at a barrier. Up to 16 experts a thread holds rows
    or halves of them, as many as its registers allow; beyond that the warp holds one row. BLOCK_T
    divides the 32-token chunk. How these shapes were found is in profiling/README.md.
    """
    BLOCK_E = triton.next_power_of_2(E)
    num_warps = 1 if BLOCK_E <= 512 else 4
    if T == 1:  # a row of 32 or more columns is reduced over the warp by one instruction
        return 1, max(BLOCK_E, 32), num_warps
    if BLOCK_E >= 32:
        return 1, BLOCK_E, num_warps
    rows = (256 if K <= 2 else 128) // BLOCK_E
    return min(rows, layout.CHUNK, triton.next_power_of_2(T)), BLOCK_E, num_warps


def columns_of(BLOCK_T: int, K: int) -> int:
    """Return ``BLOCK_K``; one row is reduced over the warp, as above."""
    return 32 if BLOCK_T == 1 else triton.next_power_of_2(K)


@functools.cache
def most_programs(device: torch.device) -> int:
    """Return the largest grid on ``device``."""
    if device.type != "cuda":  # in the interpreter
        return 1024
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return processors * PROGRAMS_PER_PROCESSOR


def launch_options(num_warps: int, hip: bool = torch.version.hip is not None) -> dict:
    """Return the compile options of every launch, for AMD if ``hip``."""
    # no fused multiply-add: the affinity takes the same two roundings as the reference
    options = {"num_warps": num_warps, "enable_fp_fusion": False}
    # left alone, ptxas spills a few bytes to reach the next step of occupancy
    return options if hip else options | {"maxnreg": 255}


def launch(
    logits_TE, weights_TK, ids_TK, num_valid, slot_of_LE, strength_L, affinity_LE,
    activations_LE, counters_LC, record_LR, scratch,
    layer, top_k, rule, protect, renormalize, affinity_from, decay, boost, max_score,
    control_LP, control_state_LS, meters_LM,
    bias_E, score, scaling_factor, num_groups, top_groups, group_score, softcap, jitter_eps,
):  # fmt: skip
    """Launch the kernel on the current stream of the logits' device; arguments as in ``route_``."""
    T, E = logits_TE.shape
    tile = BLOCK_T, BLOCK_E, num_warps = tile_of(T, E, top_k)
    device = logits_TE.device
    aging = int(aging_of(decay, boost, max_score))
    programs = min(-(-T // BLOCK_T), most_programs(device))
    contiguous = logits_TE.is_contiguous() and weights_TK.is_contiguous() and ids_TK.is_contiguous()
    strides = (0, 0, 0, 0)  # those of contiguous tensors follow from E and K
    if not contiguous:
        strides = (*logits_TE.stride(), weights_TK.stride(0), ids_TK.stride(0))
    tensors = (
        logits_TE, weights_TK, ids_TK, num_valid, bias_E, slot_of_LE, strength_L, affinity_LE,
        activations_LE, counters_LC, record_LR, scratch, control_LP, control_state_LS, meters_LM,
    )  # fmt: skip
    arguments = (
        logits_TE, strides[0], strides[1], num_valid, bias_E, slot_of_LE, strength_L,
        weights_TK, strides[2], ids_TK, strides[3],
        affinity_LE, activations_LE, counters_LC, record_LR, scratch,
        control_LP, control_state_LS, meters_LM,
        T, layer, affinity_window(decay), decay, boost, max_score, *units_of(decay, boost),
        scaling_factor, softcap, 2 * jitter_eps,
    )  # fmt: skip
    kind = (
        device, logits_TE.dtype, weights_TK.dtype, ids_TK.dtype, num_valid is None,
        None if bias_E is None else bias_E.dtype, control_LP is None, meters_LM is None,
        E, top_k, rule, protect, renormalize, affinity_from, score, num_groups, top_groups,
        group_score, softcap > 0, tile, T <= BLOCK_T, aging,
    )  # fmt: skip
    known = _compiled.get(kind)
    is_plain = contiguous and _is_plain(tensors)
    if known is not None and is_plain:
        if device.index == driver.active.get_current_device():
            _run(known, programs, device.index, arguments)
        else:  # a guard costs microseconds
            with torch.cuda.device_of(logits_TE):
                _run(known, programs, device.index, arguments)
        return
    constants = {
        "E": E, "K": top_k, "J": protect, "RULE": rule, "SCORE": score,
        "RENORMALIZE": renormalize, "CAPPED": softcap > 0,
        "NUM_GROUPS": num_groups, "TOP_GROUPS": top_groups, "GROUP_SCORE": group_score,
        "BLOCK_G": triton.next_power_of_2(num_groups), "AFFINITY_FROM": affinity_from, "AGING": aging,
        "CONTROL": control_LP is not None, "METERS": meters_LM is not None,
        "CONTIGUOUS": contiguous, "BLOCK_T": BLOCK_T, "BLOCK_E": BLOCK_E,
        "BLOCK_K": columns_of(BLOCK_T, top_k), "ONE_TILE": T <= BLOCK_T,
    }  # fmt: skip
    with torch.cuda.device_of(logits_TE):  # Triton launches on the current device
        kernel = route_kernel[(programs,)](*arguments, **constants, **launch_options(num_warps))
    if kernel is not None and known is None and is_plain:  # None in the interpreter
        run = kernel.run  # loads the binary, if it has to
        values = tuple(constants.values())
        _compiled[kind] = kernel, run, kernel.function, kernel.packed_metadata, values


def _run(known, programs, index, arguments) -> None:
    _, run, function, metadata, constants = known
    stream = driver.active.get_current_stream(index)
    run(programs, 1, 1, stream, function, metadata, None, None, None, *arguments, *constants)


def _is_plain(tensors) -> bool:
    """Whether all are aligned, or Triton would compile another kernel, and no profiler has a hook."""
    bits = 0
    for tensor in tensors:
        if tensor is not None:
            bits |= tensor.data_ptr()
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    hooks = getattr(enter, "calls", enter) or getattr(leave, "calls", leave)
    return bits % _ALIGNMENT == 0 and not hooks
