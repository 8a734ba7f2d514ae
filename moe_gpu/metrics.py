"""What a gate, or a model with an offloader, has done so far."""

from dataclasses import asdict, dataclass

import torch

from .kernels import layout


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """Totals since the start or the last reset.

    Counts come from the device counters, so reading them synchronises once.

    Attributes:
        tokens: Valid tokens; in an attached model each token once, all else sums over layers.
        pairs: Executed (token, expert) pairs, ``hits + misses``.
        hits: Pairs whose expert was resident when it was routed.
        misses: Pairs whose expert was not.
        unique_misses: Missing executed experts, each once per call: what loads follow.
        swaps: Executed experts that stood in for a demanded one.
        moved_mass: Router mass that swaps moved, in units of one token's demand.
        padded: Rows beyond ``num_valid``.
        loads: Experts copied to the device for a step, for whatever reason; not the copies that
            fill the slots when a model is attached.
        bytes_loaded: Bytes of those copies.
        evictions: Experts whose slot was given to another.
        waves: Passes over the slots; more than one per call where the call needed more experts
            than there were slots.
        superseded: Step records that nobody read before the next call.
        stall_ms: Time that compute waited for copies; None where it was not measured (on CUDA
            that needs ``timers=True``).
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
    loads: int = 0
    bytes_loaded: int = 0
    evictions: int = 0
    waves: int = 0
    superseded: int = 0
    stall_ms: float | None = None
    route_path: str | None = None
    route_us_mean: float | None = None
    route_us_p50: float | None = None
    route_us_p99: float | None = None

    @property
    def hit_rate(self) -> float:
        """Return hits per pair, 0 before the first pair."""
        return self.hits / self.pairs if self.pairs else 0.0

    def as_dict(self) -> dict[str, int | float | str | None]:
        """Return every figure by name, derived ones included."""
        return asdict(self) | {"hit_rate": self.hit_rate}


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
