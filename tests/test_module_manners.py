"""MoEGate as an nn.Module: saved, moved, copied, hooked, shared and trained like any other."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn.utils import parametrize

from moe_gpu import CacheBonus, Exact, HitRateTarget, MoEGate, QualityBudget, RouterState
from moe_gpu.kernels import layout
from moe_gpu.kernels import route as route_module

TENSORS = [
    "slot_of_LE", "strength_L", "affinity_LE", "activations_LE", "counters_LC", "record_LR",
    "control_LP", "control_state_LS", "meters_LM", "scratch",
]  # fmt: skip
RUNTIME = [
    "slot_of", "strength", "affinity", "activations", "counters", "control", "control_state",
    "meters",
]  # fmt: skip


@pytest.fixture(autouse=True)
def reference_path(monkeypatch):
    """As for a user without a GPU; what the kernel computes is tested elsewhere."""
    monkeypatch.setattr(route_module, "_INTERPRET", False)


def make_gate(**options):
    return MoEGate(**{"hidden_size": 16, "num_experts": 8, "top_k": 2, **options})


def used_gate(**options):
    """A gate that has something to lose: residents, history, counts."""
    gate = make_gate(**{"policy": QualityBudget(0.5), "meters": True, **options})
    gate.set_resident([1, 6])
    route_some(gate, seed=1)
    return gate


def route_some(gate, seed, tokens=5):
    x_TD = torch.randn(tokens, 16, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return gate(x_TD.to(gate.weight))


def tensors_of(state):
    return {name: getattr(state, name).clone() for name in TENSORS}


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].dtype == want[name].dtype and torch.equal(got[name], want[name]), name


class Layers(nn.Module):
    """Gates that share one state, with timers."""

    def __init__(self, layers=2, **options):
        super().__init__()
        self.state = RouterState(layers, 8)
        options = {"state": self.state, "policy": QualityBudget(0.5), "timers": True, **options}
        self.gates = nn.ModuleList(make_gate(layer=layer, **options) for layer in range(layers))

    def forward(self, x_TD):
        return sum(gate(x_TD).weights.sum() for gate in self.gates)


# saving


def test_a_state_dict_holds_parameters_and_the_correction_bias():
    gate = used_gate()
    assert list(gate.state_dict()) == ["weight"]
    assert list(make_gate(hidden_size=None).state_dict()) == []
    biased = make_gate(correction_bias=True, score="sigmoid")
    assert list(biased.state_dict()) == ["weight", "e_score_correction_bias"]
    assert list(Layers().state_dict()) == ["gates.0.weight", "gates.1.weight"]

    twin, before = used_gate(), tensors_of(gate.state)
    twin.load_state_dict(gate.state_dict(), strict=True)
    assert torch.equal(twin.weight, gate.weight)
    gate.load_state_dict(gate.state_dict())
    assert_same(tensors_of(gate.state), before)
    with pytest.raises(RuntimeError, match="Missing key.*weight"):
        gate.load_state_dict({})


@pytest.mark.parametrize("policy", [QualityBudget(0.5), HitRateTarget(0.9, warm_tokens=3)], ids=str)
def test_a_restored_gate_goes_on_as_if_nothing_had_happened(policy, tmp_path):
    gate, twin = used_gate(policy=policy), make_gate(policy=policy, meters=True)
    torch.save([gate.state_dict(), gate.runtime_state_dict()], tmp_path / "gate.pt")
    weights, runtime = torch.load(tmp_path / "gate.pt", weights_only=True)
    twin.load_state_dict(weights)
    address = twin.affinity.data_ptr()
    twin.load_runtime_state_dict(runtime)
    assert twin.affinity.data_ptr() == address
    for seed in (2, 3):
        got, want = route_some(twin, seed), route_some(gate, seed)
        assert torch.equal(got.ids, want.ids) and torch.equal(got.weights, want.weights)
    assert_same(twin.runtime_state_dict(), gate.runtime_state_dict())
    assert twin.requests() == gate.requests() != []
    assert twin.metrics().tokens == 15 and twin.metrics().superseded == 1  # not of the first call
    assert twin.control() == gate.control()


def test_a_runtime_state_dict_is_a_copy_and_one_of_a_layer_is_its_row():
    model = Layers()
    model(torch.randn(3, 16))
    saved = model.state.runtime_state_dict()
    assert list(saved) == RUNTIME
    row = model.gates[1].runtime_state_dict()
    assert_same(row, {name: tensor[1] for name, tensor in saved.items()})
    model(torch.randn(4, 16))
    assert saved["counters"][0, layout.TOKENS] == 3

    other = Layers()
    other.state.load_runtime_state_dict(saved)
    assert_same(other.state.runtime_state_dict(), saved)
    other = Layers()
    other.gates[1].load_runtime_state_dict(row)
    assert other.gates[1].metrics().tokens == 3 and other.gates[0].metrics().tokens == 0


def test_part_of_it_can_be_restored():
    gate, twin = used_gate(), make_gate(policy=CacheBonus(0.1))
    saved = gate.runtime_state_dict()
    kept = {name: saved[name] for name in ("affinity", "activations")}
    before = twin.runtime_state_dict()
    twin.load_runtime_state_dict(kept, strict=False)
    assert_same(twin.runtime_state_dict(), before | kept)


def refused(**changes):
    saved = used_gate().runtime_state_dict() | changes
    return {name: tensor for name, tensor in saved.items() if tensor is not None}


NOT_LOADED = [
    (lambda: None, TypeError, "saved must be a mapping of names to tensors, got None"),
    (lambda: refused(affinity=None), ValueError, "missing in saved: affinity; strict=False"),
    (lambda: refused(record=torch.ones(1)), ValueError, "unknown in saved: record; known: slot_of"),
    (lambda: refused(slot_of=[0]), TypeError, r"slot_of must be a tensor, got \[0\]"),
    (
        lambda: refused(affinity=torch.ones(8).double()),
        TypeError,
        "affinity must be torch.float32, got torch.float64",
    ),
    (
        lambda: refused(meters=torch.ones(3, dtype=torch.int64)),
        ValueError,
        rf"meters must have shape \({layout.NUM_METERS},\), got \(3,\)",
    ),
    (
        lambda: refused(affinity=torch.ones(8, device="meta")),
        ValueError,
        "affinity is on the meta device",
    ),
    (lambda: refused(strength=torch.tensor(0.25)), ValueError, "layer 0 was saved under another"),
    (
        lambda: make_gate(policy=HitRateTarget(0.9)).runtime_state_dict(),
        ValueError,
        "layer 0 was saved under another policy: set that one first",
    ),
]


@pytest.mark.parametrize("saved, error, message", NOT_LOADED, ids=[row[2] for row in NOT_LOADED])
def test_what_does_not_fit_is_refused_and_changes_nothing(saved, error, message):
    gate = make_gate(policy=QualityBudget(0.5))
    route_some(gate, seed=7)
    before = tensors_of(gate.state)
    with pytest.raises(error, match=message):
        gate.load_runtime_state_dict(saved())
    assert_same(tensors_of(gate.state), before)


def test_a_controller_under_other_parameters_is_not_restored():
    state = Layers(policy=HitRateTarget(0.9)).state
    model = Layers(policy=HitRateTarget(0.9))
    model.gates[1].policy = HitRateTarget(0.8)
    with pytest.raises(ValueError, match="layer 1 was saved under another policy"):
        state.load_runtime_state_dict(model.state.runtime_state_dict())
    model = Layers(policy=Exact())
    state = Layers(policy=Exact()).state
    for policy in (CacheBonus(0.5), HitRateTarget(0.9)):  # the second starts at strength 0
        model.gates[1].policy = policy
        with pytest.raises(ValueError, match="layer 1 was saved under another policy"):
            state.load_runtime_state_dict(model.state.runtime_state_dict())


def test_residency_is_not_left_behind_by_a_state_of_more_layers():
    with pytest.raises(ValueError, match=r"slot_of must have shape \(2, 8\), got \(3, 8\)"):
        Layers().state.load_runtime_state_dict(Layers(3).state.runtime_state_dict())


# moving


@pytest.mark.parametrize(
    "convert, dtype",
    [
        (lambda gate: gate.half(), torch.float16),
        (lambda gate: gate.bfloat16(), torch.bfloat16),
        (lambda gate: gate.double(), torch.float64),
        (lambda gate: gate.half().float(), torch.float32),
        (lambda gate: gate.to(torch.bfloat16), torch.bfloat16),
        (lambda gate: gate.to("cpu", torch.float16), torch.float16),
        (lambda gate: gate.cpu(), torch.float32),
        (lambda gate: gate.share_memory(), torch.float32),
    ],
    ids=["half", "bfloat16", "double", "float", "to dtype", "to both", "cpu", "share_memory"],
)
def test_the_weight_is_converted_and_the_state_is_not(convert, dtype):
    gate = used_gate()
    before = tensors_of(gate.state)
    gate = convert(gate)
    assert gate.weight.dtype == dtype
    assert_same(tensors_of(gate.state), before)
    routing = route_some(gate, seed=2)
    assert routing.logits.dtype == dtype and gate.metrics().tokens == 10


def test_the_meta_device_keeps_nothing_and_to_empty_makes_the_state_new():
    policy = HitRateTarget(0.9, warm_tokens=0)
    new, model = Layers(policy=policy), Layers(policy=policy)
    for gate in model.gates:
        gate.set_resident([1, 6])
    model(torch.randn(3, 16))
    model.to("meta")
    assert all(getattr(model.state, name).is_meta for name in TENSORS)
    model.to_empty(device="cpu").load_state_dict(new.state_dict())
    assert_same(tensors_of(model.state), tensors_of(new.state))
    assert model.state.slot_of_LE.max() == -1 and model.state.strength_L.min() > 0
    assert model.gates[0].requests() == []
    x_TD = torch.randn(3, 16)
    assert torch.equal(model(x_TD), new(x_TD))
    assert_same(tensors_of(model.state), tensors_of(new.state))


def test_built_on_the_meta_device():
    with torch.device("meta"):
        gate = make_gate(policy=QualityBudget(0.25), correction_bias=True)
    gate.policy = HitRateTarget(0.8)  # set while there are no values
    twin = make_gate(policy=HitRateTarget(0.8), correction_bias=True)
    assert gate.weight.is_meta and gate.state.affinity_LE.is_meta
    with pytest.raises(ValueError, match="state is on the meta device: call to_empty"):
        gate.load_runtime_state_dict(twin.runtime_state_dict())
    with pytest.raises(NotImplementedError, match="to_empty"):
        gate.to("cpu")
    gate.to_empty(device="cpu").load_state_dict(twin.state_dict(), strict=True)
    assert_same(tensors_of(gate.state), tensors_of(twin.state))
    assert torch.equal(route_some(gate, seed=1).ids, route_some(twin, seed=1).ids)


def test_weights_assigned_into_a_meta_model_leave_the_state_to_be_made():
    with torch.device("meta"):
        gate = make_gate(policy=QualityBudget(0.25))
    twin = make_gate(policy=QualityBudget(0.25))
    gate.load_state_dict(twin.state_dict(), assign=True)
    with pytest.raises(ValueError, match="logits are on cpu, but the router state is on meta"):
        route_some(gate, seed=1)
    gate.state.to_empty(device="cpu")
    assert_same(tensors_of(gate.state), tensors_of(twin.state))
    assert torch.equal(route_some(gate, seed=1).ids, route_some(twin, seed=1).ids)


def test_to_empty_of_a_state_with_values_keeps_them():
    gate = used_gate()
    before = tensors_of(gate.state)
    gate.to_empty(device="cpu")
    assert_same(tensors_of(gate.state), before)


@pytest.mark.parametrize("where", ["meta", "fake"])
def test_shapes_come_out_of_a_device_without_values(where):
    mode = FakeTensorMode() if where == "fake" else torch.device("meta")
    with mode:
        gate = make_gate(policy=QualityBudget(0.5), top_k=3)
        x_TD = torch.empty(5, 16)
        logits, weights, ids = gate(x_TD.requires_grad_())
        weights.sum().backward()
    assert (logits.shape, weights.shape, ids.shape) == ((5, 8), (5, 3), (5, 3))
    assert (weights.dtype, ids.dtype) == (torch.float32, torch.int64)
    assert weights.device == ids.device == gate.weight.device
    assert gate.weight.grad.shape == (8, 16) and x_TD.grad.shape == (5, 16)


@pytest.mark.gpu
def test_to_a_gpu_and_back(tmp_path):
    gate = used_gate(timers=True)
    gate.requests()
    before = tensors_of(gate.state)
    gate.to("cuda")
    assert {t.device.type for t in tensors_of(gate.state).values()} == {"cuda"}
    route_some(gate, seed=2)
    assert sum(request.tokens for request in gate.requests()) > 0
    torch.save(gate, tmp_path / "gate.pt")
    there = torch.load(tmp_path / "gate.pt", map_location="cpu", weights_only=False)
    back = copy.deepcopy(gate).cpu()
    assert_same(tensors_of(there.state), tensors_of(back.state))
    assert there.requests() == back.requests() == gate.requests()
    assert back.state.counters_LC[0, layout.TOKENS] == before["counters_LC"][0, layout.TOKENS] + 5


# copying


def deep_copied(model, folder):
    return copy.deepcopy(model)


def saved_and_loaded(model, folder):
    torch.save(model, folder / "model.pt")
    return torch.load(folder / "model.pt", weights_only=False)


@pytest.mark.parametrize("copied", [deep_copied, saved_and_loaded])
def test_a_copy_is_whole_and_independent(copied, tmp_path):
    model = Layers(policy=HitRateTarget(0.9), meters=True)
    model.state.reserve(20_000, 1.0)  # there is a scratch that was outgrown
    model(torch.randn(3, 16))
    before = tensors_of(model.state)
    assert model.gates[1].requests() != []
    twin = copied(model, tmp_path)

    assert twin.gates[0].state is twin.gates[1].state is twin.state is not model.state
    assert_same(tensors_of(twin.state), before)
    assert twin.state._outgrown == [] and len(model.state._outgrown) == 1
    assert twin.gates[1].requests() == model.gates[1].requests()
    assert len(twin.gates[0].latencies_us()) == 1

    x_TD = torch.randn(4, 16)
    twin(x_TD)
    assert_same(tensors_of(model.state), before)
    assert sum(request.tokens for request in twin.gates[1].requests()) == 8
    assert sum(request.tokens for request in model.gates[1].requests()) == 6
    assert (twin.gates[0].metrics().tokens, model.gates[0].metrics().tokens) == (7, 3)
    assert (len(twin.gates[0].latencies_us()), len(model.gates[0].latencies_us())) == (2, 1)
    assert repr(twin) == repr(model)
    model(x_TD)
    assert_same(tensors_of(twin.state), tensors_of(model.state))
    twin.gates[1].policy = Exact()
    assert model.state.control_LP[1].any() and not twin.state.control_LP[1].any()

    twin.to("meta").to_empty(device="cpu")
    assert twin.state.control_LP[0, layout.MODE] == layout.MODE_HIT_RATE
    assert twin.state.control_LP[1, layout.MODE] == layout.MODE_OFF


# the rest of nn.Module


def test_repr_shows_what_is_not_the_default():
    assert repr(make_gate()) == "MoEGate(D=16, E=8, K=2, policy=Exact())"
    gate = make_gate(
        policy=CacheBonus(0.5), renormalize=False, decay=0.9, timers=True, score="sigmoid",
        correction_bias=True, weights_dtype=torch.float16, state=RouterState(4, 8), layer=3,
    )  # fmt: skip
    assert repr(gate) == (
        "MoEGate(D=16, E=8, K=2, layer=3 of 4, "
        "policy=CacheBonus(bonus=0.5, scale='absolute', protect=0), "
        "renormalize=False, score='sigmoid', correction_bias=True, decay=0.9, timers=True, "
        "weights_dtype=torch.float16)"
    )
    assert repr(gate.state) == "RouterState(num_layers=4, num_experts=8)"


def test_hooks():
    gate, x_TD, seen = make_gate(), torch.randn(3, 16, requires_grad=True), []
    plain = gate(x_TD)
    gate.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    gate.register_forward_hook(lambda module, args, out: out._replace(weights=out.weights * 3))
    gate.register_full_backward_pre_hook(lambda module, grads: seen.append(grads))
    gate.register_full_backward_hook(lambda module, grads_in, grads_out: seen.append(grads_in))
    routing = gate(x_TD)
    assert type(routing) is type(plain)
    assert torch.equal(routing.logits, plain.logits * 2) and torch.equal(routing.ids, plain.ids)
    routing.weights[:, 0].sum().backward()
    (grad_logits, grad_weights, _), (grad_x,) = seen
    assert grad_logits is None or not grad_logits.any()
    assert grad_weights[:, 0].eq(1).all()
    assert torch.equal(grad_x * 2, x_TD.grad)


def test_what_a_module_lists():
    model = Layers()
    assert [name for name, _ in model.named_parameters()] == ["gates.0.weight", "gates.1.weight"]
    gate = make_gate(correction_bias=True)
    assert [name for name, _ in gate.named_buffers()] == ["e_score_correction_bias"]
    visited = []
    gate.apply(visited.append)
    assert visited == [gate]
    assert gate.train().training and not gate.eval().training
    gate.register_state()
    names = [name for name, _ in gate.named_buffers()]
    assert names == ["e_score_correction_bias", *(f"state.{name}" for name in TENSORS)]
    assert list(gate.state_dict()) == ["weight", "e_score_correction_bias"]


def test_frozen_and_zeroed():
    gate = make_gate()
    gate(torch.randn(2, 16)).weights[:, 0].sum().backward()
    assert gate.weight.grad.any()
    gate.zero_grad()
    assert gate.weight.grad is None
    gate.requires_grad_(False)
    assert not gate(torch.randn(2, 16)).weights.requires_grad
    assert gate(torch.randn(2, 16, requires_grad=True)).weights.requires_grad


def test_parametrized_and_tied_weights():
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    gate, x_TD = make_gate(), torch.randn(3, 16)
    other = make_gate()
    other.weight = gate.weight
    plain = gate(x_TD).logits
    assert torch.equal(other(x_TD).logits, plain)
    assert len(list(nn.ModuleList([gate, other]).parameters())) == 1
    parametrize.register_parametrization(gate, "weight", Doubled())
    assert torch.equal(gate(x_TD).logits, 2 * plain) and gate.metrics().tokens == 6
    twin = copy.deepcopy(gate).half()
    assert twin(x_TD.half()).logits.dtype == torch.float16 and twin.metrics().tokens == 9
    assert gate.metrics().tokens == 6


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_exported_with_its_state_registered(strict):
    gate, x_TD = used_gate(), torch.randn(5, 16)
    gate.register_state()
    twin = copy.deepcopy(gate)
    program = torch.export.export(gate, (x_TD,), strict=strict).run_decompositions()
    module = program.module()
    got, want = module(x_TD), twin(x_TD)
    assert torch.equal(got[2], want.ids)
    assert torch.equal(dict(module.named_buffers())["state.counters_LC"], twin.state.counters_LC)


# several processes


def train_in_a_process(rank: int, store: str) -> None:
    """One of two processes, each with data and residents of its own."""
    from datetime import timedelta

    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=30),
    )
    torch.manual_seed(rank)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = used_gate(correction_bias=True)
            self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(8))

        def forward(self, x_TD):
            _, weights, ids = self.gate(x_TD)
            y_TD = torch.zeros_like(x_TD)
            for expert in ids.unique().tolist():
                token, k = (ids == expert).nonzero(as_tuple=True)
                y_KD = weights[token, k, None] * self.experts[expert](x_TD[token])
                y_TD = y_TD.index_add(0, token, y_KD)
            return y_TD

    def batch(rank):
        return torch.randn(3 + rank, 16, generator=torch.Generator().manual_seed(10 + rank))

    block = Block()
    block.gate.e_score_correction_bias.fill_(rank)
    block.gate.set_resident([rank])
    before = tensors_of(block.gate.state)
    model = DistributedDataParallel(block, find_unused_parameters=True)
    assert_same(tensors_of(block.gate.state), before)
    assert block.gate.e_score_correction_bias.eq(0).all()

    single = []
    for r in range(2):
        twin = copy.deepcopy(block)
        twin.gate.load_runtime_state_dict({"slot_of": resident_row(r)}, strict=False)
        twin(batch(r)).square().sum().backward()
        single.append(twin)
    model(batch(rank)).square().sum().backward()
    for (name, parameter), *ones in zip(
        block.named_parameters(), *(twin.parameters() for twin in single), strict=True
    ):
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in ones]
        got = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(
            got, (grads[0] + grads[1]) / 2, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert_same(tensors_of(block.gate.state), tensors_of(single[rank].gate.state))
    assert block.gate.metrics().tokens == 5 + 3 + rank
    distributed.destroy_process_group()


def resident_row(expert):
    return torch.full((8,), -1, dtype=torch.int32).index_fill(0, torch.tensor([expert]), 0)


def test_ddp_averages_gradients_and_leaves_the_state_of_each_process(tmp_path):
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", __file__]
    children = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store")],
            env=env | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            cwd=Path(__file__).parent,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [child.communicate(timeout=90)[1] for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0, 0], "\n".join(errors)


if __name__ == "__main__":
    train_in_a_process(int(sys.argv[1]), sys.argv[2])
