"""Device functions of the route kernel: from logits to keys and masses, and to weights at the end.

``kernels/score_ref.py`` is the definition. Where the selection score is the logit itself, the key
of an expert holds its mass too (``exp(s - top)``), and no tile of masses is kept. Where the two
differ (``SPLIT``: sigmoid, or a correction bias) there is one, ``mass_te``; elsewhere it is unused.
"""

import triton
import triton.language as tl

from ._keys import (
    NONFINITE,
    TAKEN,
    best_of,
    column,
    finite_or_zero,
    key_score,
    order_key,
    rank_key,
    ranked,
    side_by_side,
    sum_of,
    value_at,
    without,
)
from .score_ref import SIGMOID_EPS

# Score values of score_ref.py; constexpr here because a kernel cannot read an enum
SOFTMAX = tl.constexpr(0)
SIGMOID = tl.constexpr(1)
SPARSEMIXER = tl.constexpr(2)
_TOP2_SUM = tl.constexpr(0)
_EPS = tl.constexpr(SIGMOID_EPS)


@triton.jit
def capped(x, softcap):
    """``softcap * tanh(x / softcap)``; what is not finite stays so."""
    u = x / softcap
    square = u * u
    # near zero the quotient below cancels. Relative error under 2e-8 for |u| < 1/4
    series = square * (2.0 / 15.0 + square * (-17.0 / 315.0 + square * (62.0 / 2835.0)))
    small = u * (1.0 + square * (-1.0 / 3.0) + square * series)
    t = tl.exp(-2.0 * tl.abs(u))
    large = (1.0 - t) / (1.0 + t)
    large = tl.where(u < 0.0, -large, large)
    bounded = softcap * tl.where(square < 0.0625, small, large)
    return tl.where(order_key(x) == NONFINITE, x, bounded)


@triton.jit
def _sum_of_units(share_te):
    """Row sums of values in [0, 1]."""
    # in units of 2**-32: an integer sum has the same bits in every order, and the order follows
    # from the tile and the strides
    units_te = (share_te * 4294967296.0).to(tl.int64)
    return tl.sum(units_te, axis=1).to(tl.float32) * (1.0 / 4294967296.0)


