"""Moves expert weights: decisions in plain Python, copies in :mod:`moe_gpu.offload.transfer`."""

from .eviction import LFU, LRU, Affinity, AffinityOverAge, AffinityOverRootAge, EvictionPolicy
from .layout import ExpertLayout
from .offloader import ExpertOffloader, ExpertTurn
from .store import ExpertStore
from .tiers import Tier

__all__ = [
    "LFU",
    "LRU",
    "Affinity",
    "AffinityOverAge",
    "AffinityOverRootAge",
    "EvictionPolicy",
    "ExpertLayout",
    "ExpertOffloader",
    "ExpertStore",
    "ExpertTurn",
    "Tier",
]
