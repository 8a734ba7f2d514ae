"""The home of expert weights in host memory.

An expert is one contiguous run of bytes, so that one copy moves it and packed formats can follow;
only :class:`ExpertLayout` knows what is inside.

Shape suffixes: E experts, N a number of experts or slots, B bytes of one expert.
"""

import math
import warnings
import weakref
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
            size = math.prod(shape) * parameter.dtype.itemsize
            offset += -(-size // ALIGNMENT) * ALIGNMENT
        return cls(fields, offset)

    def views(self, memory_NB: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return typed views ``(N, *shape)`` of N experts in uint8 memory ``(N, B)``."""
        return {name: self.view(memory_NB, name) for name in self.fields}

    def view(self, memory_NB: torch.Tensor, name: str) -> torch.Tensor:
        """Return one parameter of N experts as a strided view ``(N, *shape)``."""
        dtype, shape, offset = self.fields[name]
        first, size = offset // dtype.itemsize, math.prod(shape)
        return memory_NB.view(dtype)[:, first : first + size].view(-1, *shape)


class HostStore:
    """Expert weights of all layers in host memory, page-locked where the device is CUDA.

    Owns the bytes. Layers are filled by :meth:`put` and given up by :meth:`drop`, one by one, so
    that weights which move in or out exist twice for one layer only.

    Attributes:
        layout: What an expert's bytes mean; the same in every layer.
        pinned: Whether every layer in the store is page-locked. False on a CUDA device means that
            copies to it are slower and do not overlap compute; a warning said so.

    Args:
        layout: See above.
        num_layers: Layers L, ``>= 1``.
        num_experts: Experts per layer E, ``>= 1``.
        device: Where the experts are to be copied: pins if it is a CUDA device.
    """

    def __init__(
        self,
        layout: ExpertLayout,
        num_layers: int,
        num_experts: int,
        device: torch.device | str = "cpu",
    ):
        self.layout = layout
        self.num_layers, self.num_experts = num_layers, num_experts
        self.device = torch.device(device)
        self.pinned = self.device.type == "cuda"
        self._memory: list[torch.Tensor | None] = [None] * num_layers  # uint8 (E, B)
        self._experts: list[tuple[torch.Tensor, ...]] = [()] * num_layers  # rows of the above
        self._unpin: list[weakref.finalize | None] = [None] * num_layers

    def put(self, layer: int, parameters: Mapping[str, torch.Tensor]) -> None:
        """Copy the weights of a layer into the store.

        Args:
            layer: Layer to fill or replace.
            parameters: Tensors ``(E, *shape)`` by name, on any device.

        Raises:
            ValueError: Names, shapes or dtypes that differ from the layout.
        """
        self._check(layer, parameters)
        self.drop(layer)
        memory_EB = torch.empty(self.num_experts, self.layout.expert_bytes, dtype=torch.uint8)
        for name, view in self.layout.views(memory_EB).items():
            copy_each(view, parameters[name])
        if self.pinned:
            self._pin(layer, memory_EB)
        self._memory[layer], self._experts[layer] = memory_EB, memory_EB.unbind(0)

    def drop(self, layer: int) -> None:
        """Give up the weights of a layer."""
        if self._unpin[layer] is not None:
            self._unpin[layer]()
        self._memory[layer], self._experts[layer], self._unpin[layer] = None, (), None

    def expert(self, layer: int, expert: int) -> torch.Tensor:
        """Return the bytes of one expert, uint8 ``(B,)``."""
        return self._experts[layer][expert]

    def parameter(self, layer: int, name: str) -> torch.Tensor:
        """Return one parameter of all experts of a layer, a strided view ``(E, *shape)``."""
        memory_EB = self._memory[layer]
        if memory_EB is None:
            raise RuntimeError(f"layer {layer} is not in the store")
        return self.layout.view(memory_EB, name)

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

    def _pin(self, layer, memory_EB):
        address = memory_EB.data_ptr()
        error = page_lock(address, memory_EB.numel(), self.device)
        if error is None:
            # holds the memory, so that it is never freed while it is still page-locked
            self._unpin[layer] = weakref.finalize(self, _page_unlock, address, memory_EB)
            return
        self.pinned = False
        warnings.warn(
            f"host memory of layer {layer}'s experts ({memory_EB.numel():,} bytes) could not be "
            f"page-locked ({error}); it and the layers after it stay pageable, so copies to the "
            "device are slower and do not overlap compute. Containers, WSL and `ulimit -l` limit "
            "how much may be page-locked.",
            RuntimeWarning,
            stacklevel=3,
        )


def copy_each(destination: torch.Tensor, source: torch.Tensor) -> None:
    """Copy ``(N, *shape)`` expert by expert.

    Between devices a copy of a strided whole would first be made contiguous in host memory.
    """
    for to, expert in zip(destination.unbind(0), source.unbind(0), strict=True):
        to.copy_(expert)


def page_lock(address: int, num_bytes: int, device: torch.device) -> str | None:
    """Page-lock host memory for CUDA; return None, or the cause if it is refused.

    Registers memory instead of allocating it pinned: PyTorch's pinned allocator rounds a layer of
    experts up to a power of two.
    """
    runtime = torch.cuda.cudart()
    code = runtime.cudaHostRegister(address, num_bytes, 1)  # 1: portable, for every context
    if int(code) == 0:
        return None
    # the refusal is also CUDA's pending "last error", which the next kernel launch would report
    # as its own failure; a launch of ours takes it instead
    try:
        torch.ones(1, device=device)
    except RuntimeError:
        pass
    return f"cudaHostRegister: {runtime.cudaGetErrorString(code)}"


def _page_unlock(address: int, memory_EB: torch.Tensor) -> None:
    torch.cuda.cudart().cudaHostUnregister(address)
