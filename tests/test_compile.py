"""torch.compile and CUDA graphs: one graph, the stock logits, and a state as after eager calls."""

import copy

import pytest
import torch
import transformers
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import StaticCache

import moe_gpu
from mixtral import (  # noqa: F401 - the last is a fixture that runs by itself
    EXPERTS,
    LAYERS,
    TOP_K,
    logits_of,
    make_model,
    prompt,
    text_of,
    without_interpreter,
)
from moe_gpu import CacheBonus, Exact, MassBudget, MoEGate, QualityBudget
from moe_gpu.huggingface import experts as experts_module
from moe_gpu.kernels.route_ref import AffinityFrom, Rule
from routing import STATE, make_state

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # the guards of dynamo say so about a bound that only depends on decay
]


@pytest.fixture(autouse=True)
def compiled_by_nobody_else():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def counting(module, backend="aot_eager"):
    """Compile without graph breaks; also return what counts the graphs."""
    counter = CompileCounterWithBackend(backend)
    return torch.compile(module, backend=counter, fullgraph=True), counter


def assert_same_state(state, other):
    for name in (*STATE, "meters_LM", "control_state_LS"):
        assert torch.equal(getattr(state, name), getattr(other, name)), name


# -- the op


OPTIONAL = {
    "nothing": {},
    "num_valid": {"num_valid": torch.tensor(3, dtype=torch.int32)},
    "control": {"control": True},
    "meters": {"meters": True},
    "everything": {
        "num_valid": torch.tensor(3, dtype=torch.int32),
        "control": True,
        "meters": True,
        "bias": torch.randn(8),
        "score": 1,
        "scaling_factor": 2.5,
        "num_groups": 4,
        "top_groups": 2,
        "softcap": 30.0,
    },
    "sparsemixer": {"score": 2, "jitter_eps": 0.01},
}


@pytest.mark.parametrize("optional", OPTIONAL.values(), ids=OPTIONAL)
def test_every_registered_op(optional, device):
    """Schema, fake tensors, autograd registration and AOT dispatch, as PyTorch checks them."""
    registered = torch._C._dispatch_get_all_op_names()
    ours = [name for name in registered if name.startswith("moe_gpu::")]
    assert ours == ["moe_gpu::route_"], "a new op: check it here too"
    state = make_state(8, [0, 1], 0.1, device=device)
    optional = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in optional.items()
    }
    num_valid = optional.pop("num_valid", None)
    args = (
        torch.randn(5, 8, device=device), torch.empty(5, 2, device=device),
        torch.empty(5, 2, dtype=torch.int64, device=device), num_valid,
        state.slot_of_LE, state.strength_L, state.affinity_LE, state.activations_LE,
        state.counters_LC, state.record_LR, state.scratch,
        0, 2, int(Rule.MASS), 1, 64, True, int(AffinityFrom.DEMAND), 0.99, 1.0, 1.0,
    )  # fmt: skip
    if optional.pop("control", False):
        optional |= {"control": state.control_LP, "control_state": state.control_state_LS}
    if optional.pop("meters", False):
        optional["meters"] = state.meters_LM
    results = torch.library.opcheck(torch.ops.moe_gpu.route_.default, args, optional)
    assert set(results.values()) == {"SUCCESS"} and len(results) == 4


# -- the gate


@pytest.mark.parametrize(
    "options",
    [
        {"policy": Exact()},
        {"policy": CacheBonus(0.3), "affinity_from": "executed"},
        {"policy": MassBudget(0.2), "meters": True},
        {"policy": moe_gpu.HitRateTarget(0.9, warm_tokens=2), "meters": True},
    ],
    ids=["exact", "bonus", "budget", "adaptive"],
)
@pytest.mark.parametrize("method", ["forward", "route"])
def test_a_compiled_gate_leaves_what_an_eager_one_does(method, options, device):
    gate = MoEGate(16, 8, 2, device=device, **options)
    gate.set_resident([1, 2, 6])
    twin = copy.deepcopy(gate)
    run, counter = counting(gate if method == "forward" else gate.route)
    with torch.no_grad():
        for _ in range(4):
            x = torch.randn(5, 16 if method == "forward" else 8, device=device)
            got, want = run(x), getattr(twin, method)(x)
            for ours, theirs in zip(got, want, strict=True):
                assert torch.equal(ours, theirs)
            assert_same_state(gate.state, twin.state)
            assert gate.requests() == twin.requests()
    assert gate.metrics().tokens == 20 and gate.last_route_path == twin.last_route_path
    assert counter.frame_count == 1


