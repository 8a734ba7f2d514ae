"""Rules to compare with that are no policy of the library, and a control.

Shape suffixes: B rows, E experts, K experts per token.
"""

from dataclasses import dataclass

import torch

from moe_gpu import QualityBudget
from moe_gpu.kernels.route_ref import Rule, Selection, select_ref
from moe_gpu.kernels.score_ref import rank_experts
from moe_gpu.policies import Policy
from moe_gpu.tuning.simulate import CacheRule, DecodeCaches, chooser


@dataclass(frozen=True)
class RunningRangeBonus:
    """Cache-Prior: a bonus of ``strength`` x the layer's running mean of max - min of the logits.

    Source:
        arXiv 2412.00099, with the constants of its re-implementations: the mean starts at the
        first token's range and moves by 1 % per token. J experts are protected.
    """

    strength: float
    protect: int = 1
    rate: float = 0.01

    @property
    def family(self) -> str:
        """Return what rows side by side must share."""
        return f"running range J={self.protect}"

    def chooser(self, top_k, strength_B1):
        """Return how one layer chooses."""
        mean_B1 = None

        def choose(scores, resident_BE):
            nonlocal mean_B1
            scores_BE = scores.selection_TE
            range_B1 = scores_BE.amax(1, keepdim=True) - scores_BE.amin(1, keepdim=True)
            mean_B1 = range_B1 if mean_B1 is None else mean_B1.lerp(range_B1, self.rate)
            return select_ref(
                scores_BE, resident_BE, top_k, Rule.BONUS, strength_B1 * mean_B1, self.protect
            )

        return choose


@dataclass(frozen=True)
class RankWindow:
    """Max-Rank: residents among the first ``strength`` ranks go ahead of all but the protected.

    Source:
        arXiv 2412.00099, the first of its three rules.
    """

    strength: float
    protect: int = 1

    @property
    def family(self) -> str:
        """Return what rows side by side must share."""
        return f"rank window J={self.protect}"

    def chooser(self, top_k, strength_B1):
        """Return how one layer chooses."""

        def choose(scores, resident_BE):
            scores_BE = scores.selection_TE
            E = scores_BE.shape[1]
            order_BE = rank_experts(scores_BE)
            rank_E = torch.arange(E)
            ahead_BE = resident_BE.gather(1, order_BE) & (rank_E < strength_B1)
            place_BE = rank_E - E * ahead_BE.long() - 2 * E * (rank_E < self.protect)
            ranks_BK = place_BE.argsort(1)[:, :top_k].sort(1).values
            return _selection(scores_BE, order_BE, order_BE.gather(1, ranks_BK))

        return choose


@dataclass(frozen=True)
class NearTieNull:
    """Control: as many swaps as a policy takes, between neighbours in rank, residency ignored.

    The policy runs along with a cache of its own. The number of swaps that it takes for a token
    replaces as many of the last ranks of *another row's* token at the same place by the next
    ranks. It saves nothing; what it costs is what swaps cost that are not chosen.
    """

    policy: Policy
    slots: int
    cache: CacheRule

    @property
    def strength(self) -> float:
        """Return the strength of the policy."""
        return self.policy.strength

    @property
    def family(self) -> str:
        """Return a name of its own: rows of one setting exchange their counts."""
        return f"null of {self.policy} {self.slots} {self.cache}"

    def chooser(self, top_k, strength_B1):
        """Return how one layer chooses."""
        decide = chooser(self.policy, top_k, strength_B1)
        caches = None

        def choose(scores, resident_BE):
            nonlocal caches
            scores_BE = scores.selection_TE
            B, E = scores_BE.shape
            if caches is None:
                caches = DecodeCaches(B, E, self.slots, self.cache, scores_BE.device)
            picked = decide(scores, caches.resident_BE)
            mark_BE = torch.zeros(B, E, dtype=torch.bool)
            needed_BE = mark_BE.scatter(1, picked.ids_TK, True)
            demand_BE = mark_BE.scatter(1, picked.demand_TK, True)
            caches.use(needed_BE, demand_BE)
            swaps_B1 = (demand_BE & ~needed_BE).sum(1, keepdim=True).roll(1, 0)
            order_BE = rank_experts(scores_BE)
            rank_K = torch.arange(top_k)
            ranks_BK = rank_K + swaps_B1 * (rank_K >= top_k - swaps_B1)
            return _selection(scores_BE, order_BE, order_BE.gather(1, ranks_BK))

        return choose


def _selection(scores_BE, order_BE, ids_BK) -> Selection:
    mass_BE = scores_BE.softmax(1)
    demand_BK = order_BE[:, : ids_BK.shape[1]]
    wanted_B = mass_BE.gather(1, demand_BK).sum(1)
    moved_B = 1 - mass_BE.gather(1, ids_BK).sum(1) / wanted_B
    return Selection(demand_BK, ids_BK, moved_B.clamp(min=0))


def null_of(budget: QualityBudget, slots: int, cache: CacheRule) -> NearTieNull:
    """Return the control of a budget."""
    return NearTieNull(budget, slots, cache)
