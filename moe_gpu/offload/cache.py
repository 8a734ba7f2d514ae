"""The cache: slots of all layers, who is in them, and what is known of their use.

Every layer has slots of its own, or all share one pool. Which of both decides what a *key* and a
*slot* number are; the names are translated here and nowhere else. Slots from ``num_slots`` on are
staging slots, which all layers share; a *place* numbers all slots of the device.

Shape suffixes: L layers, E experts.
"""

from .eviction import EvictionPolicy
from .history import History
from .plan import Rank, checked
from .slots import NONE, SlotTable


class Cache:
    """Tables, histories and rankings by layer; of a pool, the same ones for every layer.

    Attributes:
        num_layers, num_experts: L and E.
        num_slots: Slots per layer, or of the pool.
        is_pool: Whether all layers share the slots.
        groups: Slots of each table, in the order of their places.
        tables: Who is in which slot, by layer.
        histories: Use of every key, by layer.
        ranks: Order in which keys leave, by layer.

    Args:
        num_layers: L.
        num_experts: E.
        slots: See ``num_slots``.
        pool: See ``is_pool``.
        eviction: The victim policy.
    """

    def __init__(
        self, num_layers: int, num_experts: int, slots: int, pool: bool, eviction: EvictionPolicy
    ):
        self.num_layers, self.num_experts = num_layers, num_experts
        self.num_slots, self.is_pool = slots, pool
        layers_of_table = num_layers if pool else 1
        tables = [
            SlotTable(layers_of_table * num_experts, slots)
            for _ in range(num_layers // layers_of_table)
        ]
        histories = [History(layers_of_table, num_experts) for _ in tables]
        ranks = [_rank_of(eviction, history) for history in histories]
        self.groups = [slots] * len(tables)
        self._first_staging = slots * len(tables)
        self.tables: list[SlotTable] = tables * layers_of_table
        self.histories: list[History] = histories * layers_of_table
        self.ranks: list[Rank] = ranks * layers_of_table

    def key_of(self, layer: int, expert: int) -> int:
        """Return the key of an expert in its layer's table."""
        return layer * self.num_experts + expert if self.is_pool else expert

    def keys_of(self, layer: int) -> range:
        """Return the keys of a layer's experts."""
        first = self.key_of(layer, 0)
        return range(first, first + self.num_experts)

    def row_of(self, layer: int) -> int:
        """Return which layer of its history a layer is."""
        return layer if self.is_pool else 0

    def layer_of(self, layer: int, key: int) -> int:
        """Return the layer of a key in the table of ``layer``."""
        return key // self.num_experts if self.is_pool else layer

    def place_of(self, layer: int, slot: int) -> int:
        """Return the place of a slot, staging slots last."""
        if slot >= self.num_slots:
            return self._first_staging + slot - self.num_slots
        return slot if self.is_pool else layer * self.num_slots + slot

    def slot_of_E(self, layer: int) -> list[int]:  # noqa: N802 - a shape suffix
        """Return the slot of each of a layer's experts, ``NONE`` if it has none."""
        keys = self.keys_of(layer)
        return self.tables[layer].slot_of_X[keys.start : keys.stop]

    def residents(self, layer: int) -> list[int]:
        """Return the experts of a layer that have a slot, ascending."""
        return [expert for expert, slot in enumerate(self.slot_of_E(layer)) if slot != NONE]

    def all_tables(self) -> list[SlotTable]:
        """Return every table once."""
        return list({id(table): table for table in self.tables}.values())


def _rank_of(eviction: EvictionPolicy, history: History) -> Rank:
    def rank(keys: list[int]) -> list[int]:
        return eviction.rank(keys, history)

    return checked(type(eviction).__name__, rank)
