"""The mechanism: slot memory on the device, and copies into it in the right order.

On CUDA a copy runs on a stream of its own. It waits (on the device) until the compute that was
queued on the slot's previous expert is over; compute on the new expert waits (on the device) for
the copy; the host waits for neither. On the CPU the same calls move real bytes at once.

Shape suffixes: L layers, S slots per layer, E experts, B bytes of one expert.
"""

import time
from collections import deque

import torch
from torch import cuda

from ..ranges import profiler_range
from .store import ExpertLayout


class Transfer:
    """Slots on the CPU; copies are done when the call returns.

    Attributes:
        memory_L: uint8 ``(S, B)`` per layer, at fixed addresses.
        views_L: Typed views ``(S, *shape)`` of it by parameter name, per layer.

    Args:
        layout: What an expert's bytes mean.
        slot_of_LE: int32 ``(L, E)``, the gate's view of residency, which :meth:`publish` writes.
        num_slots: S.
        timers: Measure stalls where that costs something.
    """

    def __init__(
        self, layout: ExpertLayout, slot_of_LE: torch.Tensor, num_slots: int, timers: bool
    ):
        self.device = slot_of_LE.device
        self.memory_L = [
            torch.empty(num_slots, layout.expert_bytes, dtype=torch.uint8, device=self.device)
            for _ in slot_of_LE
        ]
        self.views_L = [layout.views(memory_SB) for memory_SB in self.memory_L]
        self._slots_L = [memory_SB.unbind(0) for memory_SB in self.memory_L]
        self._slot_of_rows = slot_of_LE.unbind(0)
        self._stalled_ms = 0.0

    def page_in(
        self, layer: int, slot: int, expert_B: torch.Tensor, *, urgent: bool = True
    ) -> None:
        """Order the copy of an expert's bytes into a slot.

        Args:
            layer: Layer of the slot.
            slot: A slot that no compute queued after :meth:`release` reads.
            expert_B: Its bytes in host memory.
            urgent: The running step waits for this copy.
        """
        start_s = time.perf_counter()
        with profiler_range("moe_gpu::page_in"):
            self._slots_L[layer][slot].copy_(expert_B)
        if urgent:
            self._stalled_ms += (time.perf_counter() - start_s) * 1e3

    def wait_ready(self, layer: int, slot: int) -> None:
        """Make compute queued from now on wait for the slot's copy."""

    def release(self, layer: int) -> None:
        """Let copies into the layer's slots begin once the compute queued so far is over."""

    def publish(self, layer: int, slot_of_E: list[int]) -> None:
        """Tell the gate who is resident, in order with the compute queued so far."""
        self._slot_of_rows[layer].copy_(torch.tensor(slot_of_E, dtype=torch.int32))

    def synchronize(self) -> None:
        """Return when no copy is under way."""

    def close(self) -> None:
        """Give up the slots, once no copy is under way."""
        self.synchronize()
        self.memory_L, self.views_L, self._slots_L = [], [], []

    def stall_ms(self) -> float | None:
        """Return how long compute has waited for copies; None if that was not measured."""
        return self._stalled_ms

    def reset_metrics(self) -> None:
        """Forget the stalls so far."""
        self._stalled_ms = 0.0


class StreamTransfer(Transfer):
    """Slots on a CUDA device; copies run on their own stream.

    One event per slot says that its copy is done. One event per layer says that the compute
    queued on its slots is over: it is recorded before each copy that takes a slot of the running
    step, and at the end of each step.
    """

    def __init__(
        self, layout: ExpertLayout, slot_of_LE: torch.Tensor, num_slots: int, timers: bool
    ):
        super().__init__(layout, slot_of_LE, num_slots, timers)
        L = len(self.memory_L)
        self._stream = cuda.Stream(self.device)
        # the allocator may have handed out memory that queued kernels are still using
        self._stream.wait_stream(cuda.current_stream(self.device))
        self._ready_LS = [[cuda.Event() for _ in range(num_slots)] for _ in range(L)]
        self._copying_LS = [[False] * num_slots for _ in range(L)]  # compute has not waited yet
        self._released_L = [cuda.Event() for _ in range(L)]
        # staging of publish(), one row per layer: its copy runs later than the call
        self._staging_rows = _page_locked(slot_of_LE.shape).unbind(0)
        self._staged_L = [cuda.Event() for _ in range(L)]
        self._timers = timers
        self._waits: deque[tuple[cuda.Event, cuda.Event]] = deque()

    def page_in(
        self, layer: int, slot: int, expert_B: torch.Tensor, *, urgent: bool = True
    ) -> None:
        """Order the copy; see :meth:`Transfer.page_in`. The host does not wait."""
        self._stream.wait_event(self._released_L[layer])
        with cuda.stream(self._stream), profiler_range("moe_gpu::page_in"):
            _copy(self._slots_L[layer][slot], expert_B)
        self._ready_LS[layer][slot].record(self._stream)
        self._copying_LS[layer][slot] = True

    def wait_ready(self, layer: int, slot: int) -> None:
        """Order compute after the copy; once per copy, so hits cost nothing."""
        if not self._copying_LS[layer][slot]:
            return
        self._copying_LS[layer][slot] = False
        compute, ready = cuda.current_stream(self.device), self._ready_LS[layer][slot]
        if not self._timers:
            compute.wait_event(ready)
            return
        before, after = (cuda.Event(enable_timing=True) for _ in range(2))
        before.record(compute)
        compute.wait_event(ready)
        after.record(compute)
        self._waits.append((before, after))
        self._collect()

    def release(self, layer: int) -> None:
        """Record where the compute stream stands; see :meth:`Transfer.release`."""
        self._released_L[layer].record(cuda.current_stream(self.device))

    def publish(self, layer: int, slot_of_E: list[int]) -> None:
        """Order one small copy on the compute stream; see :meth:`Transfer.publish`."""
        self._staged_L[layer].synchronize()  # the layer's previous copy; long over in a step
        self._staging_rows[layer].copy_(torch.tensor(slot_of_E, dtype=torch.int32))
        _copy(self._slot_of_rows[layer], self._staging_rows[layer])
        self._staged_L[layer].record(cuda.current_stream(self.device))

    def synchronize(self) -> None:
        """Wait for the copy stream."""
        self._stream.synchronize()

    def stall_ms(self) -> float | None:
        """Return the time between the events around each wait; None without timers."""
        if not self._timers:
            return None
        self._collect()
        return self._stalled_ms

    def reset_metrics(self) -> None:
        """Forget the stalls so far, those still under way included."""
        super().reset_metrics()
        self._waits.clear()

    def _collect(self) -> None:
        while self._waits and self._waits[0][1].query():
            before, after = self._waits.popleft()
            self._stalled_ms += before.elapsed_time(after)


def _copy(destination: torch.Tensor, source: torch.Tensor) -> None:
    destination.copy_(source, non_blocking=True)


def _page_locked(shape: torch.Size) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.int32, pin_memory=True)


def make_transfer(
    layout: ExpertLayout, slot_of_LE: torch.Tensor, num_slots: int, timers: bool
) -> Transfer:
    """Build the transfer for the device that ``slot_of_LE`` is on."""
    kind = StreamTransfer if slot_of_LE.is_cuda else Transfer
    return kind(layout, slot_of_LE, num_slots, timers)
