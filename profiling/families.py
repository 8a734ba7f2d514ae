"""Run every family of the zoo through every check, and write the table of what works.

Usage:
    python profiling/families.py [--only mixtral deepseek_v3] [--out FILE.json]

The checks are those of ``tests/test_families.py`` (``tests/zoo_checks.py``), on small random models
on the CPU. Writes ``profiling/results/families.json`` and, beside it, the table as ``.md``;
``profiling/readme_table.py`` puts a shorter one into the README.
"""

import argparse
import json
import platform
import sys
import tempfile
import warnings
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

from _bench import RESULTS, git_commit, table, write_whole

sys.path.append(str(Path(__file__).parent.parent / "tests"))

import zoo_checks  # noqa: E402
from moe_gpu.huggingface.families import REFUSED  # noqa: E402
from zoo import ZOO  # noqa: E402


def main() -> None:
    """Run the checks and write what they found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(ZOO), default=list(ZOO), metavar="FAMILY")
    parser.add_argument("--out", type=Path, default=RESULTS / "families.json")
    options = parser.parse_args()

    torch.set_num_threads(1)  # tiny tensors, whose threads only wait for each other
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    rows = [row_of(name) for name in tqdm(options.only, unit="family", leave=False, disable=None)]
    content = {
        "conditions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            "commit": git_commit(),
        },
        "rows": rows,
        "refused": REFUSED,
    }
    write_whole(options.out, json.dumps(content, indent=1) + "\n")
    write_whole(options.out.with_suffix(".md"), as_text(content))
    print(table([{"family": row["family"]} | row["cells"] for row in rows]))
    print(f"\nwrote {options.out}")


def row_of(name: str) -> dict[str, object]:
    """Return the cells of one family."""
    family = ZOO[name]
    if not family.is_available:
        missing = f"transformers {transformers.__version__} lacks it"
        return {"family": name, "router": None, "cells": dict.fromkeys(zoo_checks.COLUMNS, missing)}
    subject = zoo_checks.Subject(family)
    with tempfile.TemporaryDirectory() as folder:
        cells = {
            column: zoo_checks.outcome(column, subject, Path(folder))
            for column in zoo_checks.COLUMNS
        }
    return {"family": name, "router": type(subject.blocks[0].router).__name__, "cells": cells}


def as_text(content: dict) -> str:
    """Return the results as a page."""
    facts = "; ".join(f"{name} {value}" for name, value in content["conditions"].items())
    rows = [
        {"model type": row["family"], "router": row["router"]} | row["cells"]
        for row in content["rows"]
    ]
    refused = "\n".join(f"- `{name}`: {why}." for name, why in content["refused"].items())
    return f"""# What works with which family

{table(rows)}

Each cell stands for checks of `tests/zoo_checks.py`, on a random model of two layers on the CPU:

- parity: the router's ids, weights and dtypes in float32 and bfloat16 under each of its settings;
  the model's logits close to the stock ones, and the same bits whatever is resident; router logits
  and auxiliary loss, where the model returns them.
- policies: `CacheBonus`, `MassBudget`, `QualityBudget` and `HitRateTarget` swap within the groups
  that a token chose, and with no budget route exactly.
- generate: greedy, with a static cache, two beams, left padding: the stock text; whatever ran the
  experts before is back after `detach()`.
- compile: `torch.compile(model, fullgraph=True)` with every expert resident.
- train: loss and gradients with every expert resident are the stock ones.
- save: `save_pretrained` while attached, and everything given back by `detach()`.
- load: `moe_gpu.load` with experts left on disk computes the bits of `attach`.
- plan: budget and `python -m moe_gpu plan` count what the model takes.

Loading is of checkpoints in float32, float16 or bfloat16, and of block-scaled float8 with
`dequantize=True`; other quantized ones (gpt-oss in MXFP4) are refused.

Routers that are refused:

{refused}

Run with: {facts}. Written by `python profiling/families.py`.
"""


if __name__ == "__main__":
    main()
