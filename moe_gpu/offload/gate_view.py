"""What the gate sees of residency: written in stream order, and only where it changed."""

from collections.abc import Collection

from .cache import Cache
from .slots import NONE
from .transfer import Transfer


class GateView:
    """Rows of ``slot_of_LE`` as they were last published.

    An expert counts as resident once its copy is ordered before the compute that follows, and no
    longer once its slot may be overwritten.

    Attributes:
        published_LE: Slot of each expert as the gate sees it, ``NONE`` if it is not resident.
        changed: Layers whose row is out of date.

    Args:
        cache: Who is in which slot.
        transfer: Writes the rows.
    """

    def __init__(self, cache: Cache, transfer: Transfer):
        self._cache, self._transfer = cache, transfer
        self.published_LE = [[NONE] * cache.num_experts for _ in range(cache.num_layers)]
        self.changed: set[int] = set()

    def publish(self, layer: int, on_way: Collection[tuple[int, int]]) -> None:
        """Make the gate's row of a layer the table's, if anything changed.

        Args:
            layer: Layer.
            on_way: ``(layer, expert)`` whose copy is not there yet.
        """
        if layer not in self.changed:
            return
        self.changed.discard(layer)
        slot_of_E = self._cache.slot_of_E(layer)
        for other, expert in on_way:
            if other == layer:
                slot_of_E[expert] = NONE
        if slot_of_E != self.published_LE[layer]:
            self._transfer.publish(layer, slot_of_E)
            self.published_LE[layer] = slot_of_E

    def publish_all(self, on_way: Collection[tuple[int, int]]) -> None:
        """Publish every layer that changed."""
        for layer in sorted(self.changed):
            self.publish(layer, on_way)
