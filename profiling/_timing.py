"""Clocks of the benchmarks: paired rounds, device time by graph replay, wall time of eager calls.

An alternative is a callable that does one round of work and returns how many seconds of it count;
what it prepares before is its own affair. :func:`interleave` runs all alternatives in turn, round
by round, so that whatever else the machine does meets all of them, and :func:`ratio` compares
them round by round. :class:`Replay` makes an alternative of calls on the device.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from tqdm import tqdm

GRAPH_CALLS = 100  # at most, in one graph: what surrounds a replay is spread over so many
ROUND_S = 4e-3  # of eager calls: so many are one round
FEW_CALLS = 10
CPU_FLUSH_BYTES = 64 << 20
COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 26}


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


# -- rounds


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


def _at(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def spread(values: Iterable[float], scale: float = 1.0) -> dict[str, float]:
    """Return median, p20, p80 and p99 of values times ``scale``."""
    values = sorted(value * scale for value in values)
    tails = {f"p{percent}": _at(values, percent / 100) for percent in (20, 80, 99)}
    return {"median": statistics.median(values)} | tails


def percentiles(values: Iterable[float], scale: float = 1.0) -> dict[str, float]:
    """Return mean, p20, p50 (the median), p80, p90 and p99 of values times ``scale``."""
    values = sorted(value * scale for value in values)
    tails = {f"p{percent}": _at(values, percent / 100) for percent in (80, 90, 99)}
    return {
        "mean": statistics.fmean(values), "p20": _at(values, 0.2), "p50": statistics.median(values),
    } | tails  # fmt: skip


def ratio(of: Sequence[float], over: Sequence[float]) -> dict[str, float]:
    """Return how the quotients of paired rounds spread."""
    return spread(a / b for a, b in zip(of, over, strict=True))


def difference(of: Sequence[float], less: Sequence[float], scale: float) -> dict[str, float]:
    """Return how the differences of paired rounds, times ``scale``, spread."""
    return spread((a - b for a, b in zip(of, less, strict=True)), scale)


# -- the device's time


class Replay:
    """Device time of a call: a CUDA graph of many of them, replayed. An alternative.

    On the CPU the same calls in a loop, by wall time. The inputs stay in the caches where they fit.

    Args:
        calls: The same work on different inputs; the graph goes round them.
        device: Where they run.
        count: Calls in the graph; None: as many as :data:`ROUND_S` holds, at most
            :data:`GRAPH_CALLS`.
    """

    def __init__(
        self, calls: Sequence[Callable[[], object]], device: torch.device, count: int | None = None
    ):
        self.device, self._graph = device, None
        for call in calls:  # compiles, and allocates what stays
            call()
        self.count = count or _calls_in(ROUND_S, _call_s(calls[0], device))
        self._calls = [calls[i % len(calls)] for i in range(self.count)]
        if device.type == "cuda":
            self._capture()

    def _capture(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._calls[0]()  # libraries keep a workspace per stream
        torch.cuda.synchronize(self.device)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=stream):
            for call in self._calls:
                call()
        self._start = torch.cuda.Event(enable_timing=True)
        self._end = torch.cuda.Event(enable_timing=True)

    def __call__(self) -> float:
        """Run one round; return the seconds per call."""
        if self._graph is None:
            start_s = time.perf_counter()
            for call in self._calls:
                call()
            return (time.perf_counter() - start_s) / self.count
        # the device is still busy with this one when the host has launched all that is timed:
        # otherwise the time of a launch would lie between the two events
        self._graph.replay()
        self._start.record()
        self._graph.replay()
        self._end.record()
        torch.cuda.synchronize(self.device)
        return self._start.elapsed_time(self._end) * 1e-3 / self.count


def _call_s(call: Callable[[], object], device: torch.device) -> float:
    took_s = elapsed_s(call, device)
    if device.type == "cpu" or took_s > ROUND_S:
        return took_s

    def some():
        for _ in range(FEW_CALLS):
            call()

    # of a call alone, launching and waiting would be most of it
    return elapsed_s(some, device) / FEW_CALLS


def _calls_in(round_s: float, call_s: float) -> int:
    return max(1, min(GRAPH_CALLS, int(round_s / max(call_s, 1e-9))))


def flush_buffer(device: torch.device) -> torch.Tensor:
    """Return a buffer whose writing leaves nothing else in the last-level cache."""
    size = CPU_FLUSH_BYTES
    if device.type == "cuda":
        # long enough to write that the host has launched the timed call before it is written
        size = max(512 << 20, 4 * l2_bytes(device))
    return torch.empty(size, dtype=torch.uint8, device=device)


def l2_bytes(device: torch.device) -> int:
    """Return the size of a GPU's second-level cache; 0 if PyTorch does not know it."""
    return getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)


def cold_s(
    calls: Sequence[Callable[[], object]], device: torch.device, flush: torch.Tensor, samples: int
) -> list[float]:
    """Return the times of single calls whose inputs are in no cache.

    On CUDA between two events, which an empty kernel pays as well: compare with one.

    Args:
        calls: The same work on different inputs.
        device: Where they run.
        flush: A :func:`flush_buffer`, written before every call and outside the time.
        samples: How many.
    """
    if device.type == "cpu":
        seconds = []
        for i in range(samples):
            flush.fill_(i % 256)
            seconds.append(elapsed_s(calls[i % len(calls)], device))
        return seconds
    events = []
    for i in range(samples):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        calls[i % len(calls)]()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) * 1e-3 for start, end in events]


def copy_bytes_per_s(device: torch.device, rounds: int = 10) -> float:
    """Return the bandwidth of a large copy within the device, bytes read and bytes written."""
    source = torch.zeros(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    replay = Replay([lambda: target.copy_(source)], device)
    seconds = interleave({"copy": replay}, rounds)["copy"]
    return 2 * source.numel() / statistics.median(seconds)


# -- the host's time


def eager_s(
    calls: Sequence[Callable[[], object]],
    device: torch.device,
    samples: int,
    *,
    wait: bool,
    batch: int = 100,
    max_seconds: float = float("inf"),
) -> list[float]:
    """Return what single calls take on the host's clock, launch by launch.

    Args:
        calls: The same work on different inputs.
        device: Where they run.
        samples: At most so many.
        wait: Until the device is done, within the time of every call: the latency. Otherwise only
            between batches: what a caller pays who goes on.
        batch: Calls between two waits.
        max_seconds: Begin no batch after this, but do one.
    """
    for call in calls:
        call()
    seconds: list[float] = []
    start_s = time.perf_counter()
    while len(seconds) < samples:
        if seconds and time.perf_counter() - start_s > max_seconds:
            break
        synchronize(device)
        for i in range(min(batch, samples - len(seconds))):
            call = calls[i % len(calls)]
            before_s = time.perf_counter()
            call()
            if wait:
                synchronize(device)
            seconds.append(time.perf_counter() - before_s)
    synchronize(device)
    return seconds
