"""Slots on a CUDA device, and copies into them on a stream of their own.

A copy waits (on the device) until the compute that was queued on the slot's previous expert is
over; compute on the new expert waits (on the device) for the copy; the host waits for neither,
except for bytes that it must read or stage itself.

Shape suffixes as in :mod:`moe_gpu.offload.transfer.host`.
"""

import threading
from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
from torch import cuda

from ...ranges import profiler_range
from ...requests import Priority
from ...waiting import page_locked, wait_event
from ..pager import PIECE_BYTES, Copy
from ..store import ExpertStore
from ..tiers import Tier
from .host import Transfer
from .ring import StagingRing


class StreamTransfer(Transfer):
    """Slots on a CUDA device; copies run on their own stream.

    One event per place says that its copy is done. One event per layer says that the compute
    queued on its places is over: it is recorded before each copy that takes a slot of the running
    step, and at the end of each step. Page-locked experts are copied where they lie, others
    through a small ring of page-locked buffers.
    """

    orders_take_long = False

    def __init__(
        self,
        store: ExpertStore,
        slot_of_LE: torch.Tensor,
        groups: Sequence[int],
        *,
        timers: bool = False,
        timeout_s: float = 60.0,
    ):
        super().__init__(store, slot_of_LE, groups, timers=timers, timeout_s=timeout_s)
        L, P = len(slot_of_LE), len(self._memory_P)
        self._stream = cuda.Stream(self.device)
        # the allocator may have handed out memory that queued kernels are still using
        self._stream.wait_stream(cuda.current_stream(self.device))
        self._ready_P = [cuda.Event() for _ in range(P)]
        self._copying_P = [False] * P  # compute has not waited yet
        self._released_L = [cuda.Event() for _ in range(L)]
        # staging of publish(), one row per layer: its copy runs later than the call
        self._rows_L = _page_locked(slot_of_LE.shape).unbind(0)
        self._published_L = [cuda.Event() for _ in range(L)]
        self._ring = StagingRing(self.device, timeout_s)
        self._unhurried: deque[cuda.Event] = deque()
        self._timers = timers
        self._waits: deque[tuple[int, cuda.Event, cuda.Event]] = deque()
        self._stalled_ms: dict[int, float] = {}
        self._measuring = threading.Lock()  # metrics may be read on another thread

    def runs_inline(self, copy: Copy) -> bool:
        """Whether the copy engine can read the expert where it lies."""
        return self.store.tier(copy.layer, copy.expert) is Tier.PINNED

    def begin(self, copy: Copy) -> None:
        """Order the copies after compute on what was in the place."""
        reader = self._reader_P[copy.place]
        if reader is not None:
            self._stream.wait_event(self._released_L[reader])
        self._reader_P[copy.place] = copy.layer

    def piece(self, copy: Copy, start: int, stop: int) -> None:
        """Order the copy of bytes ``[start, stop)``; reads and stages them first where needed."""
        if copy.priority is not Priority.URGENT:
            self._pace()
        target = self._memory_P[copy.place][start:stop]
        with profiler_range("moe_gpu::page_in"):
            if self.store.tier(copy.layer, copy.expert) is Tier.PINNED:
                source = self.store.expert(copy.layer, copy.expert)[start:stop]
                with cuda.stream(self._stream):
                    _copy(target, source)
            else:
                for first in range(start, stop, PIECE_BYTES):  # a whole expert, where urgent
                    self._stage(copy, first, min(first + PIECE_BYTES, stop), start, target)
        if copy.priority is not Priority.URGENT:
            event = cuda.Event()
            event.record(self._stream)
            self._unhurried.append(event)

    def _stage(self, copy: Copy, first: int, last: int, start: int, target: torch.Tensor) -> None:
        buffer, event = self._ring.take()
        self.store.read_into(copy.layer, copy.expert, first, last, buffer[: last - first])
        with cuda.stream(self._stream):
            _copy(target[first - start : last - start], buffer[: last - first])
        event.record(self._stream)

    def _pace(self) -> None:
        """Keep at most two pieces of copies that nobody waits for on the stream."""
        while len(self._unhurried) > 1:
            wait_event(self._unhurried[0], self.timeout_s, "a prefetch's copy")
            self._unhurried.popleft()

    def finish(self, copy: Copy) -> None:
        """Record the place's event behind its copies."""
        self._ready_P[copy.place].record(self._stream)
        self._copying_P[copy.place] = True

    def is_complete(self, place: int) -> bool:
        """Whether the place's event has passed."""
        return not self._copying_P[place] or self._ready_P[place].query()

    def wait_ready(self, place: int, layer: int, is_stall: bool = True) -> None:
        """Order compute after the copy; once per copy, so hits cost nothing."""
        if not self._copying_P[place]:
            return
        self._copying_P[place] = False
        compute, ready = cuda.current_stream(self.device), self._ready_P[place]
        if not (self._timers and is_stall):
            compute.wait_event(ready)
            return
        before, after = (cuda.Event(enable_timing=True) for _ in range(2))
        before.record(compute)
        compute.wait_event(ready)
        after.record(compute)
        self._waits.append((layer, before, after))
        self._collect()

    def release(self, layer: int) -> None:
        """Record where the compute stream stands; see :meth:`Transfer.release`."""
        self._released_L[layer].record(cuda.current_stream(self.device))

    def publish(self, layer: int, slot_of_E: list[int]) -> None:
        """Order one small copy on the compute stream; see :meth:`Transfer.publish`."""
        # the layer's previous copy; long over in a step
        wait_event(self._published_L[layer], self.timeout_s, f"layer {layer}'s residency")
        self._rows_L[layer].copy_(torch.from_numpy(np.array(slot_of_E, np.int32)))
        _copy(self._slot_of_rows[layer], self._rows_L[layer])
        self._published_L[layer].record(cuda.current_stream(self.device))

    def synchronize(self) -> None:
        """Wait for the copy stream."""
        done = cuda.Event()
        done.record(self._stream)
        wait_event(done, self.timeout_s, "copies under way")

    def close(self) -> None:
        """Give up slots and staging buffers."""
        super().close()
        self._ring.close()

    def stalls_ms(self) -> dict[int, float] | None:
        """Return the time between the events around each wait; None without timers."""
        if not self._timers:
            return None
        self._collect()
        return dict(self._stalled_ms)

    def reset_metrics(self) -> None:
        """Forget the stalls so far, those still under way included."""
        with self._measuring:
            self._stalled_ms.clear()
            self._waits.clear()

    def _collect(self) -> None:
        with self._measuring:
            while self._waits and self._waits[0][2].query():
                layer, before, after = self._waits.popleft()
                stalled_ms = self._stalled_ms.get(layer, 0.0)
                self._stalled_ms[layer] = stalled_ms + before.elapsed_time(after)


def _copy(destination: torch.Tensor, source: torch.Tensor) -> None:
    destination.copy_(source, non_blocking=True)


def _page_locked(shape: torch.Size) -> torch.Tensor:
    return page_locked(shape, torch.int32)
