"""Rows of token ids out of a user's text, and their split: calibrate on some, report on others.

Shape suffixes: N rows, T tokens predicted per row.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

CALIBRATION_SHARE = 4  # one row in so many
MOST_CALIBRATION_ROWS = 32


class Split(NamedTuple):
    """Two disjoint parts of the rows, each in text order."""

    calibration_NT: torch.Tensor
    measured_NT: torch.Tensor


def rows_of(
    texts: Sequence[str] | torch.Tensor,
    tokenizer=None,
    tokens: int = 256,
    limit: int | None = None,
) -> torch.Tensor:
    """Return rows of token ids, int64 ``(N, T + 1)``, in text order.

    Texts follow one another in one stream, which is cut; what is left at its end is dropped.

    Args:
        texts: Texts, or token ids ``(N, T + 1)``, which are taken as they are.
        tokenizer: Of the model; for texts.
        tokens: T, ``>= 1``; for texts.
        limit: Most rows, evenly spread over the stream. Default: all.

    Raises:
        TypeError: Texts that are none, without a tokenizer, or ids that are no integers.
        ValueError: Too little text for one row, or an argument outside its bounds.
    """
    for name, value in (("tokens", tokens), ("rows", limit)):
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} must be an int, got {value!r}")
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    rows_NT = texts if isinstance(texts, torch.Tensor) else _cut(texts, tokenizer, tokens)
    if rows_NT.is_floating_point() or rows_NT.is_complex() or rows_NT.dtype == torch.bool:
        raise TypeError(f"token ids must be integers, got {rows_NT.dtype}")
    if rows_NT.ndim != 2 or rows_NT.shape[1] < 2:
        raise ValueError(
            f"token ids must have shape (rows, tokens + 1), got {tuple(rows_NT.shape)}"
        )
    if limit is not None and limit < len(rows_NT):
        rows_NT = rows_NT[torch.linspace(0, len(rows_NT) - 1, limit).round().long()]
    return rows_NT.long()


def _cut(texts, tokenizer, tokens: int) -> torch.Tensor:
    if isinstance(texts, str) or not isinstance(texts, Sequence):
        raise TypeError(f"texts must be a list of str or a tensor, got {type(texts).__name__}")
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("texts must be a list of str or a tensor, got a list of something else")
    if tokenizer is None:
        raise TypeError("texts that are str need the model's tokenizer")
    # a stream longer than the model's context is meant: no warning about it
    ids = [torch.tensor(tokenizer(text, verbose=False)["input_ids"]) for text in texts if text]
    stream = torch.cat(ids).long() if ids else torch.empty(0, dtype=torch.int64)
    rows = len(stream) // (tokens + 1)
    if rows == 0:
        raise ValueError(
            f"texts must have at least one row of {tokens + 1} tokens, got {len(stream)} in all"
        )
    return stream[: rows * (tokens + 1)].view(rows, tokens + 1)


def split_rows(rows_NT: torch.Tensor, seed: int = 0) -> Split:
    """Draw the rows that calibrate: a quarter, at most 32, at least 1; the rest is measured.

    Raises:
        ValueError: Fewer than 2 rows.
    """
    N = len(rows_NT)
    if N < 2:
        raise ValueError(f"at least 2 rows of text are needed, one of them to calibrate, got {N}")
    shuffled_N = torch.randperm(N, generator=torch.Generator().manual_seed(seed))
    first = max(1, min(MOST_CALIBRATION_ROWS, N // CALIBRATION_SHARE))
    return Split(*(rows_NT[part.sort().values] for part in shuffled_N.split([first, N - first])))
