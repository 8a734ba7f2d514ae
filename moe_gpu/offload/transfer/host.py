"""Slots in host memory, for models on the CPU; and what every transfer has in common.

A *place* is a slot numbered over the whole device: group by group, in the order of ``groups``.

Shape suffixes: L layers, E experts, G groups of slots, S slots of a group, P places, B bytes of
one expert.
"""

from collections.abc import Sequence

import numpy as np
import torch

from ...ranges import profiler_range
from ..pager import Copy
from ..store import ExpertStore
from ..tiers import Tier


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
            free = f", of which {torch.cuda.mem_get_info(self.device)[0]:,} are free"
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

    def wait_ready(self, place: int, layer: int, is_stall: bool = True) -> None:
        """Make compute queued from now on wait for the place's copy.

        Args:
            place: See above.
            layer: Whose compute waits.
            is_stall: Count the wait as one, where waits are timed.
        """

    def release(self, layer: int) -> None:
        """Let copies into the layer's places begin once the compute queued so far is over."""

    def publish(self, layer: int, slot_of_E: list[int]) -> None:
        """Tell the gate who is resident, in order with the compute queued so far."""
        self._slot_of_rows[layer].copy_(torch.from_numpy(np.array(slot_of_E, np.int32)))

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
