"""Latency of the route call, for gates built with ``timers=True``."""

import threading
import time
from collections import deque
from contextlib import contextmanager

import torch


class RouteTimer:
    """Times calls without stopping the device; keeps the most recent ones.

    On CUDA each call is bracketed by two events on the current stream, read only once they have
    passed; on the CPU it is wall time. Any thread may ask for the latencies.

    Args:
        keep: Calls remembered.
    """

    def __init__(self, keep: int = 4096):
        self._done_us: deque[float] = deque(maxlen=keep)
        self._pending: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque(maxlen=keep)
        self._lock = threading.Lock()

    def can_time(self, device: torch.device) -> bool:
        """Whether a call can be timed now: not while it is traced or captured in a CUDA graph."""
        if torch.compiler.is_compiling():
            return False
        return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()

    def __getstate__(self):
        # events belong to this process and are of no use to a copy; a lock cannot be copied
        with self._lock:
            kept = {"_done_us": self._done_us.copy()}
        return kept | {"_pending": deque(maxlen=self._pending.maxlen)}

    def __setstate__(self, state):
        self.__dict__.update(state, _lock=threading.Lock())

    @contextmanager
    def call(self, device: torch.device):
        """Time the body, which runs on ``device``."""
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            stream = torch.cuda.current_stream(device)
            start.record(stream)
            yield
            end.record(stream)
            with self._lock:
                self._pending.append((start, end))
                self._collect()
        else:
            start_s = time.perf_counter()
            yield
            with self._lock:
                self._done_us.append((time.perf_counter() - start_s) * 1e6)

    def _collect(self) -> None:
        """Read the events that have passed; the caller holds the lock."""
        while self._pending and self._pending[0][1].query():
            start, end = self._pending.popleft()
            self._done_us.append(start.elapsed_time(end) * 1e3)

    def latencies_us(self) -> list[float]:
        """Return the latencies of the calls that have finished, oldest first."""
        with self._lock:
            self._collect()
            return list(self._done_us)

    def reset(self) -> None:
        """Forget all calls."""
        with self._lock:
            self._done_us.clear()
            self._pending.clear()


def summarize_us(latencies_us: list[float]) -> dict[str, float | None]:
    """Return mean, p50 and p99 under the names of :class:`~moe_gpu.metrics.Metrics`."""
    if not latencies_us:
        return {"route_us_mean": None, "route_us_p50": None, "route_us_p99": None}
    values = torch.tensor(latencies_us, dtype=torch.float64)
    p50, p99 = values.quantile(torch.tensor([0.5, 0.99], dtype=torch.float64)).tolist()
    return {"route_us_mean": values.mean().item(), "route_us_p50": p50, "route_us_p99": p99}
