"""What else was tried for the price of a swap, and what it was worth: the choice of the rule.

Usage:
    python profiling/quality_ideas.py            # some minutes a model with OMP_NUM_THREADS=1
    python profiling/quality_ideas.py --quick    # a smoke test

Runs on the rows that are for choosing (``quality_texts.CHOICE_ROWS``), half of the experts
resident, and writes ``quality_ideas.json`` and ``.md``: the KL divergence from exact routing at
equal loads, against the shipped rule. ``quality.py`` then measures what was chosen on other rows.

Shape suffixes: B rows, E experts, K experts per token, S swaps.
"""

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM

import quality_texts
from _bench import RESULTS, conditions, facts, table, write_whole
from moe_gpu import Exact, QualityBudget
from moe_gpu.kernels.route_ref import Selection, age_affinity_ref
from moe_gpu.kernels.score_ref import rank_experts
from moe_gpu.tuning.calibrate import layer_sensitivity
from moe_gpu.tuning.quality import Evaluation, Job
from moe_gpu.tuning.simulate import LRU, CacheRule
from moe_gpu.tuning.statistics import cost_at, kl_per_token, loads_per_token, resamples
from quality import SHIPPED

CUTS = (0.5, 0.6, 0.7, 0.8)


@dataclass(frozen=True)
class Priced:
    """Swaps in the library's order while their price stays within the strength.

    Attributes:
        strength: Largest price.
        similarity: Cosine c of ``w(m)^2 + w(r)^2 - 2 c w(m) w(r)``, whose root is the price.
        gap: Price by ``w(m) - w(r)`` instead.
        weight: Price by ``w(m)`` alone: half the L1 change of the mixing weights.
        together: Prices of one token add up (squares, for the root); else each stands alone.
        reuse: Multiplies the price by 1 + reuse x (rate of demand for m) x E / K: experts that will
            be wanted again are rather loaded.
        protect: J.
    """

    strength: float
    similarity: float = 0.75
    gap: bool = False
    weight: bool = False
    together: bool = False
    reuse: float = 0.0
    protect: int = 1

    @property
    def family(self) -> str:
        """Return what rows side by side must share."""
        return repr(replace(self, strength=0.0))

    def chooser(self, top_k, strength_B1):
        """Return how one layer chooses."""
        affinity_BE = None

        def choose(scores, resident_BE):
            nonlocal affinity_BE
            scores_BE = scores.selection_TE
            B, E = scores_BE.shape
            K, S = top_k, min(top_k - self.protect, E - top_k)
            order_BE = rank_experts(scores_BE)
            share_BE = scores_BE.softmax(1).gather(1, order_BE)
            share_BE = share_BE / share_BE[:, :K].sum(1, keepdim=True)
            here_BE = resident_BE.gather(1, order_BE)
            rank_E = torch.arange(E)
            out_BS = torch.where(~here_BE & (rank_E >= self.protect) & (rank_E < K), rank_E, -1)
            out_BS = out_BS.topk(S, 1).values
            in_BS = torch.where(here_BE & (rank_E >= K), E - rank_E, 0).topk(S, 1).values
            possible_BS = (out_BS >= 0) & (in_BS > 0)
            out_BS, in_BS = out_BS.clamp(min=0), (E - in_BS).clamp(max=E - 1)
            price_BS = self._price(share_BE.gather(1, out_BS), share_BE.gather(1, in_BS))
            if self.reuse:
                affinity_BE = torch.zeros(B, E) if affinity_BE is None else affinity_BE
                rate_BS = affinity_BE.gather(1, order_BE.gather(1, out_BS))
                price_BS = price_BS * (1 + self.reuse * rate_BS * E / K)
                demand_BE = torch.zeros(B, E, dtype=torch.bool).scatter(1, order_BE[:, :K], True)
                affinity_BE = age_affinity_ref(affinity_BE, demand_BE[None], 0.98, 0.02, 1.0)
            if self.together:
                power = 1 if self.gap or self.weight else 2
                price_BS = torch.where(possible_BS, price_BS, 0.0) ** power
                price_BS = price_BS.cumsum(1) ** (1 / power)
            takes_BS = (possible_BS & (price_BS <= strength_B1)).cumprod(1).bool()
            ranks_BK = torch.arange(K).repeat(B, 1)
            row_X, swap_X = takes_BS.nonzero(as_tuple=True)
            ranks_BK[row_X, out_BS[row_X, swap_X]] = in_BS[row_X, swap_X]
            ids_BK = order_BE.gather(1, ranks_BK.sort(1).values)
            return Selection(order_BE[:, :K], ids_BK, torch.zeros(B))

        return choose

    def _price(self, out_BS, in_BS):
        if self.gap:
            return (out_BS - in_BS).clamp(min=0)
        if self.weight:
            return out_BS
        squared = out_BS**2 + in_BS**2 - 2 * self.similarity * out_BS * in_BS
        return squared.clamp(min=0).sqrt()


