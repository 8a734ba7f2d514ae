"""Quality meters: closed forms against direct definitions, the kernel against both, the way out."""

import math

import pytest
import torch

import moe_gpu
from moe_gpu import CacheBonus, Exact, MassBudget, MoEGate, QualityBudget
from moe_gpu.export import prometheus_text
from moe_gpu.kernels import layout
from moe_gpu.kernels import route as route_module
from moe_gpu.kernels.meters_ref import meters_ref, moved_mass_bin
from moe_gpu.kernels.route import route
from moe_gpu.kernels.route_ref import Rule, route_ref, select_ref
from moe_gpu.kernels.score_ref import ScoreRule, exp_mass, mixing_weights
from moe_gpu.meter import Meter
from moe_gpu.metrics import CounterMirror, Metrics, meter_figures
from routing import make_state
from test_route_kernel import half_of

RULES = [(Rule.BONUS, 0, 0.8), (Rule.MASS, 1, 0.3), (Rule.OUTPUT, 0, 0.4)]
SHAPES = [(1, 8, 2), (70, 8, 2), (9, 13, 5), (5, 64, 8), (4, 8, 8), (3, 40, 16)]


def logs(*mass):
    return torch.tensor([[math.log(m) if m else -math.inf for m in mass]])


def test_a_swap_worked_out_by_hand():
    # demand {5, 3}, executed {5, 2}: 1 of 8 moves; 3/8 leaves, and 5/7 - 5/8 and 2/7 come
    mass_TE, demand, executed = logs(5, 3, 2).exp(), torch.tensor([[0, 1]]), torch.tensor([[0, 2]])
    added_M = meters_ref(mass_TE, demand, executed, torch.tensor([1 / 8]), ScoreRule())
    one = layout.METER_ONE
    assert added_M[layout.METERED] == 1
    assert added_M[layout.L1_CHANGE] == pytest.approx(0.75 * one, abs=4)
    assert added_M[layout.ROUTING_KL] == pytest.approx(math.log(8 / 7) * one, abs=4)
    assert added_M[layout.SWAPS_BY_RANK :].tolist() == [0, 1] + [0] * 14
    # not renormalised: 3 of 10 leaves, 2 of 10 comes
    added_M = meters_ref(
        mass_TE, demand, executed, torch.tensor([1 / 8]), ScoreRule(renormalize=False)
    )
    assert added_M[layout.L1_CHANGE] == pytest.approx(0.5 * one, abs=4)


def test_a_token_whose_stand_ins_have_no_mass_counts_as_17_nats():
    mass_TE, demand, executed = logs(5, 0).exp(), torch.tensor([[0]]), torch.tensor([[1]])
    added_M = meters_ref(mass_TE, demand, executed, torch.tensor([1.0]), ScoreRule())
    assert added_M[layout.L1_CHANGE] == 2 * layout.METER_ONE
    assert added_M[layout.ROUTING_KL] == pytest.approx(
        24 * math.log(2) * layout.METER_ONE, rel=1e-6
    )


@pytest.mark.parametrize(
    "moved, its_bin",
    [
        (0.0, 0), (1e-30, 1), (2.0**-14, 1), (1.49 * 2.0**-14, 1), (1.5 * 2.0**-14, 2),
        (2.0**-13, 3), (0.2499, 24), (0.25, 25), (0.5, 27), (0.75, 28), (0.9999, 28), (1.0, 29),
    ],
)  # fmt: skip
def test_bins(moved, its_bin):
    assert moved_mass_bin(torch.tensor([moved])).tolist() == [its_bin]
    edges = layout.moved_mass_edges()
    assert len(edges) == layout.HISTOGRAM_BINS and edges == sorted(edges)
    assert moved <= edges[its_bin] and (its_bin == 0 or moved >= edges[its_bin - 1] or its_bin == 1)
    assert (edges[0], edges[1], edges[-2], edges[-1]) == (0.0, 1.5 * 2**-14, 1.0, 1.0)


