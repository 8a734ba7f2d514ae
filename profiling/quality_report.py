"""Tables and plots of the quality study, from what ``quality.py run`` left.

Models that differ in the training seed alone are one *kind*. Every figure is the mean over the
seeds of a kind; bootstrap draws of rows are the same for all seeds and settings, so comparisons
are paired. Loads are relative to exact routing with plain LRU on the same text and slots.

Shape suffixes: R resamples (the first is every row once), P points of a curve.
"""

import json
import re
from collections import defaultdict
from pathlib import Path

import torch

from _bench import conditions, facts, table, write_whole
from moe_gpu.tuning.statistics import (
    cost_at,
    interval,
    kl_per_token,
    loads_at,
    loads_per_token,
    perplexity_change,
    resamples,
)
from quality import load

LIMITS = (0.1, 0.25, 0.5, 1.0)  # perplexity changes in percent at which curves are read
CUTS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # shares of LRU's loads saved, at which KL is read
BEST = "quality budget, calibrated"
RIVALS = ("mass budget", "range-scaled bonus, running")
LEVELS = (*RIVALS, "quality budget", BEST)
PLOTTED = {
    "original bonus": ("tab:red", "x"),
    "range-scaled bonus, running": ("tab:orange", "s"),
    "mass budget": ("tab:green", "^"),
    "quality budget": ("tab:blue", "."),
    BEST: ("tab:blue", "o"),
}


class Kind:
    """All results of the models of one kind: by text, slots and family, a curve per seed."""

    def __init__(self, homes: list[Path], index_RN: dict[int, torch.Tensor]):
        self.indices = [json.loads((home / "index.json").read_text()) for home in homes]
        first = self.indices[0]
        self.experts, self.top_k, self.layers = first["experts"], first["top_k"], first["layers"]
        self.expert_bytes = first["expert_bytes"]
        self.name = f"{self.experts} experts, top-{self.top_k}"
        self.curves = [defaultdict(list) for _ in homes]  # (text, slots, family) -> points
        for curves, home, index in zip(self.curves, homes, self.indices, strict=True):
            for file, text in index["texts"].items():
                if not (home / file).exists():  # not evaluated yet
                    continue
                described, outcome = load(home / file)
                key = text, int(described["slots"]), described["family"]
                curves[key].append((float(described["strength"]), described, outcome))
            for points in curves.values():
                points.sort(key=lambda point: (point[0], point[1]["cache"]))
        self.curves = [dict(curves) for curves in self.curves]
        for key in self.keys():
            self._keep_common(key)
        self._drawn: dict[tuple[str, int, str], dict[str, torch.Tensor]] = {}
        self._index_RN = index_RN

    def keys(self) -> list[tuple[str, int, str]]:
        """Return what has been evaluated for some seed."""
        return list(dict.fromkeys(key for curves in self.curves for key in curves))

    def _keep_common(self, key: tuple[str, int, str]) -> None:
        """Drop the points of a curve that some of the seeds that have the curve lack."""
        setting = lambda point: (point[0], point[1]["cache"])  # noqa: E731
        curves = [curves for curves in self.curves if key in curves]
        common = set.intersection(*({setting(point) for point in c[key]} for c in curves))
        for c in curves:
            c[key] = [point for point in c[key] if setting(point) in common]
            if not c[key]:
                del c[key]

    def seeds(self, *keys: tuple[str, int, str]) -> list[int]:
        """Return the seeds for which all of this has been evaluated."""
        return [n for n, curves in enumerate(self.curves) if all(key in curves for key in keys)]

    def exact(self, seed: int, text: str, slots: int, lru: bool):
        """Return exact routing under plain LRU, or under the default eviction."""
        for _, described, outcome in self.curves[seed][text, slots, "exact"]:
            if described["cache"] == ("lru" if lru else "affinity over root age with bypass"):
                return outcome
        raise KeyError((text, slots))

    def index(self, outcome) -> torch.Tensor:
        """Return the draws for as many rows."""
        rows = len(outcome.nll_N)
        if rows not in self._index_RN:
            self._index_RN[rows] = resamples(rows)
        return self._index_RN[rows]

    def curve(self, text: str, slots: int, family: str) -> dict[str, torch.Tensor]:
        """Return a family's curves, exact routing first: ``(seeds, R, 1 + P)`` each."""
        if (text, slots, family) in self._drawn:
            return self._drawn[text, slots, family]
        by_seed = []
        for seed in self.seeds((text, slots, family)):
            curves = self.curves[seed]
            exact, lru = (self.exact(seed, text, slots, plain) for plain in (False, True))
            index = self.index(exact)
            base = loads_per_token(lru, index)
            outcomes = [exact, *(outcome for *_, outcome in curves[text, slots, family])]
            by_seed.append({
                "loads": torch.stack([loads_per_token(o, index) / base for o in outcomes], 1),
                "change": torch.stack([perplexity_change(o, exact, index) for o in outcomes], 1),
                "kl": torch.stack([kl_per_token(o, index) for o in outcomes], 1),
            })  # fmt: skip
        drawn = {name: torch.stack([c[name] for c in by_seed]) for name in by_seed[0]}
        self._drawn[text, slots, family] = drawn
        return drawn