SHIPPED_RULE = "shipped: similarity 0.75, each swap by itself, affinity from served"
SERVED = CacheRule()
VARIANTS: dict[str, tuple[Priced, CacheRule]] = {
    SHIPPED_RULE: (Priced(0.0), SERVED),
    "similarity 0: the L2 change of the weights": (Priced(0.0, 0.0), SERVED),
    "similarity 0.5": (Priced(0.0, 0.5), SERVED),
    "similarity 0.9": (Priced(0.0, 0.9), SERVED),
    "the weight that leaves (L1)": (Priced(0.0, weight=True), SERVED),
    "the mass that is lost": (Priced(0.0, gap=True), SERVED),
    "the mass that is lost, summed: the mass budget": (Priced(0.0, gap=True, together=True), SERVED),
    "swaps of a token summed": (Priced(0.0, together=True), SERVED),
    "reuse-aware, 0.3": (Priced(0.0, reuse=0.3), SERVED),
    "reuse-aware, 1": (Priced(0.0, reuse=1.0), SERVED),
    "nobody protected": (Priced(0.0, protect=0), SERVED),
    "two protected": (Priced(0.0, protect=2), SERVED),
    "affinity from demand": (Priced(0.0), CacheRule(affinity_from="demand")),
    "affinity from executed": (Priced(0.0), CacheRule(affinity_from="executed")),
    "eviction by affinity": (Priced(0.0), CacheRule("affinity")),
    "eviction by affinity over age": (Priced(0.0), CacheRule("affinity_over_age")),
    "eviction by LRU": (Priced(0.0), LRU),
    "decay 0.95, boost 0.05": (Priced(0.0), CacheRule(decay=0.95, boost=0.05)),
    "decay 0.99, boost 0.01": (Priced(0.0), CacheRule(decay=0.99, boost=0.01)),
}  # fmt: skip
CALIBRATED = "layers calibrated"


def strengths(variant: Priced, experts: int) -> list[float]:
    """Return strengths that save about as much for every way to price."""
    grid = (0.012, 0.022, 0.035, 0.05, 0.07, 0.1, 0.14) if experts > 16 else (
        0.04, 0.06, 0.09, 0.12, 0.16, 0.21, 0.28)  # fmt: skip
    if variant.gap:
        return [value * (0.5 if variant.together else 0.25) for value in grid]
    factor = 2.0 if variant.weight else ((2 - 2 * variant.similarity) / 0.5) ** 0.5
    return [value * max(factor, 0.5) * (1.3 if variant.together else 1) for value in grid]


def measure(folder: Path, quick: bool) -> list[dict]:
    """Return the KL of each variant at equal loads on one model."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    ).eval()
    E, K = model.config.num_local_experts, model.config.num_experts_per_tok
    rows = slice(0, 1) if quick else quality_texts.CHOICE_ROWS
    evaluation = Evaluation(model, quality_texts.held_out(folder, rows))
    calibration = quality_texts.held_out(folder, quality_texts.CALIBRATION_ROWS)
    scale = layer_sensitivity(model, calibration[:: 8 if quick else 1], E // 2).layer_scale
    jobs = {
        name: [Job(replace(priced, strength=s), E // 2, cache) for s in strengths(priced, E)]
        for name, (priced, cache) in VARIANTS.items()
        if priced.protect < K
    }
    jobs[CALIBRATED] = [Job(QualityBudget(s, scale), E // 2) for s in strengths(Priced(0.0), E)]
    plain = Job(Exact(), E // 2, LRU)
    wanted = [plain, *(job for group in jobs.values() for job in group)]
    bar = tqdm(evaluation.run(wanted), total=len(wanted), unit="setting", desc=folder.name)
    found = dict(bar)
    index = resamples(len(found[plain].nll_N), draws=1)
    base = loads_per_token(found[plain], index)

    def curve(group, of):
        return torch.stack([of(found[job], index) for job in group], 1)

    rows = []
    for name, group in jobs.items():
        loads = curve(group, loads_per_token) / base[:, None]
        kl = curve(group, kl_per_token)
        at = {str(cut): cost_at(kl, loads, 1 - cut)[0].item() for cut in CUTS}
        rows.append({"model": folder.name, "variant": name, "kl": at})
    shipped = next(row["kl"] for row in rows if row["variant"] == SHIPPED_RULE)
    for row in rows:
        row["against_shipped"] = {cut: row["kl"][cut] / shipped[cut] for cut in shipped}
    return rows


def main() -> None:
    """Measure both shipped models."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smoke test")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    out = RESULTS.parent / "out" if args.quick and args.out == RESULTS else args.out
    rows = [row for folder in SHIPPED for row in measure(folder, args.quick)]
    where = conditions(
        torch.device("cpu"),
        text="the held-out rows that are for choosing, 12 of each domain",
        method="decode semantics, half of the experts resident",
    )
    named = lambda ratio: "" if ratio != ratio else f"{ratio:.2f}"  # noqa: E731 - NaN: not reached
    lines = [
        {"model": row["model"], "variant": row["variant"],
         **{f"{float(cut):.0%} saved": named(r) for cut, r in row["against_shipped"].items()}}
        for row in rows
    ]  # fmt: skip
    text = (
        f"# Prices that were tried\n\n{facts(where)}\n\nKL from exact routing over that of the shipped "
        "rule, where both save the same share of exact LRU's loads. Under 1 is better; empty: the "
        f"curve does not reach that far. No intervals: a few percent are noise.\n\n{table(lines)}\n"
    )
    none = {"NaN": None}
    content = json.loads(json.dumps({"conditions": where, "rows": rows}), parse_constant=none.get)
    write_whole(out / "quality_ideas.json", json.dumps(content, indent=1) + "\n")
    write_whole(out / "quality_ideas.md", text)
    print(text)


if __name__ == "__main__":
    main()
