"""The controller: its law worked out by hand, then in a loop with a cache, then its interface."""

import math

import pytest
import torch

import moe_gpu
from moe_gpu import AdaptiveBonus, Control, Exact, HitRateTarget, MassBudget, MoEGate, QualityTarget
from moe_gpu.kernels import layout
from moe_gpu.kernels import route as route_module
from moe_gpu.kernels.control_ref import Call, adapt_ref, strength_in_force
from moe_gpu.kernels.route_ref import select_ref


@pytest.fixture(autouse=True)
def reference_path(monkeypatch, one_thread):
    monkeypatch.setattr(route_module, "_INTERPRET", False)


class Loop:
    """L controllers with numbers for calls: every figure below is of the first."""

    def __init__(self, top_k=2, layers=1, **parameters):
        # 1 .. 8 in three octaves, one octave per token and unit of error, no averaging
        plain = dict(
            MODE=layout.MODE_HIT_RATE, TARGET=0.5, LARGEST=8.0, SMALLEST=1.0, START=2.0, GAIN=1.0,
            CALL_GAIN=100.0, AVERAGE_RATE=1.0,
        )  # fmt: skip
        self.top_k = top_k
        self.control_LP = torch.zeros(layers, layout.NUM_CONTROLS)
        for name, value in (plain | parameters).items():
            self.control_LP[:, getattr(layout, name)] = value
        self.state_LS = torch.zeros(layers, layout.NUM_CONTROL_STATE)
        self.strength_L = torch.full((layers,), 2.0)

    def __call__(self, *, tokens=1, residents=4, misses=0, moved=0.0, unavoidable=0):
        counts = (tokens, residents, misses, round(moved * layout.MOVED_MASS_ONE), unavoidable)
        call = Call(*(torch.as_tensor(x).expand(len(self.strength_L)) for x in counts))
        self.state_LS, self.strength_L = adapt_ref(
            self.control_LP, self.state_LS, self.strength_L, call, self.top_k
        )
        return self.strength_L[0].item()

    def at(self, column):
        return self.state_LS[0, column].item()


def test_a_miss_raises_the_budget_and_a_hit_lowers_it():
    loop = Loop()
    # 0.5 octave up from 2: half way between 2 and 4 on the bits. Then 2 misses: 3.5 octaves are
    # beyond the largest. One hit and one miss are the target: nothing moves
    assert loop(misses=2) == 3.0
    assert loop(misses=1) == 3.0
    assert loop(misses=2) == 4.0
    assert loop(misses=0) == 3.0
    assert [loop(misses=0) for _ in range(6)] == [2.0, 1.5, 1.0 - 1.0, 0.0, 0.0, 0.0]
    # from 0 the first miss is enough to leave it
    assert [loop(misses=2) for _ in range(2)] == [1.5, 2.0]


def test_moved_mass_is_held_the_same_way():
    loop = Loop(MODE=layout.MODE_QUALITY, TARGET=0.25, GAIN=4.0)
    assert loop(moved=0.0) == 4.0  # 4 x 0.25 = one octave
    assert loop(moved=0.25) == 4.0
    assert loop(moved=0.5) == 2.0
    assert loop(tokens=2, moved=0.5) == 2.0  # 0.25 per token
    assert loop(tokens=2, moved=0.25) == 4.0  # 2 tokens x 4 x 0.125 below the target


def test_a_call_of_many_tokens_moves_within_its_bound():
    loop = Loop(CALL_GAIN=2.0)
    assert loop(tokens=64, misses=128) == 4.0  # not 64 x 0.5 octaves, 2 x 0.5


