"""What an expert is to the offloader: one contiguous run of bytes.

One copy moves it and packed formats can follow; only :class:`ExpertLayout` knows what is inside.

Shape suffixes: E experts, N a number of experts or slots, B bytes of one expert.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

ALIGNMENT = 256  # bytes; what vector loads and copy engines like, and a multiple of every itemsize


class Field(NamedTuple):
    """One parameter of one expert."""

    dtype: torch.dtype
    shape: tuple[int, ...]  # without the expert dimension
    offset: int  # bytes from the start of the expert


def aligned(num_bytes: int) -> int:
    """Round up to ``ALIGNMENT``."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class ExpertLayout:
    """Where each parameter of an expert lies in its run of bytes.

    Attributes:
        fields: Parameters by name, in order of their offset.
        expert_bytes: Length of the run, B; a multiple of ``ALIGNMENT``.
    """

    fields: dict[str, Field]
    expert_bytes: int

    @classmethod
    def of(cls, parameters: Mapping[str, torch.Tensor]) -> "ExpertLayout":
        """Lay out parameters of shape ``(E, ...)``; only dtypes and shapes are read."""
        fields, offset = {}, 0
        for name, parameter in parameters.items():
            shape = tuple(parameter.shape[1:])
            fields[name] = Field(parameter.dtype, shape, offset)
            offset += aligned(math.prod(shape) * parameter.dtype.itemsize)
        return cls(fields, offset)

    def span(self, name: str) -> tuple[int, int]:
        """Return where a parameter's bytes begin and end, padding included."""
        dtype, shape, offset = self.fields[name]
        return offset, offset + aligned(math.prod(shape) * dtype.itemsize)

    def views(self, memory_NB: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return typed views ``(N, *shape)`` of N experts in uint8 memory ``(N, B)``."""
        return {name: self.view(memory_NB, name) for name in self.fields}

    def view(self, memory_NB: torch.Tensor, name: str) -> torch.Tensor:
        """Return one parameter of N experts as a strided view ``(N, *shape)``."""
        dtype, shape, offset = self.fields[name]
        first, size = offset // dtype.itemsize, math.prod(shape)
        return memory_NB.view(dtype)[:, first : first + size].view(-1, *shape)


def checksum(expert_B: torch.Tensor) -> torch.Tensor:
    """Return a checksum of an expert's bytes, an int64 scalar on their device.

    Position-weighted sum modulo 2**64: integer, so every device and thread count agrees. It
    catches wrong, shifted, stale and torn bytes; it is no defence against an adversary.

    Args:
        expert_B: uint8 ``(B,)``, B a multiple of 4.
    """
    words = expert_B.view(torch.int32)
    total = torch.zeros((), dtype=torch.int64, device=expert_B.device)
    step = 1 << 20  # words at once: bounds the temporary to 16 MiB
    odd = torch.arange(1, 2 * min(step, len(words)), 2, device=expert_B.device)
    for first in range(0, len(words), step):
        part = words[first : first + step]
        total = total * 1_000_003 + (part * odd[: len(part)]).sum()
    return total
