"""Decode semantics at prefill speed: every token meets the cache that the tokens before it left.

Under teacher forcing a layer's choices depend on its own cache and on the layers below, so the
layers can run one after another, and within a layer all rows step through their tokens side by
side, each with a cache of its own. That is exact for caches of one layer each; a pool of slots
over all layers would have to go token by token.

Shape suffixes: B rows side by side, T tokens, E experts, K experts per token.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from ..kernels.route_ref import SIMILARITY, Selection, age_affinity_ref, select_ref
from ..kernels.score_ref import ScoreRule, Scores, mixing_weights, score_ref
from ..offload.eviction import DEFAULT, POLICIES
from ..policies import Policy


@dataclass(frozen=True)
class CacheRule:
    """Who leaves a layer's cache, as ``attach`` is asked for it; its defaults are the same."""

    eviction: str = DEFAULT
    bypass: bool = True
    decay: float = 0.98
    boost: float = 0.02
    max_score: float = 1.0
    affinity_from: Literal["demand", "executed", "served"] = "served"

    def __post_init__(self) -> None:
        if self.eviction not in POLICIES:
            known = ", ".join(map(repr, POLICIES))
            raise ValueError(f"eviction must be one of {known}, got {self.eviction!r}")

    def __str__(self) -> str:
        return self.eviction.replace("_", " ") + (" with bypass" if self.bypass else "")


LRU = CacheRule("lru", bypass=False)


class DecodeCaches:
    """One layer's expert caches, one per row, stepped token by token.

    Follows the offloader: a token loads what it misses, and as many leave: the first in the order
    of the eviction policy among the residents that the token does not need and, with bypass, the
    newcomers, which then only pass through a staging slot.

    Attributes:
        resident_BE: bool, who is in a slot.

    Args:
        rows: Caches side by side, B. Each starts with the first S experts.
        num_experts: E.
        slots: S, at least the experts of one token.
        rule: Who leaves.
        device: Of all tensors.
    """

    def __init__(
        self,
        rows: int,
        num_experts: int,
        slots: int,
        rule: CacheRule,
        device: torch.device | str | None = None,
    ):
        shape = (rows, num_experts)
        self.resident_BE = torch.zeros(shape, dtype=torch.bool, device=device)
        self.resident_BE[:, :slots] = True
        self._affinity_BE = torch.zeros(shape, device=device)
        self._last_use_BE = torch.zeros(shape, dtype=torch.int64, device=device)  # 0 never
        self._uses_BE = torch.zeros(shape, dtype=torch.int64, device=device)
        self._rule, self._step = rule, 0

    def use(self, needed_BE: torch.Tensor, demand_BE: torch.Tensor) -> torch.Tensor:
        """Give each row's token the experts it needs; return the misses, int64 ``(B,)``.

        Args:
            needed_BE: Executed experts, bool.
            demand_BE: What the router wanted, bool.
        """
        rule = self._rule
        self._step += 1
        chosen_BE = {
            "demand": demand_BE,
            "executed": needed_BE,
            "served": demand_BE & needed_BE,
        }[rule.affinity_from]
        self._affinity_BE = age_affinity_ref(
            self._affinity_BE, chosen_BE[None], rule.decay, rule.boost, rule.max_score
        )
        self._last_use_BE.masked_fill_(needed_BE, self._step)
        self._uses_BE += needed_BE
        missing_BE = needed_BE & ~self.resident_BE
        misses_B = missing_BE.sum(1)
        (rows_X,) = misses_B.nonzero(as_tuple=True)
        if len(rows_X):
            self._replace(rows_X, needed_BE[rows_X], missing_BE[rows_X], misses_B[rows_X])
        return misses_B

    def _replace(self, rows_X, needed_XE, missing_XE, misses_X) -> None:
        resident_XE = self.resident_BE[rows_X]
        may_leave_XE = resident_XE & ~needed_XE
        if self._rule.bypass:
            may_leave_XE |= missing_XE
        order_XE = self._order(rows_X)
        ranked_XE = may_leave_XE.gather(1, order_XE)
        leaves_XE = ranked_XE & (ranked_XE.cumsum(1) <= misses_X[:, None])
        left_XE = torch.zeros_like(ranked_XE).scatter(1, order_XE, leaves_XE)
        self.resident_BE[rows_X] = (resident_XE | needed_XE) & ~left_XE

    def _order(self, rows_X: torch.Tensor) -> torch.Tensor:
        """Return the experts of some rows in the order in which they leave, ``(X, E)``."""
        last_use_XE = self._last_use_BE[rows_X]
        age_XE = self._step - last_use_XE
        age_XE += (last_use_XE == 0) * (1 + self._step)  # as History.age: older than any other
        # among equals the oldest, then the lowest id: both sorts are stable
        order_XE = age_XE.argsort(dim=1, descending=True, stable=True)
        affinity_XE = self._affinity_BE[rows_X].double()  # as Python divides
        match self._rule.eviction:
            case "lru":
                return order_XE
            case "lfu":
                value_XE = self._uses_BE[rows_X]
            case "affinity":
                value_XE = affinity_XE
            case "affinity_over_age":
                value_XE = affinity_XE / (age_XE + 1)
            case "affinity_over_root_age":
                value_XE = affinity_XE / (age_XE + 1).double().sqrt()
        by_value_XE = value_XE.gather(1, order_XE).argsort(dim=1, stable=True)
        return order_XE.gather(1, by_value_XE)