def test_a_gradient_through_a_compiled_gate(device):
    gate = MoEGate(16, 8, 2, MassBudget(0.2), device=device)
    gate.set_resident([1, 2])
    twin, (run, _) = copy.deepcopy(gate), counting(gate)
    x_TD = torch.randn(5, 16, device=device)
    for module, call in ((gate, run), (twin, twin)):
        call(x_TD).weights[:, 0].sum().backward()
        assert module.metrics().swaps > 0
    torch.testing.assert_close(gate.weight.grad, twin.weight.grad)
    assert_same_state(gate.state, twin.state)


def test_one_graph_for_every_number_of_tokens(device):
    """On both sides of max_policy_tokens, and of the scratch that there is from the start."""
    gate = MoEGate(16, 8, 2, MassBudget(0.2), device=device)
    gate.set_resident([1, 2, 6])
    twin, (run, counter) = copy.deepcopy(gate), counting(gate)
    with torch.no_grad():
        for T in (2, 30, 64, 65, 500, 4096, 4097, 5000):
            x_TD = torch.randn(T, 16, device=device)
            torch._dynamo.mark_dynamic(x_TD, 0)
            assert torch.equal(run(x_TD).ids, twin(x_TD).ids)
            assert_same_state(gate.state, twin.state)
    assert counter.frame_count == 1
    assert gate.metrics().swaps > 0


# -- an attached model


def test_a_model_is_one_graph_with_the_stock_logits():
    model, twin = make_model(), make_model()
    stock = [logits_of(model, prompt(seed, batch=2)) for seed in range(3)]
    moe, other = (moe_gpu.attach(m, resident=1.0, policy=Exact()) for m in (model, twin))
    for each in (model, twin):
        logits_of(each, prompt(9))
    run, counter = counting(model)
    with torch.no_grad():
        for seed, want in enumerate(stock):
            got = run(prompt(seed, batch=2)).logits
            torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-5)
            logits_of(twin, prompt(seed, batch=2))
            assert_same_state(moe.state, other.state)
            mine, theirs = moe.metrics(), other.metrics()
            for name in ("tokens", "pairs", "hits", "misses", "swaps", "superseded", "loads"):
                assert getattr(mine, name) == getattr(theirs, name), name
            for layer, expected in zip(mine.layers, theirs.layers, strict=True):
                assert (layer.pairs, layer.hits) == (expected.pairs, expected.hits) != (0, 0)
    assert moe.metrics().tokens == 7 + 3 * 14 and moe.metrics().hit_rate == 1.0
    assert counter.frame_count == 1
    moe.detach()
    torch.testing.assert_close(logits_of(model, prompt(0, batch=2)), stock[0])


def test_lengths_share_a_graph():
    model = make_model(num_hidden_layers=1)
    moe_gpu.attach(model, resident=1.0, policy=QualityBudget(0.05))
    logits_of(model, prompt(0))
    run, counter = counting(model, "eager")
    with torch.no_grad():
        for seed, tokens in enumerate((5, 9, 30, 64, 65, 100)):
            ids = prompt(seed, tokens=tokens)
            torch._dynamo.mark_dynamic(ids, 1)
            torch.testing.assert_close(run(ids).logits, logits_of(model, ids), rtol=1e-5, atol=2e-5)
    assert counter.frame_count == 1


@pytest.mark.skipif(
    tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23),
    reason="the stock experts' backward pass on the CPU was not for a compiler before",
)
def test_a_compiled_training_step():
    model, twin = (make_model(num_hidden_layers=1).train() for _ in range(2))
    ids = prompt(0, batch=2)
    moe = moe_gpu.attach(model, resident=1.0)
    run, _ = counting(model)
    run(ids, labels=ids).loss.backward()
    twin(ids, labels=ids).loss.backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5, msg=name)
    assert moe.metrics().tokens == 14


