"""What a route call may cost, held without a GPU: bytes moved, registers, instructions.

Host instructions and launches per call are in test_launch.py and test_route_kernel.py.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import moe_gpu
from moe_gpu.kernels import layout

pytest.importorskip("triton")
PROFILING = Path(__file__).parents[1] / "profiling"
needs_interpreter = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="bytes are counted in the interpreter"
)


def least_bytes(T, E, K):
    """What must be read and written: logits, weights, ids, and the layer's state once each."""
    read = 2 * T * E + 4 * E + 4 * E  # bfloat16 logits, slots, affinity
    written = T * K * (4 + 8) + 4 * E  # weights, ids, affinity
    return read, written + 4 * (4 * E + 3)  # the step record's fields and words


@needs_interpreter
@pytest.mark.parametrize(
    "policy", [moe_gpu.Exact(), moe_gpu.QualityBudget(0.05)], ids=["off", "on"]
)
@pytest.mark.parametrize("T, E, K", [(1, 8, 2), (1, 128, 8), (4, 8, 2), (1, 256, 8)])
def test_a_small_call_moves_hardly_more_than_it_must(T, E, K, policy):
    traffic = moved(T, E, K, policy)
    read, written = least_bytes(T, E, K)
    # strength, generation; counters and activations are read and written by atomics
    atomics = 8 * layout.NUM_COUNTERS + 8 * T * K
    assert read <= traffic.read <= read + atomics + 8
    assert written <= traffic.written <= written + atomics


@needs_interpreter
def test_a_large_call_moves_little_more_than_it_must():
    T, E, K = 2000, 8, 2
    traffic = moved(T, E, K, moe_gpu.Exact())
    read, written = least_bytes(T, E, K)
    # beyond that: per program (of 32 rows) the slots, and the counts in the scratch both ways
    programs = -(-T // 32)
    assert traffic.read <= read + programs * 4 * (3 * E + 4) + 4 * E * (programs + 2) + 256
    assert traffic.written <= written + programs * 4 * (2 * E + 1) + 4 * E * (programs + 2) + 256
    assert traffic.read + traffic.written <= 1.25 * (read + written)


@needs_interpreter
def test_metering_costs_nothing_when_off():
    off = moved(1, 64, 6, moe_gpu.QualityBudget(0.05))
    on = moved(1, 64, 6, moe_gpu.QualityBudget(0.05), meters=True)
    assert on.read > off.read and on.written > off.written


def moved(T, E, K, policy, meters=False):
    from traffic import counted

    gate = moe_gpu.MoEGate(None, E, K, policy=policy, max_policy_tokens=T, meters=meters)
    gate.set_resident(range(0, E, 2))
    logits_TE = torch.randn(T, E, dtype=torch.bfloat16)
    with counted() as traffic:
        gate.route(logits_TE)
    return traffic


# registers a thread, instructions of a warp that finds everybody resident (one token), or per row
# (many): what was counted with Triton 3.6 and 3.7, and a tenth
BUDGETS = {
    (8, 2, 1): (36, 240), (128, 8, 1): (80, 490), (256, 8, 1): (108, 820),
    (8, 2, 16384): (74, 9), (128, 8, 16384): (64, 230), (256, 8, 16384): (90, 390),
}  # fmt: skip
COUNT = """
import json, sys
import aot
from _sass import Code
from moe_gpu.kernels.launch import tile_of
for E, K, T in json.loads(sys.argv[2]):
    rule = aot.OUTPUT if T == 1 else aot.EXACT
    binary, _ = aot.compile_binary(aot.Variant(E, K, T, rule=rule), sys.argv[1])
    row = aot._cuda_usage(binary) | {"call": [E, K, T]}
    if sys.argv[1] == "sm_90":
        code = Code.of(binary.asm["cubin"])
        row["instructions"] = code.paths()[0][1] if T == 1 else code.loop() / tile_of(T, E, K)[0]
    print(json.dumps(row))
"""


def check_budgets(target, calls):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = [str(Path(__file__).parent), str(PROFILING), env.get("PYTHONPATH", "")]
    env["PYTHONPATH"] = os.pathsep.join(paths)
    command = [sys.executable, "-c", COUNT, target, json.dumps(calls)]
    child = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert child.returncode == 0, child.stderr[-4000:]
    rows = [json.loads(line) for line in child.stdout.splitlines() if line.startswith("{")]
    assert [tuple(row["call"]) for row in rows] == calls
    for row in rows:
        registers, instructions = BUDGETS[tuple(row["call"])]
        assert row["spill"] == 0 and row["registers"] <= registers, row
        assert row.get("instructions", 0) <= instructions, row


def test_registers_and_instructions():
    check_budgets("sm_90", [(8, 2, 1), (128, 8, 1), (8, 2, 16384), (128, 8, 16384)])


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_registers_and_instructions_of_all(target):
    check_budgets(target, list(BUDGETS))


LISTING = """
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;                         /* 0x00000a00ff017b82 */
                                                                                  /* 0x000e220000000800 */
        /*0010*/                   MOV R2, 0x1 ;                                  /* 0x0000000000007802 */
                                                                                  /* 0x000fe20000000000 */
        /*0020*/                   IADD3 R2, R1, R2, RZ ;                         /* 0x0000000000007210 */
                                                                                  /* 0x001fca0000000000 */
        /*0030*/              @!P0 BRA `(.L_x_0) ;                                /* 0x0000000000007947 */
                                                                                  /* 0x000fea0000000000 */
        /*0040*/                   STG.E desc[UR4][R2.64], R0 ;                   /* 0x0000000002007986 */
                                                                                  /* 0x000fe2000c101904 */
.L_x_0:
        /*0050*/                   EXIT ;                                         /* 0x000000000000794d */
                                                                                  /* 0x000fea0003800000 */
"""


def test_cycles_of_a_listing(monkeypatch):
    monkeypatch.syspath_prepend(PROFILING)
    code = pytest.importorskip("_sass").Code(LISTING)
    load, move, add, branch, store, end = code.instructions
    assert [i.opcode for i in code.instructions] == ["LDC", "MOV", "IADD3", "BRA", "STG.E", "EXIT"]
    assert load.sets == [(0, 35)] and load.stall == 1  # holds scoreboard 0 for a load's latency
    assert move.sets == [] and move.stall == 1 and add.waits == [0] and add.stall == 5
    assert branch.may_be_skipped and code.target(3) == 5 and not end.may_be_skipped
    # the load at 0, the move at 1, the sum when the load is there: 35; branch at 40, then 45
    assert code.paths() == [(50, 5), (51, 6)]
    assert code.loop() is None and code.opcodes()["STG"] == 1
