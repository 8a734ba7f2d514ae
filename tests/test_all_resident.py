"""Every expert resident: the parameters are the slots, so nothing of the model is hidden."""

import copy

import pytest
import torch
import torch.nn.utils.parametrize
from transformers import MixtralForCausalLM

import moe_gpu
from checkpoints import save
from mixtral import (  # noqa: F401 - the last is a fixture that runs by itself
    EXPERT_BYTES,
    EXPERTS,
    LAYERS,
    logits_of,
    make_model,
    prompt,
    text_of,
    without_interpreter,
)
from moe_gpu import Exact
from moe_gpu.huggingface import experts as experts_module
from moe_gpu.huggingface import weights as weights_module
from moe_gpu.offload import ExpertOffloader
from moe_gpu.offload.disk import DiskExperts
from moe_gpu.offload.pager import Copy
from moe_gpu.requests import Priority
from offloading import make_store, run_step
from offloading import route as route_to

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Shared: nobody writes into it."""
    return save(make_model(), tmp_path_factory.mktemp("mixtral"))


def attached(**options):
    model = make_model()
    return model, moe_gpu.attach(model, **{"slots": EXPERTS, "policy": Exact()} | options)


def test_the_parameters_are_the_slots():
    model = make_model()
    model.model.layers[1].mlp.experts.down_proj.requires_grad_(False)
    before = {n: (p, p.data_ptr(), p.requires_grad) for n, p in model.named_parameters()}
    with moe_gpu.attach(model, resident=1.0) as moe:
        assert moe.all_resident
        for name, parameter in model.named_parameters():
            assert (parameter, parameter.data_ptr(), parameter.requires_grad) == before[name]
        metrics = moe.metrics()
        assert metrics.home_bytes == {"pinned": 0, "pageable": 0, "disk": 0}, "no second copy"
        assert metrics.slots == metrics.slots_used == metrics.filled == LAYERS * EXPERTS
        assert moe.state.slot_of_LE.tolist() == [list(range(EXPERTS))] * LAYERS
        for views, layer in zip(moe.offloader.views_L, model.model.layers, strict=True):
            assert views["down_proj"].data_ptr() == layer.mlp.experts.down_proj.data_ptr()


@pytest.mark.parametrize(
    "options",
    [
        {"slots": EXPERTS - 1},
        {"pool": True},
        {"pool": True, "slots": EXPERTS // LAYERS},  # as many in all as a layer has experts
        {"verify": True},
    ],
    ids=str,
)
def test_what_is_not_all_resident_trains_no_more_than_before(options):
    model, moe = attached(**options)
    assert not moe.all_resident
    assert sum(moe.metrics().home_bytes.values()) == LAYERS * EXPERTS * EXPERT_BYTES
    with pytest.raises(RuntimeError, match=r"it trains where every .* resident=1.0\), without ver"):
        model.train()(prompt(0))
    with pytest.raises(RuntimeError, match=r"no backward pass: .* resident=1.0\), without verify"):
        model.eval()(prompt(0), labels=prompt(0)).loss.backward()
    moe.detach()
    model.train()(prompt(0), labels=prompt(0)).loss.backward()


@pytest.mark.parametrize("options", [{}, {"verify": True}, {"pool": True}, {"slots": 7}], ids=str)
def test_bits_without_a_gradient_are_the_same_whoever_owns_the_slots(options):
    _, reference = attached()
    model, _ = attached(**options)
    for seed, tokens in ((0, 7), (1, 1), (2, 70)):
        ids = prompt(seed, tokens=tokens)
        assert torch.equal(logits_of(model, ids), logits_of(reference.model, ids))


def test_bits_of_experts_whose_bytes_are_no_whole_lines(monkeypatch):
    """Parameters are packed, slots are padded to 256 bytes: products must not notice."""
    seen, run = [], experts_module._run_expert

    def aligned(module, weights, x_ND):
        assert not any(weight.data_ptr() % 64 for weight in weights.values())
        return run(module, weights, x_ND)

    monkeypatch.setattr(experts_module, "_run_expert", aligned)
    for options in ({"slots": EXPERTS}, {"slots": EXPERTS, "verify": True}, {"slots": 3}):
        model = make_model(intermediate_size=43, hidden_size=36, num_attention_heads=2)
        with moe_gpu.attach(model, policy=Exact(), **options):
            seen.append([logits_of(model, prompt(0, tokens=tokens)) for tokens in (1, 7, 30)])
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


def test_whose_experts_run(monkeypatch):
    """Ours where nobody asks for a gradient, the model's own where somebody does."""
    model, moe = attached()
    ran = []
    for layer in moe._layers:
        own = layer.own_forward
        monkeypatch.setattr(layer, "own_forward", lambda *a, own=own: ran.append("own") or own(*a))
    mix = experts_module._mix
    monkeypatch.setattr(experts_module, "_mix", lambda *a: ran.append("ours") or mix(*a))

    def run(**arguments):
        ran.clear()
        model(prompt(0), **arguments)
        return ran

    with torch.no_grad():
        assert run() == ["ours"] * LAYERS
        model.train()
        assert run() == ["ours"] * LAYERS
    assert run() == ["own"] * LAYERS
    model.eval()
    assert run() == ["own"] * LAYERS
    model.requires_grad_(False)
    assert run() == ["ours"] * LAYERS
    model.model.layers[1].mlp.experts.down_proj.requires_grad_(True)
    assert run() == ["ours", "own"]
    model.requires_grad_(False)
    model.model.layers[1].mlp.gate.weight.requires_grad_(True)
    assert run() == ["ours", "own"]


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_the_own_implementation_is_the_one_of_before(implementation):
    model, twin, ids = make_model(), make_model(), prompt(0, batch=2)
    for each in (model, twin):
        each.set_experts_implementation(implementation)
    with moe_gpu.attach(model, resident=1.0, policy=Exact()):
        torch.testing.assert_close(model(ids).logits, twin(ids).logits, rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, twin(ids).logits, rtol=1e-5, atol=1e-5)
    assert model.get_experts_implementation()[""] == implementation


