"""What a gate, or a model with an offloader, has done so far."""

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import torch

from .kernels import layout
from .waiting import page_locked


class HitRate:
    """What follows from ``hits`` and ``pairs``."""

    hits: int
    pairs: int

    @property
    def hit_rate(self) -> float:
        """Return hits per pair, 0 before the first pair."""
        return self.hits / self.pairs if self.pairs else 0.0


@dataclass(frozen=True, kw_only=True)
class LayerMetrics(HitRate):
    """What one layer has done since the start or the last reset; fields as in :class:`Metrics`.

    Attributes:
        layer: MoE layer, counted from 0.
        resident: Experts of the layer in slots now.
    """

    layer: int
    resident: int = 0
    pairs: int = 0
    hits: int = 0
    misses: int = 0
    unique_misses: int = 0
    loads: int = 0
    bytes_loaded: int = 0
    evictions: int = 0
    stall_ms: float | None = None
    moved_mass_p99: float | None = None
    l1_change: float | None = None
    routing_kl: float | None = None
    swaps_by_rank: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class OffloadMetrics:
    """What the offloader has done since the start or the last reset.

    Attributes:
        loads: Experts copied to the device for whatever reason, prefetches included; not the
            copies that fill the slots when a model is attached.
        bytes_loaded: Bytes of those copies.
        evictions: Experts whose slot was given to another.
        waves: Passes over the slots; more than one per call where the call needed more experts
            than there were slots.
        superseded: Step records that nobody read before the next call.
        background: Requests for experts that were wanted but swapped away.
        filled: Experts copied to fill the slots, outside any step.
        bypassed: Loads that passed through a staging slot and displaced nobody.
        loads_by_tier: Loads by the tier they came from: ``pinned``, ``pageable``, ``disk``.
        bytes_by_tier: Bytes of those copies.
        prefetch_issued: Prefetches whose copy was begun.
        prefetch_useful: Of those, the ones that a step used, late ones included.
        prefetch_late: Of those, the ones whose copy was still under way when a step wanted them.
        prefetch_cancelled: Prefetches given up before their copy was begun: they cost nothing.
        prefetch_failed: Prefetches whose copy failed; a step that needs the expert tries again.
        prefetch_wasted_bytes: Bytes of prefetched experts that left before any step used them.
        slots: Device slots in all, staging slots not counted.
        slots_used: Slots that hold an expert now.
        staging_slots: Slots that experts pass through.
        home_bytes: Bytes of expert weights by home tier: ``pinned``, ``pageable``, ``disk``.
        pin_refused_bytes: Bytes that were to be page-locked and could not be.
        verified: Checksums of weights compared with the stored ones (``verify=True``).
        pager_restarts: Times the copying thread had died and was started again.
        stall_ms: Time that compute waited for copies; None where it was not measured (on CUDA
            that needs ``timers=True``).
        layers: The same by layer.
    """

    loads: int = 0
    bytes_loaded: int = 0
    evictions: int = 0
    waves: int = 0
    superseded: int = 0
    background: int = 0
    filled: int = 0
    bypassed: int = 0
    loads_by_tier: dict[str, int] = field(default_factory=dict)
    bytes_by_tier: dict[str, int] = field(default_factory=dict)
    prefetch_issued: int = 0
    prefetch_useful: int = 0
    prefetch_late: int = 0
    prefetch_cancelled: int = 0
    prefetch_failed: int = 0
    prefetch_wasted_bytes: int = 0
    slots: int = 0
    slots_used: int = 0
    staging_slots: int = 0
    home_bytes: dict[str, int] = field(default_factory=dict)
    pin_refused_bytes: int = 0
    verified: int = 0
    pager_restarts: int = 0
    stall_ms: float | None = None
    layers: tuple[LayerMetrics, ...] = ()

    @property
    def prefetch_accuracy(self) -> float:
        """Return useful prefetches per issued one, 0 before the first."""
        return self.prefetch_useful / self.prefetch_issued if self.prefetch_issued else 0.0

    def as_dict(self) -> dict[str, object]:
        """Return every figure by name, derived ones included, ready for JSON.

        Figures by tier are dictionaries, those by layer a list of dictionaries.
        """
        layers = [asdict(layer) | {"hit_rate": layer.hit_rate} for layer in self.layers]
        return asdict(self) | {"layers": layers, "prefetch_accuracy": self.prefetch_accuracy}


def total_of(figures: Sequence[OffloadMetrics]) -> OffloadMetrics:
    """Return the sums of several offloaders' figures; of layers, one after the other."""
    if len(figures) == 1:
        return figures[0]
    totals = {}
    for name in vars(figures[0]):
        values = [getattr(one, name) for one in figures]
        if any(value is None for value in values):
            totals[name] = None
        elif isinstance(values[0], dict):
            totals[name] = {key: sum(value[key] for value in values) for key in values[0]}
        else:
            totals[name] = sum(values[1:], values[0])
    return OffloadMetrics(**totals)


