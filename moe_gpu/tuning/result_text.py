"""What tuning found, as text of at most 80 columns."""

import textwrap
from typing import TYPE_CHECKING

from ..huggingface.plan_text import size
from ..offload.eviction import DEFAULT

if TYPE_CHECKING:
    from .result import Setting, TuneResult

WIDTH = 80
_HEAD = ("slots", "policy", "loads", "MB", "hits", "perpl.", "change (95 % interval)")
_WIDTHS = (9, 16, 7, 7, 7, 8, 26)
_NAMES = {
    "lru": "LRU",
    "lfu": "LFU",
    "affinity": "affinity",
    "affinity_over_age": "aff./age",
    "affinity_over_root_age": "aff./root",
    "belady": "Belady",
}


def result_text(result: "TuneResult") -> str:
    """Return the table, the recommendation and the code to use it."""
    title = (
        f"{result.model_type}: {result.num_layers} MoE layers of {result.num_experts:,} experts of "
        f"{size(result.expert_bytes)}, {result.top_k} per token"
    )
    text = f"Text: {result.rows:,} rows of {result.tokens:,} tokens measured"
    if result.calibration_rows:
        text += f"; {result.calibration_rows:,} others calibrated the layers"
    lines = [*textwrap.wrap(title, WIDTH), *textwrap.wrap(text, WIDTH)]
    lines += ["", "Loads and MB per token; * marks what is recommended for its slots"]
    lines += [_row(*_HEAD), *_table(result), *_replay(result), "", *_recommendation(result)]
    for note in result.notes:
        lines += ["", *textwrap.wrap(f"Note: {note}.", WIDTH)]
    return "\n".join([*lines, "", *_code(result)])


def _row(*cells: str) -> str:
    left = (f"{cell:<{width}}" for cell, width in zip(cells[:2], _WIDTHS, strict=False))
    right = (f"{cell:>{width}}" for cell, width in zip(cells[2:], _WIDTHS[2:], strict=True))
    return "".join([*left, *right]).rstrip()


def _table(result: "TuneResult"):
    for setting in result.table:
        change = "the reference"
        if setting.budget is not None:
            change, low, high = (
                f"{round(value, _decimals(value)) + 0.0:+.{_decimals(value)}f}"  # no -0.00
                for value in (setting.change, setting.change_low, setting.change_high)
            )
            change = f"{change} % ({low} to {high})"
        mark = "*" if setting.is_recommended else " "
        yield _row(
            f"{mark}{setting.slots} of {result.num_experts}",
            _policy(setting),
            f"{setting.loads_per_token:.2f}",
            _mb(setting),
            f"{setting.hit_rate:.1%}",
            f"{setting.perplexity:,.{3 if setting.perplexity < 1000 else 0}f}",
            change,
        )


def _replay(result: "TuneResult"):
    for place, (slots, rates) in enumerate(result.replay.items()):
        if place == 0:
            yield from ("", "Hit rate of exact routing by eviction policy, on the calibrating rows")
            yield f"{'slots':<9}" + "".join(f"{_NAMES[name]:>11}" for name in rates).rstrip()
        cells = "".join(f"{rate:>11.1%}" for rate in rates.values())
        yield f"{f' {slots} of {result.num_experts}':<9}{cells}"


def _policy(setting: "Setting") -> str:
    if setting.budget is not None:
        return f"budget {setting.budget:.3g}"
    return "exact" if setting.eviction == DEFAULT else f"exact, {_NAMES[setting.eviction]}"


def _mb(setting: "Setting") -> str:
    return f"{setting.mb_per_token:,.{_decimals(setting.mb_per_token)}f}"


def _decimals(value: float) -> int:
    return 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0


def _recommendation(result: "TuneResult") -> list[str]:
    choice = result.choice()
    if choice.budget is None:
        what = "Recommended: exact routing"
    else:
        judged = "upper bound of the 95 % interval" if result.is_enough_text else "an estimate"
        what = (
            f"Recommended, at no more than +{result.max_perplexity_increase:g} % perplexity "
            f"({judged}): a budget of {choice.budget:.3g}"
        )
    text = f"{what} with {choice.slots} of {result.num_experts} experts resident"
    gains = []
    for rival in result.table:
        if rival.slots == choice.slots and rival.budget is None and rival is not choice:
            fewer = 1 - choice.loads_per_token / max(rival.loads_per_token, 1e-12)
            name = "" if rival.eviction == DEFAULT else f" with {_NAMES[rival.eviction]}"
            gains.append(
                f"{fewer:.0%} fewer loads than exact routing{name} "
                f"({_mb(choice)} against {_mb(rival)} MB per token)"
            )
    return textwrap.wrap(f"{text}{': ' if gains else ''}{', '.join(gains)}.", WIDTH)


def _code(result: "TuneResult") -> list[str]:
    choice, options = result.choice(), result.attach_options
    policy = "moe_gpu.Exact()"
    if choice.budget is not None:
        policy = f"moe_gpu.QualityBudget({choice.budget:g}, layer_scale={result.layer_scale})"
    arguments = [f"{k}={'policy' if k == 'policy' else repr(v)}" for k, v in options.items()]
    lines = [f"policy = {policy}", f"moe = moe_gpu.attach(model, {', '.join(arguments)})"]
    return [line for code in lines for line in textwrap.wrap(code, WIDTH, subsequent_indent="    ")]