def scattered(ids_TK, weights_TK, E):
    return torch.zeros(len(ids_TK), E).scatter_(1, ids_TK, weights_TK)


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("rule, protect, strength", RULES, ids=lambda v: str(getattr(v, "name", v)))
@pytest.mark.parametrize("E, K", [(8, 2), (13, 5), (64, 8)], ids=str)
def test_closed_forms_are_the_definitions(E, K, rule, protect, strength, renormalize):
    scores_TE = 2 * torch.randn(200, E)
    resident_E = torch.zeros(E, dtype=torch.bool)
    resident_E[half_of(E)] = True
    picked = select_ref(scores_TE, resident_E, K, rule, strength, protect)
    rule_of_weights = ScoreRule(renormalize=renormalize)
    added_M = meters_ref(
        exp_mass(scores_TE), picked.demand_TK, picked.ids_TK, picked.moved_T, rule_of_weights
    )
    sets = (picked.demand_TK, picked.ids_TK)
    w, v = (scattered(ids, mixing_weights(scores_TE, ids, rule_of_weights), E) for ids in sets)
    change = (v - w).abs().sum().item()
    one = layout.METER_ONE
    assert added_M[layout.L1_CHANGE].item() / one == pytest.approx(change, rel=1e-5)
    p_TE = scores_TE.double().softmax(1)
    kls = []
    for ids_TK in sets:
        p_TK = p_TE.gather(1, ids_TK)
        q_TK = p_TK / p_TK.sum(1, keepdim=True)
        kls.append((q_TK * (q_TK / p_TK).log()).sum().item())
    assert added_M[layout.ROUTING_KL].item() / one == pytest.approx(kls[1] - kls[0], rel=1e-5)
    gone_TK = ~(picked.demand_TK[:, :, None] == picked.ids_TK[:, None]).any(2)
    assert added_M[layout.SWAPS_BY_RANK :][:K].tolist() == gone_TK.sum(0).tolist()
    assert gone_TK.sum() > 20, "meant to swap"


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("rule, protect, strength", RULES, ids=lambda v: str(getattr(v, "name", v)))
@pytest.mark.parametrize("T, E, K", SHAPES, ids=str)
def test_kernel_counts_the_same(T, E, K, rule, protect, strength, renormalize, device):
    got, want = (make_state(E, half_of(E), strength, 2, where) for where in (device, "cpu"))
    rules = {
        "top_k": K,
        "rule": rule,
        "protect": protect,
        "score_rule": ScoreRule(renormalize=renormalize),
    }
    valid = None if T < 9 else T - 3
    num_valid = None if valid is None else torch.tensor(valid, dtype=torch.int32, device=device)
    swaps = 0
    for _ in range(2):
        logits_TE = torch.randn(T, E)
        route(logits_TE.to(device), got, 1, num_valid=num_valid, meters=True, **rules)
        out = torch.empty(T, K), torch.empty(T, K, dtype=torch.int64)
        from_rules = {"decay": 0.99, "boost": 1.0, "max_score": 1.0}
        route_ref(
            logits_TE, *out, valid, want, 1, meters=True, **rules, **from_rules,
            affinity_from=route_module.AffinityFrom.DEMAND,
        )  # fmt: skip
        swaps = want.counters_LC[1, layout.SWAPS].item()
    mine_M, theirs_M = got.meters_LM[1].cpu(), want.meters_LM[1]
    assert mine_M[layout.METERED] == theirs_M[layout.METERED] == 2 * (T if valid is None else valid)
    assert torch.equal(mine_M[layout.SWAPS_BY_RANK :], theirs_M[layout.SWAPS_BY_RANK :])
    assert mine_M[layout.SWAPS_BY_RANK :].sum() == swaps
    # a moved mass within rounding of an edge may fall on either side; none does here
    assert torch.equal(
        mine_M[layout.HISTOGRAM : layout.SWAPS_BY_RANK],
        theirs_M[layout.HISTOGRAM : layout.SWAPS_BY_RANK],
    )
    # a few roundings of float32 per swapping token, each at most 2 large
    for column in (layout.L1_CHANGE, layout.ROUTING_KL):
        assert abs(int(mine_M[column] - theirs_M[column])) <= 16 * swaps
        assert (mine_M[column] > 0) == (theirs_M[column] > 0)
    assert got.meters_LM[0].abs().sum() == 0


