"""The way past Triton's front door launches the same, and what a call costs the host stays small."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from moe_gpu.kernels.launch import columns_of, tile_of  # noqa: E402

PROFILING = Path(__file__).parents[1] / "profiling"
# bytecode instructions of one call, Python 3.11 to 3.14: some more than were counted
MOST_INSTRUCTIONS = 1300


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    out = tmp_path_factory.mktemp("host") / "host.json"
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, PROFILING / "host_cost.py", "--out", out]
    child = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert child.returncode == 0, child.stderr[-4000:]
    return json.loads(out.read_text(encoding="utf-8"))


def test_a_second_call_launches_what_the_first_did(found):
    assert found["same"] and found["same_again"] and found["kinds"] == 1
    assert found["same_elsewhere"]  # on another device than the current one


def test_what_triton_would_compile_anew_goes_through_its_door(found):
    assert found["unaligned"] and found["strided"]
    assert found["kinds_after"] == 1  # neither is remembered


def test_host_cost_of_a_call(found):
    assert found["instructions"] <= MOST_INSTRUCTIONS
    assert found["instructions_without_out"] <= MOST_INSTRUCTIONS
    # ratios of one run: about 6.5 and 7 where this was written, so only a blunder fails
    assert found["past_us"] <= 25 * found["topk_us"], found
    assert found["past_us"] <= found["front_us"] / 2, found


@pytest.mark.parametrize(
    "E, K", [(1, 1), (8, 2), (13, 3), (16, 16), (64, 6), (512, 10), (1024, 16)]
)
def test_a_tile_fits_the_chunk_and_the_registers(E, K):
    for T in [1, 2, 3, 31, 32, 33, 10**6]:
        BLOCK_T, BLOCK_E, num_warps = tile_of(T, E, K)
        assert 32 % BLOCK_T == 0 and BLOCK_E >= E and columns_of(BLOCK_T, K) >= K
        assert BLOCK_T == 1 or BLOCK_T < 2 * T
        assert BLOCK_T * BLOCK_E <= max(256, BLOCK_E)
        assert num_warps == (1 if E <= 512 else 4)


def test_what_a_call_takes_is_one_allocation_an_output():
    from torch.utils._python_dispatch import TorchDispatchMode

    import moe_gpu
    from moe_gpu.kernels import route

    names = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    gate = moe_gpu.MoEGate(None, 8, 2, policy=moe_gpu.QualityBudget(0.05))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(route, "route_path", lambda device: "triton")
        patch.setattr(route, "launch", lambda *args: names.append("launch"))
        with Calls(), torch.no_grad():
            gate.route(torch.randn(4, 8))
    assert names.count("launch") == 1
    assert [name for name in names if "empty" in name] == ["aten.empty.memory_format"] * 2
    assert len(names) == 4, names  # and the randn above