def test_counts_add_up_whoever_computed():
    model, moe = attached(timers=True)
    logits_of(model, prompt(0))
    model(prompt(0))
    logits_of(model, prompt(0))
    metrics = moe.metrics()
    assert metrics.tokens == 21 and metrics.superseded == 0 == metrics.loads
    for name in ("pairs", "hits", "misses", "unique_misses"):
        assert sum(getattr(layer, name) for layer in metrics.layers) == getattr(metrics, name)
    assert metrics.hits == metrics.pairs == 21 * 2 * LAYERS
    moe.reset_metrics()
    assert moe.metrics().layers[0].pairs == 0


def test_a_state_dict_is_the_parameters_themselves(tmp_path):
    model, moe = attached()
    other = make_model(5)
    saved = model.state_dict()
    for name, parameter in model.named_parameters():
        assert saved[name].data_ptr() == parameter.data_ptr(), name
    model.load_state_dict(other.state_dict())
    expected = logits_of(other, prompt(0))
    torch.testing.assert_close(logits_of(model, prompt(0)), expected, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path)
    moe.detach()
    assert torch.equal(logits_of(model, prompt(0)), expected)
    again = MixtralForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in saved.items())


def test_detach_leaves_what_is_there_by_then():
    model, moe = attached()
    experts = model.model.layers[1].mlp.experts
    with torch.no_grad():
        experts.down_proj[3] *= 2
    changed = experts.down_proj.clone()
    model(prompt(0)).logits.sum().backward()
    grad = experts.down_proj.grad
    moe.detach()
    assert torch.equal(experts.down_proj, changed) and experts.down_proj.grad is grad
    assert experts.down_proj.requires_grad and text_of(model, prompt(0)).shape == (1, 15)


def test_a_restart_puts_every_expert_in_its_own_slot(tmp_path):
    model, moe = attached()
    for seed in range(3):
        logits_of(model, prompt(seed))
    moe.save_residency(tmp_path / "residency.safetensors")
    affinity_LE = moe.state.affinity_LE.clone()
    expected = logits_of(model, prompt(0))
    moe.detach()
    moe = moe_gpu.attach(
        model, slots=EXPERTS, policy=Exact(), residency=tmp_path / "residency.safetensors"
    )
    assert moe.state.slot_of_LE.tolist() == [list(range(EXPERTS))] * LAYERS
    assert torch.equal(moe.state.affinity_LE, affinity_LE)
    assert torch.equal(logits_of(model, prompt(0)), expected)


def test_weights_at_odd_addresses_are_moved_once():
    """As safetensors files are mapped: a product of them may round otherwise."""
    model, expected = make_model(), logits_of(attached()[0], prompt(0))
    experts = model.model.layers[0].mlp.experts
    memory = torch.empty(experts.down_proj.numel() + 1)
    memory[1:] = experts.down_proj.flatten()
    experts.down_proj.data = memory[1:].view_as(experts.down_proj)
    experts.gate_up_proj.data = experts.gate_up_proj.mT.contiguous().mT
    with moe_gpu.attach(model, resident=1.0, policy=Exact()):
        for parameter in experts.parameters():
            assert parameter.data_ptr() % 64 == 0 and parameter.is_contiguous()
        assert torch.equal(logits_of(model, prompt(0)), expected)


