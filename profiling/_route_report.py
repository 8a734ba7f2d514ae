"""Tables of the route benchmark: by point, by stage, against the seed of the project."""

import json
from collections.abc import Mapping, Sequence

import _bench as bench
import _route_cases as cases

BATCH = 64  # tokens of a batched call whose rate is shown: the most that a policy takes by default
QUALITY = bench.RESULTS / "quality.json"
NOTES = {
    "The original router": [
        "Per token. The original is compiled Rust on one thread; its times are known figures, of "
        "another machine and not of this run. On the CPU the "
        "route call is dozens of PyTorch operators, which cost microseconds each to dispatch "
        "whatever their size: a batch shares them, one token pays them all."
    ],
    "What each stage adds, us": [
        "Bookkeeping: affinity, counters and requests together. Affinity contains what tiles "
        "exchange through the scratch; a policy adds to the whole of the rest."
    ],
}
HIT_RATE_OF = {  # which row of QUALITY
    "kind": "8 experts, top-2", "text": "held out", "resident": "4 of 8",
    "family": "quality budget", "strength": 0.05,
}  # fmt: skip


def find(rows: Sequence[Mapping], **wanted: object) -> dict | None:
    """Return the first row with these values."""
    return next((r for r in rows if all(r.get(k) == v for k, v in wanted.items())), None)


def of_point(row: Mapping) -> dict[str, object]:
    """Return what names a row's point."""
    return {key: row[key] for key in ("T", "E", "K", "policy", "hits", "routing")}


def bandwidths(
    rows: Sequence[Mapping], ours: str, copy_bytes_per_s: float | None
) -> list[dict[str, object]]:
    """Return the share of a copy's bandwidth that the largest calls reach, least bytes counted."""
    found = []
    for row in rows:
        is_ours = row["what"] == ours and row["clock"] == "graph replay"
        if copy_bytes_per_s and is_ours and row["T"] == max(cases.TOKENS):
            size = cases.least_bytes(row["T"], row["E"], row["K"])
            rate = size / (row["p50"] * 1e-6)
            found.append(
                of_point(row) | {"least_mb": size / 1e6, "gb_per_s": rate / 1e9}
                | {"of_copy_bandwidth": rate / copy_bytes_per_s}
            )  # fmt: skip
    return found


def seed_targets(rows: Sequence[Mapping], ours: str) -> list[dict[str, object]]:
    """Return the latency targets that the project began with, each with our figure and its source."""
    at = {"E": 8, "K": 2, "policy": "budget", "hits": "half", "routing": "uniform", "what": ours}
    clocks = ("graph replay", "eager", "latency", "wall")
    one = {clock: find(rows, **at, T=1, clock=clock) for clock in clocks}
    batch = {clock: find(rows, **at, T=BATCH, clock=clock) for clock in clocks}

    def line(name: str, target: str, figure, found=one, tokens: int = 1) -> dict[str, object]:
        values = {clock: row and figure(row) for clock, row in found.items()}
        return {"target": name, "wanted": target} | values | {
            "from": f"{tokens} token{'s' * (tokens > 1)}, 8 experts, top-2, budget, half resident"
        }  # fmt: skip

    return [
        line("route, median", "< 10 us", lambda r: r["p50"]),
        line("route, mean", "5 to 7 us", lambda r: r["mean"]),
        line("route, p99 (of graph replays: of means)", "< 10 us", lambda r: r["p99"]),
        line("calls/s", "140,000 to 200,000", lambda r: 1e6 / r["mean"]),
        line("tokens/s in a batch", "", lambda r: BATCH * 1e6 / r["mean"], batch, BATCH),
        hit_rate(),
    ]


