"""Paging requests: what the gate asks of whoever moves expert weights."""

from dataclasses import dataclass
from enum import Enum


class Direction(Enum):
    """Which way an expert's weights should move."""

    IN = "in"
    OUT = "out"


class Priority(Enum):
    """How soon a paging request matters. Members compare by identity only, not by order."""

    URGENT = "urgent"  # this step computes with the expert
    BACKGROUND = "background"  # the router wanted it, a resident expert stood in
    PREFETCH = "prefetch"  # predicted
    NORMAL = "normal"  # eviction


@dataclass(frozen=True, slots=True)
class PagingRequest:
    """One expert to move.

    Attributes:
        layer: MoE layer, counted from 0 among the model's MoE layers.
        expert: Expert id within the layer.
        direction: ``IN`` (to the device) or ``OUT``.
        priority: See :class:`Priority`.
        tokens: Tokens of the call that wait for the expert.
    """

    layer: int
    expert: int
    direction: Direction
    priority: Priority
    tokens: int
