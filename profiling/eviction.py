"""Hit rates of every eviction policy, with and without admission by rank, next to Belady's optimum.

Usage:
    python profiling/eviction.py             # about three minutes of one idle core
    python profiling/eviction.py --quick     # a smoke test of every step; its figures mean little

Replays router demand (:mod:`eviction_traces`) through caches (:mod:`moe_gpu.tuning.replay_engine`):
what the shipped tiny Mixtral asks for on its held-out text, and synthetic traces that drift. Writes
``eviction.json``, and from it ``eviction.md`` and ``eviction.png``.

Only ``decay`` and ``max_score / boost`` matter to a ranking by affinity, so ``max_score`` stays 1.
The constants, and which policy is the candidate for the default, are chosen on one half of the
sequences and seeds; everything is reported on the other half. Intervals are central 95 % of a
bootstrap over sequences (recorded) or seeds (synthetic). All policies and traces of a group share
the draws, so gains are paired.

Shape suffixes: as in the two modules; Z cache sizes.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from _bench import RESULTS, ROOT, git_commit
from eviction_replay import Contender, Probation, replay_policy
from eviction_traces import DRIFTS, Group, recorded_groups, synthetic_group
from moe_gpu.offload.eviction import LRU, POLICIES
from moe_gpu.tuning.replay_engine import BELADY, Ranking, replay

PRESENT = (0.99, 1.0, 1.0)  # decay, boost, max_score: the defaults of MoEGate and attach
DECAYS = (0.9, 0.95, 0.97, 0.98, 0.99, 0.997, 0.999)
BOOSTS = (None, 0.01, 0.03, 0.1, 0.3, 1.0)  # None: 1 - decay, which makes affinity a rate of use
SIZES = (0.25, 0.5, 0.75)  # share of the experts resident
FINE_GRAINED = ((64, 6), (128, 8))  # E, K of the synthetic layers
LEARNING = [policy for policy in POLICIES if policy.startswith("affinity")]
PLAIN_LRU = Contender(Ranking("lru"), bypass=False)
OPTIMA = [Contender(BELADY, bypass) for bypass in (False, True)]


class Rates:
    """Bootstrapped hit rates of one group; row 0 of every array is the plain mean.

    Args:
        group: What to replay.
        rankings: R of them, each without and with bypass.
        slots: Z cache sizes, in slots per layer.
        label: Of the progress bar.
        pool: One pool over the layers, of as many slots in all.
        options: For :func:`moe_gpu.tuning.replay_engine.replay`.
    """

    def __init__(
        self,
        group: Group,
        rankings: Sequence[Ranking],
        slots: Sequence[int],
        label: str,
        pool: bool = False,
        **options,
    ):
        self.group, self.rankings, self.slots = group, list(rankings), list(slots)
        demand = group.pooled() if pool else group.layers_apart()
        capacities = [size * demand.shape[2] for size in slots]
        label = f"{label}: {group.name}"
        hits = replay(
            demand, group.num_experts, rankings, capacities, group.unit, label=label, **options
        )
        units = group.rates(hits)
        U = units.shape[1]
        drawn = np.random.default_rng(0).multinomial(U, np.full(U, 1 / U), size=2000) / U
        weights = np.concatenate([np.full((1, U), 1 / U), drawn])
        self._draws = np.einsum("du,gurbz->dgrbz", weights, units)

    def of(self, contender: Contender) -> np.ndarray:
        """Return hit rates by trace and size, ``(1 + draws, G, Z)``."""
        return self._draws[:, :, self.rankings.index(contender.ranking), int(contender.bypass)]

    def usual(self, contender: Contender) -> np.ndarray:
        """Return hit rates by trace and :data:`SIZES`, ``(1 + draws, G, 3)``."""
        usual = [self.slots.index(slots_of(self.group, size)) for size in SIZES]
        return self.of(contender)[..., usual]

    def gain(self, contender: Contender) -> np.ndarray:
        """Return the mean gain over LRU by trace, ``(1 + draws, G)``."""
        return (self.usual(contender) - self.usual(PLAIN_LRU)).mean(-1)


def slots_of(group: Group, share: float) -> int:
    """Return that share of the experts in slots, at least K."""
    return max(group.top_k, round(share * group.num_experts))


def all_slots(group: Group) -> list[int]:
    """Return the sizes of the report: some below 2K per layer, and :data:`SIZES`."""
    K = group.top_k
    return sorted({K // 2, K, 3 * K // 2, *(slots_of(group, share) for share in SIZES)})


def estimate(draws: np.ndarray) -> dict:
    """Return the value and its bounds, ``(1 + draws, ...)``."""
    low, high = np.quantile(draws[1:], [0.025, 0.975], axis=0)
    bounds = {"value": draws[0], "low": low, "high": high}
    return {name: np.round(bound, 5).tolist() for name, bound in bounds.items()}


def total_gain(contender: Contender, measured: Sequence[Rates]) -> np.ndarray:
    """Return the gain over LRU, every group weighing the same, ``(1 + draws,)``."""
    return np.mean([m.gain(contender).mean(1) for m in measured], axis=0)


def choose(groups: Sequence[Group], decays, boosts) -> tuple[list[Contender], list[dict]]:
    """Sweep the affinity constants.

    Returns:
        chosen: The best constants of each policy, with and without bypass, by total gain over
            LRU to 0.01 points; the best contender first.
        sweep: The gains of every point.
    """
    grid = [(d, boost or round(1 - d, 6), 1.0) for d in decays for boost in boosts]
    rankings = [Ranking("lru"), Ranking("lfu")]
    rankings += [Ranking(policy, constants) for policy in LEARNING for constants in grid]
    measured = [
        Rates(group, rankings, [slots_of(group, s) for s in SIZES], "choosing constants")
        for group in groups
    ]
    contenders = [Contender(ranking, bypass) for ranking in rankings for bypass in (False, True)]
    gain = {c: total_gain(c, measured)[0] for c in contenders}
    best: dict[tuple, Contender] = {}
    for contender in sorted(contenders, key=lambda c: -round(gain[c], 4)):
        best.setdefault((contender.ranking.policy, contender.bypass), contender)
    sweep = [
        describe(c)
        | {"gain": round(float(gain[c]), 5)}
        | {"gain_by_group": [round(float(m.gain(c)[0].mean()), 5) for m in measured]}
        for c in contenders
    ]
    return list(best.values()), sweep


def describe(contender: Contender) -> dict:
    """Return a contender as JSON fields."""
    (policy, constants), bypass = contender
    decay, boost, max_score = constants or (None, None, None)
    return {
        "title": title(contender), "policy": policy, "bypass": bypass,
        "decay": decay, "boost": boost, "max_score": max_score,
    }  # fmt: skip


def title(contender: Contender) -> str:
    """Return a contender in words, with decay and boost."""
    (policy, constants), bypass = contender
    names = {"lru": "LRU", "lfu": "LFU", "belady": "Belady"}
    name = names.get(policy, policy.replace("_", " "))
    if constants:
        name += f" {constants[0]:g}/{constants[1]:g}"
    return name + (", bypass" if bypass else "")


def decide(
    candidate: Contender, contenders: Sequence[Contender], reported: Sequence[Rates]
) -> dict:
    """Make the candidate the default if it beats LRU on the half that did not choose it.

    The whole interval must be above 0, over all groups and on the recorded traces alone.
    """
    total, recorded = total_gain(candidate, reported), reported[0].gain(candidate).mean(1)
    wins = all(estimate(gain)["low"] > 0 for gain in (total, recorded))
    default = candidate if wins else PLAIN_LRU
    losers = [
        title(c)
        for c in contenders
        if c.ranking.policy.startswith("affinity") and estimate(total_gain(c, reported))["low"] <= 0
    ]
    losing = [
        f"{m.group.name}: {trace} ({100 * worse:+.2f})"
        for m in reported
        for trace, worse, high in zip(
            m.group.traces, m.gain(default)[0], estimate(m.gain(default))["high"], strict=True
        )
        if high < 0
    ]
    sentence = (
        f"{title(candidate)} {'beats' if wins else 'does not reliably beat'} LRU, by "
        f"{points(estimate(total))} points of hit rate over all groups and by "
        f"{points(estimate(recorded))} on the recorded traces: the default is {title(default)}."
    )
    if losing:
        sentence += f" It loses to LRU, in points, on {'; '.join(losing)}."
    if losers:
        sentence += f" Over all groups these do not beat LRU: {'; '.join(losers)}."
    return {
        "default": describe(default),
        "candidate": describe(candidate),
        "gain": estimate(total),
        "gain_recorded": estimate(recorded),
        "sentence": sentence,
    }


def summary_of(contender: Contender, reported: Sequence[Rates]) -> dict:
    """Return a contender's hit rates by group and size, means over traces, and its gain."""
    lru_misses, misses = (
        np.mean([1 - m.usual(c).mean((1, 2)) for m in reported], axis=0)
        for c in (PLAIN_LRU, contender)
    )
    return describe(contender) | {
        "hit_rate": {m.group.name: estimate(m.usual(contender).mean(1)) for m in reported},
        "gain": estimate(total_gain(contender, reported)),
        "worst_trace": round(float(min(m.gain(contender)[0].min() for m in reported)), 5),
        "fewer_loads": estimate(1 - misses / lru_misses),
    }


