"""What one step does with the slots of a layer, decided before anything moves.

Hits are computed first, then the missing experts in ascending id. The first *wave* of loads goes
to free slots and to residents that the step does not need. If that is not enough, a later wave
takes slots of experts of this very step, each as soon as its *turn* (its compute) is over. So
every missing expert is fetched exactly once, and nobody is evicted before the step has used it.

Plain Python: the same table, needs and ranking always give the same plan.
"""

from collections.abc import Sequence
from typing import NamedTuple

from .eviction import EvictionPolicy
from .slots import SlotTable


class Load(NamedTuple):
    """One expert to fetch."""

    expert: int
    slot: int
    victim: int | None  # the expert that gives up the slot; None if it is free


class Plan(NamedTuple):
    """A step: what to load at once, whom to compute in which order, what to load in between."""

    turns: list[tuple[int, int]]  # (expert, slot), hits first
    loads: list[Load]  # first wave, to be ordered before the first turn
    follow: dict[int, Load]  # later waves: load this when the turn of the key is over
    waves: int  # passes over the slots, 0 if nobody is needed


def plan_step(
    table: SlotTable,
    needed: Sequence[int],
    eviction: EvictionPolicy,
    affinity_E: Sequence[float],
) -> Plan:
    """Plan the loads, victims and compute order of one step; changes nothing.

    Args:
        table: Slots of the layer; the needed experts are already touched.
        needed: Experts of the step, ascending.
        eviction: Ranks victims.
        affinity_E: Affinity of each expert after the step's routing.

    Raises:
        RuntimeError: Experts are missing and every slot is leased to somebody else, or the policy
            did not rank what it was given.
    """
    slot_of_E = table.slot_of_E
    hits = [expert for expert in needed if table.is_resident(expert)]
    if len(hits) == len(needed):
        return Plan([(expert, slot_of_E[expert]) for expert in hits], [], {}, int(bool(hits)))

    def rank(experts):
        ranked = list(eviction.rank(experts, table.last_use_E, affinity_E))
        if sorted(ranked) != sorted(experts):
            name = type(eviction).__name__
            raise RuntimeError(f"eviction policy {name} ranked {experts} as {ranked}")
        return ranked

    missing = [expert for expert in needed if not table.is_resident(expert)]
    places = [(slot, None) for slot in table.free_slots()]
    if len(places) < len(missing):
        wanted = set(needed)
        idle = [e for e in table.residents() if e not in wanted and table.can_evict(e)]
        places += [(slot_of_E[expert], expert) for expert in rank(idle)]
    loads = [Load(e, slot, victim) for e, (slot, victim) in zip(missing, places, strict=False)]

    waves, follow = 1, {}
    rest = missing[len(loads) :]
    # experts of this step whose slot a later wave may take
    holder_slots = {expert: slot_of_E[expert] for expert in hits if table.can_evict(expert)}
    holder_slots |= {load.expert: load.slot for load in loads}
    if rest:
        if not holder_slots:
            raise RuntimeError(
                f"experts {rest} are missing and all {len(table.expert_in_S)} slots are leased"
            )
        # hits that give up their slot compute first: their successors' copies start early
        leaving = set(rank(list(holder_slots))[: len(rest)])
        hits.sort(key=lambda expert: expert not in leaving)
    turns = [(expert, slot_of_E[expert]) for expert in hits]
    turns += [(load.expert, load.slot) for load in loads]

    while rest:
        waves += 1
        leaving = set(rank(list(holder_slots))[: len(rest)])
        # the slot that is free first goes to the load that computes first
        leavers = [expert for expert, _ in turns if expert in leaving]
        batch, rest = rest[: len(leavers)], rest[len(leavers) :]
        for expert, victim in zip(batch, leavers, strict=True):
            slot = holder_slots.pop(victim)
            follow[victim] = Load(expert, slot, victim)
            turns.append((expert, slot))
            holder_slots[expert] = slot
    return Plan(turns, loads, follow, waves)
