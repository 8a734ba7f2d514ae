"""Which model families are known, and where their MoE blocks are.

A block is a module with a router (attribute ``gate`` or ``router``) and packed ``experts``; the
family is told by the class name of the router.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F


@dataclass(frozen=True)
class RouterFamily:
    """How routers of one class turn hidden states into what the gate needs.

    Attributes:
        logits: ``(router, hidden_states (T, D)) -> (T, E)``, as the router itself computes them.
        renormalize: ``router -> bool``: mixing weights are a softmax over the executed experts.
    """

    logits: Callable[[nn.Module, torch.Tensor], torch.Tensor]
    renormalize: Callable[[nn.Module], bool]


def _linear_logits(router: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    return F.linear(hidden_states, router.weight)


FAMILIES = {
    "MixtralTopKRouter": RouterFamily(_linear_logits, renormalize=lambda router: True),
}


class MoEBlock(NamedTuple):
    """One MoE layer of a model."""

    name: str  # of the block within the model
    router: nn.Module
    experts: nn.Module
    family: RouterFamily


def find_blocks(model: nn.Module) -> list[MoEBlock]:
    """Return the MoE blocks of a model in module order, which is layer order.

    Raises:
        ValueError: No block, a router of an unknown class, or experts that are not the packed
            pair ``gate_up_proj`` and ``down_proj``.
    """
    known = ", ".join(FAMILIES)
    blocks = []
    for name, module in model.named_modules():
        experts = getattr(module, "experts", None)
        router = getattr(module, "gate", getattr(module, "router", None))
        if not (isinstance(experts, nn.Module) and isinstance(router, nn.Module)):
            continue
        family = FAMILIES.get(type(router).__name__)
        if family is None:
            raise ValueError(
                f"{name}: router class {type(router).__name__} is not supported; known: {known}"
            )
        _check_experts(name, experts)
        blocks.append(MoEBlock(name, router, experts, family))
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no MoE layer; known routers: {known}")
    return blocks


def _check_experts(name: str, experts: nn.Module) -> None:
    names = {key for key, _ in experts.named_parameters()}
    if names != {"gate_up_proj", "down_proj"} or getattr(experts, "is_transposed", False):
        raise ValueError(
            f"{name}: experts {type(experts).__name__} are not supported: they must hold "
            f"gate_up_proj and down_proj, output features first, got {sorted(names)}"
        )