def targets(content: Mapping, ours: str) -> list[dict[str, object]]:
    """Return what the kernel must show on an H200-class GPU, each with what this run shows."""
    base = {"hits": "half", "routing": "uniform"}

    def at(T: int, E: int, K: int, key: str, policy: str) -> float | None:
        ratios = find(content["ratios"], **base, T=T, E=E, K=K, policy=policy)
        return _median(ratios or {}, key)

    lines = []
    for policy in ("off", "budget"):
        for T, E, K, key, most in (
            (1, 8, 2, "over_empty", 1.3),
            (1, 128, 8, "over_routing_only", 1.25),
            (1, 256, 8, "over_routing_only", 1.25),
            (16384, 128, 8, "over_routing_only", 1.3),
        ):
            name = f"{key.replace('_', ' ')}, T={T}, ({E}, {K}), {policy}"
            figure = at(T, E, K, key, policy)
            if key == "over_routing_only" and figure is not None:
                best = find(content["ratios"], **base, T=T, E=E, K=K, policy=policy)["routing_only"]
                name += f" (the best of those here: {best})"
            lines.append({"target": name, "wanted": f"<= {most}", "figure": figure})
    chains = [r["chain_over_ours"]["median"] for r in content["ratios"] if "chain_over_ours" in r]
    for policy in ("off", "budget"):
        share = [b["of_copy_bandwidth"] for b in content["bandwidth"] if b["policy"] == policy]
        name = f"of the copy's bandwidth, T={max(cases.TOKENS)}, the least, {policy}"
        lines.append({"target": name, "wanted": ">= 0.7", "figure": min(share, default=None)})
    small = [s["bookkeeping"]["median"] for s in content["stages"] if s["T"] <= 64]
    one = {"T": 1, "E": 8, "K": 2, "policy": "budget"} | base
    call = find(content["rows"], **one, what=ours, clock="eager") or {}
    launch = find(content["ratios"], **one) or {}
    rest = (
        ("chain over ours, the least of all points", ">= 5", min(chains, default=None)),
        ("eager call, p50, us", "<= 12", call.get("p50")),
        ("eager call, p99, us", "< 25", call.get("p99")),
        ("eager call over the least launch, direct", "<= 1.5", launch.get("eager_over_launch")),
        (
            "eager call over the least launch, kernel[grid](x)", "<= 1.5",
            launch.get("eager_over_triton_call"),
        ),
        ("affinity, counters and requests, T <= 64, the most, us", "<= 0.7", max(small, default=None)),
    )  # fmt: skip
    return lines + [dict(zip(("target", "wanted", "figure"), line, strict=True)) for line in rest]


def hit_rate() -> dict[str, object]:
    """Return the hit rate of a real run, which is not this one."""
    found = None
    if QUALITY.exists():
        found = find(json.loads(QUALITY.read_text(encoding="utf-8"))["rows"], **HIT_RATE_OF)
    return {
        "target": "hit rate", "wanted": "70 to 80 %", "figure": found and 100 * found["hit_rate"],
        "from": f"results/{QUALITY.name}: {', '.join(map(str, HIT_RATE_OF.values()))}",
    }  # fmt: skip


def text_of(content: Mapping) -> str:
    """Return the results as Markdown."""
    parts = ["# Route call", f"Measured on: {bench.facts(content['conditions'])}"]
    parts.append(
        "Microseconds per call. Graph replay: device time, the mean of up to 100 calls of one graph "
        "(percentiles are of such means), inputs and outputs in the second-level cache where they "
        "fit; eager and latency: single calls; wall: on the CPU, one thread, where the route call is "
        "the PyTorch reference: dozens of operators, each of which costs microseconds to dispatch. "
        "Ratios are medians of paired rounds."
    )
    if content["copy_gb_per_s"]:
        parts.append(f"A large copy moves {content['copy_gb_per_s']:,.0f} GB/s, both ways counted.")
    sections = {
        "By point": point_lines(content),
        "On the host": host_lines(content),
        "Cold caches": cold_lines(content),
        "What each stage adds, us": stage_lines(content),
        "With the projection": projected_lines(content),
        "Of the copy's bandwidth": content["bandwidth"],
        "The original router": original_lines(content),
        "What it must show on an H200-class GPU": content["targets"],
        "Seed targets": seed_lines(content),
    }
    for head, lines in sections.items():
        if lines:
            parts += [f"## {head}", bench.table(lines), *NOTES.get(head, ())]
    for head, lines in (
        ("Absent peers", [f"{name}: {why}" for name, why in content["absent"].items()]),
        ("Not measured", content["not_measured"]),
        ("Failed", content["failed"]),
    ):
        if lines:
            parts += [f"## {head}", "\n".join(f"- {line}" for line in lines)]
    return "\n\n".join(parts)


