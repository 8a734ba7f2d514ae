"""What ``attach`` and ``load`` can be asked for, checked before anything changes."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from ..offload import EvictionPolicy
from ..offload.eviction import eviction_policy
from ..offload.offloader import STAGING_SLOTS, check_timeout
from ..offload.prefetch import check_predictors
from ..offload.slots import check_slots
from ..policies import MassBudget, Policy
from .budget import MemoryNeeds, parse_bytes, slots_of_share


class SlotChoice(NamedTuple):
    """Slots on the device."""

    slots: int  # per layer, or of the pool in all
    pool: bool
    staging: int  # slots that experts pass through


@dataclass(frozen=True, kw_only=True)
class Options:
    """Keyword arguments of :func:`moe_gpu.attach`, where they are described.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: An argument outside its bounds.
    """

    slots: int | None = None
    resident: float | int | None = None
    gpu_memory: int | str | None = None
    context_tokens: int = 4096
    pool: bool | None = None
    staging_slots: int | None = None
    pinned_memory: int | str | None = None
    policy: Policy = MassBudget(0.05)  # noqa: RUF009 - frozen dataclass
    eviction: str | EvictionPolicy = "lru"
    bypass: bool = False
    prefetch: Iterable[str] = ()
    prefill: Literal["last", "warm", "keep"] = "last"
    stream_prefill: bool = True
    residency: str | Path | None = None
    decay: float = 0.99
    boost: float = 1.0
    max_score: float = 1.0
    affinity_from: Literal["demand", "executed"] = "demand"
    max_policy_tokens: int = 64
    verify: bool = False
    timers: bool = False
    timeout_s: float = 60.0
    link_gbps: float | None = None

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in ("slots", "resident", "gpu_memory")}
        given = {name: value for name, value in given.items() if value is not None}
        if len(given) != 1:
            raise ValueError(f"give exactly one of slots, resident and gpu_memory, got {given}")
        if self.gpu_memory is not None:
            parse_bytes("gpu_memory", self.gpu_memory)
        if self.pinned_memory is not None:
            parse_bytes("pinned_memory", self.pinned_memory, minimum=0)
        if self.prefill not in ("last", "warm", "keep"):
            raise ValueError(f"prefill must be 'last', 'warm' or 'keep', got {self.prefill!r}")
        staging = self.staging_slots
        if staging is not None and (
            not isinstance(staging, int) or isinstance(staging, bool) or staging < 0
        ):
            raise ValueError(f"staging_slots must be an int >= 0, got {staging!r}")
        for name in ("pool", "bypass", "stream_prefill", "verify", "timers"):
            value = getattr(self, name)
            if not isinstance(value, bool) and not (name == "pool" and value is None):
                raise TypeError(f"{name} must be True or False, got {value!r}")
        if self.link_gbps is not None and not self.link_gbps > 0:
            raise ValueError(f"link_gbps must be > 0, got {self.link_gbps!r}")
        eviction_policy(self.eviction)
        check_timeout(self.timeout_s)
        check_predictors(self.prefetch)

    @property
    def most_staging(self) -> int:
        """Return the staging slots that are made unless every expert has a slot."""
        return STAGING_SLOTS if self.staging_slots is None else self.staging_slots

    def choose_slots(
        self, num_layers: int, num_experts: int, top_k: int, needs: MemoryNeeds | None
    ) -> SlotChoice:
        """Return how many slots there are and who shares them.

        Args:
            num_layers, num_experts, top_k: Sizes of the model: L, E and K.
            needs: Memory beside the slots; only where ``gpu_memory`` is given.

        Raises:
            TypeError, ValueError: Slots outside their bounds, or a budget that is too small.
        """
        L, E = num_layers, num_experts
        if needs is not None:
            return self._within(parse_bytes("gpu_memory", self.gpu_memory), E, top_k, needs)
        if self.resident is not None:
            per_layer = slots_of_share(self.resident, E)
            is_share = isinstance(self.resident, float)
            total = max(1, int(self.resident * E * L + 1e-9)) if is_share else per_layer * L
        else:
            check_slots(self.slots, E)
            per_layer, total = self.slots, self.slots * L
        pool = per_layer < min(2 * top_k, E) if self.pool is None else self.pool
        staging = 0 if per_layer == E else self.most_staging
        return SlotChoice(total if pool else per_layer, pool, staging)

    def _within(self, gpu_memory: int, E: int, top_k: int, needs: MemoryNeeds) -> SlotChoice:
        budget = needs.split(gpu_memory, E, top_k)
        pool = budget.pool if self.pool is None else self.pool
        staging = self.most_staging if budget.staging else 0
        if pool:
            total = (gpu_memory - needs.beside_slots - budget.staging) // needs.expert
            return SlotChoice(min(total, E * needs.layers), True, staging)
        return SlotChoice(needs.slots_within(gpu_memory, E), False, staging)
