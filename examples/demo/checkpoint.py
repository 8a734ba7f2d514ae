"""Finding a model: a local folder that is complete, or a hub id; and the text to measure it on."""

import json
import pydoc_data.topics
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

from .errors import Refusal, one_line
from .options import TINY_MODEL

transformers.logging.disable_progress_bar()  # ours are enough
transformers.logging.set_verbosity_error()

ROW = 257  # ids of one sequence: 256 predictions
HELD_OUT = "held_out.safetensors"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


class EvalText(NamedTuple):
    """Sequences to measure on."""

    source: str  # in words
    rows: dict[str, torch.Tensor]  # domain: (rows, ROW) ids


def check_folder(folder: Path) -> None:
    """Refuse a checkpoint folder that lacks files, naming the first that is missing."""
    wanted = ["config.json"]
    if not (folder / "tokenizer.json").exists():
        wanted.append("tokenizer_config.json")  # then it says which other files it needs
    if (folder / INDEX).exists():
        try:
            shards = set(json.loads((folder / INDEX).read_text())["weight_map"].values())
        except (ValueError, KeyError, AttributeError) as error:
            raise Refusal(f"--model {folder}: {INDEX} is not an index: {error!r}") from None
        wanted += sorted(shards)
    else:
        wanted.append(WEIGHTS)
    for name in wanted:
        if Path(name).name != name:
            raise Refusal(f"--model {folder}: {INDEX} names {name!r}, outside the folder")
        if not (folder / name).is_file():
            raise Refusal(f"--model {folder}: the checkpoint lacks {name}")


def load_config(name: str) -> PreTrainedConfig:
    """Load the config of a checkpoint, without running code that comes with it."""
    try:
        return AutoConfig.from_pretrained(name, local_files_only=Path(name).is_dir())
    except Exception as error:  # a damaged file raises what its reader happens to raise
        raise Refusal(f"--model {name}: {one_line(error)}") from None


def load_tokenizer(name: str) -> Tokenizer:
    """Load the tokenizer that belongs to a checkpoint."""
    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=Path(name).is_dir())
    except Exception as error:  # as above
        raise Refusal(f"--model {name}: no tokenizer: {one_line(error)}") from None


def short_name(name: str) -> str:
    """Return a model's name without the folders it lies in."""
    return Path(name).name if Path(name).is_dir() else name


def check_name(name: str) -> None:
    """Refuse what is neither a complete folder nor possibly a hub id."""
    folder = Path(name)
    if folder.is_dir():
        check_folder(folder)
    elif (
        folder == TINY_MODEL
        or folder.is_absolute()
        or name.startswith(".")
        or len(folder.parts) > 2
    ):
        raise Refusal(f"--model {name}: there is no such folder")


def eval_text(name: str, tokenizer: Tokenizer, tokens: int) -> EvalText:
    """Return a checkpoint's own held-out sequences, else Python's help topics, tokenized.

    Args:
        name: Folder or hub id; a folder may hold ``held_out.safetensors``.
        tokenizer: For the help topics.
        tokens: Predictions wanted; more than there are is refused.
    """
    path = Path(name) / HELD_OUT
    if path.is_file():
        text = EvalText(
            "held-out text", {key: rows.long() for key, rows in load_file(path).items()}
        )
    else:
        topics = pydoc_data.topics.topics
        prose = "\n\n".join(topics[key] for key in sorted(topics))
        ids = tokenizer(prose, return_tensors="pt", verbose=False)["input_ids"][0]
        rows = ids[: len(ids) // ROW * ROW].view(-1, ROW)
        text = EvalText("Python's help topics", {"prose": rows})
    available = sum(rows.shape[0] * (rows.shape[1] - 1) for rows in text.rows.values())
    if tokens > available:
        raise Refusal(f"--eval-tokens {tokens}: {text.source} has {available} at most")
    return text


def pick_rows(text: EvalText, tokens: int) -> list[tuple[str, torch.Tensor]]:
    """Choose sequences that hold ``tokens`` predictions, the domains in turn.

    Rows are cut shorter where that lets every domain take part.
    """
    longest = min(ROW - 1, -(-tokens // len(text.rows)))
    picked, left = [], tokens
    for i in range(max(len(rows) for rows in text.rows.values())):
        for domain, rows in text.rows.items():
            if left > 0 and i < len(rows):
                row = rows[i, : min(longest, left) + 1]
                picked.append((domain, row))
                left -= len(row) - 1
    return picked
