"""What a cache of experts hits when it replays recorded demand: the shipped policies, and Belady.

Exact routing, one token per step. Every step of a layer touches the history, learns the affinity
as the route kernel does, and loads what is missing, ascending. Free slots are filled first.
Without bypass the newcomers stay and the lowest in ``rank(residents that the step does not
need)`` leave. With bypass the lowest in ``rank(those residents + the missing)`` go: a resident
leaves; a missing expert passes through a staging slot and displaces nobody.

Belady's optimum without bypass keeps the newcomers and evicts what is needed last; with bypass it
keeps whatever is needed soonest. Nothing that fetches on demand misses less.

:func:`replay_policy` steps the shipped classes; :func:`replay` steps many caches side by side and
hits the same, pair for pair.

Shape suffixes: T tokens, L layers, K experts per token, E experts per layer, X = L * E keys of a
table, C streams, R rankings, Z cache sizes, M = C * R caches of one size, A affinity constants.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from moe_gpu.kernels.route_ref import age_affinity_ref
from moe_gpu.offload.eviction import LRU
from moe_gpu.offload.history import History

FOREVER = 1 << 40  # next use of a key that is not needed again


class Ranking(NamedTuple):
    """A policy of :data:`POLICIES` with its affinity constants, or Belady's optimum."""

    policy: str
    constants: tuple[float, float, float] | None = None  # decay, boost, max_score


class Contender(NamedTuple):
    """A ranking, and whether newcomers compete in it."""

    ranking: Ranking
    bypass: bool


BELADY = Ranking("belady")


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


def following_uses(demand_CTLK: np.ndarray, num_experts: int) -> tuple[np.ndarray, np.ndarray]:
    """Return each key's first use ``(C, X)`` and, per pair, its next ``(C, T, L, K)``, in steps."""
    C, T, L, _ = demand_CTLK.shape
    upcoming_CX = np.full((C, L * num_experts), FOREVER)
    following = np.empty_like(demand_CTLK)
    rows = np.arange(C)[:, None]
    for t in reversed(range(T)):
        for layer in reversed(range(L)):
            keys_CK = layer * num_experts + demand_CTLK[:, t, layer]
            following[:, t, layer] = upcoming_CX[rows, keys_CK]
            upcoming_CX[rows, keys_CK] = t * L + layer
    return upcoming_CX, following


