"""Who leaves when a slot is needed: replaceable victim policies in plain Python.

A policy ranks; who may be evicted at all (no lease, not needed by the step) is decided in
:mod:`moe_gpu.offload.plan`.
"""

from collections.abc import Sequence
from typing import Protocol


class EvictionPolicy(Protocol):
    """Orders experts by how readily they give up their slot."""

    def rank(
        self, experts: Sequence[int], last_use_E: Sequence[int], affinity_E: Sequence[float]
    ) -> list[int]:
        """Return ``experts``, the one to evict first in front; the same input, the same order.

        Args:
            experts: Resident experts that may be evicted.
            last_use_E: Step that last needed each expert of the layer; larger is more recent.
            affinity_E: Affinity of each expert of the layer after the current step.
        """


class LRU:
    """Least recently used first, lower id among those of one step."""

    def rank(self, experts, last_use_E, affinity_E):
        """Order by the step that last needed the expert; see :class:`EvictionPolicy`."""
        return sorted(experts, key=lambda expert: (last_use_E[expert], expert))


class Affinity:
    """Lowest affinity first; ties by least recently used, then lower id."""

    def rank(self, experts, last_use_E, affinity_E):
        """Order by decayed activation history; see :class:`EvictionPolicy`."""
        return sorted(experts, key=lambda expert: (affinity_E[expert], last_use_E[expert], expert))


POLICIES = {"affinity": Affinity, "lru": LRU}


def eviction_policy(eviction: str | EvictionPolicy) -> EvictionPolicy:
    """Return the policy of that name, or the object itself if it can rank.

    Raises:
        ValueError: An unknown name.
        TypeError: An object without ``rank``.
    """
    if isinstance(eviction, str):
        if eviction not in POLICIES:
            known = ", ".join(repr(name) for name in POLICIES)
            raise ValueError(f"eviction must be one of {known} or an object, got {eviction!r}")
        return POLICIES[eviction]()
    if not callable(getattr(eviction, "rank", None)):
        raise TypeError(f"eviction must have a method rank(...), got {eviction!r}")
    return eviction
