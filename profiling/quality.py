"""What a routing policy costs and saves on a model's held-out text, with decode semantics.

Usage:
    python profiling/quality.py                      # the shipped tiny model, some minutes
    python profiling/quality.py --sequences 24       # a quick look

On a busy machine ``OMP_NUM_THREADS=1`` is several times faster: the tensors of a step are small.

Every token meets the expert cache that the tokens before it left, as in decoding. A layer's
choices depend on its own cache and on the layers below, so the layers run one after another, and
within a layer all sequences step through their tokens side by side, each with a cache of its
own. That is exact, and a test compares it with the attached model, hit for hit.

Each sequence starts with the first S experts of every layer resident. Perplexity changes are
paired: interval bounds are percentiles of a bootstrap over sequences that draws the same
sequences for both sides.
"""

import argparse
import json
import math
import os
import platform
import subprocess
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from safetensors.torch import load_file
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from moe_gpu import CacheBonus, Exact, MassBudget
from moe_gpu.huggingface.options import Options
from moe_gpu.kernels.route_ref import age_affinity_ref, mixing_weights, select_ref
from moe_gpu.policies import Policy

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "profiling" / "results"


class Eviction(NamedTuple):
    """Who leaves a cache: the name of a policy, and whether newcomers compete in its ranking."""

    policy: str
    bypass: bool

    def __str__(self) -> str:
        return self.policy.replace("_", " ") + (" with bypass" if self.bypass else "")


POLICIES: list[Policy] = [
    Exact(),
    *[CacheBonus(bonus) for bonus in (0.05, 0.15, 0.3, 0.5, 0.75, 1.0, 1.5)],
    *[CacheBonus(bonus, "logit_range", 1) for bonus in (0.025, 0.05, 0.1, 0.2)],
    *[MassBudget(budget) for budget in (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3)],
]
# the defaults of attach; LRU is measured beside them at a few points
EVICTION = Eviction(Options.eviction, Options.bypass)
AFFINITY = Options.decay, Options.boost, Options.max_score
LRU = Eviction("lru", bypass=False)
LRU_POINTS: list[Policy] = [Exact(), CacheBonus(), MassBudget(0.05), MassBudget(0.1)]
README_ROWS: list[tuple[Policy, Eviction]] = [
    (Exact(), EVICTION),
    (Exact(), LRU),
    *[(CacheBonus(bonus), EVICTION) for bonus in (0.15, 0.5)],
    *[(MassBudget(budget), EVICTION) for budget in (0.02, 0.05, 0.1, 0.2)],
]


