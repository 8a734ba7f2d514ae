"""What happened between two readings of cumulative metrics, for rates and live lines."""

import time
from dataclasses import dataclass, fields, replace
from typing import Protocol

from .metrics import LayerMetrics, Metrics


class HasMetrics(Protocol):
    """An attached model, a gate, or anything else that counts."""

    def metrics(self) -> Metrics:
        """Return the totals so far."""


# what describes the present; every other figure is a total that grows until a reset
STATES = {
    "layer",
    "resident",
    "slots",
    "slots_used",
    "staging_slots",
    "home_bytes",
    "pin_refused_bytes",
    "hit_rate",
    "prefetch_accuracy",
    "moved_mass_p99",
    "l1_change",
    "routing_kl",
    "route_path",
    "route_us_mean",
    "route_us_p50",
    "route_us_p99",
}


@dataclass(frozen=True, kw_only=True)
class Interval:
    """What happened between two readings of a :class:`Meter`.

    Attributes:
        metrics: The totals' difference; slots, home tiers, latencies and what ``meters=True``
            measures, but for ``swaps_by_rank``, are those of its end.
        seconds: Wall time between the readings.
    """

    metrics: Metrics
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Return tokens per second, 0 in no time."""
        return self.metrics.tokens / self.seconds if self.seconds else 0.0

    @property
    def mb_per_second(self) -> float:
        """Return megabytes (10^6) copied to the device per second, 0 in no time."""
        return self.metrics.bytes_loaded / 1e6 / self.seconds if self.seconds else 0.0


class Meter:
    """Calling it returns the :class:`Interval` since the last call, or since it was made.

    A ``reset_metrics()`` in between shows as a total that went down; the counts are then those
    since the reset. It stays unnoticed only if by the next call every total is past its old value.

    Args:
        moe: What has ``metrics()``.

    Example:
        >>> meter = Meter(moe)
        >>> model.generate(**inputs)
        >>> meter().tokens_per_second
    """

    def __init__(self, moe: HasMetrics):
        self._moe = moe
        self._start, self._totals = time.perf_counter(), moe.metrics()

    def __call__(self) -> Interval:
        """Return the interval that ends now; the next one starts here."""
        totals, now = self._moe.metrics(), time.perf_counter()
        interval = self._until(totals, now)
        self._start, self._totals = now, totals
        return interval

    def peek(self) -> Interval:
        """Return the interval up to now without ending it."""
        return self._until(self._moe.metrics(), time.perf_counter())

    def _until(self, totals: Metrics, now: float) -> Interval:
        since = _since(self._totals, totals)
        return Interval(metrics=totals if since is None else since, seconds=now - self._start)


def _since(old: Metrics, new: Metrics) -> Metrics | None:
    """Return ``new`` with each total less its old value, or None if one of them went down."""
    layers = {layer.layer: layer for layer in old.layers}
    pairs = [(layers.get(x.layer, LayerMetrics(layer=x.layer)), x) for x in new.layers]
    changes = [_change(old, new), *(_change(before, after) for before, after in pairs)]
    if any(number < 0 for change in changes for value in change.values() for number in _all(value)):
        return None
    parts = [replace(x, **change) for (_, x), change in zip(pairs, changes[1:], strict=True)]
    return replace(new, **changes[0], layers=tuple(parts))


def _change(old: Metrics | LayerMetrics, new: Metrics | LayerMetrics) -> dict[str, object]:
    """Return the difference of each total that ``new`` has."""
    change = {}
    for f in fields(new):
        before, after = getattr(old, f.name), getattr(new, f.name)
        if f.name in STATES or f.name == "layers" or after is None:
            continue
        if isinstance(after, dict):
            tiers = before | after
            change[f.name] = {tier: after.get(tier, 0) - before.get(tier, 0) for tier in tiers}
        elif isinstance(after, tuple):
            before = before or (0,) * len(after)
            change[f.name] = tuple(y - x for x, y in zip(before, after, strict=True))
        else:
            change[f.name] = after - (before or 0)
    return change


def _all(value: object) -> list:
    value = value.values() if isinstance(value, dict) else value
    return [value] if isinstance(value, int | float) else list(value)
