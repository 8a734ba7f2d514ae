"""Who is in which slot: bookkeeping of device slots, without tensors or streams.

A table covers the slots of one layer, or one pool of slots for all layers. What it calls a *key*
is an expert, see :mod:`moe_gpu.offload.history`.

Shape suffixes: X keys, S slots.
"""

import warnings
from collections.abc import Iterable

NONE = -1  # no expert in this slot, or no slot for this expert


class SlotTable:
    """Keys and slots, leases on slots, and who is on probation.

    A lease is held while a copy into the slot is under way, and while compute that reads it is
    planned or queued; a leased key is never evicted. Verbs that would break an invariant raise
    ``RuntimeError`` and change nothing.

    Attributes:
        slot_of_X: Slot of each key, ``NONE`` if it has none.
        key_in_S: Key in each slot, ``NONE`` if the slot is free.
        leases_S: Leases held on each slot.
        probation: Resident keys that were prefetched and not used yet.

    Args:
        num_keys: X, ``>= 1``.
        num_slots: S, ``1 <= S <= X``.
    """

    def __init__(self, num_keys: int, num_slots: int):
        self.slot_of_X = [NONE] * num_keys
        self.key_in_S = [NONE] * num_slots
        self.leases_S = [0] * num_slots
        self.probation: set[int] = set()

    def residents(self) -> list[int]:
        """Return the resident keys, ascending."""
        return sorted(key for key in self.key_in_S if key != NONE)

    def free_slots(self) -> list[int]:
        """Return the slots without a key, ascending."""
        return [slot for slot, key in enumerate(self.key_in_S) if key == NONE]

    def is_resident(self, key: int) -> bool:
        """Whether the key has a slot."""
        return self.slot_of_X[key] != NONE

    def can_load(self, key: int, slot: int) -> bool:
        """Whether the slot is free and the key has none."""
        return self.key_in_S[slot] == NONE and self.slot_of_X[key] == NONE

    def load(self, key: int, slot: int) -> None:
        """Put a missing key into a free slot."""
        if not self.can_load(key, slot):
            raise RuntimeError(
                f"cannot load key {key} into slot {slot}: the slot holds key "
                f"{self.key_in_S[slot]}, the key is in slot {self.slot_of_X[key]}"
            )
        self.slot_of_X[key], self.key_in_S[slot] = slot, key

    def can_evict(self, key: int) -> bool:
        """Whether the key is resident and nothing that is queued reads or writes its slot."""
        slot = self.slot_of_X[key]
        return slot != NONE and not self.leases_S[slot]

    def evictable(self, keep: Iterable[int] = ()) -> list[int]:
        """Return the keys that may be evicted, ascending, but none of ``keep``."""
        keep = set(keep)
        slots = zip(self.key_in_S, self.leases_S, strict=True)
        return sorted(
            key for key, leases in slots if key != NONE and not leases and key not in keep
        )

    def evict(self, key: int) -> int:
        """Free the key's slot and return it."""
        if not self.can_evict(key):
            raise RuntimeError(f"cannot evict key {key}: it is leased or not resident")
        slot = self.slot_of_X[key]
        self.slot_of_X[key], self.key_in_S[slot] = NONE, NONE
        self.probation.discard(key)
        return slot

    def lease(self, key: int) -> None:
        """Keep a resident key where it is until :meth:`release`."""
        slot = self.slot_of_X[key]
        if slot == NONE:
            raise RuntimeError(f"cannot lease key {key}: it is not resident")
        self.leases_S[slot] += 1

    def release(self, key: int) -> None:
        """Give one lease back."""
        slot = self.slot_of_X[key]
        if slot == NONE or not self.leases_S[slot]:
            raise RuntimeError(f"cannot release key {key}: it holds no lease")
        self.leases_S[slot] -= 1

    def check(self) -> None:
        """Raise ``AssertionError`` where the two directions or the leases disagree."""
        for key, slot in enumerate(self.slot_of_X):
            assert slot == NONE or self.key_in_S[slot] == key, f"key {key}"
        for slot, key in enumerate(self.key_in_S):
            assert key == NONE or self.slot_of_X[key] == slot, f"slot {slot}"
            assert self.leases_S[slot] >= 0, f"slot {slot}"
            assert key != NONE or not self.leases_S[slot], f"free slot {slot} is leased"
        assert all(self.is_resident(key) for key in self.probation), "probation without a slot"


def check_slots(slots: int, num_experts: int, name: str = "slots") -> None:
    """Refuse a number of slots per layer that is not an int in [1, E]."""
    if not isinstance(slots, int) or isinstance(slots, bool):
        raise TypeError(f"{name} must be an int, got {slots!r}")
    if not 1 <= slots <= num_experts:
        raise ValueError(
            f"{name} must lie in [1, {num_experts}], the experts per layer, got {slots}"
        )


def warn_few_slots(
    slots: int, top_k: int, *, layers: int, pool: bool, staging_slots: int, stacklevel: int = 3
) -> None:
    """Warn the caller's caller if one token alone needs more experts than there are slots.

    Args:
        slots: Per layer, or of the pool in all.
        top_k: Experts per token and layer.
        layers: Layers of the model.
        pool: Whether they share the slots.
        staging_slots: Slots that experts pass through.
        stacklevel: As of :func:`warnings.warn`.
    """
    needed = top_k * layers if pool else top_k
    if slots >= needed:
        return
    if pool:
        text = (
            f"a pool of {slots} slot{'s' * (slots > 1)} is smaller than the {needed} experts of "
            f"one token ({layers} layer{'s' * (layers > 1)} x top-{top_k}): every token loads some"
        )
    else:
        text = (
            f"slots={slots} per layer is fewer than the {needed} experts that one token needs "
            "there: every token loads in every layer"
        )
    passes = ", in several passes" if slots + staging_slots < top_k else ""
    warnings.warn(f"{text}{passes}, which is slow", RuntimeWarning, stacklevel=stacklevel)
