"""Who leaves when a slot is needed: replaceable victim policies in plain Python.

A policy ranks; who may be evicted at all (no lease, not needed by the step) and whether a
newcomer may stay is decided in :mod:`moe_gpu.offload.plan`. Ties always go the same way: the key
that is needed later (in a pool, of the layer that runs last), then the lower key.
"""

from collections.abc import Sequence
from math import sqrt
from typing import Protocol

from .history import History


class EvictionPolicy(Protocol):
    """Orders experts by how readily they give up their slot."""

    def rank(self, keys: Sequence[int], history: History) -> list[int]:
        """Return ``keys``, the one to evict first in front; the same input, the same order.

        Args:
            keys: Experts that may be evicted, see :mod:`moe_gpu.offload.history`.
            history: Their use, the current step included.
        """


class LRU:
    """Least recently used first."""

    def rank(self, keys, history):
        """Order by the age of the last use; see :class:`EvictionPolicy`."""
        return sorted(keys, key=lambda key: (-history.age(key), -history.wait(key), key))


class LFU:
    """Least frequently used first, over all steps so far; among equals the least recent."""

    def rank(self, keys, history):
        """Order by the number of steps that needed the expert; see :class:`EvictionPolicy`."""
        return sorted(
            keys,
            key=lambda key: (history.uses(key), -history.age(key), -history.wait(key), key),
        )


class Affinity:
    """Lowest affinity first; among equals the least recent."""

    def rank(self, keys, history):
        """Order by decayed activation history; see :class:`EvictionPolicy`."""
        affinity = history.affinity
        return sorted(
            keys, key=lambda key: (affinity[key], -history.age(key), -history.wait(key), key)
        )


class AffinityOverAge:
    """Lowest ``affinity / (age + 1)`` first: frequency with recency.

    Source:
        The ratio of frequency to age of LFRU caches, with a decayed frequency.
    """

    def rank(self, keys, history):
        """Order by affinity over age; see :class:`EvictionPolicy`."""
        affinity = history.affinity

        def order(key):
            age = history.age(key)
            return affinity[key] / (age + 1), -age, -history.wait(key), key

        return sorted(keys, key=order)


class AffinityOverRootAge:
    """Lowest ``affinity / sqrt(age + 1)`` first: half way between affinity and the ratio.

    Source:
        ``profiling/results/eviction.md``: nearly the gain of affinity where experts are popular,
        and half of its loss where demand comes in bursts.
    """

    def rank(self, keys, history):
        """Order by affinity over the root of the age; see :class:`EvictionPolicy`."""
        affinity = history.affinity

        def order(key):
            age = history.age(key)
            return affinity[key] / sqrt(age + 1), -age, -history.wait(key), key

        return sorted(keys, key=order)


POLICIES = {
    "affinity": Affinity,
    "affinity_over_age": AffinityOverAge,
    "affinity_over_root_age": AffinityOverRootAge,
    "lfu": LFU,
    "lru": LRU,
}


DEFAULT = "affinity_over_root_age"  # with bypass; measured in profiling/results/eviction.md


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
