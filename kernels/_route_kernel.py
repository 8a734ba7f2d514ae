"""The fused route kernel: one launch from logits to ids, weights, state and paging requests.

Each program routes tiles of BLOCK_T rows and adds what they chose, per expert, to vectors of
its own. A call of one tile finishes from those vectors. In a larger call every program adds
them to the scratch with relaxed integer atomics, takes a ticket, and the last one finishes and
leaves the scratch zero. Integer sums, maxima and bit sets commute, and affinity is aged from them, so
the results do not depend on the grid, the tile or the timing.

Scratch, int32: ticket, unavoidable misses, moved mass (an int64), then per expert the executed
count, the swapped-away count, and a word that ages the affinity: its last choice, or the sum of its
choices (Aging). With Aging.STEPS there is one per CHUNK of 32 tokens, whose bit t says that token t
chose the expert.
"""

import triton
import triton.language as tl

from . import layout
from ._control import adapt, strength_in_force
from ._epilogue import (
    LAST,
    STEPS,
    SUM,
    age,
    age_by,
    age_once,
    aged_part,
    count_activations,
    finish,
    moved_units_of,
)
from ._keys import (
    FLOAT32_MAX,
    NONFINITE,
    TAKEN,
    column,
    finite_or_zero,
    key_score,
    rank_code,
    rank_key,
    side_by_side,
    sum_of,
)
from ._meters import METERS_BLOCK, add_meters, gone_of, kept_of, meters_of
from ._score import (
    SIGMOID,
    SOFTMAX,
    SPARSEMIXER,
    capped,
    in_best_groups,
    masses_of,
    mixing_weights_of,
    row_mass_of,
    scored,
)
from ._select import (
    EXACT,
    MASS,
    OUTPUT,
    RANGE_BONUS,
    by_score,
    demand_of,
    may_outbid,
    swap_within_budget,
    take_biased_best,
)

CHUNK = tl.constexpr(layout.CHUNK)
# AffinityFrom of route_ref.py; constexpr here because a kernel cannot read an enum
DEMAND = tl.constexpr(1)
SERVED = tl.constexpr(2)
SCRATCH_HEADER = tl.constexpr(layout.SCRATCH_HEADER)
# words of the scratch beside the ticket, which is the first
_UNAVOIDABLE = tl.constexpr(1)
_MOVED = tl.constexpr(2)
_NUM_COUNTERS = tl.constexpr(layout.NUM_COUNTERS)
_MOVED_MASS = tl.constexpr(layout.MOVED_MASS)
_NUM_CONTROLS = tl.constexpr(layout.NUM_CONTROLS)
_NUM_CONTROL_STATE = tl.constexpr(layout.NUM_CONTROL_STATE)
_NUM_METERS = tl.constexpr(layout.NUM_METERS)
_RECORD_HEADER = tl.constexpr(layout.RECORD_HEADER)
_RECORD_FIELDS = tl.constexpr(layout.RECORD_FIELDS)
_RECORD_TAIL = tl.constexpr(layout.RECORD_TAIL)


@triton.jit
def _load_tile(
    logits_ptr, stride_lt, stride_le, block, T, offs_e,
    E: tl.constexpr, BLOCK_T: tl.constexpr, CONTIGUOUS: tl.constexpr,
):  # fmt: skip
    offs_t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_te = (offs_t < T)[:, None] & (offs_e < E)[None, :]
    rows_t1 = offs_t.to(tl.int64)[:, None]
    ptrs = logits_ptr + rows_t1 * stride_lt + offs_e[None, :].to(tl.int64) * stride_le
    if CONTIGUOUS and offs_e.shape[0] > 128:
        # four columns a thread, as in the state's vectors: or rows change layout to meet them
        ptrs = tl.max_contiguous(ptrs, [1, 4])
    return tl.load(ptrs, mask=mask_te, other=0.0)


