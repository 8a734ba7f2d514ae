"""Whom to fetch before a step asks.

Three predictors, each with its own switch and all off by default:

- ``"next_gate"``: the experts that the next layer's router would pick for this layer's hidden
  state, which the next layer's differs from by one residual block.
- ``"background"``: experts that the router wanted and a resident one stood in for. Without it a
  policy that swaps can swap the same expert for ever.
- ``"affinity"``: the experts of the next layer with the highest affinity that are not resident.

The last two must *earn* the slot: in the ranking of the eviction policy they stand above whoever
would leave. What was prefetched is on probation until a step uses it, and only a share of the
slots may be on probation at a time.
"""

from collections.abc import Collection, Iterable, Sequence

import numpy as np
import torch

from ..kernels import layout as record_layout
from ..record import StepRecord
from ..requests import Priority
from ..waiting import page_locked
from .cache import Cache
from .flights import Flights
from .plan import Rank
from .slots import SlotTable

PREDICTORS = ("next_gate", "background", "affinity")
PROBATION_SHARE = 0.25  # of the slots of a table; untuned


def check_predictors(prefetch: Iterable[str]) -> frozenset[str]:
    """Return the predictors that are switched on.

    Raises:
        TypeError: Not names.
        ValueError: An unknown name.
    """
    if not isinstance(prefetch, Iterable):
        known = ", ".join(map(repr, PREDICTORS))
        raise TypeError(
            f"prefetch must hold names of predictors, any of {known} (none: ()), got {prefetch!r}"
        )
    names = [prefetch] if isinstance(prefetch, str) else list(prefetch)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"prefetch must hold names of predictors, got {name!r}")
        if name not in PREDICTORS:
            known = ", ".join(map(repr, PREDICTORS))
            raise ValueError(f"prefetch must be among {known}, got {name!r}")
    return frozenset(names)


def place_for(
    table: SlotTable, key: int, rank: Rank, *, must_earn: bool, keep: Collection[int] = ()
) -> tuple[int, int | None] | None:
    """Return the slot for a prefetched expert and its victim, or None if it gets none.

    Args:
        table: The slots; the key has none.
        key: Expert to fetch.
        rank: Orders keys, the first to leave in front.
        must_earn: Only in place of an expert that ranks below it.
        keep: Keys that must stay.
    """
    free = table.free_slots()
    if free:
        return free[0], None
    idle = table.evictable(keep)
    limit = max(1, int(PROBATION_SHARE * len(table.key_in_S)))
    if len(table.probation) >= limit:
        idle = [other for other in idle if other in table.probation]
    if not idle:
        return None
    victim = rank([*idle, key])[0] if must_earn else rank(idle)[0]
    return None if victim == key else (table.slot_of_X[victim], victim)


def hottest_missing(table: SlotTable, keys: Sequence[int], affinity: Sequence[float]) -> int | None:
    """Return the key with the highest affinity above 0 that has no slot; the lowest of equals."""
    missing = [key for key in keys if not table.is_resident(key) and affinity[key] > 0]
    return max(missing, key=lambda key: (affinity[key], -key), default=None)


class Prefetcher:
    """Asks the predictors after each decode step, and orders what has a place.

    Attributes:
        predictors: Those that are on.

    Args:
        predictors: See above.
        cache: Who is in which slot.
        flights: Orders copies.
    """

    def __init__(self, predictors: frozenset[str], cache: Cache, flights: Flights):
        self.predictors = predictors
        self._cache, self._flights = cache, flights
        self._prediction: tuple[int, torch.Tensor] | None = None
        self._landing: torch.Tensor | None = None  # page-locked

    def wants_prediction(self, layer: int) -> bool:
        """Whether :meth:`predict` for this layer would be used."""
        return "next_gate" in self.predictors and layer < self._cache.num_layers

    def predict(self, layer: int, ids_TK: torch.Tensor) -> None:
        """Take the experts that a layer will probably route to; the device is not waited for."""
        if ids_TK.is_cuda:
            if self._landing is None or self._landing.numel() < ids_TK.numel():
                self._landing = page_locked(ids_TK.numel(), ids_TK.dtype)
            # lands before the record, whose read waits for the stream
            landing = self._landing[: ids_TK.numel()].copy_(ids_TK.reshape(-1), non_blocking=True)
            self._prediction = layer, landing
        else:
            self._prediction = layer, ids_TK

    def order(self, layer: int, record: StepRecord) -> None:
        """Order prefetches while a layer computes whose record this is."""
        cache, ahead = self._cache, layer + 1
        keep: list[int] = []
        if self._prediction is not None and self._prediction[0] == ahead:
            ids, self._prediction = self._prediction[1], None
            counts_E = np.bincount(ids.reshape(-1).numpy(), minlength=cache.num_experts)
            order = np.argsort(-counts_E, kind="stable")
            keep = [cache.key_of(ahead, int(expert)) for expert in order if counts_E[expert]]
            for key in keep:
                self._fetch(ahead, key, Priority.PREFETCH, must_earn=False, keep=keep)
        if "background" in self.predictors:
            wanted = np.flatnonzero(record.priority_E == record_layout.PRIORITY_BACKGROUND)
            for expert in wanted.tolist():
                key = cache.key_of(layer, expert)
                self._fetch(layer, key, Priority.BACKGROUND, must_earn=True, keep=keep)
        if "affinity" in self.predictors:
            ahead %= cache.num_layers
            table, affinity = cache.tables[ahead], cache.histories[ahead].affinity
            hottest = hottest_missing(table, cache.keys_of(ahead), affinity)
            if hottest is not None:
                self._fetch(ahead, hottest, Priority.PREFETCH, must_earn=True, keep=keep)

    def _fetch(
        self, layer: int, key: int, priority: Priority, *, must_earn: bool, keep: list[int]
    ) -> None:
        table, flights = self._cache.tables[layer], self._flights
        if table.is_resident(key) or flights.staged(layer, [key]):
            return
        place = place_for(table, key, self._cache.ranks[layer], must_earn=must_earn, keep=keep)
        if place is None:
            return
        slot, victim = place
        if victim is not None:
            flights.evict(layer, victim)
        flights.begin(layer, key, slot, priority)
        table.probation.add(key)
