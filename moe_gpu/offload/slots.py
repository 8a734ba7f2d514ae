"""Who is in which slot: bookkeeping of one layer's device slots, without tensors or streams.

Shape suffixes: E experts, S slots.
"""

import warnings
from collections.abc import Iterable

NONE = -1  # no expert in this slot, or no slot for this expert


class SlotTable:
    """Experts and slots of one layer, leases on slots, and when each expert was last needed.

    A lease is held while compute that reads the slot is planned or queued; a leased expert is
    never evicted. Verbs that would break an invariant raise ``RuntimeError`` and change nothing.

    Attributes:
        slot_of_E: Slot of each expert, ``NONE`` if it is not resident.
        expert_in_S: Expert in each slot, ``NONE`` if the slot is free.
        leases_S: Leases held on each slot.
        last_use_E: Number of the step that last needed each expert, 0 if none did.

    Args:
        num_experts: E, ``>= 1``.
        num_slots: S, ``1 <= S <= E``.
    """

    def __init__(self, num_experts: int, num_slots: int):
        self.slot_of_E = [NONE] * num_experts
        self.expert_in_S = [NONE] * num_slots
        self.leases_S = [0] * num_slots
        self.last_use_E = [0] * num_experts
        self._step = 0

    def residents(self) -> list[int]:
        """Return the resident experts, ascending."""
        return [expert for expert, slot in enumerate(self.slot_of_E) if slot != NONE]

    def free_slots(self) -> list[int]:
        """Return the slots without an expert, ascending."""
        return [slot for slot, expert in enumerate(self.expert_in_S) if expert == NONE]

    def is_resident(self, expert: int) -> bool:
        """Whether the expert has a slot."""
        return self.slot_of_E[expert] != NONE

    def touch(self, experts: Iterable[int]) -> None:
        """Note that a new step needs these experts, resident or not."""
        self._step += 1
        for expert in experts:
            self.last_use_E[expert] = self._step

    def can_load(self, expert: int, slot: int) -> bool:
        """Whether the slot is free and the expert has none."""
        return self.expert_in_S[slot] == NONE and self.slot_of_E[expert] == NONE

    def load(self, expert: int, slot: int) -> None:
        """Put a missing expert into a free slot."""
        if not self.can_load(expert, slot):
            raise RuntimeError(
                f"cannot load expert {expert} into slot {slot}: the slot holds expert "
                f"{self.expert_in_S[slot]}, the expert is in slot {self.slot_of_E[expert]}"
            )
        self.slot_of_E[expert], self.expert_in_S[slot] = slot, expert

    def can_evict(self, expert: int) -> bool:
        """Whether the expert is resident and nothing that is queued reads it."""
        slot = self.slot_of_E[expert]
        return slot != NONE and not self.leases_S[slot]

    def evict(self, expert: int) -> int:
        """Free the expert's slot and return it."""
        if not self.can_evict(expert):
            raise RuntimeError(f"cannot evict expert {expert}: it is leased or not resident")
        slot = self.slot_of_E[expert]
        self.slot_of_E[expert], self.expert_in_S[slot] = NONE, NONE
        return slot

    def lease(self, expert: int) -> None:
        """Keep a resident expert where it is until :meth:`release`."""
        slot = self.slot_of_E[expert]
        if slot == NONE:
            raise RuntimeError(f"cannot lease expert {expert}: it is not resident")
        self.leases_S[slot] += 1

    def release(self, expert: int) -> None:
        """Give one lease back."""
        slot = self.slot_of_E[expert]
        if slot == NONE or not self.leases_S[slot]:
            raise RuntimeError(f"cannot release expert {expert}: it holds no lease")
        self.leases_S[slot] -= 1

    def check(self) -> None:
        """Raise ``AssertionError`` where the two directions or the leases disagree."""
        for expert, slot in enumerate(self.slot_of_E):
            assert slot == NONE or self.expert_in_S[slot] == expert, f"expert {expert}"
        for slot, expert in enumerate(self.expert_in_S):
            assert expert == NONE or self.slot_of_E[expert] == slot, f"slot {slot}"
            assert self.leases_S[slot] >= 0, f"slot {slot}"
            assert expert != NONE or not self.leases_S[slot], f"free slot {slot} is leased"


def check_slots(slots: int, num_experts: int, name: str = "slots") -> None:
    """Refuse a number of slots per layer that is not an int in [1, E]."""
    if not isinstance(slots, int) or isinstance(slots, bool):
        raise TypeError(f"{name} must be an int, got {slots!r}")
    if not 1 <= slots <= num_experts:
        raise ValueError(
            f"{name} must lie in [1, {num_experts}], the experts per layer, got {slots}"
        )


def warn_few_slots(slots: int, top_k: int) -> None:
    """Warn the caller's caller that one token alone needs several waves in every layer."""
    warnings.warn(
        f"{slots} slots per layer are fewer than the {top_k} experts of one token: every token "
        "loads experts in every layer, in several waves",
        RuntimeWarning,
        stacklevel=3,
    )