def bounds(values_R: torch.Tensor) -> dict[str, float]:
    """Return an estimate and its 95 % interval."""
    low, high = interval(values_R)
    return {"value": values_R[0].item(), "low": low, "high": high}


def cut_at(kind: Kind, text: str, slots: int, family: str, limit: float) -> dict:
    """Return the share of LRU's loads that a family saves at a perplexity change."""
    curve = kind.curve(text, slots, family)
    cuts_SR = 1 - torch.stack([
        loads_at(change, loads, limit)
        for change, loads in zip(curve["change"], curve["loads"], strict=True)
    ])  # fmt: skip
    reached = [bool((change[0] >= limit).any()) for change in curve["change"]]
    return bounds(cuts_SR.mean(0)) | {
        "by_seed": [round(cut, 4) for cut in cuts_SR[:, 0].tolist()],
        "is_bound": not all(reached),  # the curve ends below the limit for some seed
    }


def kl_ratio(kind: Kind, text: str, slots: int, family: str, rival: str, cut: float) -> dict | None:
    """Return the KL of a family over that of a rival, where both save the same loads."""
    ratios = []
    names = family, rival
    for seed in kind.seeds(*((text, slots, name) for name in names)):
        kl = []
        for name in names:
            curve, n = kind.curve(text, slots, name), kind.seeds((text, slots, name)).index(seed)
            kl.append(cost_at(curve["kl"][n][:, 1:], curve["loads"][n][:, 1:], 1 - cut))
        ratios.append(kl[0] / kl[1])
    mean = torch.stack(ratios).log().mean(0).exp()
    share = mean.isfinite().double().mean().item()
    if not mean[0].isfinite() or share < 0.9:
        return None
    return bounds(torch.cat([mean[:1], mean[1:][mean[1:].isfinite()]]))


def rows_of(kind: Kind) -> list[dict]:
    """Return one row per setting, means over seeds."""
    rows = []
    for text, slots, family in kind.keys():
        seeds = kind.seeds((text, slots, family))
        for p in range(len(kind.curves[seeds[0]][text, slots, family])):
            found, described = [], kind.curves[seeds[0]][text, slots, family][p][1]
            for seed in seeds:
                *_, outcome = kind.curves[seed][text, slots, family][p]
                found.append((outcome, kind.exact(seed, text, slots, False)))
            index = kind.index(found[0][0])
            change = torch.stack([perplexity_change(o, e, index) for o, e in found]).mean(0)
            kl = torch.stack([kl_per_token(o, index) for o, _ in found]).mean(0)
            outcomes = [o for o, _ in found]
            loads = torch.cat([o.loads_NT.flatten() for o in outcomes]).double()
            p95, p99 = loads.quantile(torch.tensor([0.95, 0.99], dtype=torch.float64)).tolist()
            tokens = sum(o.loads_NT.numel() for o in outcomes)
            pairs = sum(o.pairs * len(o.nll_N) for o in outcomes)
            total = lambda name: sum(getattr(o, name).sum().item() for o in outcomes)  # noqa: E731, B023
            rows.append({
                "kind": kind.name, "text": text, "resident": f"{slots} of {kind.experts}",
                "family": family, "seeds": len(seeds), "policy": re.sub(r"layer_scale=\([^)]*\)", "layer_scale=...", described["policy"]),
                "cache": described["cache"], "strength": float(described["strength"]),
                "hit_rate": 1 - loads.sum().item() / pairs,
                "loads_per_token": loads.mean().item(), "loads_p95": p95, "loads_p99": p99,
                "mb_per_token": loads.mean().item() * kind.expert_bytes / 1e6,
                "perplexity_change_percent": bounds(change), "kl": bounds(kl),
                "top1_agreement": total("agree_N") / tokens,
                "swapped_pairs": total("swaps_N") / pairs,
                "moved_mass": total("moved_N") / tokens / kind.layers,
                "l1_change": total("l1_N") / tokens / kind.layers,
            })  # fmt: skip
    return rows


