"""Whom to fetch before a step asks: decisions in plain Python, and an account of what they cost.

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
from dataclasses import dataclass

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


@dataclass
class PrefetchAccount:
    """What prefetching has cost and brought; fields as in :class:`moe_gpu.metrics.Metrics`."""

    issued: int = 0
    useful: int = 0
    late: int = 0
    cancelled: int = 0
    failed: int = 0
    wasted_bytes: int = 0