@pytest.mark.parametrize("renormalize", [True, False])
def test_scores_that_are_not_finite(renormalize, device):
    nan, inf = math.nan, math.inf
    rows = [[1, nan, 0.5, inf], [nan, nan, nan, nan], [inf, -inf, 2, nan], [300, -300, inf, 299]]
    rows += [[0, -200, -300, -400]]  # the stand-in's mass underflows: all of it moves
    state, logits_TE = make_state(4, [2, 3], 1e9, device=device), torch.tensor(rows)
    route(
        logits_TE.to(device), state, 0, top_k=1, rule=Rule.MASS, meters=True,
        score_rule=ScoreRule(renormalize=renormalize),
    )  # fmt: skip
    meters_M = state.meters_LM[0].cpu()
    picked = select_ref(logits_TE, state.slot_of_LE[0].cpu() >= 0, 1, Rule.MASS, 1e9)
    want_M = meters_ref(
        exp_mass(logits_TE),
        picked.demand_TK,
        picked.ids_TK,
        picked.moved_T,
        ScoreRule(renormalize=renormalize),
    )
    assert (meters_M - want_M).abs().max() <= 16 * len(rows)
    most = len(rows) * layout.METER_ONE
    assert 0 <= meters_M[layout.L1_CHANGE] <= 2 * most
    assert 0 < meters_M[layout.ROUTING_KL] <= 17 * most
    assert meters_M[layout.HISTOGRAM : layout.SWAPS_BY_RANK].sum() == len(rows)
    assert meters_M[layout.HISTOGRAM + layout.HISTOGRAM_BINS - 1] >= 1
    figures = meter_figures(state.meters_LM)
    assert figures["moved_mass_p99"] == 1.0


# --- the way out ------------------------------------------------------------------------------


@pytest.fixture
def reference_path(monkeypatch):
    monkeypatch.setattr(route_module, "_INTERPRET", False)


def test_figures_by_hand():
    meters_LM = torch.zeros(2, layout.NUM_METERS, dtype=torch.int64)
    assert meter_figures(meters_LM, 2) == {
        "moved_mass_p99": 0.0, "l1_change": 0.0, "routing_kl": 0.0, "swaps_by_rank": (0, 0),
    }  # fmt: skip
    meters_LM[:, layout.METERED] = 100
    meters_LM[:, layout.HISTOGRAM] = 99
    meters_LM[0, layout.HISTOGRAM + 27] = 1
    meters_LM[1, layout.HISTOGRAM + 25] = 1
    meters_LM[0, layout.L1_CHANGE] = 3 * layout.METER_ONE
    meters_LM[1, layout.ROUTING_KL] = 5 * layout.METER_ONE
    meters_LM[:, layout.SWAPS_BY_RANK + 1] = 7
    figures = meter_figures(meters_LM, 2)
    assert figures["moved_mass_p99"] == 0.0 and figures["swaps_by_rank"] == (0, 14)
    assert (figures["l1_change"], figures["routing_kl"]) == (3 / 200, 5 / 200)
    meters_LM[0, layout.HISTOGRAM] = 98
    meters_LM[0, layout.HISTOGRAM + 25] = 1  # 197 of 200 at 0, 199 at 0.375 or less
    assert meter_figures(meters_LM)["moved_mass_p99"] == 0.375


