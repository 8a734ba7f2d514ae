"""What a route call costs the host on a machine without a GPU: all of it but the driver's launch.

Run as a script with TRITON_INTERPRET unset. A stand-in for Triton's CUDA driver compiles for a GPU
that is not there and records launches; tensors are on the CPU. Prints one JSON line.
"""

import json
import statistics
import sys
import time

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver


class Launches:
    """Launcher of one compiled kernel: keeps the arguments of every launch."""

    calls: list = []

    def __init__(self, source, metadata):
        self.constant_paths = set(source.constants)

    def __call__(self, x, y, z, stream, function, metadata, launch_metadata, enter, exit_, *args):
        Launches.calls.append(((x, y, z), stream, function, metadata, args, self.constant_paths))


class Driver:
    """As much of Triton's CUDA driver as a launch asks for. CPU tensors have no device index."""

    launcher_cls = Launches

    class utils:
        load_binary = staticmethod(lambda *args: (1, 2, 32, 0, 1024))
        get_device_properties = staticmethod(lambda device: {"max_shared_mem": 232448})

    def get_current_device(self):
        return None

    def get_current_stream(self, device):
        return 7

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def map_python_to_cpp_type(self, name):
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


def median_us(work, calls: int = 300, rounds: int = 5) -> float:
    """Return the median over rounds of the mean time of a call."""
    took = []
    for _ in range(rounds):
        start_s = time.perf_counter()
        for _ in range(calls):
            work()
        took.append((time.perf_counter() - start_s) / calls * 1e6)
    return statistics.median(took)


def same(a, b) -> bool:
    """Whether two launches are one: constants are not looked at, the kernel holds them."""
    if a[:4] != b[:4] or len(a[4]) != len(b[4]):
        return False
    pairs = zip(a[4], b[4], strict=True)
    return all(x is y or (type(x) is type(y) and x == y) for x, y in pairs)


def main() -> None:
    """Compare a launch through Triton's front door with one past it, and count."""
    driver.set_active(Driver())
    import moe_gpu
    from moe_gpu.kernels import launch, route

    torch.set_num_threads(1)
    route.route_path = lambda device: "triton"  # CPU tensors, but the kernel's path
    E, K = 64, 6
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
        found["front_us"] = median_us(
            lambda: (launch._compiled.clear(), gate.route(logits_TE, out=out)), 60
        )
        launch._compiled.update(known)

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
        found["past_us"] = median_us(work)
        found["topk_us"] = median_us(lambda: torch.topk(out[0], 2))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
