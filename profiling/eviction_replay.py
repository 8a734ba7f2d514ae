"""The plain way to replay demand, and what only the eviction study needs.

:func:`replay_policy` steps one stream through the shipped classes;
:func:`moe_gpu.tuning.replay_engine.replay` steps many caches side by side and hits the same, pair
for pair.

Shape suffixes: T tokens, L layers, K experts per token, E experts per layer.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from moe_gpu.kernels.route_ref import age_affinity_ref
from moe_gpu.offload.eviction import LRU
from moe_gpu.offload.history import History
from moe_gpu.tuning.replay_engine import Ranking


class Contender(NamedTuple):
    """A ranking, and whether newcomers compete in it."""

    ranking: Ranking
    bypass: bool


class Probation:
    """SLRU as a policy: experts used once since they were loaded leave before the protected ones.

    Args:
        protected: The most recent so many of those used again are protected.
    """

    def __init__(self, protected: int):
        self.protected = protected
        self._used_again: set[int] = set()

    def note(self, hits: Sequence[int], missing: Sequence[int]) -> None:
        """Take over what a step found."""
        self._used_again.update(hits)
        self._used_again.difference_update(missing)

    def rank(self, keys, history):
        """Order by segment, then by age; see :class:`moe_gpu.offload.eviction.EvictionPolicy`."""
        oldest_first = LRU().rank(keys, history)
        used_again = [key for key in oldest_first if key in self._used_again]
        protected = set(used_again[max(0, len(used_again) - self.protected) :])
        return sorted(oldest_first, key=lambda key: key in protected)


def replay_policy(
    demand_TLK: np.ndarray, num_experts: int, policy, capacity: int, bypass: bool, constants=None
) -> np.ndarray:
    """Step one stream through the shipped classes; return hits ``(T, L)``."""
    T, L, _ = demand_TLK.shape
    history = History(L, num_experts)
    affinity_LE = torch.zeros(L, num_experts)
    resident: set[int] = set()
    hits_TL = np.zeros((T, L), dtype=np.int64)
    note = getattr(policy, "note", None)
    for t, layer in np.ndindex(T, L):
        experts = sorted(demand_TLK[t, layer].tolist())
        needed = [layer * num_experts + expert for expert in experts]
        history.touch(layer, needed)
        if constants is not None:
            chosen_TE = torch.zeros(1, num_experts, dtype=torch.bool)
            chosen_TE[0, experts] = True
            affinity_LE[layer] = age_affinity_ref(affinity_LE[layer], chosen_TE, *constants)
            history.learn(layer, affinity_LE[layer].tolist())
        hits = [key for key in needed if key in resident]
        missing = [key for key in needed if key not in resident]
        hits_TL[t, layer] = len(hits)
        if note:
            note(hits, missing)
        go = len(resident) + len(missing) - capacity
        candidates = resident.difference(needed).union(missing if bypass else ())
        gone = policy.rank(sorted(candidates), history)[:go] if go > 0 else ()
        resident = resident.union(missing).difference(gone)
    return hits_TL
