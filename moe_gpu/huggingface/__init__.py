"""Puts the gate and the offloader into Hugging Face models, and takes them out again."""

from .attach import attach
from .attached import AttachedMoE
from .audit import Audit
from .load import load
from .plan import MemoryPlan, plan_memory

__all__ = ["AttachedMoE", "Audit", "MemoryPlan", "attach", "load", "plan_memory"]