def traces_of(measured: Rates, default: Contender, contenders: Sequence[Contender]) -> list[dict]:
    """Return, per trace, LRU, the gain of the default, and of the policy that was best there."""
    lines = []
    for g, trace in enumerate(measured.group.traces):
        best = max(contenders, key=lambda c: measured.gain(c)[0, g])  # noqa: B023
        lines.append({
            "group": measured.group.name, "trace": trace,
            "kept": round(float(measured.group.kept()[g]), 5),
            "lru": round(float(measured.usual(PLAIN_LRU)[0, g].mean()), 5),
            "default": estimate(measured.gain(default)[:, g]),
            "best": title(best), "best_gain": estimate(measured.gain(best)[:, g]),
            "optimum": round(float(measured.gain(OPTIMA[1])[0, g]), 5),
        })  # fmt: skip
    return lines


def rows_of(measured: Rates, layout: str, contenders: Sequence[Contender]) -> list[dict]:
    """Return hit rates and gains over LRU of the same layout by size, per trace and over all."""
    traces = [*enumerate(measured.group.traces), (slice(None), "all")]
    return [
        {"group": measured.group.name, "trace": trace, "layout": layout}
        | describe(contender)
        | {"slots_per_layer": measured.slots}
        | {
            name: estimate(rates[:, g].mean(1) if trace == "all" else rates[:, g])
            for name, rates in (
                ("hit_rate", measured.of(contender)),
                ("gain", measured.of(contender) - measured.of(PLAIN_LRU)),
            )
        }
        for contender in contenders
        for g, trace in traces
    ]


