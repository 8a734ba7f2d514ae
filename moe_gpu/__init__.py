"""Mixture-of-experts routing that prefers experts already on the GPU, and an offloader for the rest.

The names below are the public interface. ``attach``, ``load``, ``plan_memory`` and ``tune`` need
transformers (``pip install 'transformers>=5.17'``) and are imported on first use.
"""

from typing import TYPE_CHECKING

from .adaptive import AdaptiveBonus, Control, HitRateTarget, QualityTarget
from .gate import MoEGate, Routing
from .metrics import Metrics
from .policies import CacheBonus, Exact, MassBudget, QualityBudget
from .requests import Direction, PagingRequest, Priority
from .state import RouterState

if TYPE_CHECKING:
    from .huggingface import AttachedMoE, Audit, MemoryPlan, attach, load, plan_memory
    from .tuning.result import TuneResult
    from .tuning.tune import tune

__version__ = "0.1.0"

__all__ = [
    "AdaptiveBonus",
    "AttachedMoE",
    "Audit",
    "CacheBonus",
    "Control",
    "Direction",
    "Exact",
    "HitRateTarget",
    "MassBudget",
    "MemoryPlan",
    "Metrics",
    "MoEGate",
    "PagingRequest",
    "Priority",
    "QualityBudget",
    "QualityTarget",
    "RouterState",
    "Routing",
    "TuneResult",
    "attach",
    "load",
    "plan_memory",
    "tune",
]


def __getattr__(name: str):
    if name in ("AttachedMoE", "Audit", "MemoryPlan", "attach", "load", "plan_memory"):
        from . import huggingface

        return getattr(huggingface, name)
    if name == "TuneResult":
        from .tuning.result import TuneResult

        return TuneResult
    if name == "tune":
        from .tuning.tune import tune

        return tune
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
