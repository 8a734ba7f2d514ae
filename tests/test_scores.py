"""Score rules of other families: the definition by hand, the kernel against it, and its promises."""

import math

import pytest
import torch

from moe_gpu.kernels.route import route
from moe_gpu.kernels.route_ref import Rule, select_ref
from moe_gpu.kernels.score_ref import (
    GroupScore,
    Score,
    ScoreRule,
    mixing_weights,
    rank_experts,
    score_ref,
)
from routing import STATE, assert_same, both, make_state

NAN, INF = float("nan"), float("inf")
SIGMOID = ScoreRule(score=Score.SIGMOID)
TOP2_OF_4 = ScoreRule(score=Score.SIGMOID, num_groups=4, top_groups=2, scaling_factor=2.5)
MAX_OF_4 = ScoreRule(
    renormalize=False, num_groups=4, top_groups=2, group_score=GroupScore.MAX, scaling_factor=16.0
)
MIXER = ScoreRule(score=Score.SPARSEMIXER, jitter_eps=0.01)


def row(*values):
    return torch.tensor([values], dtype=torch.float32)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


# -- the definition, by hand


def test_a_correction_bias_chooses_and_does_not_weigh():
    bias_E = torch.tensor([0.0, 0.0, 0.9])
    scores = score_ref(row(1, 0, -2), SIGMOID, bias_E)
    # 0.731, 0.5, 0.119 + 0.9
    assert rank_experts(scores.selection_TE).tolist() == [[2, 0, 1]]
    assert scores.mass_TE[0].tolist() == pytest.approx([sigmoid(1), 0.5, sigmoid(-2)])
    weights = mixing_weights(row(1, 0, -2), torch.tensor([[2, 0]]), SIGMOID)
    total = sigmoid(-2) + sigmoid(1)
    assert weights[0].tolist() == pytest.approx([sigmoid(-2) / total, sigmoid(1) / total])
    raw = mixing_weights(
        row(1, 0, -2),
        torch.tensor([[2, 0]]),
        ScoreRule(score=Score.SIGMOID, renormalize=False, scaling_factor=2.0),
    )
    assert raw[0].tolist() == pytest.approx([2 * sigmoid(-2), 2 * sigmoid(1)])


def test_a_bias_on_a_softmax_is_added_to_the_probability():
    scores = score_ref(row(math.log(0.5), math.log(0.3), math.log(0.2)), ScoreRule(),
                       torch.tensor([0.0, 0.1, 0.25]))  # fmt: skip
    assert scores.selection_TE[0].tolist() == pytest.approx([0.5, 0.4, 0.45])
    assert scores.mass_TE[0].tolist() == pytest.approx([0.5, 0.3, 0.2])


GROUPED = row(9, 0, 0, 5, 5, 1, 8, -9)  # groups of 2: sums 9, 5, 6, -1; maxima 9, 5, 5, 8


@pytest.mark.parametrize(
    "group_score, top_groups, candidates",
    [
        (GroupScore.TOP2_SUM, 1, [0, 1]),
        (GroupScore.TOP2_SUM, 2, [0, 1, 4, 5]),
        (GroupScore.TOP2_SUM, 3, [0, 1, 2, 3, 4, 5]),
        (GroupScore.MAX, 2, [0, 1, 6, 7]),
        (GroupScore.MAX, 3, [0, 1, 2, 3, 6, 7]),  # a tie at 5: the lower group
        (GroupScore.MAX, 4, None),
    ],
)
def test_groups(group_score, top_groups, candidates):
    rule = ScoreRule(num_groups=4, top_groups=top_groups, group_score=group_score)
    found_TE = score_ref(GROUPED, rule).candidate_TE
    found = None if found_TE is None else found_TE[0].nonzero().flatten().tolist()
    assert found == candidates


