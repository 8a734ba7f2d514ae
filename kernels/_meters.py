"""Device functions of the quality meters; ``meters_ref.py`` says what they count."""

import triton
import triton.language as tl

from . import layout

_METERED = tl.constexpr(layout.METERED)
_L1_CHANGE = tl.constexpr(layout.L1_CHANGE)
_ROUTING_KL = tl.constexpr(layout.ROUTING_KL)
_HISTOGRAM = tl.constexpr(layout.HISTOGRAM)
_LAST_BIN = tl.constexpr(layout.HISTOGRAM_BINS - 1)
_FIRST_HALF_OCTAVE = tl.constexpr(2 * (127 - layout.HISTOGRAM_OCTAVES))
_SWAPS_BY_RANK = tl.constexpr(layout.SWAPS_BY_RANK)
_METER_ONE = tl.constexpr(float(layout.METER_ONE))
_LEAST_KEPT = tl.constexpr(layout.LEAST_KEPT)
METERS_BLOCK = tl.constexpr(1 << (layout.NUM_METERS - 1).bit_length())


@triton.jit
def gone_of(demand_codes, codes, K: tl.constexpr):
    """Return int32 words whose bit k says that rank k of the demand was swapped away."""
    gone_t = tl.zeros_like(codes[0])
    for k in tl.static_range(K):
        stays_t = demand_codes[k] == codes[0]
        for i in tl.static_range(1, K):
            stays_t = stays_t | (demand_codes[k] == codes[i])
        gone_t = gone_t | tl.where(stays_t, 0, 1 << k)
    return gone_t


@triton.jit
def kept_of(masses, gone_t, K: tl.constexpr):
    """Return the mass of the demanded experts that were executed."""
    kept_t = tl.where((gone_t & 1) == 0, masses[0], 0.0)
    for k in tl.static_range(1, K):
        kept_t = kept_t + tl.where(((gone_t >> k) & 1) == 0, masses[k], 0.0)
    return kept_t


@triton.jit
def _units_of(share_t):
    return tl.sum((share_t * _METER_ONE + 0.5).to(tl.int64), axis=0)


@triton.jit
def meters_of(moved_t, change_t, gone_t, valid_t, K: tl.constexpr):
    """Return what a tile adds to the meters, int64 (METERS_BLOCK,)."""
    offs_m = tl.arange(0, METERS_BLOCK)
    # seeeeeeeemmm... --> eeeeeeeem: the octave and which half of it
    bin_t = (moved_t.to(tl.int32, bitcast=True) >> 22) - (_FIRST_HALF_OCTAVE - 1)
    bin_t = tl.minimum(tl.maximum(bin_t, 1), _LAST_BIN)
    bin_t = _HISTOGRAM + tl.where(moved_t > 0.0, bin_t, 0)
    bin_t = tl.where(valid_t, bin_t, -1)
    added_m = tl.sum((bin_t[:, None] == offs_m[None, :]).to(tl.int32), axis=0).to(tl.int64)
    kl_t = -tl.log(tl.maximum(1.0 - moved_t, _LEAST_KEPT))
    added_m = tl.where(offs_m == _METERED, tl.sum(valid_t.to(tl.int64), axis=0), added_m)
    added_m = tl.where(offs_m == _L1_CHANGE, _units_of(change_t), added_m)
    added_m = tl.where(offs_m == _ROUTING_KL, _units_of(kl_t), added_m)
    for k in tl.static_range(K):
        swaps = tl.sum(((gone_t >> k) & 1).to(tl.int64), axis=0)
        added_m = tl.where(offs_m == _SWAPS_BY_RANK + k, swaps, added_m)
    return added_m


@triton.jit
def add_meters(meters_ptr, added_m):
    """Add to a layer's row; others may read and reset it meanwhile."""
    offs_m = tl.arange(0, METERS_BLOCK)
    tl.atomic_add(meters_ptr + offs_m, added_m, mask=added_m != 0, sem="relaxed")
