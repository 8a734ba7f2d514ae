"""What attach and an attached model refuse, by name, value and bound, before anything changes."""

import copy
import importlib
import pickle

import pytest
import torch
from torch import nn

import moe_gpu
from mixtral import (  # noqa: F401 - the last is a fixture that runs by itself
    EXPERTS,
    logits_of,
    make_model,
    prompt,
    text_of,
    without_interpreter,
)
from moe_gpu import Exact


@pytest.fixture(scope="module")
def model():
    return make_model()


def snapshot(model):
    return (
        {name: (id(p), p.shape, p.requires_grad) for name, p in model.named_parameters()},
        [set(vars(module)) for module in model.modules()],
        model.get_experts_implementation(),
    )


ARGUMENTS = [
    ({}, ValueError, "give exactly one of slots, resident and gpu_memory, got {}"),
    ({"slots": 2, "resident": 0.5}, ValueError, "exactly one .* got {'slots': 2, 'resident': 0.5}"),
    ({"slots": 0}, ValueError, r"slots must lie in \[1, 8\], the experts per layer, got 0"),
    ({"slots": 9}, ValueError, r"slots must lie in \[1, 8\].*got 9"),
    ({"slots": 2.5}, TypeError, "slots must be an int, got 2.5"),
    ({"resident": 0.0}, ValueError, r"resident must be a share in \(0, 1\] or an int, got 0.0"),
    ({"resident": 1.5}, ValueError, r"resident must be a share in \(0, 1\].*got 1.5"),
    ({"resident": float("nan")}, ValueError, "resident must be a share .* got nan"),
    ({"resident": 9}, ValueError, r"resident must lie in \[1, 8\].*got 9"),
    ({"resident": "half"}, TypeError, "resident must be a share .* got 'half'"),
    ({"gpu_memory": "lots"}, ValueError, "gpu_memory must be bytes or text .* got 'lots'"),
    ({"gpu_memory": 1000}, ValueError, "gpu_memory=1,000 bytes is too small: dense weights take"),
    ({"gpu_memory": "1GiB", "context_tokens": 0}, ValueError, "context_tokens must be >= 1, got 0"),
    ({"slots": 2, "eviction": "fifo"}, ValueError, "eviction must be one of .* got 'fifo'"),
    ({"slots": 2, "policy": 0.05}, TypeError, "policy must be .* got 0.05"),
    ({"slots": 2, "decay": 1.5}, ValueError, "decay must be .* got 1.5"),
    ({"slots": 2, "max_policy_tokens": -1}, ValueError, "max_policy_tokens must be >= 0, got -1"),
    ({"slots": 2, "affinity_from": "luck"}, ValueError, "affinity_from must be .* got 'luck'"),
    ({"slots": 2, "device": "nowhere"}, RuntimeError, "nowhere"),
    ({"slots": 2, "pool": "yes"}, TypeError, "pool must be True or False, got 'yes'"),
    ({"slots": 2, "bypass": None}, TypeError, "bypass must be True or False, got None"),
    ({"slots": 2, "staging_slots": -1}, ValueError, "staging_slots must be an int >= 0, got -1"),
    ({"slots": 2, "prefetch": ["oracle"]}, ValueError, "prefetch must be among .* got 'oracle'"),
    ({"slots": 2, "prefetch": None}, TypeError, "prefetch must hold names .* got None"),
    ({"slots": 2, "residency": 3}, TypeError, "residency must be a path, got 3"),
    ({"slots": 2, "host_memory": 3}, TypeError, r"host_memory is an argument of load\(\), not of"),
    ({"slot": 2}, TypeError, r"attach\(\) got .* 'slot': did you mean 'slots'\?"),
    ({"slots": 2, "prefetch": [3]}, TypeError, "prefetch must hold names .* got 3"),
    ({"slots": 2, "prefill": "all"}, ValueError, "prefill must be 'last', 'warm' .* got 'all'"),
    ({"slots": 2, "timeout_s": 0}, ValueError, "timeout_s must be finite and > 0, got 0"),
    ({"slots": 2, "timeout_s": "1"}, TypeError, "timeout_s must be a number .* got '1'"),
    ({"slots": 2, "link_gbps": 0}, ValueError, "link_gbps must be > 0, got 0"),
    ({"slots": 2, "pinned_memory": "-1"}, ValueError, "pinned_memory must be bytes .* got '-1'"),
    ({"slots": 2, "residency": "nowhere.safetensors"}, FileNotFoundError, "nowhere.safetensors"),
]


@pytest.mark.parametrize("arguments, error, message", ARGUMENTS, ids=lambda v: str(v)[:40])
def test_arguments(model, arguments, error, message):
    before = snapshot(model)
    with pytest.raises(error, match=message):
        moe_gpu.attach(model, **arguments)
    assert snapshot(model) == before


class MixtralTopKRouter(nn.Linear):
    """Known by name only: a block around it can be anything."""


class UnknownRouter(nn.Linear):
    pass


