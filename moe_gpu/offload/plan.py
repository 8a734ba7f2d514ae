"""What one step does with slots, decided before anything moves.

Hits compute first, then the missing experts in the order in which their copies are ordered. A
missing expert gets, in this order of preference:

1. a free slot, or the slot of a resident that the step does not need;
2. a staging slot, which it leaves when its *turn* (its compute) is over: it displaces nobody;
3. where there is no staging slot, the slot of an expert of this very step, once that one's turn
   is over.

With ``bypass``, newcomers compete for 1 in the ranking of the eviction policy. A *prefill* needs
nearly every expert, so nobody is idle: what it leaves behind is decided by a ranking of everybody,
and residents that lose give their slot up when their turn is over.

So every missing expert is fetched exactly once, and nobody is evicted before the step has used
it. Plain Python: the same table, needs and ranking always give the same plan.
"""

from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

from .slots import SlotTable

Rank = Callable[[list[int]], list[int]]


class NoRoom(RuntimeError):
    """Experts are missing, and every slot is leased to somebody else."""


class Load(NamedTuple):
    """One expert to fetch."""

    key: int
    slot: int  # of the table, or a staging slot, numbered from the table's size on
    victim: int | None  # the key that gives up the slot; None if it is free or a staging slot


class Turn(NamedTuple):
    """One expert to compute."""

    key: int
    slot: int


class Plan(NamedTuple):
    """A step: what to load at once, whom to compute in which order, what to load in between."""

    turns: list[Turn]  # hits first, then loads in the order of their copies
    loads: list[Load]  # to be ordered before the first turn
    follow: dict[int, Load]  # load this when the turn of the key is over
    waves: int  # passes over the slots, 0 if nobody is needed


def plan_step(
    table: SlotTable,
    needed: Sequence[int],
    rank: Rank,
    *,
    staged: Mapping[int, int] = {},  # noqa: B006 - never written
    staging: Collection[int] = (),
    bypass: bool = False,
    everybody: Rank | None = None,
) -> Plan:
    """Plan the loads, victims and compute order of one step; changes nothing.

    Args:
        table: The slots.
        needed: Keys of the step, ascending.
        rank: Orders keys, the first to leave in front.
        staged: Needed keys that are in staging slots already, with those slots.
        staging: Free staging slots.
        bypass: Let missing experts compete with idle residents; needs a staging slot.
        everybody: For a prefill: ranks needed residents and newcomers alike, and the losers leave
            or pass through. Needs a staging slot.

    Raises:
        NoRoom: Experts are missing, and every slot is leased to somebody else.
        RuntimeError: The ranking does not hold what it was given.
    """
    wanted = set(needed)
    hits = [key for key in needed if table.is_resident(key)]
    missing = [key for key in needed if not table.is_resident(key) and key not in staged]
    turns = [Turn(key, table.slot_of_X[key]) for key in hits]
    turns += [Turn(key, slot) for key, slot in staged.items()]
    if not missing:
        return Plan(turns, [], {}, int(bool(turns)))

    places: list[tuple[int, int | None]] = [(slot, None) for slot in table.free_slots()]
    leaving: list[int] = []  # hits that a prefill gives up
    joining = missing
    can_stage = bool(staging or staged)
    if len(places) < len(missing):
        idle = table.evictable(wanted)
        losers: list[int] = []
        if can_stage and (bypass or everybody):
            order = everybody or rank
            held = [key for key in hits if table.can_evict(key)] if everybody else []
            ranked = order(idle + held + missing)
            losers = ranked[: len(missing) - len(places)]
            lost = set(losers)
            joining = [key for key in missing if key not in lost]
            leaving = [key for key in losers if key in wanted and table.is_resident(key)]
            idle = [key for key in losers if key not in wanted]
        else:
            idle = rank(idle)
        places += [(table.slot_of_X[key], key) for key in idle[: len(missing) - len(places)]]

    loads = [Load(key, slot, victim) for key, (slot, victim) in zip(joining, places, strict=False)]
    joiners, passers = joining[len(loads) :], sorted(set(missing) - set(joining))
    follow: dict[int, Load] = {}
    if leaving:
        # whoever leaves computes first: the successors' copies start early
        left = set(leaving)
        turns.sort(key=lambda turn: turn.key not in left)
        for key, victim in zip(joiners, leaving, strict=False):
            follow[victim] = Load(key, table.slot_of_X[victim], victim)
        joiners = joiners[len(leaving) :]
    rest = joiners + passers

    if can_stage:
        at_once = [Load(key, slot, None) for key, slot in zip(rest, staging, strict=False)]
        loads += at_once
        occupants = deque([*staged.items(), *((load.key, load.slot) for load in at_once)])
        for key in rest[len(at_once) :]:
            occupant, slot = occupants.popleft()
            follow[occupant] = Load(key, slot, None)
            occupants.append((key, slot))
    elif rest:
        _succeed(table, hits, loads, rest, rank, turns, follow)
    turns += [Turn(load.key, load.slot) for load in loads]
    return Plan(turns, loads, follow, _append_followers(turns, follow))


def _succeed(table, hits, loads, rest, rank, turns, follow):
    """Let the rest take slots of this very step, each once its holder's turn is over."""
    holders = {key: table.slot_of_X[key] for key in hits if table.can_evict(key)}
    holders |= {load.key: load.slot for load in loads}
    if not holders:
        raise NoRoom(f"experts {rest} are missing and all {len(table.key_in_S)} slots are leased")
    first = set(rank(list(holders))[: len(rest)])
    turns.sort(key=lambda turn: turn.key not in first)
    order = [turn.key for turn in turns] + [load.key for load in loads]
    while rest:
        leaving = set(rank(list(holders))[: len(rest)])
        # the slot that is free first goes to the load that computes first
        leavers = [key for key in order if key in leaving]
        batch, rest = rest[: len(leavers)], rest[len(leavers) :]
        for key, victim in zip(batch, leavers, strict=True):
            slot = holders.pop(victim)
            follow[victim] = Load(key, slot, victim)
            order.append(key)
            holders[key] = slot


def _append_followers(turns: list[Turn], follow: dict[int, Load]) -> int:
    """Add the turns of later loads in the order of their copies; return the passes."""
    wave = {turn.key: 1 for turn in turns}
    for turn in turns:  # grows meanwhile
        load = follow.get(turn.key)
        if load is not None:
            turns.append(Turn(load.key, load.slot))
            wave[load.key] = wave[turn.key] + 1
    return max(wave.values())


def checked(name: str, rank: Rank) -> Rank:
    """Return ``rank`` with a check that a replaceable policy ranks what it was given."""

    def ranked(keys: list[int]) -> list[int]:
        order = list(rank(keys))
        if sorted(order) != sorted(keys):
            raise RuntimeError(f"eviction policy {name} ranked {keys} as {order}")
        return order

    return ranked
