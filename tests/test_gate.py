"""MoEGate: the properties routing must keep, whatever the kernels do."""

import copy

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import moe_gpu
from moe_gpu import CacheBonus, Direction, Exact, MassBudget, MoEGate, Priority
from moe_gpu.kernels import launch as launch_module
from moe_gpu.kernels import route as route_module
from routing import make_state


@pytest.fixture
def reference_path(monkeypatch):
    """CPU tensors take the PyTorch path, as they do for a user: quick, and tested on the way."""
    monkeypatch.setattr(route_module, "_INTERPRET", False)


def make_gate(device, **options):
    return MoEGate(**{"hidden_size": 16, "num_experts": 8, "top_k": 2, "device": device, **options})


@pytest.mark.parametrize("policy", [Exact(), CacheBonus(0.0), MassBudget(0.0)], ids=str)
def test_without_strength_it_is_the_mixtral_router(policy, device):
    gate, x_TD = make_gate(device, policy=policy), torch.randn(33, 16, device=device)
    gate.set_resident([1, 2])
    logits_TE = F.linear(x_TD, gate.weight)
    want_TK, want_ids_TK = logits_TE.float().softmax(-1).topk(2, -1)
    with torch.no_grad():
        logits, weights, ids = gate(x_TD)
    assert torch.equal(logits, logits_TE) and torch.equal(ids, want_ids_TK)
    torch.testing.assert_close(weights, want_TK / want_TK.sum(-1, keepdim=True))
    assert gate.metrics().swaps == 0


def test_without_renormalisation_it_is_the_qwen3_router(device):
    gate = make_gate(device, renormalize=False, top_k=3)
    logits_TE = torch.randn(9, 8, device=device)
    want_TK, want_ids_TK = logits_TE.softmax(-1).topk(3, -1)
    _, weights, ids = gate.route(logits_TE)
    assert torch.equal(ids, want_ids_TK)
    torch.testing.assert_close(weights, want_TK)


def test_a_large_bonus_routes_only_to_residents(device):
    gate = make_gate(device, policy=CacheBonus(1e4))
    gate.set_resident([1, 6])
    ids = gate(torch.randn(20, 16, device=device)).ids
    assert set(ids.flatten().tolist()) == {1, 6}
    metrics = gate.metrics()
    assert metrics.hit_rate == 1.0 and metrics.pairs == 40 and metrics.tokens == 20
    assert metrics.swaps > 0 and metrics.moved_mass > 0


def test_large_calls_route_exactly(device):
    gate = make_gate(device, policy=CacheBonus(1e4), max_policy_tokens=4)
    gate.set_resident([1, 6])
    x_TD = torch.randn(5, 16, device=device)
    gate(x_TD)
    assert gate.metrics().swaps == 0
    gate(x_TD[:4])
    assert gate.metrics().swaps > 0


def test_requests_say_who_waits_for_whom(device):
    gate = make_gate(device, hidden_size=None, policy=MassBudget(0.5))
    gate.set_resident([0, 3])
    rows = [  # expert 5 is executed twice; 6 is wanted at half the weight of 3 and swapped away
        [0, -9, -9, -9, -9, 5, -9, -9],
        [-9, -9, -9, 0, -9, 5, -9, -9],
        [4, -9, -9, 0, -9, -9, 0.1, -9],
    ]
    gate.route(torch.tensor(rows, dtype=torch.float32, device=device))
    urgent, background = gate.requests()
    assert (urgent.expert, urgent.priority, urgent.tokens) == (5, Priority.URGENT, 2)
    assert (background.expert, background.priority, background.tokens) == (
        6,
        Priority.BACKGROUND,
        1,
    )
    assert urgent.direction is background.direction is Direction.IN and urgent.layer == 0
    assert gate.activations.tolist() == [2, 0, 0, 2, 0, 2, 0, 0]
    metrics = gate.metrics()
    assert (metrics.hits, metrics.misses, metrics.unique_misses, metrics.swaps) == (4, 2, 1, 1)


