"""Does a route call ever answer differently? Many repeats of large grids, compared bit by bit.

Usage:
    python profiling/race_hunt.py                       # CUDA where there is one
    python profiling/race_hunt.py --repeats 100000 --max-seconds 3600
    python profiling/race_hunt.py --device cpu --quick

Tiles of a call meet in atomic counters, in bits of the scratch, and in the ticket that tells the last of
them to finish the call. A race there changes a result now and then, so every call is repeated from the
same state: three calls in a row, not waited for, after which weights, ids, and every tensor of the
state must be those of the first time, to the bit, and the scratch all zero. The same

* with other numbers of programs, which share the tiles otherwise, and must leave the same bits;
* on several streams at once, each with a state of its own and another layer of it.

The first call is compared with the reference on the CPU. Exit status 1 if anything differs.
"""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator

import torch
from tqdm import tqdm

import _bench as bench
import _route_cases as cases
from _route_cases import Point
from moe_gpu import RouterState
from moe_gpu.kernels.route import route_path

Tensors = dict[str, torch.Tensor]

QUICK = (Point(70, 8, 2), Point(70, 8, 2, policy="off"), Point(40, 128, 8), Point(3, 1024, 16))
POINTS = (
    *QUICK,
    Point(1, 8, 2), Point(64, 256, 8), Point(4096, 256, 8), Point(16384, 128, 8),
    Point(16384, 128, 8, policy="bonus"), Point(16384, 512, 10), Point(4096, 1024, 16),
    Point(65536, 64, 6), Point(65536, 8, 2), Point(65536, 8, 2, policy="off", routing="skewed"),
    Point(1048576, 8, 2),
)  # fmt: skip
PROGRAMS = (None, 1, 7, 133, 4096)  # at most; None: as the library does
STREAMS = 4
CALLS = 3  # in a row: each must find the scratch as it expects it


class Routed:
    """A gate, an input, and the state that every repeat begins with.

    Args:
        point: Sizes and policy.
        device: Where it routes.
        layer: Of the state, which has one more.
    """

    def __init__(self, point: Point, device: torch.device, layer: int = 0):
        self.logits_TE = cases.make_logits(point, device)[0]
        state = RouterState(layer + 1, point.E, device=device)
        options = {"state": state, "layer": layer, "meters": point in QUICK}
        self.gate = cases.make_gate(point, device, **options)
        self.gate.route(self.logits_TE)  # compiles, and makes room in the scratch
        self._start = {name: tensor.clone() for name, tensor in self.gate.state.named_buffers()}
        for name in self._start:
            if name not in ("slot_of_LE", "strength_L", "control_LP"):
                self._start[name].zero_()

    def __call__(self) -> Tensors:
        """Route some times in a row; return the last results and the state, all of them new."""
        self._restart()
        for _ in range(CALLS):
            routed = self.gate.route(self.logits_TE)
        state = {name: tensor.clone() for name, tensor in self.gate.state.named_buffers()}
        return state | {"weights": routed.weights, "ids": routed.ids}

    def _restart(self) -> None:
        for name, tensor in self.gate.state.named_buffers():
            tensor.copy_(self._start[name])

    def differs_from_reference(self) -> str | None:
        """Return how a single call differs from the definition; None if it does not."""
        self._restart()
        routed = self.gate.route(self.logits_TE)
        return cases.differs_from_reference((routed.weights, routed.ids), self.gate, self.logits_TE)