def test_never_above_the_largest_and_down_at_once_after_long_infeasible():
    loop = Loop(LEAD=3.0, RECENT_RATE=0.5)
    strengths = [loop(misses=2, unavoidable=2) for _ in range(500)]
    assert max(strengths) == 8.0 and strengths[-1] == 8.0
    assert loop.at(layout.FLAGS) == layout.FLAG_CLAMPED + layout.FLAG_INFEASIBLE
    # half an octave down, and the lead of half the error of the first hit on top: 2.5 - 3 x 0.25
    assert loop(misses=0) == pytest.approx(2 ** (math.log2(8) - 1.25), rel=0.07)
    assert not int(loop.at(layout.FLAGS)) & layout.FLAG_CLAMPED


def test_up_at_once_after_long_above_the_target():
    loop = Loop(LEAD=3.0, RECENT_RATE=0.5)
    for _ in range(500):
        loop(misses=0)
    assert loop(misses=1) == 0.0
    assert loop(misses=2) == pytest.approx(2**1.25, rel=0.07)


def test_the_lead_answers_and_leaves_nothing_behind():
    loop = Loop(GAIN=0.0, LEAD=2.0, RECENT_RATE=0.5)
    assert loop(misses=2) == 3.0  # 2 x 0.25 octaves above 2
    # error 0 from here: half of it each time
    assert [loop(misses=1) for _ in range(2)] == [2.5, 2.25]
    assert loop(tokens=8, misses=16) == 4.0  # 0.5 in all, not 8 x 0.5 x 0.5


def test_the_lead_is_forgotten_beyond_the_bounds():
    # one octave above the smallest, two below the largest
    loop = Loop(GAIN=0.0, LEAD=100.0, RECENT_RATE=0.5)
    assert loop(misses=2) == 8.0 and loop.at(layout.RECENT_ERROR) == pytest.approx(2 / 100)
    assert loop(misses=0) == 0.0 and loop.at(layout.RECENT_ERROR) == pytest.approx(-1 / 100)
    assert loop(misses=2) == 8.0


def test_within_the_dead_band_the_budget_rests():
    loop = Loop(AVERAGE_RATE=0.5, DEAD_BAND=0.25)
    assert loop(misses=0) == 1.5  # average 1
    assert loop(misses=1) == 1.5  # 0.75: at the edge is within
    assert loop(misses=2) == 1.5  # 0.375
    assert loop(misses=2) == 2.0  # 0.1875
    assert loop(misses=1) == 2.0  # 0.34
    loop = Loop(MODE=layout.MODE_QUALITY, GAIN=4.0, AVERAGE_RATE=0.5, DEAD_BAND=0.25)
    assert loop(moved=0.25) == 2.0 and loop(moved=0.0) == 8.0  # averages 0.25 and 0.125


def test_cold_routes_exactly_and_integrates_nothing():
    loop = Loop(WARM_TOKENS=4, LEAD=5.0, RECENT_RATE=1.0, AVERAGE_RATE=0.01)
    assert loop(misses=2) == 0.0
    assert loop.at(layout.FLAGS) == layout.FLAG_COLD
    assert loop(tokens=2, misses=4) == 0.0
    assert loop(misses=2) == 2.0  # the start, for the fifth token
    assert loop.at(layout.FLAGS) == 0 and loop.at(layout.SEEN) == 4
    assert loop(misses=1) == 2.0
    assert loop.at(layout.MEAN_HITS) == 0.5  # the averages began again


def test_too_few_residents_stop_everything():
    loop = Loop()
    before = loop.state_LS.clone()
    loop(residents=1, misses=2)
    assert loop.at(layout.FLAGS) == layout.FLAG_COLD
    loop.state_LS[0, layout.FLAGS] = 0
    assert torch.equal(loop.state_LS, before)
    held = strength_in_force(loop.control_LP, loop.strength_L, torch.tensor([1]), 2)
    assert held.item() == 0.0
    assert strength_in_force(loop.control_LP, loop.strength_L, torch.tensor([2]), 2).item() == 2.0


def test_a_bound_that_was_lowered_counts_at_once():
    loop = Loop()
    loop.control_LP[0, layout.LARGEST] = 1.5
    assert strength_in_force(loop.control_LP, loop.strength_L, torch.tensor([4]), 2).item() == 1.5
    assert loop(misses=2) == 1.5


