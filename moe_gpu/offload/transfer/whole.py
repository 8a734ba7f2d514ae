"""Slots that hold every expert from the start: the model's own tensors, never copied into.

Shape suffixes as in :mod:`moe_gpu.offload.transfer.host`.
"""

from collections.abc import Mapping, Sequence
from typing import NoReturn

import torch

from ..pager import Copy
from .host import Transfer


class NoTransfer(Transfer):
    """Places of weights that never move: expert e of a layer is in its slot e.

    Args:
        weights_L: Per layer, tensors ``(E, *shape)`` by parameter name.
        slot_of_LE: int32 ``(L, E)``, the gate's view of residency, which :meth:`publish` writes.
        timeout_s: Bound of every wait, in seconds.
    """

    def __init__(
        self,
        weights_L: Sequence[Mapping[str, torch.Tensor]],
        slot_of_LE: torch.Tensor,
        *,
        timeout_s: float = 60.0,
    ):
        self.device, self.timeout_s = slot_of_LE.device, timeout_s
        self.memory_G, self._memory_P = [], []
        self.views_G = [dict(weights) for weights in weights_L]
        self._slot_of_rows = slot_of_LE.unbind(0)

    def begin(self, copy: Copy) -> NoReturn:
        """Refuse: whoever orders a copy takes the weights to be somewhere else."""
        raise RuntimeError("every expert is resident: nothing is copied")

    def piece(self, copy: Copy, start: int, stop: int) -> NoReturn:
        """Refuse likewise."""
        self.begin(copy)

    def bytes_of(self, place: int) -> NoReturn:
        """Refuse likewise: parameters of an expert do not lie together."""
        raise RuntimeError("every expert is resident: nothing is copied, nor kept to compare with")
