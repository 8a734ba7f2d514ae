"""The curves of a tuning: loads against perplexity, one for each number of slots."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .result import TuneResult


def check_matplotlib() -> None:
    """Refuse early what could not be drawn after a long run.

    Raises:
        ModuleNotFoundError: No matplotlib.
    """
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the plot tune.png needs matplotlib: pip install matplotlib", name="matplotlib"
        ) from error


def plot_result(result: "TuneResult", path: Path) -> None:
    """Write a PNG.

    Raises:
        ModuleNotFoundError: No matplotlib.
    """
    check_matplotlib()
    from matplotlib.figure import Figure  # no pyplot: nothing global, no display

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for color, slots in enumerate(result.slots):
        points = [s for s in result.table if s.slots == slots and s.budget is not None]
        exact = [s for s in result.table if s.slots == slots and s.budget is None]
        curve = [exact[-1], *points]
        style = {"color": f"C{color}", "capsize": 2, "marker": "o", "markersize": 4}
        axes.errorbar(
            [s.loads_per_token for s in curve],
            [s.change for s in curve],
            [
                [max(0.0, s.change - s.change_low) for s in curve],
                [max(0.0, s.change_high - s.change) for s in curve],
            ],
            label=f"{slots} of {result.num_experts} resident",
            **style,
        )
        axes.plot(exact[0].loads_per_token, 0, "x", color=f"C{color}")
        chosen = result.choice(slots)
        axes.plot(
            chosen.loads_per_token, chosen.change, "*", color=f"C{color}", markersize=13, zorder=3
        )
    target = result.max_perplexity_increase
    axes.axhline(target, color="gray", linestyle=":", label=f"target, +{target:g} %")
    axes.set_ylim(-target / 2 - 0.1, 4 * target + 0.2)
    axes.set_xlabel("expert loads per token (x: exact routing with LRU, star: recommended)")
    axes.set_ylabel("change of perplexity, % (95 % interval)")
    axes.legend()
    figure.savefig(path, dpi=120)
