"""A warm restart: who was resident and how hot every expert was, in a file.

Shape suffixes: L layers, E experts.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..files import save_whole
from .offloader import ExpertOffloader

FORMAT = "moe_gpu residency 1"


@dataclass(frozen=True)
class Residency:
    """What a cache of experts knows that a fresh one does not, for any number of slots.

    Attributes:
        affinity_LE: float32, decayed activation history.
        activations_LE: int64, tokens that executed each expert.
        resident_LE: bool.
        ages_LE: int64, steps of its layer since each expert was last needed.
        uses_LE: int64, steps that needed each expert.
    """

    affinity_LE: torch.Tensor
    activations_LE: torch.Tensor
    resident_LE: torch.Tensor
    ages_LE: torch.Tensor
    uses_LE: torch.Tensor

    @classmethod
    def of(cls, offloader: ExpertOffloader) -> "Residency":
        """Read an offloader's residency and history. Synchronises."""
        state = offloader.state
        resident_LE = torch.zeros(state.num_layers, state.num_experts, dtype=torch.bool)
        ages_LE = torch.zeros(state.num_layers, state.num_experts, dtype=torch.int64)
        uses_LE = torch.zeros_like(ages_LE)
        for layer in range(state.num_layers):
            resident_LE[layer, offloader.residents(layer)] = True
            history, first = offloader.cache.histories[layer], offloader.cache.key_of(layer, 0)
            keys = range(first, first + state.num_experts)
            ages_LE[layer] = torch.tensor([history.age(key) for key in keys])
            uses_LE[layer] = torch.tensor([history.uses(key) for key in keys])
        affinity_LE, activations_LE = state.affinity_LE.cpu(), state.activations_LE.cpu()
        return cls(affinity_LE.clone(), activations_LE.clone(), resident_LE, ages_LE, uses_LE)

    @classmethod
    def joined(cls, parts: Sequence[tuple[Sequence[int], "Residency"]]) -> "Residency":
        """Return the residency of a model from that of its parts.

        Args:
            parts: The numbers of a part's layers, and its residency; together every layer once.
        """
        order_L = torch.tensor([number for numbers, _ in parts for number in numbers]).argsort()
        names = [field.name for field in fields(cls)]
        return cls(*(torch.cat([getattr(r, n) for _, r in parts])[order_L] for n in names))

    def of_layers(self, numbers: Sequence[int]) -> "Residency":
        """Return the residency of some of the layers."""
        return Residency(*(tensor_LE[list(numbers)] for tensor_LE in vars(self).values()))

    def save(self, path: str | Path) -> None:
        """Write a safetensors file that appears whole or not at all.

        Raises:
            FileNotFoundError: No folder to write it to.
        """
        save_whole(vars(self), path, {"format": FORMAT})

    @classmethod
    def load(cls, path: str | Path) -> "Residency":
        """Read a file of :meth:`save`.

        Raises:
            TypeError: Not a path.
            OSError: No such file, or one that cannot be read.
            ValueError: Not such a file, or a damaged one.
        """
        if not isinstance(path, (str, os.PathLike)):
            raise TypeError(f"residency must be a path, got {path!r}")
        try:
            with safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get("format") != FORMAT:
                    raise ValueError(f"residency={str(path)!r} is not a file of save_residency()")
                found = {field.name: file.get_tensor(field.name) for field in fields(cls)}
        except SafetensorError as error:
            raise ValueError(f"residency={str(path)!r} cannot be read: {error}") from error
        shapes = {tuple(tensor.shape) for tensor in found.values()}
        if len(shapes) > 1 or len(*shapes) != 2 or not found["affinity_LE"].isfinite().all():
            raise ValueError(f"residency={str(path)!r} is damaged: its tensors make no sense")
        return cls(**found)

    def check(self, num_layers: int, num_experts: int) -> None:
        """Raise ``ValueError`` if this is of a model of other sizes."""
        found = tuple(self.affinity_LE.shape)
        if found != (num_layers, num_experts):
            raise ValueError(
                f"residency is of {found[0]} layers of {found[1]} experts, the model has "
                f"{num_layers} of {num_experts}"
            )

    def heat(self) -> list[list[float]]:
        """Return how hot each expert is, ``[layer][expert]``: residents above all others."""
        top = self.affinity_LE.max().clamp(min=1.0)
        return (self.affinity_LE + self.resident_LE * top).tolist()

    def restore(self, offloader: ExpertOffloader) -> None:
        """Give an offloader this history, and its slots to the hottest experts."""
        state, heat = offloader.state, self.heat()
        state.affinity_LE.copy_(self.affinity_LE)
        state.activations_LE.copy_(self.activations_LE)
        for layer in range(state.num_layers):
            history, row = offloader.cache.histories[layer], offloader.cache.row_of(layer)
            history.learn(row, self.affinity_LE[layer].tolist())
            history.recall(row, self.ages_LE[layer].tolist(), self.uses_LE[layer].tolist())
        pairs = [(la, e) for la in range(state.num_layers) for e in range(state.num_experts)]
        offloader.fill(sorted(pairs, key=lambda pair: (-heat[pair[0]][pair[1]], pair[1], pair[0])))
