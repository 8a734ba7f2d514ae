"""A model split over several devices: one offloader and one router state for each.

There is one CPU here, so all but the last test tell ``attach`` that the layers are on two devices
while both are that one: all of it runs but the copies between them.
"""

import os
import socket
import time
from datetime import timedelta

import pytest
import torch
from transformers import MixtralForCausalLM

import moe_gpu
from children import exit_status_of_fork
from mixtral import (  # noqa: F401 - the last is a fixture that runs by itself
    EXPERTS,
    logits_of,
    make_model,
    prompt,
    text_of,
    without_interpreter,
)
from moe_gpu import Exact, QualityBudget
from moe_gpu.huggingface import part
from moe_gpu.tuning.quality import Evaluation

LAYERS = 5
SPLIT = [[0, 2, 3], [1, 4]]  # not even in runs


@pytest.fixture
def two_devices(monkeypatch):
    place = {f"model.layers.{n}.mlp": device for device, run in enumerate(SPLIT) for n in run}
    monkeypatch.setattr(part, "device_of", lambda block: place[block.name])


def make(seed=0):
    return make_model(seed, num_hidden_layers=LAYERS)


def test_computes_and_counts_as_on_one_device(monkeypatch):
    model = make()
    kept = {"slots": 4, "policy": QualityBudget(0.3), "meters": True}
    with moe_gpu.attach(model, **kept) as moe:
        want = text_of(model, prompt(0)), logits_of(model, prompt(1, tokens=3))
        whole, state = moe.metrics(), moe.state
        residency, control = [moe.offloader.residents(n) for n in range(LAYERS)], moe.control()
    place = {f"model.layers.{n}.mlp": device for device, run in enumerate(SPLIT) for n in run}
    monkeypatch.setattr(part, "device_of", lambda block: place[block.name])
    with moe_gpu.attach(model, **kept) as moe:
        assert [numbers for _, numbers in moe.layers_of_devices] == SPLIT
        got = text_of(model, prompt(0)), logits_of(model, prompt(1, tokens=3))
        metrics, states = moe.metrics(), moe.states
        found = [offloader.residents(n) for offloader, numbers in zip(moe.offloaders, SPLIT,
                 strict=True) for n in range(len(numbers))]  # fmt: skip
        assert moe.control() == control
        assert "3 layers on cpu, 4 of 8" in repr(moe) and "2 layers on cpu, 4 of 8" in repr(moe)
        assert moe.status()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert found == [residency[number] for numbers in SPLIT for number in numbers]
    for split_state, numbers in zip(states, SPLIT, strict=True):
        for name in ("affinity_LE", "activations_LE", "counters_LC", "slot_of_LE"):
            assert torch.equal(getattr(split_state, name), getattr(state, name)[numbers]), name
    timed = {"route_us_p50", "route_us_p99", "stall_ms", "layers", "staging_slots"}
    for name, value in vars(whole).items():
        if name not in timed and not name.startswith("route"):
            assert getattr(metrics, name) == value, name
    assert metrics.swaps > 0 and metrics.loads > 0
    assert [layer.layer for layer in metrics.layers] == list(range(LAYERS))
    same = [(x.loads, x.hits, x.moved_mass_p99) for x in whole.layers]
    assert [(x.loads, x.hits, x.moved_mass_p99) for x in metrics.layers] == same
    assert metrics.staging_slots == 2 * whole.staging_slots


def test_which_one_must_be_said(two_devices):
    with moe_gpu.attach(make(), slots=4) as moe:
        for name in ("state", "offloader"):
            with pytest.raises(RuntimeError, match=f"split over 2 devices.*use {name}s"):
                getattr(moe, name)
        assert len(moe.gates) == LAYERS and [g.layer for g in moe.gates] == [0, 0, 1, 2, 1]


