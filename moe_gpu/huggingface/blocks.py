"""The MoE blocks of a model, found and checked.

A block is a module with a router (attribute ``gate`` or ``router``) of a known family and packed
``experts``.
"""

import inspect
from typing import NamedTuple

import torch
import transformers
from torch import nn

from .families import FAMILIES, HOW_TO_ADD, REFUSED, RouterFamily


class MoEBlock(NamedTuple):
    """One MoE layer of a model."""

    name: str  # of the block within the model
    module: nn.Module
    router: nn.Module
    experts: nn.Module
    family: RouterFamily

    def logits(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        """Return the router's logits ``(T, E)``."""
        return self.family.logits(self.router, hidden_TD)

    def bias(self) -> torch.Tensor | None:
        """Return the router's correction bias ``(E,)``, None where it has none."""
        return self.family.bias(self.module)


def find_blocks(model: nn.Module) -> list[MoEBlock]:
    """Return the MoE blocks of a model in module order, which is layer order.

    Raises:
        ValueError: No block, a router of an unknown class or of a transformers too old, or experts
            that are not packed parameters with one weight up and one down.
    """
    known = ", ".join(FAMILIES)
    blocks = []
    for name, module in model.named_modules():
        experts = getattr(module, "experts", None)
        router = getattr(module, "gate", getattr(module, "router", None))
        if not (isinstance(experts, nn.Module) and isinstance(router, nn.Module)):
            continue
        found = type(router).__name__
        if found in REFUSED:
            raise ValueError(f"{name}: {found} cannot be attached: {REFUSED[found]}")
        if found not in FAMILIES:
            raise ValueError(
                f"{name}: router class {found} is not supported; known: {known}\n{HOW_TO_ADD}"
            )
        _check_version(name, found)
        _check_forward(name, module)
        _check_experts(name, experts)
        blocks.append(MoEBlock(name, module, router, experts, FAMILIES[found]))
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no MoE layer; known routers: {known}")
    return blocks


def score_arguments(block: MoEBlock) -> dict[str, object]:
    """Return the arguments of :class:`~moe_gpu.gate.MoEGate` that make it route as the block does.

    Raises:
        ValueError: A setting of the router that the gate does not know.
    """
    router, family = block.router, block.family
    try:
        rule = family.score(router)
    except ValueError as error:
        raise ValueError(f"{block.name}: {type(router).__name__} with {error}") from error
    return rule | {"weights_dtype": family.weights_dtype(block.module)}


def _check_version(name: str, found: str) -> None:
    major, minor = FAMILIES[found].since
    if tuple(map(int, transformers.__version__.split(".")[:2])) < (major, minor):
        raise ValueError(
            f"{name}: {found} is supported as of transformers {major}.{minor}, this is "
            f"{transformers.__version__}: upgrade it"
        )


def _check_forward(name: str, block: nn.Module) -> None:
    """Refuse a block that computes in another way: it may never call its router and experts."""
    own = block.__dict__.get("forward")
    if own is None or hasattr(block, "_hf_hook"):  # accelerate's wrapper calls the class's forward
        return
    function = inspect.unwrap(getattr(own, "__func__", own))
    if function is not inspect.unwrap(type(block).forward):
        raise ValueError(
            f"{name}: its forward was replaced by {getattr(function, '__module__', '?')}."
            f"{getattr(function, '__qualname__', function)}, which may compute without its router "
            "and experts: attach to a model without hub kernels (use_kernels=False)"
        )


def _check_experts(name: str, experts: nn.Module) -> None:
    names = {key for key, _ in experts.named_parameters()}
    weights = {"gate_up_proj", "down_proj"}
    if getattr(experts, "has_bias", False):
        weights |= {"gate_up_proj_bias", "down_proj_bias"}
    if any("base_layer" in key for key in names):
        raise ValueError(
            f"{name}: the experts hold an adapter: merge it (merge_and_unload) or remove it first"
        )
    if names != weights or not getattr(experts, "has_gate", True):
        raise ValueError(
            f"{name}: experts {type(experts).__name__} are not supported: they must hold "
            f"gate_up_proj and down_proj (and their biases), got {sorted(names)}"
        )
