"""Put the measured numbers into README.md, or check that they are the ones that stand there.

Usage:
    python profiling/readme_table.py            # rewrite what lies between the two markers
    python profiling/readme_table.py --check    # exit 1 if that would change anything

Reads ``quality_tiny.json`` in ``profiling/results``. Its ``rows`` have policy, resident, hit_rate,
loads_per_token, mb_per_token, perplexity, perplexity_change_percent, ci_low and ci_high, all but
the first two numbers or null; its ``conditions`` are a dictionary that is printed under the
table. A figure that is null, and everything of a file that is not there, reads "not measured";
a policy that is compared with itself (change 0, no interval) reads "the reference". What
``eviction.json`` beside it found, if it is there, follows in a sentence.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
NOT_MEASURED = "not measured"

COLUMNS = {  # head: (format, fields)
    "policy": ("{}", "policy"),
    "resident": ("{}", "resident"),
    "hit rate": ("{:.1%}", "hit_rate"),
    "loads/token": ("{:.2f}", "loads_per_token"),
    "MB/token": ("{:.3f}", "mb_per_token"),
    "perplexity": ("{:.3f}", "perplexity"),
    "against exact (95 % interval)": (
        "{:+.2f} % ({:+.2f} to {:+.2f})", "perplexity_change_percent", "ci_low", "ci_high",
    ),
}  # fmt: skip


def main() -> int:
    """Rewrite or check the README; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="change nothing, exit 1 if out of date"
    )
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=ROOT / "profiling" / "results")
    args = parser.parse_args()

    before = args.readme.read_text(encoding="utf-8")
    after = fill(before, measured(args.results / "quality_tiny.json"))
    if after == before:
        return 0
    if args.check:
        print(
            f"{args.readme.name} is out of date: run python profiling/readme_table.py",
            file=sys.stderr,
        )
        return 1
    args.readme.write_text(after, encoding="utf-8")
    return 0


def fill(readme: str, table: str) -> str:
    """Return ``readme`` with ``table`` between the markers."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise SystemExit(f"the README must hold {BEGIN} and {END} exactly once")
    head, rest = readme.split(BEGIN)
    _, tail = rest.split(END)
    return f"{head}{BEGIN}\n{table}\n{END}{tail}"


def measured(path: Path) -> str:
    """Return the table of one results file, and the conditions it holds under."""
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": [{}]}
    lines = [COLUMNS, ["---"] + ["---:"] * (len(COLUMNS) - 1)]
    lines += [[cell(row, *column) for column in COLUMNS.values()] for row in content["rows"]]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    if "conditions" not in content:
        return table
    if "mass_budget_against_original_bonus" in content:
        table += "\n\n" + claims(content)
    evictions = path.with_name("eviction.json")
    if evictions.exists():
        table += "\n\n" + evicted(json.loads(evictions.read_text(encoding="utf-8")))
    facts = (f"{key.replace('_', ' ')} {plain(v)}" for key, v in content["conditions"].items())
    return f"{table}\n\nMeasured with: {'; '.join(facts)}. From `profiling/results/{path.name}`."


def claims(content: dict) -> str:
    """Return the two comparisons that the table leads to, as sentences."""
    gain = content["hits_gained_over_exact_at_half_percent"]
    half = next(
        row
        for row in content["mass_budget_against_original_bonus"]
        if row["perplexity_change_percent"] == 0.5
    )
    return (
        f"{gain['policy']}: {gain['points']:.1f} points more hits than exact routing at "
        f"{gain['perplexity_change_percent']:+.2f} % perplexity ({gain['ci_low']:+.2f} to "
        f"{gain['ci_high']:+.2f}). At +0.5 %, where the curves of the plot are interpolated, a "
        f"mass budget needs {half['mass_budget_fewer_loads_than_exact_percent']:.0f} % fewer loads "
        f"than exact routing, and has "
        f"{half['mass_budget_fewer_misses_than_bonus_percent']:.0f} % fewer misses "
        f"({half['ci_low']:.0f} to {half['ci_high']:.0f}) than the original bonus."
    )


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


def cell(row: dict, form: str, *fields: str) -> str:
    """Format one figure, which may need several fields."""
    values = [row.get(field) for field in fields]
    if values == [0, None, None]:
        return "the reference"
    return NOT_MEASURED if None in values else form.format(*values)


def plain(value: object) -> str:
    """Format a condition: a list by its elements."""
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


if __name__ == "__main__":
    sys.exit(main())