def test_a_call_of_padding_changes_nothing():
    loop = Loop()
    loop(misses=2)
    loop.control_LP[0, layout.LARGEST] = 1.5
    before = loop.state_LS.clone(), loop.strength_L.clone()
    loop(tokens=0)
    assert torch.equal(loop.state_LS, before[0]) and torch.equal(loop.strength_L, before[1])


def test_off_touches_nothing():
    loop = Loop(MODE=layout.MODE_OFF)
    assert loop(misses=2) == 2.0 and loop.state_LS.abs().sum() == 0
    held = strength_in_force(loop.control_LP, torch.tensor([99.0]), torch.tensor([0]), 2)
    assert held.item() == 99.0


def test_averages_are_a_mean_first_and_forget_later():
    loop = Loop(AVERAGE_RATE=0.25, top_k=1)
    means = [(loop(misses=m), loop.at(layout.MEAN_HITS))[1] for m in (0, 1, 1, 1, 1, 1)]
    assert means == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4, 3 / 16, 9 / 64], abs=1e-7)


@pytest.mark.parametrize("unavoidable, target, flag", [(0, 1.0, 0), (1, 0.5, 0), (1, 0.51, 4)])
def test_infeasible_is_what_protected_misses_leave(unavoidable, target, flag):
    loop = Loop(TARGET=target)
    loop(misses=1, unavoidable=unavoidable)
    assert int(loop.at(layout.FLAGS)) & layout.FLAG_INFEASIBLE == flag


@pytest.mark.parametrize("column", range(layout.NUM_CONTROLS))
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), -1.0])
def test_broken_parameters_give_a_strength_within_the_bounds(column, value):
    loop = Loop(LEAD=1.0, RECENT_RATE=0.1)
    loop.control_LP[0, column] = value
    for misses in (2, 0, 2, 2, 1):
        strength = loop(misses=misses)
        held = strength_in_force(loop.control_LP, loop.strength_L, torch.tensor([4]), 2).item()
        if column != layout.MODE:
            assert not math.isnan(strength) and strength >= 0
            assert math.isnan(held) or held <= 8.0 or column == layout.LARGEST


def test_a_broken_state_gives_a_strength_within_the_bounds():
    loop = Loop(LEAD=1.0, RECENT_RATE=0.1)
    loop(misses=1)
    loop.state_LS[0, 1:7] = float("nan")
    assert loop(misses=2) == 0.0


def test_the_count_of_tokens_stands_still_where_float32_would_round():
    loop = Loop()
    loop.state_LS[0, layout.SEEN] = 2.0**24
    loop(tokens=64)
    assert loop.at(layout.SEEN) == 2.0**24


def test_the_original_adaptive_bonus():
    """Target 0.70, steps of learning rate x 0.01, dead band 0.05, within [0, 1]."""
    loop = Loop()
    loop.control_LP[0] = torch.tensor(AdaptiveBonus(average_tokens=1).controls(2))
    loop.control_LP[0, layout.AVERAGE_RATE] = 1.0
    loop.strength_L[:] = 0.15
    assert loop(misses=1) == pytest.approx(0.16)  # 0.5 < 0.7
    assert loop(misses=0) == pytest.approx(0.15)  # 1 > 0.75
    assert loop(tokens=10, misses=6) == pytest.approx(0.15)  # exactly 0.7 rests
    assert loop(tokens=100, misses=52) == pytest.approx(0.15)  # 0.74: inside the band
    assert loop(tokens=2, misses=4) == pytest.approx(0.17)  # one step per token
    assert loop(tokens=200, misses=400) == 1.0
    assert loop(misses=2) == 1.0
    assert loop(misses=0) == pytest.approx(0.99)
    assert loop(tokens=200) == 0.0


# --- in a loop with a cache -------------------------------------------------------------------