def block(router, **parameters):
    module = nn.Module()
    module.gate, module.experts = router, nn.Module()
    for name in parameters:
        module.experts.register_parameter(name, nn.Parameter(torch.empty(2, 4, 4)))
    return module


PACKED = {"gate_up_proj": 0, "down_proj": 0}


@pytest.mark.parametrize(
    "build, error, message",
    [
        (lambda: "mixtral", TypeError, "must be a transformers PreTrainedModel, got 'mixtral'"),
        (lambda: nn.Linear(2, 2), ValueError, "Linear has no MoE layer; known.*MixtralTopKRouter"),
        (
            lambda: nn.Sequential(block(UnknownRouter(4, 2), **PACKED)),
            ValueError,
            "0: router class UnknownRouter is not supported; known: MixtralTopKRouter",
        ),
        (
            lambda: nn.Sequential(block(MixtralTopKRouter(4, 2), **PACKED, down_proj_bias=0)),
            ValueError,
            r"0: experts Module are not supported.*got \['down_proj', 'down_proj_bias', 'gate_up",
        ),
        (
            lambda: nn.Sequential(block(MixtralTopKRouter(4, 2), **PACKED)),
            TypeError,
            "must be a transformers PreTrainedModel, got Sequential",
        ),
    ],
)
def test_models(build, error, message):
    with pytest.raises(error, match=message):
        moe_gpu.attach(build(), slots=1)


@pytest.mark.parametrize(
    "change, message",
    [
        pytest.param(lambda e: e.to("meta"), "experts.gate_up_proj is on device meta", id="meta"),
        pytest.param(
            lambda e: setattr(e.down_proj, "grad", torch.zeros_like(e.down_proj)),
            "experts.down_proj holds a gradient", id="gradient",
        ),
        pytest.param(lambda e: e.half(), "layers.1.mlp: every MoE layer must have 8", id="dtypes"),
        pytest.param(
            lambda e: setattr(e.down_proj, "data", torch.zeros(8, 32, 48, dtype=torch.int8)),
            "down_proj must be floating point, got torch.int8", id="packed",
        ),
        pytest.param(
            lambda e: [setattr(p, "data", p.data[:7]) for p in e.parameters()],
            r"must have 8 experts .* got \[\(7, 96, 32\), \(7, 32, 48\)\]", id="fewer experts",
        ),
    ],
)  # fmt: skip
def test_weights(change, message):
    model = make_model()
    experts = model.model.layers[1].mlp.experts
    for parameter in experts.parameters():
        parameter.requires_grad_(False)
    change(experts)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        moe_gpu.attach(model, slots=2)
    assert snapshot(model) == before


def test_a_model_in_two_places():
    model = make_model()
    model.lm_head.to("meta")
    with pytest.raises(
        ValueError, match=r"on one device, or be split by .*device_map=.*got cpu, meta"
    ):
        moe_gpu.attach(model, slots=2)


def test_attaching_and_detaching_twice(model):
    moe = moe_gpu.attach(model, slots=2)
    for again in (model, model.model):
        with pytest.raises(RuntimeError, match=r"already attached: detach\(\) it first"):
            moe_gpu.attach(again, slots=2)
    moe.detach()
    with pytest.raises(RuntimeError, match="already detached"):
        moe.detach()
    with moe_gpu.attach(model, slots=5) as moe:
        assert "attached, 2 layers, 5 of 8 experts resident per layer, policy=" in repr(moe)
    with moe_gpu.attach(model, slots=3) as moe:
        assert "attached, 2 layers, a pool of 6 for 16 experts, policy=" in repr(moe)
    assert "detached, 2 layers of 8 experts, policy=" in repr(moe)


def test_what_needs_an_attached_model(model):
    moe = moe_gpu.attach(model, slots=5)
    with pytest.raises(RuntimeError, match=r"attached, not loaded: detach\(\) gives it back"):
        moe.close()
    logits_of(model, prompt(0))  # nothing has changed
    moe.detach()
    with pytest.raises(RuntimeError, match=r"set_policy\(\) needs an attached .* is detached"):
        moe.set_policy(moe_gpu.Exact())
    with pytest.raises(RuntimeError, match="already detached"):
        moe.close()


def test_a_failure_in_the_middle_changes_nothing(monkeypatch):
    model, ids = make_model(), prompt(0)
    text = text_of(model, ids)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = snapshot(model)
    steps = {"ExpertOffloader": "part", "RoutedForward": "part", "ExpertsLayer": "part"}
    for name, module in (steps | {"switch_on": "attached"}).items():
        with monkeypatch.context() as patch:

            def fails(*_, **__):
                raise MemoryError("no room for slots")

            # the package exports a function of the module's name
            patch.setattr(importlib.import_module(f"moe_gpu.huggingface.{module}"), name, fails)
            with pytest.raises(MemoryError, match="no room"):
                moe_gpu.attach(model, slots=2)
        assert snapshot(model) == before
        assert all(torch.equal(t, weights[key]) for key, t in model.state_dict().items())
    assert torch.equal(text_of(model, ids), text)
    moe_gpu.attach(model, slots=2).detach()


