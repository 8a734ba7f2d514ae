"""Put measured numbers and the table of families into README.md and docs/quality.md, or check them.

Usage:
    python profiling/readme_table.py            # rewrite what lies between the two markers
    python profiling/readme_table.py --check    # exit 1 if that would change anything

Reads ``quality.json`` in ``profiling/results``: its ``headline`` becomes the table, its rows of
the default policy a sentence, its ``conditions`` the line under it. What was not measured, and
everything of a file that is not there, reads "not measured". What ``eviction.json`` beside it
found, if it is there, follows in a sentence. ``families.json`` becomes the table of families:
model types of which the same works share a row. What folders of GPUs hold (``gpu_pass.py``) becomes
the tables of speed, where README.md has a place for them.
"""

import argparse
import json
import operator
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parent.parent
MARKERS = "<!-- {}: begin -->", "<!-- {}: end -->"
NOT_MEASURED = "not measured"

LIMIT = "0.5"  # % perplexity at which the curves are read
FAMILIES = {
    "original bonus": "original bonus",
    "range-scaled bonus": "range-scaled bonus, running",
    "mass budget": "mass budget",
    "quality budget": "quality budget",
    "and calibrated": "quality budget, calibrated",
}
DEFAULT = "quality budget", 0.05  # family and strength of attach's default


