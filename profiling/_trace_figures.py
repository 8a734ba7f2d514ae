"""Figures of a written trace in Chrome's format: ranges, launches, loads, overlap, peaks.

Every figure comes from the file, so that a reader of the trace can find it there. On a GPU a
*launch* is a host call that led to work on the device (a kernel, a copy, a memset), whatever its
name: both carry one correlation number. A copy counts as a load if its launch lies within a
``moe_gpu::page_in`` range. On a CPU nothing is launched; loads are the ``aten::copy_`` within
those ranges, so of a load from disk only the range is seen.
"""

import bisect
import gzip
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

PREFIX = "moe_gpu::"
PAGE_IN = "moe_gpu::page_in"
LAUNCHING = ("cuda_runtime", "cuda_driver")
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
DEVICES = {0: "host", 1: "cuda"}  # numbers that the profiler gives to kinds of memory


class Span(NamedTuple):
    """A time in a trace, in us."""

    start: float
    stop: float


def merged(spans: Iterable[Span]) -> list[Span]:
    """Return the union of spans, ascending and disjoint."""
    union: list[Span] = []
    for span in sorted(spans):
        if union and span.start <= union[-1].stop:
            union[-1] = Span(union[-1].start, max(union[-1].stop, span.stop))
        else:
            union.append(span)
    return union


def length_us(spans: Iterable[Span]) -> float:
    """Return how long the union of spans is."""
    return sum(span.stop - span.start for span in merged(spans))


def shared_us(spans: Iterable[Span], others: Iterable[Span]) -> float:
    """Return how long both unions of spans are under way together."""
    spans, others = merged(spans), merged(others)
    total, i = 0.0, 0
    for span in spans:
        while i < len(others) and others[i].stop <= span.start:
            i += 1
        for other in others[i:]:
            if other.start >= span.stop:
                break
            total += min(span.stop, other.stop) - max(span.start, other.start)
    return total


def read_trace(path: Path) -> list[dict]:
    """Return the events of a written trace."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return json.load(file)["traceEvents"]


def summarize(events: Iterable[Mapping]) -> dict:
    """Return the figures of a trace, see the module docstring.

    Args:
        events: Of the Chrome trace format.

    Returns:
        ``ranges``: per name its count, and of one occurrence the time on the host, the time that
        work launched in it takes on the device, launches, and pieces of work on the device;
        ``device_ranges``: names that also stand on the device's timeline;
        ``loads``: their bytes, time, and the share of that time during which something computes: on
        a GPU a kernel, on a CPU an operator of another thread;
        ``peak_bytes``: of each device. None: not in the trace.
    """
    by_category = defaultdict(list)
    for event in events:
        if event["ph"] == "X" or event["name"] == "[memory]":
            by_category[event.get("cat")].append(event)
    work_of = defaultdict(list)  # by correlation
    for category in ON_DEVICE:
        for event in by_category[category]:
            work_of[event["args"]["correlation"]].append(event)
    calls = [event for category in LAUNCHING for event in by_category[category]]
    launches = _Within(e for e in calls if e["args"].get("correlation") in work_of)
    marks = [e for e in by_category["user_annotation"] if e["name"].startswith(PREFIX)]

    def work_in(mark: Mapping) -> list[dict]:
        """Return the work on the device that was launched in a range; a call counts once."""
        numbers = {call["args"]["correlation"] for call in launches.of(mark)}
        return [event for number in sorted(numbers) for event in work_of[number]]

    has_device = bool(work_of)
    occurrences = defaultdict(list)
    for mark in marks:
        occurrences[mark["name"]].append(mark)
    return {
        "ranges": {
            name: _range_figures(of_name, work_in if has_device else None)
            for name, of_name in sorted(occurrences.items())
        },
        "device_ranges": sorted(
            {e["name"] for e in by_category["gpu_user_annotation"] if e["name"].startswith(PREFIX)}
        ),
        "loads": _loads(occurrences[PAGE_IN], by_category, work_in if has_device else None),
        "peak_bytes": _peaks(by_category["cpu_instant_event"]),
    }


class _Within:
    """Finds events of one thread within a range of it."""

    def __init__(self, events: Iterable[Mapping]):
        self._events = defaultdict(list)
        for event in sorted(events, key=lambda event: event["ts"]):
            self._events[event["pid"], event["tid"]].append(event)

    def of(self, mark: Mapping) -> list[Mapping]:
        events = self._events[mark["pid"], mark["tid"]]
        first = bisect.bisect_left(events, mark["ts"], key=lambda event: event["ts"])
        last = bisect.bisect_right(events, mark["ts"] + mark["dur"], key=lambda event: event["ts"])
        return events[first:last]


def _span(event: Mapping) -> Span:
    return Span(event["ts"], event["ts"] + event["dur"])


def _range_figures(marks: Sequence[Mapping], work_in) -> dict:
    count = len(marks)
    figures = {"count": count, "host_us": sum(mark["dur"] for mark in marks) / count}
    if work_in is None:
        return figures | {"device_us": None, "launches": None, "device_work": None}
    work = [work_in(mark) for mark in marks]
    return figures | {
        "device_us": sum(length_us(map(_span, events)) for events in work) / count,
        "launches": sum(len({e["args"]["correlation"] for e in events}) for events in work) / count,
        "device_work": sum(map(len, work)) / count,
    }


def _loads(marks: Sequence[Mapping], by_category, work_in) -> dict | None:
    """Return the figures of the copies that ``marks``, ranges of loads, have made."""
    if not marks:
        return None
    threads = len({mark["tid"] for mark in marks})
    if work_in is not None:
        copies = [e for m in marks for e in work_in(m) if e["cat"] == "gpu_memcpy"]
        moved = sum(copy["args"]["bytes"] for copy in copies)
        spans = list(map(_span, copies))
        us, computing_us = length_us(spans), shared_us(spans, map(_span, by_category["kernel"]))
    else:
        operators = _Within(by_category["cpu_op"])
        copies = [e for m in marks for e in operators.of(m) if e["name"] == "aten::copy_"]
        # experts are moved as bytes
        moved = sum(math.prod(copy["args"]["Input Dims"][0]) for copy in copies)
        us = computing_us = 0.0
        for tid in {mark["tid"] for mark in marks}:
            spans = [_span(mark) for mark in marks if mark["tid"] == tid]
            others = (_span(e) for e in by_category["cpu_op"] if e["tid"] != tid)
            us += length_us(spans)
            computing_us += shared_us(spans, others)
    return {
        "count": len(marks), "bytes": moved, "us": us, "threads": threads,
        "overlap": computing_us / us if us else None,
    }  # fmt: skip


def _peaks(events: Iterable[Mapping]) -> dict[str, int] | None:
    peaks: dict[str, int] = {}
    for event in events:
        args = event["args"]
        if event["name"] == "[memory]" and args["Device Type"] in DEVICES:
            name = DEVICES[args["Device Type"]]
            peaks[name] = max(peaks.get(name, 0), args["Total Allocated"])
    return peaks or None
