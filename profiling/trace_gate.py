"""Traces of gate calls: the projection, then one launch.

Usage:
    python profiling/trace_gate.py                  # CUDA where there is one
    python profiling/trace_gate.py --device cpu --quick

A gate of Mixtral's sizes with half of the experts resident routes one token, a batch and a prefill,
called eagerly and, on CUDA, replayed from CUDA graphs. ``profiling/README.md`` says how to read
the traces.
"""

import torch
from torch.nn import functional as F

import _bench as bench
import _traces as traces
from _trace_figures import read_trace, summarize
from moe_gpu import MoEGate, QualityBudget
from moe_gpu.kernels.route import route_path
from moe_gpu.ranges import profiler_range

EXPERTS, TOP_K = 8, 2
TOKENS = (1, 64, 4096)  # a decode step, a batch of them, a prefill


class Calls:
    """One gate and its inputs, for each number of tokens.

    Args:
        device: Where it routes.
        hidden_size: D.
        tokens: T of each call.
    """

    def __init__(self, device: torch.device, hidden_size: int, tokens: tuple[int, ...]):
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        options = {"policy": QualityBudget(0.05), "device": device, "dtype": dtype}
        self.gate = MoEGate(hidden_size, EXPERTS, TOP_K, **options)
        self.gate.set_resident(range(EXPERTS // 2))
        self.inputs = {T: torch.randn(T, hidden_size, device=device, dtype=dtype) for T in tokens}
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, object]] = {}

    def eager(self) -> None:
        """Call the gate once per number of tokens: what ``gate(x)`` does, in two ranges."""
        for T, x_TD in self.inputs.items():
            with profiler_range(f"moe_gpu::project T={T}"):
                logits_TE = F.linear(x_TD, self.gate.weight)
            with profiler_range(f"moe_gpu::route T={T}"):
                self.gate.route(logits_TE)

    def capture(self) -> None:
        """Capture each call in a graph of its own."""
        for T, x_TD in self.inputs.items():
            self.graphs[T] = traces.captured(lambda x_TD=x_TD: self.gate(x_TD))

    def replay(self) -> None:
        """Replay each graph once."""
        for T, (graph, _) in self.graphs.items():
            with profiler_range(f"moe_gpu::replay T={T}"):
                graph.replay()


@torch.no_grad()
def main() -> None:
    """Record the traces, print and write their figures."""
    options, device = traces.arguments(__doc__, "trace_gate")
    hidden_size, tokens, steps = (256, (1, 4, 80), 3) if options.quick else (4096, TOKENS, 10)
    calls = Calls(device, hidden_size, tokens)
    how = {"memory": True, "stacks": options.stacks}
    calls.eager()  # compiles
    runs = {"eager": traces.record(options.out / "eager", [calls.eager] * steps, device, **how)}
    if device.type == "cuda":
        calls.capture()
        runs["graph"] = traces.record(options.out / "graph", [calls.replay] * steps, device, **how)
    content = {
        "conditions": bench.conditions(
            device, quick=options.quick or None, route_path=route_path(device),
            hidden_size=hidden_size, experts=EXPERTS, top_k=TOP_K, steps=steps - 1,
        ),
        "runs": {name: summarize(read_trace(path)) for name, path in runs.items()},
    }  # fmt: skip
    if device.type != "cuda":
        content["runs"]["graph"] = {"not_measured": "needs a CUDA device"}
    traces.finish("Gate calls, traced", options.out, content)


if __name__ == "__main__":
    main()