@triton.jit
def _route_tile(
    logits_te, weights_ptr, stride_wt, ids_ptr, stride_it, activations_ptr,
    block, T, num_valid, strength, missing_e, bias_e, offs_e, scaling_factor, softcap, far_eps,
    E: tl.constexpr, K: tl.constexpr, J: tl.constexpr, RULE: tl.constexpr,
    SCORE: tl.constexpr, HAS_BIAS: tl.constexpr, RENORMALIZE: tl.constexpr, CAPPED: tl.constexpr,
    NUM_GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, GROUP_SCORE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    CONTROL: tl.constexpr, METERS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
    ONE_TILE: tl.constexpr,
):  # fmt: skip
    """Route BLOCK_T rows.

    Returns demand and executed (BLOCK_T, BLOCK_E), moved (BLOCK_T,), the unavoidable misses (with
    CONTROL) and what the meters gain (with METERS).
    """
    offs_t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    rows_t = offs_t.to(tl.int64)
    valid_t = offs_t < num_valid
    mask_e = offs_e < E

    x_te = logits_te.to(tl.float32)
    if CAPPED:
        x_te = capped(x_te, softcap)
    code_te = tl.broadcast_to((offs_e * 2 + missing_e)[None, :], [BLOCK_T, offs_e.shape[0]])
    SPLIT: tl.constexpr = SCORE == SIGMOID or HAS_BIAS
    BY_LOGIT: tl.constexpr = SCORE == SOFTMAX and not HAS_BIAS and not CAPPED
    PACKED: tl.constexpr = BY_LOGIT and logits_te.dtype == tl.bfloat16
    every_te, mass_te = scored(
        x_te, bias_e, mask_e, code_te, SCORE, HAS_BIAS, TOP_GROUPS < NUM_GROUPS, PACKED
    )
    all_te = every_te  # the candidates
    if TOP_GROUPS < NUM_GROUPS:
        best_te = in_best_groups(
            every_te, code_te, offs_e, E, NUM_GROUPS, TOP_GROUPS, GROUP_SCORE, BLOCK_G, PACKED
        )
        all_te = tl.where(best_te, every_te, TAKEN)

    demand_keys, demand_codes, marks, left_te = demand_of(all_te, code_te, K, PACKED)
    demand_te = (left_te == TAKEN) & (all_te != TAKEN)
    top_t = finite_or_zero(key_score(demand_keys[0]))
    if TOP_GROUPS < NUM_GROUPS:  # the best of the row may be in another group
        top_t = finite_or_zero(key_score(rank_key(tl.max(every_te, axis=1), PACKED)))
    keys = demand_keys
    codes = demand_codes
    executed_te = demand_te
    moved_t = tl.zeros([BLOCK_T], tl.float32)
    unavoidable = 0
    added_m = 0
    if CONTROL:
        unavoidable_t = tl.zeros([BLOCK_T], tl.int32)
        for j in tl.static_range(J):
            unavoidable_t += demand_codes[j] & 1
        unavoidable = tl.sum(tl.where(valid_t, unavoidable_t, 0), axis=0)
    if METERS:
        change_t = tl.zeros([BLOCK_T], tl.float32)
        gone_t = tl.zeros([BLOCK_T], tl.int32)

    # carried through the branch: for one narrow row, Triton 3.7 cannot spread codes that come out of
    # it over the columns on AMD
    masses = demand_keys
    if SPLIT:
        masses = masses_of(demand_keys, demand_codes, mass_te, code_te, top_t, K, SPLIT)

    if RULE != EXACT and J < K:
        strength_t = tl.zeros([BLOCK_T], tl.float32) + strength
        may_t = valid_t & (strength_t > 0.0)  # a NaN, zero or negative strength never swaps
        strength_t = tl.minimum(strength_t, FLOAT32_MAX)  # makes a number of a NaN
        if RULE == MASS or RULE == OUTPUT:
            some_t = demand_codes[J] & 1
            for k in tl.static_range(J + 1, K):
                some_t = some_t | (demand_codes[k] & 1)
            may_t = may_t & (some_t == 1)
        else:
            bonus_t = strength_t
            if RULE == RANGE_BONUS:
                finite_te = all_te > NONFINITE
                low_t = tl.min(tl.where(finite_te, all_te, 2147483647), axis=1)
                low_t = key_score(rank_key(low_t, PACKED))
                spread_t = tl.minimum(key_score(demand_keys[0]) - low_t, FLOAT32_MAX)
                # NaN where nothing is finite, and then no sum is finite whatever is added
                bonus_t = tl.minimum(bonus_t * spread_t, FLOAT32_MAX)
            may_t = may_t & may_outbid(
                left_te, code_te, demand_keys, demand_codes, bonus_t, K, J, PACKED
            )
        # one branch keeps the common case, everybody wanted is resident, at the price of none
        if tl.max(may_t.to(tl.int32), axis=0) == 1:
            wanted = masses
            if not SPLIT:
                wanted = masses_of(demand_keys, demand_codes, mass_te, code_te, top_t, K, SPLIT)
            total_t = sum_of(wanted, K)
            if RULE == MASS or RULE == OUTPUT:
                missing_te = (code_te & 1) == 1
                keys, codes = swap_within_budget(
                    left_te, code_te, missing_te, mass_te, demand_keys, demand_codes, wanted,
                    top_t, total_t, strength_t, may_t, K, J, RULE, SPLIT, PACKED,
                )  # fmt: skip
            else:
                keys, codes = take_biased_best(
                    all_te, code_te, demand_keys, demand_codes, bonus_t, may_t, K, J, PACKED
                )
            executed_te = code_te == codes[0][:, None]
            for k in tl.static_range(1, K):
                executed_te = executed_te | (code_te == codes[k][:, None])
            keys, codes, marks = by_score(keys, codes, executed_te, all_te, code_te, K, PACKED)
            kept = masses_of(keys, codes, mass_te, code_te, top_t, K, SPLIT)
            kept_t = sum_of(kept, K)
            if SPLIT:
                masses = kept
            lost_t = tl.maximum(total_t - kept_t, 0.0)
            moved_t = lost_t / tl.where(total_t > 0.0, total_t, 1.0)
            if METERS:
                gone_t = gone_of(demand_codes, codes, K)
                both_t = kept_of(wanted, gone_t, K)
                more_t = tl.maximum(total_t, kept_t)
                change_t = 2.0 * (1.0 - both_t / tl.where(more_t > 0.0, more_t, 1.0))
                if not RENORMALIZE:
                    change_t = (total_t - both_t) + (kept_t - both_t)
                    if not SPLIT:
                        whole_t = row_mass_of(x_te, every_te, top_t)
                        change_t = change_t / tl.where(whole_t > 0.0, whole_t, 1.0)
                change_t = tl.where(gone_t == 0, 0.0, change_t)

    if SCORE == SPARSEMIXER:
        # the same again, for the reason above
        keys, codes, marks, _ = demand_of(tl.where(executed_te, all_te, TAKEN), code_te, K, PACKED)
    offs_k = tl.arange(0, BLOCK_K)
    if PACKED and K > 2:
        mark_tk = side_by_side(marks, offs_k, K)
        key_tk, code_tk = rank_key(mark_tk, PACKED), rank_code(mark_tk)
    else:
        key_tk, code_tk = side_by_side(keys, offs_k, K), side_by_side(codes, offs_k, K)
    weight_tk = mixing_weights_of(
        x_te, every_te, mass_te, code_te, keys, codes, key_tk, masses, top_t, offs_k,
        scaling_factor, far_eps, K, SCORE, SPLIT, RENORMALIZE,
    )  # fmt: skip
    row, is_row, is_valid = column(rows_t), column(offs_t) < T, column(offs_t) < num_valid
    weight_tk = tl.where(is_valid, weight_tk, 0.0).to(weights_ptr.dtype.element_ty)
    id_tk = (code_tk >> 1).to(ids_ptr.dtype.element_ty)
    # not the conjunction: the interpreter of Triton 3.9 takes no mask made with a scalar's
    mask_tk = offs_k[None, :] < tl.where(is_row, K, 0)
    weights_ptr += row * stride_wt + offs_k[None, :]
    tl.store(weights_ptr, weight_tk, mask=mask_tk)
    ids_ptr += row * stride_it + offs_k[None, :]
    tl.store(ids_ptr, id_tk, mask=mask_tk)
    if ONE_TILE and BLOCK_T == 1:
        one_tk = tl.full(id_tk.shape, 1, tl.int64)
        counts_tk = offs_k[None, :] < tl.where(is_valid, K, 0)
        tl.atomic_add(activations_ptr + (code_tk >> 1), one_tk, mask=counts_tk, sem="relaxed")

    live_te = valid_t[:, None] & mask_e[None, :]
    moved_t = tl.where(valid_t, moved_t, 0.0)
    if METERS:
        added_m = meters_of(moved_t, change_t, gone_t, valid_t, K)
    return demand_te & live_te, executed_te & live_te, moved_t, unavoidable, added_m


