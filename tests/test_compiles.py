"""Every shipped kernel variant compiles to machine code for every GPU, on a machine without one.

The interpreter checks what a kernel means; it accepts programs that the compiler refuses, and
knows no registers. Compiling runs in child processes because conftest may have switched this one
to the interpreter.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import aot

pytest.importorskip("triton")


def compile_in_child(target, indices):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(aot.__file__)), target, *map(str, indices)]
    child = subprocess.run(command, env=env, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr[-4000:]
    rows = [json.loads(line) for line in child.stdout.splitlines() if line.startswith("{")]
    assert [row["index"] for row in rows] == list(indices)
    return rows


def check(target, indices):
    spilled = {
        str(aot.ALL[row["index"]]): row for row in compile_in_child(target, indices) if row["spill"]
    }
    assert not spilled, f"{target} keeps registers in memory"


@pytest.mark.parametrize("target", aot.TARGETS)
def test_sample_compiles_without_spills(target):
    check(target, [i for t, i in aot.sample() if t == target])


@pytest.mark.parametrize("variants", [aot.MEASURED, aot.SCORED], ids=["measured", "scored"])
def test_additions_compile_without_spills(variants):
    indices = aot.light(variants)
    assert len(indices) > 5
    check("sm_90", indices)


def test_strided_logits_are_not_loaded_as_if_they_were_contiguous():
    """The interpreter cannot tell: a hint of contiguity means nothing there."""
    code = (
        "import aot\n"
        "binary, _ = aot.compile_binary(aot.Variant(256, 8, 1, contiguous=False), 'sm_90')\n"
        "print(binary.asm['ptx'])\n"
    )
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = [str(Path(aot.__file__).parent), env.get("PYTHONPATH", "")]
    env["PYTHONPATH"] = os.pathsep.join(paths)
    child = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr[-4000:]
    # 256 bfloat16 over 32 threads, each loaded by itself
    assert child.stdout.count("ld.global.b16") == 8


@pytest.mark.slow
@pytest.mark.parametrize("target", aot.TARGETS)
def test_everything_compiles_without_spills(target):
    check(target, [i for t, i in aot.everything() if t == target])


def test_the_sample_is_what_the_issue_asks():
    pairs = aot.sample()
    assert 35 <= len(pairs) <= 45
    assert {target for target, _ in pairs} == set(aot.TARGETS)
    seen = [aot.VARIANTS[i] for _, i in pairs]
    for values in (
        {v.rule for v in seen} ^ {aot.EXACT, aot.BONUS, aot.RANGE_BONUS, aot.MASS, aot.OUTPUT},
        {v.dtype for v in seen} ^ {"fp32", "fp16", "bf16"},
        {v.T for v in seen} ^ set(aot.SIZES),
    ):
        assert not values