def test_nothing_of_the_host_is_met_in_a_trace(monkeypatch):
    """No lock, no offloader, no look at an address."""
    model = make_model(num_hidden_layers=1)
    moe = moe_gpu.attach(model, resident=1.0)
    run, _ = counting(model, "eager")

    def met(*_, **__):
        raise AssertionError("met")

    for name in ("before_route", "request", "step", "wants_prediction", "predict"):
        monkeypatch.setattr(moe.offloader, name, met)
    monkeypatch.setattr(type(moe), "_lock", met)
    monkeypatch.setattr(experts_module, "_mix", met)
    with torch.no_grad():
        run(prompt(0))
        with pytest.raises(AssertionError, match="met"):
            model(prompt(0))


@pytest.mark.parametrize("slots, locks", [(3, 1), (EXPERTS, 0)])
def test_only_what_pages_makes_compiled_forwards_wait_for_each_other(slots, locks, monkeypatch):
    model = make_model()
    moe = moe_gpu.attach(model, slots=slots)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    moe._enter(model, ())
    assert len(moe._held.__dict__.get("locks", [])) == locks
    moe._leave(model, (), None)
    assert not moe._held.__dict__.get("locks")


@pytest.mark.parametrize(
    "options",
    [{"slots": 3}, {"slots": EXPERTS, "pool": True}, {"slots": EXPERTS, "verify": True}],
    ids=str,
)
@pytest.mark.parametrize("part", ["model", "layer", "experts"])
def test_what_needs_the_host_says_so_in_a_full_graph(part, options):
    model = make_model()
    moe = moe_gpu.attach(model, **options)
    assert not moe.all_resident
    block = model.model.layers[0].mlp
    module, inputs = {
        "model": (model, (prompt(0),)),
        "layer": (block, (torch.ones(1, 1, 32),)),
        "experts": (
            block.experts, (torch.ones(1, 32), torch.tensor([[0, 1]]), torch.ones(1, 2)),
        ),
    }[part]  # fmt: skip
    with torch.no_grad(), pytest.raises(Exception) as error:
        torch.compile(module, backend="eager", fullgraph=True)(*inputs)
    assert "only an attached model with every expert resident can be traced" in str(error.value)
    assert "attach(..., resident=1.0), without verify" in str(error.value)
    moe.detach()


# -- capture in a CUDA graph, as far as it shows without a device


def test_a_captured_call_meets_the_device_only(monkeypatch):
    model, ids = make_model(), prompt(0)
    stock = logits_of(model, ids)
    moe = moe_gpu.attach(model, resident=1.0, policy=Exact())
    for name in ("before_route", "request", "step"):
        monkeypatch.setattr(moe.offloader, name, None)
    monkeypatch.setattr(experts_module, "is_capturing", lambda device: True)
    torch.testing.assert_close(logits_of(model, ids), stock, rtol=1e-5, atol=2e-5)
    assert moe.metrics().tokens == 7


def test_capture_of_a_model_that_pages_is_refused(monkeypatch):
    model, ids = make_model(), prompt(0)
    moe = moe_gpu.attach(model, slots=3, policy=Exact())
    expected = logits_of(model, ids)
    router, experts = model.model.layers[0].mlp.gate, model.model.layers[0].mlp.experts
    with monkeypatch.context() as patch:
        patch.setattr(experts_module, "is_capturing", lambda device: True)
        for call in (
            lambda: logits_of(model, ids),
            lambda: router(torch.ones(1, 32)),
            lambda: experts(torch.ones(1, 32), torch.tensor([[0, 1]]), torch.ones(1, 2)),
        ):
            with pytest.raises(RuntimeError, match=r"every expert resident .* resident=1.0"):
                call()
    assert torch.equal(logits_of(model, ids), expected)
    moe.detach()