def test_affinity_follows_the_demand_or_the_executed(device):
    logits_TE = torch.tensor([[2.0, 1.0, 0.9, 0.0]], device=device)
    for source, want in (
        ("demand", [1, 1, 0, 0]),
        ("executed", [1, 0, 1, 0]),
        ("served", [1, 0, 0, 0]),
    ):
        gate = MoEGate(None, 4, 2, CacheBonus(0.5), affinity_from=source, device=device)
        gate.set_resident([2])
        gate.route(logits_TE)
        assert gate.affinity.tolist() == want


def test_padding_touches_nothing(device):
    gate, logits_TE = make_gate(device, hidden_size=None), torch.randn(6, 8, device=device)
    valid = torch.tensor(4, dtype=torch.int32, device=device)
    _, weights, ids = gate.route(logits_TE, num_valid=valid)
    assert weights[4:].abs().sum() == 0 and gate.activations.sum() == 8
    assert all(len(set(row)) == 2 for row in ids.tolist())
    assert gate.metrics().tokens == 4 and gate.metrics().padded == 2


def test_hit_rate_of_a_thousand_local_tokens(reference_path):
    """Logits drift as a text does (AR(1), unit variance); four of eight experts, LRU, bonus 0.15.

    The tiny model repeats an expert from one token to the next about as often as rho = 0.9 does.
    """
    gate = make_gate("cpu", hidden_size=None, policy=CacheBonus())
    noise = torch.Generator().manual_seed(0)
    logits_E = torch.randn(8, generator=noise)
    cache = [0, 1, 2, 3]
    for _ in range(1000):
        logits_E = 0.9 * logits_E + (1 - 0.9**2) ** 0.5 * torch.randn(8, generator=noise)
        gate.set_resident(cache)
        ids = gate.route(logits_E[None]).ids[0].tolist()
        for expert in reversed(ids):  # best expert most recent
            cache = [e for e in cache if e != expert] + [expert]
        cache = cache[-4:]
    assert gate.metrics().pairs == 2000
    assert gate.metrics().hit_rate >= 0.70


@pytest.mark.parametrize("renormalize", [True, False])
def test_gradcheck(renormalize, device):
    """The whole gate, with respect to the router weight and the input, swaps included."""
    gate = MoEGate(
        3, 4, 2, MassBudget(0.5), renormalize=renormalize, device=device, dtype=torch.float64
    )
    gate.set_resident([1, 2])
    x_TD = torch.randn(2, 3, device=device, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 3, device=device, dtype=torch.float64, requires_grad=True)

    def weights_of(x, w):
        return torch.func.functional_call(gate, {"weight": w}, (x,)).weights

    assert torch.autograd.gradcheck(weights_of, (x_TD, weight))
    assert gate.metrics().swaps > 0


def test_gradient_reaches_weight_and_input(device):
    gate, x_TD = make_gate(device), torch.randn(5, 16, device=device, requires_grad=True)
    weights = gate(x_TD).weights
    weights[:, 0].sum().backward()
    got = gate.weight.grad.clone(), x_TD.grad.clone()
    gate.weight.grad = x_TD.grad = None
    top_TK = F.linear(x_TD, gate.weight).topk(2, -1).values.softmax(-1)
    top_TK[:, 0].sum().backward()
    torch.testing.assert_close(got, (gate.weight.grad, x_TD.grad))


def test_training_learns(reference_path):
    gate = make_gate("cpu", dtype=torch.float32)
    x_TD, target_T = torch.randn(32, 16), torch.full((32,), 3)
    optimizer = torch.optim.Adam(gate.parameters(), lr=0.05)
    losses = []
    for _ in range(50):
        logits, weights, _ = gate(x_TD)
        loss = F.cross_entropy(logits, target_T) - weights[:, 0].mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 1
    assert (gate(x_TD).ids[:, 0] == 3).float().mean() > 0.8


def test_padding_rows_get_no_gradient(device):
    gate = make_gate(device, hidden_size=None)
    logits_TE = torch.randn(4, 8, device=device, requires_grad=True)
    valid = torch.tensor(2, dtype=torch.int32, device=device)
    weights = gate.route(logits_TE, num_valid=valid).weights
    assert weights[2:].abs().sum() == 0
    weights[:, 0].sum().backward()
    assert logits_TE.grad[2:].abs().sum() == 0 and logits_TE.grad[:2].abs().sum() > 0


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_num_valid_of_any_one_element_shape(shape, device):
    logits_TE = torch.randn(4, 8, device=device, requires_grad=True)
    valid = torch.full(shape, 2, dtype=torch.int32, device=device)
    weights = make_gate(device, hidden_size=None).route(logits_TE, num_valid=valid).weights
    assert weights.shape == (4, 2)
    torch.testing.assert_close(weights.sum(1), torch.tensor([1.0, 1, 0, 0], device=device))


