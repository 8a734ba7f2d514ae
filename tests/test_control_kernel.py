"""The kernel's controller against its definition, bit for bit, and the promises of the launch."""

import pytest
import torch

from moe_gpu import AdaptiveBonus, HitRateTarget, QualityTarget
from moe_gpu.kernels import launch as launch_module
from moe_gpu.kernels import layout
from moe_gpu.kernels.control_ref import Call, adapt_ref, strength_in_force
from moe_gpu.kernels.route import route
from moe_gpu.kernels.route_ref import AffinityFrom, Rule, route_ref, select_ref
from routing import make_state
from test_route_kernel import Launches

POLICIES = [
    HitRateTarget(0.8, warm_tokens=3, average_tokens=8),
    HitRateTarget(0.7, price="mass", protect=2, warm_tokens=0, dead_band=0.1),
    QualityTarget(0.9, max_budget=0.7, warm_tokens=2, average_tokens=4),  # never infeasible
    QualityTarget(0.05, price="mass", protect=0, warm_tokens=0),
    AdaptiveBonus(learning_rate=5.0, average_tokens=2),
]
ADAPTED = ("control_state_LS", "strength_L")


def adaptive_state(policy, E, K, device, layers=1):
    state = make_state(E, layers=layers, device=device)
    state.control_LP[:] = torch.tensor(policy.controls(K))
    state.restart_control()
    return state


def calls_of(E, K, count=14):
    """Calls of one tile and of several, padding, and residents that change; at times too few."""
    draw = torch.Generator().manual_seed(E)
    sizes, valid = ((1, 3, 40, 1, 34, 5), 33) if K == 2 else ((1, 3, 7, 1, 5, 2), 6)
    for call in range(count):
        residents = K - 1 if call == 7 else int(torch.randint(K, E, (), generator=draw))
        who = torch.randperm(E, generator=draw)[:residents]
        T = sizes[call % 6]
        yield torch.randn(T, E, generator=draw), {2: valid, 5: 0}.get(call % 6), who


def settle(state, who):
    state.slot_of_LE.fill_(-1)
    state.slot_of_LE[:, who] = torch.arange(
        len(who), dtype=torch.int32, device=state.scratch.device
    )


def route_and_judge(state, layer, policy, K, logits_TE, who, valid=None):
    """Route, and compare ids and controller with what follows from the kernel's own counters."""
    device = state.scratch.device
    settle(state, who)
    before = [getattr(state, name).cpu().clone() for name in ADAPTED]
    counters_C = state.counters_LC[layer].cpu().clone()
    num_valid = None if valid is None else torch.tensor(valid, dtype=torch.int32, device=device)
    _, ids_TK = route(
        logits_TE.to(device), state, layer, num_valid=num_valid, top_k=K, rule=policy.rule,
        protect=policy.protect, control=True,
    )  # fmt: skip

    valid = len(logits_TE) if valid is None else valid
    resident_E = torch.zeros(logits_TE.shape[1], dtype=torch.bool)
    resident_E[who] = True
    row, count = slice(layer, layer + 1), torch.tensor([len(who)])
    control_LP = state.control_LP.cpu()[row]
    held = strength_in_force(control_LP, before[1][row], count, K)
    want = select_ref(logits_TE, resident_E, K, policy.rule, held, policy.protect)
    assert torch.equal(ids_TK.cpu()[:valid], want.ids_TK[:valid])
    done_C = state.counters_LC[layer].cpu() - counters_C
    blocked = ~resident_E[want.demand_TK[:valid, : policy.protect]]
    call = Call(
        done_C[[layout.TOKENS]], count, done_C[[layout.MISSES]], done_C[[layout.MOVED_MASS]],
        blocked.sum().reshape(1),
    )  # fmt: skip
    before[0][row], before[1][row] = adapt_ref(control_LP, before[0][row], before[1][row], call, K)
    for name, wanted in zip(ADAPTED, before, strict=True):
        got = getattr(state, name).cpu()
        assert torch.equal(got.view(torch.int32), wanted.view(torch.int32)), (name, got, wanted)
    assert int(state.scratch.abs().sum()) == 0, "scratch must be zero between calls"
    assert state.strength_L[layer] <= state.control_LP[layer, layout.LARGEST]
    return state.strength_L[layer].item()


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: f"{type(p).__name__}-{p.rule.name}")
@pytest.mark.parametrize("E, K", [(8, 2), (13, 5)], ids=str)
def test_same_bits_as_the_definition(E, K, policy, device):
    state = adaptive_state(policy, E, K, device, layers=3)
    used = {
        route_and_judge(state, 1, policy, K, logits_TE, who, valid)
        for logits_TE, valid, who in calls_of(E, K)
    }
    assert len(used) > 4, "the controller was meant to move"


