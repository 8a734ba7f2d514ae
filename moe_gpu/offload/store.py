"""The home of every expert's weights: page-locked memory, pageable memory, or files on disk.

Shape suffixes: L layers, E experts, N a number of experts, B bytes of one expert.
"""

import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch

from . import pinning
from .layout import ExpertLayout, checksum
from .tiers import Tier


class ExpertFiles(Protocol):
    """Experts in files, as the store reads them (:class:`moe_gpu.offload.disk.DiskExperts`)."""

    def read_into(self, layer: int, expert: int, start: int, stop: int, out: torch.Tensor) -> None:
        """Fill uint8 ``out`` with bytes ``[start, stop)`` of an expert."""

    def read_ahead(self, layer: int, expert: int) -> None:
        """Ask the system to read an expert's bytes soon."""

    def drop_cache(self, layer: int, expert: int) -> None:
        """Tell the system that an expert's bytes will not be read again."""

    def close(self) -> None:
        """Nothing will be read again."""


class ExpertStore:
    """Expert weights of all layers, each expert in its home tier.

    Owns the bytes. Layers are filled by :meth:`put` or :meth:`read` and given up by :meth:`drop`,
    one by one, so that weights which move in or out exist twice for one layer only. What does not
    fit page-locked stays pageable: said once, and counted.

    Attributes:
        layout: What an expert's bytes mean; the same in every layer.
        pin_refused_bytes: Bytes that were to be page-locked and could not be.

    Args:
        layout: See above.
        num_layers: Layers L, ``>= 1``.
        num_experts: Experts per layer E, ``>= 1``.
        device: Where the experts are to be copied.
        tiers_LE: Home of each expert. Default: page-locked for a CUDA device, else pageable.
        files: Where experts on disk are; needed for the tier ``DISK`` and for :meth:`read`.
    """

    def __init__(
        self,
        layout: ExpertLayout,
        num_layers: int,
        num_experts: int,
        device: torch.device | str = "cpu",
        *,
        tiers_LE: Sequence[Sequence[Tier]] | None = None,
        files: ExpertFiles | None = None,
    ):
        self.layout = layout
        self.num_layers, self.num_experts = num_layers, num_experts
        self.device, self.files = torch.device(device), files
        if tiers_LE is None:
            home = Tier.PINNED if self.device.type == "cuda" else Tier.PAGEABLE
            tiers_LE = [[home] * num_experts] * num_layers
        self._tiers_LE = [list(tiers_E) for tiers_E in tiers_LE]
        self.pin_refused_bytes = 0
        self._rows_LE: list[dict[int, torch.Tensor]] = [{} for _ in range(num_layers)]
        self._unpin_L: list[list[weakref.finalize]] = [[] for _ in range(num_layers)]
        self._checksums: dict[tuple[int, int], int] = {}

    def tier(self, layer: int, expert: int) -> Tier:
        """Return where an expert has its home."""
        return self._tiers_LE[layer][expert]

    @property
    def pinned(self) -> bool:
        """Whether every expert is page-locked."""
        return all(tier is Tier.PINNED for tiers_E in self._tiers_LE for tier in tiers_E)

    def home_bytes(self) -> dict[str, int]:
        """Return the bytes of expert weights in each tier, by its name."""
        counts = {tier.value: 0 for tier in Tier}
        for tiers_E in self._tiers_LE:
            for tier in tiers_E:
                counts[tier.value] += self.layout.expert_bytes
        return counts

    def put(self, layer: int, parameters: Mapping[str, torch.Tensor]) -> None:
        """Copy the weights of a layer into the store.

        Args:
            layer: Layer to fill or replace; none of its experts has its home on disk.
            parameters: Tensors ``(E, *shape)`` by name, on any device.

        Raises:
            ValueError: Names, shapes or dtypes that differ from the layout.
        """
        self._check(layer, parameters)

        def fill(expert: int, row_B: torch.Tensor) -> None:
            for name, view in self.layout.views(row_B.unsqueeze(0)).items():
                view[0].copy_(parameters[name][expert])
            self._clear_padding(row_B)

        self._fill(layer, fill)

    def read(self, layer: int, progress: Callable[[int], None] = lambda num_bytes: None) -> None:
        """Read the experts of a layer that live in host memory from the files.

        Args:
            layer: Layer to fill or replace.
            progress: Called with the bytes of each expert once it is read.

        Raises:
            RuntimeError: The files cannot be read, or hold something else than at first.
        """

        def fill(expert: int, row_B: torch.Tensor) -> None:
            self.files.read_into(layer, expert, 0, self.layout.expert_bytes, row_B)
            self.files.drop_cache(layer, expert)
            progress(self.layout.expert_bytes)

        self._fill(layer, fill)

    def _fill(self, layer: int, fill: Callable[[int, torch.Tensor], None]) -> None:
        """Make and fill the memory of a layer, tier by tier; the old one goes once all is well."""
        rows, unpin = {}, []
        experts_of = {tier: [] for tier in Tier}
        for expert, tier in enumerate(self._tiers_LE[layer]):
            experts_of[tier].append(expert)
        try:
            for tier in (Tier.PINNED, Tier.PAGEABLE):
                experts = experts_of[tier]
                if not experts:
                    continue
                expert_bytes = self.layout.expert_bytes
                memory_NB = pinning.whole_pages(len(experts) * expert_bytes).view(-1, expert_bytes)
                for row_B, expert in zip(memory_NB.unbind(0), experts, strict=True):
                    fill(expert, row_B)
                    rows[expert] = row_B
                if tier is Tier.PINNED:
                    unpin += self._pin(layer, memory_NB)
        except BaseException:
            for undo in unpin:
                undo()
            raise
        self.drop(layer)
        self._rows_LE[layer], self._unpin_L[layer] = rows, unpin

    def drop(self, layer: int) -> None:
        """Give up the weights of a layer."""
        for unpin in self._unpin_L[layer]:
            unpin()
        self._rows_LE[layer], self._unpin_L[layer] = {}, []
        for expert in range(self.num_experts):
            self._checksums.pop((layer, expert), None)

    def expert(self, layer: int, expert: int) -> torch.Tensor:
        """Return the bytes of one expert in host memory, uint8 ``(B,)``.

        Raises:
            RuntimeError: Its home is on disk, or the layer is not in the store.
        """
        row_B = self._rows_LE[layer].get(expert)
        if row_B is None:
            raise RuntimeError(f"expert {expert} of layer {layer} is not in host memory")
        return row_B

    def read_into(self, layer: int, expert: int, start: int, stop: int, out: torch.Tensor) -> None:
        """Copy bytes ``[start, stop)`` of an expert, from wherever they are.

        Args:
            layer: Layer of the expert.
            expert: Its id.
            start: First byte, a multiple of ``ALIGNMENT`` within the run.
            stop: One past the last, likewise.
            out: uint8 ``(stop - start,)``.
        """
        if self.tier(layer, expert) is Tier.DISK:
            self.files.read_into(layer, expert, start, stop, out)
        else:
            out.copy_(self.expert(layer, expert)[start:stop])

    def read_ahead(self, layer: int, expert: int) -> None:
        """Ask for an expert's bytes to be in memory soon, where they are on disk."""
        if self.tier(layer, expert) is Tier.DISK:
            self.files.read_ahead(layer, expert)

    def parameter(self, layer: int, name: str, out: torch.Tensor | None = None) -> torch.Tensor:
        """Return one parameter of all experts of a layer, ``(E, *shape)``.

        Args:
            layer: Layer.
            name: Parameter of the layout.
            out: Where to write it, on any device; made in host memory if not given.

        Raises:
            RuntimeError: The layer is not in the store.
        """
        dtype, shape, _ = self.layout.fields[name]
        if not self._rows_LE[layer] and Tier.DISK not in self._tiers_LE[layer]:
            raise RuntimeError(f"layer {layer} is not in the store")
        if out is None:
            out = torch.empty(self.num_experts, *shape, dtype=dtype)
        start, stop = self.layout.span(name)
        buffer = None
        for expert, to in enumerate(out.unbind(0)):
            if self.tier(layer, expert) is Tier.DISK:
                if buffer is None:
                    buffer = torch.empty(stop - start, dtype=torch.uint8)
                self.files.read_into(layer, expert, start, stop, buffer)
                bytes_N = buffer
            else:
                bytes_N = self.expert(layer, expert)[start:stop]
            to.copy_(bytes_N.view(dtype)[: to.numel()].view(shape))
        return out

    def checksum(self, layer: int, expert: int) -> int:
        """Return the checksum of an expert as it is stored; read once, then remembered."""
        key = layer, expert
        if key not in self._checksums:
            if self.tier(layer, expert) is Tier.DISK:
                expert_B = torch.empty(self.layout.expert_bytes, dtype=torch.uint8)
                self.read_into(layer, expert, 0, len(expert_B), expert_B)
            else:
                expert_B = self.expert(layer, expert)
            self._checksums[key] = int(checksum(expert_B))
        return self._checksums[key]

    def remember_checksums(self) -> None:
        """Read every expert once, so that later reads are compared with what is stored now."""
        for layer in range(self.num_layers):
            for expert in range(self.num_experts):
                self.checksum(layer, expert)

    def close(self) -> None:
        """Give up all layers, and the files."""
        for layer in range(self.num_layers):
            self.drop(layer)
        if self.files is not None:
            self.files.close()

    def _clear_padding(self, row_B: torch.Tensor) -> None:
        """Zero the bytes between parameters: a checksum covers them."""
        for name, (dtype, shape, offset) in self.layout.fields.items():
            end = offset + torch.Size(shape).numel() * dtype.itemsize
            row_B[end : self.layout.span(name)[1]].zero_()

    def _check(self, layer, parameters):
        if not 0 <= layer < self.num_layers:
            raise ValueError(f"layer must lie in [0, {self.num_layers - 1}], got {layer}")
        if set(parameters) != set(self.layout.fields):
            raise ValueError(
                f"layer {layer}: expert parameters must be {sorted(self.layout.fields)}, "
                f"got {sorted(parameters)}"
            )
        for name, (dtype, shape, _) in self.layout.fields.items():
            want, got = (self.num_experts, *shape), tuple(parameters[name].shape)
            if got != want or parameters[name].dtype != dtype:
                raise ValueError(
                    f"layer {layer}: {name} must be {dtype} of shape {want}, "
                    f"got {parameters[name].dtype} of shape {got}"
                )

    def _pin(self, layer: int, memory_NB: torch.Tensor) -> list[weakref.finalize]:
        """Page-lock memory, or make it and what comes after it pageable."""
        cause = "an earlier layer was refused"
        if not self.pin_refused_bytes:
            cause = pinning.page_lock(memory_NB, self.device)
            if cause is None:
                # holds the memory, so that it is never freed while it is still page-locked
                return [weakref.finalize(self, pinning.page_unlock, memory_NB)]
            warnings.warn(
                f"host memory of layer {layer}'s experts ({memory_NB.nbytes:,} bytes) could not "
                f"be page-locked ({cause}); it and the layers after it stay pageable and go "
                "through page-locked staging buffers, which costs host time. Containers, WSL and "
                "`ulimit -l` limit how much may be page-locked: pinned_memory= asks for less.",
                RuntimeWarning,
                stacklevel=4,
            )
        self.pin_refused_bytes += memory_NB.nbytes
        tiers_E = self._tiers_LE[layer]
        for expert, tier in enumerate(tiers_E):
            if tier is Tier.PINNED:
                tiers_E[expert] = Tier.PAGEABLE
        return []
