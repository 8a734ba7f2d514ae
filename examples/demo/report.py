"""What is left when it has run: the table, the conditions it holds under, the JSON file."""

import argparse
import json
import os
import platform
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel

import moe_gpu

from .checkpoint import EvalText, short_name
from .measure import WARM_UP

# at the 49,152 of the README's table, 95 % intervals reach about 0.1 % to either side
ENOUGH_TOKENS = 49_152


def conditions(
    args: argparse.Namespace, model: PreTrainedModel, moe: "moe_gpu.AttachedMoE", text: EvalText
) -> dict:
    """Return what the numbers are meaningless without."""
    device = model.device
    on_gpu = device.type == "cuda"
    store = moe.offloader.store
    return {
        "model": short_name(args.model),
        "device": torch.cuda.get_device_name(device) if on_gpu else f"CPU, {platform.machine()}",
        "threads": torch.get_num_threads(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "moe_gpu": moe_gpu.__version__,
        "python": platform.python_version(),
        "layers": moe.state.num_layers,
        "experts": moe.state.num_experts,
        "slots": int((moe.state.slot_of_LE >= 0).sum()),
        "homes": {
            tier: num_bytes // store.layout.expert_bytes
            for tier, num_bytes in store.home_bytes().items()
        },
        "text": text.source,
        "domains": list(text.rows),
        "eval_tokens": args.eval_tokens,
        "warm_up_tokens": WARM_UP,
        "seed": args.seed,
    }


def show_table(rows: list[dict], where: dict) -> None:
    """Print one line per policy, then what it was measured on."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("policy", no_wrap=True)
    heads = "hit rate", "loads/\ntoken", "MB/\ntoken", "tokens/s", "perplexity", "against\nexact"
    for head in heads:
        table.add_column(head, justify="right")
    for row in rows:
        table.add_row(
            row["policy"],
            f"{row['hit_rate']:.1%}",
            f"{row['loads_per_token']:.2f}",
            f"{row['mb_per_token']:.3f}",
            f"{row['tokens_per_second']:.1f}",
            f"{row['perplexity']:.3f}",
            f"{row['perplexity_change_percent']:+.2f} %",
        )
    console = Console(highlight=False)
    console.print()
    console.print(table)
    console.print()
    for note in notes(rows, where):
        console.print(Text(note, style="dim"))


def notes(rows: list[dict], where: dict) -> list[str]:
    """Return the sentences under the table."""
    every = where["layers"] * where["experts"]
    lines = [
        f"Measured: {rows[0]['tokens']:,} tokens of {where['text']} ({', '.join(where['domains'])}) "
        f"per policy, decoded one by one; {where['slots']} of {every} experts resident; MB = 10^6 "
        f"bytes.",
        f"On: {where['device']}, threads: {where['threads']}, {where['dtype']}, "
        f"torch {where['torch']}, route path: {rows[0]['route_path']}.",
    ]
    if rows[0]["tokens"] < ENOUGH_TOKENS:
        lines.append(f"{rows[0]['tokens']:,} tokens are too few to tell 0.1 % of perplexity apart.")
    on_disk = where["homes"]["disk"]
    if on_disk:
        lines.append(
            f"Homes: {every - on_disk:,} experts in host memory, {on_disk:,} on disk"
            f"{from_disk(rows)}."
        )
    if where["device"].startswith("CPU"):
        place = "this machine's memory, or from its disk" if on_disk else "one memory"
        lines.append(
            f"Without a GPU the experts move within {place}: tokens/s here is no claim about speed."
        )
    return lines


def from_disk(rows: list[dict]) -> str:
    """Return which share of the bytes came from disk, over all policies; nothing if none moved."""
    loads = sum(sum(row["loads_by_tier"].values()) for row in rows)
    share = sum(row["loads_by_tier"]["disk"] for row in rows) / max(loads, 1)
    return f"; {100 * share:.0f} % of the bytes came from disk" if loads else ""


def write_json(path: Path, content: dict) -> None:
    """Write ``content`` to ``path`` whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
