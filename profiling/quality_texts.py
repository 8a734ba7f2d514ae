"""The text that quality is measured on. Shape suffixes: N rows, T tokens."""

from pathlib import Path

import torch
from safetensors.torch import load_file

CHOICE_ROWS = slice(0, 12)  # of each domain: chose the rule and its constants
ROWS = slice(12, 56)
CALIBRATION_ROWS = slice(56, 64)
SEGMENTS = 6  # rows of a stream that follow one another through the same caches


def domains(folder: Path, rows: slice) -> list[torch.Tensor]:
    """Return held-out rows of each domain, ``(N, T + 1)``."""
    return [
        part[rows].long() for _, part in sorted(load_file(folder / "held_out.safetensors").items())
    ]


def held_out(folder: Path, rows: slice = ROWS) -> torch.Tensor:
    """Return held-out rows, domain after domain."""
    return torch.cat(domains(folder, rows))


def switching(folder: Path, rows: slice = ROWS) -> torch.Tensor:
    """Return streams of :data:`SEGMENTS` rows, each row of another domain than the one before."""
    mixed = torch.stack(domains(folder, rows), 1).flatten(0, 1)
    return mixed[: len(mixed) // SEGMENTS * SEGMENTS]


@torch.no_grad()
def generated(model, folder: Path, rows: slice = ROWS, prompt: int = 16) -> torch.Tensor:
    """Return what the model continues held-out prompts with: drawn at temperature 1, fixed seed."""
    torch.manual_seed(0)
    rows_NT = held_out(folder, rows)
    found = [
        model.generate(
            part[:, :prompt],
            attention_mask=torch.ones(len(part), prompt, dtype=torch.long),
            min_new_tokens=rows_NT.shape[1] - prompt,
            max_new_tokens=rows_NT.shape[1] - prompt,
            do_sample=True,
        )
        for part in rows_NT.split(64)
    ]
    return torch.cat(found)