def test_swaps_stay_within_the_groups():
    rule = ScoreRule(num_groups=4, top_groups=2, group_score=GroupScore.MAX)
    scores = score_ref(GROUPED, rule)
    resident_E = torch.tensor([e in (1, 3, 4, 5) for e in range(8)])  # 3 and 4 rank third
    for how, strength in [(Rule.BONUS, 100.0), (Rule.MASS, 1.0), (Rule.OUTPUT, 1.0)]:
        picked = select_ref(scores.selection_TE, resident_E, 2, how, strength, 0, *scores[1:])
        assert picked.demand_TK.tolist() == [[0, 6]]
        # 1 is the only resident candidate
        assert sorted(picked.ids_TK[0].tolist()) == [0, 1], how


def test_a_swap_is_priced_by_the_mass_where_the_bias_chose():
    # demand 0 and 1 by score; expert 2, resident, has three times the mass of 1
    scores = score_ref(row(2, math.log(1 / 3), 0, -9), SIGMOID, torch.tensor([0.0, 0.6, 0.0, 0.0]))
    assert scores.mass_TE[0, 1].item() == pytest.approx(0.25)
    resident_E = torch.tensor([True, False, True, False])
    picked = select_ref(scores.selection_TE, resident_E, 2, Rule.MASS, 1e-6, 1, *scores[1:])
    assert picked.demand_TK.tolist() == [[0, 1]] and picked.ids_TK.tolist() == [[0, 2]]
    assert picked.moved_T.tolist() == [0.0], "no mass was lost"


def test_sparsemixer_by_hand():
    # eps 0.01: an expert further than 2 % of max(|x|, best) away is left out
    logits = row(10, 9.9, 9.79, 1, -9.9)
    # round 1: 9.9 is 1 % away, 9.79 2.1 %; round 2: 9.79 is 1.1 % of 9.9 away
    first = 1 / (1 + math.exp(-0.1))
    second = 1 / (1 + math.exp(-0.11))
    weights = mixing_weights(logits, torch.tensor([[0, 1]]), MIXER)
    assert weights[0].tolist() == pytest.approx([first, second], rel=1e-5)
    # after a swap of 1 for 3 the third is alone; -9.9 is 110 % away
    swapped = mixing_weights(logits, torch.tensor([[0, 3]]), MIXER)
    assert swapped[0].tolist() == pytest.approx([first, 1.0], rel=1e-5)


def test_softcap_bounds_and_keeps_what_is_not_finite():
    scores = score_ref(row(1e9, 0, -30, INF, NAN, 1e-4), ScoreRule(softcap=30.0))
    bounded = [30.0, 0.0, -30 * math.tanh(1), 1e-4]
    assert scores.selection_TE[0, [0, 1, 2, 5]].tolist() == pytest.approx(bounded, rel=1e-6)
    assert rank_experts(scores.selection_TE)[0].tolist() == [0, 5, 1, 2, 3, 4]
    assert scores.mass_TE[0, 3:5].tolist() == [0.0, 0.0]


# -- the kernel

FAMILIES = {  # rule, bias: shapes that their groups allow
    "sigmoid": (SIGMOID, False),
    "sigmoid shares": (ScoreRule(score=Score.SIGMOID, renormalize=False), False),
    "sigmoid, bias": (SIGMOID, True),
    "sigmoid, bias, groups": (TOP2_OF_4, True),
    "softmax, groups by max": (MAX_OF_4, False),
    "softmax, groups by sum": (ScoreRule(num_groups=4, top_groups=3), False),
    "softmax, bias": (ScoreRule(), True),
    "softmax shares, bias": (ScoreRule(renormalize=False), True),
    "sparsemixer": (MIXER, False),
    "softcap": (ScoreRule(softcap=2.0), False),
    "scaled": (ScoreRule(renormalize=False, scaling_factor=3.0), False),
}
RULES = [
    (Rule.EXACT, 0, 0.0),
    (Rule.BONUS, 1, 0.5),
    (Rule.RANGE_BONUS, 0, 0.3),
    (Rule.MASS, 1, 0.3),
    (Rule.OUTPUT, 1, 0.3),
]


