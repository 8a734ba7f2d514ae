"""Device functions at the end of a route call: the affinity ages, the layer's state is written.

The program that calls :func:`finish` is the last one that still runs, so plain stores suffice
where only this kernel writes; counters are added atomically all the same, since other streams
may read and reset them.
"""

import triton
import triton.language as tl

from . import layout

_TOKENS = tl.constexpr(layout.TOKENS)
_PAIRS = tl.constexpr(layout.PAIRS)
_HITS = tl.constexpr(layout.HITS)
_MISSES = tl.constexpr(layout.MISSES)
_UNIQUE_MISSES = tl.constexpr(layout.UNIQUE_MISSES)
_SWAPS = tl.constexpr(layout.SWAPS)
_MOVED_MASS = tl.constexpr(layout.MOVED_MASS)
_PADDED = tl.constexpr(layout.PADDED)
_NUM_COUNTERS = tl.constexpr(layout.NUM_COUNTERS)
_MOVED_MASS_ONE = tl.constexpr(layout.MOVED_MASS_ONE)
# Aging of route_ref.py; constexpr here because a kernel cannot read an enum
STEPS = tl.constexpr(0)
LAST = tl.constexpr(1)
SUM = tl.constexpr(2)
_NONE = tl.constexpr(layout.PRIORITY_NONE)
_URGENT = tl.constexpr(layout.PRIORITY_URGENT)
_BACKGROUND = tl.constexpr(layout.PRIORITY_BACKGROUND)
_RECORD_HEADER = tl.constexpr(layout.RECORD_HEADER)
_RECORD_FIELDS = tl.constexpr(layout.RECORD_FIELDS)
_RECORD_TAIL = tl.constexpr(layout.RECORD_TAIL)


@triton.jit
def moved_units_of(moved_t):
    return tl.sum((moved_t * _MOVED_MASS_ONE + 0.5).to(tl.int32), axis=0)


@triton.jit
def age_once(affinity_e, chosen_e, decay, boost, max_score):
    """Age by one token."""
    return tl.minimum(affinity_e * decay + tl.where(chosen_e, boost, 0.0), max_score)


@triton.jit
def power(base, exponent, largest):
    """``base ** exponent`` for exponents up to ``largest``, as the definition squares."""
    # squares in float64: in float32 each would double the error of the one before
    square = tl.cast(tl.cast(base, tl.float32), tl.float64)
    result = tl.cast(exponent * 0 + 1, tl.float32)
    bit = 0
    while (largest >> bit) > 0:
        factor = tl.cast(square, tl.float32)
        result = tl.where(((exponent >> bit) & 1) == 1, result * factor, result)
        square = square * square
        bit += 1
    return result


@triton.jit
def aged_part(age_t, window, tokens, decay, units):
    """What a choice of this age adds to the sum of Aging.SUM, in its units."""
    part_t = power(decay, tl.minimum(age_t, window), tl.minimum(tokens, window)) * units + 0.5
    return tl.where((age_t >= 0) & (age_t < window), part_t.to(tl.int32), 0)


@triton.jit
def age_by(affinity_e, found_e, tokens, window, decay, max_score, unit, AGING: tl.constexpr):
    """Age by all tokens of a call, of which ``found_e`` says the last choice, plus 1, or the sum."""
    n = tl.minimum(tokens, window)
    if AGING == LAST:
        top_e = tl.where(found_e > 0, max_score, affinity_e)
        aged_e = top_e * power(decay, tl.minimum(tokens - found_e, window), n)
    else:
        aged_e = affinity_e * power(decay, n, n) + found_e.to(tl.float32) * unit
    return tl.minimum(aged_e, max_score)


@triton.jit
def age(affinity_e, word_e, tokens, decay, boost, max_score):
    """Age by up to 32 tokens, the lowest bit of ``word_e`` first."""
    for t in range(0, tokens):
        affinity_e = age_once(affinity_e, ((word_e >> t) & 1) == 1, decay, boost, max_score)
    return affinity_e


@triton.jit
def count_activations(activations_ptr, executed_e, offs_e, E: tl.constexpr):
    chosen_e = (offs_e < E) & (executed_e > 0)
    tl.atomic_add(activations_ptr + offs_e, executed_e.to(tl.int64), mask=chosen_e, sem="relaxed")


@triton.jit
def finish(
    affinity_ptr, counters_ptr, record_ptr,
    affinity_e, executed_e, swapped_e, moved_units, missing_e, offs_e,
    T, num_valid, generation,
    E: tl.constexpr, K: tl.constexpr, SWAPS: tl.constexpr,
):  # fmt: skip
    """Write the layer's state once all rows are routed; pointers are at the layer's row.

    Returns the misses, int32.
    """
    mask_e = offs_e < E
    # a narrow row is held by several warps, each of which has loaded it: none may still be
    # loading when another stores
    tl.debug_barrier()
    tl.store(affinity_ptr + offs_e, affinity_e, mask=mask_e)

    missing_e = missing_e == 1
    urgent_e = mask_e & missing_e & (executed_e > 0)
    misses = tl.sum(tl.where(missing_e, executed_e, 0), axis=0)

    offs_c = tl.arange(0, _NUM_COUNTERS)
    pairs = num_valid.to(tl.int64) * K
    added_c = tl.where(offs_c == _TOKENS, num_valid.to(tl.int64), 0)
    added_c = tl.where(offs_c == _PAIRS, pairs, added_c)
    added_c = tl.where(offs_c == _HITS, pairs - misses, added_c)
    added_c = tl.where(offs_c == _MISSES, misses, added_c)
    count = tl.sum(urgent_e.to(tl.int32), axis=0)
    added_c = tl.where(offs_c == _UNIQUE_MISSES, count, added_c)
    if SWAPS:
        added_c = tl.where(offs_c == _SWAPS, tl.sum(swapped_e, axis=0), added_c)
        added_c = tl.where(offs_c == _MOVED_MASS, moved_units, added_c)
    added_c = tl.where(offs_c == _PADDED, T - num_valid, added_c)
    # one vector add: a scalar atomic would run once per thread
    tl.atomic_add(counters_ptr + offs_c, added_c, mask=added_c != 0, sem="relaxed")

    priority_e = tl.where(urgent_e, _URGENT, _NONE)
    waiting_e = tl.where(urgent_e, executed_e, 0)
    if SWAPS:
        background_e = mask_e & missing_e & (swapped_e > 0) & (urgent_e == 0)
        count += tl.sum(background_e.to(tl.int32), axis=0)
        priority_e = tl.where(background_e, _BACKGROUND, priority_e)
        waiting_e = tl.where(background_e, swapped_e, waiting_e)
    row_ptr = record_ptr + _RECORD_HEADER + offs_e
    # last word first, first word last: a reader from front to back sees them differ if overtaken
    LAST: tl.constexpr = _RECORD_HEADER + _RECORD_FIELDS * E + _RECORD_TAIL - 1
    tl.store(record_ptr + LAST, generation)
    tl.store(record_ptr + 1, count)
    tl.store(row_ptr, executed_e, mask=mask_e)
    tl.store(row_ptr + E, waiting_e, mask=mask_e)
    tl.store(row_ptr + 2 * E, priority_e, mask=mask_e)
    tl.store(row_ptr + 3 * E, affinity_e.to(tl.int32, bitcast=True), mask=mask_e)
    tl.store(record_ptr, generation)
    return misses
