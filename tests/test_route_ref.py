"""The definition itself: every answer here was worked out by hand, none by running code."""

import math

import pytest
import torch

from moe_gpu.kernels.route_ref import (
    Aging,
    Rule,
    affinity_window,
    age_affinity_ref,
    aging_of,
    first_aged_token,
    select_ref,
)
from moe_gpu.kernels.score_ref import ScoreRule, mixing_weights, rank_experts

NAN, INF = float("nan"), float("inf")
BIG = 3e38  # near the top of float32


def scores(*row):
    return torch.tensor([row], dtype=torch.float32)


def resident(E, ids):
    return torch.tensor([e in ids for e in range(E)])


@pytest.mark.parametrize(
    "row, order",
    [
        pytest.param([1, 3, 2], [1, 2, 0], id="descending"),
        pytest.param([1, 1, 1], [0, 1, 2], id="ties: lower id"),
        pytest.param([-0.0, 0.0, -1], [0, 1, 2], id="signed zeros tie"),
        pytest.param([INF, -BIG, NAN, -INF], [1, 0, 2, 3], id="non-finite last, by id"),
        pytest.param([1e-45, 0, -1e-45], [0, 1, 2], id="subnormals are numbers"),
    ],
)
def test_order(row, order):
    assert rank_experts(scores(*row)).tolist() == [order]


@pytest.mark.parametrize(
    "row, who, k, protect, bonus, expected",
    [
        # 1.0 + 0.15 beats 1.1 but not 1.2
        pytest.param([2, 1.1, 1.0], {2}, 2, 0, 0.15, [0, 2], id="resident overtakes"),
        pytest.param([2, 1.2, 1.0], {2}, 2, 0, 0.15, [0, 1], id="gap larger than the bonus"),
        pytest.param([2, 1.5, 1.0], {2}, 2, 0, 0.5, [0, 1], id="tie: the lower id stays"),
        pytest.param([1.0, 2, 1.5], {0}, 2, 0, 0.5, [1, 0], id="tie: the lower id wins"),
        pytest.param([1.1, 1.0], {1}, 1, 0, 0.15, [1], id="the top expert may go at J = 0"),
        pytest.param([1.1, 1.0], {1}, 1, 1, 9.0, [0], id="protected"),
        pytest.param([3, 2, 1, 0], {2, 3}, 2, 0, 9.0, [2, 3], id="both swapped, best first"),
        pytest.param([3, 2, 1, 0], {2, 3}, 2, 0, 0.0, [0, 1], id="no bonus"),
        pytest.param([3, 2, 1, 0], {2, 3}, 2, 0, NAN, [0, 1], id="NaN never swaps"),
        pytest.param([3, 2, 1, 0], {2, 3}, 2, 0, -1.0, [0, 1], id="negative never swaps"),
        pytest.param([3, 2, -INF, NAN], {2, 3}, 2, 0, BIG, [0, 1], id="non-finite gains nothing"),
        # all residents reach the same clamped sum, so the lower ids win, ordered by score
        pytest.param([0, 1, 2, 9], {0, 1, 2}, 2, 0, INF, [1, 0], id="clamped sums tie"),
    ],
)
def test_cache_bonus(row, who, k, protect, bonus, expected):
    picked = select_ref(scores(*row), resident(len(row), who), k, Rule.BONUS, bonus, protect)
    assert picked.ids_TK.tolist() == [expected]


@pytest.mark.parametrize(
    "row, bonus, expected",
    [
        pytest.param([4, 1.1, 1.0, 0], 0.1, [0, 2], id="0.1 x range 4 = 0.4"),
        pytest.param([4, 1.5, 1.0, 0], 0.1, [0, 1], id="0.4 is not 0.5"),
        pytest.param([INF, 1.1, 1.0, 1.0], 0.5, [1, 2], id="infinities are not in the range"),
        pytest.param([NAN, NAN, NAN, NAN], 0.5, [0, 1], id="nothing finite"),
        pytest.param([BIG, 1.1, 1.0, -BIG], 1.0, [0, 2], id="range beyond float32"),
    ],
)
def test_range_scaled_bonus(row, bonus, expected):
    picked = select_ref(scores(*row), resident(4, {2}), 2, Rule.RANGE_BONUS, bonus, 0)
    assert picked.ids_TK.tolist() == [expected]


