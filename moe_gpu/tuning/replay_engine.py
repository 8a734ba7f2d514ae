"""What caches of experts hit when they replay recorded demand: the shipped policies, and Belady.

Exact routing, one token per step. Every step of a layer touches the history, learns the affinity
as the route kernel does, and loads what is missing, ascending. Free slots are filled first.
Without bypass the newcomers stay and the lowest in ``rank(residents that the step does not
need)`` leave. With bypass the lowest in ``rank(those residents + the missing)`` go: a resident
leaves; a missing expert passes through a staging slot and displaces nobody.

Belady's optimum without bypass keeps the newcomers and evicts what is needed last; with bypass it
keeps whatever is needed soonest. Nothing that fetches on demand misses less.

Many caches step side by side, in NumPy; tests hold them to the shipped eviction classes and to a
live offloader, pair for pair.

Shape suffixes: T tokens, L layers, K experts per token, E experts per layer, X = L * E keys of a
table, C streams, R rankings, Z cache sizes, M = C * R caches of one size, A affinity constants.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

FOREVER = 1 << 40  # next use of a key that is not needed again


class Ranking(NamedTuple):
    """A policy of :data:`POLICIES` with its affinity constants, or Belady's optimum."""

    policy: str
    constants: tuple[float, float, float] | None = None  # decay, boost, max_score


BELADY = Ranking("belady")


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
        age_CX = self.steps_L[self.layer_X] - self.last_CX
        age_CX += (self.last_CX == 0) * (1 + self.steps_L.max())  # as History.age: older than any
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
    filled: bool = False,
) -> np.ndarray:
    """Step C streams through all caches side by side.

    Args:
        demand_CTLK: Experts of every step.
        num_experts: E.
        rankings: R of them, each replayed without and with bypass.
        capacities: Z slots per table, at least K.
        unit: Tokens whose hits are summed; T is a multiple.
        layer_order: Break ties by which layer runs later, as ``History.wait`` does.
        label: Of the progress bar.
        filled: Start with every slot filled, expert by expert over the layers, as an offloader does;
            else empty.

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
    if filled:
        key_X = np.arange(X)
        turn_X = key_X % num_experts * L + key_X // num_experts
        for bypass, has in enumerate(resident):
            has[:] = (turn_X[:, None] < capacity_Z1.T)[..., None]
            held[bypass][:] = np.minimum(capacity_Z1, X)
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