class DecodeCaches:
    """One layer's expert caches, one per sequence, stepped token by token.

    Follows the offloader: a token loads what it misses, and as many leave: the first in the order
    of the eviction policy among the residents that the token does not need and, with bypass, the
    newcomers, which then only pass through a staging slot.

    Args:
        sequences: Caches side by side, N.
        num_experts: E.
        slots: S, at least the experts of one token.
        eviction: A policy of :data:`moe_gpu.offload.eviction.POLICIES`, and whether to bypass.
    """

    def __init__(self, sequences: int, num_experts: int, slots: int, eviction: Eviction):
        self.resident_NE = torch.zeros(sequences, num_experts, dtype=torch.bool)
        self.resident_NE[:, :slots] = True
        self.affinity_NE = torch.zeros(sequences, num_experts)
        self.last_use_NE = torch.zeros(sequences, num_experts, dtype=torch.int64)  # 0 never
        self.uses_NE = torch.zeros(sequences, num_experts, dtype=torch.int64)
        self.eviction, self.step = eviction, 0

    def use(self, needed_NE: torch.Tensor, demand_NE: torch.Tensor) -> torch.Tensor:
        """Give a token the experts it needs; return the misses of each sequence."""
        self.step += 1
        self.affinity_NE = age_affinity_ref(self.affinity_NE, demand_NE[None], *AFFINITY)
        self.last_use_NE[needed_NE] = self.step
        self.uses_NE += needed_NE
        missing_NE = needed_NE & ~self.resident_NE
        misses_N = missing_NE.sum(1)

        may_leave_NE = self.resident_NE & ~needed_NE
        if self.eviction.bypass:
            may_leave_NE |= missing_NE
        order_NE = self.order()
        ranked_NE = may_leave_NE.gather(1, order_NE)
        leaves_NE = ranked_NE & (ranked_NE.cumsum(1) <= misses_N[:, None])
        self.resident_NE |= needed_NE
        self.resident_NE &= ~torch.zeros_like(ranked_NE).scatter(1, order_NE, leaves_NE)
        return misses_N

    def order(self) -> torch.Tensor:
        """Return the experts in the order in which they leave, ``(N, E)``."""
        age_NE = self.step - self.last_use_NE
        age_NE += (self.last_use_NE == 0) * (1 + self.step)  # as History.age: older than any other
        # among equals the oldest, then the lowest id: both sorts are stable
        order_NE = age_NE.argsort(dim=1, descending=True, stable=True)
        affinity_NE = self.affinity_NE.double()  # as Python divides
        match self.eviction.policy:
            case "lru":
                return order_NE
            case "lfu":
                value_NE = self.uses_NE
            case "affinity":
                value_NE = affinity_NE
            case "affinity_over_age":
                value_NE = affinity_NE / (age_NE + 1)
            case "affinity_over_root_age":
                value_NE = affinity_NE / (age_NE + 1).double().sqrt()
            case unknown:
                raise ValueError(f"no simulation of eviction by {unknown!r}")
        by_value_NE = value_NE.gather(1, order_NE).argsort(dim=1, stable=True)
        return order_NE.gather(1, by_value_NE)


@dataclass
class Counts:
    """What one evaluation counted, per sequence: shapes (N,)."""

    nll: torch.Tensor  # summed over tokens
    loads: torch.Tensor  # summed over layers
    pairs: torch.Tensor
    swaps: torch.Tensor
    moved: torch.Tensor
    tokens: int  # predicted per sequence


def route_side_by_side(logits_NTE, top_k, policy, caches):
    """Route T tokens of N sequences in order; return weights, ids (N, T, K) and counts (N,)."""
    N, T, E = logits_NTE.shape
    ids_NTK = torch.empty(N, T, top_k, dtype=torch.int64)
    weights_NTK = torch.empty(N, T, top_k)
    misses_N, swaps_N, moved_N = (torch.zeros(N) for _ in range(3))
    for t in range(T):
        scores_NE = logits_NTE[:, t].float()
        picked = select_ref(
            scores_NE, caches.resident_NE, top_k, policy.rule, policy.strength, policy.protect
        )
        mark = torch.zeros(N, E, dtype=torch.bool)
        needed_NE, demand_NE = (
            mark.scatter(1, picked.ids_TK, True),
            mark.scatter(1, picked.demand_TK, True),
        )
        misses_N += caches.use(needed_NE, demand_NE)
        swaps_N += (demand_NE & ~needed_NE).sum(1)
        moved_N += picked.moved_T
        ids_NTK[:, t] = picked.ids_TK
        weights_NTK[:, t] = mixing_weights(scores_NE, picked.ids_TK)
    return weights_NTK, ids_NTK, misses_N, swaps_N, moved_N


@contextmanager
def simulated(model, sequences: int, slots: int, policy: Policy, eviction: Eviction, totals: dict):
    """Route every MoE layer of a Mixtral model through caches of ``slots`` experts."""
    routers = [layer.mlp.gate for layer in model.model.layers]

    def forward_of(router):
        def forward(hidden_states):
            x_TD = hidden_states.reshape(-1, router.hidden_dim)
            logits_TE = torch.nn.functional.linear(x_TD, router.weight)
            logits_NTE = logits_TE.view(sequences, -1, router.num_experts)
            caches = DecodeCaches(sequences, router.num_experts, slots, eviction)
            weights, ids, misses, swaps, moved = route_side_by_side(
                logits_NTE, router.top_k, policy, caches
            )
            totals["loads"] += misses
            totals["swaps"] += swaps
            totals["moved"] += moved
            totals["pairs"] += ids[0].numel()
            return logits_TE, weights.flatten(0, 1), ids.flatten(0, 1)

        return forward

    for router in routers:
        router.forward = forward_of(router)
    try:
        yield
    finally:
        for router in routers:
            del router.forward


