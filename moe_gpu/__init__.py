"""Mixture-of-experts routing that prefers experts already on the GPU, and an offloader for the rest.

The names below are the public interface. ``attach``, ``load`` and ``plan_memory`` need
transformers (``pip install 'transformers>=5.17'``) and are imported on first use.
"""

from typing import TYPE_CHECKING

from .gate import MoEGate, Routing
from .metrics import Metrics
from .policies import CacheBonus, Exact, MassBudget, QualityBudget
from .requests import Direction, PagingRequest, Priority
from .state import RouterState

if TYPE_CHECKING:
    from .huggingface import AttachedMoE, MemoryPlan, attach, load, plan_memory

__version__ = "0.1.0"

__all__ = [
    "AttachedMoE",
    "CacheBonus",
    "Direction",
    "Exact",
    "MassBudget",
    "MemoryPlan",
    "Metrics",
    "MoEGate",
    "PagingRequest",
    "Priority",
    "QualityBudget",
    "RouterState",
    "Routing",
    "attach",
    "load",
    "plan_memory",
]


def __getattr__(name: str):
    if name in ("AttachedMoE", "MemoryPlan", "attach", "load", "plan_memory"):
        from . import huggingface

        return getattr(huggingface, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