def sizes_of(kind: Kind, text: str) -> list[int]:
    """Return the cache sizes evaluated on a text."""
    return sorted({slots for t, slots, _ in kind.keys() if t == text})


def headline(kind: Kind) -> list[dict]:
    """Return, per text and cache size, the loads saved at each limit, and KL at equal loads."""
    found = []
    for text in dict.fromkeys(text for text, *_ in kind.keys()):
        for slots in sizes_of(kind, text):
            families = [f for t, s, f in kind.keys() if (t, s) == (text, slots)]
            swept = [f for f in families if f not in ("exact", "identity", "near-tie null")]
            seeds = kind.seeds((text, slots, "exact"))
            lru = [kind.exact(seed, text, slots, True) for seed in seeds]
            default = [kind.exact(seed, text, slots, False) for seed in seeds]
            index = kind.index(lru[0])
            base = torch.stack([loads_per_token(o, index) for o in lru])
            ours = torch.stack([loads_per_token(o, index) for o in default])
            pairs = lru[0].pairs / lru[0].tokens
            found.append({
                "kind": kind.name, "text": text, "slots": slots, "resident": f"{slots} of {kind.experts}",
                "seeds": len(lru),
                "lru_loads_per_token": base.mean(0)[0].item(),
                "lru_hit_rate": 1 - base.mean(0)[0].item() / pairs,
                "default_eviction_cut": bounds(1 - (ours / base).mean(0)),
                "cut": {f: {str(limit): cut_at(kind, text, slots, f, limit) for limit in LIMITS} for f in swept},
                "kl_ratio": {
                    rival: {str(cut): kl_ratio(kind, text, slots, BEST, rival, cut) for cut in CUTS}
                    for rival in (*RIVALS, "quality budget") if rival in swept
                },
            })  # fmt: skip
    return found


def report(store: Path, out: Path) -> None:
    """Write ``quality.json``, ``quality.md``, ``quality.png`` and ``quality_kl.png``."""
    homes = sorted(path.parent for path in store.glob("*/index.json"))
    by_kind = defaultdict(list)
    for home in homes:
        index = json.loads((home / "index.json").read_text())
        by_kind[index["experts"], index["top_k"]].append(home)
    shared: dict[int, torch.Tensor] = {}
    kinds = [Kind(homes, shared) for _, homes in sorted(by_kind.items())]
    if not kinds:
        raise SystemExit("nothing has been evaluated yet: quality.py run MODEL")
    rows_of_text = len(kinds[0].exact(0, "held out", kinds[0].experts // 2, True).nll_N)
    content = {
        "conditions": conditions(
            torch.device("cpu"),
            models=[index["model"] for kind in kinds for index in kind.indices],
            text=f"{rows_of_text} held-out rows of 256 tokens (code, prose, structured); rows that "
            "chose the rule or calibrated the layers are not among them",
            method="decode semantics, a cache per row; paired bootstrap over rows, means over seeds",
            arithmetic="float32",
        ),
        "layer_scale": {i["model"]: i["layer_scale"] for kind in kinds for i in kind.indices},
        "headline": [row for kind in kinds for row in headline(kind)],
        "rows": [row for kind in kinds for row in rows_of(kind)],
    }
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "quality.json", json.dumps(rounded(content), indent=1) + "\n")
    write_whole(out / "quality.md", markdown(content))
    plot(kinds, out / "quality.png")
    plot_kl(kinds, out / "quality_kl.png")
    print(markdown(content))


def rounded(value):
    """Return JSON content with figures of five digits: more would be noise."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def percent(bound: dict | None, is_bound: bool = False) -> str:
    """Format a share with its interval."""
    if bound is None:
        return ""
    sign = ">= " if is_bound else ""
    return f"{sign}{bound['value']:.0%} ({bound['low']:.0%} to {bound['high']:.0%})"


def markdown(content: dict) -> str:
    """Return the tables."""
    parts = ["# Routing quality\n", facts(content["conditions"]) + "\n"]
    parts.append(
        "\nLoads saved against exact routing with LRU. `>=`: the curve ends below that change.\n"
    )
    for limit in LIMITS:
        lines = [
            {"model": r["kind"], "text": r["text"], "resident": r["resident"], "seeds": r["seeds"],
             "LRU loads/token": f"{r['lru_loads_per_token']:.2f}",
             "exact, default eviction": percent(r["default_eviction_cut"]),
             **{f: percent(r["cut"].get(f, {}).get(str(limit)), r["cut"].get(f, {}).get(str(limit), {}).get("is_bound", False))
                for f in ("original bonus", *LEVELS)}}
            for r in content["headline"]
        ]  # fmt: skip
        parts.append(f"\n## At {limit:+g} % perplexity\n\n{table(lines)}\n")
    lines = [
        {"model": r["kind"], "text": r["text"], "resident": r["resident"], "against": rival,
         **{f"{float(cut):.0%} saved": "" if b is None else f"{b['value']:.2f} ({b['low']:.2f} to {b['high']:.2f})"
            for cut, b in by_cut.items()}}
        for r in content["headline"] for rival, by_cut in r["kl_ratio"].items()
    ]  # fmt: skip
    parts.append(
        f"\n## KL of the {BEST} over a rival's, at equal loads\n\nUnder 1 is better. Empty: one of the "
        f"curves does not reach that far.\n\n{table(lines)}\n"
    )
    lines = [
        {"model": r["kind"], "text": r["text"], "resident": r["resident"], "family": r["family"],
         "strength": f"{r['strength']:g}", "cache": r["cache"], "hit rate": f"{r['hit_rate']:.1%}",
         "loads/token": f"{r['loads_per_token']:.2f}", "p95": f"{r['loads_p95']:.0f}", "p99": f"{r['loads_p99']:.0f}",
         "perplexity, %": "{value:+.2f} ({low:+.2f} to {high:+.2f})".format(**r["perplexity_change_percent"]),
         "KL, 1e-3 nats": f"{r['kl']['value'] * 1e3:.2f}", "top-1": f"{r['top1_agreement']:.1%}",
         "swapped": f"{r['swapped_pairs']:.1%}", "moved mass": f"{r['moved_mass']:.4f}", "L1": f"{r['l1_change']:.4f}"}
        for r in content["rows"]
    ]  # fmt: skip
    parts.append(f"\n## Every setting\n\n{table(lines)}\n")
    return "".join(parts)


def axes_of(kinds: list[Kind], height: float):
    """Return a figure with an axis per kind."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(
        1, len(kinds), figsize=(4.6 * len(kinds), height), layout="constrained", squeeze=False
    )