def test_no_room_changes_nothing(monkeypatch):
    model = make_model()
    expected, before = logits_of(model, prompt(0)), set(vars(model.model.layers[0].mlp.experts))
    moved, calls = weights_module._moved, []

    def fails(weight, device):
        calls.append(weight)
        if len(calls) == 3:
            raise MemoryError("the experts do not all fit on cpu")
        return moved(weight, device)

    monkeypatch.setattr(weights_module, "_moved", fails)
    with pytest.raises(MemoryError, match="do not all fit"):
        moe_gpu.attach(model, resident=1.0)
    assert set(vars(model.model.layers[0].mlp.experts)) == before
    assert torch.equal(logits_of(model, prompt(0)), expected)


def test_out_of_memory_is_said_as_such(monkeypatch):
    def fails(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    monkeypatch.setattr(torch, "empty", fails)
    with pytest.raises(MemoryError, match=r"do not all fit on cpu: .* \(CUDA out of memory"):
        weights_module._empty(3, dtype=torch.float32, device=torch.device("cpu"))


def test_a_conversion_is_followed():
    model, moe = attached()
    model.bfloat16()
    with torch.no_grad():
        ours = model(prompt(0)).logits
    moe.detach()
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours, logits_of(model, prompt(0)), rtol=0.05, atol=0.5)


def test_a_loaded_model_trains_and_becomes_an_ordinary_one(folder):
    model, moe = moe_gpu.load(folder, slots=EXPERTS, policy=Exact())
    reference, _ = attached()
    assert moe.all_resident and moe.metrics().home_bytes == {"pinned": 0, "pageable": 0, "disk": 0}
    assert torch.equal(logits_of(model, prompt(0)), logits_of(reference, prompt(0)))
    model.train()(prompt(0), labels=prompt(0)).loss.backward()
    experts = model.model.layers[0].mlp.experts
    assert all(p.grad is not None and p.grad.any() for p in experts.parameters())
    with torch.no_grad():
        experts.down_proj -= 0.1 * experts.down_proj.grad
    changed = experts.down_proj.clone()
    moe.detach()
    assert torch.equal(model.model.layers[0].mlp.experts.down_proj, changed)
    assert all(p.device.type == "cpu" for p in model.parameters())
    logits_of(model.eval(), prompt(0))


def test_a_loaded_model_closes(folder):
    model, moe = moe_gpu.load(folder, resident=1.0)
    logits_of(model, prompt(0))
    moe.close()
    assert all(p.is_meta for p in model.model.layers[0].mlp.experts.parameters())
    with pytest.raises(RuntimeError, match="was closed"):
        logits_of(model, prompt(0))


def test_a_load_is_done_with_its_files(folder, monkeypatch):
    """Closed, and their pages left to the system: nothing is read again."""
    seen = []
    monkeypatch.setattr(DiskExperts, "drop_cache", lambda self, *expert: seen.append(expert))
    monkeypatch.setattr(DiskExperts, "close", lambda self: seen.append("closed"))
    _, moe = moe_gpu.load(folder, resident=1.0)
    everybody = [(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)]
    assert seen == [*everybody, "closed"] and moe.offloader.store.files is None
    moe.close()


def test_the_bar_of_a_load_counts_every_expert(folder, capsys):
    moe_gpu.load(folder, resident=1.0, progress=True)[1].close()
    assert "100%" in capsys.readouterr().err


