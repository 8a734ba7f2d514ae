"""What a route call means, in plain PyTorch. The Triton kernel is tested against this file.

For each token, with selection scores ``s`` and masses ``p`` as its router's :class:`ScoreRule` makes
them of the logits (:mod:`.score_ref`), ``K`` experts to execute and ``J`` of them protected:

1. Experts are ranked by score, descending, lower id first among equals; every non-finite score
   ranks last, and who is no candidate is not ranked. The *demand* is the first K, the *protected*
   the first J of them.
2. The executed set is the demand with ``m1..mi`` replaced by ``r1..ri``: ``m`` the missing
   demanded experts that are not protected, worst first; ``r`` the resident experts outside the
   demand, best first. :class:`Rule` says how large ``i`` may be.
3. Mixing weights come from the unbiased masses of the executed experts. Only finite scores
   weigh; a row with none is uniform.
4. Affinity ages once per valid token, in token order:
   ``a = min(a * decay + boost * chosen, max_score)``. A call of several tokens may leave the same to
   within 2e-6 of ``max(1, max_score)`` in another way (:class:`Aging`).
5. A controller sets the strength of the next call (:mod:`.control_ref`), and meters count what the
   swaps changed (:mod:`.meters_ref`); both only where they are asked for and a rule could swap.

It is also the path for tensors on the CPU.

Shape suffixes: T tokens, E experts, K experts per token, L layers, C counters, R record words.
"""

import enum
import functools
import math
from typing import NamedTuple

import torch

from . import layout
from .control_ref import Call, adapt_ref, strength_in_force
from .meters_ref import meters_ref
from .score_ref import ScoreRule, exp_mass, mixing_weights, rank_experts, score_ref

FLOAT32_MAX = torch.finfo(torch.float32).max


class Rule(enum.IntEnum):
    """How many swaps a token may take."""

    EXACT = 0
    # classic: the protected first, then the best K - J of the rest by min(s + b, FLOAT32_MAX),
    # b = strength on resident experts, lower id first. The float32 sum decides near-ties
    BONUS = 1
    # the same with b = min(strength * (max - min of the row's finite scores), FLOAT32_MAX)
    RANGE_BONUS = 2
    # the longest prefix whose sum of max(0, p(m) - p(r)) is at most strength * sum(p(demand))
    MASS = 3
    # the longest prefix each of whose swaps is priced at most strength: w(m)^2 + w(r)^2 -
    # 2 SIMILARITY w(m) w(r) <= strength^2, w = p / sum(p(demand)). For outputs f of equal norm whose
    # directions have that cosine it is the expected square of |w(m) f(m) - w(r) f(r)|
    OUTPUT = 4


# Fitted to the KL divergence at equal loads (profiling/results/quality_ideas.md); not a cosine that
# was measured on outputs. It sets how much a gap in weight counts beside the weight itself: the
# squared price is (w(m) - w(r))^2 + w(m) w(r) / 2
SIMILARITY = 0.75


class AffinityFrom(enum.IntEnum):
    """Which choices of a token age the affinity."""

    EXECUTED = 0
    DEMAND = 1
    SERVED = 2  # demanded and executed: what was not cheap enough to swap away


class Aging(enum.IntEnum):
    """How a call of several tokens ages the affinity; what one by one would leave, to rounding."""

    STEPS = 0  # token by token
    # a choice alone reaches max_score, so what was before it does not matter: only the last counts
    LAST = 1
    # no choice reaches it, so nothing is clamped on the way: a sum, of integers, which has the same
    # bits in every order
    SUM = 2


def aging_of(decay: float, boost: float, max_score: float) -> Aging:
    """Return the cheapest way of aging that the constants allow."""
    if boost >= max_score:
        return Aging.LAST
    return Aging.SUM if boost <= max_score * (1.0 - decay) else Aging.STEPS