def probation_row(group: Group) -> dict:
    """Compare segmented LRU with LRU, half of the experts resident and half of those protected."""
    slots = slots_of(group, 0.5)
    rates = {}
    for name, make in (("lru", LRU), ("probation", lambda: Probation(slots // 2))):
        streams = tqdm(group.layers_apart(), desc=f"{name}: {group.name}", leave=False)
        hits = [replay_policy(s, group.num_experts, make(), slots, False).mean() for s in streams]
        rates[name] = round(float(np.mean(hits)) / group.top_k, 5)
    return {"group": group.name, "slots": slots} | rates


def check(group: Group, contenders: Sequence[Contender], tokens: int = 32) -> None:
    """Refuse to go on if the shipped classes do not hit what the side-by-side replay hits."""
    slots = slots_of(group, 0.5)
    rankings = list(dict.fromkeys(c.ranking for c in contenders))
    for demand in (group.layers_apart()[:1, :tokens], group.pooled()[:1, :tokens]):
        capacity = slots * demand.shape[2]
        hits_RB = replay(demand, group.num_experts, rankings, [capacity], tokens)[0, 0, ..., 0]
        for (r, bypass), got in np.ndenumerate(hits_RB):
            policy, constants = rankings[r]
            want = replay_policy(
                demand[0], group.num_experts, POLICIES[policy](), capacity, bypass == 1, constants
            ).sum()
            if got != want:
                raise SystemExit(f"{rankings[r]}, bypass {bypass}: {got} hits, not {want}")


# the tables


def points(bounds: dict) -> str:
    """Format a gain in percentage points with its interval."""
    value, low, high = (100 * bounds[name] for name in ("value", "low", "high"))
    return f"{value:+.2f} ({low:+.2f} to {high:+.2f})"


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, all but the first column right-aligned."""
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *lines))


def percent(rate: float) -> str:
    """Format a hit rate."""
    return f"{100 * rate:.1f}"


def summary_table(content: dict) -> str:
    """Hit rates per group and size, and the gain over all groups."""
    groups = content["conditions"]["slots"]
    head = ["policy, decay/boost"]
    head += [f"{name}: {slots} slots" for name, usual in groups.items() for slots in usual]
    head += ["gain over LRU, points", "on the worst trace", "fewer loads, %"]
    lines = [
        [row["title"]]
        + [percent(rate) for name in groups for rate in row["hit_rate"][name]["value"]]
        + [points(row["gain"]), f"{100 * row['worst_trace']:+.2f}"]
        + [percent(row["fewer_loads"]["value"])]
        for row in content["summary"]
    ]
    return table(head, lines)


def trace_table(content: dict) -> str:
    """LRU, the default, the best policy and the optimum of every trace."""
    lines = [
        [
            f"{row['group']}: {row['trace']}",
            percent(row["kept"]),
            percent(row["lru"]),
            points(row["default"]),
            row["best"],
        ]
        + [points(row["best_gain"]), f"{100 * row['optimum']:+.2f}"]
        for row in content["traces"]
    ]
    head = ["trace", "kept, %", "LRU, %", "gain of the default", "best policy", "its gain"]
    head += ["gain of Belady, bypass"]
    return table(head, lines)


def sweep_tables(content: dict) -> str:
    """Gains over LRU by decay and boost on the half that chooses, one table per policy."""
    tables: dict[str, dict] = {}
    for row in content["sweep"]:
        if row["decay"] is not None:
            name = row["policy"].replace("_", " ") + (", bypass" if row["bypass"] else "")
            lines = tables.setdefault(name, {})
            line = lines.setdefault(row["decay"], {})
            column = "1 - decay" if not line else f"{row['boost']:g}"
            line[column] = f"{100 * row['gain']:+.2f}"
    return "\n\n".join(
        table(
            [f"{name}: decay", *(f"boost {boost}" for boost in next(iter(lines.values())))],
            [[f"{decay:g}", *gains.values()] for decay, gains in lines.items()],
        )
        for name, lines in tables.items()
    )


def own_constants_table(content: dict) -> str:
    """The constants that each group alone would choose, beside what all chose."""
    names = list(content["conditions"]["slots"])
    learning = [row for row in content["sweep"] if row["decay"] is not None]
    chosen = [row["title"] for row in content["summary"] if row["boost"] != PRESENT[1]]
    lines = []
    for kind in dict.fromkeys((row["policy"], row["bypass"]) for row in learning):
        sweep = [row for row in learning if (row["policy"], row["bypass"]) == kind]
        common = next(row for row in sweep if row["title"] in chosen)
        line = [common["title"]]
        for g in range(len(names)):
            best = max(sweep, key=lambda row: row["gain_by_group"][g])  # noqa: B023
            gains = [100 * row["gain_by_group"][g] for row in (common, best)]
            line.append(f"{gains[0]:+.2f}; {best['decay']:g}/{best['boost']:g}: {gains[1]:+.2f}")
        lines.append(line)
    return table(["chosen by all", *names], lines)


def pool_table(content: dict) -> str:
    """One pool against as many slots in layers of their own."""
    columns: dict[tuple[str, str], dict] = {}
    for row in content["rows"]:
        if row["trace"] == "all":
            column = columns.setdefault((row["layout"], row["title"]), {})
            rates = zip(row["slots_per_layer"], row["hit_rate"]["value"], strict=True)
            column |= {(row["group"], slots): percent(rate) for slots, rate in rates}
    wanted = dict.fromkeys(
        ["LRU", "LRU, bypass", content["decision"]["candidate"]["title"], "Belady, bypass"]
    )
    keys = [
        (layout, name)
        for name in wanted
        for layout in ("per layer", "pool", "pool, ties by id")
        if (layout, name) in columns
    ]
    places = columns["pool", "LRU"]
    head = ["slots per layer", *(f"{name}: {layout}" for layout, name in keys)]
    lines = [[f"{g}: {z}", *(columns[key].get((g, z), "") for key in keys)] for g, z in places]
    return table(head, lines)


def probation_table(content: dict) -> str:
    """Segmented LRU beside LRU."""
    lines = [
        [f"{row['group']}: {row['slots']} slots", percent(row["lru"]), percent(row["probation"])]
        for row in content["probation"]
    ]
    return table(["hit rate, %", "LRU", "LRU with probation"], lines)


def markdown(content: dict) -> str:
    """Return the report of a results file."""
    facts = "; ".join(
        f"{key.replace('_', ' ')} {value if isinstance(value, str) else json.dumps(value)}"
        for key, value in content["conditions"].items()
    )
    smoke = "**A smoke test (`--quick`): the figures mean little.**\n\n" if content["quick"] else ""
    return f"""# Eviction policies

{smoke}{content["decision"]["sentence"]}

Written by `profiling/eviction.py`, which says how policies are stepped, constants chosen and
intervals drawn. Gains are points of hit rate over LRU without bypass, means over traces and over
25, 50 and 75 % of the experts resident; each group weighs the same. *Bypass*: a newcomer that
ranks below every resident that the step does not need displaces nobody. Affinity policies are
written decay/boost with `max_score` 1; {PRESENT[0]:g}/{PRESENT[1]:g} were the defaults of
`MoEGate` and `attach` when this was measured. Staging slots are not counted: one set of them
serves all layers, so a deep model pays little for them and a model of four layers much.

## Hit rates, %

{summary_table(content)}

![Hit rate against cache size](eviction.png)

## Trace by trace

*Kept*: experts that the token before needed too.

{trace_table(content)}

## Small caches, and one pool over the layers

Hit rates in %, means over traces; the pool has as many slots in all. *Ties by id* ignores which
layer runs next.

{pool_table(content)}

## Probation instead of admission by rank

{probation_table(content)}

## Constants

On the half of sequences and seeds that chose: the gain of the common constants in each group,
then the constants that the group alone would choose, and their gain.

{own_constants_table(content)}

Gain over LRU over all groups, same half. With boost 1 - decay, affinity is a rate of use that
never passes `max_score`; with boost 1, one use reaches it and nothing but its age is left.

{sweep_tables(content)}

Measured with: {facts}.
"""


def plot(content: dict, path: Path) -> None:
    """Draw hit rate against cache size, one panel per group."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    groups = content["conditions"]["slots"]
    colors = {"lru": "C0", "lfu": "C1", "affinity": "C2", "affinity_over_age": "C3"}
    colors["affinity_over_root_age"] = "C4"
    same_as_lru = [row["title"] for row in content["summary"] if row["boost"] == PRESENT[1]]
    same_as_lru.append("LRU, bypass")
    figure, panels = plt.subplots(1, len(groups), figsize=(11, 4.2), layout="constrained")
    for axes, name in zip(panels, groups, strict=True):
        for row in content["rows"]:
            wanted = (row["group"], row["trace"], row["layout"]) == (name, "all", "per layer")
            if wanted and row["title"] not in same_as_lru:
                axes.plot(
                    row["slots_per_layer"],
                    [100 * value for value in row["hit_rate"]["value"]],
                    color=colors.get(row["policy"], "grey"),
                    linestyle="--" if row["bypass"] else "-",
                    marker=None if row["policy"] == "belady" else "o",
                    markersize=3,
                    label=row["title"],
                )
        axes.set_title(name, size=10)
        axes.set_xlabel("slots per layer")
    panels[0].set_ylabel("hit rate, %")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def to_json(content: dict) -> str:
    """Return the results with one line per row."""
    parts = []
    for key, value in content.items():
        if isinstance(value, list):
            text = "[\n" + ",\n".join("  " + json.dumps(row) for row in value) + "\n ]"
        else:
            text = json.dumps(value, indent=1)
        parts.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def study(model: Path, quick: bool) -> dict:
    """Record, draw, choose, measure; return the results."""
    start = time.monotonic()
    tokens, layers = (48, 1) if quick else (2048, 2)
    shapes = FINE_GRAINED[:1] if quick else FINE_GRAINED
    seeds, fresh_seeds = (range(1), range(100, 102)) if quick else (range(2), range(100, 108))
    decays, boosts = (DECAYS[1:6:4], BOOSTS[:3:2]) if quick else (DECAYS, BOOSTS)

    recorded_half, recorded = recorded_groups(model, *((4, 48) if quick else (None, None)))
    halves = [recorded_half]
    halves += [synthetic_group(E, K, tokens, layers, seeds) for E, K in shapes]
    chosen, sweep = choose(halves, decays, boosts)
    candidate = next(c for c in chosen if c.ranking.policy != "lru")

    present = [Contender(Ranking(policy, PRESENT), False) for policy in LEARNING]
    order = list(POLICIES)[::-1]  # LRU first: a tie is not a win over it
    contenders = sorted(
        {*chosen, *present}, key=lambda c: (order.index(c.ranking.policy), c.bypass, title(c))
    )
    rankings = list(dict.fromkeys(c.ranking for c in contenders))
    groups = [recorded]
    groups += [synthetic_group(E, K, tokens, layers, fresh_seeds) for E, K in shapes]
    reported, rows = [], []
    for group in groups:
        check(group, contenders)
        slots = [size for size in all_slots(group) if size >= group.top_k]
        measured = Rates(group, [*rankings, BELADY], slots, "every policy")
        reported.append(measured)
        rows += rows_of(measured, "per layer", [*contenders, *OPTIMA])
    decision = decide(candidate, contenders, reported)
    default = candidate if decision["default"] == describe(candidate) else PLAIN_LRU

    few = [c for c in contenders if c.ranking in (PLAIN_LRU.ranking, candidate.ranking)]
    for group in pool_groups(recorded, shapes, tokens, quick):
        slots = all_slots(group)
        rank = list(dict.fromkeys(c.ranking for c in few))
        for layout, order in (("pool", True), ("pool, ties by id", False)):
            some = rank + [BELADY] * order
            measured = Rates(group, some, slots, layout, pool=True, layer_order=order)
            rows += rows_of(measured, layout, [c for c in [*few, *OPTIMA] if c.ranking in some])

    return {
        "quick": quick,
        "conditions": {
            "model": f"examples/{model.name}, held-out text, one cache per stream",
            "sequences": f"{halves[0].demand.shape[2] // halves[0].unit} of {recorded.unit} tokens "
            "to choose on, as many others to report, per recorded trace",
            "synthetic": f"{tokens} tokens, {layers} layers, seeds {list(seeds)} to choose on, "
            f"{list(fresh_seeds)} to report",
            "drifts": {name: drift.__dict__ for name, drift in DRIFTS.items()},
            "slots": {g.name: [slots_of(g, share) for share in SIZES] for g in groups},
            "numpy": np.__version__,
            "python": platform.python_version(),
            "commit": git_commit(),
            "seconds": str(round(time.monotonic() - start)),
        },
        "decision": decision,
        "summary": [summary_of(c, reported) for c in [*contenders, *OPTIMA]],
        "traces": [line for m in reported for line in traces_of(m, default, contenders)],
        "probation": [probation_row(group) for group in halves],
        "sweep": sweep,
        "rows": rows,
    }


def pool_groups(recorded: Group, shapes, tokens: int, quick: bool) -> list[Group]:
    """Return the groups for pools: all recorded layers, four synthetic ones, fewer seeds."""
    tokens, seeds = (tokens, range(100, 101)) if quick else (tokens // 2, range(100, 104))
    return [recorded] + [synthetic_group(E, K, tokens, 4, seeds) for E, K in shapes]


def main() -> None:
    """Run the study and write its three files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "examples" / "tiny_mixtral")
    parser.add_argument("--quick", action="store_true", help="a smoke test, not a measurement")
    parser.add_argument(
        "--out", type=Path, help="JSON file; default profiling/results, or out/ if quick"
    )
    args = parser.parse_args()
    folder = ROOT / "profiling" / "out" if args.quick else RESULTS
    out = args.out or folder / "eviction.json"

    content = study(args.model, args.quick)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_suffix(".partial")
    partial.write_text(to_json(content), encoding="utf-8")
    os.replace(partial, out)
    out.with_suffix(".md").write_text(markdown(content), encoding="utf-8")
    plot(content, out.with_suffix(".png"))
    print(summary_table(content))
    print(content["decision"]["sentence"])
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