def logs(*mass):
    return scores(*(math.log(m) if m else -INF for m in mass))


@pytest.mark.parametrize(
    "mass, who, k, protect, budget, expected, moved",
    [
        # swapping expert 1 (3) for 2 (2) moves 1 of the demand's 5 + 3
        pytest.param([5, 3, 2], {2}, 2, 1, 0.126, [0, 2], 1 / 8, id="inside"),
        pytest.param([5, 3, 2], {2}, 2, 1, 0.124, [0, 1], 0, id="outside"),
        pytest.param([5, 3, 2], {1, 2}, 2, 1, 9, [0, 1], 0, id="a resident never goes"),
        pytest.param([3, 3, 3], {2}, 2, 1, 0, [0, 1], 0, id="0 forbids a free swap too"),
        pytest.param([3, 3, 3], {2}, 2, 1, 1e-6, [0, 2], 0, id="a tie is free"),
        pytest.param([5, 3, 2], {2}, 2, 2, 9, [0, 1], 0, id="all protected"),
        pytest.param([5, 3, 2], {2}, 2, 0, 9, [0, 2], 1 / 8, id="worst goes first at J = 0"),
        # 4 -> 3 moves 1, then 5 -> 2 moves 3: 4 of 15 together
        pytest.param([6, 5, 4, 3, 2], {3, 4}, 3, 1, 0.27, [0, 3, 4], 4 / 15, id="two swaps"),
        pytest.param([6, 5, 4, 3, 2], {3, 4}, 3, 1, 0.26, [0, 1, 3], 1 / 15, id="a prefix"),
        # ranks 1 (4) and 2 (3.9) are missing; 3.9 -> 1 is refused, and 4 -> 1 never asked
        pytest.param([6, 4, 3.9, 1], {0, 3}, 3, 0, 0.2, [0, 1, 2], 0, id="first refusal ends it"),
        pytest.param([5, 3, 0], {2}, 2, 1, 0.376, [0, 2], 3 / 8, id="masked expert costs its all"),
    ],
)
def test_mass_budget(mass, who, k, protect, budget, expected, moved):
    picked = select_ref(logs(*mass), resident(len(mass), who), k, Rule.MASS, budget, protect)
    assert picked.ids_TK.tolist() == [expected]
    assert picked.moved_T.item() == pytest.approx(moved, abs=1e-6)