def test_capture_is_asked_about_for_cuda_tensors_only(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert experts_module.is_capturing(torch.device("cuda"))
    assert not experts_module.is_capturing(torch.device("cpu"))


@pytest.mark.gpu
def test_a_captured_gate_asks_for_what_each_replay_misses():
    gate = MoEGate(16, 8, 2, MassBudget(0.2), device="cuda")
    gate.set_resident([1, 2])
    twin, x_TD = copy.deepcopy(gate), torch.randn(3, 16, device="cuda")
    out = torch.empty(3, 2, device="cuda"), torch.empty(3, 2, dtype=torch.int64, device="cuda")
    with torch.no_grad():
        for module in (gate, twin):  # compiles
            module.route(x_TD @ module.weight.T, out=out)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            gate.route(x_TD @ gate.weight.T, out=out)
        for seed in range(4):
            torch.manual_seed(seed)
            x_TD.copy_(torch.randn(3, 16))
            graph.replay()
            want = twin.route(x_TD @ twin.weight.T)
            assert torch.equal(out[1], want.ids) and torch.equal(out[0], want.weights)
            assert gate.requests() == twin.requests() != []
            assert_same_state(gate.state, twin.state)


class Decoder:
    """Decodes from a static cache, token by token, out of one input tensor."""

    def __init__(self, model, ids, length):
        self.model, self.token = model, ids[:, length : length + 1].clone()
        self.cache = StaticCache(config=model.config, max_cache_len=32)
        model(ids[:, :length], past_key_values=self.cache)

    def step(self, call):
        return call(self.token, past_key_values=self.cache).logits


def test_a_compiled_decode_step_with_a_static_cache():
    model, ids = make_model(), prompt(0, tokens=10)
    with moe_gpu.attach(model, resident=1.0, policy=Exact()) as moe, torch.no_grad():
        want = logits_of(model, ids)
        decoder, (run, counter) = Decoder(model, ids, 6), counting(model)
        for place in range(6, 10):
            decoder.token.copy_(ids[:, place : place + 1])
            got = decoder.step(run)[:, 0]
            torch.testing.assert_close(got, want[:, place], rtol=1e-5, atol=2e-5)
        assert counter.frame_count == 1 and moe.metrics().tokens == 20


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_a_captured_decode_step(implementation, dtype):
    """Replays decode as eager calls do, and count as they do."""
    ids, length = prompt(0, tokens=20).cuda(), 12
    models = [make_model(dtype=dtype).to("cuda") for _ in range(2)]
    for model in models:
        model.set_experts_implementation(implementation)
    moe, other = (moe_gpu.attach(model, resident=1.0, policy=Exact()) for model in models)
    with torch.no_grad():
        decoder, eager = (Decoder(model, ids, length) for model in models)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            decoder.step(
                decoder.model
            )  # compiles kernels, allocates; the eager model takes this step too
        torch.cuda.current_stream().wait_stream(side)
        eager.step(eager.model)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = decoder.step(decoder.model)
        for place in range(length + 1, 20):
            for each in (decoder, eager):
                each.token.copy_(ids[:, place : place + 1])
            graph.replay()
            bound = 1e-4 if dtype == torch.float32 else 0.1
            torch.testing.assert_close(logits, eager.step(eager.model), rtol=bound, atol=bound)
            if dtype == torch.float32:  # else a rounding can move a token of a later layer
                assert_same_state(moe.state, other.state)
    assert moe.metrics().pairs == other.metrics().pairs == LAYERS * TOP_K * 20
    assert moe.metrics().layers[0].pairs == TOP_K * 20


@pytest.mark.gpu
def test_generate_compiles_by_itself_on_a_device():
    model, ids = make_model(), prompt(0)
    stock = text_of(model.to("cuda"), ids)
    with moe_gpu.attach(model, resident=1.0, policy=Exact()) as moe:
        got = text_of(model, ids, cache_implementation="static")
        assert torch.equal(got, stock) and moe.metrics().hit_rate == 1.0


@pytest.mark.gpu
def test_through_inductor():
    """Slow on a CPU: 30 s for two layers."""
    model = make_model().to("cuda")
    stock = logits_of(model, prompt(0))
    with moe_gpu.attach(model, resident=1.0, policy=Exact()) as moe, torch.no_grad():
        run = torch.compile(model, fullgraph=True, mode="reduce-overhead")
        for _ in range(3):
            got = run(prompt(0).cuda()).logits.clone()
            torch.testing.assert_close(got, stock, rtol=1e-3, atol=1e-3)
        assert moe.metrics().tokens == 21


def test_the_gate_through_inductor(device):
    gate = MoEGate(16, 8, 2, MassBudget(0.2), device=device)
    gate.set_resident([1, 2])
    twin = copy.deepcopy(gate)
    run = torch.compile(gate, fullgraph=True)
    with torch.no_grad():
        for _ in range(3):
            x_TD = torch.randn(5, 16, device=device)
            assert torch.equal(run(x_TD).ids, twin(x_TD).ids)
            assert torch.equal(gate.state.counters_LC, twin.state.counters_LC)