def test_a_saved_gate_reads_its_own_record(device, tmp_path):
    gate = make_gate(device, timers=True)
    gate(torch.randn(3, 16, device=device))
    assert sum(request.tokens for request in gate.requests()) == 6
    torch.save(gate, tmp_path / "gate.pt")
    twin = torch.load(tmp_path / "gate.pt", weights_only=False)
    twin(torch.randn(5, 16, device=device))
    assert sum(request.tokens for request in twin.requests()) == 10


def test_superseded_records_are_counted_and_reset(device):
    gate = make_gate(device)
    for _ in range(4):
        gate(torch.randn(1, 16, device=device))
    gate.requests()
    assert gate.metrics().superseded == 3
    gate.reset_metrics()
    assert gate.metrics().superseded == 0


class Calls(TorchDispatchMode):
    """Every PyTorch operation that runs: an allocation or a synchronisation must be among them."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_steady_state_allocates_nothing_and_never_waits(device, monkeypatch):
    """With ``out=`` a call is the launch: no PyTorch op runs."""
    launches = []

    class Recorder:
        def __getitem__(self, grid):
            return lambda *args, **options: launches.append(grid)

    gate = make_gate(device, hidden_size=None, policy=MassBudget(0.1))
    logits_TE = torch.randn(4, 8, device=device)
    out = (torch.empty(4, 2, device=device), torch.empty(4, 2, dtype=torch.int64, device=device))
    gate.route(logits_TE, out=out)
    # the interpreter itself copies tensors about, so the launch is recorded, not run
    monkeypatch.setattr(launch_module, "route_kernel", Recorder())
    monkeypatch.setattr(launch_module, "_compiled", {})
    with Calls() as calls:
        for _ in range(3):
            gate.route(logits_TE, out=out)
    assert len(launches) == 3
    assert not calls.names


@pytest.mark.gpu
def test_steady_state_on_the_device():
    gate = make_gate("cuda", hidden_size=None, policy=MassBudget(0.1))
    logits_TE = torch.randn(4, 8, device="cuda")
    out = (torch.empty(4, 2, device="cuda"), torch.empty(4, 2, dtype=torch.int64, device="cuda"))
    gate.route(logits_TE, out=out)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            gate.route(logits_TE, out=out)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def test_timers(device):
    gate = make_gate(device, timers=True)
    for _ in range(5):
        gate(torch.randn(2, 16, device=device))
    if device == "cuda":
        torch.cuda.synchronize()
    metrics = gate.metrics()
    assert len(gate.latencies_us()) == 5
    assert 0 < metrics.route_us_p50 <= metrics.route_us_p99
    gate.reset_metrics()
    assert gate.metrics().route_us_mean is None and gate.metrics().tokens == 0
    assert make_gate(device).metrics().route_us_mean is None


def test_the_path_that_ran_is_visible(device):
    gate = make_gate(device)
    assert gate.metrics().route_path is None
    gate(torch.randn(2, 16, device=device))
    assert gate.metrics().route_path == "triton"


def test_the_reference_path_is_visible_too(reference_path):
    gate = make_gate("cpu")
    gate(torch.randn(2, 16))
    assert gate.metrics().route_path == "reference" and gate.metrics().pairs == 4


def test_nothing_of_the_state_is_saved_and_no_dtype_changes(device):
    gate = make_gate(device).half()
    assert list(gate.state_dict()) == ["weight"] and gate.weight.dtype == torch.float16
    assert gate.affinity.dtype == torch.float32 and gate.activations.dtype == torch.int64
    assert "policy=Exact()" in repr(gate)


def test_a_copy_has_a_state_of_its_own(device):
    gate = make_gate(device)
    gate(torch.randn(3, 16, device=device))
    gate.requests()
    twin = copy.deepcopy(gate)
    twin(torch.randn(4, 16, device=device))
    assert gate.metrics().tokens == 3 and twin.metrics().tokens == 7
    assert sum(request.tokens for request in twin.requests()) == 8
    assert sum(request.tokens for request in gate.requests()) == 6


def test_no_graph_break(device):
    gate, x_TD = make_gate(device, policy=MassBudget(0.1)), torch.randn(5, 16, device=device)
    twin = copy.deepcopy(gate)
    with torch.no_grad():
        compiled = torch.compile(gate, backend="aot_eager", fullgraph=True)
        got, want = compiled(x_TD), twin(x_TD)
    assert torch.equal(got.ids, want.ids) and torch.equal(got.weights, want.weights)
    assert torch.equal(gate.state.counters_LC, twin.state.counters_LC)


def test_layers_share_a_state_and_keep_apart(device):
    state = make_state(8, layers=2, device=device)
    first, second = (make_gate(device, state=state, layer=layer) for layer in (0, 1))
    first(torch.randn(3, 16, device=device))
    assert first.metrics().tokens == 3 and second.metrics().tokens == 0


BAD = [
    ({"num_experts": 0}, ValueError, r"num_experts must be in \[1, 1024\], got 0"),
    ({"num_experts": 1025}, ValueError, r"num_experts must be in \[1, 1024\], got 1025"),
    ({"top_k": 0}, ValueError, r"top_k must be in \[1, 8\], got 0"),
    ({"top_k": 9}, ValueError, r"top_k must be in \[1, 8\], got 9"),
    ({"top_k": 2.0}, TypeError, "top_k must be an int, got 2.0"),
    ({"num_experts": 32, "top_k": 17}, ValueError, r"top_k must be in \[1, 16\], got 17"),
    ({"decay": 1.5}, ValueError, r"decay must be finite and in \[0, 1\], got 1.5"),
    ({"boost": -1}, ValueError, "boost must be finite and >= 0, within float32, got -1"),
    ({"boost": 1e39}, ValueError, "boost must be finite and >= 0, within float32, got 1e"),
    ({"max_score": 0}, ValueError, "max_score must be > 0, got 0"),
    ({"affinity_from": "both"}, ValueError, "affinity_from must be .* got 'both'"),
    ({"layer": -1}, ValueError, "-1"),
    ({"policy": 0.15}, TypeError, "policy must be .* got 0.15"),
]


@pytest.mark.parametrize("options, error, message", BAD, ids=[b[2] for b in BAD])
def test_refuses_bad_options(options, error, message, device):
    with pytest.raises(error, match=message):
        make_gate(device, **options)


@pytest.mark.parametrize("value", [-0.1, float("inf"), float("nan"), 1e300])
def test_policies_refuse_bad_strengths(value):
    for make in (CacheBonus, MassBudget, moe_gpu.QualityBudget):
        with pytest.raises(
            ValueError, match=r"(bonus|budget) must be finite and >= 0, within float32, got"
        ):
            make(value)


def test_policies_refuse_bad_fields():
    with pytest.raises(ValueError, match="scale must be .* got 'percent'"):
        CacheBonus(scale="percent")
    with pytest.raises(ValueError, match="protect must be >= 0, got -1"):
        MassBudget(0.1, protect=-1)
    with pytest.raises(TypeError, match="bonus must be a number, got '1'"):
        CacheBonus("1")
    with pytest.raises(TypeError, match="layer_scale must be a tuple of numbers, got 0.5"):
        moe_gpu.QualityBudget(0.1, 0.5)
    with pytest.raises(ValueError, match="layer_scale must be finite and >= 0, .* got -1"):
        moe_gpu.QualityBudget(0.1, (1, -1))


def test_layers_scale_the_budget(device):
    state = make_state(8, layers=3, device=device)
    policy = moe_gpu.QualityBudget(0.1, [1, 0.5, 2])
    for layer in range(3):
        make_gate(device, state=state, layer=layer, policy=policy)
    assert state.strength_L.tolist() == pytest.approx([0.1, 0.05, 0.2])
    with pytest.raises(ValueError, match="layer_scale must have 3 factors, .* got 2"):
        make_gate(device, state=state, layer=1, policy=moe_gpu.QualityBudget(0.1, (1, 1)))
    assert state.strength_L.tolist() == pytest.approx([0.1, 0.05, 0.2])


@pytest.mark.parametrize(
    "ids, error, message",
    [
        ([8], ValueError, r"expert id must be in \[0, 7\], got 8"),
        ([-1], ValueError, r"expert id must be in \[0, 7\], got -1"),
        ([1, 1], ValueError, r"distinct, got \[1, 1\]"),
        ([0.5], TypeError, "expert id must be an int, got 0.5"),
    ],
)
def test_set_resident_refuses_and_changes_nothing(ids, error, message, device):
    gate = make_gate(device)
    gate.set_resident([2])
    before = gate.state.slot_of_LE.clone()
    with pytest.raises(error, match=message):
        gate.set_resident(ids)
    assert torch.equal(gate.state.slot_of_LE, before)


def test_wrong_width_and_missing_projection(device):
    with pytest.raises(
        ValueError, match=r"hidden_states must have 16 columns, got shape \(2, 15\)"
    ):
        make_gate(device)(torch.randn(2, 15, device=device))
    with pytest.raises(ValueError, match=r"must have 16 columns, got shape \(\)"):
        make_gate(device)(torch.tensor(1.0, device=device))
    with pytest.raises(TypeError, match="hidden_states must be a tensor, got list"):
        make_gate(device)([[1.0] * 16])
    with pytest.raises(TypeError, match="hidden_states must be floating point, got torch.int64"):
        make_gate(device)(torch.ones(2, 16, dtype=torch.int64, device=device))
    with pytest.raises(TypeError, match="num_valid must be an int32 tensor on the device, got 3"):
        make_gate(device, hidden_size=None).route(torch.ones(4, 8, device=device), num_valid=3)
    with pytest.raises(RuntimeError, match=r"without hidden_size: call route"):
        make_gate(device, hidden_size=None)(torch.randn(2, 16, device=device))
    with pytest.raises(ValueError, match="out cannot be given"):
        logits_TE = torch.randn(1, 8, device=device, requires_grad=True)
        out = (torch.empty(1, 2, device=device), torch.empty(1, 2, device=device).long())
        make_gate(device).route(logits_TE, out=out)


def test_sparsemixer_has_a_gradient_in_eval_and_none_in_training(device):
    gate = MoEGate(num_experts=8, score="sparsemixer", jitter_eps=0.5, device=device)
    logits = torch.randn(5, 8, device=device, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"draws its experts at random in training.*eval\(\)"):
        gate.route(logits)
    gate.eval().route(logits).weights.sum().backward()
    assert logits.grad.abs().sum() > 0


def test_float64_with_a_correction_bias(device):
    gate = MoEGate(16, 8, score="sigmoid", correction_bias=True, device=device).double()
    assert gate.e_score_correction_bias.dtype == torch.float64
    weights = gate(torch.randn(3, 16, device=device, dtype=torch.float64)).weights
    assert weights.dtype == torch.float64


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"score": ["softmax"]}, "score must be one of 'softmax', 'sigmoid', 'sparsemixer', got"),
        ({"group_score": "mean"}, "group_score must be one of 'top2_sum', 'max', got 'mean'"),
        ({"scaling_factor": 1e-46}, "scaling_factor must be finite and >= 1.17"),
        ({"scaling_factor": float("nan")}, "scaling_factor must be finite"),
        ({"softcap": 1e-46}, "softcap must be finite and >= 1.17"),
        ({"softcap": -1.0}, "softcap must be finite"),
        ({"num_groups": 3}, "num_groups must divide num_experts=8"),
        ({"num_groups": 4, "top_groups": 5}, r"top_groups must lie in \[1, 4\]"),
        ({"score": "sparsemixer", "correction_bias": True}, "correction_bias=True has no meaning"),
    ],
)
def test_score_arguments_outside_their_bounds(arguments, message):
    with pytest.raises(ValueError, match=message):
        MoEGate(num_experts=8, **arguments)


@pytest.mark.parametrize("name", ["renormalize", "correction_bias", "num_groups", "softcap"])
def test_score_arguments_of_another_type(name):
    with pytest.raises(TypeError, match=f"{name} must be"):
        MoEGate(num_experts=8, **{name: "1"})
    with pytest.raises(TypeError, match="weights_dtype must be float32"):
        MoEGate(num_experts=8, weights_dtype=torch.float64)