def test_policies_go_to_their_layers(two_devices):
    scaled = QualityBudget(0.1, layer_scale=(1.0, 2.0, 3.0, 4.0, 5.0))
    with moe_gpu.attach(make(), slots=4, policy=scaled) as moe:
        strengths = [c.strength for c in moe.control()]
        assert strengths == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
        moe.set_policy(QualityBudget(1.0, layer_scale=(5.0, 4.0, 3.0, 2.0, 1.0)))
        assert [c.strength for c in moe.control()] == [5.0, 4.0, 3.0, 2.0, 1.0]
        with pytest.raises(ValueError, match="layer_scale must have 5 factors"):
            moe.set_policy(QualityBudget(1.0, layer_scale=(1.0, 1.0)))
        assert [c.strength for c in moe.control()] == [5.0, 4.0, 3.0, 2.0, 1.0]
        moe.set_policy(Exact())


def test_detach_gives_everything_back(two_devices):
    model, plain = make(), make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    moe = moe_gpu.attach(model, slots=3)
    logits_of(model, prompt(0))
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    moe.detach()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert torch.equal(text_of(model, prompt(0)), text_of(plain, prompt(0)))
    for layer in model.model.layers:
        assert "forward" not in layer.mlp.gate.__dict__


def test_a_failure_of_the_second_device_changes_nothing(two_devices, monkeypatch):
    model = make()
    before = logits_of(model, prompt(0))
    own, made = part.ExpertOffloader, []

    def fails_once(*arguments, **others):
        made.append(1)
        if len(made) == 2:
            raise MemoryError("no room for slots")
        return own(*arguments, **others)

    monkeypatch.setattr(part, "ExpertOffloader", fails_once)
    with pytest.raises(MemoryError, match="no room"):
        moe_gpu.attach(model, slots=3)
    assert torch.equal(logits_of(model, prompt(0)), before)


def test_warm_restart_and_reset(two_devices, tmp_path, monkeypatch):
    model, path = make(), tmp_path / "residency.safetensors"
    with moe_gpu.attach(model, slots=3, policy=Exact(), audit=1.0, timers=True) as moe:
        text_of(model, prompt(0))
        moe.save_residency(path)
        kept = [state.affinity_LE.clone() for state in moe.states]
        who = [o.residents(0) for o in moe.offloaders]
        assert moe.audit().sampled == 0
        moe.reset_metrics()
        assert moe.metrics().tokens == moe.metrics().loads == 0
    with moe_gpu.attach(model, slots=3, policy=Exact(), residency=path) as moe:
        assert all(torch.equal(s.affinity_LE, k) for s, k in zip(moe.states, kept, strict=True))
        assert [o.residents(0) for o in moe.offloaders] == who
    monkeypatch.undo()  # the file knows layers, not devices
    with moe_gpu.attach(model, slots=3, policy=Exact(), residency=path) as moe:
        assert moe.offloader.residents(1) == who[1]


def test_one_forward_at_a_time_holds_every_device(two_devices):
    with moe_gpu.attach(make(), slots=3) as moe:
        assert moe.offloaders[0].lock is moe.offloaders[1].lock


def test_everything_resident_trains(two_devices):
    model = make().train()
    ids = prompt(0)
    with moe_gpu.attach(model, resident=1.0, policy=Exact()) as moe:
        assert moe.all_resident
        model(ids, labels=ids).loss.backward()
    twin = make().train()
    twin(ids, labels=ids).loss.backward()
    for own, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX only")
def test_a_forked_child_has_one_lock_too(two_devices):
    with moe_gpu.attach(make(), slots=3) as moe:
        own = moe.offloaders[0].lock

        def child():
            assert moe.offloaders[0].lock is moe.offloaders[1].lock is not own

        assert exit_status_of_fork(child) == 0


# -- refusals


def split_by_hand(model):
    model.lm_head.to("meta")
    model.hf_device_map = {"": "cpu", "lm_head": "meta"}
    return model


def test_refusals():
    model = split_by_hand(make())
    with pytest.raises(ValueError, match="device='cpu' would move the whole model.*leave it out"):
        moe_gpu.attach(model, slots=2, device="cpu")
    with pytest.raises(ValueError, match="gpu_memory is for a model on one device.*give slots"):
        moe_gpu.attach(model, gpu_memory="1GiB")
    model = make()
    model.model.layers[1].mlp.gate.to("meta")
    model.hf_device_map = {"": "cpu"}
    with pytest.raises(ValueError, match="its router is on meta, its experts on cpu: put both"):
        moe_gpu.attach(model, slots=2)


