"""Hit rates of a routing trace over cache sizes and eviction policies, without the model.

Every token is a call of its own, from the first on: a row is decoded, none of it is a prompt. So
replayed, exact routing hits what a live offloader hits, pair for pair, as far as the routers gave
it the same logits (in half precision a call of one token may round otherwise than a row). A
policy that swaps would change what the layers above see, which a trace cannot show; its hit
rates here are an approximation and are marked as such.

Shape suffixes: L MoE layers, N rows of text, T tokens, E experts, K experts per token.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..adaptive import Adaptive
from ..kernels.route_ref import Rule
from ..offload.eviction import DEFAULT, POLICIES
from ..policies import Policy, layer_strengths
from .replay_engine import BELADY, Ranking, replay
from .simulate import CacheRule, DecodeCaches, chooser, route_side_by_side
from .trace import RoutingTrace

OPTIMUM = "belady"


@dataclass(frozen=True)
class Replayed:
    """What one cache hit.

    Attributes:
        slots: Per layer; of a pool, in all.
        of: Experts that share them.
        eviction: A policy of :data:`moe_gpu.offload.eviction.POLICIES`, or ``"belady"``.
        bypass: Newcomers compete in the ranking.
        hits_N: Hits of each row, over all layers, int64.
        pairs: Routed pairs of each row.
        tokens: Tokens of each row.
        policy: Routing policy; None is exact. Others are approximate.
    """

    slots: int
    of: int
    eviction: str
    bypass: bool
    hits_N: torch.Tensor
    pairs: int
    tokens: int
    policy: Policy | None = None

    @property
    def hit_rate(self) -> float:
        """Return hits per pair."""
        return self.hits_N.double().mean().item() / self.pairs

    @property
    def loads_per_token(self) -> float:
        """Return the experts loaded per token, over all layers."""
        return self.pairs * (1 - self.hit_rate) / self.tokens

    @property
    def name(self) -> str:
        """Return policy and eviction in words; ``~`` marks what is approximate."""
        words = self.eviction.replace("_", " ") + (" with bypass" if self.bypass else "")
        if self.policy is None:
            return words
        return f"~ {type(self.policy).__name__}({self.policy.strength:g}), {words}"


def default_slots(num_experts: int, top_k: int) -> list[int]:
    """Return K slots, and a quarter, half and three quarters of the experts."""
    shares = (num_experts // 4, num_experts // 2, 3 * num_experts // 4)
    return sorted({top_k, *(max(top_k, slots) for slots in shares)})


def replay_trace(
    trace: RoutingTrace,
    slots: Sequence[int] | None = None,
    *,
    evictions: Sequence[str] = (*POLICIES, OPTIMUM),
    policies: Sequence[Policy] = (),
    pool: bool = False,
    decay: float = 0.98,
    boost: float = 0.02,
    max_score: float = 1.0,
    progress: bool = False,
) -> list[Replayed]:
    """Replay a trace through caches of several sizes; each starts full, as an offloader does.

    Args:
        trace: Of :func:`~moe_gpu.tuning.trace.record_trace`.
        slots: Slots per layer, each in [K, E]. Default: :func:`default_slots`.
        evictions: Names of eviction policies, each replayed without and with bypass; ``"belady"``
            is the optimum for exact routing. In LRU a newcomer never loses, with or without.
        policies: Routing policies to approximate under the default eviction, for slots per layer.
        pool: One pool of L x ``slots`` for all layers.
        decay: Of the affinity per token.
        boost: Affinity added to a chosen expert.
        max_score: Affinity clamp.
        progress: Show a bar on stderr.

    Returns:
        Exact routing by slots, eviction and bypass, then the policies by slots.

    Raises:
        TypeError: An adaptive policy: its strength moves with the traffic.
        ValueError: No slots or slots out of bounds, an unknown eviction, affinity constants out of
            bounds, or policies with a pool.
    """
    E, K, L = trace.num_experts, trace.top_k, trace.num_layers
    slots = default_slots(E, K) if slots is None else list(slots)
    for number in slots:
        if isinstance(number, bool) or not isinstance(number, int) or not K <= number <= E:
            raise ValueError(f"slots must lie in [{K}, {E}], got {number!r}")
    for name in evictions:
        if name not in (*POLICIES, OPTIMUM):
            known = ", ".join(map(repr, (*POLICIES, OPTIMUM)))
            raise ValueError(f"eviction must be one of {known}, got {name!r}")
    if not slots:
        raise ValueError("slots must name at least one number")
    if not (0 <= decay <= 1 and 0 <= boost < math.inf and 0 < max_score < math.inf):
        raise ValueError(
            "decay must lie in [0, 1], boost be finite and >= 0 and max_score finite and > 0, got "
            f"{decay}, {boost}, {max_score}"
        )
    for policy in policies:
        if isinstance(policy, Adaptive):
            raise TypeError(f"policy must have a fixed strength, got {policy}")
    if pool and policies:
        raise ValueError("policies can be replayed with slots per layer only, not with a pool")

    constants = decay, boost, max_score
    rankings = [
        BELADY
        if name == OPTIMUM
        else Ranking(name, constants if name.startswith("affinity") else None)
        for name in evictions
    ]
    demand_NTLK = trace.demand().numpy()
    N, T = trace.rows, trace.tokens
    apart = 1 if pool else L
    # streams of one table each
    demand_CTLK = demand_NTLK if pool else demand_NTLK.transpose(0, 2, 1, 3).reshape(N * L, T, 1, K)
    capacities = [number * L if pool else number for number in slots]
    found = []
    if rankings:
        hits = replay(
            demand_CTLK, E, rankings, capacities, T, label="replay" * progress, filled=True
        )
        hits = hits.reshape(N, apart, len(rankings), 2, len(slots)).sum(1)
        for z, capacity in enumerate(capacities):
            for r, name in enumerate(evictions):
                for bypass in (False, True)[: 1 if name == "lru" else 2]:
                    hits_N = torch.from_numpy(hits[:, r, int(bypass), z].copy())
                    found.append(
                        Replayed(capacity, E * (L // apart), name, bypass, hits_N, T * L * K, T)
                    )
    cache = CacheRule(decay=decay, boost=boost, max_score=max_score)
    for number in slots:
        for policy in policies:
            hits_N = _approximate(trace, number, policy, cache)
            found.append(Replayed(number, E, DEFAULT, True, hits_N, T * L * K, T, policy))
    return found


def _approximate(trace, slots, policy, cache) -> torch.Tensor:
    """Return the hits of each row where lower layers' swaps change nothing above."""
    strengths_L = layer_strengths(policy, trace.num_layers)
    hits_N = torch.zeros(trace.rows, dtype=torch.int64)
    layers = zip(trace.logits_LNTE, trace.biases(), strengths_L, strict=True)
    for logits_NTE, bias_E, strength in layers:
        caches = DecodeCaches(trace.rows, trace.num_experts, slots, cache)
        choose = chooser(policy, trace.top_k, strength if policy.rule != Rule.EXACT else 0.0)
        steps = route_side_by_side(logits_NTE, trace.top_k, choose, caches, trace.rule, bias_E)
        hits_N += trace.tokens * trace.top_k - steps.loads_BT.sum(1)
    return hits_N