@pytest.mark.parametrize(
    "mass, who, k, protect, budget, expected, moved",
    [
        # expert 1 (3) for 2 (2): 9 + 4 - 1.5 x 6 = 4, whose root is 2 of the demand's 8
        pytest.param([5, 3, 2], {2}, 2, 1, 0.251, [0, 2], 1 / 8, id="inside"),
        pytest.param([5, 3, 2], {2}, 2, 1, 0.249, [0, 1], 0, id="outside"),
        pytest.param([5, 3, 2], {1, 2}, 2, 1, 9, [0, 1], 0, id="a resident never goes"),
        pytest.param([5, 3, 2], {2}, 2, 2, 9, [0, 1], 0, id="all protected"),
        pytest.param([5, 3, 2], {2}, 2, 1, NAN, [0, 1], 0, id="NaN never swaps"),
        # 9 + 9 - 1.5 x 9 = 4.5, whose root is 2.1213 of 6
        pytest.param([3, 3, 3], {2}, 2, 1, 0.354, [0, 2], 0, id="a tie, within"),
        pytest.param([3, 3, 3], {2}, 2, 1, 0.353, [0, 1], 0, id="a tie is not free"),
        # 4 -> 3: root of 7; 5 -> 2: root of 14, 0.2494 of 15. Prices do not add up
        pytest.param([6, 5, 4, 3, 2], {3, 4}, 3, 1, 0.25, [0, 3, 4], 4 / 15, id="each by itself"),
        pytest.param([6, 5, 4, 3, 2], {3, 4}, 3, 1, 0.249, [0, 1, 3], 1 / 15, id="a prefix"),
        # 4 -> 4: root of 8, 0.2006 of 14.1; 4.1 -> 3.1: root of 7.355, 0.1923
        pytest.param([6, 4.1, 4, 4, 3.1], {3, 4}, 3, 1, 0.196, [0, 1, 2], 0, id="refusal ends it"),
        pytest.param([5, 3, 0], {2}, 2, 1, 0.376, [0, 2], 3 / 8, id="masked expert costs its all"),
    ],
)
def test_output_budget(mass, who, k, protect, budget, expected, moved):
    picked = select_ref(logs(*mass), resident(len(mass), who), k, Rule.OUTPUT, budget, protect)
    assert picked.ids_TK.tolist() == [expected]
    assert picked.moved_T.item() == pytest.approx(moved, abs=1e-6)


@pytest.mark.parametrize("rule", [Rule.BONUS, Rule.RANGE_BONUS, Rule.MASS, Rule.OUTPUT])
def test_strength_may_differ_by_token(rule):
    row_TE, who_E = scores(2, 1.9, 1.8, 0).repeat(2, 1), resident(4, {2})
    strength_T1 = torch.tensor([[0.5], [0.001]])
    picked = select_ref(row_TE, who_E, 2, rule, strength_T1, 1)
    assert picked.ids_TK.tolist() == [[0, 2], [0, 1]]


def test_residency_may_differ_by_token():
    row_TE = torch.tensor([[2.0, 1.1, 1.0]]).repeat(2, 1)
    who_TE = torch.stack([resident(3, {2}), resident(3, {1})])
    assert select_ref(row_TE, who_TE, 2, Rule.BONUS, 0.15).ids_TK.tolist() == [[0, 2], [0, 1]]


@pytest.mark.parametrize(
    "row, ids, renormalize, expected",
    [
        pytest.param([1, 1, 1], [0, 1], True, [0.5, 0.5], id="equal"),
        pytest.param([math.log(3), 0, 9], [0, 1], True, [0.75, 0.25], id="the third is ignored"),
        pytest.param([math.log(3), 0, 0], [0, 1], False, [0.6, 0.2], id="share of all"),
        pytest.param([-200, -201, 200], [0, 1], True, [0.7310586, 0.2689414], id="no underflow"),
        pytest.param([0, INF, NAN], [0, 1], True, [1, 0], id="non-finite weighs 0"),
        pytest.param([NAN, INF, -INF], [0, 1], True, [0.5, 0.5], id="nothing finite: uniform"),
        pytest.param([NAN, INF, -INF], [0, 1], False, [0.5, 0.5], id="uniform in both rules"),
    ],
)
def test_mixing_weights(row, ids, renormalize, expected):
    weights = mixing_weights(scores(*row), torch.tensor([ids]), ScoreRule(renormalize=renormalize))
    torch.testing.assert_close(
        weights, torch.tensor([expected], dtype=torch.float32), atol=1e-7, rtol=0
    )


def test_affinity_ages_in_token_order():
    affinity = torch.tensor([1.0, 0.0, 0.5])
    chosen = torch.tensor([[False, True, False], [True, False, False]])
    # 1 -> .5 -> .25 + .5; 0 -> .5 -> .25; .5 -> .25 -> .125
    want = torch.tensor([0.75, 0.25, 0.125])
    assert torch.equal(age_affinity_ref(affinity, chosen, 0.5, 0.5, 1.0), want)