@torch.no_grad()
def evaluate(
    model, rows_NT: torch.Tensor, slots: int, policy: Policy, eviction: Eviction
) -> Counts:
    """Score rows of token ids, ``(N, T + 1)``: predict tokens 1..T from those before them."""
    N, T = rows_NT.shape[0], rows_NT.shape[1] - 1
    totals = {name: torch.zeros(N) for name in ("loads", "swaps", "moved", "pairs")}
    with simulated(model, N, slots, policy, eviction, totals):
        hidden_NTD = model.model(rows_NT[:, :-1]).last_hidden_state
    nll_N = torch.zeros(N)
    for n in range(N):  # row by row: all logits at once would be large
        logits_TV = model.lm_head(hidden_NTD[n]).float()
        nll_N[n] = torch.nn.functional.cross_entropy(logits_TV, rows_NT[n, 1:], reduction="sum")
    return Counts(nll_N, totals["loads"], totals["pairs"], totals["swaps"], totals["moved"], T)


def resamples(sequences: int, draws: int = 2000, seed: int = 0) -> torch.Tensor:
    """Return bootstrap draws of sequence indices, ``(draws, N)``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, sequences, (draws, sequences), generator=generator)


def change_percent(counts: Counts, exact: Counts, index: torch.Tensor) -> torch.Tensor:
    """Return the perplexity change over the sequences in ``index``, per row of it."""
    delta_N = (counts.nll - exact.nll).double() / counts.tokens
    return (delta_N[index].mean(-1).exp() - 1) * 100


def interval(values: torch.Tensor) -> tuple[float, float]:
    """Return the central 95 % of bootstrap values."""
    low, high = values.double().quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def describe(policy: Policy) -> str:
    """Return a policy in the words of the README."""
    match policy:
        case Exact():
            return "exact"
        case CacheBonus(bonus=bonus, scale="absolute", protect=0):
            return f"bonus {bonus:g}" + (" (the original)" if bonus == 0.15 else "")
        case CacheBonus(bonus=bonus, protect=protect):
            return f"bonus {bonus:g} x logit range, J={protect}"
        case MassBudget(budget=budget, protect=protect):
            return f"mass budget {budget:g}, J={protect}"


def misses_at(changes: torch.Tensor, misses: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Interpolate misses at a perplexity change, on one policy's curve per row.

    Args:
        changes: Perplexity changes along the curve, ``(B, P)``; made monotone from the left.
        misses: Misses at the same points, ``(B, P)``, falling.
        target: Perplexity changes asked for, ``(B,)``.
    """
    changes = changes.cummax(1).values
    upper = (changes < target[:, None]).sum(1).clamp(1, changes.shape[1] - 1)
    lower = upper - 1
    take = lambda x, i: x.gather(1, i[:, None])[:, 0]  # noqa: E731
    x0, x1 = take(changes, lower), take(changes, upper)
    share = ((target - x0) / (x1 - x0).clamp(min=1e-9)).clamp(0, 1)
    return take(misses, lower) * (1 - share) + take(misses, upper) * share


