"""What a route call costs the host: all of it but the driver's own launch. Needs no GPU.

Usage:
    python profiling/host_cost.py

A stand-in for Triton's CUDA driver compiles for a GPU that is not there and records what is launched;
tensors are on the CPU. So Python, checks, allocations and Triton's part of a launch are as on a GPU,
and what ``cuLaunchKernel`` and the launcher in C around it take is left out. Writes
``profiling/results/host.json`` and ``.md``, and says whether a launch past Triton's front door
(:mod:`moe_gpu.kernels.launch`) is the one that goes through it.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import _bench as bench


class Launches:
    """Launcher of one compiled kernel: keeps the arguments of every launch."""

    calls: list = []

    def __init__(self, source, metadata):
        self.constant_paths = set(source.constants)

    def __call__(self, x, y, z, stream, function, metadata, launch_metadata, enter, exit_, *args):
        """Record a launch."""
        Launches.calls.append(((x, y, z), stream, function, metadata, args, self.constant_paths))


class Driver:
    """As much of Triton's CUDA driver as a launch asks for. CPU tensors have no device index."""

    launcher_cls = Launches

    class utils:
        """Loads nothing."""

        load_binary = staticmethod(lambda *args: (1, 2, 32, 0, 1024))
        get_device_properties = staticmethod(lambda device: {"max_shared_mem": 232448})

    current = None

    def get_current_device(self):
        """No index, as of the tensors."""
        return self.current

    def get_current_stream(self, device):
        """Any handle."""
        return 7

    def get_current_target(self):
        """What to compile for."""
        return GPUTarget("cuda", 90, 32)

    def map_python_to_cpp_type(self, name):
        """Unused by this launcher."""
        return name


def python_instructions(work) -> int:
    """Return how many bytecode instructions one call executes."""
    count = 0

    def trace(frame, event, arg):
        nonlocal count
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        count += event == "opcode"
        return trace

    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(None)
    return count


def least_us(work, calls: int = 200, rounds: int = 20) -> float:
    """Return the mean time of a call in the least disturbed round."""
    took = []
    for _ in range(rounds):
        start_s = time.perf_counter()
        for _ in range(calls):
            work()
        took.append((time.perf_counter() - start_s) / calls * 1e6)
    return min(took)


def same(a, b) -> bool:
    """Whether two launches are one: constants are not looked at, the kernel holds them."""
    if a[:4] != b[:4] or len(a[4]) != len(b[4]):
        return False
    pairs = zip(a[4], b[4], strict=True)
    return all(x is y or (type(x) is type(y) and x == y) for x, y in pairs)


def measure() -> dict:
    """Compare a launch through Triton's front door with one past it, count and time."""
    driver.set_active(Driver())
    import moe_gpu
    from moe_gpu.kernels import launch, route

    torch.set_num_threads(1)
    route.route_path = lambda device: "triton"  # CPU tensors, but the kernel's path
    E, K, kernel = 64, 6, launch.route_kernel
    policy = moe_gpu.QualityBudget(0.05)
    gate = moe_gpu.MoEGate(None, E, K, policy=policy).eval()
    logits_TE = torch.randn(1, E, dtype=torch.bfloat16)
    out = (torch.empty(1, K), torch.empty(1, K, dtype=torch.int64))

    def launched(work):
        Launches.calls.clear()
        work()
        (call,) = Launches.calls
        return call

    found = {}
    with torch.no_grad():
        front = launched(lambda: gate.route(logits_TE, out=out))
        past = launched(lambda: gate.route(logits_TE, out=out))
        found["same"] = same(front, past)
        found["kinds"] = len(launch._compiled)
        # the front door again
        known = dict(launch._compiled)
        launch._compiled.clear()
        found["same_again"] = same(front, launched(lambda: gate.route(logits_TE, out=out)))
        found["front_us"] = least_us(
            lambda: (launch._compiled.clear(), gate.route(logits_TE, out=out)), 40
        )
        launch._compiled.update(known)

        # tensors of another device than the current one go past the door too
        Driver.current, launch.route_kernel = 1, None
        found["same_elsewhere"] = same(front, launched(lambda: gate.route(logits_TE, out=out)))
        Driver.current, launch.route_kernel = None, kernel

        # a pointer that is not aligned is another kernel to Triton
        behind = torch.randn(E + 1, dtype=torch.bfloat16)[1:].reshape(1, E)
        odd = launched(lambda: gate.route(behind, out=out))
        odd_again = launched(lambda: gate.route(behind, out=out))
        found["unaligned"] = odd[4][0] is odd_again[4][0] is behind and odd[5] == front[5]
        strided = torch.randn(1, 2 * E, dtype=torch.bfloat16)[:, ::2]
        found["strided"] = launched(lambda: gate.route(strided, out=out))[4][1:3] == (2 * E, 2)
        found["kinds_after"] = len(launch._compiled)

        work = lambda: gate.route(logits_TE, out=out)  # noqa: E731
        found["instructions"] = python_instructions(work)
        found["instructions_without_out"] = python_instructions(lambda: gate.route(logits_TE))
        found["past_us"] = least_us(work)
        found["topk_us"] = least_us(lambda: torch.topk(out[0], 2))
        found["without_out_us"] = least_us(lambda: gate.route(logits_TE))
        found["outputs_us"] = least_us(
            lambda: (torch.empty(1, K), torch.empty(1, K, dtype=torch.int64))
        )
    return found


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=bench.RESULTS / "host.json")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("the interpreter launches nothing: unset TRITON_INTERPRET")
    conditions = bench.conditions(torch.device("cpu"))
    found = measure()
    rows = [
        {"call": name, "us": found[key], "over torch.topk": found[key] / found["topk_us"]}
        for name, key in (
            ("gate.route(logits, out=...)", "past_us"),
            ("gate.route(logits)", "without_out_us"),
            ("gate.route(logits, out=...) through Triton's front door", "front_us"),
            ("two torch.empty", "outputs_us"),
            ("torch.topk of 6 numbers on the CPU", "topk_us"),
        )
    ]
    text = "\n\n".join(
        [
            "# What a route call costs the host, less the driver's launch",
            bench.table(rows),
            f"Bytecode instructions of a call: {found['instructions']:,}, "
            f"{found['instructions_without_out']:,} without out.",
            f"Measured on: {bench.facts(conditions)}",
        ]
    )
    print(text)
    bench.write_whole(options.out, json.dumps({"conditions": conditions} | found, indent=1) + "\n")
    bench.write_whole(options.out.with_suffix(".md"), text + "\n")


if __name__ == "__main__":
    sys.exit(main())