def test_a_device_map_of_dense_parts_elsewhere_is_fine():
    """Only MoE layers decide: an embedding on another device stays there."""
    model = split_by_hand(make())
    with moe_gpu.attach(model, slots=2) as moe:
        assert model.lm_head.weight.is_meta and len(moe.states) == 1
    assert model.lm_head.weight.is_meta


def test_tuning_asks_for_one_device(two_devices):
    with (
        moe_gpu.attach(make(), slots=3) as moe,
        pytest.raises(ValueError, match=r"split over several devices cannot be evaluated.*detach"),
    ):
        Evaluation(moe, prompt(0, batch=2))


def test_sharded_weights_are_refused(tmp_path):
    from torch import distributed
    from torch.distributed.tensor import distribute_tensor, init_device_mesh

    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = make()
        experts = model.model.layers[1].mlp.experts
        mesh = init_device_mesh("cpu", (1,))
        experts.down_proj = torch.nn.Parameter(distribute_tensor(experts.down_proj.data, mesh))
        with pytest.raises(ValueError, match=r"over processes, such as .*layers.1.*\.down_proj"):
            moe_gpu.attach(model, slots=2)
    finally:
        distributed.destroy_process_group()


def refused_under_tensor_parallelism(rank, port, folder):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    model = MixtralForCausalLM.from_pretrained(folder, tp_plan="auto")
    with pytest.raises(ValueError, match="sharded over processes, such as .*gate_up_proj"):
        moe_gpu.attach(model, slots=2)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="transformers would shard over the GPUs")
def test_tensor_parallelism_of_transformers_is_refused_in_each_process(tmp_path):
    pytest.importorskip("accelerate")  # transformers asks for it
    make().save_pretrained(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.start_processes(
        refused_under_tensor_parallelism, (port, str(tmp_path)), nprocs=2, join=False,
        start_method="spawn",
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not context.join(timeout=5):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            pytest.fail("two processes did not end within 120 s")


def test_expert_parallelism_is_refused():
    model = make()
    model.model.layers[0].mlp.experts._is_expert_parallel = True
    with pytest.raises(ValueError, match="sharded over processes.*without tp_plan"):
        moe_gpu.attach(model, slots=2)
    model = make()
    model._tp_size = 2
    with pytest.raises(ValueError, match="sharded over processes"):
        moe_gpu.attach(model, slots=2)


@pytest.mark.gpu
def test_a_gpu_and_the_cpu():
    """What a device_map does, by hand: layers where they are put, inputs moved to them."""
    model = make()
    want = text_of(model, prompt(0))

    def follow(module, args, kwargs):
        device = next(module.parameters()).device
        move = lambda x: x.to(device) if isinstance(x, torch.Tensor) else x  # noqa: E731
        kwargs = {
            name: tuple(map(move, x)) if isinstance(x, tuple) else move(x)
            for name, x in kwargs.items()
        }
        return tuple(map(move, args)), kwargs

    for name, module in model.model.named_children():
        if name != "layers":
            module.cuda()
    model.lm_head.cuda()
    for number, layer in enumerate(model.model.layers):
        layer.to("cuda" if number % 2 else "cpu")
    for module in [*model.model.layers, model.model.norm, model.lm_head]:
        module.register_forward_pre_hook(follow, with_kwargs=True)
    model.hf_device_map = {"": "cuda"}
    with moe_gpu.attach(model, slots=3, policy=Exact()) as moe:
        assert [str(device) for device, _ in moe.layers_of_devices] == ["cpu", "cuda:0"]
        assert torch.equal(text_of(model, prompt(0).cuda()).cpu(), want)
        assert moe.metrics().loads > 0
    assert isinstance(model, MixtralForCausalLM) and EXPERTS == 8