@dataclass(frozen=True, kw_only=True)
class Metrics(OffloadMetrics, HitRate):
    """Totals of routing and offloading since the start or the last reset.

    Routing counts come from the device's counters, so reading them synchronises once.

    Attributes:
        tokens: Valid tokens; in an attached model each token once, all else sums over layers.
        pairs: Executed (token, expert) pairs, ``hits + misses``.
        hits: Pairs whose expert was resident when it was routed.
        misses: Pairs whose expert was not.
        unique_misses: Missing executed experts, each once per call: what loads follow.
        swaps: Executed experts that stood in for a demanded one.
        moved_mass: Router mass that swaps moved, in units of one token's demand.
        padded: Rows beyond ``num_valid``.
        moved_mass_p99: 99th percentile over tokens and layers of the moved mass, as a share of the
            token's demand: the upper edge of its bin (half an octave wide), 0 if it is exactly 0.
            This and the next three with ``meters=True`` only, else None, and over the calls that
            might have swapped: not ``Exact()``, not prefill.
        l1_change: Sum of the absolute changes of a token's mixing weights, mean over tokens and
            layers.
        routing_kl: KL divergence in nats from the router's distribution, of what was executed less
            that of the demand, mean over tokens and layers.
        swaps_by_rank: How often the first, second, ... expert of the demand was swapped away.
        route_path: ``"triton"`` or ``"reference"``: what ran the last route call; None before it.
        route_us_mean, route_us_p50, route_us_p99: Latency of the route call, ``timers=True``
            only, over the most recent calls.
    """

    tokens: int = 0
    pairs: int = 0
    hits: int = 0
    misses: int = 0
    unique_misses: int = 0
    swaps: int = 0
    moved_mass: float = 0.0
    padded: int = 0
    moved_mass_p99: float | None = None
    l1_change: float | None = None
    routing_kl: float | None = None
    swaps_by_rank: tuple[int, ...] | None = None
    route_path: str | None = None
    route_us_mean: float | None = None
    route_us_p50: float | None = None
    route_us_p99: float | None = None

    def as_dict(self) -> dict[str, object]:
        """Return every figure by name; see :meth:`OffloadMetrics.as_dict`."""
        return super().as_dict() | {"hit_rate": self.hit_rate}


class CounterMirror:
    """The device's counters, or its meters, as the host last saw them.

    Args:
        counters_LC: ``RouterState.counters_LC`` or ``meters_LM``.
    """

    def __init__(self, counters_LC: torch.Tensor):
        self._counters_LC = counters_LC
        self._seen_LC = torch.zeros(counters_LC.shape, dtype=torch.int64)
        self._landing_LC: torch.Tensor | None = None
        self._landed: torch.cuda.Event | None = None

    def read(self, wait: bool) -> torch.Tensor:
        """Return the counters on the host, ``(L, C)``.

        Args:
            wait: Synchronise. Otherwise they are as of an earlier call, and a copy of the present
                ones is ordered for a later one.
        """
        if wait or not self._counters_LC.is_cuda:
            return self._counters_LC.cpu()
        if self._landed is not None and self._landed.query():
            self._seen_LC, self._landed = self._landing_LC.clone(), None
        if self._landed is None:
            if self._landing_LC is None:
                self._landing_LC = page_locked(self._counters_LC.shape, torch.int64)
            self._landing_LC.copy_(self._counters_LC, non_blocking=True)
            self._landed = torch.cuda.Event()
            self._landed.record(torch.cuda.current_stream(self._counters_LC.device))
        return self._seen_LC

    def reset(self) -> None:
        """Forget what was seen: the counters are zero now."""
        self._seen_LC = torch.zeros_like(self._seen_LC)
        self._landed = None


def routing_counts(counters_LC: torch.Tensor) -> dict[str, int | float]:
    """Turn device counters into the routing fields of :class:`Metrics`. Synchronises.

    Args:
        counters_LC: ``RouterState.counters_LC`` or rows of it, int64. ``tokens`` and ``padded``
            are the largest of the rows (every layer sees the same tokens), the rest are sums.
    """
    rows_LC = counters_LC.cpu()
    total_C, most_C = rows_LC.sum(0).tolist(), rows_LC.amax(0).tolist()
    return {
        "tokens": most_C[layout.TOKENS],
        "pairs": total_C[layout.PAIRS],
        "hits": total_C[layout.HITS],
        "misses": total_C[layout.MISSES],
        "unique_misses": total_C[layout.UNIQUE_MISSES],
        "swaps": total_C[layout.SWAPS],
        "moved_mass": total_C[layout.MOVED_MASS] / layout.MOVED_MASS_ONE,
        "padded": most_C[layout.PADDED],
    }


def meter_figures(meters_LM: torch.Tensor, top_k: int = layout.RANKS) -> dict[str, object]:
    """Turn device meters into the quality fields of :class:`Metrics`. Synchronises.

    Args:
        meters_LM: ``RouterState.meters_LM`` or rows of it, int64.
        top_k: Experts per token: ranks to report.
    """
    total_M = meters_LM.cpu().sum(0).tolist()
    tokens = total_M[layout.METERED]
    unit = layout.METER_ONE * max(tokens, 1)
    bins = total_M[layout.HISTOGRAM : layout.SWAPS_BY_RANK]
    up_to = list(itertools.accumulate(bins))
    p99 = next(
        edge
        for edge, count in zip(layout.moved_mass_edges(), up_to, strict=True)
        if 100 * count >= 99 * tokens
    )
    return {
        "moved_mass_p99": p99,
        "l1_change": total_M[layout.L1_CHANGE] / unit,
        "routing_kl": total_M[layout.ROUTING_KL] / unit,
        "swaps_by_rank": tuple(total_M[layout.SWAPS_BY_RANK :][:top_k]),
    }
