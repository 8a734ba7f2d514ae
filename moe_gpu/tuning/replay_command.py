"""``python -m moe_gpu replay TRACE``: arguments, table, plot."""

import argparse
import json
from pathlib import Path

from ..offload.eviction import POLICIES


# fmt: off
def add_replay(commands) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "replay", help="hit rates of a routing trace over cache sizes and eviction policies",
        description="Replay a routing trace (tune writes one) through caches of several sizes, under "
                    "exact routing, next to Belady's optimum. Every token is a call of its own: "
                    "no part of a row is a prompt. Needs no model.")
    add = parser.add_argument
    add("trace", metavar="TRACE", help="trace.safetensors")
    add("--slots", type=int, nargs="+", metavar="N",
        help="slots per layer (default: as many as one token needs, and a quarter, half and three "
             "quarters of the experts)")
    add("--eviction", nargs="+", metavar="NAME", choices=(*sorted(POLICIES), "belady"),
        default=[*sorted(POLICIES), "belady"],
        help=f"any of {', '.join(sorted(POLICIES))}, belady (default: all)")
    add("--quality", type=float, nargs="+", default=[], metavar="Q",
        help="also QualityBudget(Q), approximately: a trace cannot show what swaps change above")
    add("--decay", type=float, default=0.98, help="of the affinity per token (default: %(default)s)")
    add("--boost", type=float, default=0.02,
        help="affinity added to a chosen expert (default: %(default)s)")
    add("--pool", action="store_true", help="one pool of slots for all layers")
    add("--json", action="store_true", help="print the same as JSON")
    add("--plot", metavar="FILE", help="write a PNG")
    parser.set_defaults(run=_replay, parser=parser)
# fmt: on


def _replay(args: argparse.Namespace) -> int:
    # not at the top: importing torch takes seconds
    from ..policies import QualityBudget
    from .plot import check_matplotlib
    from .replay import replay_trace
    from .trace import RoutingTrace

    if args.plot is not None:
        try:
            check_matplotlib()
        except ModuleNotFoundError as error:
            args.parser.error(str(error))
        if not Path(args.plot).resolve().parent.is_dir():
            args.parser.error(f"--plot {args.plot}: there is no such folder")
    try:
        trace = RoutingTrace.load(args.trace)
    except OSError as error:
        args.parser.error(f"{args.trace}: {error.strerror or error}")
    budgets = [QualityBudget(budget) for budget in args.quality]
    found = replay_trace(
        trace,
        args.slots,
        evictions=args.eviction,
        policies=budgets,
        pool=args.pool,
        decay=args.decay,
        boost=args.boost,
        progress=True,
    )
    if args.json:
        print(json.dumps(as_dict(trace, found), indent=2))
    else:
        print(as_text(trace, found))
    if args.plot is not None:
        plot(trace, found, Path(args.plot))
    return 0


def as_dict(trace, found) -> dict[str, object]:
    """Return everything, ready for JSON."""
    return {
        "layers": trace.num_layers,
        "experts": trace.num_experts,
        "top_k": trace.top_k,
        "rows": trace.rows,
        "tokens": trace.tokens,
        "text": trace.text,
        "replayed": [
            {
                "slots": one.slots,
                "of": one.of,
                "policy": "exact" if one.policy is None else str(one.policy),
                "is_approximate": one.policy is not None,
                "eviction": one.eviction,
                "bypass": one.bypass,
                "hit_rate": one.hit_rate,
                "loads_per_token": one.loads_per_token,
                "mb_per_token": one.loads_per_token * trace.expert_bytes / 1e6
                if trace.expert_bytes
                else None,
            }
            for one in found
        ],
    }


def as_text(trace, found) -> str:
    """Return the table: a line per eviction, a column per cache size."""
    sizes = list(dict.fromkeys(one.slots for one in found))
    names = list(dict.fromkeys(one.name for one in found))
    by_place = {(one.name, one.slots): one for one in found}
    wide = max(len(name) for name in names) + 2
    of = found[0].of
    lines = [
        f"{trace.rows} rows of {trace.tokens} tokens, {trace.num_layers} layers, "
        f"{trace.num_experts} experts, top-{trace.top_k}: hit rate (loads per token)",
        "",
        " " * wide + "".join(f"{f'{slots} of {of}':>18}" for slots in sizes),
    ]
    for name in names:
        cells = (by_place.get((name, slots)) for slots in sizes)
        shown = (f"{one.hit_rate:.1%} ({one.loads_per_token:.2f})" for one in cells)
        lines.append(f"{name:<{wide}}" + "".join(f"{cell:>18}" for cell in shown))
    if any(one.policy is not None for one in found):
        lines += [
            "",
            "~: approximate. What swaps change in the layers above is not in a trace.",
        ]
    return "\n".join(lines)


def plot(trace, found, path: Path) -> None:
    """Draw hit rate over cache size, a curve per eviction."""
    from matplotlib.figure import Figure  # no pyplot: nothing global, no display

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name in dict.fromkeys(one.name for one in found):
        curve = [one for one in found if one.name == name]
        style = "--" if curve[0].bypass else "-"
        color = "black" if curve[0].eviction == "belady" else None
        slots = [one.slots for one in curve]
        axes.plot(
            slots, [100 * one.hit_rate for one in curve], style, marker=".", color=color, label=name
        )
    axes.set_xlabel("slots in all" if found[0].of > trace.num_experts else "slots per layer")
    axes.set_ylabel("hit rate, %")
    axes.set_title(
        f"{trace.num_experts} experts, top-{trace.top_k}, {trace.rows} rows of {trace.tokens} tokens",
        size=9,
    )
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)