def test_affinity_is_clamped_at_every_token():
    chosen = torch.tensor([[True], [True], [False]])
    # min(.9 + 1, 1) = 1, again 1, then .5; clamping once at the end would leave .95 / 2 + ...
    assert age_affinity_ref(torch.tensor([0.9]), chosen, 0.5, 1.0, 1.0).tolist() == [0.5]


@pytest.mark.parametrize(
    "decay, window", [(0.0, 1), (0.5, 25), (0.99, 1657), (1.0, 2**31 - 1), (0.999999999, 2**31 - 1)]
)
def test_affinity_window_forgets_below_float32(decay, window):
    assert affinity_window(decay) == window
    if 0 < decay < 0.999:
        assert decay**window < 2**-24 <= decay ** (window - 2)


@pytest.mark.parametrize("valid, window, first", [(10, 25, 0), (64, 25, 32), (100, 1, 96)])
def test_first_aged_token_is_a_chunk_boundary(valid, window, first):
    assert first_aged_token(valid, window) == first


@pytest.mark.parametrize(
    "decay, boost, max_score, aging",
    [
        (0.99, 1.0, 1.0, Aging.LAST),  # the gate's defaults
        (0.98, 0.02, 1.0, Aging.SUM),  # those of attach
        (0.5, 2.0, 1.0, Aging.LAST), (0.0, 0.5, 1.0, Aging.SUM), (0.0, 1.0, 1.0, Aging.LAST),
        (1.0, 0.5, 1.0, Aging.STEPS), (1.0, 0.0, 1.0, Aging.SUM), (0.9, 0.3, 1.0, Aging.STEPS),
    ],
)  # fmt: skip
def test_the_cheapest_way_of_aging(decay, boost, max_score, aging):
    assert aging_of(decay, boost, max_score) == aging


def test_the_last_choice_is_all_that_counts_where_one_reaches_the_top():
    chosen = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]], dtype=torch.bool)
    got = age_affinity_ref(torch.tensor([0.5, 0.5, 0.5]), chosen, 0.5, 4.0, 2.0, Aging.LAST)
    assert got.tolist() == [1.0, 0.5, 0.0625]  # 2 / 2, 2 / 4, never: 0.5 / 8


def test_a_sum_of_choices():
    chosen = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]], dtype=torch.bool)
    got = age_affinity_ref(torch.tensor([0.5, 0.5, 0.5]), chosen, 0.5, 0.25, 1.0, Aging.SUM)
    # 0.5 / 8, and a quarter of a quarter for the oldest token, half of one for the next
    assert got.tolist() == [0.0625 + 0.0625 + 0.125, 0.0625 + 0.0625, 0.0625]


@pytest.mark.parametrize("T", [1, 2, 33, 4096])
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.99, 0.999, 0.9999, 1.0])
@pytest.mark.parametrize("max_score", [1.0, 30.0])
def test_every_way_of_aging_leaves_what_one_by_one_leaves(T, decay, max_score):
    """Within 2e-6 of what a sequence of calls leaves, worked out in float64."""
    generator = torch.Generator().manual_seed(T)
    share_E = torch.tensor([0.0, 0.001, 0.01, 0.1, 0.5, 1.0])
    chosen_TE = torch.rand(T, 6, generator=generator) < share_E
    start_E = max_score * torch.rand(6, generator=generator)
    decay32 = float(torch.tensor(decay))
    for boost in (max_score, 3.0 * max_score, 0.7 * max_score * (1.0 - decay)):
        aging = aging_of(decay, boost, max_score)
        assert aging != Aging.STEPS
        want_E = start_E.double()
        for chosen_E in chosen_TE:
            want_E = (want_E * decay32 + boost * chosen_E).clamp(max=max_score)
        got_E = age_affinity_ref(start_E, chosen_TE, decay, boost, max_score, aging)
        assert got_E.dtype == torch.float32
        torch.testing.assert_close(got_E.double(), want_E, atol=2e-6 * max_score, rtol=0)