def main() -> int:
    """Rewrite or check README and page; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="change nothing, exit 1 if out of date"
    )
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "quality.md")
    parser.add_argument("--results", type=Path, default=ROOT / "profiling" / "results")
    args = parser.parse_args()

    results = args.results / "quality.json"
    before = {path: path.read_text(encoding="utf-8") for path in (args.readme, args.page)}
    after = dict(before)
    for path, name, part in (
        (args.readme, "measured", measured(results)),
        (args.readme, "families", families(args.results / "families.json")),
        (args.readme, "speed", speed(args.results)),
        (args.page, "measured", against_rivals(results)),
    ):
        if name != "speed" or MARKERS[0].format(name) in after[path]:
            after[path] = fill(path.name, after[path], name, part)
    stale = [path for path in after if after[path] != before[path]]
    for path in stale:
        if args.check:
            print(
                f"{path.name} is out of date: run python profiling/readme_table.py", file=sys.stderr
            )
        else:
            path.write_text(after[path], encoding="utf-8")
    return int(args.check and bool(stale))


def fill(title: str, text: str, name: str, table: str) -> str:
    """Return the text of a file with ``table`` between the markers of that name."""
    begin, end = (marker.format(name) for marker in MARKERS)
    if text.count(begin) != 1 or text.count(end) != 1:
        raise SystemExit(f"{title} must hold {begin} and {end} exactly once")
    head, rest = text.split(begin)
    _, tail = rest.split(end)
    return f"{head}{begin}\n{table}\n{end}{tail}"


def families(path: Path) -> str:
    """Return what works with which model types, one row for those of which the same works."""
    if not path.exists():
        return NOT_MEASURED
    content = json.loads(path.read_text(encoding="utf-8"))
    alike: dict[tuple, list[str]] = {}
    for row in content["rows"]:
        alike.setdefault(tuple(row["cells"].items()), []).append(f"`{row['family']}`")
    columns = list(content["rows"][0]["cells"])
    lines = [["model type", *columns], ["---"] * (1 + len(columns))]
    for cells, names in sorted(alike.items(), key=lambda item: -len(item[1])):
        lines.append([", ".join(names), *dict(cells).values()])
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    facts = "; ".join(f"{name} {value}" for name, value in content["conditions"].items())
    refused = "; ".join(f"`{name}`, since {why}" for name, why in content["refused"].items())
    return (
        f"{table}\n\nRefused: {refused}. On small random models, with {facts}; what each column stands "
        "for is in [families.md](profiling/results/families.md)."
    )


def against_rivals(path: Path) -> str:
    """Return the KL of the best rule over its rivals', half of the experts resident."""
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"headline": []}
    rows = [
        (row, rival, ratios)
        for row in content["headline"]
        if row["text"] == "held out" and 2 * row["slots"] == int(row["resident"].split()[-1])
        for rival, ratios in row["kl_ratio"].items()
    ]
    if not rows:
        return NOT_MEASURED
    cuts = list(rows[0][2])
    head = ["model", "against", *(f"{float(cut):.0%} saved" for cut in cuts)]
    lines = [head, ["---"] * 2 + ["---:"] * len(cuts)]
    lines += [[row["kind"], rival, *map(ratio, ratios.values())] for row, rival, ratios in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def ratio(bound: dict | None) -> str:
    """Format a ratio with its interval; nothing where a curve does not reach that far."""
    return "" if bound is None else "{value:.2f} ({low:.2f} to {high:.2f})".format(**bound)


def measured(path: Path) -> str:
    """Return the table of one results file, and the conditions it holds under."""
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    head = ["model", "resident", "exact, LRU: loads/token", "exact, default eviction", *FAMILIES]
    rows = [
        row for row in content.get("headline", [{}]) if row.get("text", "held out") == "held out"
    ]
    lines = [head, ["---"] * 2 + ["---:"] * (len(head) - 2), *map(line, rows)]
    parts = ["\n".join(f"| {' | '.join(cells)} |" for cells in lines)]
    if "conditions" not in content:
        return parts[0]
    parts += [default_policy(content["rows"])]
    evictions = path.with_name("eviction.json")
    if evictions.exists():
        parts.append(evicted(json.loads(evictions.read_text(encoding="utf-8"))))
    facts = (f"{key.replace('_', ' ')} {plain(v)}" for key, v in content["conditions"].items())
    parts.append(f"Measured with: {'; '.join(facts)}. From `profiling/results/{path.name}`.")
    return "\n\n".join(part for part in parts if part)


def line(row: dict) -> list[str]:
    """Return the cells of one cache size."""
    if not row:
        return [NOT_MEASURED] * (4 + len(FAMILIES))
    cuts = [row["cut"].get(family, {}).get(LIMIT) for family in FAMILIES.values()]
    return [
        row["kind"],
        row["resident"],
        f"{row['lru_loads_per_token']:.2f}",
        share(row["default_eviction_cut"]),
        *map(share, cuts),
    ]


def share(cut: dict | None) -> str:
    """Format loads saved, with the interval; a curve that ends early gives a bound."""
    if cut is None:
        return NOT_MEASURED
    sign = "at least " if cut.get("is_bound") else ""
    value, low, high = (100 * cut[name] for name in ("value", "low", "high"))
    return f"{sign}{value:.0f} % ({low:.0f} to {high:.0f})"


def default_policy(rows: list[dict]) -> str:
    """Return what the default policy does at half of the experts resident, as a sentence."""
    family, strength = DEFAULT
    found = []
    for row in rows:
        slots, experts = map(int, row["resident"].split(" of "))
        if (row["family"], row["strength"], row["text"]) != (family, strength, "held out"):
            continue
        if 2 * slots == experts:
            change = row["perplexity_change_percent"]
            found.append(
                f"{row['kind']}: {row['hit_rate']:.1%} hits, {row['loads_per_token']:.2f} loads a "
                f"token, {change['value']:+.2f} % perplexity ({change['low']:+.2f} to "
                f"{change['high']:+.2f})"
            )
    if not found:
        return ""
    return f"The default, `QualityBudget({strength})`, half resident. {'. '.join(found)}."


def evicted(content: dict) -> str:
    """Return who leaves by default, and what that is worth, as sentences."""
    decision, rows = content["decision"], {row["title"]: row for row in content["summary"]}

    def hit_rate(title: str) -> float:
        (by_size,) = (v for k, v in rows[title]["hit_rate"].items() if k.startswith("recorded"))
        return sum(by_size["value"]) / len(by_size["value"])

    gain = {name: 100 * value for name, value in decision["gain_recorded"].items()}
    bound = 100 * (hit_rate("Belady, bypass") - hit_rate("LRU"))
    worst = min(content["traces"], key=lambda row: row["default"]["value"])
    kind, shape = worst["group"].split(", ")  # "synthetic, 64 top-6"
    where = f"a {kind} one of {worst['trace']} ({shape.replace(' ', ' experts, ')})"
    points = 100 * worst["default"]["value"]
    change = "loses" if points < 0 else "gains"
    return (
        f"Eviction by {decision['default']['title']}: {gain['value']:+.2f} points of hit rate over "
        f"LRU ({gain['low']:+.2f} to {gain['high']:+.2f}) under exact routing, on text that did not "
        f"choose its constants; Belady's optimum, which knows the future, gains {bound:+.2f}. On the "
        f"worst of the traces, {where}, it {change} {abs(points):.2f} points. Means over three cache "
        "sizes, from [eviction.md](profiling/results/eviction.md)."
    )


# -- speed

ORDERS = {"<=": operator.le, "<": operator.lt, ">=": operator.ge, ">": operator.gt}
CLOCKS = ("graph replay", "eager", "latency")
NO_GPU = "Speed on a GPU, this library or any other: not measured."


def speed(results: Path) -> str:
    """Return what was measured on each GPU, or that none was."""
    parts = [of_gpu(path.parent) for path in sorted(results.glob("*/route.json"))]
    return "\n\n".join(parts) or NO_GPU


def of_gpu(folder: Path) -> str:
    """Return the tables of one GPU."""
    route = load(folder / "route.json")
    facts = (
        f"{key.replace('_', ' ')} {plain(value)}"
        for key, value in route["conditions"].items()
        if value and not isinstance(value, dict)
    )
    parts = [
        f"On {route['conditions']['device']}. Graph replay: device time, means of up to 100 calls; "
        "eager: the host's, per call; latency: with a wait in every call.",
        markdown(["the seed's target", "wanted", *CLOCKS, "from"], map(seed_line, seeds(route))),
        markdown(["to be shown", "wanted", "measured", ""], map(target_line, route["targets"])),
    ]
    if (path := folder / "decode.json").exists():
        decode = load(path)["decode"]
        head = ["decode, batch 1", "ms/token", "MB moved/token", "hits"]
        model = ", ".join(f"{key} {value}" for key, value in decode["model"].items())
        parts += [markdown(head, map(decode_line, decode["rows"])), f"Model: {model}."]
    if unmeasured := route["not_measured"]:
        parts.append(f"Not measured there: {'; '.join(unmeasured)}.")
    parts.append(f"Measured with: {'; '.join(facts)}. From `profiling/results/{folder.name}/`.")
    return "\n\n".join(parts)


def load(path: Path) -> dict:
    """Return the content of a results file."""
    return json.loads(path.read_text(encoding="utf-8"))


def seeds(route: dict) -> list[dict]:
    """Return the seed's targets that say what was wanted."""
    return [target for target in route["seed_targets"] if target["wanted"]]


def seed_line(target: dict) -> list[str]:
    """Return the cells of a target of the seed; one that no clock measures has a figure."""
    if "figure" in target:
        return [
            target["target"],
            target["wanted"],
            number(target["figure"]),
            "",
            "",
            target["from"],
        ]
    figures = [number(target.get(clock)) for clock in CLOCKS]
    return [target["target"], target["wanted"], *figures, target["from"]]


def target_line(target: dict) -> list[str]:
    """Return the cells of what a GPU must show."""
    verdict = {True: "met", False: "**not met**", None: ""}[is_met(target)]
    return [target["target"], target["wanted"], number(target["figure"]), verdict]


def decode_line(row: dict) -> list[str]:
    """Return the cells of one way to decode."""
    time, moved = row["ms_per_token"], row["mb_per_token"]["median"]
    hits = "" if row["hit_rate"] is None else f"{row['hit_rate']:.0%}"
    spread = "{median:.2f} ({p20:.2f} to {p80:.2f})".format(**time)
    return [row["decode"], spread, f"{moved:,.0f}", hits]


def is_met(target: dict) -> bool | None:
    """Return whether a figure keeps to what is wanted, such as ``"<= 1.3"``; None: not measured."""
    if target["figure"] is None:
        return None
    order, bound = target["wanted"].split()
    return ORDERS[order](target["figure"], float(bound))


def number(figure: float | None) -> str:
    """Format a figure of any size."""
    if figure is None:
        return NOT_MEASURED
    return f"{figure:,.0f}" if abs(figure) >= 1000 else f"{figure:.2f}"


def markdown(head: list[str], lines: Iterable[list[str]]) -> str:
    """Return a Markdown table, its first column aligned to the left."""
    rows = [head, ["---", *["---:"] * (len(head) - 1)], *lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def plain(value: object) -> str:
    """Format a condition: a list by its elements."""
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


if __name__ == "__main__":
    sys.exit(main())
