"""Device functions of the route kernel: who is demanded and who is executed.

They work on tiles of ranks and codes (:mod:`._keys`), and hold what belongs to one place in the
order (0 .. K-1) as a tuple of K vectors of BLOCK_T.

``kernels/route_ref.py`` is the definition.
"""

import triton
import triton.language as tl

from ._keys import (
    FLOAT32_MAX,
    NONFINITE,
    TAKEN,
    best_of,
    key_score,
    order_key,
    rank_code,
    rank_key,
    without,
)
from ._score import mass_of
from .route_ref import SIMILARITY

# Rule values of route_ref.py; constexpr here because a kernel cannot read an enum
EXACT = tl.constexpr(0)
BONUS = tl.constexpr(1)
RANGE_BONUS = tl.constexpr(2)
MASS = tl.constexpr(3)
OUTPUT = tl.constexpr(4)
TWICE_SIMILARITY = tl.constexpr(2 * SIMILARITY)
NO_MARK = tl.constexpr(2**31 - 1)  # marks no column: codes are small, and as a rank it is NaN's


@triton.jit
def demand_of(rank_te, code_te, K: tl.constexpr, PACKED: tl.constexpr):
    """The K best columns of each row, best first, and the ranks without them."""
    keys = ()
    codes = ()
    marks = ()
    if PACKED:
        # no two ranks are equal, so nobody is taken out: counted up from the last best, modulo
        # 2**32, the next best is the farthest
        word_te = rank_te.to(tl.uint32, bitcast=True)
        mark_t = tl.max(rank_te, axis=1)
        for k in tl.static_range(K):
            if k > 0:
                word_t = mark_t.to(tl.uint32, bitcast=True)
                ahead_t = tl.max(word_te - word_t[:, None], axis=1)
                mark_t = (word_t + ahead_t).to(tl.int32, bitcast=True)
            keys = keys + (rank_key(mark_t, PACKED),)
            codes = codes + (rank_code(mark_t),)
            marks = marks + (mark_t,)
        rank_te = tl.where(rank_te >= mark_t[:, None], TAKEN, rank_te)
    else:
        for _ in tl.static_range(K):
            key_t, code_t, mark_t = best_of(rank_te, code_te, PACKED)
            rank_te = without(rank_te, code_te, mark_t, PACKED)
            keys = keys + (key_t,)
            codes = codes + (code_t,)
            marks = marks + (mark_t,)
    return keys, codes, marks, rank_te


@triton.jit
def swap_within_budget(
    left_te, code_te, missing_te, mass_te, keys, codes, masses, top_t, total_t, strength_t, may_t,
    K: tl.constexpr, J: tl.constexpr, RULE: tl.constexpr, SPLIT: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """Rule.MASS and Rule.OUTPUT: from rank K-1 up, missing experts give way until one may not."""
    # residents outside the demand
    free_te = tl.where(missing_te, TAKEN, left_te)
    budget_t = strength_t * total_t
    if RULE == OUTPUT:
        budget_t = budget_t * budget_t
    may_t = may_t & (total_t > 0.0)
    moved_t = tl.zeros_like(total_t)
    out_keys = ()
    out_codes = ()
    for k in tl.static_range(K - 1, J - 1, -1):
        wants_t = may_t & ((codes[k] & 1) == 1)
        key_t, code_t, mark_t = best_of(free_te, code_te, PACKED)
        gone_t = masses[k]
        come_t = mass_of(key_t, code_t, mass_te, code_te, top_t, SPLIT)
        if RULE == MASS:
            price_t = moved_t + tl.maximum(gone_t - come_t, 0.0)
        else:
            price_t = gone_t * gone_t + come_t * (come_t - TWICE_SIMILARITY * gone_t)
        takes_t = wants_t & (key_t >= NONFINITE) & (price_t <= budget_t)
        may_t = may_t & (takes_t | (wants_t == 0))
        moved_t = tl.where(takes_t, price_t, moved_t)
        free_te = without(free_te, code_te, tl.where(takes_t, mark_t, NO_MARK), PACKED)
        out_keys = (tl.where(takes_t, key_t, keys[k]),) + out_keys
        out_codes = (tl.where(takes_t, code_t, codes[k]),) + out_codes
    for j in tl.static_range(J - 1, -1, -1):
        out_keys = (keys[j],) + out_keys
        out_codes = (codes[j],) + out_codes
    return out_keys, out_codes


@triton.jit
def biased_key(key, missing, bonus):
    """The key of min(s + b, FLOAT32_MAX) for residents; non-finite scores gain nothing."""
    biased = order_key(tl.minimum(key_score(key) + bonus, FLOAT32_MAX))
    return tl.where(missing | (key < NONFINITE), key, biased)  # -inf plus anything stays -inf


@triton.jit
def may_outbid(
    left_te, code_te, keys, codes, bonus_t, K: tl.constexpr, J: tl.constexpr, PACKED: tl.constexpr
):
    """Whether the best outsider's sum is at least the worst unprotected insider's."""
    missing_te = (code_te & 1) == 1
    left_te = rank_key(left_te, PACKED)
    bid_t = tl.max(biased_key(left_te, missing_te, bonus_t[:, None]), axis=1)
    worst_t = biased_key(keys[J], (codes[J] & 1) == 1, bonus_t)
    for k in tl.static_range(J + 1, K):
        worst_t = tl.minimum(worst_t, biased_key(keys[k], (codes[k] & 1) == 1, bonus_t))
    return bid_t >= worst_t


@triton.jit
def take_biased_best(
    all_te, code_te, keys, codes, bonus_t, may_t,
    K: tl.constexpr, J: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Rule.BONUS: the protected ranks, then the best K - J of the rest by biased key."""
    all_te = rank_key(all_te, PACKED)
    bids_te = biased_key(all_te, (code_te & 1) == 1, bonus_t[:, None])
    out_keys = ()
    out_codes = ()
    for j in tl.static_range(J):
        bids_te = tl.where(code_te == codes[j][:, None], TAKEN, bids_te)
        out_keys = out_keys + (keys[j],)
        out_codes = out_codes + (codes[j],)
    for k in tl.static_range(J, K):
        _, code_t, _ = best_of(bids_te, code_te, False)  # a biased score is no bfloat16
        bids_te = tl.where(code_te == code_t[:, None], TAKEN, bids_te)
        code_t = tl.where(may_t, code_t, codes[k])
        # the unbiased key comes back from the row: a clamped sum cannot give it
        key_t = tl.max(tl.where(code_te == code_t[:, None], all_te, TAKEN), axis=1)
        out_keys = out_keys + (key_t,)
        out_codes = out_codes + (code_t,)
    return out_keys, out_codes


@triton.jit
def by_score(
    keys, codes, executed_te, all_te, code_te, K: tl.constexpr, PACKED: tl.constexpr
):  # fmt: skip
    """The executed experts, best unbiased score first; no marks with K = 2."""
    if K == 2:
        first_t = (keys[0] > keys[1]) | ((keys[0] == keys[1]) & (codes[0] < codes[1]))
        keys = (tl.where(first_t, keys[0], keys[1]), tl.where(first_t, keys[1], keys[0]))
        codes = (tl.where(first_t, codes[0], codes[1]), tl.where(first_t, codes[1], codes[0]))
        marks = codes
    else:
        executed_te = tl.where(executed_te, all_te, TAKEN)
        keys, codes, marks, _ = demand_of(executed_te, code_te, K, PACKED)
    return keys, codes, marks
