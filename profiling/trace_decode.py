"""Traces of decoding with half of the experts resident: where is the copy, does it overlap.

Usage:
    python profiling/trace_decode.py                  # CUDA where there is one
    python profiling/trace_decode.py --device cpu --quick
    python profiling/trace_decode.py --prefetch next_gate background

The tiny Mixtral that comes along decodes greedily with exact routing, so that it loads at nearly
every token. Three traces: ``eager`` with every thread, ``memory`` with every allocation (the
profiler does not record both at once), and on CUDA ``graph``, all experts resident and a decode
step replayed from a CUDA graph. ``profiling/README.md`` says how to read them.
"""

import contextlib
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, StaticCache

import _bench as bench
import _traces as traces
import moe_gpu
from _trace_figures import read_trace, summarize
from moe_gpu import Exact
from moe_gpu.kernels.route import route_path
from moe_gpu.ranges import profiler_range

TINY = bench.ROOT / "examples" / "tiny_mixtral"
TEXT = "def read(path):"


class Session:
    """Decodes from a prompt, greedily, without asking the device for a token.

    Args:
        folder: Of the checkpoint.
        device: Where it computes.
        implementation: Of transformers' experts; None: its default.
    """

    def __init__(self, folder: Path, device: torch.device, implementation: str | None = None):
        self.model = AutoModelForCausalLM.from_pretrained(folder).to(device).eval()
        if implementation is not None:
            self.model.set_experts_implementation(implementation)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        self.prompt = tokenizer(TEXT, return_tensors="pt")["input_ids"].to(device)
        self.next_token = self.prompt[:, -1:].clone()  # at a fixed address, for graphs
        self.cache = None

    def prefill(self, cache=None) -> None:
        """Begin again with the prompt."""
        with profiler_range("moe_gpu::prefill"):
            out = self.model(self.prompt, past_key_values=cache, use_cache=True)
            self.cache = out.past_key_values
            self._choose(out.logits)

    def token(self) -> None:
        """Decode one token."""
        with profiler_range("moe_gpu::token"):
            self.step()

    def step(self) -> None:
        """Decode one token; can be captured, given a static cache."""
        out = self.model(self.next_token, past_key_values=self.cache, use_cache=True)
        self._choose(out.logits)

    def _choose(self, logits) -> None:
        self.next_token.copy_(logits[:, -1:].argmax(-1))


def half_resident(options, device: torch.device, tokens: int) -> dict[str, dict]:
    """Record ``eager`` and ``memory``; return their figures by name."""
    session = Session(options.model, device)
    figures = {}
    with moe_gpu.attach(
        session.model, resident=0.5, policy=Exact(), prefetch=options.prefetch
    ) as moe:

        def prefill():
            moe.reset_metrics()  # the books and the trace begin together
            session.prefill()

        session.prefill()  # compiles
        # the first step is not recorded
        steps = [session.token, prefill] + [session.token] * tokens
        for name in ("eager", "memory"):
            folder, is_memory = options.out / name, name == "memory"
            with memory_history(folder, device) if is_memory else contextlib.nullcontext():
                path = traces.record(
                    folder, steps, device,
                    threads=not is_memory, memory=is_memory, stacks=options.stacks,
                )  # fmt: skip
            figures[name] = summarize(read_trace(path))
            figures[name]["bytes_by_the_books"] = moe.metrics().bytes_loaded
        figures["memory"]["loads"] = None  # those of other threads are not in it
    return figures


@contextlib.contextmanager
def memory_history(folder: Path, device: torch.device):
    """On CUDA, also write what PyTorch's memory viewer shows; its allocator keeps the history."""
    if device.type != "cuda":
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    torch.cuda.memory._record_memory_history(stacks="python", max_entries=100_000)
    try:
        yield
        torch.cuda.memory._dump_snapshot(str(folder / "memory_snapshot.pickle"))
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)


def replayed(options, device: torch.device, tokens: int) -> dict:
    """Record ``graph``; return its figures, or why there are none."""
    if device.type != "cuda":
        return {"not_measured": "needs a CUDA device"}
    # a static shape per expert; what picks shapes on the host cannot be captured
    session = Session(options.model, device, "batched_mm")
    session.prefill()
    session.token()  # what libraries do at their first call cannot be captured
    with moe_gpu.attach(session.model, resident=1.0, policy=Exact()):
        length = session.prompt.shape[1] + tokens + 8  # the steps before the trace take some
        session.prefill(StaticCache(config=session.model.config, max_cache_len=length))
        try:
            graph, _ = traces.captured(session.step)
        except RuntimeError as error:
            return {"not_measured": f"the decode step was not captured: {error}"}

        def replay():
            with profiler_range("moe_gpu::replay"):
                graph.replay()

        path = traces.record(
            options.out / "graph", [replay] * (tokens + 1), device, stacks=options.stacks
        )
        return summarize(read_trace(path))


@torch.no_grad()
def main() -> None:
    """Record the traces, print and write their figures."""
    options, device = traces.arguments(
        __doc__,
        "trace_decode",
        model={"type": Path, "default": TINY, "help": "checkpoint folder of a supported family"},
        prefetch={"nargs": "*", "default": [], "help": "predictors, as attach() takes them"},
    )
    tokens = 3 if options.quick else 16
    runs = half_resident(options, device, tokens)
    runs["graph"] = replayed(options, device, tokens)
    content = {
        "conditions": bench.conditions(
            device, quick=options.quick or None, route_path=route_path(device),
            model=options.model.name, decoded_tokens=tokens,
            resident="half", policy="Exact()", prefetch=", ".join(options.prefetch) or None,
        ),
        "runs": runs,
    }  # fmt: skip
    traces.finish("Decoding with half of the experts resident, traced", options.out, content)


if __name__ == "__main__":
    main()
