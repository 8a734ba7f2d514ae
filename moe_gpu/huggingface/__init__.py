"""Puts the gate and the offloader into Hugging Face models, and takes them out again."""

from .attach import AttachedMoE, attach

__all__ = ["AttachedMoE", "attach"]