def compare_curves(results: dict, draws: torch.Tensor, target_percent: float) -> dict:
    """Misses of the mass budget against the original bonus rule, at one perplexity change.

    Both rules are swept over their strength and interpolated; the bonus has no protection and no
    scaling, as the original.
    """
    exact = results[Exact(), EVICTION]
    budgets = [p for p in POLICIES if isinstance(p, MassBudget)]
    bonuses = [p for p in POLICIES if isinstance(p, CacheBonus) and p.scale == "absolute"]

    def misses(curve, index):
        changes = [torch.zeros(len(index), dtype=torch.float64)]
        changes += [change_percent(results[p, EVICTION], exact, index) for p in curve]
        loads = [results[p, EVICTION].loads[index].double().sum(-1) for p in [Exact(), *curve]]
        target = torch.full((len(index),), target_percent, dtype=torch.float64)
        return misses_at(torch.stack(changes, 1), torch.stack(loads, 1), target)

    def saved_percent(index):
        return (1 - misses(budgets, index) / misses(bonuses, index)) * 100

    everything = torch.arange(len(exact.nll))[None]
    low, high = interval(saved_percent(draws))
    exact_loads = exact.loads.double().sum()
    return {
        "perplexity_change_percent": target_percent,
        "mass_budget_fewer_loads_than_exact_percent": (
            (1 - misses(budgets, everything) / exact_loads) * 100
        ).item(),
        "bonus_fewer_loads_than_exact_percent": (
            (1 - misses(bonuses, everything) / exact_loads) * 100
        ).item(),
        "mass_budget_fewer_misses_than_bonus_percent": saved_percent(everything).item(),
        "ci_low": low,
        "ci_high": high,
    }


def row_of(policy, eviction, counts, exact, slots, experts, layers, expert_bytes, draws):
    """Return one policy's figures as a JSON row."""
    everything = torch.arange(len(counts.nll))[None]
    same = counts is exact
    low, high = (None, None) if same else interval(change_percent(counts, exact, draws))
    tokens = len(counts.nll) * counts.tokens
    loads = counts.loads.sum().item() / tokens
    pairs = counts.pairs.sum().item()
    return {
        "policy": describe(policy)
        + ("" if eviction == EVICTION else f", {eviction.policy.upper()}"),
        "resident": f"{slots} of {experts}",
        "hit_rate": 1 - counts.loads.sum().item() / pairs,
        "loads_per_token": loads,
        "mb_per_token": loads * expert_bytes / 1e6,
        "swapped_pairs": counts.swaps.sum().item() / pairs,
        "moved_mass_per_token_and_layer": counts.moved.sum().item() / tokens / layers,
        "perplexity": math.exp(counts.nll.sum().item() / tokens),
        "perplexity_change_percent": 0
        if same
        else change_percent(counts, exact, everything).item(),
        "ci_low": low,
        "ci_high": high,
    }


def plot(content: dict, path: Path) -> None:
    """Draw hit rate against perplexity change, one curve per family of policies."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    families = {
        "original bonus": lambda row: row["options"].get("scale") == "absolute",
        "range-scaled bonus": lambda row: row["options"].get("scale") == "logit_range",
        "mass budget": lambda row: "budget" in row["options"],
    }
    default = [row for row in content["curve"] if row["eviction"] == str(EVICTION)]
    exact = default[0]
    figure, axes = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    for name, belongs in families.items():
        points = [exact, *filter(belongs, default)]
        x = [row["perplexity_change_percent"] for row in points]
        y = [row["hit_rate"] * 100 for row in points]
        low = [v - (row["ci_low"] or 0) for v, row in zip(x, points, strict=True)]
        high = [(row["ci_high"] or 0) - v for v, row in zip(x, points, strict=True)]
        axes.errorbar(x, y, xerr=[low, high], marker="o", markersize=4, capsize=2, label=name)
    axes.axhline(exact["hit_rate"] * 100, color="grey", linewidth=0.8, linestyle=":")
    axes.set_xlabel("perplexity against exact routing, % (95 % paired bootstrap)")
    axes.set_ylabel("hit rate, %")
    axes.set_title(
        f"{exact['resident']} experts resident, {content['conditions']['model']}", size=9
    )
    axes.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def git_commit() -> str:
    """Return the commit of the tree, marked if it had changes."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"