class Selection(NamedTuple):
    """Who is wanted and who is executed, for T tokens."""

    demand_TK: torch.Tensor  # int64, best first
    ids_TK: torch.Tensor  # int64, executed, best unbiased score first
    moved_T: torch.Tensor  # float32, router mass that the swaps moved, as a share of the demand's


def select_ref(
    scores_TE: torch.Tensor,
    resident_TE: torch.Tensor,
    k: int,
    rule: Rule = Rule.EXACT,
    strength: float | torch.Tensor = 0.0,
    protect: int = 0,
    mass_TE: torch.Tensor | None = None,
    candidate_TE: torch.Tensor | None = None,
) -> Selection:
    """Choose the executed experts of every token; steps 1 and 2 of the module docstring.

    Args:
        scores_TE: Selection scores, ``(T, E)`` float32.
        resident_TE: Who is on the device, bool, ``(E,)`` or ``(T, E)``.
        k: Experts per token, ``1 <= k <= E``.
        rule: See :class:`Rule`.
        strength: Bonus or budget, a float, a 0-d tensor, or ``(T, 1)``. NaN, zero or less never
            swaps.
        protect: J; more than ``k`` means ``k``.
        mass_TE: p, up to a factor per row, float32. None: the softmax of ``scores_TE``.
        candidate_TE: Who may be visited, bool, at least K a row. None: everybody.

    Returns:
        The demand, the executed ids and the moved mass, see :class:`Selection`.
    """
    T, _ = scores_TE.shape
    J = min(protect, k)
    order_TE = rank_experts(scores_TE, candidate_TE)
    demand_TK = order_TE[:, :k]
    if rule == Rule.EXACT or J == k or T == 0:
        return Selection(demand_TK, demand_TK, scores_TE.new_zeros(T))

    strength = torch.as_tensor(strength, dtype=torch.float32, device=scores_TE.device)
    # NaN compares false
    strength = torch.where(strength > 0, strength.clamp(max=FLOAT32_MAX), 0.0)
    resident_TE = resident_TE.expand_as(scores_TE)
    mass_TE = exp_mass(scores_TE) if mass_TE is None else mass_TE
    if candidate_TE is None:
        candidate_TE = torch.ones_like(resident_TE)
    if rule in (Rule.MASS, Rule.OUTPUT):
        stand_in_TE = resident_TE & candidate_TE
        ids_TK = _swap_within_budget(
            mass_TE, resident_TE, stand_in_TE, order_TE, k, J, rule, strength
        )
    else:
        ids_TK = _take_biased_best(
            scores_TE, resident_TE, candidate_TE, order_TE, k, J, rule, strength
        )

    rank_TE = _inverse(order_TE)
    ids_TK = order_TE.gather(1, rank_TE.gather(1, ids_TK).sort(dim=1).values)
    wanted_T = mass_TE.gather(1, demand_TK).sum(1)
    lost_T = (wanted_T - mass_TE.gather(1, ids_TK).sum(1)).clamp(min=0)
    swapped_T = (ids_TK != demand_TK).any(1)
    return Selection(
        demand_TK, ids_TK, torch.where(swapped_T & (wanted_T > 0), lost_T / wanted_T, 0.0)
    )


def _take_biased_best(scores_TE, resident_TE, candidate_TE, order_TE, k, J, rule, strength):
    """The classic cache bonus: protected experts, then the best of the rest by biased score."""
    finite_TE = scores_TE.isfinite() & candidate_TE
    bonus = strength
    if rule == Rule.RANGE_BONUS:
        high_T = torch.where(finite_TE, scores_TE, -torch.inf).amax(1, keepdim=True)
        low_T = torch.where(finite_TE, scores_TE, torch.inf).amin(1, keepdim=True)
        spread_T = torch.where(finite_TE.any(1, keepdim=True), high_T - low_T, 0.0)
        bonus = strength * spread_T.clamp(max=FLOAT32_MAX)
    bonus = bonus.clamp(max=FLOAT32_MAX)
    biased_TE = torch.where(resident_TE, (scores_TE + bonus).clamp(max=FLOAT32_MAX), scores_TE)
    biased_TE = torch.where(finite_TE, biased_TE, -torch.inf)
    biased_TE = biased_TE.scatter(1, order_TE[:, :J], torch.inf)  # protected: above every sum
    order_TE = biased_TE.sort(dim=1, descending=True, stable=True).indices
    last_TE = (~candidate_TE.gather(1, order_TE)).to(torch.int8)
    return order_TE.gather(1, last_TE.sort(dim=1, stable=True).indices)[:, :k]