def _median(ratios: Mapping, key: str) -> float | None:
    return ratios[key]["median"] if key in ratios else None


def point_lines(content: Mapping) -> list[dict[str, object]]:
    """Return a line per point: ours, and how it stands to the rest."""
    lines = []
    for ratios in content["ratios"]:
        point = of_point(ratios)
        ours = [
            r for r in content["rows"]
            if r["clock"] in ("graph replay", "wall") and r["what"] == "moe-gpu"
        ]  # fmt: skip
        row = find(ours, **point)
        if row is None:
            continue
        lines.append(
            point | {
                "us": bench.with_spread({"median": row["p50"]} | row, 2),
                "over empty": _median(ratios, "over_empty"),
                "over routing only": _median(ratios, "over_routing_only"),
                "the best of which": ratios.get("routing_only", bench.NOT_MEASURED),
                "chain over ours": _median(ratios, "chain_over_ours"),
                "compiled over ours": _median(ratios, "compiled_over_ours"),
            }
        )  # fmt: skip
    return lines


def host_lines(content: Mapping) -> list[dict[str, object]]:
    """Return a line per point and alternative: what a caller pays and waits."""
    eager = [row for row in content["rows"] if row["clock"] == "eager"]
    lines = []
    for row in eager:
        wait = find(content["rows"], **of_point(row), what=row["what"], clock="latency")
        ratios = find(content["ratios"], **of_point(row)) or {}
        is_ours = row["what"] == "moe-gpu"
        lines.append(
            of_point(row) | {"what": row["what"]}
            | {f"eager {p}": row[p] for p in ("p50", "p90", "p99")}
            | {f"latency {p}": wait[p] for p in ("p50", "p90", "p99")}
            | {
                "over the least launch": ratios.get("eager_over_launch") if is_ours else "",
                "over kernel[grid](x)": ratios.get("eager_over_triton_call") if is_ours else "",
            }
        )  # fmt: skip
    return lines


def cold_lines(content: Mapping) -> list[dict[str, object]]:
    """Return a line per point: ours, and the empty kernel, which pays the events as well."""
    lines = {}
    for row in content["rows"]:
        if row["clock"] == "cold":
            key = tuple(of_point(row).values())
            lines.setdefault(key, of_point(row))[f"{row['what']}, us"] = row["p50"]
    return list(lines.values())


def stage_lines(content: Mapping) -> list[dict[str, object]]:
    """Return a line per size."""
    return [
        {
            name: bench.with_spread(value, 2) if isinstance(value, Mapping) else value
            for name, value in stages.items()
        }
        for stages in content["stages"]
    ]


def projected_lines(content: Mapping) -> list[dict[str, object]]:
    """Return a line per comparison with transformers' router."""
    return [
        of_point(r) | {"D": r["D"], "transformers over ours": r["transformers_over_ours"]["median"]}
        for r in content["projected"]
    ]


def original_lines(content: Mapping) -> list[dict[str, object]]:
    """Return a line per size, nanoseconds per token."""
    return [
        {key: row[key] for key in ("T", "E", "K")}
        | {f"{name}, ns": spread["median"] for name, spread in row["ns_per_token"].items()}
        | {"original (not of this run), ns": row["original_ns"]}
        for row in content["original_router"]
    ]


def seed_lines(content: Mapping) -> list[dict[str, object]]:
    """Return a line per target; a clock that no target was measured by has no column."""
    lines = []
    for target in content["seed_targets"]:
        line = dict(target)
        source = line.pop("from")
        lines.append(line | {"from": source})
    heads = list(dict.fromkeys(head for line in lines for head in line if head != "from"))
    return [
        {head: line.get(head) if head in line else "" for head in heads} | {"from": line["from"]}
        for line in lines
    ]
