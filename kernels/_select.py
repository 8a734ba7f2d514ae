"""Device functions of the route kernel: who is demanded and who is executed.

They work on tiles of keys and codes (:mod:`._keys`), and hold what belongs to one rank (0 .. K-1)
as a tuple of K vectors of BLOCK_T.

``kernels/route_ref.py`` is the definition.
"""

import triton
import triton.language as tl

from ._keys import TAKEN, best_of, key_score, order_key
from ._score import mass_of
from .route_ref import SIMILARITY

FLOAT32_MAX = tl.constexpr(3.4028234663852886e38)

# Rule values of route_ref.py; constexpr here because a kernel cannot read an enum
EXACT = tl.constexpr(0)
BONUS = tl.constexpr(1)
RANGE_BONUS = tl.constexpr(2)
MASS = tl.constexpr(3)
OUTPUT = tl.constexpr(4)
TWICE_SIMILARITY = tl.constexpr(2 * SIMILARITY)


@triton.jit
def demand_of(key_te, code_te, K: tl.constexpr):
    """The K best columns of each row, best first, and the keys without them."""
    keys = ()
    codes = ()
    for _ in tl.static_range(K):
        key_t, code_t = best_of(key_te, code_te)
        key_te = tl.where(code_te == code_t[:, None], TAKEN, key_te)
        keys = keys + (key_t,)
        codes = codes + (code_t,)
    return keys, codes, key_te


@triton.jit
def swap_within_budget(
    left_te, code_te, missing_te, mass_te, keys, codes, masses, top_t, total_t, strength_t, may_t,
    K: tl.constexpr, J: tl.constexpr, RULE: tl.constexpr, SPLIT: tl.constexpr,
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
        key_t, code_t = best_of(free_te, code_te)
        gone_t = masses[k]
        come_t = mass_of(key_t, code_t, mass_te, code_te, top_t, SPLIT)
        if RULE == MASS:
            price_t = moved_t + tl.maximum(gone_t - come_t, 0.0)
        else:
            price_t = gone_t * gone_t + come_t * (come_t - TWICE_SIMILARITY * gone_t)
        takes_t = wants_t & (key_t != TAKEN) & (price_t <= budget_t)
        may_t = may_t & (takes_t | (wants_t == 0))
        moved_t = tl.where(takes_t, price_t, moved_t)
        free_te = tl.where(takes_t[:, None] & (code_te == code_t[:, None]), TAKEN, free_te)
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
    return tl.where(missing | (key == TAKEN), key, biased)  # -inf plus anything stays -inf


@triton.jit
def may_outbid(left_te, code_te, keys, codes, bonus_t, K: tl.constexpr, J: tl.constexpr):
    """Whether the best outsider's sum is at least the worst unprotected insider's."""
    missing_te = (code_te & 1) == 1
    bid_t = tl.max(biased_key(left_te, missing_te, bonus_t[:, None]), axis=1)
    worst_t = biased_key(keys[J], (codes[J] & 1) == 1, bonus_t)
    for k in tl.static_range(J + 1, K):
        worst_t = tl.minimum(worst_t, biased_key(keys[k], (codes[k] & 1) == 1, bonus_t))
    return bid_t >= worst_t


@triton.jit
def take_biased_best(
    all_te, code_te, keys, codes, bonus_t, may_t, K: tl.constexpr, J: tl.constexpr
):
    """Rule.BONUS: the protected ranks, then the best K - J of the rest by biased key."""
    bids_te = biased_key(all_te, (code_te & 1) == 1, bonus_t[:, None])
    out_keys = ()
    out_codes = ()
    for j in tl.static_range(J):
        bids_te = tl.where(code_te == codes[j][:, None], TAKEN, bids_te)
        out_keys = out_keys + (keys[j],)
        out_codes = out_codes + (codes[j],)
    for k in tl.static_range(J, K):
        _, code_t = best_of(bids_te, code_te)
        bids_te = tl.where(code_te == code_t[:, None], TAKEN, bids_te)
        code_t = tl.where(may_t, code_t, codes[k])
        # the unbiased key comes back from the row: a clamped sum cannot give it
        key_t = tl.max(tl.where(code_te == code_t[:, None], all_te, TAKEN), axis=1)
        out_keys = out_keys + (key_t,)
        out_codes = out_codes + (code_t,)
    return out_keys, out_codes


@triton.jit
def by_score(keys, codes, executed_te, all_te, code_te, K: tl.constexpr):
    """The executed experts, best unbiased score first."""
    if K == 2:
        first_t = (keys[0] > keys[1]) | ((keys[0] == keys[1]) & (codes[0] < codes[1]))
        keys = (tl.where(first_t, keys[0], keys[1]), tl.where(first_t, keys[1], keys[0]))
        codes = (tl.where(first_t, codes[0], codes[1]), tl.where(first_t, codes[1], codes[0]))
    else:
        keys, codes, _ = demand_of(tl.where(executed_te, all_te, TAKEN), code_te, K)
    return keys, codes
