"""What is planned is what load() then does."""

import inspect

import pytest

import moe_gpu
from checkpoints import save
from mixtral import EXPERT_BYTES, make_model
from moe_gpu.offload import pinning

PLAN, LOAD = (inspect.getmodule(function) for function in (moe_gpu.plan_memory, moe_gpu.load))
# dense weights, KV cache and workspace of 64 tokens, as test_load.py counts them
BESIDE = 52_128 + 64 * 256 + 64 * 2_368 + 4 * 97


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(make_model(), tmp_path_factory.mktemp("mixtral"))


def slots(number):
    """A budget in which so many slots fit beside two staging slots."""
    return BESIDE + (number + 2) * EXPERT_BYTES


@pytest.mark.filterwarnings("ignore:.*experts (of|that) one token", "ignore:experts are to take")
@pytest.mark.parametrize(
    "gpu_memory, host_memory, available",
    [
        (slots(1), None, 2**30),  # a pool of one
        (slots(7), None, 2**30),
        (slots(8) - 1, 5 * EXPERT_BYTES, 2**30),
        (slots(8), 5 * EXPERT_BYTES, 2**30),  # 2K per layer: no pool any more
        (slots(9), 0, 2**30),
        (slots(14) - 1, "100KB", 2**30),
        (slots(14), "100KB", 2**30),  # all of them, since nobody needs a staging slot then
        (slots(15), "1GiB", 2**30),
        ("1GiB", "1GiB", 2**30),
        (slots(8), None, 10 * EXPERT_BYTES),  # 80 % of what is free
        (slots(8), 12 * EXPERT_BYTES, 10 * EXPERT_BYTES),  # more than is free: a warning
    ],
)
def test_plan_and_load_agree(gpu_memory, host_memory, available, folder, device, monkeypatch):
    for module in (PLAN, LOAD):
        monkeypatch.setattr(module, "available_memory", lambda: available)
    monkeypatch.setattr(pinning, "page_lock", lambda *_: None)
    monkeypatch.setattr(pinning, "page_unlock", lambda *_: None)
    budgets = {"gpu_memory": gpu_memory, "host_memory": host_memory, "context_tokens": 64}
    plan = moe_gpu.plan_memory(folder, **budgets)
    with moe_gpu.load(folder, device=device, **budgets)[1] as moe:
        metrics, offloader = moe.metrics(), moe.offloader
        assert metrics.slots == plan.device.slots
        assert offloader.is_pool == plan.device.pool
        assert metrics.staging_slots * EXPERT_BYTES == plan.device.staging_bytes
        homes, planned = dict(metrics.home_bytes), dict(plan.host.bytes)
        if device == "cpu":  # where nothing is page-locked; the plan is for CUDA
            for tiers in (homes, planned):
                tiers["pageable"] += tiers.pop("pinned")
        assert homes == planned
        experts = {id(p) for la in moe.model.model.layers for p in la.mlp.experts.parameters()}
        tensors = [*moe.model.parameters(), *moe.model.buffers()]
        dense = sum(t.nbytes for t in tensors if id(t) not in experts)
        assert dense == plan.device.dense_bytes


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_of_another_dtype(dtype, folder):
    budgets = {"gpu_memory": slots(8), "context_tokens": 64, "dtype": dtype}
    plan = moe_gpu.plan_memory(folder, **budgets)
    with moe_gpu.load(folder, **budgets, device="cpu")[1] as moe:
        assert moe.metrics().slots == plan.device.slots
        assert moe.offloader.store.layout.expert_bytes == plan.model.expert_bytes
        assert str(moe.model.dtype) == f"torch.{plan.model.dtype}"


@pytest.mark.parametrize("gpu_memory", [slots(1) - 1, 1])
def test_refused_with_the_same_words(gpu_memory, folder):
    said = []
    for function in (moe_gpu.plan_memory, moe_gpu.load):
        with pytest.raises(ValueError, match="too small") as error:
            function(folder, gpu_memory=gpu_memory, context_tokens=64)
        said.append(str(error.value))
    assert said[0] == said[1]


def test_of_a_model_that_is_there(folder):
    """attach() has the same budget."""
    plan = moe_gpu.plan_memory(folder, gpu_memory=slots(9), context_tokens=64)
    with moe_gpu.attach(make_model(), gpu_memory=slots(9), context_tokens=64) as moe:
        assert moe.metrics().slots == plan.device.slots == 8
