"""The mechanism: slot memory on the device, and copies into it in the right order.

On CUDA a copy runs on a stream of its own. It waits (on the device) until the compute that was
queued on the slot's previous expert is over; compute on the new expert waits (on the device) for
the copy; the host waits for neither, except for bytes that it must read or stage itself. On the
CPU the same calls move real bytes at once; with a simulated link, at the pace of the link.

A *place* is a slot numbered over the whole device: group by group, in the order of ``groups``.

Shape suffixes: L layers, E experts, G groups of slots, S slots of a group, P places, B bytes of
one expert.
"""

import time
import warnings
import weakref
from collections import deque
from collections.abc import Sequence

import torch
from torch import cuda

from ..ranges import profiler_range
from ..requests import Priority
from ..waiting import wait_event
from . import pinning
from .pager import PIECE_BYTES, Copy
from .store import ExpertStore
from .tiers import Tier

STAGING_BUFFERS = 3  # one is read into, one is copied from, one is on its way back


class Transfer:
    """Slots on the CPU; the bytes of a copy are in place when its last piece returns.

    Attributes:
        memory_G: uint8 ``(S, B)`` per group, at fixed addresses.
        views_G: Typed views ``(S, *shape)`` of it by parameter name, per group.
        orders_take_long: Whether compute waits while the caller orders a copy: here it is the
            copy.

    Args:
        store: Home of the weights.
        slot_of_LE: int32 ``(L, E)``, the gate's view of residency, which :meth:`publish` writes.
        groups: Slots of each group.
        timers: Measure stalls where that costs something.
        timeout_s: Bound of every wait, in seconds.

    Raises:
        MemoryError: The slots do not fit; names bytes asked for and free.
    """

    orders_take_long = True

    def __init__(
        self,
        store: ExpertStore,
        slot_of_LE: torch.Tensor,
        groups: Sequence[int],
        *,
        timers: bool = False,
        timeout_s: float = 60.0,
    ):
        self.device, self.store, self.timeout_s = slot_of_LE.device, store, timeout_s
        layout = store.layout
        self.memory_G: list[torch.Tensor] = []
        try:
            for slots in groups:
                shape = (slots, layout.expert_bytes)
                self.memory_G.append(torch.empty(shape, dtype=torch.uint8, device=self.device))
        except RuntimeError as error:  # torch.OutOfMemoryError is one; the CPU has no class for it
            self.memory_G = []
            if not isinstance(error, torch.OutOfMemoryError) and "alloc" not in str(error):
                raise
            raise MemoryError(self._does_not_fit(groups, layout.expert_bytes, error)) from error
        self.views_G = [layout.views(memory_SB) for memory_SB in self.memory_G]
        self._memory_P = [row for memory_SB in self.memory_G for row in memory_SB.unbind(0)]
        self._reader_P: list[int | None] = [None] * len(self._memory_P)  # layer that computes
        self._slot_of_rows = slot_of_LE.unbind(0)

    def _does_not_fit(self, groups, expert_bytes, error) -> str:
        free = ""
        if self.device.type == "cuda":
            free = f", of which {cuda.mem_get_info(self.device)[0]:,} are free"
        cause = str(error).strip().splitlines()[0] if str(error).strip() else "out of memory"
        return (
            f"{sum(groups)} expert slots of {expert_bytes:,} bytes need "
            f"{sum(groups) * expert_bytes:,} bytes on {self.device}{free}: ask for fewer slots or "
            f"a smaller gpu_memory ({cause})"
        )

    def runs_inline(self, copy: Copy) -> bool:
        """Whether the caller can order this copy itself, without waiting for anything slow."""
        return self.store.tier(copy.layer, copy.expert) is not Tier.DISK

    def begin(self, copy: Copy) -> None:
        """Prepare a copy: its place is free of compute queued after :meth:`release`."""
        self._reader_P[copy.place] = copy.layer

    def piece(self, copy: Copy, start: int, stop: int) -> None:
        """Move bytes ``[start, stop)`` of the expert."""
        with profiler_range("moe_gpu::page_in"):
            target = self._memory_P[copy.place][start:stop]
            self.store.read_into(copy.layer, copy.expert, start, stop, target)

    def finish(self, copy: Copy) -> None:
        """Mark the place: its bytes are all moved or ordered."""

    def is_complete(self, place: int) -> bool:
        """Whether the place's last finished copy has arrived."""
        return True

    def wait_ready(self, place: int, layer: int) -> None:
        """Make compute queued from now on wait for the place's copy."""

    def release(self, layer: int) -> None:
        """Let copies into the layer's places begin once the compute queued so far is over."""

    def publish(self, layer: int, slot_of_E: list[int]) -> None:
        """Tell the gate who is resident, in order with the compute queued so far."""
        self._slot_of_rows[layer].copy_(torch.tensor(slot_of_E, dtype=torch.int32))

    def bytes_of(self, place: int) -> torch.Tensor:
        """Return the memory of a place, uint8 ``(B,)``, for checksums."""
        return self._memory_P[place]

    def synchronize(self) -> None:
        """Return when no copy that was issued is under way; bounded."""

    def close(self) -> None:
        """Give up the slots, once no copy is under way."""
        self.synchronize()
        self.memory_G, self.views_G, self._memory_P = [], [], []

    def stalls_ms(self) -> dict[int, float] | None:
        """Return how long compute waited on the device, by layer; None if not measured.

        On the CPU the host waits instead, which the offloader measures.
        """
        return {}

    def reset_metrics(self) -> None:
        """Forget the stalls so far."""