def test_same_bits_at_the_floor_and_under_bounds_that_change(device):
    policy = HitRateTarget(0.5, price="mass", protect=0, warm_tokens=0, average_tokens=2)
    state = adaptive_state(policy, 4, 2, device)
    hit, miss = torch.tensor([[3.0, 2.0, 1.8, 1.7]]), torch.tensor([[1.7, 1.8, 2.0, 2.1]])
    strengths = [route_and_judge(state, 0, policy, 2, hit, [0, 1]) for _ in range(40)]
    assert strengths[-5:] == [0.0] * 5
    strengths = [route_and_judge(state, 0, policy, 2, miss, [0, 1]) for _ in range(30)]
    assert strengths[0] > 0.0 and state.counters_LC[0, layout.SWAPS] > 0
    swaps = state.counters_LC[0, layout.SWAPS].item()
    state.control_LP[0, layout.LARGEST] = 1e-3  # less than a swap takes, from this call on
    state.control_LP[0, layout.SMALLEST] = 1e-4
    assert route_and_judge(state, 0, policy, 2, miss, [0, 1]) == pytest.approx(1e-3)
    assert state.counters_LC[0, layout.SWAPS] == swaps


def test_same_bits_as_the_reference_route(device):
    """By the hit rate nothing rounds: the whole state agrees over a run, none handed over."""
    policy, E, K = HitRateTarget(0.8, warm_tokens=3, average_tokens=8), 8, 2
    got, want = adaptive_state(policy, E, K, device), adaptive_state(policy, E, K, "cpu")
    rules = {"top_k": K, "rule": policy.rule, "protect": 1}
    rules |= {"affinity_from": AffinityFrom.DEMAND, "decay": 0.9, "boost": 1.0, "max_score": 1.0}
    for logits_TE, valid, who in calls_of(E, K, count=24):
        settle(got, who)
        settle(want, who)
        num_valid = None if valid is None else torch.tensor(valid, dtype=torch.int32, device=device)
        route(logits_TE.to(device), got, 0, num_valid=num_valid, control=True, **rules)
        T = len(logits_TE)
        out = torch.empty(T, K), torch.empty(T, K, dtype=torch.int64)
        route_ref(logits_TE, *out, valid, want, 0, control=True, **rules)
        exact = [c for c in range(layout.NUM_CONTROL_STATE) if c != layout.MEAN_MOVED]
        assert torch.equal(got.control_state_LS.cpu()[:, exact], want.control_state_LS[:, exact])
        assert torch.equal(got.strength_L.cpu(), want.strength_L)


def test_same_bits_on_every_grid(device, monkeypatch):
    policy, E, K = QualityTarget(0.02, warm_tokens=0), 8, 2
    logits_TE = torch.randn(40, E, device=device)

    def run(tile=None, programs=1024):
        monkeypatch.setattr(launch_module, "most_programs", lambda device: programs)
        if tile is not None:
            monkeypatch.setattr(launch_module, "tile_of", lambda T, E, K: tile)
        state = adaptive_state(policy, E, K, device)
        settle(state, [0, 1, 2, 3])
        rules = {"top_k": K, "rule": policy.rule, "protect": 1, "control": True, "meters": True}
        for _ in range(2):
            route(logits_TE, state, 0, **rules)
        monkeypatch.undo()
        return [getattr(state, name) for name in (*ADAPTED, "meters_LM", "counters_LC")]

    wanted = run()
    for tile, programs in [((1, 8, 1), 3), ((8, 8, 1), 1024), ((32, 8, 4), 1), ((32, 8, 2), 2)]:
        for got, want in zip(run(tile, programs), wanted, strict=True):
            assert torch.equal(got, want), (tile, programs)


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -1.0])
def test_a_broken_parameter_never_swaps_beyond_the_bound(broken, device):
    policy, E, K = HitRateTarget(1.0, max_budget=0.3, price="mass", warm_tokens=0), 8, 2
    draw = torch.Generator().manual_seed(3)
    for column in range(layout.NUM_CONTROLS):
        state = adaptive_state(policy, E, K, device)
        settle(state, [0, 1, 2])
        state.control_LP[0, column] = broken
        for _ in range(4):
            logits_TE = torch.randn(2, E, generator=draw).to(device)
            before = state.counters_LC[0, layout.MOVED_MASS].item()
            route(logits_TE, state, 0, top_k=K, rule=policy.rule, protect=0, control=True)
            moved = state.counters_LC[0, layout.MOVED_MASS].item() - before
            if column not in (layout.LARGEST, layout.MODE):
                assert moved / layout.MOVED_MASS_ONE <= 2 * 0.3 + 1e-6
        assert not state.strength_L.isnan().any() or column == layout.MODE