# E, K, slots, target, streams to average over
HIT_RATES = [(8, 2, 4, 0.86, 1500), (64, 8, 32, 0.91, 300)]
MOVED_MASSES = [(8, 2, 4, 0.005, 1500), (64, 8, 32, 0.01, 300)]
SWITCH = 400


def run(E, K, slots, policy, layers, flatten=1.0, tokens=SWITCH + 80):
    """Streams of correlated tokens through LRU caches; another text, or a flatter one, at SWITCH.

    Returns hit rate, moved mass and strength, (tokens, layers).
    """
    noise = torch.Generator().manual_seed(7)

    def normal():
        return torch.randn(layers, E, generator=noise)

    loop = Loop(K, layers)
    loop.control_LP[:] = torch.tensor(policy.controls(K))
    loop.strength_L[:] = 0.0
    likes_LE, logits_LE, last_LE, scale, seen = 0.7 * normal(), normal(), normal(), 1.0, []
    for t in range(tokens):
        if t == SWITCH:
            likes_LE, scale = 0.7 * normal(), flatten
        logits_LE = 0.5 * logits_LE + 0.75**0.5 * normal()
        resident_LE = last_LE >= last_LE.topk(slots, 1).values[:, -1:]
        counts = torch.full((layers,), slots)
        strength_L = strength_in_force(loop.control_LP, loop.strength_L, counts, K)
        picked = select_ref(
            scale * (likes_LE + logits_LE), resident_LE, K, policy.rule, strength_L[:, None],
            policy.protect,
        )  # fmt: skip
        executed_LE = torch.zeros(layers, E, dtype=torch.bool).scatter_(1, picked.ids_TK, True)
        hits_L = (executed_LE & resident_LE).sum(1)
        blocked_LK = ~resident_LE.gather(1, picked.demand_TK[:, : policy.protect])
        moved_L = (picked.moved_T * layout.MOVED_MASS_ONE + 0.5).long()
        call = Call(torch.ones_like(counts), counts, K - hits_L, moved_L, blocked_LK.sum(1))
        loop.state_LS, loop.strength_L = adapt_ref(
            loop.control_LP, loop.state_LS, loop.strength_L, call, K
        )
        last_LE = torch.where(executed_LE, torch.tensor(10.0 + t), last_LE)
        seen.append((hits_L / K, picked.moved_T, strength_L))
    return [torch.stack(x) for x in zip(*seen, strict=True)]


def turnovers_until_held(value_TL, target, within, turnover):
    """Return after how many turnovers the mean over streams stays within the band."""
    means = value_TL[SWITCH : SWITCH + 12 * turnover].reshape(12, -1).mean(1)
    outside = ((means - target).abs() > within).nonzero()
    return int(outside[-1]) + 1 if len(outside) else 0