@triton.jit
def _aging_choice(demand_te, executed_te, AFFINITY_FROM: tl.constexpr):
    chosen_te = executed_te
    if AFFINITY_FROM == DEMAND:
        chosen_te = demand_te
    if AFFINITY_FROM == SERVED:
        chosen_te = demand_te & executed_te
    return chosen_te


@triton.jit
def _found(
    chosen_te, block, num_valid, window, decay, units, AGING: tl.constexpr, BLOCK_T: tl.constexpr
):  # fmt: skip
    """What the rows of a tile add to what :func:`age_by` takes: numbers from 1, or parts of the sum."""
    offs_t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    if AGING == LAST:
        found_t = offs_t + 1
    else:
        found_t = aged_part(num_valid - 1 - offs_t, window, num_valid, decay, units)
    return tl.where(chosen_te, found_t[:, None], 0)


@triton.jit(do_not_specialize=["T", "layer", "window"])
def route_kernel(
    logits_ptr, stride_lt, stride_le,  # (T, E) in, any float dtype
    num_valid_ptr,                     # () int32 in, or None: every row counts
    bias_ptr,                          # (E,) in, any float dtype: correction bias, or None
    slot_of_ptr, strength_ptr,         # (L, E) int32 in, (L,) float32 in, with CONTROL out too
    weights_ptr, stride_wt,            # (T, K) out, unit stride along K
    ids_ptr, stride_it,                # (T, K) out, unit stride along K
    affinity_ptr, activations_ptr,     # (L, E) float32, (L, E) int64 in and out
    counters_ptr, record_ptr,          # (L, C) int64, (L, R) int32 in and out
    scratch_ptr,                       # int32, all zero between launches; unused with ONE_TILE
    control_ptr, control_state_ptr,    # (L, P) float32 in, (L, S) float32 in and out, or None
    meters_ptr,                        # (L, M) int64 in and out, or None
    T, layer, window,
    decay, boost, max_score,
    units, unit,                 # of a choice in the sum of Aging.SUM, and what one is
    scaling_factor, softcap,
    far_eps,                     # sparsemixer: relative distance beyond which an expert is left out
    E: tl.constexpr,
    K: tl.constexpr,
    J: tl.constexpr,             # protected ranks, <= K
    RULE: tl.constexpr,
    SCORE: tl.constexpr,         # Score
    RENORMALIZE: tl.constexpr,   # weights are shares of the executed, else of all experts
    CAPPED: tl.constexpr,        # bound the logits by softcap
    NUM_GROUPS: tl.constexpr,    # divides E
    TOP_GROUPS: tl.constexpr,    # groups that a token may visit; NUM_GROUPS: no limit
    GROUP_SCORE: tl.constexpr,   # GroupScore
    BLOCK_G: tl.constexpr,       # next power of two >= NUM_GROUPS, <= 32
    AFFINITY_FROM: tl.constexpr, # AffinityFrom
    AGING: tl.constexpr,         # Aging
    CONTROL: tl.constexpr,       # adapt the strength; not with EXACT
    METERS: tl.constexpr,        # measure what swaps change; not with EXACT
    CONTIGUOUS: tl.constexpr,    # logits and outputs: the strides follow from E and K
    BLOCK_T: tl.constexpr,       # rows per tile, divides CHUNK
    BLOCK_E: tl.constexpr,       # next power of two >= E
    BLOCK_K: tl.constexpr,       # next power of two >= K
    ONE_TILE: tl.constexpr,      # T <= BLOCK_T and one program: no ticket, no scratch
):  # fmt: skip
    if CONTIGUOUS:
        stride_lt = E
        stride_le = 1
        stride_wt = K
        stride_it = K
    pid = tl.program_id(0)
    offs_e = tl.arange(0, BLOCK_E)
    mask_e = offs_e < E
    layer = layer.to(tl.int64)
    RECORD: tl.constexpr = _RECORD_HEADER + _RECORD_FIELDS * E + _RECORD_TAIL
    affinity_ptr += layer * E
    activations_ptr += layer * E
    counters_ptr += layer * _NUM_COUNTERS
    record_ptr += layer * RECORD

    # all that a call reads, before anything is computed: one memory round trip, not several
    logits_te = _load_tile(logits_ptr, stride_lt, stride_le, pid, T, offs_e, E, BLOCK_T, CONTIGUOUS)
    slot_e = tl.load(slot_of_ptr + layer * E + offs_e, mask=mask_e, other=0)
    HAS_BIAS: tl.constexpr = bias_ptr is not None
    bias_e = slot_e
    if HAS_BIAS:
        bias_e = tl.load(bias_ptr + offs_e, mask=mask_e, other=0.0).to(tl.float32)
    strength = 0.0
    if RULE != EXACT:
        strength = tl.load(strength_ptr + layer)
    num_valid = T
    if num_valid_ptr is not None:
        num_valid = tl.maximum(tl.minimum(tl.load(num_valid_ptr), T), 0)
    generation = tl.load(record_ptr) + 1
    missing_e = (slot_e < 0).to(tl.int32)
    if ONE_TILE:
        affinity_e = tl.load(affinity_ptr + offs_e, mask=mask_e, other=0.0)
        # never so, which the compiler cannot know: or it loads late what is needed late
        last_e = affinity_e.to(tl.int32, bitcast=True) | generation
        if RULE != EXACT:
            last_e = last_e | strength.to(tl.int32, bitcast=True)
        missing_e = tl.where(T < 0, last_e, missing_e)
    residents = E
    if CONTROL:
        control_ptr += layer * _NUM_CONTROLS
        control_state_ptr += layer * _NUM_CONTROL_STATE
        residents = E - tl.sum(missing_e, axis=0)
        strength = strength_in_force(control_ptr, strength, residents, K)
    if METERS:
        meters_ptr += layer * _NUM_METERS
    if ONE_TILE:
        demand_te, executed_te, moved_t, unavoidable, added_m = _route_tile(
            logits_te, weights_ptr, stride_wt, ids_ptr, stride_it, activations_ptr,
            pid, T, num_valid, strength, missing_e, bias_e, offs_e, scaling_factor, softcap, far_eps,
            E, K, J, RULE, SCORE, HAS_BIAS, RENORMALIZE, CAPPED,
            NUM_GROUPS, TOP_GROUPS, GROUP_SCORE, BLOCK_G, CONTROL, METERS, BLOCK_T, BLOCK_K, ONE_TILE,
        )  # fmt: skip
        chosen_te = _aging_choice(demand_te, executed_te, AFFINITY_FROM)
        executed_e = tl.sum(executed_te.to(tl.int32), axis=0)
        if BLOCK_T > 1:
            count_activations(activations_ptr, executed_e, offs_e, E)
        if BLOCK_T == 1:
            chosen_e = tl.max(chosen_te.to(tl.int32), axis=0) == 1
            aged_e = age_once(affinity_e, chosen_e, decay, boost, max_score)
            affinity_e = tl.where(num_valid > 0, aged_e, affinity_e)
        elif AGING == STEPS:
            bit_t = 1 << tl.arange(0, BLOCK_T)
            word_e = tl.sum(tl.where(chosen_te, bit_t[:, None], 0), axis=0)
            affinity_e = age(affinity_e, word_e, num_valid, decay, boost, max_score)
        else:
            found_te = _found(chosen_te, 0, num_valid, window, decay, units, AGING, BLOCK_T)
            found_e = tl.max(found_te, axis=0) if AGING == LAST else tl.sum(found_te, axis=0)
            affinity_e = age_by(
                affinity_e, found_e, num_valid, window, decay, max_score, unit, AGING
            )
        moved_units = moved_units_of(moved_t)
        misses = finish(
            affinity_ptr, counters_ptr, record_ptr,
            affinity_e,
            executed_e,
            tl.sum((demand_te & (executed_te == 0)).to(tl.int32), axis=0),
            moved_units, missing_e, offs_e, T, num_valid, generation, E, K, RULE != EXACT,
        )  # fmt: skip
        if METERS:
            add_meters(meters_ptr, added_m)
        if CONTROL:
            adapt(
                control_ptr, control_state_ptr, strength_ptr + layer,
                num_valid, residents, misses, moved_units, unavoidable, K,
            )  # fmt: skip
    else:
        first_chunk = tl.maximum(num_valid - window, 0) // CHUNK
        executed_ptr = scratch_ptr + SCRATCH_HEADER + offs_e
        words_ptr = scratch_ptr + SCRATCH_HEADER + 2 * E
        # summed over rows once, at the end: that crosses threads
        executed_sum_te = tl.zeros([BLOCK_T, BLOCK_E], tl.int32)
        found_sum_te = tl.zeros([BLOCK_T, BLOCK_E], tl.int32)
        swapped_sum_te = tl.zeros([BLOCK_T, BLOCK_E], tl.int32)
        moved_units = tl.zeros([1], tl.int64)
        unavoidable_sum = tl.zeros([1], tl.int32)
        meters_m = tl.zeros([METERS_BLOCK], tl.int64)
        for block in range(pid, tl.cdiv(T, BLOCK_T), tl.num_programs(0)):
            here_te = logits_te
            ahead = block + tl.num_programs(0)  # arrives while this tile is routed
            logits_te = _load_tile(
                logits_ptr, stride_lt, stride_le, ahead, T, offs_e, E, BLOCK_T, CONTIGUOUS
            )
            demand_te, executed_te, moved_t, unavoidable, added_m = _route_tile(
                here_te, weights_ptr, stride_wt, ids_ptr, stride_it, activations_ptr,
                block, T, num_valid, strength, missing_e, bias_e, offs_e,
                scaling_factor, softcap, far_eps,
                E, K, J, RULE, SCORE, HAS_BIAS, RENORMALIZE, CAPPED,
                NUM_GROUPS, TOP_GROUPS, GROUP_SCORE, BLOCK_G, CONTROL, METERS, BLOCK_T, BLOCK_K, ONE_TILE,
            )  # fmt: skip
            executed_sum_te += executed_te.to(tl.int32)
            if RULE != EXACT:
                swapped_sum_te += (demand_te & (executed_te == 0)).to(tl.int32)
                moved_units += moved_units_of(moved_t)
            if CONTROL:
                unavoidable_sum += unavoidable
            if METERS:
                meters_m += added_m
            chosen_te = _aging_choice(demand_te, executed_te, AFFINITY_FROM)
            chunk = block * BLOCK_T // CHUNK
            if AGING == LAST:
                found_te = _found(chosen_te, block, num_valid, window, decay, units, AGING, BLOCK_T)
                found_sum_te = tl.maximum(found_sum_te, found_te)
            elif chunk >= first_chunk:
                if AGING == SUM:
                    found_sum_te += _found(
                        chosen_te, block, num_valid, window, decay, units, AGING, BLOCK_T
                    )
                else:
                    bit_t = 1 << ((block * BLOCK_T + tl.arange(0, BLOCK_T)) % CHUNK)
                    word_e = tl.sum(tl.where(chosen_te, bit_t[:, None], 0), axis=0)
                    ptrs = words_ptr + (chunk - first_chunk).to(tl.int64) * E + offs_e
                    tl.atomic_or(ptrs, word_e, mask=mask_e & (word_e != 0), sem="relaxed")

        executed_e = tl.sum(executed_sum_te, axis=0)
        some_e = mask_e & (executed_e > 0)
        tl.atomic_add(executed_ptr, executed_e, mask=some_e, sem="relaxed")
        if AGING == LAST:
            found_e = tl.max(found_sum_te, axis=0)
            tl.atomic_max(words_ptr + offs_e, found_e, mask=mask_e & (found_e > 0), sem="relaxed")
        if AGING == SUM:
            found_e = tl.sum(found_sum_te, axis=0)
            tl.atomic_add(words_ptr + offs_e, found_e, mask=mask_e & (found_e > 0), sem="relaxed")
        if RULE != EXACT:
            swapped_e = tl.sum(swapped_sum_te, axis=0)
            gone_e = mask_e & (swapped_e > 0)
            tl.atomic_add(executed_ptr + E, swapped_e, mask=gone_e, sem="relaxed")
            moved_ptr = counters_ptr + _MOVED_MASS + tl.arange(0, 1)
            tl.atomic_add(moved_ptr, moved_units, mask=moved_units != 0, sem="relaxed")
        unavoidable_ptr = scratch_ptr + _UNAVOIDABLE + tl.arange(0, 1)
        moved_sum_ptr = (scratch_ptr + _MOVED).to(tl.pointer_type(tl.int64)) + tl.arange(0, 1)
        if CONTROL:
            some = unavoidable_sum != 0
            tl.atomic_add(unavoidable_ptr, unavoidable_sum, mask=some, sem="relaxed")
            tl.atomic_add(moved_sum_ptr, moved_units, mask=moved_units != 0, sem="relaxed")
        if METERS:
            add_meters(meters_ptr, meters_m)
        tl.debug_barrier()  # every thread's atomics are issued before the ticket is taken
        ticket = tl.atomic_add(scratch_ptr, 1, sem="acq_rel", scope="gpu")
        if ticket == tl.num_programs(0) - 1:
            # past the first-level cache: other programs' atomics are in the second
            executed_e = tl.load(executed_ptr, mask=mask_e, other=0, cache_modifier=".cg")
            swapped_e = tl.zeros([BLOCK_E], tl.int32)
            if RULE != EXACT:
                swapped_e = tl.load(executed_ptr + E, mask=mask_e, other=0, cache_modifier=".cg")
            affinity_e = tl.load(affinity_ptr + offs_e, mask=mask_e, other=0.0)
            if AGING == STEPS:
                chunk = first_chunk
                while chunk * CHUNK < num_valid:
                    ptrs = words_ptr + (chunk - first_chunk).to(tl.int64) * E + offs_e
                    word_e = tl.load(ptrs, mask=mask_e, other=0, cache_modifier=".cg")
                    tokens = tl.minimum(num_valid - chunk * CHUNK, CHUNK)
                    affinity_e = age(affinity_e, word_e, tokens, decay, boost, max_score)
                    chunk += 1
            else:
                found_e = tl.load(words_ptr + offs_e, mask=mask_e, other=0, cache_modifier=".cg")
                affinity_e = age_by(
                    affinity_e, found_e, num_valid, window, decay, max_score, unit, AGING
                )
            if CONTROL:
                unavoidable = tl.sum(tl.load(unavoidable_ptr, cache_modifier=".cg"), axis=0)
                moved_sum = tl.sum(tl.load(moved_sum_ptr, cache_modifier=".cg"), axis=0)
            count_activations(activations_ptr, executed_e, offs_e, E)
            # moved mass went to its counter program by program
            misses = finish(
                affinity_ptr, counters_ptr, record_ptr,
                affinity_e, executed_e, swapped_e, 0, missing_e, offs_e,
                T, num_valid, generation, E, K, RULE != EXACT,
            )  # fmt: skip
            # after the barrier in finish: every warp has read what is set to zero here
            zero_e = tl.zeros([BLOCK_E], tl.int32)
            tl.store(scratch_ptr, 0)
            tl.store(executed_ptr, zero_e, mask=mask_e)
            if RULE != EXACT:
                tl.store(executed_ptr + E, zero_e, mask=mask_e)
            if CONTROL:
                tl.store(unavoidable_ptr, tl.zeros([1], tl.int32))
                tl.store(moved_sum_ptr, tl.zeros([1], tl.int64))
                adapt(
                    control_ptr, control_state_ptr, strength_ptr + layer,
                    num_valid, residents, misses, moved_sum, unavoidable, K,
                )  # fmt: skip
            if AGING == STEPS:
                while chunk > first_chunk:
                    chunk -= 1
                    ptrs = words_ptr + (chunk - first_chunk).to(tl.int64) * E + offs_e
                    tl.store(ptrs, zero_e, mask=mask_e)
            else:
                tl.store(words_ptr + offs_e, zero_e, mask=mask_e)