def main() -> None:
    """Evaluate every policy, print the table, write the results file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "examples" / "tiny_mixtral")
    parser.add_argument("--slots", type=int, default=4, help="resident experts per layer")
    parser.add_argument("--sequences", type=int, help="rows per domain, default all")
    parser.add_argument("--out", type=Path, default=RESULTS / "quality_tiny.json")
    args = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.float32, experts_implementation="eager"
    ).eval()
    config = model.config
    E, K, L = config.num_local_experts, config.num_experts_per_tok, config.num_hidden_layers
    if not K <= args.slots <= E:
        raise SystemExit(f"--slots must lie in [{K}, {E}], got {args.slots}")
    domains = load_file(args.model / "held_out.safetensors")
    rows_NT = torch.cat([rows[: args.sequences] for _, rows in sorted(domains.items())]).long()
    # bytes of one expert as a bf16 checkpoint stores it
    expert_bytes = 3 * config.hidden_size * config.intermediate_size * 2

    results = {}
    jobs = [(policy, EVICTION) for policy in POLICIES]
    jobs += [(policy, LRU) for policy in LRU_POINTS]
    bar = tqdm(jobs, unit="policy")
    for policy, eviction in bar:
        bar.set_postfix_str(f"{describe(policy)}, {eviction}")
        results[policy, eviction] = evaluate(model, rows_NT, args.slots, policy, eviction)

    exact = results[Exact(), EVICTION]
    draws = resamples(len(exact.nll))
    rows = {
        job: row_of(*job, results[job], exact if job[0] != Exact() else results[job],
                    args.slots, E, L, expert_bytes, draws)
        for job in jobs
    }  # fmt: skip
    content = {
        "conditions": {
            "model": f"examples/{args.model.name} ({L} layers, {E} experts, top-{K})",
            "text": f"{len(rows_NT)} held-out sequences of {exact.tokens} tokens from "
            f"{', '.join(sorted(domains))}",
            "method": "token by token, each sequence with its own cache, eviction by "
            f"{EVICTION} (decay, boost {AFFINITY[0]:g}, {AFFINITY[1]:g}) unless said; paired "
            "bootstrap",
            "expert_bytes": f"{expert_bytes} (bf16)",
            "arithmetic": "float32 on the CPU",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            "commit": git_commit(),
        },
        "rows": [rows[job] for job in README_ROWS],
        "curve": [
            rows[job]
            | {"strength": job[0].strength, "options": asdict(job[0]), "eviction": str(job[1])}
            for job in jobs
        ],
        "mass_budget_against_original_bonus": [
            compare_curves(results, draws, target) for target in (0.1, 0.25, 0.5, 1.0)
        ],
        "hits_gained_over_exact_at_half_percent": gained_at(rows),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    partial = args.out.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, args.out)
    plot(content, args.out.with_suffix(".png"))
    for row in (rows[job] for job in jobs):
        low, high = row["ci_low"] or 0.0, row["ci_high"] or 0.0
        print(
            f"{row['policy']:42s} hit {row['hit_rate']:.1%}  loads/token {row['loads_per_token']:.2f}"
            f"  ppl {row['perplexity']:.3f} {row['perplexity_change_percent']:+.2f} % ({low:+.2f} to {high:+.2f})"
        )
    for name in ("mass_budget_against_original_bonus", "hits_gained_over_exact_at_half_percent"):
        print(f"{name.replace('_', ' ')}: {json.dumps(content[name])}")
    print(f"wrote {args.out}")


def gained_at(rows: dict, limit: float = 0.5) -> dict:
    """Return the budget with most hits whose interval stays at or under ``limit`` percent."""
    exact = rows[Exact(), EVICTION]
    best = {"policy": None, "points": 0.0}
    for policy in POLICIES:
        row = rows[policy, EVICTION]
        if isinstance(policy, MassBudget) and row["ci_high"] <= limit:
            points = (row["hit_rate"] - exact["hit_rate"]) * 100
            if points > best["points"]:
                keep = ("perplexity_change_percent", "ci_low", "ci_high")
                best = {"policy": row["policy"], "points": points} | {k: row[k] for k in keep}
    return best


if __name__ == "__main__":
    main()