def half_of(E):
    return torch.randperm(E, generator=torch.Generator().manual_seed(E))[: (E + 1) // 2].tolist()


def bias_of(E):
    return torch.randn(E, generator=torch.Generator().manual_seed(1)) / 4


CASES = [*((*rule, 9, 16, 4) for rule in RULES), (*RULES[-1], 40, 8, 2), (*RULES[-1], 2, 160, 6)]


@pytest.mark.parametrize(
    "how, protect, strength, T, E, K", CASES, ids=lambda v: str(getattr(v, "name", v))
)
@pytest.mark.parametrize("family", FAMILIES)
def test_kernel_matches_the_definition(family, how, protect, strength, T, E, K, device):
    rule, biased = FAMILIES[family]
    logits_TE = 2 * torch.randn(T, E, device=device)
    bias_E = bias_of(E).to(device) if biased else None
    result = both(
        logits_TE, half_of(E), strength, top_k=K, rule=how, protect=protect,
        score_rule=rule, correction_bias=bias_E,
    )  # fmt: skip
    assert_same(*result, scale=rule.scaling_factor)
    if how != Rule.EXACT and T > 2:
        assert result[1].counters_LC[0, 5] > 0, "meant to swap"


SPECIAL = torch.tensor([NAN, INF, -INF, 0.0, -0.0, 3e38, -3e38, 1e-45, 100.0, -100.0])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_input_has_the_definition_and_its_promises(family, device):
    """Ties of experts and of groups, rows with nothing finite, columns beyond E."""
    rule, biased = FAMILIES[family]
    E, K = 12, 4
    generator = torch.Generator().manual_seed(3)
    logits_TE = SPECIAL[torch.randint(len(SPECIAL), (64, E), generator=generator)]
    for t, value in enumerate((NAN, -200.0, INF, 0.0, -50.0)):  # -50: sigmoids near 1e-20
        logits_TE[t] = value
    logits_TE = logits_TE.to(device)
    bias_E = bias_of(E).to(device) if biased else None
    for how in (Rule.EXACT, Rule.OUTPUT):
        (weights_TK, ids_TK), state, want, want_state = both(
            logits_TE, half_of(E), 0.3, top_k=K, rule=how, protect=1,
            score_rule=rule, correction_bias=bias_E,
        )  # fmt: skip
        assert_same((weights_TK, ids_TK), state, want, want_state, scale=rule.scaling_factor)
        torch.testing.assert_close(weights_TK.cpu(), want[0], rtol=1e-5, atol=1e-30)
        assert weights_TK.isfinite().all()
        assert ((ids_TK >= 0) & (ids_TK < E)).all()
        assert (ids_TK.sort(1).values.diff(dim=1) > 0).all(), "distinct"
        if rule.renormalize:
            whole_T = logits_TE.isfinite().sum(1) > 10
            whole_T[4] = False
            total_T = weights_TK[whole_T].sum(1)
            assert torch.allclose(total_T, torch.full_like(total_T, rule.scaling_factor))


def test_the_best_expert_may_be_in_a_group_that_is_not_visited(device):
    """Its mass is that of the row all the same: 40 above the rest, whose shares are e-40."""
    logits_TE = torch.tensor([[40.0, -90, 1, 2, 3, 0, 1, 1], [1, 2, 40, -90, 3, 0, 1, 1]])
    rule = ScoreRule(renormalize=False, num_groups=4, top_groups=2)
    result = both(
        logits_TE.to(device), [2, 7], 0.9, top_k=2, rule=Rule.OUTPUT, meters=True, score_rule=rule
    )
    assert_same(*result)
    assert torch.equal(result[1].meters_LM.cpu(), result[3].meters_LM)
    torch.testing.assert_close(result[0][0].cpu(), result[2][0], rtol=1e-5, atol=0)
    assert not (result[0][1] == torch.tensor([[0], [2]], device=device)).any()


def test_softcap_keeps_small_logits_apart(device):
    """Where tanh is nearly its argument: one minus an exponential would make ties of them."""
    logits_TE = (torch.arange(8.0, device=device) * 1e-8).flip(0)[None]
    (_, ids_TK), *_ = both(logits_TE.flip(1), [], 0.0, top_k=4, score_rule=ScoreRule(softcap=30.0))
    assert ids_TK.tolist() == [[7, 6, 5, 4]]


@pytest.mark.parametrize("family", FAMILIES)
def test_meters_match_the_definition(family, device):
    rule, biased = FAMILIES[family]
    E, K = 16, 4
    bias_E = bias_of(E).to(device) if biased else None
    logits_TE = 2 * torch.randn(70, E, device=device)
    got, state, want, want_state = both(
        logits_TE, half_of(E), 0.3, top_k=K, rule=Rule.OUTPUT, protect=1, meters=True,
        score_rule=rule, correction_bias=bias_E,
    )  # fmt: skip
    assert_same(got, state, want, want_state, scale=rule.scaling_factor)
    # units of 2**-24 of a token's weight: each of 70 rounds
    close = (state.meters_LM.cpu() - want_state.meters_LM).abs()
    assert close[0, :3].max() <= 70 * 64 and close[0, 3:].max() == 0
    assert state.meters_LM[0, 1] > 0


def test_same_bits_on_every_grid(device, monkeypatch):
    logits_TE = 2 * torch.randn(70, 16, device=device)
    bias_E = bias_of(16).to(device)
    results = []
    for programs in (1, 3, 1024):
        monkeypatch.setattr("moe_gpu.kernels.launch.most_programs", lambda device, n=programs: n)
        state = make_state(16, half_of(16), 0.3, device=device)
        out = route(
            logits_TE, state, 0, top_k=4, rule=Rule.OUTPUT, protect=1,
            score_rule=TOP2_OF_4, correction_bias=bias_E,
        )  # fmt: skip
        results.append((*out, *(getattr(state, name) for name in STATE)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_shares_that_underflow_beside_the_best(device):
    """The bias chose an expert whose share of the softmax is 0: that is its weight."""
    logits_TE = torch.tensor([[200.0, 0.0]], device=device)
    bias_E = torch.tensor([-2.0, 0.0], device=device)
    rule = ScoreRule(renormalize=False)
    result = both(logits_TE, [], 0.0, top_k=1, score_rule=rule, correction_bias=bias_E)
    assert_same(*result)
    assert result[0][0].item() == 0.0 and result[0][1].item() == 1


def test_saturated_sigmoids_keep_the_order_of_the_logits(device):
    """Cohere2-MoE ranks by logits; 18 and 40 have the same sigmoid in float32."""
    logits_TE = torch.tensor([[18.0, 25.0, 30.0, 40.0]], device=device)
    result = both(logits_TE, [], 0.0, top_k=2, score_rule=SIGMOID)
    assert_same(*result)
    assert result[0][1].tolist() == [[3, 2]]


# -- refusals


def refuse(error, match, **arguments):
    state = make_state(8)
    with pytest.raises(error, match=match):
        route(torch.randn(3, 8), state, 0, top_k=2, **arguments)
    assert int(state.counters_LC.sum()) == 0


def test_refusals():
    refuse(ValueError, "num_groups must divide", score_rule=ScoreRule(num_groups=3))
    refuse(ValueError, "top_groups must lie", score_rule=ScoreRule(num_groups=4, top_groups=5))
    refuse(
        ValueError,
        "at least 2 experts, got 1",
        score_rule=ScoreRule(num_groups=8, top_groups=3),
    )
    refuse(
        ValueError,
        "hold fewer than top_k=2",
        score_rule=ScoreRule(num_groups=8, group_score=GroupScore.MAX),
    )
    refuse(TypeError, "correction_bias must be", correction_bias=[0.0] * 8)
    refuse(TypeError, "got torch.int64", correction_bias=torch.zeros(8, dtype=torch.int64))
    refuse(ValueError, r"shape \(8,\), got \(7,\)", correction_bias=torch.zeros(7))
    refuse(ValueError, "contiguous", correction_bias=torch.zeros(16)[::2])
    refuse(ValueError, "no meaning", score_rule=MIXER, correction_bias=torch.zeros(8))
    refuse(TypeError, "two tensors", out=[torch.empty(3, 2)])
    refuse(TypeError, "two tensors", out=(None, None))


def test_numbers_of_a_rule_are_floats():
    """The kernel is compiled for their type."""
    rule = ScoreRule(scaling_factor=2, softcap=30, jitter_eps=0)
    for value in (rule.scaling_factor, rule.softcap, rule.jitter_eps):
        assert type(value) is float