def _swap_within_budget(mass_TE, resident_TE, stand_in_TE, order_TE, k, J, rule, strength):
    """The longest prefix of swaps that the budget allows."""
    T, E = mass_TE.shape
    swaps = min(k - J, E - k)
    ranked_resident_TE = resident_TE.gather(1, order_TE)
    ranked_stand_in_TE = stand_in_TE.gather(1, order_TE)
    ids_TK = order_TE[:, :k].clone()
    if swaps == 0:
        return ids_TK

    # ranks of m1, m2, ... and of r1, r2, ...; E marks "there is none"
    rank_E = torch.arange(E, device=mass_TE.device).expand(T, E)
    inside, outside = rank_E < k, rank_E >= k
    movable_TE = ~ranked_resident_TE & inside & (rank_E >= J)
    m_TS = torch.where(movable_TE, rank_E, -1).sort(dim=1, descending=True).values[:, :swaps]
    r_TS = torch.where(ranked_stand_in_TE & outside, rank_E, E).sort(dim=1).values[:, :swaps]
    possible_TS = (m_TS >= 0) & (r_TS < E)
    m_TS, r_TS = m_TS.clamp(min=0), r_TS.clamp(max=E - 1)

    ranked_mass_TE = mass_TE.gather(1, order_TE)
    out_TS, in_TS = ranked_mass_TE.gather(1, m_TS), ranked_mass_TE.gather(1, r_TS)
    wanted_T1 = ranked_mass_TE[:, :k].sum(1, keepdim=True)
    budget_T1 = strength * wanted_T1
    if rule == Rule.MASS:
        within_TS = (out_TS - in_TS).clamp(min=0).cumsum(1) <= budget_T1
    else:
        squared_TS = out_TS * out_TS + in_TS * (in_TS - 2 * SIMILARITY * out_TS)
        within_TS = squared_TS <= budget_T1 * budget_T1
    allowed_TS = possible_TS & within_TS & (strength > 0) & (wanted_T1 > 0)
    allowed_TS = allowed_TS.cumprod(1).bool()  # a prefix: the first refusal ends it

    stand_in_TS = order_TE.gather(1, r_TS)
    row_T, swap_S = allowed_TS.nonzero(as_tuple=True)
    ids_TK[row_T, m_TS[row_T, swap_S]] = stand_in_TS[row_T, swap_S]
    return ids_TK


def _inverse(order_TE):
    rank_TE = torch.empty_like(order_TE)
    positions_TE = torch.arange(order_TE.shape[1], device=order_TE.device).expand_as(order_TE)
    return rank_TE.scatter_(1, order_TE, positions_TE)


@functools.lru_cache(64)
def affinity_window(decay: float) -> int:
    """Return the tokens after which ``decay ** age < 2**-24``: older ones cannot show in float32.

    1 for ``decay == 0`` (only the token itself), 2**31 - 1 where nothing fades.
    """
    if decay >= 1.0:
        return 2**31 - 1
    if decay <= 0.0:
        return 1
    return min(2**31 - 1, math.ceil(24 * math.log(2) / -math.log(decay)) + 1)


def first_aged_token(num_valid: int, window: int) -> int:
    """Return the first token whose choice still ages the affinity in a call of ``num_valid``."""
    return max(0, num_valid - window) // layout.CHUNK * layout.CHUNK


