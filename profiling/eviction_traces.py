"""Router demand to replay through caches of experts: recorded from a model, and drawn.

Shape suffixes: G traces, N streams per trace, T tokens, L layers, K experts per token, E experts
per layer, C streams replayed side by side, U units of the bootstrap.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from tqdm import tqdm


@dataclass(frozen=True)
class Drift:
    """How the demand of a synthetic layer moves.

    Attributes:
        zipf: Exponent of the popularity over the ranks of a session.
        session, rerank: A session lasts ``session`` tokens on average (geometric, the same in all
            layers); the next one shuffles that share of the popularity ranks.
        phase: Likewise, and all ranks are shuffled. 0: never.
        burst, memory: Each expert has an AR(1) logit of standard deviation ``burst`` whose
            correlation falls to 1/e in ``memory`` tokens.
        scan: Probability that a pair goes to an expert drawn evenly instead.
    """

    zipf: float
    session: int
    rerank: float
    phase: int
    burst: float
    memory: int
    scan: float


DRIFTS = {
    "popular": Drift(zipf=1.2, session=512, rerank=0.1, phase=0, burst=0.7, memory=32, scan=0.0),
    "drift": Drift(zipf=1.0, session=256, rerank=0.3, phase=1024, burst=1.0, memory=32, scan=0.02),
    "bursts": Drift(zipf=0.5, session=256, rerank=0.3, phase=1024, burst=2.0, memory=16, scan=0.02),
    "scans": Drift(zipf=1.2, session=512, rerank=0.2, phase=1024, burst=0.7, memory=32, scan=0.2),
}


def synthesize(
    drift: Drift, num_experts: int, top_k: int, tokens: int, layers: int, seed: int
) -> np.ndarray:
    """Draw demand, ``(T, L, K)``: top-k of log popularity + burst + Gumbel noise, per token.

    The Gumbel noise makes it K draws without replacement, in proportion to popularity x burst.
    """
    rng = np.random.default_rng(seed)
    E, K, T, L = num_experts, top_k, tokens, layers
    popularity_E = -drift.zipf * np.log(np.arange(1, E + 1))
    rank_LE = rng.permuted(np.tile(np.arange(E), (L, 1)), axis=1)
    burst_LE = rng.normal(size=(L, E))
    keep = math.exp(-1 / drift.memory)
    demand_TLK = np.empty((T, L, K), dtype=np.int64)
    for t in range(T):
        new_session, new_phase = rng.random(2)
        if drift.phase and new_phase < 1 / drift.phase:
            rank_LE = rng.permuted(rank_LE, axis=1)
        elif new_session < 1 / drift.session:
            chosen = rng.permutation(E)[: round(E * drift.rerank)]
            rank_LE[:, chosen] = rng.permuted(rank_LE[:, chosen], axis=1)
        burst_LE = keep * burst_LE + math.sqrt(1 - keep * keep) * rng.normal(size=(L, E))
        logits_LE = popularity_E[rank_LE] + drift.burst * burst_LE + rng.gumbel(size=(L, E))
        demand_LK = (-logits_LE).argpartition(K - 1, axis=1)[:, :K]
        for layer, pair in zip(*np.nonzero(rng.random((L, K)) < drift.scan), strict=True):
            others = np.setdiff1d(np.arange(E), demand_LK[layer])
            demand_LK[layer, pair] = rng.choice(others)
        demand_TLK[t] = demand_LK
    return demand_TLK


@torch.no_grad()
def record(model, rows_NT: torch.Tensor, batch: int = 8) -> np.ndarray:
    """Return the exact-routing demand of token rows, ``(N, T, L, K)``."""
    routers = [layer.mlp.gate for layer in model.model.layers]
    seen: list[torch.Tensor] = []

    def note(router, args, output):
        logits_TE = output[0].float()
        seen.append(logits_TE.argsort(descending=True, stable=True)[:, : router.top_k])

    hooks = [router.register_forward_hook(note) for router in routers]
    try:
        demand = []
        for part_NT in rows_NT.split(batch):
            seen.clear()
            model.model(part_NT)
            demand.append(torch.stack(seen, 1).unflatten(0, part_NT.shape))
    finally:
        for hook in hooks:
            hook.remove()
    return torch.cat(demand).numpy()


@dataclass
class Group:
    """Traces of one shape: demand ``(G, N, T, L, K)``, cut into units of ``unit`` tokens."""

    name: str
    traces: list[str]
    num_experts: int
    demand: np.ndarray
    unit: int

    @property
    def top_k(self) -> int:
        """Return K."""
        return self.demand.shape[-1]

    def layers_apart(self) -> np.ndarray:
        """Return the demand with every layer a stream of its own, ``(G * N * L, T, 1, K)``."""
        return np.moveaxis(self.demand, 3, 2).reshape(-1, self.demand.shape[2], 1, self.top_k)

    def pooled(self) -> np.ndarray:
        """Return the demand as streams over all layers, ``(G * N, T, L, K)``."""
        return self.demand.reshape(-1, *self.demand.shape[2:])

    def kept(self) -> np.ndarray:
        """Return the share of experts that the token before needed too, ``(G,)``."""
        before, now = self.demand[:, :, :-1], self.demand[:, :, 1:]
        again = (now[..., :, None] == before[..., None, :]).any(-1)
        return again.reshape(len(again), -1).mean(1)

    def rates(self, hits: np.ndarray) -> np.ndarray:
        """Turn hits of either shape, ``(C, U, ...)``, into hit rates per unit ``(G, N * U, ...)``."""
        G, N, _, L, K = self.demand.shape
        hits = hits.reshape(G, N, -1, *hits.shape[1:]).sum(2)
        return hits.reshape(G, -1, *hits.shape[3:]) / (self.unit * L * K)


def recorded_groups(folder: Path, sequences: int | None, tokens: int | None) -> tuple[Group, Group]:
    """Record the tiny model; return the group to choose on and the group to report.

    Args:
        folder: The model with its ``held_out.safetensors``.
        sequences: Rows per domain, None for all; the first half is to choose on.
        tokens: Of each row, None for all.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    ).eval()
    domains = dict(sorted(load_file(folder / "held_out.safetensors").items()))
    demand = {
        name: record(model, rows[:sequences, :-1][:, :tokens].long())
        for name, rows in tqdm(domains.items(), desc="recording", unit="domain")
    }
    demand_DNTLK = np.stack(list(demand.values()))
    N = demand_DNTLK.shape[1]
    changing_NTLK = demand_DNTLK[np.arange(N) % len(demand), np.arange(N)]
    demand_GNTLK = np.concatenate([demand_DNTLK, changing_NTLK[None]])
    names = [*demand, "changing domain"]

    def group(rows: slice) -> Group:
        part = demand_GNTLK[:, rows]
        G, _, T, L, K = part.shape
        stream = part.reshape(G, 1, -1, L, K)  # sequences one after another
        return Group("recorded, 8 top-2", names, model.config.num_local_experts, stream, T)

    return group(slice(0, N // 2)), group(slice(N // 2, N))


def synthetic_group(num_experts: int, top_k: int, tokens: int, layers: int, seeds) -> Group:
    """Draw every drift for every seed."""
    demand = [
        [synthesize(drift, num_experts, top_k, tokens, layers, seed) for seed in seeds]
        for drift in DRIFTS.values()
    ]
    name = f"synthetic, {num_experts} top-{top_k}"
    return Group(name, list(DRIFTS), num_experts, np.array(demand), tokens)