@pytest.mark.parametrize("flatten", [1.0, 0.5], ids=["another text", "a flatter one"])
@pytest.mark.parametrize("E, K, slots, target, layers", HIT_RATES, ids=str)
def test_hit_rate_is_held_over_a_switch(E, K, slots, target, layers, flatten):
    """One token is K pairs: whether a few tokens hold a rate shows in the mean over streams only."""
    hits, _, strength = run(E, K, slots, HitRateTarget(target), layers, flatten)
    assert hits[SWITCH - 100 : SWITCH].mean() == pytest.approx(target, abs=0.01)
    assert turnovers_until_held(hits, target, 0.0125, slots // K) <= 3
    assert 0 < strength.max() <= 0.5


@pytest.mark.parametrize("flatten", [1.0, 0.5], ids=["another text", "a flatter one"])
@pytest.mark.parametrize("E, K, slots, target, layers", MOVED_MASSES, ids=str)
def test_moved_mass_is_held_over_a_switch(E, K, slots, target, layers, flatten):
    _, moved, strength = run(E, K, slots, QualityTarget(target), layers, flatten)
    assert moved[SWITCH - 100 : SWITCH].mean() == pytest.approx(target, rel=0.06)
    assert turnovers_until_held(moved, target, 0.005, slots // K) <= 2
    assert moved[SWITCH + 60 :].mean() == pytest.approx(target, rel=0.15)
    assert 0 < strength.max() <= 0.5


def test_speed_is_a_factor_on_every_gain():
    for kind in (HitRateTarget, QualityTarget):
        once, twice = (torch.tensor(kind(speed=speed).controls(4)) for speed in (1.0, 2.0))
        gains = [layout.GAIN, layout.CALL_GAIN, layout.LEAD]
        assert torch.equal(twice[gains], 2 * once[gains])
        twice[gains] = once[gains]
        assert torch.equal(twice, once)


def test_no_token_moves_more_than_the_clamp():
    policy = HitRateTarget(1.0, max_budget=0.04, price="mass", protect=0)
    hits, moved, strength = run(8, 2, 4, policy, 100)
    assert strength.max() == torch.tensor(0.04) and 0.03 < moved.max() <= 0.04 + 1e-6


# --- the interface ----------------------------------------------------------------------------


def decode(gate, calls, T=1, seed=0):
    draw = torch.Generator().manual_seed(seed)
    for _ in range(calls):
        gate.route(torch.randn(T, gate.num_experts, generator=draw))


def gate_of(policy, **options):
    gate = MoEGate(None, 8, 2, policy, **options)
    gate.set_resident([0, 1, 2, 3])
    return gate


def test_a_gate_reports_its_controller():
    gate = gate_of(HitRateTarget(0.7, warm_tokens=8))
    assert gate.control() == Control(
        layer=0, mode="hit_rate", target=pytest.approx(0.7), is_cold=True
    )
    decode(gate, 7)
    assert gate.control().is_cold and gate.metrics().swaps == 0 and gate.control().tokens == 7
    decode(gate, 400, seed=1)
    report = gate.control()
    assert (report.tokens, report.is_cold, report.is_feasible) == (407, False, True)
    assert report.hit_rate == pytest.approx(0.7, abs=0.1) and 0 < report.strength <= 0.5
    assert report.hit_rate <= report.feasible_hit_rate < 1 and report.moved_mass_per_token > 0
    assert report.strength == gate.state.strength_L[0].item()
    # one expert of every token is protected and half of those are missing
    gate.policy = HitRateTarget(0.95, warm_tokens=0)
    assert gate.control().tokens == 0
    decode(gate, 300)
    report = gate.control()
    assert not report.is_feasible and report.is_clamped and report.strength == 0.5
    assert report.feasible_hit_rate == pytest.approx(0.75, abs=0.1)


def test_too_few_residents_are_reported_as_cold():
    gate = gate_of(HitRateTarget(0.9, warm_tokens=0))
    decode(gate, 9)
    gate.set_resident([5])
    swaps = gate.metrics().swaps
    decode(gate, 9)
    report = gate.control()
    assert (report.is_cold, report.strength, report.tokens) == (True, 0.0, 9)
    assert gate.metrics().swaps == swaps > 0


def test_quality_is_never_infeasible():
    gate = gate_of(QualityTarget(0.9, warm_tokens=0))
    decode(gate, 100)
    report = gate.control()
    assert (report.mode, report.is_feasible, report.is_clamped) == ("quality", True, True)


def test_prefill_does_not_steer():
    gate = gate_of(HitRateTarget(1.0, warm_tokens=0), max_policy_tokens=4)
    before = gate.control()
    assert before.strength == 0.125
    decode(gate, 5, T=5)
    assert gate.control() == before and gate.metrics().swaps == 0
    decode(gate, 1, T=4)
    assert gate.control().tokens == 4


def test_other_policies_switch_it_off():
    gate = gate_of(AdaptiveBonus())
    assert gate.control().mode == "bonus" and gate.control().strength == pytest.approx(0.15)
    decode(gate, 50)
    gate.policy = MassBudget(0.25)
    assert gate.control() == Control(layer=0, strength=0.25)
    decode(gate, 50)
    assert gate.control() == Control(layer=0, strength=0.25)
    assert gate.state.control_state_LS.abs().sum() == 0
    gate.policy = Exact()
    assert gate.control() == Control(layer=0)


def test_layers_are_steered_apart():
    state = moe_gpu.RouterState(2, 8)
    gates = [
        MoEGate(None, 8, 2, HitRateTarget(t, warm_tokens=0), state=state, layer=i)
        for i, t in enumerate((0.1, 0.99))
    ]
    for gate in gates:
        gate.set_resident([0, 1, 2, 3])
        decode(gate, 60)
    low, high = (gate.control() for gate in gates)
    assert (low.layer, high.layer) == (0, 1)
    assert low.strength == 0 and high.strength > 0.4


def test_reset_begins_again_and_metrics_do_not():
    gate = gate_of(HitRateTarget(0.9, warm_tokens=8))
    decode(gate, 100)
    gate.reset_metrics()
    assert gate.control().tokens == 100
    gate.state.reset()
    assert gate.control().is_cold and gate.state.strength_L[0] == 0
    gate.policy = MassBudget(0.25)
    gate.state.reset()
    assert gate.state.strength_L[0] == 0.25


def test_parameters_count_from_the_next_call():
    gate = gate_of(HitRateTarget(1.0, warm_tokens=0))
    decode(gate, 50)
    gate.state.control_LP[0, layout.LARGEST] = 0.01
    gate.state.control_LP[0, layout.SMALLEST] = 0.001
    before = gate.metrics().moved_mass
    decode(gate, 20)
    assert gate.metrics().moved_mass - before <= 20 * 0.011
    assert gate.control().strength <= 0.01 + 1e-8


def test_the_state_moves_and_stays_out_of_checkpoints():
    gate = gate_of(HitRateTarget()).to(torch.float16)
    assert gate.state.control_LP.dtype == torch.float32 and gate.state_dict() == {}
    assert gate.to("meta").state.control_state_LS.device.type == "meta"


BAD = [
    (lambda: HitRateTarget(1.5), ValueError, r"target must lie in \[0, 1\], got 1.5"),
    (lambda: HitRateTarget("x"), TypeError, "target must be a number"),
    (lambda: HitRateTarget(float("nan")), ValueError, "target must lie in"),
    (lambda: HitRateTarget(max_budget=-1), ValueError, "max_budget must be finite and >= 0"),
    (lambda: HitRateTarget(price="x"), ValueError, "price must be 'output' or 'mass', got 'x'"),
    (lambda: HitRateTarget(protect=-1), ValueError, "protect must be >= 0, got -1"),
    (lambda: HitRateTarget(dead_band=2), ValueError, r"dead_band must lie in \[0, 1\], got 2"),
    (lambda: HitRateTarget(warm_tokens=1.5), TypeError, "warm_tokens must be an int, got 1.5"),
    (lambda: HitRateTarget(average_tokens=0), ValueError, "average_tokens must be >= 1, got 0"),
    (lambda: QualityTarget(0), ValueError, r"moved_mass must lie in \(0, 1\], got 0"),
    (lambda: QualityTarget(moved_mass=True), TypeError, "moved_mass must be a number, got True"),
    (lambda: QualityTarget(speed=0), ValueError, "speed must be > 0, got 0"),
    (lambda: AdaptiveBonus(learning_rate=-1), ValueError, "learning_rate must be finite and >= 0"),
    (lambda: AdaptiveBonus(bonus=2), ValueError, "bonus must be <= max_bonus=1.0, got 2"),
]


@pytest.mark.parametrize("make, error, message", BAD, ids=[b[2] for b in BAD])
def test_refusals(make, error, message):
    with pytest.raises(error, match=message):
        make()