@triton.jit
def scored(
    x_te, bias_e, mask_e, code_te,
    SCORE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_GROUPS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Ranks by selection score, TAKEN where there is no expert, and with SPLIT the masses."""
    key_te = tl.where(mask_e[None, :], order_key(x_te), TAKEN)
    mass_te = x_te
    if SCORE == SIGMOID:
        mass_te = tl.where(key_te > NONFINITE, 1.0 / (1.0 + tl.exp(-x_te)), 0.0)
    elif HAS_BIAS:
        top_t = key_score(tl.max(key_te, axis=1))
        mass_te = tl.where(key_te > NONFINITE, tl.exp(x_te - top_t[:, None]), 0.0)
        total_t = _sum_of_units(mass_te)
        mass_te = mass_te / tl.where(total_t > 0.0, total_t, 1.0)[:, None]
    if HAS_BIAS or (SCORE == SIGMOID and HAS_GROUPS):
        selection_te = mass_te
        if HAS_BIAS:
            selection_te = selection_te + bias_e[None, :]
        key_te = tl.where(key_te > NONFINITE, order_key(selection_te), key_te)
    rank_te = tl.where(mask_e[None, :], ranked(key_te, code_te, PACKED), TAKEN)
    return rank_te, mass_te


@triton.jit
def in_best_groups(
    rank_te, code_te, offs_e, E: tl.constexpr, NUM_GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr,
    GROUP_SCORE: tl.constexpr, BLOCK_G: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Whether an expert is in one of the groups that its token may visit."""
    group_e = offs_e // (E // NUM_GROUPS)
    offs_g = tl.arange(0, BLOCK_G)
    group_tg = tl.full([rank_te.shape[0], BLOCK_G], TAKEN, tl.int32)
    # a loop that is not unrolled: eight groups would make the kernel five times as long to compile
    for g in range(NUM_GROUPS):
        own_te = tl.where((group_e == g)[None, :], rank_te, TAKEN)
        score_t, _, mark_t = best_of(own_te, code_te, PACKED)
        if GROUP_SCORE == _TOP2_SUM:
            rest_te = without(own_te, code_te, mark_t, PACKED)
            second_t = rank_key(tl.max(rest_te, axis=1), PACKED)
            score_t = order_key(key_score(score_t) + key_score(second_t))
        group_tg = tl.where((offs_g == g)[None, :], score_t[:, None], group_tg)
    own_tg1 = group_tg[:, :, None]
    other_t1g = group_tg[:, None, :]
    is_lower_gg = offs_g[None, :] < offs_g[:, None]
    before_tgg = (other_t1g > own_tg1) | ((other_t1g == own_tg1) & is_lower_gg[None, :, :])
    before_tg = tl.sum(before_tgg.to(tl.int32), axis=2)
    bits_t = tl.sum(tl.where(before_tg < TOP_GROUPS, 1 << offs_g[None, :], 0), axis=1)
    # padded columns, beyond the last group, have no key anyway
    return ((bits_t[:, None] >> tl.minimum(group_e, 31)[None, :]) & 1) == 1


@triton.jit
def mass_of(key_t, code_t, mass_te, code_te, top_t, SPLIT: tl.constexpr):
    """The mass of one expert per row."""
    if SPLIT:
        mass_t = value_at(mass_te, code_te, code_t)
    else:
        mass_t = tl.exp(key_score(key_t) - top_t)  # 0 for a non-finite score: its key is -inf's
    return mass_t


@triton.jit
def masses_of(keys, codes, mass_te, code_te, top_t, K: tl.constexpr, SPLIT: tl.constexpr):
    masses = ()
    for k in tl.static_range(K):
        masses = masses + (mass_of(keys[k], codes[k], mass_te, code_te, top_t, SPLIT),)
    return masses


@triton.jit
def row_mass_of(x_te, key_te, top_t):
    """The softmax mass of all experts of a row, candidates or not."""
    return _sum_of_units(tl.where(key_te <= NONFINITE, 0.0, tl.exp(x_te - top_t[:, None])))


@triton.jit
def _sparsemixer_weight(x_te, key_te, code_te, key_t, code_t, far_eps):
    own_t = key_score(key_t)
    own_t1 = own_t[:, None]
    after_te = (key_te < key_t[:, None]) | (
        (key_te == key_t[:, None]) & (code_te >= code_t[:, None])
    )
    far_te = (own_t1 - x_te) / tl.maximum(tl.abs(x_te), own_t1) > far_eps
    near_te = after_te & (far_te == 0) & (key_te > NONFINITE) & (key_t[:, None] > NONFINITE)
    total_t = _sum_of_units(tl.where(near_te, tl.exp(x_te - own_t1), 0.0))
    return tl.where(total_t > 0.0, 1.0 / tl.where(total_t > 0.0, total_t, 1.0), 0.0)


@triton.jit
def _sum_of_chosen(mass_tk):
    """Row sums of at most 16 values in [0, 1], to about an ulp of a float32 from 1 to 16."""
    # in units of 2**-26, for the reason above; 16 of them fit an int32
    units_tk = (mass_tk * 67108864.0 + 0.5).to(tl.int32)
    return tl.sum(units_tk, axis=1).to(tl.float32) * (1.0 / 67108864.0)


@triton.jit
def _softmax_weights(
    x_te, rank_te, key_tk, keys, top_t, is_rank_tk, K: tl.constexpr, RENORMALIZE: tl.constexpr
):  # fmt: skip
    """Weights where experts rank by their logit."""
    if RENORMALIZE:
        # relative to the best executed score: relative to the best of the row, every weight could
        # underflow once the top expert has been swapped away
        top_t = finite_or_zero(key_score(keys[0]))
    mass_tk = tl.where(is_rank_tk, tl.exp(key_score(key_tk) - column(top_t)), 0.0)
    if RENORMALIZE:
        total_t = _sum_of_chosen(mass_tk)
    else:
        total_t = row_mass_of(x_te, rank_te, top_t)
    total = column(total_t)
    is_dead = total <= 0.0
    return tl.where(is_dead, 1.0 / K, mass_tk * (1.0 / tl.where(is_dead, 1.0, total)))


@triton.jit
def _split_weights(
    x_te, mass_te, code_te, codes, masses, K: tl.constexpr, SCORE: tl.constexpr,
    RENORMALIZE: tl.constexpr,
):  # fmt: skip
    """Weights where experts rank by something else than what they are weighed by."""
    if SCORE == SOFTMAX and RENORMALIZE:  # back to the logits
        best_t = tl.full(codes[0].shape, NONFINITE, tl.int32)
        logit_keys = ()
        for k in tl.static_range(K):
            key_t = order_key(value_at(x_te, code_te, codes[k]))
            logit_keys = logit_keys + (key_t,)
            best_t = tl.maximum(best_t, key_t)
        top_t = finite_or_zero(key_score(best_t))
        masses = masses_of(logit_keys, codes, mass_te, code_te, top_t, K, False)
    total_t = sum_of(masses, K)
    dead_t = total_t <= 0.0
    scale_t = tl.full(total_t.shape, 1.0, tl.float32)
    if SCORE == SOFTMAX and not RENORMALIZE:
        dead_t = tl.max(mass_te, axis=1) <= 0.0  # the chosen may underflow, the best cannot
    elif SCORE == SOFTMAX:
        scale_t = 1.0 / tl.where(dead_t, 1.0, total_t)
    elif RENORMALIZE:
        scale_t = 1.0 / (total_t + _EPS)
    weights = ()
    for k in tl.static_range(K):
        weights = weights + (tl.where(dead_t, 1.0 / K, masses[k] * scale_t),)
    return weights


@triton.jit
def mixing_weights_of(
    x_te, rank_te, mass_te, code_te, keys, codes, key_tk, masses, top_t, offs_k, scaling_factor,
    far_eps,
    K: tl.constexpr, SCORE: tl.constexpr, SPLIT: tl.constexpr, RENORMALIZE: tl.constexpr,
):  # fmt: skip
    """Weights of the K experts in ``keys``, (BLOCK_T, BLOCK_K); uniform where no score is finite.

    ``rank_te`` ranks every expert, candidate or not, ``top_t`` is the best score of the row, and
    ``masses`` are those of ``keys``, with SPLIT.
    """
    if SPLIT:
        weights = _split_weights(x_te, mass_te, code_te, codes, masses, K, SCORE, RENORMALIZE)
        weight_tk = side_by_side(weights, offs_k, K)
    elif SCORE == SPARSEMIXER:
        weights = ()
        for k in tl.static_range(K):
            weight_t = _sparsemixer_weight(x_te, rank_te, code_te, keys[k], codes[k], far_eps)
            weights = weights + (tl.where(keys[0] == NONFINITE, 1.0 / K, weight_t),)
        weight_tk = side_by_side(weights, offs_k, K)
    elif RENORMALIZE and K == 2:
        # softmax of two: one exponential. A row with nothing finite has ratio 1
        best_t = key_score(keys[0])
        gap_t = tl.where(best_t == -float("inf"), 0.0, key_score(keys[1]) - best_t)
        ratio_t = tl.exp(gap_t)
        weight_tk = side_by_side((1.0 / (1.0 + ratio_t), ratio_t / (1.0 + ratio_t)), offs_k, K)
    else:
        weight_tk = _softmax_weights(
            x_te, rank_te, key_tk, keys, top_t, (offs_k < K)[None, :], K, RENORMALIZE
        )
    return weight_tk * scaling_factor
