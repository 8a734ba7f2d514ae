"""Moves expert weights: decisions in plain Python, copies in :mod:`moe_gpu.offload.transfer`."""

from .eviction import LRU, Affinity, EvictionPolicy
from .offloader import ExpertOffloader, ExpertTurn, OffloadMetrics
from .store import ExpertLayout, HostStore

__all__ = [
    "LRU",
    "Affinity",
    "EvictionPolicy",
    "ExpertLayout",
    "ExpertOffloader",
    "ExpertTurn",
    "HostStore",
    "OffloadMetrics",
]