def differing(got: Tensors, want: Tensors) -> list[str]:
    """Return the names of tensors that differ in any bit, and of a scratch that is not zero."""
    names = [name for name in want if not torch.equal(bits(got[name]), bits(want[name]))]
    if "scratch" in got and bool(got["scratch"].any()):
        names.append("scratch is not zero")
    return names


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of integers, so that a NaN equals itself."""
    return tensor.contiguous().view(torch.uint8) if tensor.is_floating_point() else tensor


@dataclasses.dataclass
class Found:
    """What some repeats showed."""

    runs: int = 0
    wrong_runs: int = 0
    names: set[str] = dataclasses.field(default_factory=set)

    def add(self, names: list[str]) -> None:
        """Count one run."""
        self.runs += 1
        self.wrong_runs += bool(names)
        self.names.update(names)


def repeat(call: Callable[[], Tensors], want: Tensors, repeats: int, max_seconds: float) -> Found:
    """Repeat a call, at least once, and compare each result with what is wanted."""
    found, start_s = Found(), time.perf_counter()
    while found.runs < repeats:
        found.add(differing(call(), want))
        if time.perf_counter() - start_s > max_seconds:
            break
    return found


def repeat_together(
    calls: list[Callable[[], Tensors]], repeats: int, max_seconds: float, device: torch.device
) -> Found:
    """Repeat several calls on streams of their own, all under way at once."""
    wants = [call() for call in calls]
    bench.synchronize(device)
    streams = [torch.cuda.Stream() for _ in calls] if device.type == "cuda" else [None] * len(calls)
    found, start_s = Found(), time.perf_counter()
    while found.runs < repeats:
        gots = []
        for call, stream in zip(calls, streams, strict=True):
            with torch.cuda.stream(stream):  # None: none
                gots.append(call())
        bench.synchronize(device)
        pairs = zip(gots, wants, strict=True)
        found.add([name for got, want in pairs for name in differing(got, want)])
        if time.perf_counter() - start_s > max_seconds:
            break
    return found


@contextlib.contextmanager
def programs(most: int | None) -> Iterator[None]:
    """Let at most so many programs share the tiles of a call on a GPU; None: as usual."""
    if most is None:
        yield
        return
    from moe_gpu.kernels import launch  # needs triton

    own, launch.most_programs = launch.most_programs, lambda device: most
    try:
        yield
    finally:
        launch.most_programs = own


def compile_point(point: Point) -> None:
    """Compile on CUDA what a point needs."""
    Routed(point, torch.device("cuda"))
    torch.cuda.synchronize()


def hunt(points: tuple[Point, ...], device: torch.device, repeats: int, seconds: float) -> list:
    """Repeat every point on every grid, then together; return a line for each.

    Points whose turn does not come in time, or before an interrupt, have no line.
    """
    lines = []
    with contextlib.suppress(KeyboardInterrupt):
        _hunt(points, device, repeats, seconds, lines)
    return lines


def _hunt(points, device, repeats, seconds, lines) -> None:
    share_s = seconds / (len(points) + 1)
    start_s = time.perf_counter()
    for number, point in enumerate(tqdm(points, desc="race hunt", unit="point", disable=None)):
        if time.perf_counter() - start_s > seconds:
            break
        routed = Routed(point, device)
        wrong = routed.differs_from_reference()
        want = routed()
        due_s = start_s + (number + 1) * share_s
        grids = PROGRAMS if device.type == "cuda" else PROGRAMS[:1]
        for i, most in enumerate(grids):
            left_s = max(0.0, due_s - time.perf_counter()) / (len(grids) - i)
            with programs(most):
                found = repeat(routed, want, repeats, left_s)
            grid = "as usual" if most is None else f"{most:,} programs at most"
            lines.append(line(str(point), grid, found, wrong))
    small = [point for point in points if point.T <= 65536][-STREAMS:]
    calls = [Routed(point, device, layer) for layer, point in enumerate(small)]
    found = repeat_together(calls, repeats, share_s, device)
    lines.append(line(f"{len(calls)} layers", f"{len(calls)} streams at once", found, None))


def line(point: str, grid: str, found: Found, wrong: str | None) -> dict:
    """Return a line of the table."""
    return {
        "point": point, "grid": grid, "runs": found.runs, "wrong_runs": found.wrong_runs,
        "differing": sorted(found.names), "reference": wrong or "same",
    }  # fmt: skip


def report(content: dict) -> str:
    """Return the results as Markdown."""
    shown = [row | {"differing": ", ".join(row["differing"])} for row in content["rows"]]
    runs = sum(row["runs"] for row in content["rows"])
    verdict = "Nothing differed" if content["is_clean"] else "SOMETHING DIFFERED"
    missing = content["not_hunted"]
    return "\n\n".join(
        [
            "# Race hunt",
            f"Measured on: {bench.facts(content['conditions'])} Written by "
            "`profiling/race_hunt.py`, which says what is done.",
            f"{verdict}, in {runs:,} runs of {CALLS} calls.",
            *([f"Out of time, not hunted: {'; '.join(missing)}."] if missing else []),
            bench.table(shown),
        ]
    )


@torch.no_grad()
def main() -> int:
    """Hunt, print and write; return the exit status."""
    options, device, write = bench.arguments(
        __doc__,
        "race_hunt",
        repeats={"type": int, "default": 300, "help": "of each call on each grid, at most"},
        max_seconds={"type": float, "default": 60, "help": "of compiling and all repeats"},
    )
    start_s = time.perf_counter()
    points, repeats = (
        (QUICK, min(options.repeats, 3)) if options.quick else (POINTS, options.repeats)
    )
    if device.type == "cpu":
        points = QUICK  # the reference has no races
    if device.type == "cuda" and not options.quick:
        work = [(point,) for point in points]
        cases.compile_in_processes(compile_point, work, 0.6 * options.max_seconds)
    left_s = options.max_seconds - (time.perf_counter() - start_s)
    rows = hunt(points, device, repeats, left_s)
    hunted = {row["point"] for row in rows}
    content = {
        "conditions": bench.conditions(
            device, path=route_path(device), quick=options.quick or None
        ),
        "is_clean": bool(rows)
        and all(r["reference"] == "same" and not r["wrong_runs"] for r in rows),
        "not_hunted": [str(point) for point in points if str(point) not in hunted],
        "rows": rows,
    }
    text = report(content)
    print(text)
    write(content, text, [row | {"differing": " ".join(row["differing"])} for row in rows])
    return 0 if content["is_clean"] else 1


if __name__ == "__main__":
    sys.exit(main())