# (scores (B, E), residents (B, E) bool) -> who is wanted and who is executed
Choose = Callable[[Scores, torch.Tensor], Selection]


def chooser(policy: Policy, top_k: int, strength: float | torch.Tensor) -> Choose:
    """Return how a policy chooses.

    Args:
        policy: Gives the rule and the protection.
        top_k: K.
        strength: Bonus or budget in force, a number or ``(B, 1)``.
    """

    def choose(scores, resident_BE):
        s_BE, mass_BE, candidate_BE = scores
        how = (policy.rule, strength, policy.protect)
        return select_ref(s_BE, resident_BE, top_k, *how, mass_BE, candidate_BE)

    return choose


class Steps(NamedTuple):
    """One layer's routing of T tokens in B rows."""

    weights_BTK: torch.Tensor  # float32
    ids_BTK: torch.Tensor  # int64
    loads_BT: torch.Tensor  # int64, missing executed experts
    swaps_BT: torch.Tensor  # int64
    moved_BT: torch.Tensor  # float32, router mass that swaps moved, as a share of the demand's
    l1_BT: torch.Tensor  # float32, sum of |change| over the mixing weights
    price_BT: torch.Tensor  # float32, sum over swaps of the squared price of Rule.OUTPUT


def route_side_by_side(
    logits_BTE: torch.Tensor,
    top_k: int,
    choose: Choose,
    caches: DecodeCaches,
    rule: ScoreRule = ScoreRule(),  # noqa: B008 - frozen dataclass
    bias_E: torch.Tensor | None = None,
) -> Steps:
    """Route T tokens of B rows in order.

    Args:
        logits_BTE: Router logits, any float dtype.
        top_k: K.
        choose: The policy.
        caches: The rows' caches; advanced.
        rule: How the router scores.
        bias_E: Its correction bias, ``(E,)``.
    """
    B, T, E = logits_BTE.shape
    device = logits_BTE.device
    ids_BTK = torch.empty(B, T, top_k, dtype=torch.int64, device=device)
    demand_BTK = torch.empty_like(ids_BTK)
    loads_BT = torch.empty(B, T, dtype=torch.int64, device=device)
    moved_BT = torch.empty(B, T, device=device)
    logits_BTE = logits_BTE.float()
    scores = Scores(
        *(
            None if part is None else part.unflatten(0, (B, T))
            for part in score_ref(logits_BTE.flatten(0, 1), rule, bias_E)
        )
    )
    for t in range(T):
        now = Scores(*(None if part is None else part[:, t] for part in scores))
        picked = choose(now, caches.resident_BE)
        needed_BE, demand_BE = _mark(picked.ids_TK, E), _mark(picked.demand_TK, E)
        loads_BT[:, t] = caches.use(needed_BE, demand_BE)
        ids_BTK[:, t], demand_BTK[:, t] = picked.ids_TK, picked.demand_TK
        moved_BT[:, t] = picked.moved_T

    def weigh(ids_BTK):
        weights = mixing_weights(logits_BTE.flatten(0, 1), ids_BTK.flatten(0, 1), rule)
        return weights.unflatten(0, (B, T))

    def spread(ids_BTK, weights_BTK):
        return torch.zeros_like(logits_BTE).scatter_(2, ids_BTK, weights_BTK)

    weights_BTK = weigh(ids_BTK)
    l1_BT = (spread(ids_BTK, weights_BTK) - spread(demand_BTK, weigh(demand_BTK))).abs().sum(2)
    same_BTKK = ids_BTK[..., None] == demand_BTK[..., None, :]
    came_BTK, left_BTK = ~same_BTKK.any(-1), ~same_BTKK.any(-2)
    price_BT = _squared_prices(scores.mass_TE, demand_BTK, left_BTK, ids_BTK, came_BTK)
    return Steps(weights_BTK, ids_BTK, loads_BT, came_BTK.sum(2), moved_BT, l1_BT, price_BT)


def _squared_prices(mass_BTE, demand_BTK, left_BTK, ids_BTK, came_BTK) -> torch.Tensor:
    """Sum what Rule.OUTPUT would ask for the swaps, the worst that left with the best that came."""
    demand_mass_BTK = mass_BTE.gather(2, demand_BTK)
    share_BTK = demand_mass_BTK / demand_mass_BTK.sum(2, keepdim=True)
    out_BTK = torch.where(left_BTK, share_BTK, torch.inf).sort(2).values
    in_BTK = mass_BTE.gather(2, ids_BTK) / demand_mass_BTK.sum(2, keepdim=True)
    in_BTK = torch.where(came_BTK, in_BTK, -torch.inf).sort(2, descending=True).values
    out_BTK, in_BTK = (torch.where(x.isfinite(), x, 0.0) for x in (out_BTK, in_BTK))
    return (out_BTK**2 + in_BTK**2 - 2 * SIMILARITY * out_BTK * in_BTK).sum(2)


def _mark(ids_BK: torch.Tensor, num_experts: int) -> torch.Tensor:
    marked_BE = torch.zeros(len(ids_BK), num_experts, dtype=torch.bool, device=ids_BK.device)
    return marked_BE.scatter_(1, ids_BK, True)
