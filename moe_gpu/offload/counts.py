"""What an offloader counts on the host, and the metrics made of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..metrics import LayerMetrics, OffloadMetrics
from .cache import Cache
from .slots import NONE
from .tiers import Tier


@dataclass
class LayerCounts:
    """Of one layer; fields as in :class:`~moe_gpu.metrics.LayerMetrics`."""

    pairs: int = 0
    hits: int = 0
    unique_misses: int = 0
    loads: int = 0
    evictions: int = 0
    stall_s: float = 0.0


@dataclass
class PrefetchCounts:
    """What prefetching has cost and brought; fields as in :class:`~moe_gpu.metrics.Metrics`."""

    issued: int = 0
    useful: int = 0
    late: int = 0
    cancelled: int = 0
    failed: int = 0
    wasted_bytes: int = 0


@dataclass
class Counts:
    """Totals since the start or the last reset; fields as in ``OffloadMetrics``."""

    layers: list[LayerCounts]
    filled: int = 0
    waves: int = 0
    bypassed: int = 0
    verified: int = 0
    background: int = 0
    loads_by_tier: dict[str, int] = field(default_factory=lambda: {t.value: 0 for t in Tier})
    prefetched: PrefetchCounts = field(default_factory=PrefetchCounts)

    @classmethod
    def of(cls, num_layers: int) -> "Counts":
        """Return zero counts for L layers."""
        return cls([LayerCounts() for _ in range(num_layers)])

    def reset(self) -> None:
        """Set everything to zero."""
        self.__dict__.update(vars(Counts.of(len(self.layers))))

    def step(
        self,
        layer: int,
        spans: Mapping[int, tuple[int, int]],
        published_E: list[int],
        num_requests: int,
    ) -> None:
        """Count the hits and misses of a step.

        Args:
            layer: Its layer.
            spans: ``{expert: (start, stop)}`` of its pairs.
            published_E: Slots as the gate saw them when it routed.
            num_requests: Requests of its record, urgent and background.
        """
        counts, missed = self.layers[layer], 0
        for expert, (start, stop) in spans.items():
            counts.pairs += stop - start
            if published_E[expert] != NONE:
                counts.hits += stop - start
            else:
                missed += 1
        counts.unique_misses += missed
        self.background += max(0, num_requests - missed)

    def load(self, layer: int, tier: Tier) -> None:
        """Count the copy of an expert."""
        self.layers[layer].loads += 1
        self.loads_by_tier[tier.value] += 1

    def metrics(
        self, cache: Cache, expert_bytes: int, device_ms: dict[int, float] | None, **others
    ) -> OffloadMetrics:
        """Return the figures of these counts.

        Args:
            cache: Who is resident.
            expert_bytes: Of one copy.
            device_ms: Waits on the device by layer; None where they were not measured.
            others: Figures that are not counted here.
        """
        layers = []
        for layer, counts in enumerate(self.layers):
            stall_ms = None
            if device_ms is not None:
                stall_ms = counts.stall_s * 1e3 + device_ms.get(layer, 0.0)
            layers.append(
                LayerMetrics(
                    layer=layer,
                    resident=len(cache.residents(layer)),
                    pairs=counts.pairs,
                    hits=counts.hits,
                    misses=counts.pairs - counts.hits,
                    unique_misses=counts.unique_misses,
                    loads=counts.loads,
                    bytes_loaded=counts.loads * expert_bytes,
                    evictions=counts.evictions,
                    stall_ms=stall_ms,
                )
            )
        loads = sum(counts.loads for counts in self.layers)
        prefetched = {f"prefetch_{name}": value for name, value in vars(self.prefetched).items()}
        return OffloadMetrics(
            loads=loads,
            bytes_loaded=loads * expert_bytes,
            evictions=sum(counts.evictions for counts in self.layers),
            waves=self.waves,
            background=self.background,
            filled=self.filled,
            bypassed=self.bypassed,
            loads_by_tier=dict(self.loads_by_tier),
            bytes_by_tier={tier: n * expert_bytes for tier, n in self.loads_by_tier.items()},
            verified=self.verified,
            slots=sum(cache.groups),
            slots_used=sum(len(table.residents()) for table in cache.all_tables()),
            stall_ms=None if device_ms is None else sum(layer.stall_ms for layer in layers),
            layers=tuple(layers),
            **prefetched,
            **others,
        )