class SimulatedLink(Transfer):
    """Slots on the CPU behind a link: a copy of n bytes takes n / bandwidth, one after another.

    For measuring how well copies are ordered and hidden, on a machine without a GPU: real bytes
    move through the same offloader, and the pager's thread sleeps until the link would be done.

    Args:
        link_gbps: Bandwidth in 10^9 bytes per second.
    """

    def __init__(self, *args, link_gbps: float, **kwargs):
        super().__init__(*args, **kwargs)
        self._seconds_per_byte = 1e-9 / link_gbps
        self._free_at_s = 0.0

    def runs_inline(self, copy: Copy) -> bool:
        """Never: the link takes its time."""
        return False

    def piece(self, copy: Copy, start: int, stop: int) -> None:
        """Move bytes and sleep until the link has carried them."""
        start_s = max(time.perf_counter(), self._free_at_s)
        super().piece(copy, start, stop)
        self._free_at_s = start_s + (stop - start) * self._seconds_per_byte
        time.sleep(max(0.0, self._free_at_s - time.perf_counter()))


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

    def wait_ready(self, place: int, layer: int) -> None:
        """Order compute after the copy; once per copy, so hits cost nothing."""
        if not self._copying_P[place]:
            return
        self._copying_P[place] = False
        compute, ready = cuda.current_stream(self.device), self._ready_P[place]
        if not self._timers:
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
        self._rows_L[layer].copy_(torch.tensor(slot_of_E, dtype=torch.int32))
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
        self._stalled_ms.clear()
        self._waits.clear()

    def _collect(self) -> None:
        while self._waits and self._waits[0][2].query():
            layer, before, after = self._waits.popleft()
            self._stalled_ms[layer] = self._stalled_ms.get(layer, 0.0) + before.elapsed_time(after)


class StagingRing:
    """Page-locked buffers that bytes pass through, made when first needed.

    Where even these cannot be page-locked, they are ordinary memory: slower, and said once.

    Args:
        device: Where the bytes go.
        timeout_s: Bound of the wait for a buffer, in seconds.
    """

    def __init__(self, device: torch.device, timeout_s: float):
        self.device, self.timeout_s = device, timeout_s
        self._ring: deque[tuple[torch.Tensor, cuda.Event]] = deque()
        self._locked: list[torch.Tensor] = []
        self._unlock = weakref.finalize(self, _unlock_all, self._locked)

    def take(self) -> tuple[torch.Tensor, "cuda.Event"]:
        """Return the buffer that was used longest ago, free again, and the event to record."""
        if not self._ring:
            self._fill()
        buffer, event = self._ring[0]
        wait_event(event, self.timeout_s, "a staging buffer")
        self._ring.rotate(-1)
        return buffer, event

    def _fill(self) -> None:
        for _ in range(STAGING_BUFFERS):
            buffer = torch.empty(PIECE_BYTES, dtype=torch.uint8)
            cause = pinning.page_lock(buffer, self.device)
            if cause is None:
                self._locked.append(buffer)
            elif not self._ring:
                warnings.warn(
                    f"the staging buffers ({STAGING_BUFFERS} x {PIECE_BYTES:,} bytes) could not be "
                    f"page-locked ({cause}): copies to the device do not overlap compute",
                    RuntimeWarning,
                    stacklevel=2,
                )
            self._ring.append((buffer, cuda.Event()))

    def close(self) -> None:
        """Give up the buffers; no copy may read them any more."""
        self._ring.clear()
        _unlock_all(self._locked)


def _unlock_all(locked: list[torch.Tensor]) -> None:
    while locked:
        pinning.page_unlock(locked.pop())


def _copy(destination: torch.Tensor, source: torch.Tensor) -> None:
    destination.copy_(source, non_blocking=True)


def _page_locked(shape: torch.Size) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.int32, pin_memory=True)


def make_transfer(
    store: ExpertStore,
    slot_of_LE: torch.Tensor,
    groups: Sequence[int],
    *,
    timers: bool,
    timeout_s: float,
    link_gbps: float | None = None,
) -> Transfer:
    """Build the transfer for the device that ``slot_of_LE`` is on.

    Raises:
        ValueError: A simulated link on a device that has a real one.
    """
    options = {"timers": timers, "timeout_s": timeout_s}
    if link_gbps is not None:
        if slot_of_LE.is_cuda:
            raise ValueError(f"link_gbps={link_gbps} simulates a link, which is for the CPU only")
        return SimulatedLink(store, slot_of_LE, groups, link_gbps=link_gbps, **options)
    kind = StreamTransfer if slot_of_LE.is_cuda else Transfer
    return kind(store, slot_of_LE, groups, **options)
