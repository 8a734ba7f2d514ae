"""Copies under way: from the decision to load an expert until compute may read it, or it failed.

An urgent copy that the caller can order at once is over when :meth:`Flights.load` returns. Any
other is a *flight* until it lands: its slot is leased meanwhile, and the gate does not see it.

Shape suffixes as in :mod:`moe_gpu.offload.cache`.
"""

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

from ..requests import Priority
from .cache import Cache
from .counts import Counts
from .gate_view import GateView
from .layout import checksum
from .pager import Copy, CopyState, Pager
from .plan import Load, NoRoom, Plan
from .read_ahead import ReadAhead
from .store import ExpertStore
from .tiers import Tier
from .transfer import Transfer


@dataclass(eq=False)
class Flight:
    """A copy that the pager's thread has, or one into a staging slot, and the slot it goes to."""

    copy: Copy
    key: int
    slot: int  # of the layer's table, or a staging slot
    is_prefetch: bool
    is_counted: bool = False


class Flights:
    """Orders copies into slots, and settles what becomes of them.

    Attributes:
        on_way: Flights to slots of a table, by ``(layer, expert)``.
        staging: Whose copy each staging slot holds, until its turn is over.
        is_filling: Copies are made outside any step, and count as such.

    Args:
        cache: Who is in which slot.
        view: What the gate sees of it.
        store: Home of the weights.
        transfer: Moves bytes.
        pager: Orders the moves.
        read_ahead: Announces what waits for one of them.
        counts: Counts them.
        staging_slots: Slots that experts pass through.
        runs: Whether a step of a layer is under way.
    """

    def __init__(
        self,
        cache: Cache,
        view: GateView,
        store: ExpertStore,
        transfer: Transfer,
        pager: Pager,
        read_ahead: ReadAhead,
        counts: Counts,
        staging_slots: int,
        runs: Callable[[int], bool],
    ):
        self._cache, self._view, self._store = cache, view, store
        self._transfer, self._pager, self._read_ahead = transfer, pager, read_ahead
        self._counts = counts
        self._runs = runs
        self.on_way: dict[tuple[int, int], Flight] = {}
        self.staging: list[Flight | None] = [None] * staging_slots
        self.is_filling = False
        self._spoiled: set[tuple[int, int]] = set()  # (layer, key): not the weights stored

    @property
    def are_none(self) -> bool:
        """Whether no copy is under way, nor any expert in a staging slot."""
        return not self.on_way and not any(self.staging)

    # -- beginning

    def load(self, layer: int, load: Load, leased: set[int]) -> None:
        """Order one urgent copy, and lease its slot.

        Raises:
            RuntimeError: It failed at once; names layer, expert, slot and cause.
        """
        if load.victim is not None:
            self.evict(layer, load.victim)
        flight = self.begin(layer, load.key, load.slot, Priority.URGENT)
        if flight.copy.state is CopyState.ISSUED:
            self._count_load(flight)
        if load.slot >= self._cache.num_slots:
            self._counts.bypassed += 1
        else:
            self._cache.tables[layer].lease(load.key)
            leased.add(load.key)

    def begin(self, layer: int, key: int, slot: int, priority: Priority) -> Flight:
        """Begin a copy into a free slot; on this thread where that is quick, else on the pager's.

        Raises:
            RuntimeError: It failed at once; names layer, expert, slot and cause.
        """
        table, is_prefetch = self._cache.tables[layer], priority is not Priority.URGENT
        expert = key - self._cache.key_of(layer, 0)
        copy = Copy(layer, expert, self._cache.place_of(layer, slot), priority)
        flight = Flight(copy, key, slot, is_prefetch)
        inline = not is_prefetch and self._transfer.runs_inline(copy)
        if self._pager.is_busy and self._store.tier(layer, expert) is Tier.DISK:
            self._read_ahead.ask(layer, expert)
        try:
            if inline:
                start_s = time.perf_counter()
                self._pager.run_now(copy)
                if self._transfer.orders_take_long:
                    self._count_stall(layer, start_s)
            else:
                self._pager.order(copy)
        except Exception as error:
            raise self._failed(flight, error) from error
        if slot >= self._cache.num_slots:
            self.staging[slot - self._cache.num_slots] = flight
            return flight
        table.load(key, slot)
        if inline:
            self._view.changed.add(layer)
        else:
            table.lease(key)
            self.on_way[layer, expert] = flight
        return flight

    def evict(self, layer: int, key: int) -> None:
        """Free the slot of a key of the layer's table."""
        owner, table = self._cache.layer_of(layer, key), self._cache.tables[layer]
        if key in table.probation:
            self._counts.prefetched.wasted_bytes += self._store.layout.expert_bytes
        table.evict(key)
        self._counts.layers[owner].evictions += 1
        self._view.changed.add(owner)

    def stream_ahead(self, layer: int) -> None:
        """Copy missing experts of a layer whose step comes next into free staging slots."""
        table = self._cache.tables[layer]
        under_way = {f.key for f in self.staging if f is not None and f.copy.layer == layer}
        for i, flight in enumerate(self.staging):
            if flight is not None:
                continue
            for key in self._cache.keys_of(layer):
                if not table.is_resident(key) and key not in under_way:
                    under_way.add(key)
                    self.begin(layer, key, self._cache.num_slots + i, Priority.PREFETCH)
                    break

    # -- at a step

    def staged(self, layer: int, wanted: Collection[int]) -> dict[int, int]:
        """Return the wanted keys in staging slots with those slots, in the order of their copies."""
        flights = [f for f in self.staging if self.is_staged(f, layer, wanted)]
        flights.sort(key=lambda flight: (flight.copy.number, flight.slot))
        return {flight.key: flight.slot for flight in flights}

    def free_staging(self) -> list[int]:
        """Return the staging slots that nobody holds."""
        first = self._cache.num_slots
        return [first + i for i, flight in enumerate(self.staging) if flight is None]

    def is_staged(self, flight: Flight | None, layer: int, wanted: Collection[int]) -> bool:
        """Whether a staging slot has one of these experts; who has a slot by now needs none."""
        return (
            flight is not None
            and flight.copy.layer == layer
            and flight.key in wanted
            and not self._cache.tables[layer].is_resident(flight.key)
        )

    def use(self, layer: int, key: int) -> None:
        """A step needs a resident expert: if it was prefetched, that was useful."""
        table = self._cache.tables[layer]
        if key in table.probation:
            table.probation.discard(key)
            self._counts.prefetched.useful += 1
            flight = self.on_way.get((layer, key - self._cache.key_of(layer, 0)))
            if flight is not None:
                self._counts.prefetched.late += 1
                self._pager.promote(flight.copy)

    def has_arrived(self, layer: int, key: int, slot: int) -> bool:
        """Whether compute on an expert would wait for nothing."""
        if slot >= self._cache.num_slots:
            flight = self.staging[slot - self._cache.num_slots]
            if flight is None or (flight.copy.layer, flight.key) != (layer, key):
                return False  # its load follows a turn that is not over
        else:
            if self._cache.tables[layer].slot_of_X[key] != slot:
                return False
            flight = self.on_way.get((layer, key - self._cache.key_of(layer, 0)))
        if flight is not None and flight.copy.state is not CopyState.ISSUED:
            return False
        return self._transfer.is_complete(self._cache.place_of(layer, slot))

    def arrive(self, layer: int, key: int, slot: int, verify: bool, is_own: bool) -> None:
        """Make compute queued from now on find the expert's weights in its slot.

        A copy that somebody else ordered earlier, and that failed, is made once more: its cause
        may be gone.

        Args:
            layer: Layer of the step.
            key: Its expert.
            slot: Where the expert is, or is on its way to.
            verify: Compare checksums.
            is_own: The copy was ordered by this step.

        Raises:
            RuntimeError: Its copy failed, or did not complete in time, or ``verify`` found other
                weights than those stored; names layer, expert, slot and cause.
        """
        if slot >= self._cache.num_slots:
            flight = self.staging[slot - self._cache.num_slots]
        else:
            flight = self.on_way.get((layer, key - self._cache.key_of(layer, 0)))
        if flight is not None:
            try:
                self._wait(layer, flight)
            except RuntimeError:
                if is_own or not flight.copy.is_over():
                    raise
                self._order_again(flight)
                self._wait(layer, flight)
            self._land(flight)
        place = self._cache.place_of(layer, slot)
        self._transfer.wait_ready(place, layer, is_stall=not self.is_filling)
        if verify:
            self._compare(layer, key, slot)

    def leave(self, slot: int) -> None:
        """The turn of an expert in a staging slot is over."""
        self.staging[slot - self._cache.num_slots] = None

    def _order_again(self, flight: Flight) -> None:
        """Replace a copy that failed by an urgent one into the same slot."""
        self._count_failed(flight)
        flight.is_prefetch = False
        copy = flight.copy
        again = Copy(copy.layer, copy.expert, copy.place, Priority.URGENT)
        try:
            self._pager.order(again)
        except RuntimeError as error:
            raise self._failed(flight, error) from error
        flight.copy = again

    def _wait(self, layer: int, flight: Flight) -> None:
        """Wait for a copy as what it is now, urgent; at no cost where it has arrived."""
        if flight.copy.state is CopyState.ISSUED:
            return
        start_s = time.perf_counter()
        self._pager.promote(flight.copy)
        try:
            self._pager.wait(flight.copy)
        except RuntimeError as error:
            raise self._failed(flight, error) from error
        finally:
            self._count_stall(layer, start_s)

    def _compare(self, layer: int, key: int, slot: int) -> None:
        expert = key - self._cache.key_of(layer, 0)
        found = int(checksum(self._transfer.bytes_of(self._cache.place_of(layer, slot))))
        self._counts.verified += 1
        if found != self._store.checksum(layer, expert):
            if slot < self._cache.num_slots:
                self._spoiled.add((layer, key))
            else:
                self.leave(slot)
            raise RuntimeError(
                f"layer {layer}: the weights in slot {slot} are not those stored for expert "
                f"{expert}: checksum {found:#x}, stored {self._store.checksum(layer, expert):#x}"
            )

    def _failed(self, flight: Flight, error: BaseException) -> RuntimeError:
        copy = flight.copy
        return RuntimeError(
            f"layer {copy.layer}: loading expert {copy.expert} into slot {flight.slot} of "
            f"{self._cache.num_slots + len(self.staging)} failed: {error}"
        )

    # -- settling

    def settle(self) -> None:
        """Take note of copies that are over and that nobody waits for."""
        for flight in list(self.on_way.values()):
            if not flight.copy.is_over():
                continue
            if flight.copy.state is not CopyState.ISSUED:
                # unless a step is about to compute from the slot: it shall find the error
                if self._cache.tables[flight.copy.layer].leases_S[flight.slot] == 1:
                    self._crash(flight)
            elif self._transfer.is_complete(flight.copy.place):
                self._land(flight)
        for i, flight in enumerate(self.staging):
            if flight is not None and flight.copy.is_over():
                copy = flight.copy
                # urgent: of a step that was left before its turn
                is_left = copy.priority is Priority.URGENT and not self._runs(copy.layer)
                if is_left or copy.state is not CopyState.ISSUED:
                    self._empty(i)

    def drop_stale(self, layer: int, needed: list[int]) -> None:
        """Take back what was fetched ahead for this step and is not needed by it."""
        wanted = set(needed)
        for flight in list(self.on_way.values()):
            stale = flight.is_prefetch and flight.copy.layer == layer and flight.key not in wanted
            if stale and self._pager.cancel(flight.copy):
                self._crash(flight)
        for i, flight in enumerate(self.staging):
            if flight is None or (flight.copy.layer != layer and self._runs(flight.copy.layer)):
                continue  # a step that this one is taken in the middle of computes from it
            if self.is_staged(flight, layer, wanted):
                if flight.is_prefetch:
                    self._counts.prefetched.useful += 1
                    if not flight.copy.is_over():
                        self._counts.prefetched.late += 1
                        self._pager.promote(flight.copy)  # or later loads would overtake it
            elif self._pager.cancel(flight.copy) or flight.copy.is_over():
                self._empty(i)

    def give_up(self, layer: int) -> None:
        """After a step, in whatever way it ended: no urgent copy of it stays queued."""
        for flight in [*self.on_way.values(), *filter(None, self.staging)]:
            if flight.copy.layer == layer and flight.copy.priority is Priority.URGENT:
                self._pager.cancel(flight.copy)
        self.settle()
        for owner, key in list(self._spoiled):
            if self._cache.tables[owner].can_evict(key):
                self.evict(owner, key)
                self._spoiled.discard((owner, key))

    def with_room(self, layer: int, plan: Callable[[], Plan]) -> Plan:
        """Return the plan, once copies that nobody needs any more have left it enough slots."""
        while True:
            try:
                return plan()
            except NoRoom:
                if not self._wait_for_room(layer):
                    raise

    def _wait_for_room(self, layer: int) -> bool:
        """Wait for one of the copies that hold slots which the layer could use; False if none."""
        table = self._cache.tables[layer]
        failed = (CopyState.FAILED, CopyState.CANCELLED)  # what they hold, a step is reading
        flights = [
            flight
            for flight in self.on_way.values()
            if self._cache.tables[flight.copy.layer] is table and flight.copy.state not in failed
        ]
        flights += [f for f in self.staging if f is not None and not f.copy.is_over()]
        if not flights:
            return False
        flight = min(flights, key=lambda flight: flight.copy.number)
        try:
            self._wait(layer, flight)
        except RuntimeError:
            if not flight.copy.is_over():
                raise
        if flight in self.staging:
            if flight.copy.layer == layer or not self._runs(flight.copy.layer):
                self._empty(self.staging.index(flight))
        elif flight.copy.state is CopyState.ISSUED:
            self._land(flight)
        else:
            self.settle()
        return True

    def names(self) -> str:
        """Name the copies that a device which does not answer may be waiting for."""
        flights = [*self.on_way.values(), *filter(None, self.staging)]
        names = [f"layer {f.copy.layer} expert {f.copy.expert}" for f in flights]
        return f"; copies under way: {', '.join(names)}" if names else ""

    def _land(self, flight: Flight) -> None:
        """A copy has arrived, or is ordered before the compute that follows."""
        copy = flight.copy
        self._count_load(flight)
        if flight.is_prefetch:
            self._counts.prefetched.issued += 1
            flight.is_prefetch = False
        if self.on_way.get((copy.layer, copy.expert)) is flight:  # else it is a staging slot's
            del self.on_way[copy.layer, copy.expert]
            self._cache.tables[copy.layer].release(flight.key)
            self._view.changed.add(copy.layer)

    def _crash(self, flight: Flight) -> None:
        """A copy failed or was cancelled: its slot is free again."""
        self._count_failed(flight)
        copy = flight.copy
        table = self._cache.tables[copy.layer]
        del self.on_way[copy.layer, copy.expert]
        table.release(flight.key)
        if table.can_evict(flight.key):
            table.evict(flight.key)
        self._view.changed.add(copy.layer)

    def _empty(self, i: int) -> None:
        """A copy into a staging slot is over, and nobody will compute from it."""
        flight, self.staging[i] = self.staging[i], None
        if flight.copy.state is not CopyState.ISSUED:
            self._count_failed(flight)
            return
        if flight.is_prefetch:
            self._counts.prefetched.wasted_bytes += self._store.layout.expert_bytes
        self._land(flight)

    def _count_failed(self, flight: Flight) -> None:
        if flight.is_prefetch:
            if flight.copy.state is CopyState.CANCELLED:
                self._counts.prefetched.cancelled += 1
            else:
                self._counts.prefetched.failed += 1

    def _count_stall(self, layer: int, start_s: float) -> None:
        if not self.is_filling:  # no compute waits for that
            self._counts.layers[layer].stall_s += time.perf_counter() - start_s

    def _count_load(self, flight: Flight) -> None:
        if flight.is_counted:
            return
        flight.is_counted = True
        if self.is_filling:
            self._counts.filled += 1
        else:
            copy = flight.copy
            self._counts.load(copy.layer, self._store.tier(copy.layer, copy.expert))