def test_a_detach_that_failed_can_be_repeated(model, monkeypatch):
    expected = logits_of(model, prompt(0))
    moe = moe_gpu.attach(model, slots=2)
    given_back = moe.offloader.store.parameter

    def fails_for_layer_0(layer, name, out):
        if layer == 0:
            raise MemoryError("no room for the model")
        return given_back(layer, name, out)

    with monkeypatch.context() as patch:
        patch.setattr(moe.offloader.store, "parameter", fails_for_layer_0)
        with pytest.raises(MemoryError):
            moe.detach()
    with pytest.raises(RuntimeError):  # never with the weights of some slots
        logits_of(model, prompt(0))
    moe.detach()
    assert torch.equal(logits_of(model, prompt(0)), expected)


@pytest.mark.parametrize(
    "use, message",
    [
        pytest.param(copy.deepcopy, "cannot be copied: detach", id="deepcopy"),
        pytest.param(lambda m: copy.deepcopy(m.model.layers[0].mlp), "cannot be copied", id="part"),
        pytest.param(pickle.dumps, "cannot be pickled: detach", id="pickle"),
        pytest.param(
            lambda m: m.load_state_dict(make_model(9).state_dict()), "cannot load a state dict",
            id="load",
        ),
        pytest.param(
            lambda m: m.model.layers.load_state_dict(make_model(9).model.layers.state_dict()),
            "cannot load a state dict", id="load into a part",
        ),
        pytest.param(
            lambda m: m.train()(prompt(0)), r"is for inference: call eval\(\)", id="training"
        ),
        pytest.param(
            lambda m: m(prompt(0), labels=prompt(0)).loss.backward(),
            "have no backward pass: detach", id="backward",
        ),
        pytest.param(
            lambda m: m.set_experts_implementation("eager")
            or m(prompt(0)), "implementation was changed to 'eager' while attached", id="switched",
        ),
    ],
)  # fmt: skip
def test_an_attached_model(model, use, message):
    expected = logits_of(model, prompt(0))
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    moe = moe_gpu.attach(model, slots=2, policy=Exact())
    with pytest.raises(RuntimeError, match=message):
        use(model)
    model.eval()
    model.zero_grad()
    moe.detach()
    assert all(torch.equal(t, weights[key]) for key, t in model.state_dict().items())
    assert torch.equal(logits_of(model, prompt(0)), expected)


def test_works_with_gradients_on_as_long_as_nobody_asks_for_them(model):
    with moe_gpu.attach(model, slots=2, policy=Exact()):
        expected = logits_of(model, prompt(0))
        assert model.training is False
        assert torch.equal(model(prompt(0)).logits, expected)
        with torch.no_grad():
            assert torch.equal(model.train()(prompt(0)).logits, expected)
    model.eval()


@pytest.mark.parametrize("name", ["layers.0.mlp: gate_up_proj"])
def test_converting_an_attached_model_is_noticed_and_undone_by_detach(name):
    model = make_model()
    weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    moe = moe_gpu.attach(model, slots=2)
    model.double()
    with pytest.raises(RuntimeError, match=f"{name} is no longer the device slots"):
        logits_of(model, prompt(0))
    moe.detach()
    experts = model.model.layers[1].mlp.experts
    assert torch.equal(experts.down_proj, weights["model.layers.1.mlp.experts.down_proj"])


def test_fewer_slots_than_one_token_needs(model):
    with pytest.warns(RuntimeWarning, match="a pool of 2 slots is smaller than the 4") as caught:
        moe_gpu.attach(model, slots=1).detach()
    assert len(caught) == 1 and caught[0].filename == __file__
    with pytest.warns(RuntimeWarning, match="slots=1 per layer is fewer than the 2 e.* layer, wh"):
        moe_gpu.attach(model, slots=1, pool=False).detach()


def test_our_implementation_on_a_model_that_is_not_attached():
    model = make_model()
    model.set_experts_implementation("eager")
    moe_gpu.attach(make_model(1), slots=EXPERTS).detach()  # registers the name
    model.set_experts_implementation("moe_gpu")
    with pytest.raises(RuntimeError, match="'moe_gpu' belongs to attached models"):
        logits_of(model, prompt(0))


def test_a_block_that_computes_in_another_way(model):
    """As hub kernels do to a whole block: with slots for weights, the result would be nonsense."""
    block = model.model.layers[1].mlp

    def forward(self, hidden_states):
        return hidden_states

    block.forward = forward.__get__(block)
    with pytest.raises(ValueError, match=r"layers.1.mlp: its forward was replaced by .*forward,"):
        moe_gpu.attach(model, slots=2)
    block.forward = type(block).forward.__get__(block)  # its own after all
    moe_gpu.attach(model, slots=2).detach()
    del block.forward
