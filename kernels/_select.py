"""Device functions of the route kernel: who is demanded, who is executed, with what weight.

They work on a tile of BLOCK_T rows and BLOCK_E >= E columns, and hold what belongs to one rank
(0 .. K-1) as a tuple of K vectors of BLOCK_T: no gather, no sort, no shared memory of our own.

Two encodings carry the whole selection:

* key: int32 that orders as the score does, every non-finite score at the key of -inf, and
  TAKEN, one below, for columns that are gone (already chosen, or padding). Nothing is masked
  with a sentinel score, which a large bonus could meet.
* code: ``2 * expert + missing``. The lowest code among equal keys is the lower id, and who was
  chosen and whether it is resident arrive in one reduction.

``kernels/route_ref.py`` is the definition.
"""

import triton
import triton.language as tl

from .route_ref import SIMILARITY

TAKEN = tl.constexpr(-(2**31))
NONFINITE = tl.constexpr(-2139095041)  # the key of -inf: 0xff800000 ^ 0x7fffffff
NO_CODE = tl.constexpr(2**31 - 1)
FLOAT32_MAX = tl.constexpr(3.4028234663852886e38)

# Rule values of route_ref.py; constexpr here because a kernel cannot read an enum
EXACT = tl.constexpr(0)
BONUS = tl.constexpr(1)
RANGE_BONUS = tl.constexpr(2)
MASS = tl.constexpr(3)
OUTPUT = tl.constexpr(4)
TWICE_SIMILARITY = tl.constexpr(2 * SIMILARITY)


@triton.jit
def order_key(x):
    bits = x.to(tl.int32, bitcast=True)
    bits = tl.where(bits == TAKEN, 0, bits)  # -0.0 has the bits of TAKEN: both zeros tie
    # negative floats run backwards as integers: s eeeeeeee mmm --> s ~eeeeeeee ~mmm
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where((bits & 0x7F800000) == 0x7F800000, NONFINITE, key)


@triton.jit
def key_score(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def best_of(key_te, code_te):
    key_t = tl.max(key_te, axis=1)
    code_t = tl.min(tl.where(key_te == key_t[:, None], code_te, NO_CODE), axis=1)
    return key_t, code_t


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
def mass_of(score, top):
    """exp(s - top): 0 for a non-finite score, whose key decodes to -inf."""
    return tl.exp(score - top)


@triton.jit
def sum_of(values, K: tl.constexpr):
    total = values[0]
    for k in tl.static_range(1, K):
        total = total + values[k]
    return total


@triton.jit
def masses_of(keys, top_t, K: tl.constexpr):
    masses = ()
    for k in tl.static_range(K):
        masses = masses + (mass_of(key_score(keys[k]), top_t),)
    return masses


@triton.jit
def finite_or_zero(score):
    """The reference point of an exponential: a row with nothing finite has none."""
    return tl.where(score == -float("inf"), 0.0, score)


@triton.jit
def swap_within_budget(
    left_te, code_te, missing_te, keys, codes, top_t, total_t, strength_t, may_t,
    K: tl.constexpr, J: tl.constexpr, RULE: tl.constexpr,
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
        gone_t = mass_of(key_score(keys[k]), top_t)
        come_t = mass_of(key_score(key_t), top_t)
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


@triton.jit
def row_mass_of(scores_te, key_te, top_t):
    """The mass of all experts of a row."""
    row_te = tl.where(key_te <= NONFINITE, 0.0, mass_of(scores_te, top_t[:, None]))
    # in units of 2**-32 (the best mass is 1): an integer sum has the same bits in every order, and
    # the order follows from the tile and the strides
    units_te = (row_te * 4294967296.0).to(tl.int64)
    return tl.sum(units_te, axis=1).to(tl.float32) * (1.0 / 4294967296.0)


@triton.jit
def mixing_weights_of(
    scores_te, key_te, keys, demand_keys, K: tl.constexpr, RENORMALIZE: tl.constexpr
):
    """Weights of the K experts in ``keys``; uniform where no score is finite."""
    weights = ()
    if RENORMALIZE and K == 2:
        # softmax of two: one exponential. A row with nothing finite has ratio 1
        best_t = key_score(keys[0])
        gap_t = tl.where(best_t == -float("inf"), 0.0, key_score(keys[1]) - best_t)
        ratio_t = tl.exp(gap_t)
        weights = (1.0 / (1.0 + ratio_t), ratio_t / (1.0 + ratio_t))
    else:
        if RENORMALIZE:
            # relative to the best executed score: relative to the best of the row, every weight
            # could underflow once the top expert has been swapped away
            top_t = finite_or_zero(key_score(keys[0]))
            masses = masses_of(keys, top_t, K)
            total_t = sum_of(masses, K)
        else:
            top_t = finite_or_zero(key_score(demand_keys[0]))
            masses = masses_of(keys, top_t, K)
            total_t = row_mass_of(scores_te, key_te, top_t)
        dead_t = total_t <= 0.0
        scale_t = 1.0 / tl.where(dead_t, 1.0, total_t)
        for k in tl.static_range(K):
            weights = weights + (tl.where(dead_t, 1.0 / K, masses[k] * scale_t),)
    return weights