def test_without_control_nothing_adapts(device):
    policy = HitRateTarget(1.0, warm_tokens=0)
    state = adaptive_state(policy, 8, 2, device)
    settle(state, [0, 1])
    before = state.strength_L.clone()
    for rule, control in ((Rule.EXACT, True), (Rule.OUTPUT, False)):
        route(torch.randn(3, 8, device=device), state, 0, top_k=2, rule=rule, control=control)
    assert torch.equal(state.strength_L, before) and state.control_state_LS.abs().sum() == 0
    assert state.meters_LM.abs().sum() == 0


@pytest.mark.parametrize("T", [1, 70])
def test_one_launch_per_call(T, device, monkeypatch):
    launches = Launches(launch_module.route_kernel)
    monkeypatch.setattr(launch_module, "route_kernel", launches)
    monkeypatch.setattr(launch_module, "_compiled", {})
    state = adaptive_state(HitRateTarget(), 8, 2, device)
    route(
        torch.randn(T, 8, device=device), state, 0, top_k=2, rule=Rule.OUTPUT, protect=1,
        control=True, meters=True,
    )  # fmt: skip
    assert len(launches.grids) == 1


def test_registered_op(device):
    state = adaptive_state(HitRateTarget(warm_tokens=0), 8, 2, device)
    settle(state, [0, 1])
    args = (
        torch.randn(5, 8, device=device), torch.empty(5, 2, device=device),
        torch.empty(5, 2, dtype=torch.int64, device=device), None,
        state.slot_of_LE, state.strength_L, state.affinity_LE, state.activations_LE,
        state.counters_LC, state.record_LR, state.scratch,
        0, 2, int(Rule.MASS), 1, 64, True, 1, 0.99, 1.0, 1.0,
        state.control_LP, state.control_state_LS, state.meters_LM,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.moe_gpu.route_.default, args)


@pytest.mark.gpu
def test_a_graph_steers_and_takes_new_parameters():
    """A captured call adapts at every replay, and obeys what is written to the device between."""
    policy, K = HitRateTarget(1.0, warm_tokens=0), 2
    state = adaptive_state(policy, 8, K, "cuda")
    settle(state, [0, 1, 2, 3])
    logits_TE = torch.randn(4, 8, device="cuda")
    rules = {"top_k": K, "rule": policy.rule, "protect": 1, "control": True, "meters": True}
    out = torch.empty(4, K, device="cuda"), torch.empty(4, K, dtype=torch.int64, device="cuda")
    route(logits_TE, state, 0, out=out, **rules)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        route(logits_TE, state, 0, out=out, **rules)
    seen, strengths = state.control_state_LS[0, layout.SEEN].item(), []
    for _ in range(3):
        logits_TE.copy_(torch.randn(4, 8))
        graph.replay()
        strengths.append(state.strength_L[0].item())
    assert state.control_state_LS[0, layout.SEEN].item() == seen + 12
    assert strengths[-1] > strengths[0] or strengths[0] == 0.5
    state.control_LP[0, layout.LARGEST] = 0.01
    graph.replay()
    assert state.strength_L[0].item() <= 0.01 + 1e-8
    assert state.meters_LM[0, layout.METERED].item() == seen + 16
