"""attach: the same bits whatever is resident, the model's own text, and everything given back."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CompileConfig, MixtralForCausalLM

import moe_gpu
from mixtral import (  # noqa: F401 - the last is a fixture that runs by itself
    EXPERT_BYTES,
    EXPERTS,
    INTERPRETED,
    LAYERS,
    TOP_K,
    logits_of,
    make_model,
    prompt,
    text_of,
    without_interpreter,
)
from moe_gpu import CacheBonus, Exact, MassBudget
from moe_gpu.kernels import route
from moe_gpu.offload import LRU


@pytest.fixture(scope="module")
def model():
    """Shared: a test that attaches to it detaches from it."""
    return make_model()


@pytest.fixture(scope="module")
def all_resident(model):
    """Logits of a prefill and of a decode step, exact routing, nothing ever loaded."""
    with moe_gpu.attach(model, slots=EXPERTS, policy=Exact()):
        return prefill_and_decode(model)


def prefill_and_decode(model):
    with torch.no_grad():
        prefill = model(prompt(1), use_cache=True)
        decode = model(prompt(2, tokens=1), past_key_values=prefill.past_key_values)
    return torch.cat([prefill.logits, decode.logits], 1)


@pytest.mark.filterwarnings("ignore:.*experts (of|that) one token")
@pytest.mark.parametrize("pool", [False, True], ids=["per-layer", "pool"])
@pytest.mark.parametrize("slots", range(1, EXPERTS + 1))  # 1 is fewer than K: waves at each token
def test_exact_routing_is_bitwise_the_same_whatever_was_resident(model, all_resident, slots, pool):
    with moe_gpu.attach(model, slots=slots, policy=Exact(), pool=pool) as moe:
        assert moe.offloader.num_slots == slots * (LAYERS if pool else 1)
        for history in ([], [3], [4, 5]):
            for seed in history:
                logits_of(model, prompt(seed, tokens=2))
            assert torch.equal(prefill_and_decode(model), all_resident)
        metrics = moe.metrics()
        assert metrics.loads == metrics.unique_misses
        assert (metrics.loads > 0) == (slots < EXPERTS)


def test_close_to_the_stock_experts(model, all_resident):
    stock = model.get_experts_implementation()
    model.set_experts_implementation("eager")
    torch.testing.assert_close(prefill_and_decode(model), all_resident, rtol=1e-5, atol=1e-5)
    model.set_experts_implementation(stock)


def test_generates_the_stock_text(model):
    expected = text_of(model, prompt(0, batch=2))
    with moe_gpu.attach(model, slots=3, policy=Exact()):
        assert torch.equal(text_of(model, prompt(0, batch=2)), expected)
        model.set_experts_implementation(model.get_experts_implementation())  # as generate does
        assert torch.equal(text_of(model, prompt(0, batch=2)), expected)
    assert torch.equal(text_of(model, prompt(0, batch=2)), expected)


def test_bfloat16_is_weighed_and_summed_in_float32_and_rounded_once():
    model, seen = make_model(dtype=torch.bfloat16), []
    experts = model.model.layers[0].mlp.experts
    experts.register_forward_hook(lambda module, *io: seen.append(io))
    weights = {name: p.clone() for name, p in experts.named_parameters()}
    with moe_gpu.attach(model, slots=2, policy=Exact()):
        logits_of(model, prompt(0, tokens=1))
    ((x_TD, ids_TK, weights_TK), got) = seen[0]
    assert weights_TK.dtype == torch.float32 and got.dtype == torch.bfloat16
    outputs = []
    for expert in ids_TK[0].tolist():
        gate, up = F.linear(x_TD, weights["gate_up_proj"][expert]).chunk(2, dim=-1)
        outputs.append(F.linear(F.silu(gate) * up, weights["down_proj"][expert]))
    first, second = (y.float() * w for y, w in zip(outputs, weights_TK[0], strict=True))
    assert torch.equal(got, (first + second).bfloat16())


class OpsInExperts(TorchDispatchMode):
    """Notes what runs inside an experts module, and the new tensors as large as a weight."""

    def __init__(self, experts):
        super().__init__()
        self.names, self.large, self.experts = set(), [], experts
        experts.register_forward_pre_hook(lambda *_: self.__enter__() and None)
        experts.register_forward_hook(lambda *_: self.__exit__(None, None, None))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.add(func.overloadpacket.__name__)
        memory = {p.untyped_storage().data_ptr() for p in self.experts.parameters()}
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in memory:
            self.large += [func] * (out.numel() >= 32 * 48)
        return out


def test_no_synchronisation_and_no_copy_of_weights_for_a_token():
    model = make_model()
    with moe_gpu.attach(model, slots=EXPERTS, policy=Exact()):
        ops = OpsInExperts(model.model.layers[0].mlp.experts)
        logits_of(model, prompt(0, tokens=1))
    assert "mm" in ops.names or "linear" in ops.names
    assert not ops.names & {"_local_scalar_dense", "nonzero", "unique", "is_nonzero", "_to_copy"}
    assert not ops.large


@pytest.mark.parametrize("first_forward", ["before attach", "while attached"])
def test_router_logits_and_auxiliary_loss(first_forward):
    ids, model = prompt(0), make_model()
    stock = make_model()(ids, labels=ids, output_router_logits=True)
    if first_forward == "before attach":  # hooks are set on the first forward that asks for them
        model(ids, output_router_logits=True)
    with moe_gpu.attach(model, slots=4, policy=Exact()), torch.no_grad():
        got = model(ids, labels=ids, output_router_logits=True)
    assert len(got.router_logits) == LAYERS
    assert torch.equal(got.router_logits[0], stock.router_logits[0])  # before any expert
    torch.testing.assert_close(got.aux_loss, stock.aux_loss)
    torch.testing.assert_close(got.loss, stock.loss)


def test_metrics_add_up(model):
    with moe_gpu.attach(model, resident=0.5, policy=Exact(), timers=True) as moe:
        text_of(model, prompt(0, tokens=5), tokens=4)
        metrics = moe.metrics()
        assert metrics.tokens == 5 + 3  # the last token is not fed back
        assert metrics.pairs == metrics.hits + metrics.misses == 8 * TOP_K * LAYERS
        assert metrics.loads == metrics.unique_misses > 0
        assert metrics.evictions == metrics.loads - metrics.bypassed
        assert metrics.loads_by_tier == {"pinned": 0, "pageable": metrics.loads, "disk": 0}
        layers = metrics.layers
        for name in ("pairs", "hits", "misses", "unique_misses", "loads", "evictions"):
            assert sum(getattr(layer, name) for layer in layers) == getattr(metrics, name), name
        assert metrics.bytes_loaded == metrics.loads * EXPERT_BYTES
        assert metrics.waves >= 4 * LAYERS and metrics.superseded == 0
        assert metrics.stall_ms > 0 and metrics.route_us_p99 >= metrics.route_us_p50 > 0
        assert metrics.route_path in ("triton", "reference") and metrics.swaps == 0
        moe.reset_metrics()
        zero = moe.metrics()
        assert zero.tokens == zero.loads == zero.waves == 0 and zero.route_us_p50 is None
        assert moe.state.affinity_LE.any()


def test_a_policy_swaps_and_can_be_changed_in_place(model):
    with moe_gpu.attach(model, slots=4, policy=MassBudget(1.0, protect=1)) as moe:
        text_of(model, prompt(0, tokens=1), tokens=12)
        loose = moe.metrics()
        assert loose.swaps > 0 and loose.moved_mass > 0
        moe.set_policy(Exact())
        moe.reset_metrics()
        text_of(model, prompt(0, tokens=1), tokens=12)
        exact = moe.metrics()
        assert exact.swaps == 0 and exact.misses > loose.misses
        with pytest.raises(TypeError, match="policy must be .* got 0.05"):
            moe.set_policy(0.05)
        moe.set_policy(CacheBonus(0.3))
        assert moe.state.strength_L.tolist() == pytest.approx([0.3] * LAYERS)


def test_saves_the_full_model_while_attached(tmp_path):
    model, ids = make_model(), prompt(0)
    expected, text = model.state_dict(), text_of(model, ids)
    expected = {name: tensor.clone() for name, tensor in expected.items()}
    moe = moe_gpu.attach(model, slots=3, policy=Exact())
    text_of(model, ids)
    saved = model.state_dict()
    assert list(saved) == list(expected)
    for name, tensor in saved.items():
        assert torch.equal(tensor, expected[name]) and tensor.is_contiguous(), name
    model.save_pretrained(tmp_path / "attached")
    moe.detach()
    model.save_pretrained(tmp_path / "detached")
    for folder in ("attached", "detached"):
        again = MixtralForCausalLM.from_pretrained(tmp_path / folder)
        assert all(torch.equal(t, expected[name]) for name, t in again.state_dict().items())
        assert torch.equal(text_of(again.eval(), ids), text)


def test_detach_gives_everything_back():
    model, ids = make_model(), prompt(0)
    block = model.model.layers[0].mlp
    block.experts.down_proj.requires_grad_(False)
    parameters = {name: (p, p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    before, modules = logits_of(model, ids), list(model.modules())
    attributes = {m: (set(vars(m)), type(m)) for m in modules}
    implementation = model.get_experts_implementation()

    moe = moe_gpu.attach(model, slots=2, pool=False, policy=Exact())
    assert type(block.experts).__name__ == "MixtralExperts"
    assert block.experts.gate_up_proj.shape[0] == 2
    assert model.get_experts_implementation()[""] == "moe_gpu"
    text_of(model, ids)
    slots = [
        StorageWeakRef(views["down_proj"].untyped_storage()) for views in moe.offloader.views_L
    ]
    moe.detach()

    assert all(memory.expired() for memory in slots), "freed, although the handle lives on"
    assert list(model.modules()) == modules
    for module in modules:
        assert (set(vars(module)), type(module)) == attributes[module]
        for hooks in ("_state_dict_hooks", "_load_state_dict_pre_hooks", "_forward_pre_hooks"):
            assert not getattr(module, hooks)
    for name, parameter in model.named_parameters():
        same, data, requires_grad = parameters[name]
        assert parameter is same and torch.equal(parameter, data) and parameter.is_contiguous()
        assert parameter.requires_grad == requires_grad
    assert model.get_experts_implementation() == implementation
    assert torch.equal(logits_of(model, ids), before)
    model.load_state_dict(model.state_dict())
    assert moe.metrics().tokens > 0, "metrics outlive the attachment"
    with pytest.raises(RuntimeError, match="layer 1 is not in the store"):
        moe.offloader.store.parameter(1, "down_proj")


def test_two_models_at_once_even_with_one_config_object():
    first, second = make_model(0), make_model(1)
    third = MixtralForCausalLM(first.config).eval()  # shares the config, is never attached
    models, ids = (first, second, third), prompt(0)
    first.set_experts_implementation("batched_mm")
    expected = [text_of(model, ids) for model in models]
    third_logits = logits_of(third, prompt(0, tokens=30))
    a = moe_gpu.attach(first, slots=2, policy=Exact())
    b = moe_gpu.attach(second, slots=5, policy=Exact())
    for model, text in zip(models, expected, strict=True):
        assert torch.equal(text_of(model, ids), text)
    assert torch.equal(logits_of(third, prompt(0, tokens=30)), third_logits), "its own experts"
    c = moe_gpu.attach(third, slots=3, policy=Exact())
    a.detach()
    for model, text in zip(models, expected, strict=True):
        assert torch.equal(text_of(model, ids), text)
    assert b.metrics().tokens == 2 * a.metrics().tokens == 2 * c.metrics().tokens > 0
    b.detach()
    c.detach()
    for model, text in zip(models, expected, strict=True):
        assert model.get_experts_implementation()[""] != "moe_gpu"
        assert torch.equal(text_of(model, ids), text)


class FailsOnce(torch.nn.Module):
    def __init__(self, act_fn):
        super().__init__()
        self.act_fn, self.calls = act_fn, 0

    def forward(self, x):
        self.calls += 1
        if self.calls == 3:
            raise FloatingPointError("in the third expert")
        return self.act_fn(x)


def test_an_exception_in_the_middle_of_a_forward(model, all_resident):
    experts = model.model.layers[1].mlp.experts
    own_act = experts.act_fn
    with moe_gpu.attach(model, slots=2, policy=Exact()) as moe:
        experts.act_fn = FailsOnce(own_act)
        with pytest.raises(FloatingPointError):
            prefill_and_decode(model)
        for table in moe.offloader.cache.tables:
            table.check()
            assert not any(table.leases_S)
        assert torch.equal(prefill_and_decode(model), all_resident)
    experts.act_fn = own_act


class CallsItsLayer(FailsOnce):
    def forward(self, x):
        self.calls += 1
        if self.calls == 1:
            self.layer[0](torch.ones(1, 1, 32))
        return self.act_fn(x)


def test_overlapping_forwards_are_refused(model):
    block = model.model.layers[1].mlp
    own_act = block.experts.act_fn
    with moe_gpu.attach(model, slots=2, policy=Exact()):
        block.experts.act_fn = CallsItsLayer(own_act)
        block.experts.act_fn.layer = [block]  # a list: not a submodule
        with pytest.raises(RuntimeError, match="layer 1: two forwards of one attached model"):
            logits_of(model, prompt(0))
        block.experts.act_fn = own_act
        logits_of(model, prompt(0))


def test_through_the_kernel(model, monkeypatch):
    """What runs outside tests: interpreted on the CPU, where the other tests take the reference."""
    expected = text_of(model, prompt(0), tokens=1)
    monkeypatch.setattr(route, "_INTERPRET", INTERPRETED)
    with moe_gpu.attach(model, slots=3, policy=Exact()) as moe:
        assert torch.equal(text_of(model, prompt(0), tokens=1), expected)
        metrics = moe.metrics()
        assert metrics.route_path == route.route_path(model.device)
        assert metrics.loads == metrics.unique_misses > 0


def test_no_tokens(model):
    with moe_gpu.attach(model, slots=2) as moe, torch.no_grad():
        empty = model.model.layers[0].mlp(torch.empty(1, 0, 32))
        assert empty.shape == (1, 0, 32) and moe.metrics().tokens == 0
        logits_of(model, prompt(0))


def test_attaches_in_inference_mode_for_use_outside(model, all_resident):
    with torch.inference_mode():
        moe = moe_gpu.attach(model, slots=2, policy=Exact(), eviction=LRU())
        logits_of(model, prompt(3))
    assert torch.equal(prefill_and_decode(model), all_resident)
    moe.detach()


@pytest.mark.gpu
def test_on_a_device_in_inference_mode_and_outside():
    model, ids = make_model(), prompt(0)
    options = {"prefetch": ["next_gate"], "policy": Exact(), "device": "cuda"}
    with moe_gpu.attach(model, slots=3, **options) as moe:
        with torch.inference_mode():
            expected = logits_of(model, ids)
            logits_of(model, ids[:, :1])
            moe.status()
        assert torch.equal(logits_of(model, ids), expected)
        logits_of(model, ids[:, :2])
        moe.status()
        moe.reset_metrics()


def test_compiled_around_the_experts():
    """What generate() does by itself on a GPU with a static cache."""
    model, ids, traced = make_model(), prompt(0), []
    expected = text_of(model, ids)

    def backend(graph, inputs):
        traced.extend(node.meta.get("stack_trace") or "" for node in graph.graph.nodes)
        return graph.forward

    compiling = CompileConfig(backend=backend, mode=None)
    compiling._compile_all_devices = True
    static = {"cache_implementation": "static", "compile_config": compiling}
    with moe_gpu.attach(model, slots=3, policy=Exact()) as moe:
        assert torch.equal(text_of(model, ids, **static), expected)
        assert moe.metrics().loads > 0
    assert any("modeling_mixtral" in where for where in traced)
    assert not any("moe_gpu/" in line for where in traced for line in where.splitlines())
    torch.compiler.reset()


def test_profiler_ranges(model):
    with moe_gpu.attach(model, slots=2, policy=Exact()):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            logits_of(model, prompt(0))
    names = {event.key for event in profile.key_averages()}
    assert {"moe_gpu::route", "moe_gpu::page_in", "moe_gpu::experts"} <= names


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_device(dtype):
    """From the CPU to the device and back; generate would switch stock experts for decode."""
    model, ids = make_model(dtype=dtype), prompt(0, batch=2)
    at_home = logits_of(model, ids)
    with moe_gpu.attach(model, slots=EXPERTS, policy=Exact(), device="cuda"):
        assert model.device.type == "cuda"
        expected, text = logits_of(model, ids), text_of(model, ids)
    for slots in (1, 2, 5):
        with moe_gpu.attach(model, slots=slots, policy=Exact(), device="cuda", timers=True) as moe:
            assert moe.offloader.store.pinned
            for _ in range(3):
                assert torch.equal(logits_of(model, ids), expected)
                assert torch.equal(text_of(model, ids), text)
            assert moe.metrics().stall_ms > 0 and moe.metrics().route_path == "triton"
    assert torch.equal(logits_of(model, ids), at_home)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [
        {"pool": True},
        {"pool": False, "bypass": False},
        {"pinned_memory": 0},  # everything through the staging buffers
        {"prefetch": ["next_gate", "background", "affinity"]},
        {"verify": True},
        {"max_policy_tokens": 2, "prefill": "warm"},
    ],
    ids=str,
)
def test_options_on_a_device(options):
    model, ids = make_model(dtype=torch.bfloat16), prompt(0, batch=2)
    with moe_gpu.attach(model, slots=EXPERTS, policy=Exact(), device="cuda"):
        expected, text = logits_of(model, ids), text_of(model, ids)
    with moe_gpu.attach(model, slots=3, policy=Exact(), device="cuda", **options) as moe:
        for _ in range(3):
            assert torch.equal(logits_of(model, ids), expected)
            assert torch.equal(text_of(model, ids), text)
        metrics = moe.metrics()
        tier = "pageable" if "pinned_memory" in options else "pinned"
        assert metrics.loads_by_tier[tier] == metrics.loads > 0
        assert sum(layer.hits for layer in metrics.layers) == metrics.hits


@pytest.mark.gpu
def test_metrics_without_waiting_catch_up():
    model, ids = make_model(), prompt(0)
    with moe_gpu.attach(model, slots=3, device="cuda") as moe:
        text_of(model, ids)
        for _ in range(2):  # the first call orders the copy that the second one reads
            moe.metrics(wait=False)
            torch.cuda.synchronize()
        seen, now = moe.metrics(wait=False), moe.metrics()
        assert (seen.tokens, seen.hits, seen.swaps) == (now.tokens, now.hits, now.swaps)
        assert moe.status().startswith("hits ")