def plot(kinds: list[Kind], path: Path) -> None:
    """Draw loads against perplexity change, half of the experts resident."""
    figure, axes = axes_of(kinds, 3.8)
    for axis, kind in zip(axes[0], kinds, strict=True):
        slots = kind.experts // 2
        for family, (colour, marker) in PLOTTED.items():
            if ("held out", slots, family) not in kind.keys():
                continue
            curve = kind.curve("held out", slots, family)
            change, loads = curve["change"].mean(0), curve["loads"].mean(0) * 100
            spread = change[1:].quantile(torch.tensor([0.025, 0.975], dtype=change.dtype), dim=0)
            style = ":" if family == "quality budget" else "-"
            axis.plot(
                change[0],
                loads[0],
                color=colour,
                marker=marker,
                markersize=4,
                linestyle=style,
                label=family,
            )
            axis.fill_betweenx(loads[0], *spread, color=colour, alpha=0.15, linewidth=0)
        axis.axvline(0.5, color="grey", linewidth=0.8, linestyle=":")
        axis.set(
            xlim=(-0.3, 2.0),
            ylim=(0, 100),
            title=f"{kind.name}, {slots} resident, {len(kind.curves)} seeds",
        )
        axis.set_xlabel("perplexity against exact routing, %")
        axis.title.set_size(9)
    axes[0][0].set_ylabel("loads per token, % of exact LRU")
    axes[0][-1].legend(fontsize=7)
    figure.savefig(path, dpi=110)


def plot_kl(kinds: list[Kind], path: Path) -> None:
    """Draw KL against loads saved for every cache size."""
    figure, axes = axes_of(kinds, 4.2)
    shades = {"quality": "-", "mass": "--", "range": ":"}
    families = {BEST: "quality", RIVALS[0]: "mass", RIVALS[1]: "range"}
    for axis, kind in zip(axes[0], kinds, strict=True):
        for n, slots in enumerate(sizes_of(kind, "held out")):
            for family, short in families.items():
                if ("held out", slots, family) not in kind.keys():
                    continue
                curve = kind.curve("held out", slots, family)
                kl, saved = curve["kl"].mean(0)[0, 1:], (1 - curve["loads"].mean(0)[0, 1:]) * 100
                label = f"{slots} of {kind.experts}: {short}"
                axis.semilogy(saved, kl, shades[short], color=f"C{n}", label=label)
        axis.set(xlabel="loads saved against exact LRU, %", title=kind.name)
        axis.title.set_size(9)
        axis.legend(fontsize=6)
    axes[0][0].set_ylabel("KL from exact routing, nats per token")
    figure.savefig(path, dpi=110)