@pytest.mark.parametrize("policy", [MassBudget(0.3), QualityBudget(0.4), CacheBonus(0.5)], ids=str)
def test_a_gate_measures_its_policy(policy, reference_path):
    gate = MoEGate(None, 8, 2, policy, meters=True)
    gate.set_resident([0, 1, 2, 3])
    for _ in range(100):
        gate.route(torch.randn(1, 8))
    metrics = gate.metrics()
    assert metrics.swaps == sum(metrics.swaps_by_rank) > 0
    assert len(metrics.swaps_by_rank) == 2
    assert metrics.moved_mass / metrics.tokens <= metrics.moved_mass_p99 <= 1
    assert 0 < metrics.routing_kl and metrics.moved_mass / metrics.tokens < metrics.l1_change < 2
    gate.reset_metrics()
    assert gate.metrics().l1_change == 0 and gate.metrics().swaps_by_rank == (0, 0)


def test_off_is_none_and_touches_nothing(reference_path):
    gate = MoEGate(None, 8, 2, MassBudget(0.3))
    gate.set_resident([0, 1, 2, 3])
    gate.route(torch.randn(20, 8))
    metrics = gate.metrics()
    assert metrics.moved_mass_p99 is metrics.l1_change is metrics.routing_kl is None
    assert metrics.swaps_by_rank is None and gate.state.meters_LM.abs().sum() == 0
    assert "rank" not in prometheus_text(gate)


def test_prefill_and_exact_routing_are_not_measured(reference_path):
    gate = MoEGate(None, 8, 2, MassBudget(0.3), meters=True, max_policy_tokens=4)
    gate.route(torch.randn(5, 8))
    gate.policy = Exact()
    gate.route(torch.randn(2, 8))
    assert gate.state.meters_LM.abs().sum() == 0 and gate.metrics().tokens == 7


def test_a_launch_beyond_the_bound_of_the_policy_measures_nothing(device):
    state = make_state(8, [1, 2], 0.5, device=device)
    rules = {"top_k": 2, "rule": Rule.MASS, "protect": 1, "meters": True, "max_policy_tokens": 4}
    route(torch.randn(5, 8, device=device), state, 0, **rules)
    assert state.meters_LM.abs().sum() == 0 and state.counters_LC[0, layout.SWAPS] == 0
    route(torch.randn(4, 8, device=device), state, 0, **rules)
    assert state.meters_LM[0, layout.METERED] == 4


def test_exported_by_rank_and_differenced(reference_path):
    gate = MoEGate(None, 8, 2, QualityBudget(1.0, protect=0), meters=True)
    gate.set_resident([0, 1, 2, 3])
    gate.route(torch.randn(30, 8))
    meter, before = Meter(gate), gate.metrics()
    gate.route(torch.randn(30, 8))
    after, interval = gate.metrics(), meter().metrics
    text = prometheus_text(gate)
    for rank in (0, 1):
        assert f'moe_gpu_rank_swaps_total{{model="model",rank="{rank}"}}' in text
        change = after.swaps_by_rank[rank] - before.swaps_by_rank[rank]
        assert interval.swaps_by_rank[rank] == change > 0
    assert interval.l1_change == after.l1_change
    assert "moe_gpu_l1_change{" in text and "moe_gpu_routing_kl_nats{" in text


def test_a_mirror_takes_meters_too(device):
    state = make_state(8, device=device)
    state.meters_LM[0, layout.METERED] = 3
    mirror = CounterMirror(state.meters_LM)
    assert mirror.read(wait=True)[0, layout.METERED] == 3
    mirror.reset()
    if device == "cuda":
        mirror.read(wait=False)
        torch.cuda.synchronize()
    assert mirror.read(wait=False)[0, layout.METERED] == 3


def test_meters_must_be_a_bool():
    with pytest.raises(TypeError, match="meters must be True or False, got 1"):
        MoEGate(None, 8, 2, meters=1)
    assert Metrics().l1_change is None and moe_gpu.Metrics is Metrics
