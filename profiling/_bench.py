"""What the benchmarks share: paired timing, conditions, tables, files that appear whole.

An alternative is a callable that does one round of work and returns how many seconds of it count;
what it prepares before is its own affair. :func:`interleave` runs all alternatives in turn, round
by round, so that whatever else the machine does meets all of them, and :func:`ratio` compares
them round by round.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
import transformers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, MixtralConfig

from moe_gpu.kernels.route import route_path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "profiling" / "results"
NOT_MEASURED = "not measured"


def arguments(
    doc: str, name: str, **more: dict
) -> tuple[argparse.Namespace, torch.device, Callable[[dict, str], None]]:
    """Parse the command line that every benchmark has.

    Args:
        doc: Module docstring; its first line is the description.
        name: Of the benchmark; its results are called so.
        more: Further options, ``add_argument``'s keywords by name.

    Returns:
        The options, the device, and the function that writes results and table.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    cuda = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=cuda)
    parser.add_argument(
        "--quick", action="store_true", help="a smoke test; its figures mean little"
    )
    parser.add_argument("--out", type=Path, help="where to write the JSON, and the .md beside it")
    for option, keywords in more.items():
        parser.add_argument(f"--{option.replace('_', '-')}", **keywords)
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cpu" and route_path(device) != "reference":
        raise SystemExit("the interpreter's timings mean nothing: unset TRITON_INTERPRET")
    path = options.out or results_path(name, device)
    if options.quick and options.out is None:
        path = ROOT / "profiling" / "out" / f"{name}_quick.json"

    def write(content: dict, text: str) -> None:
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


# -- timing


def synchronize(device: torch.device) -> None:
    """Wait for the device; nothing to wait for on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def elapsed_s(
    work: Callable[[], object],
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Return the time that some work takes, the device's part included, by a clock in seconds."""
    synchronize(device)
    start_s = clock()
    work()
    synchronize(device)
    return clock() - start_s


def interleave(
    alternatives: Mapping[str, Callable[[], float]],
    rounds: int,
    *,
    warmup: int = 1,
    max_seconds: float = float("inf"),
    label: str = "",
) -> dict[str, list[float]]:
    """Time alternatives in turn, each round starting with another one.

    Args:
        alternatives: See the module docstring.
        rounds: At most so many, after the warm-up.
        warmup: Rounds that do not count.
        max_seconds: Start no round after this, but do one.
        label: Of the progress bar.

    Returns:
        Seconds by alternative and round.
    """
    names = list(alternatives)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    start_s = time.perf_counter()
    for i in tqdm(range(-warmup, rounds), desc=label, unit="round", leave=False, disable=None):
        if i > 0 and time.perf_counter() - start_s > max_seconds:
            break
        first = i % len(names)
        for name in names[first:] + names[:first]:
            took_s = alternatives[name]()
            if i >= 0:
                seconds[name].append(took_s)
    return seconds


def spread(values: Iterable[float], scale: float = 1.0) -> dict[str, float]:
    """Return median, p20, p80 and p99 of values times ``scale``."""
    values = sorted(value * scale for value in values)

    def at(share: float) -> float:
        return values[min(len(values) - 1, int(share * len(values)))]

    return {
        "median": statistics.median(values), "p20": at(0.2), "p80": at(0.8), "p99": at(0.99),
    }  # fmt: skip


def ratio(of: Sequence[float], over: Sequence[float]) -> dict[str, float]:
    """Return how the quotients of paired rounds spread."""
    return spread(a / b for a, b in zip(of, over, strict=True))


def difference(of: Sequence[float], less: Sequence[float], scale: float) -> dict[str, float]:
    """Return how the differences of paired rounds, times ``scale``, spread."""
    return spread((a - b for a, b in zip(of, less, strict=True)), scale)


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
    } | more


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
    """Return the commit of the tree, marked if it had changes."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    return _output(command) or "unknown"


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
