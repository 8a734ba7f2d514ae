"""What load() holds in memory, measured in a process of its own: never a layer too much.

    anonymous memory <= 1.2 x (host budget + dense weights) + slots

The slots are on the CPU here, else they would be in the memory of the GPU. File pages do not
count: the system takes them back when it needs them. In bfloat16, as stored:

    experts   4 layers x 8 of 3 x 512 x 1,024 x 2 bytes = 3.1 MB each, 25.2 MB a layer, 101 MB
    host      20 MB, in which 6 experts fit: less than a layer
    dense     4 layers x (2 x 512 x 512 + 2 x 256 x 512 + 10 x 512), 195 x 512, x 2 bytes = 6.5 MB
    slots     3 of a pool, and 2 staging slots: 15.7 MB
    slack     0.2 x (20 + 6.5) = 5.3 MB, and 1 MB of the host budget that no expert fits into

Loaded as float32 experts, dense weights and slots are twice as large, and 3 experts fit.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import MixtralForCausalLM

from checkpoints import save
from mixtral import make_config

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")

HOST = 20_000_000
EXPERT = 3 * 512 * 1024 * 2
CASES = {  # name: checkpoint, how, dtype
    "separate": ("separate", "load", "bfloat16"),
    "packed": ("packed", "load", "bfloat16"),
    "converted": ("separate", "load", "float32"),
    "layer": ("separate", "layer", "bfloat16"),
    "attach": ("separate", "attach", "bfloat16"),
}

CHILD = """
import json, os, re, sys, threading, warnings
from pathlib import Path
import torch, moe_gpu
from moe_gpu.offload import ExpertStore
from transformers import AutoModelForCausalLM
from transformers.utils import logging

cases, parent, host_memory = json.loads(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
logging.disable_progress_bar()
warnings.simplefilter("ignore")
torch.set_num_threads(1)


def anonymous():
    (kb,) = re.findall(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text())
    return int(kb) * 1024


def work(folder, how, dtype, **arguments):
    if how == "attach":
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        moe = moe_gpu.attach(model, resident=0.1)
    else:
        model, moe = moe_gpu.load(folder, resident=0.1, dtype=dtype, **arguments)
    model.generate(torch.tensor([[5, 7, 11]]), max_new_tokens=5, do_sample=False)
    return model, moe


def materialise(store, layer, progress, read=ExpertStore.read):
    whole = torch.ones(store.num_experts, store.layout.expert_bytes, dtype=torch.uint8)
    read(store, layer, progress)


def measure(folder, how, dtype):
    # what is allocated once and for good, such as the scratch memory of products of these sizes
    work(parent / "small", how, dtype)[1].detach()
    if how == "layer":
        ExpertStore.read = materialise
    before, peak, over = anonymous(), 0, threading.Event()

    def sample():
        nonlocal peak
        while not over.wait(0.001):
            peak = max(peak, anonymous())

    sampler = threading.Thread(target=sample)
    sampler.start()
    model, moe = work(parent / folder, how, dtype, host_memory=host_memory)
    over.set()
    sampler.join()
    experts = {id(p) for layer in model.model.layers for p in layer.mlp.experts.parameters()}
    metrics, expert_bytes = moe.metrics(), moe.offloader.store.layout.expert_bytes
    return {
        "peak": peak - before,
        "dense": sum(p.nbytes for p in model.parameters() if id(p) not in experts),
        "slots": (metrics.slots + metrics.staging_slots) * expert_bytes,
        "homes": metrics.home_bytes,
        "loads": metrics.loads_by_tier,
    }


for name, case in cases.items():  # a process for each, but one import for all
    if os.fork() == 0:
        print(json.dumps({name: measure(*case)}), flush=True)
        os._exit(0)
    if os.wait()[1]:
        sys.exit(f"{name} failed")
"""


def random_model(**sizes):
    with torch.device("meta"):
        model = MixtralForCausalLM(make_config(hidden_size=512, intermediate_size=1024, **sizes))
    model.bfloat16().to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.uniform_(parameter, -0.1, 0.1)
    return model


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Measure every case; ``{name: figures}``."""
    parent = tmp_path_factory.mktemp("large")
    save(random_model(num_hidden_layers=1, num_local_experts=2), parent / "small")
    model = random_model(num_hidden_layers=4)
    for packed in (False, True):
        save(model, parent / ("packed" if packed else "separate"), packed=packed)
    arguments = [json.dumps(CASES), str(parent), str(HOST)]
    # freed memory goes back at once: none of it hides what is taken later
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", CHILD, *arguments]
    try:
        child = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    finally:
        for file in parent.rglob("*.safetensors"):  # pytest would keep them
            file.unlink()
    assert child.returncode == 0, child.stderr
    figures = {}
    for line in child.stdout.splitlines():
        figures |= json.loads(line)
    for case in figures.values():
        case["bound"] = 1.2 * (HOST + case["dense"]) + case["slots"]
    return figures


@pytest.mark.parametrize("name, width", [("separate", 1), ("packed", 1), ("converted", 2)])
def test_load_and_generate_stay_within_the_budget(name, width, found):
    case = found[name]
    in_memory = 6 // width
    assert case["homes"] == {
        "pinned": 0,
        "pageable": in_memory * width * EXPERT,
        "disk": (32 - in_memory) * width * EXPERT,
    }
    assert case["slots"] == (3 + 2) * width * EXPERT
    assert case["dense"] == pytest.approx(width * 6.53e6, rel=0.01)
    assert case["loads"]["disk"] > 20
    assert case["peak"] <= case["bound"], case
    # what is measured is really there
    assert case["peak"] > case["homes"]["pageable"] + case["dense"] + case["slots"] - 1e6


@pytest.mark.parametrize("name", ["layer", "attach"])
def test_the_measurement_sees_a_layer_too_much(name, found):
    assert found[name]["peak"] > found[name]["bound"], found[name]