class Evidence:
    """History of C streams at once, and the place of every key in every ranking.

    The order of keys does not depend on who is resident, so caches of every size share it.
    """

    def __init__(
        self,
        demand_CTLK: np.ndarray,
        num_experts: int,
        rankings: Sequence[Ranking],
        layer_order: bool,
    ):
        C, _, self.L, _ = demand_CTLK.shape
        self.demand, self.E, self.rankings = demand_CTLK, num_experts, rankings
        X = self.L * num_experts
        self.rows = np.arange(C)[:, None]
        self.layer_X = np.arange(X) // num_experts
        self.layer_order = layer_order
        self.steps_L = np.zeros(self.L, dtype=np.int64)
        self.last_CX = np.zeros((C, X), dtype=np.int64)
        self.uses_CX = np.zeros((C, X), dtype=np.int64)
        constants = sorted({r.constants for r in rankings if r.constants})
        self.column = {c: a for a, c in enumerate(constants)}
        table = np.array(constants, dtype=np.float32).reshape(-1, 3)
        self.decay_A1, self.boost_A1, self.max_A1 = (table[:, i, None] for i in range(3))
        self.affinity_CAX = np.zeros((C, len(constants), X), dtype=np.float32)
        if BELADY in rankings:
            self.upcoming_CX, self.following = following_uses(demand_CTLK, num_experts)
        self.dtype = np.uint8 if X < 255 else np.uint16
        self.place_CRX = np.empty((C, len(rankings), X), dtype=self.dtype)

    def step(self, t: int, layer: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Learn from one step; return keys ``(C, K)``, need ``(C, X)``, place ``(C, R, X)``."""
        keys_CK = layer * self.E + self.demand[:, t, layer]
        need_CX = np.zeros(self.last_CX.shape, dtype=bool)
        need_CX[self.rows, keys_CK] = True
        self.steps_L[layer] += 1
        self.last_CX[self.rows, keys_CK] = self.steps_L[layer]
        self.uses_CX[self.rows, keys_CK] += 1
        part = slice(layer * self.E, (layer + 1) * self.E)
        affinity = self.affinity_CAX[:, :, part]
        affinity *= self.decay_A1
        affinity += self.boost_A1 * need_CX[:, None, part]
        np.minimum(affinity, self.max_A1, out=affinity)
        if BELADY in self.rankings:
            self.upcoming_CX[self.rows, keys_CK] = self.following[:, t, layer]
        return keys_CK, need_CX, self._places(layer)

    def _places(self, layer: int) -> np.ndarray:
        # a key that was never needed is no candidate, so its age does not matter
        age_CX = self.steps_L[self.layer_X] - self.last_CX
        later_CX = age_CX * self.L  # who leaves first among equals
        if self.layer_order:
            later_CX = later_CX + (self.layer_X - layer - 1) % self.L
        ties_CX = (-later_CX).argsort(axis=1, kind="stable")
        for r, (policy, constants) in enumerate(self.rankings):
            match policy:
                case "lru":
                    order_CX = ties_CX
                    np.put_along_axis(self.place_CRX[:, r], order_CX, self._count(), axis=1)
                    continue
                case "lfu":
                    value_CX = self.uses_CX
                case "belady":
                    value_CX = -self.upcoming_CX
                case "affinity":
                    value_CX = self.affinity_CAX[:, self.column[constants]]
                case "affinity_over_age" | "affinity_over_root_age":
                    # in float64, as Python divides
                    affinity = self.affinity_CAX[:, self.column[constants]].astype(np.float64)
                    root = np.sqrt if policy == "affinity_over_root_age" else np.asarray
                    value_CX = affinity / root(age_CX + 1)
            sorted_CX = np.take_along_axis(value_CX, ties_CX, axis=1).argsort(axis=1, kind="stable")
            order_CX = np.take_along_axis(ties_CX, sorted_CX, axis=1)
            np.put_along_axis(self.place_CRX[:, r], order_CX, self._count(), axis=1)
        return self.place_CRX

    def _count(self) -> np.ndarray:
        return np.arange(self.last_CX.shape[1], dtype=self.dtype)[None]


def replay(
    demand_CTLK: np.ndarray,
    num_experts: int,
    rankings: Sequence[Ranking],
    capacities: Sequence[int],
    unit: int,
    layer_order: bool = True,
    label: str = "",
) -> np.ndarray:
    """Step C streams through all caches side by side; a test holds it to :func:`replay_policy`.

    Args:
        demand_CTLK: Experts of every step.
        num_experts: E.
        rankings: R of them, each replayed without and with bypass.
        capacities: Z slots per table, at least K.
        unit: Tokens whose hits are summed; T is a multiple.
        layer_order: Break ties by which layer runs later, as ``History.wait`` does.
        label: Of the progress bar.

    Returns:
        hits: ``(C, T / unit, R, 2, Z)``; index 1 of the fourth is bypass.
    """
    C, T, L, K = demand_CTLK.shape
    if min(capacities) < K:
        raise ValueError(f"capacities must be at least {K}, the experts of a step: {capacities}")
    R, Z, X = len(rankings), len(capacities), L * num_experts
    evidence = Evidence(demand_CTLK, num_experts, rankings, layer_order)
    gone = np.iinfo(evidence.dtype).max
    capacity_Z1 = np.array(capacities)[:, None]
    streams_M = np.repeat(np.arange(C), R)  # M = C * R caches of one size and kind
    optimal_M = np.tile([ranking == BELADY for ranking in rankings], C)
    resident = [np.zeros((X, Z, C * R), dtype=bool) for _ in range(2)]
    held = [np.zeros((Z, C * R), dtype=np.int64) for _ in range(2)]
    hits = np.zeros((2, T // unit, Z, C * R), dtype=np.int64)
    columns_M = np.arange(C * R)

    for t in tqdm(range(T), desc=label, unit="token", leave=False, disable=not label):
        for layer in range(L):
            keys_CK, need_CX, place_CRX = evidence.step(t, layer)
            place_X1M = np.ascontiguousarray(place_CRX.transpose(2, 0, 1)).reshape(X, 1, -1)
            need_X1M = need_CX.T[:, None, streams_M]
            keys_KM = keys_CK.T[:, streams_M]
            for bypass, has in enumerate(resident):
                hits_ZM = sum(has[keys_M, :, columns_M].astype(np.int64) for keys_M in keys_KM).T
                hits[bypass, t // unit] += hits_ZM
                held[bypass] += K - hits_ZM
                leave_ZM = np.maximum(held[bypass] - capacity_Z1, 0)
                held[bypass] -= leave_ZM
                if bypass:
                    may_leave = has ^ need_X1M
                    may_leave[:, :, optimal_M] = (has | need_X1M)[:, :, optimal_M]
                else:
                    may_leave = has > need_X1M
                has |= need_X1M
                queue = np.where(may_leave, place_X1M, gone)
                for n in range(leave_ZM.max()):
                    leaves = (queue == queue.min(axis=0)) & (leave_ZM > n)
                    has ^= leaves
                    queue[leaves] = gone
    hits = hits.reshape(2, T // unit, Z, C, R)
    return hits.transpose(3, 1, 4, 0, 2)
