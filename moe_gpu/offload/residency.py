"""A warm restart: who was resident and how hot every expert was, in a file.

Shape suffixes: L layers, E experts.
"""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .offloader import ExpertOffloader

FORMAT = "moe_gpu residency 1"


@dataclass(frozen=True)
class Residency:
    """What a cache of experts knows that a fresh one does not.

    Attributes:
        affinity_LE: float32, decayed activation history.
        activations_LE: int64, tokens that executed each expert.
        resident_LE: bool.
    """

    affinity_LE: torch.Tensor
    activations_LE: torch.Tensor
    resident_LE: torch.Tensor

    @classmethod
    def of(cls, offloader: ExpertOffloader) -> "Residency":
        """Read an offloader's residency and history. Synchronises."""
        state = offloader.state
        resident_LE = torch.zeros(state.num_layers, state.num_experts, dtype=torch.bool)
        for layer in range(state.num_layers):
            resident_LE[layer, offloader.residents(layer)] = True
        return cls(state.affinity_LE.cpu().clone(), state.activations_LE.cpu().clone(), resident_LE)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file that appears whole or not at all."""
        path = Path(path)
        tensors = {
            "affinity": self.affinity_LE,
            "activations": self.activations_LE,
            "resident": self.resident_LE,
        }
        handle, partial = tempfile.mkstemp(dir=path.parent, prefix=".partial-")
        os.close(handle)
        try:
            save_file(tensors, partial, metadata={"format": FORMAT})
            os.replace(partial, path)
        except BaseException:
            os.unlink(partial)
            raise

    @classmethod
    def load(cls, path: str | Path) -> "Residency":
        """Read a file of :meth:`save`.

        Raises:
            FileNotFoundError: No such file.
            ValueError: Not such a file, or a damaged one.
        """
        try:
            with safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get("format") != FORMAT:
                    raise ValueError(f"residency={str(path)!r} is not a file of save_residency()")
                names = ("affinity", "activations", "resident")
                affinity_LE, activations_LE, resident_LE = map(file.get_tensor, names)
        except SafetensorError as error:
            raise ValueError(f"residency={str(path)!r} cannot be read: {error}") from error
        return cls(affinity_LE.float().nan_to_num(), activations_LE.long(), resident_LE.bool())

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
        """Give an offloader this history, and its slots to the hottest experts.

        Ages are restored in the order of affinity, which falls with every step without a use.
        """
        state, heat = offloader.state, self.heat()
        state.affinity_LE.copy_(self.affinity_LE)
        state.activations_LE.copy_(self.activations_LE)
        for layer, affinity_E in enumerate(self.affinity_LE.tolist()):
            history, row = offloader.histories[layer], offloader.row_of(layer)
            history.learn(row, affinity_E)
            used = [expert for expert, affinity in enumerate(affinity_E) if affinity > 0]
            for expert in sorted(used, key=lambda expert: affinity_E[expert]):
                history.touch(row, [offloader.key_of(layer, expert)])
        pairs = [(la, e) for la in range(state.num_layers) for e in range(state.num_experts)]
        offloader.fill(sorted(pairs, key=lambda pair: (-heat[pair[0]][pair[1]], pair[1], pair[0])))
