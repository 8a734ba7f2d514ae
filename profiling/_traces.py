"""What the trace scripts share: recording a torch.profiler trace, and a report of its figures."""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule, tensorboard_trace_handler

import _bench as bench

sys.path.append(str(bench.ROOT / "examples"))

from demo.trace import all_threads  # noqa: E402

# what torch itself does with CUDA graphs: replays have crashed once CUPTI was torn down and set up
os.environ.setdefault("TEARDOWN_CUPTI", "0")
os.environ.setdefault("DISABLE_CUPTI_LAZY_REINIT", "1")

SUFFIX = ".pt.trace.json.gz"  # by it the TensorBoard plugin finds a trace


def arguments(doc: str, name: str, **more: dict) -> tuple[argparse.Namespace, torch.device]:
    """Parse the command line that both scripts have; ``more`` are further options by name."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    cuda = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=cuda)
    parser.add_argument("--quick", action="store_true", help="a smoke test: few, small steps")
    out = bench.ROOT / "profiling" / "out" / name
    parser.add_argument("--out", type=Path, default=out, help="folder; a run of its own per trace")
    parser.add_argument("--stacks", action="store_true", help="record Python stacks too: slower")
    for option, keywords in more.items():
        parser.add_argument(f"--{option.replace('_', '-')}", **keywords)
    options = parser.parse_args()
    return options, torch.device(options.device)


# -- recording


def record(
    folder: Path,
    steps: Sequence[Callable[[], object]],
    device: torch.device,
    *,
    threads: bool = False,
    memory: bool = False,
    stacks: bool = False,
) -> Path:
    """Run steps under the profiler and return the trace, which appears in ``folder`` whole.

    Args:
        folder: Gets the trace, in place of an earlier one.
        steps: Marked one by one in the trace; the first one warms the profiler up and is not in it.
        device: Where they compute.
        threads: Record other threads too, such as the one that copies. Without memory: torch 2.13
            records no allocation then.
        memory: Record allocations, for TensorBoard's memory view.
        stacks: Record Python stacks.
    """
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as partial:
        with profile(
            activities=activities,
            schedule=schedule(wait=0, warmup=1, active=len(steps) - 1, repeat=1),
            # a name of ours: the default one carries the name of the machine
            on_trace_ready=tensorboard_trace_handler(partial, "moe_gpu", use_gzip=True),
            record_shapes=True,
            profile_memory=memory,
            with_stack=stacks,
            experimental_config=all_threads() if threads else None,
        ) as profiler:
            for step in steps:
                step()
                profiler.step()
        (trace,) = Path(partial).iterdir()
        for earlier in folder.glob(f"*{SUFFIX}"):
            earlier.unlink()
        return trace.replace(folder / trace.name)


def captured(step: Callable[[], object]) -> tuple[torch.cuda.CUDAGraph, object]:
    """Capture a step in a CUDA graph; return it and the step's result, which replays write to."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # compiles and allocates, which a capture must not; libraries do it per stream
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        result = step()
    return graph, result


# -- output


def report(title: str, content: Mapping) -> str:
    """Return ``content``, which has conditions and runs, as Markdown."""
    runs = {name: figures for name, figures in content["runs"].items() if "ranges" in figures}
    missing = {
        name: figures["not_measured"]
        for name, figures in content["runs"].items()
        if name not in runs
    }
    ranges = [row for name, figures in runs.items() for row in _range_rows(name, figures)]
    return "\n\n".join(
        [
            f"# {title}",
            f"Measured on: {bench.facts(content['conditions'])} Read from the traces themselves; "
            "host times include the profiler's own cost. Peaks on the host count from the start of "
            "the trace.",
            *([f"Not measured: {bench.facts(missing)}"] if missing else []),
            bench.table(ranges),
            bench.table([_total_row(name, figures) for name, figures in runs.items()]),
        ]
    )


def _range_rows(run: str, figures: Mapping) -> list[dict]:
    def total_us(item):
        return item[1]["count"] * item[1]["host_us"]

    return [
        {
            "trace": run,
            "range": name,
            "times": row["count"],
            "host, us each": row["host_us"],
            "device, us each": row["device_us"],
            "launches each": row["launches"],
            "device work each": row["device_work"],
            "on the device's line": "yes" if name in figures["device_ranges"] else "no",
        }
        for name, row in sorted(figures["ranges"].items(), key=total_us, reverse=True)
    ]


def _total_row(run: str, figures: Mapping) -> dict:
    peaks = figures["peak_bytes"] or {}
    row = {
        "trace": run,
        "peak MB, device": _megabytes(peaks.get("cuda")),
        "peak MB, host": _megabytes(peaks.get("host")),
    }
    if "bytes_by_the_books" not in figures:
        return row
    loads = figures["loads"] or {}
    overlap = loads.get("overlap")
    return row | {
        "loads": loads.get("count"),
        "MB loaded": _megabytes(loads.get("bytes")),
        "by the offloader's books": _megabytes(figures["bytes_by_the_books"]),
        "their time, us": loads.get("us"),
        "computing meanwhile": None if overlap is None else f"{overlap:.0%}",
    }


def _megabytes(count: int | None) -> float | None:
    return None if count is None else count / 1e6


def finish(title: str, folder: Path, content: dict) -> None:
    """Print the figures, write them beside the traces, and say how to look at these."""
    text = report(title, content)
    print(text)
    bench.write_whole(folder / "summary.json", json.dumps(content, indent=1) + "\n")
    bench.write_whole(folder / "summary.md", text + "\n")
    print(f"\nwrote {folder}; to look at it: tensorboard --load_fast=false --logdir {folder}")