def test_an_offloader_that_never_moves_anything():
    store, weights = make_store(2, 4)
    state = moe_gpu.RouterState(2, 4)
    offloader = ExpertOffloader(state, store, 4, weights_L=weights)
    assert offloader.all_resident and offloader.metrics().filled == 8
    assert state.slot_of_LE.tolist() == [[0, 1, 2, 3]] * 2
    offloader.fill()
    offloader.warm(1, [2, 3])
    for chosen in ([[0, 1], [3, 2]], [[2, 0]]):
        route_to(state, chosen, layer=1)
        run_step(offloader, weights, 2 * len(chosen), layer=1)
    metrics = offloader.metrics()
    assert metrics.loads == metrics.evictions == 0 and metrics.filled == 8
    transfer, copy = offloader._transfer, Copy(0, 0, 0, Priority.URGENT)
    for refused in (
        lambda: transfer.begin(copy),
        lambda: transfer.piece(copy, 0, 1),
        lambda: transfer.bytes_of(0),
    ):
        with pytest.raises(RuntimeError, match="every expert is resident: nothing is copied"):
            refused()
    for options in (
        {"slots": 3, "staging_slots": 0},
        {"slots": 8, "pool": True},
        {"staging_slots": 1},
        {"verify": True},
    ):
        with pytest.raises(ValueError, match="weights_L needs a slot of its own"):
            ExpertOffloader(state, store, weights_L=weights, **{"slots": 4} | options)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_device_and_back(dtype):
    model, ids = make_model(dtype=dtype), prompt(0, batch=2)
    with moe_gpu.attach(model, slots=3, policy=Exact(), device="cuda"):
        paged = logits_of(model, ids)
    with moe_gpu.attach(model, slots=EXPERTS, policy=Exact(), device="cuda") as moe:
        assert torch.equal(logits_of(model, ids), paged)
        assert moe.all_resident and moe.metrics().stall_ms in (None, 0.0)
        model(ids.cuda(), labels=ids.cuda()).loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
        changed = {name: p.cpu() for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert parameter.device.type == parameter.grad.device.type == "cpu", name
        assert torch.equal(parameter, changed[name]), name


# -- weights that are not the attached ones any more


class Adapted(torch.nn.Module):
    """What an adapter on a packed parameter adds for the time of a forward."""

    def forward(self, weight):
        return weight + 0.1


def test_an_adapter_counts_with_and_without_a_gradient():
    model, moe = attached()
    experts = model.model.layers[0].mlp.experts
    before = logits_of(model, prompt(0))
    with moe:
        torch.nn.utils.parametrize.register_parametrization(experts, "down_proj", Adapted())
        trained, eager = model(prompt(0)).logits, logits_of(model, prompt(0))
        torch.testing.assert_close(trained, eager)
        assert not torch.allclose(eager, before, atol=0.1)
        parametrize = torch.nn.utils.parametrize
        parametrize.remove_parametrizations(experts, "down_proj", leave_parametrized=False)
        torch.testing.assert_close(logits_of(model, prompt(0)), before)


def test_weights_that_were_assigned_are_used():
    model, moe = attached()
    other = make_model(seed=1)
    with moe:
        model.load_state_dict(other.state_dict(), assign=True)
        torch.testing.assert_close(logits_of(model, prompt(0)), logits_of(other, prompt(0)))
    torch.testing.assert_close(logits_of(model, prompt(0)), logits_of(other, prompt(0)))


def test_attaching_keeps_gradients_that_are_there():
    model = make_model()
    model(prompt(0), labels=prompt(0)).loss.backward()
    want = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    with moe_gpu.attach(model, resident=1.0, policy=Exact()):
        model(prompt(0), labels=prompt(0)).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, 2 * want[name], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="holds a gradient, which would stay behind"):
        moe_gpu.attach(model, slots=4)


def test_residency_belongs_to_the_offloader():
    saved = None
    for options in ({"slots": 4}, {"resident": 1.0}):
        with moe_gpu.attach(make_model(), policy=Exact(), **options) as moe:
            before = moe.state.slot_of_LE.clone()
            with pytest.raises(RuntimeError, match="for a gate without an offloader"):
                moe.gates[0].set_resident([0, 1])
            saved = saved or moe.state.runtime_state_dict()
            with pytest.raises(ValueError, match="slot_of cannot be loaded.*Leave it out"):
                moe.state.load_runtime_state_dict(saved)
            rest = {name: tensor for name, tensor in saved.items() if name != "slot_of"}
            moe.state.load_runtime_state_dict(rest)
            assert torch.equal(moe.state.slot_of_LE, before)
    moe.gates[0].set_resident([0, 1])  # nobody owns it any more


def test_a_config_copied_from_an_attached_model():
    model, moe = attached()
    with moe:
        twin = MixtralForCausalLM(copy.deepcopy(model.config)).eval()
    with moe_gpu.attach(twin, resident=1.0):
        twin(prompt(0)).logits.sum().backward()
    assert "moe_gpu" not in twin.get_experts_implementation().values()
    text_of(twin, prompt(0))


def test_experts_that_want_a_gradient_are_refused_in_slots():
    model = make_model()
    with moe_gpu.attach(model, slots=4, policy=Exact()):
        model.requires_grad_(False)
        model.model.layers[1].mlp.experts.down_proj.requires_grad_(True)
        with pytest.raises(RuntimeError, match=r"have no gradient, but a parameter.*resident=1\.0"):
            model(prompt(0))
        logits_of(model, prompt(0))
