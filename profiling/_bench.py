"""What the benchmarks share: conditions, tables, files that appear whole; clocks of ``_timing``."""

import argparse
import csv
import io
import json
import os
import platform
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, MixtralConfig

from _timing import (  # noqa: F401 - the scripts find all they share here
    Replay,
    cold_s,
    copy_bytes_per_s,
    difference,
    eager_s,
    elapsed_s,
    flush_buffer,
    interleave,
    l2_bytes,
    percentiles,
    ratio,
    spread,
    synchronize,
)
from moe_gpu.kernels.route import route_path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "profiling" / "results"
NOT_MEASURED = "not measured"


def arguments(
    doc: str, name: str, **more: dict
) -> tuple[argparse.Namespace, torch.device, Callable[..., None]]:
    """Parse the command line that every benchmark has.

    Args:
        doc: Module docstring; its first line is the description.
        name: Of the benchmark; its results are called so.
        more: Further options, ``add_argument``'s keywords by name.

    Returns:
        The options, the device, and the function that writes results, table and, if given, the
        rows of a CSV file.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    cuda = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=cuda)
    parser.add_argument(
        "--quick", action="store_true", help="a smoke test; its figures mean little"
    )
    parser.add_argument("--out", type=Path, help="where to write the JSON; the rest goes beside it")
    for option, keywords in more.items():
        parser.add_argument(f"--{option.replace('_', '-')}", **keywords)
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cpu" and route_path(device) != "reference":
        raise SystemExit("the interpreter's timings mean nothing: unset TRITON_INTERPRET")
    path = options.out or results_path(name, device)
    if options.quick and options.out is None:
        path = ROOT / "profiling" / "out" / f"{name}_quick.json"

    def write(content: dict, text: str, rows: Sequence[Mapping[str, object]] = ()) -> None:
        if rows:
            write_whole(path.with_suffix(".csv"), comma_separated(rows))
        write_whole(path, json.dumps(content, indent=1) + "\n")
        write_whole(path.with_suffix(".md"), text.rstrip() + "\n")
        print(f"\nwrote {path}")

    return options, device, write


def results_path(name: str, device: torch.device) -> Path:
    """Return where results of a full run belong: GPUs have folders, the CPU a suffix."""
    if device.type == "cpu":
        return RESULTS / f"{name}_cpu.json"
    folder = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")
    return RESULTS / folder / f"{name}.json"


# -- what is timed


def random_mixtral(device: torch.device, dtype: torch.dtype, seed: int = 0, **sizes):
    """Return a Mixtral with random weights; ``sizes`` are those of ``MixtralConfig``."""
    torch.manual_seed(seed)
    config = MixtralConfig(**{"sliding_window": None, "eos_token_id": None} | sizes)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def check_same(name: str, got_TV: torch.Tensor, want_TV: torch.Tensor) -> None:
    """Refuse to time an alternative whose output is wrong.

    Nine rows in ten must be close: a near-tie in a router may fall either way when a sum is
    rounded in another order, and then the row is another one.

    Raises:
        SystemExit: It is wrong.
    """
    tolerance = {torch.float32: 1e-4}.get(want_TV.dtype, 0.05)
    got_TV, want_TV = got_TV.float(), want_TV.float()
    error_T = (got_TV - want_TV).norm(dim=-1) / want_TV.norm(dim=-1)
    worst = error_T.nan_to_num(float("inf")).sort().values[int(0.9 * (len(error_T) - 1))].item()
    if worst > tolerance:
        raise SystemExit(
            f"{name} is wrong (relative error {worst:.2g}, allowed {tolerance:g}): not timing it"
        )


# -- conditions


def conditions(device: torch.device, **more: object) -> dict[str, object]:
    """Return what a number is meaningless without."""
    return {
        "device": device_name(device),
        "driver": driver() if device.type == "cuda" else None,
        "torch": torch.__version__,
        "triton": triton_version(),
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "commit": git_commit(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_at_start": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        **(gpu_facts(device) if device.type == "cuda" else {}),
    } | more


def gpu_facts(device: torch.device) -> dict[str, object]:
    """Return what of a GPU sets its speed; clocks and power are those of this moment."""
    properties = torch.cuda.get_device_properties(device)
    fields = ("clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "power.limit")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    values = _output(command).partition("\n")[0].split(", ")
    known = dict(zip(fields, values, strict=True)) if len(values) == len(fields) else {}
    return {
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_mib": l2_bytes(device) // 2**20 or None,
        "cuda": torch.version.cuda,
    } | {name.replace(".", "_"): value for name, value in known.items()}


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    name = re.search(r"model name\s*:\s*(.+)", text)
    return f"CPU ({name[1].strip() if name else platform.machine()})"


def driver() -> str:
    """Return the version of NVIDIA's driver."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return _output(command).partition("\n")[0] or "unknown"


def triton_version() -> str | None:
    """Return the version of triton, if it is there."""
    try:
        import triton
    except ModuleNotFoundError:
        return None
    return triton.__version__


def git_commit() -> str:
    """Return the commit of the tree, marked if it had changes; MOE_GPU_COMMIT names it elsewhere."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    return os.environ.get("MOE_GPU_COMMIT") or _output(command) or "unknown"


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


# -- output


def write_whole(path: Path, text: str) -> None:
    """Write a file that appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def comma_separated(rows: Sequence[Mapping[str, object]]) -> str:
    """Return rows as CSV; a row lacks what it does not have."""
    heads = list(dict.fromkeys(head for row in rows for head in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, heads, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def cell(value: object) -> str:
    """Format one figure; None was not measured."""
    if value is None:
        return NOT_MEASURED
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def with_spread(values: Mapping[str, float] | None, places: int = 3) -> str:
    """Format a median with its p20 and p80."""
    if values is None:
        return NOT_MEASURED
    median, low, high = (f"{values[key]:,.{places}f}" for key in ("median", "p20", "p80"))
    return f"{median} ({low} to {high})"


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """Return rows as a Markdown table that is also aligned for a terminal."""
    if not rows:
        return f"{NOT_MEASURED.capitalize()}."
    heads = list(dict.fromkeys(head for row in rows for head in row))
    cells = [heads] + [[cell(row.get(head, "")) for head in heads] for row in rows]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    cells.insert(1, rule)
    lines = []
    for line in cells:
        first = line[0].ljust(widths[0])
        rest = (text.rjust(w) for text, w in zip(line[1:], widths[1:], strict=True))
        lines.append(f"| {' | '.join([first, *rest])} |")
    return "\n".join(lines)


def facts(conditions: Mapping[str, object]) -> str:
    """Return conditions as one sentence."""
    known = {key: value for key, value in conditions.items() if value is not None}
    return "; ".join(f"{key.replace('_', ' ')} {value}" for key, value in known.items()) + "."