def units_of(decay: float, boost: float) -> tuple[float, float]:
    """Return a choice's units in the sum of :attr:`Aging.SUM`, and what a unit is.

    No sum exceeds ``boost / (1 - decay)``, which is 2**30 units and so fits an int32.
    """
    units = (1.0 - decay) * (1 << 30)
    return units, boost / units if units > 0 else 0.0


def float32(value: float) -> torch.Tensor:
    """Return a number as the kernel receives it."""
    return torch.tensor(value, dtype=torch.float32)


def _power(base: float, exponent: torch.Tensor, largest: int) -> torch.Tensor:
    """``base ** exponent``, by squaring from the lowest bit up: the same bits everywhere."""
    # squares in float64: in float32 each would double the error of the one before
    square, result = float32(base).double(), torch.ones(exponent.shape)
    for bit in range(largest.bit_length()):
        result = torch.where((exponent >> bit) & 1 == 1, result * square.float(), result)
        square = square * square
    return result


def age_affinity_ref(
    affinity_E: torch.Tensor,
    chosen_TE: torch.Tensor,
    decay: float,
    boost: float,
    max_score: float,
    aging: Aging = Aging.STEPS,
) -> torch.Tensor:
    """Age ``affinity_E`` (float32) by the choices of T tokens (bool); step 4."""
    T, window = len(chosen_TE), affinity_window(decay)
    if aging != Aging.STEPS:
        n = min(T, window)
        ages_T = torch.arange(T - 1, -1, -1)
        if aging == Aging.LAST:
            numbers_T1 = torch.arange(1, T + 1)[:, None]
            none_1E = torch.zeros(1, len(affinity_E), dtype=torch.int64)
            last_E = torch.cat([none_1E, torch.where(chosen_TE, numbers_T1, 0)]).amax(0)
            top_E = torch.where(last_E > 0, float32(max_score), affinity_E)
            affinity_E = top_E * _power(decay, (T - last_E).clamp(max=window), n)
        else:
            units, unit = map(float32, units_of(decay, boost))
            part_T = _power(decay, ages_T.clamp(max=window), n) * units
            units_T = torch.where(ages_T < window, (part_T + 0.5).int(), 0)
            units_E = torch.where(chosen_TE, units_T[:, None], 0).sum(0)
            affinity_E = affinity_E * _power(decay, torch.tensor(n), n) + units_E.float() * unit
        return affinity_E.clamp(max=max_score)
    chosen_TE = chosen_TE[first_aged_token(T, window) :]
    boost_TE = torch.where(chosen_TE, torch.tensor(boost, dtype=torch.float32), 0.0)
    for boost_E in boost_TE:
        affinity_E = (affinity_E * decay + boost_E).clamp(max=max_score)
    return affinity_E


def route_ref(
    logits_TE, weights_TK, ids_TK, num_valid, state, layer, *,
    top_k, rule, protect, affinity_from, decay, boost, max_score,
    score_rule=ScoreRule(), correction_bias=None, control=False, meters=False,  # noqa: B008
):  # fmt: skip
    """Route T tokens and advance the state of ``layer``: the meaning of one kernel launch.

    Arguments are those of :func:`moe_gpu.kernels.route.route`. Host synchronisation is free here
    (CPU tensors), so ``num_valid`` and the strength are read as numbers.
    """
    T, E = logits_TE.shape
    valid = T if num_valid is None else max(0, min(T, int(num_valid)))
    logits_TE = logits_TE.detach().float()
    scores_TE, mass_TE, candidate_TE = score_ref(logits_TE, score_rule, correction_bias)
    resident_E = state.slot_of_LE[layer] >= 0
    row, residents = slice(layer, layer + 1), resident_E.sum().reshape(1)
    control, meters = control and rule != Rule.EXACT, meters and rule != Rule.EXACT
    strength = state.strength_L[row]
    if control:
        strength = strength_in_force(state.control_LP[row], strength, residents, top_k)
    picked = select_ref(
        scores_TE, resident_E, top_k, rule, strength, protect, mass_TE, candidate_TE
    )
    executed_TK = picked.ids_TK.clone()
    executed_TK[valid:] = picked.demand_TK[valid:]  # padding rows are not swapped
    weights = mixing_weights(logits_TE, executed_TK, score_rule)
    weights[valid:] = 0.0
    weights_TK.copy_(weights)
    ids_TK.copy_(executed_TK)

    demand_TE = _mark(picked.demand_TK[:valid], E)
    executed_TE = _mark(executed_TK[:valid], E)
    executed_E = executed_TE.sum(0)
    swapped_E = (demand_TE & ~executed_TE).sum(0)
    missing_E = ~resident_E

    chosen_TE = {
        AffinityFrom.EXECUTED: executed_TE,
        AffinityFrom.DEMAND: demand_TE,
        AffinityFrom.SERVED: demand_TE & executed_TE,
    }[affinity_from]
    # one token takes one step whatever the constants
    aging = Aging.STEPS if len(logits_TE) == 1 else aging_of(decay, boost, max_score)
    affinity_E = age_affinity_ref(
        state.affinity_LE[layer], chosen_TE, decay, boost, max_score, aging
    )
    state.affinity_LE[layer] = affinity_E
    state.activations_LE[layer] += executed_E

    misses = int(executed_E[missing_E].sum())
    moved = (picked.moved_T[:valid] * layout.MOVED_MASS_ONE + 0.5).long().sum()
    urgent_E = missing_E & (executed_E > 0)
    added = {
        layout.TOKENS: valid,
        layout.PAIRS: valid * top_k,
        layout.HITS: valid * top_k - misses,
        layout.MISSES: misses,
        layout.UNIQUE_MISSES: int(urgent_E.sum()),
        layout.SWAPS: int(swapped_E.sum()),
        layout.MOVED_MASS: int(moved),
        layout.PADDED: T - valid,
    }
    state.counters_LC[layer] += torch.tensor([added[c] for c in range(layout.NUM_COUNTERS)])

    if meters:
        state.meters_LM[layer] += meters_ref(
            mass_TE[:valid], picked.demand_TK[:valid], executed_TK[:valid],
            picked.moved_T[:valid], score_rule,
        )  # fmt: skip
    if control:
        unavoidable = missing_E[picked.demand_TK[:valid, :protect]].sum()
        counts = [torch.as_tensor(n).reshape(1) for n in (valid, misses, moved, unavoidable)]
        call = Call(counts[0], residents, *counts[1:])
        state.control_state_LS[row], state.strength_L[row] = adapt_ref(
            state.control_LP[row], state.control_state_LS[row], state.strength_L[row], call, top_k
        )

    background_E = missing_E & (executed_E == 0) & (swapped_E > 0)
    priority_E = torch.where(urgent_E, layout.PRIORITY_URGENT, layout.PRIORITY_NONE)
    priority_E = torch.where(background_E, layout.PRIORITY_BACKGROUND, priority_E)
    waiting_E = torch.where(urgent_E, executed_E, torch.where(background_E, swapped_E, 0))
    record_R = state.record_LR[layer]
    generation = record_R[:1] + 1
    count = (priority_E != layout.PRIORITY_NONE).sum().reshape(1)
    affinity_bits_E = affinity_E.view(torch.int32)
    header_R = generation.new_zeros(layout.RECORD_HEADER)
    header_R[:2] = torch.cat([generation, count])
    tail_R = generation.new_zeros(layout.RECORD_TAIL)
    tail_R[-1:] = generation
    record_R.copy_(
        torch.cat([header_R, executed_E, waiting_E, priority_E, affinity_bits_E, tail_R])
    )


def _mark(ids_TK, E):
    marked_TE = torch.zeros(ids_TK.shape[0], E, dtype=torch.bool, device=ids_TK.device)
    return marked_TE.scatter_(1, ids_TK, True)
