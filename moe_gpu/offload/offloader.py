"""The offloader: turns the step record of a layer into loads, turns and residency.

    record -> plan -> first copies -> (expert, slot) by (expert, slot) -> residency for the gate

One read of the record per layer and step is the only host synchronisation.

Shape suffixes: L layers, E experts, S slots of a table, N routed pairs of a call.
"""

import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch

from ..kernels import layout as record_layout
from ..metrics import LayerMetrics, OffloadMetrics
from ..record import RecordReader, StepRecord
from ..requests import PagingRequest, Priority
from ..state import RouterState
from .eviction import DEFAULT, Affinity, EvictionPolicy, eviction_policy
from .history import History
from .layout import checksum
from .pager import Copy, CopyState, Pager
from .plan import Load, NoRoom, Plan, Rank, Turn, checked, plan_step
from .prefetch import PrefetchAccount, check_predictors, hottest_missing, place_for
from .slots import NONE, SlotTable, check_slots, warn_few_slots
from .store import ExpertStore
from .tiers import Tier
from .transfer import make_transfer

STAGING_SLOTS = 2  # one computes while the next one's copy runs
STREAM_PAIRS = 16  # routed pairs per expert from which a prefill surely needs them all; untuned

Prefill = Literal["last", "warm", "keep"]


class ExpertTurn(NamedTuple):
    """Compute this expert now, from this slot, for these pairs."""

    expert: int
    slot: int  # index into ExpertOffloader.weights_of(layer)
    start: int  # its pairs are [start, stop) of the call's pairs, stably sorted by expert
    stop: int


@dataclass(eq=False)
class Flight:
    """A copy that the pager's thread has, and the slot it goes to."""

    copy: Copy
    key: int
    slot: int  # of the layer's table, or a staging slot
    is_prefetch: bool
    is_counted: bool = False


@dataclass
class LayerCounts:
    """What :class:`~moe_gpu.metrics.LayerMetrics` counts on the host."""

    pairs: int = 0
    hits: int = 0
    unique_misses: int = 0
    loads: int = 0
    evictions: int = 0
    stall_s: float = 0.0


class ExpertOffloader:
    """Keeps experts in slots on the device and fetches the ones that a step misses.

    Owns the slots, and ``state.slot_of_LE``, which it changes in stream order only. A step uses
    the current stream of the state's device; one stream at a time. Threads take :attr:`lock`
    around a step.

    Attributes:
        state: The router state that the gates write.
        store: Home of the weights.
        num_slots: Slots per layer, or of the pool.
        is_pool: Whether all layers share the slots.
        tables: Bookkeeping of each layer's slots; of a pool, the same table for every layer.
        histories: Likewise, the use that victims are chosen by.
        eviction: The victim policy.
        views_L: Per layer, typed views ``(S, *shape)`` of its slots by parameter name.
        lock: Held by whoever runs a step; the same thread may take it again.

    Args:
        state: See above; its device is where the slots live.
        store: See above; a layer must be in it before its first step or :meth:`warm`.
        slots: Slots per layer, in [1, E]; of a pool, in all, in [1, L * E].
        pool: Share the slots among all layers.
        staging_slots: Slots that experts pass through without displacing anybody, shared by all
            layers. Default: 2, none where every expert has a slot.
        eviction: Name of a policy (:data:`moe_gpu.offload.eviction.POLICIES`) or an object with
            :meth:`~moe_gpu.offload.eviction.EvictionPolicy.rank`.
        bypass: A missing expert that ranks below every idle resident passes through a staging
            slot and displaces nobody.
        top_k: Experts per token; fewer slots than that draw a warning.
        prefetch: Predictors that are on, see :mod:`moe_gpu.offload.prefetch`.
        prefill: What a step with ``is_prefill`` leaves in the slots: ``"last"``, the experts of
            its last tokens as far as their affinity earns it; ``"warm"``, the ones that most of
            its tokens used; ``"keep"``, whoever was there.
        stream_prefill: Copy the next layer's experts while a prefill computes the present one.
        verify: Compare the checksum of every expert with the stored one each time it is used.
            Synchronises at each turn.
        timers: On CUDA, measure how long compute waits for copies (the CPU always does).
        timeout_s: Bound of every wait, in seconds.
        link_gbps: On the CPU, simulate a link of so many 10^9 bytes per second.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: An argument outside its bounds, or a state and a store that do not match.
        MemoryError: The slots do not fit on the device.

    Example:
        >>> offloader = ExpertOffloader(state, store, slots=4)
        >>> offloader.fill()
        >>> weights_S = offloader.weights_of(layer)
        >>> for turn in offloader.step(layer, pairs):  # after the layer's route call
        ...     out[turn.start : turn.stop] = compute(x[turn.start : turn.stop], weights_S[turn.slot])
    """

    def __init__(
        self,
        state: RouterState,
        store: ExpertStore,
        slots: int,
        *,
        pool: bool = False,
        staging_slots: int | None = None,
        eviction: str | EvictionPolicy = DEFAULT,
        bypass: bool = True,
        top_k: int | None = None,
        prefetch: Iterable[str] = (),
        prefill: Prefill = "last",
        stream_prefill: bool = True,
        verify: bool = False,
        timers: bool = False,
        timeout_s: float = 60.0,
        link_gbps: float | None = None,
    ):
        L, E = state.num_layers, state.num_experts
        if (store.num_layers, store.num_experts) != (L, E):
            raise ValueError(
                f"store holds {store.num_layers} layers of {store.num_experts} experts, "
                f"the state has {L} of {E}"
            )
        layers_of_table = L if pool else 1
        check_slots(slots, layers_of_table * E)
        if staging_slots is None:
            staging_slots = 0 if slots == layers_of_table * E else STAGING_SLOTS
        if not isinstance(staging_slots, int) or staging_slots < 0:
            raise ValueError(f"staging_slots must be an int >= 0, got {staging_slots!r}")
        if prefill not in ("last", "warm", "keep"):
            raise ValueError(f"prefill must be 'last', 'warm' or 'keep', got {prefill!r}")
        check_timeout(timeout_s)
        self.eviction = eviction_policy(eviction)
        self.predictors = check_predictors(prefetch)
        if top_k is not None and slots < top_k * layers_of_table:
            warn_few_slots(slots / layers_of_table, top_k)

        self.state, self.store = state, store
        self.num_slots, self.is_pool, self.bypass = slots, pool, bypass
        self.prefill, self.stream_prefill, self.verify = prefill, stream_prefill, verify
        tables = [SlotTable(layers_of_table * E, slots) for _ in range(L // layers_of_table)]
        histories = [History(layers_of_table, E) for _ in tables]
        self.tables: list[SlotTable] = tables * layers_of_table
        self.histories: list[History] = histories * layers_of_table
        self._ranks = [self._rank_of(history) for history in histories] * layers_of_table

        groups = [slots] * len(tables) + [staging_slots] * (staging_slots > 0)
        self._transfer = make_transfer(
            store, state.slot_of_LE, groups, timers=timers, timeout_s=timeout_s, link_gbps=link_gbps
        )
        self._first_staging = slots * len(tables)  # as a place
        self.views_L = [self._transfer.views_G[0 if pool else layer] for layer in range(L)]
        self._pager = Pager(
            self._transfer.begin,
            self._transfer.piece,
            self._transfer.finish,
            store.layout.expert_bytes,
            timeout_s,
        )
        # neither slots nor store may be freed under a copy; also when the interpreter exits
        self._shut_down = weakref.finalize(self, _shut_down, self._pager, self._transfer)
        self._reader = RecordReader(state, timeout_s)
        self._flights: dict[tuple[int, int], Flight] = {}  # (layer, expert): on its way to a slot
        self._staging: list[Flight | None] = [None] * staging_slots
        self._record_L: list[StepRecord | None] = [None] * L
        self._running_L: list[weakref.ref | None] = [None] * L
        self._published_LE = [[NONE] * E for _ in range(L)]
        self._changed: set[int] = set()
        self._spoiled: set[tuple[int, int]] = set()  # (layer, key): not the weights stored
        self._filling = False
        self._prediction: tuple[int, torch.Tensor] | None = None
        self._landing: torch.Tensor | None = None  # of predictions, page-locked
        self._clear_counts()
        self.lock = threading.RLock()
        _offloaders.add(self)

    def _rank_of(self, history: History) -> Rank:
        def rank(keys: list[int]) -> list[int]:
            return self.eviction.rank(keys, history)

        return checked(type(self.eviction).__name__, rank)

    # -- names of experts and places

    def key_of(self, layer: int, expert: int) -> int:
        """Return the key of an expert in its layer's table."""
        return layer * self.state.num_experts + expert if self.is_pool else expert

    def row_of(self, layer: int) -> int:
        """Return which layer of its history a layer is."""
        return layer if self.is_pool else 0

    def layer_of(self, layer: int, key: int) -> int:
        """Return the layer of a key in the table of ``layer``."""
        return key // self.state.num_experts if self.is_pool else layer

    def _place(self, layer: int, slot: int) -> int:
        if slot >= self.num_slots:
            return self._first_staging + slot - self.num_slots
        return slot if self.is_pool else layer * self.num_slots + slot

    def weights_of(self, layer: int) -> list[dict[str, torch.Tensor]]:
        """Return the parameters in every slot that a turn of the layer can name, by name."""
        groups = [self.views_L[layer]]
        if self._staging:
            groups.append(self._transfer.views_G[-1])
        return [
            {name: view[slot] for name, view in views.items()}
            for views in groups
            for slot in range(len(next(iter(views.values()))))
        ]

    # -- a step

    def request(self, layer: int) -> None:
        """Order the read of a layer's record ahead of :meth:`step`; see ``RecordReader``."""
        self._reader.request(layer)

    def wants_prediction(self, layer: int) -> bool:
        """Whether :meth:`predict` for this layer would be used."""
        return "next_gate" in self.predictors and layer < self.state.num_layers

    def predict(self, layer: int, ids_TK: torch.Tensor) -> None:
        """Say whom a layer will probably route to, before the layer below it takes its step.

        Args:
            layer: The layer predicted for.
            ids_TK: Its experts for each token, an integer tensor on the device.
        """
        if ids_TK.is_cuda:
            if self._landing is None or self._landing.numel() < ids_TK.numel():
                self._landing = torch.empty(ids_TK.numel(), dtype=ids_TK.dtype, pin_memory=True)
            # lands before the record, whose read waits for the stream
            landing = self._landing[: ids_TK.numel()].copy_(ids_TK.reshape(-1), non_blocking=True)
            self._prediction = layer, landing
        else:
            self._prediction = layer, ids_TK

    def before_route(self, layer: int) -> None:
        """Let the gate see the experts of a layer whose prefetch has arrived."""
        if self._flights or self._changed:
            self._settle()
            self._publish(layer)

    def step(
        self, layer: int, pairs: int, *, is_prefill: bool = False
    ) -> Generator[ExpertTurn, None, None]:
        """Yield the experts of the layer's last route call, each when its weights are in order.

        Hits come first, then missing experts, but for one that has arrived and whose slot another
        copy waits for. When the consumer asks for the next turn, compute
        of the last one must be queued: its slot may be given away. A consumer that stops early
        (an exception, ``close()``) leaves everything consistent. A step that was abandoned
        without either is closed by the layer's next step.

        Args:
            layer: Layer to compute; its gate has routed since the layer's last step.
            pairs: Routed (token, expert) pairs of the call, N.
            is_prefill: The call is about a text, not about the next token: see ``prefill`` and
                ``stream_prefill``.

        Raises:
            RuntimeError: Closed, no new route call, a record that does not have N pairs, or a load
                that failed (names layer, expert, slot and cause). Nothing hangs on to a slot, and the
                next step works.
        """
        if not self.views_L:
            raise RuntimeError("the offloader is closed")
        running = self._running_L[layer] and self._running_L[layer]()
        if running is not None:
            running.close()
        turns = self._turns(layer, pairs, is_prefill)
        self._running_L[layer] = weakref.ref(turns)
        return turns

    def _turns(self, layer, pairs, is_prefill):
        spans, record = self._read_spans(layer, pairs)
        table, history, transfer = self.tables[layer], self.histories[layer], self._transfer
        first = self.key_of(layer, 0)
        needed = [first + expert for expert in spans]
        row = self.row_of(layer)
        history.touch(row, needed)
        history.learn(row, record.affinity_E.tolist())
        self._count(layer, spans, record)
        self._settle()
        self._drop_stale(layer, needed)
        plan = self._with_room(layer, lambda: self._plan(layer, needed, record, is_prefill))
        self._waves += plan.waves

        leased = set()
        streams = is_prefill and self._can_stream(layer, pairs)
        try:
            for key, slot in plan.turns:
                if slot < self.num_slots and table.is_resident(key):
                    table.lease(key)
                    leased.add(key)
                    self._use(layer, key)
            for load in plan.loads:
                self._load(layer, load, leased)
            if streams:
                self._stream_ahead(layer)
            elif self.predictors and not is_prefill:
                self._order_prefetches(layer, record)
            # the plan's order, unless a slot is waited for
            turns = self._in_order(layer, plan, streams) if plan.follow or streams else plan.turns
            for key, slot in turns:
                self._arrive(layer, key, slot)
                yield ExpertTurn(key - first, slot, *spans[key - first])
                if slot >= self.num_slots:
                    self._staging[slot - self.num_slots] = None
                else:
                    table.release(key)
                    leased.discard(key)
                if key in plan.follow:
                    transfer.release(layer)
                    self._load(layer, plan.follow[key], leased)
                elif streams and slot >= self.num_slots:
                    transfer.release(layer)
                    self._stream_ahead(layer)
        finally:
            for key in leased:
                table.release(key)
            self._give_up(layer)
            # else nothing is ever loaded over them
            if self._staging or self.num_slots < len(table.slot_of_X):
                transfer.release(layer)
            for changed in sorted(self._changed):
                self._publish(changed)

    def _in_order(self, layer: int, plan: Plan, streams: bool) -> Iterator[Turn]:
        """Yield the turns: hits first, while copies run, but nobody who holds up a copy.

        An expert that has arrived and whose slot somebody waits for goes before the hits, or the
        link would rest while they compute.
        """
        loaded = {load.key for load in plan.loads} | {load.key for load in plan.follow.values()}
        hits: deque[Turn] = deque()
        others: deque[Turn] = deque()  # in the order of their copies
        for turn in plan.turns:
            is_hit = turn.slot < self.num_slots and turn.key not in loaded
            (hits if is_hit else others).append(turn)
        while hits or others:
            if hits and others:
                key, slot = others[0]
                is_wanted = key in plan.follow or (streams and slot >= self.num_slots)
                if is_wanted and self._has_arrived(layer, key, slot):
                    yield others.popleft()
                    continue
            yield hits.popleft() if hits else others.popleft()

    def _has_arrived(self, layer: int, key: int, slot: int) -> bool:
        """Whether compute on an expert would wait for nothing."""
        if slot >= self.num_slots:
            flight = self._staging[slot - self.num_slots]
            if flight is None or (flight.copy.layer, flight.key) != (layer, key):
                return False  # its load follows a turn that is not over
        else:
            if self.tables[layer].slot_of_X[key] != slot:
                return False
            flight = self._flights.get((layer, key - self.key_of(layer, 0)))
        if flight is not None and flight.copy.state is not CopyState.ISSUED:
            return False
        return self._transfer.is_complete(self._place(layer, slot))

    def _read_spans(self, layer, pairs):
        """Read the record once; return ``{expert: (start, stop)}``, ascending, and the record."""
        last = self._record_L[layer]
        try:
            record = self._reader.read(layer)
        except RuntimeError as error:
            raise RuntimeError(f"{error}{self._under_way()}") from error
        if record.generation == (0 if last is None else last.generation):
            raise RuntimeError(f"layer {layer} has not been routed since its last step")
        self._record_L[layer] = record
        spans, start = {}, 0
        executed = record.executed_E.nonzero()[0]
        for expert, tokens in zip(
            executed.tolist(), record.executed_E[executed].tolist(), strict=True
        ):
            spans[expert] = (start, start := start + tokens)
        if start != pairs:
            raise RuntimeError(
                f"layer {layer}: the last route call executed {start} pairs, this step has {pairs}"
            )
        return spans, record

    def _under_way(self) -> str:
        """Name the copies that a device which does not answer may be waiting for."""
        flights = [*self._flights.values(), *filter(None, self._staging)]
        names = [f"layer {f.copy.layer} expert {f.copy.expert}" for f in flights]
        return f"; copies under way: {', '.join(names)}" if names else ""

    def _count(self, layer, spans, record):
        counts, published_E = self._counts_L[layer], self._published_LE[layer]
        missed = counts.unique_misses
        for expert, (start, stop) in spans.items():
            counts.pairs += stop - start
            if published_E[expert] != NONE:
                counts.hits += stop - start
            else:
                counts.unique_misses += 1
        self._background += max(0, record.num_requests - (counts.unique_misses - missed))

    def _with_room(self, layer: int, plan: Callable[[], Plan]) -> Plan:
        """Return the plan, once copies that nobody needs any more have left it enough slots."""
        while True:
            try:
                return plan()
            except NoRoom:
                if not self._wait_for_room(layer):
                    raise

    def _wait_for_room(self, layer: int) -> bool:
        """Wait for one of the copies that hold slots which the layer could use; False if none."""
        table = self.tables[layer]
        failed = (CopyState.FAILED, CopyState.CANCELLED)  # what they hold, a step is reading
        flights = [
            flight
            for flight in self._flights.values()
            if self.tables[flight.copy.layer] is table and flight.copy.state not in failed
        ]
        flights += [f for f in self._staging if f is not None and not f.copy.is_over()]
        if not flights:
            return False
        flight = min(flights, key=lambda flight: flight.copy.number)
        self._pager.promote(flight.copy)
        start_s = time.perf_counter()
        try:
            self._pager.wait(flight.copy)
        except RuntimeError as error:
            if not flight.copy.is_over():
                raise self._failed(flight, error) from error
        finally:
            self._counts_L[layer].stall_s += time.perf_counter() - start_s
        if flight in self._staging:
            if flight.copy.layer == layer or not self._runs(flight.copy.layer):
                self._leave_staging(self._staging.index(flight))
        elif flight.copy.state is CopyState.ISSUED:
            self._land(flight)
        else:
            self._settle()
        return True

    def _plan(self, layer: int, needed: list[int], record: StepRecord, is_prefill: bool) -> Plan:
        arriving = [
            (flight.copy.number, flight.key, self.num_slots + i)
            for i, flight in enumerate(self._staging)
            if self._is_staged(flight, layer, needed)
        ]
        staged = {key: slot for _, key, slot in sorted(arriving)}
        return plan_step(
            self.tables[layer],
            needed,
            self._ranks[layer],
            staged=staged,
            staging=[self.num_slots + i for i, f in enumerate(self._staging) if f is None],
            bypass=self.bypass,
            everybody=self._rank_after_prefill(layer, record) if is_prefill else None,
        )

    def _rank_after_prefill(self, layer: int, record: StepRecord) -> Rank:
        """Return the order in which a prefill's experts, and those before it, leave."""
        history = self.histories[layer]
        if self.prefill == "last":
            # affinity was aged token by token: what the last tokens wanted stands highest
            return lambda keys: Affinity().rank(keys, history)
        if self.prefill == "warm":
            first = self.key_of(layer, 0)
            tokens = {first + e: int(n) for e, n in enumerate(record.executed_E)}
            return lambda keys: sorted(keys, key=lambda key: (tokens.get(key, 0), -key))
        table = self.tables[layer]
        return lambda keys: sorted(keys, key=lambda key: (table.is_resident(key), key))

    def _load(self, layer: int, load: Load, leased: set[int]) -> None:
        """Order one urgent copy, and lease its slot."""
        table = self.tables[layer]
        if load.victim is not None:
            self._evict(layer, load.victim)
        flight = self._fly(layer, load.key, load.slot, Priority.URGENT)
        if flight.copy.state is CopyState.ISSUED:
            self._count_load(flight)
        if load.slot >= self.num_slots:
            self._bypassed += 1
        else:
            table.lease(load.key)
            leased.add(load.key)

    def _fly(self, layer: int, key: int, slot: int, priority: Priority) -> Flight:
        """Begin a copy into a free slot; on this thread where that is quick, else on the pager's."""
        table, is_prefetch = self.tables[layer], priority is not Priority.URGENT
        expert = key - self.key_of(layer, 0)
        copy = Copy(layer, expert, self._place(layer, slot), priority)
        flight = Flight(copy, key, slot, is_prefetch)
        inline = not is_prefetch and self._transfer.runs_inline(copy)
        try:
            if inline:
                start_s = time.perf_counter()
                self._pager.run_now(copy)
                if self._transfer.orders_take_long:
                    self._counts_L[layer].stall_s += time.perf_counter() - start_s
            else:
                self._pager.order(copy)
        except Exception as error:
            raise self._failed(flight, error) from error
        if slot >= self.num_slots:
            self._staging[slot - self.num_slots] = flight
            return flight
        table.load(key, slot)
        if inline:
            self._changed.add(layer)
        else:
            table.lease(key)
            self._flights[layer, expert] = flight
        return flight

    def _failed(self, flight: Flight, error: BaseException) -> RuntimeError:
        copy = flight.copy
        return RuntimeError(
            f"layer {copy.layer}: loading expert {copy.expert} into slot {flight.slot} of "
            f"{self.num_slots + len(self._staging)} failed: {error}"
        )

    def _arrive(self, layer: int, key: int, slot: int) -> None:
        """Make compute queued from now on find the expert's weights in its slot."""
        if slot >= self.num_slots:
            flight = self._staging[slot - self.num_slots]
        else:
            flight = self._flights.get((layer, key - self.key_of(layer, 0)))
        if flight is not None and not flight.copy.is_over():
            start_s = time.perf_counter()
            self._pager.promote(flight.copy)
            try:
                self._pager.wait(flight.copy)
            except RuntimeError as error:
                raise self._failed(flight, error) from error
            finally:
                self._counts_L[layer].stall_s += time.perf_counter() - start_s
        if flight is not None:
            if flight.copy.state is not CopyState.ISSUED:
                error = flight.copy.error or RuntimeError(flight.copy.state.value)
                raise self._failed(flight, error) from error
            self._land(flight)
        self._transfer.wait_ready(self._place(layer, slot), layer)
        if self.verify:
            self._compare(layer, key, slot)

    def _land(self, flight: Flight) -> None:
        """A copy has arrived, or is ordered before the compute that follows."""
        copy = flight.copy
        self._count_load(flight)
        if flight.is_prefetch:
            self._prefetched.issued += 1
            flight.is_prefetch = False
        if self._flights.get((copy.layer, copy.expert)) is flight:  # else it is a staging slot's
            del self._flights[copy.layer, copy.expert]
            self.tables[copy.layer].release(flight.key)
            self._changed.add(copy.layer)

    def _compare(self, layer: int, key: int, slot: int) -> None:
        expert = key - self.key_of(layer, 0)
        found = int(checksum(self._transfer.bytes_of(self._place(layer, slot))))
        self._verified += 1
        if found != self.store.checksum(layer, expert):
            if slot < self.num_slots:
                self._spoiled.add((layer, key))
            else:
                self._staging[slot - self.num_slots] = None
            raise RuntimeError(
                f"layer {layer}: the weights in slot {slot} are not those stored for expert "
                f"{expert}: checksum {found:#x}, stored {self.store.checksum(layer, expert):#x}"
            )

    def _give_up(self, layer: int) -> None:
        """After a step, in whatever way it ended: no urgent copy of it stays queued."""
        for flight in [*self._flights.values(), *filter(None, self._staging)]:
            if flight.copy.layer == layer and flight.copy.priority is Priority.URGENT:
                self._pager.cancel(flight.copy)
        self._settle()
        for owner, key in list(self._spoiled):
            if self.tables[owner].can_evict(key):
                self._evict(owner, key)
                self._spoiled.discard((owner, key))

    def _settle(self) -> None:
        """Take note of copies that are over and that nobody waits for."""
        for flight in list(self._flights.values()):
            if not flight.copy.is_over():
                continue
            if flight.copy.state is not CopyState.ISSUED:
                # unless a step is about to compute from the slot: it shall find the error
                if self.tables[flight.copy.layer].leases_S[flight.slot] == 1:
                    self._crash(flight)
            elif self._transfer.is_complete(flight.copy.place):
                self._land(flight)
        for i, flight in enumerate(self._staging):
            if flight is not None and flight.copy.is_over():
                copy = flight.copy
                # urgent: of a step that was left before its turn
                is_left = copy.priority is Priority.URGENT and not self._runs(copy.layer)
                if is_left or copy.state is not CopyState.ISSUED:
                    self._leave_staging(i)

    def _runs(self, layer: int) -> bool:
        turns = self._running_L[layer] and self._running_L[layer]()
        return turns is not None and turns.gi_frame is not None

    def _crash(self, flight: Flight) -> None:
        """A copy failed or was cancelled: its slot is free again."""
        self._count_failed(flight)
        copy = flight.copy
        table = self.tables[copy.layer]
        del self._flights[copy.layer, copy.expert]
        table.release(flight.key)
        if table.can_evict(flight.key):
            table.evict(flight.key)
        self._changed.add(copy.layer)

    def _count_failed(self, flight: Flight) -> None:
        if flight.is_prefetch:
            if flight.copy.state is CopyState.CANCELLED:
                self._prefetched.cancelled += 1
            else:
                self._prefetched.failed += 1

    def _count_load(self, flight: Flight) -> None:
        if flight.is_counted:
            return
        flight.is_counted = True
        if self._filling:
            self._filled += 1
            return
        copy = flight.copy
        tier = self.store.tier(copy.layer, copy.expert).value
        self._counts_L[copy.layer].loads += 1
        self._loads_by_tier[tier] = self._loads_by_tier.get(tier, 0) + 1

    def _evict(self, layer: int, key: int) -> None:
        owner, table = self.layer_of(layer, key), self.tables[layer]
        if key in table.probation:
            self._prefetched.wasted_bytes += self.store.layout.expert_bytes
        table.evict(key)
        self._counts_L[owner].evictions += 1
        self._changed.add(owner)

    def _publish(self, layer: int) -> None:
        """Make the gate's view of a layer the table's, if anything changed."""
        if layer not in self._changed:
            return
        self._changed.discard(layer)
        first = self.key_of(layer, 0)
        slot_of_E = self.tables[layer].slot_of_X[first : first + self.state.num_experts]
        for flying_layer, expert in self._flights:
            if flying_layer == layer:
                slot_of_E[expert] = NONE
        if slot_of_E != self._published_LE[layer]:
            self._transfer.publish(layer, slot_of_E)
            self._published_LE[layer] = slot_of_E

    # -- prefetch

    def _use(self, layer: int, key: int) -> None:
        """A step needs a resident expert: if it was prefetched, that was useful."""
        table = self.tables[layer]
        if key in table.probation:
            table.probation.discard(key)
            self._prefetched.useful += 1
            flight = self._flights.get((layer, key - self.key_of(layer, 0)))
            if flight is not None:
                self._prefetched.late += 1
                self._pager.promote(flight.copy)

    def _order_prefetches(self, layer: int, record: StepRecord) -> None:
        ahead = layer + 1
        keep: list[int] = []
        if self._prediction is not None and self._prediction[0] == ahead:
            ids, self._prediction = self._prediction[1], None
            counts = np.bincount(ids.reshape(-1).numpy(), minlength=self.state.num_experts)
            order = np.argsort(-counts, kind="stable")
            predicted = [int(e) for e in order if counts[e]]
            keep = [self.key_of(ahead, expert) for expert in predicted]
            for key in keep:
                self._prefetch(ahead, key, Priority.PREFETCH, must_earn=False, keep=keep)
        if "background" in self.predictors:
            wanted = np.flatnonzero(record.priority_E == record_layout.PRIORITY_BACKGROUND)
            for expert in wanted.tolist():
                key = self.key_of(layer, expert)
                self._prefetch(layer, key, Priority.BACKGROUND, must_earn=True, keep=keep)
        if "affinity" in self.predictors:
            ahead %= self.state.num_layers
            keys = range(self.key_of(ahead, 0), self.key_of(ahead, 0) + self.state.num_experts)
            table, affinity = self.tables[ahead], self.histories[ahead].affinity
            hottest = hottest_missing(table, keys, affinity)
            if hottest is not None:
                self._prefetch(ahead, hottest, Priority.PREFETCH, must_earn=True, keep=keep)

    def _prefetch(
        self, layer: int, key: int, priority: Priority, *, must_earn: bool, keep: list[int]
    ) -> None:
        table = self.tables[layer]
        if table.is_resident(key) or any(self._is_staged(f, layer, [key]) for f in self._staging):
            return
        place = place_for(table, key, self._ranks[layer], must_earn=must_earn, keep=keep)
        if place is None:
            return
        slot, victim = place
        if victim is not None:
            self._evict(layer, victim)
        self._fly(layer, key, slot, priority)
        table.probation.add(key)

    def _drop_stale(self, layer: int, needed: list[int]) -> None:
        """Take back what was predicted for this step and is not needed by it."""
        wanted = set(needed)
        for flight in list(self._flights.values()):
            stale = flight.is_prefetch and flight.copy.layer == layer and flight.key not in wanted
            if stale and self._pager.cancel(flight.copy):
                self._crash(flight)
        for i, flight in enumerate(self._staging):
            if flight is None or (flight.copy.layer != layer and self._runs(flight.copy.layer)):
                continue  # a step that this one is taken in the middle of computes from it
            if self._is_staged(flight, layer, wanted):
                if flight.is_prefetch:
                    self._prefetched.useful += 1
                    if not flight.copy.is_over():
                        self._prefetched.late += 1
                        self._pager.promote(flight.copy)  # or later loads would overtake it
            elif self._pager.cancel(flight.copy) or flight.copy.is_over():
                self._leave_staging(i)

    def _is_staged(self, flight: Flight | None, layer: int, wanted: Collection[int]) -> bool:
        """Whether a staging slot has one of these experts; who has a slot by now needs none."""
        return (
            flight is not None
            and flight.copy.layer == layer
            and flight.key in wanted
            and not self.tables[layer].is_resident(flight.key)
        )

    def _leave_staging(self, i: int) -> None:
        """A copy into a staging slot is over, and nobody will compute from it."""
        flight, self._staging[i] = self._staging[i], None
        if flight.copy.state is not CopyState.ISSUED:
            self._count_failed(flight)
            return
        if flight.is_prefetch:
            self._prefetched.wasted_bytes += self.store.layout.expert_bytes
        self._land(flight)

    def _can_stream(self, layer: int, pairs: int) -> bool:
        return (
            self.stream_prefill
            and bool(self._staging)
            and layer + 1 < self.state.num_layers
            and pairs >= STREAM_PAIRS * self.state.num_experts
        )

    def _stream_ahead(self, layer: int) -> None:
        """Copy missing experts of the next layer into the staging slots that are free."""
        ahead = layer + 1
        table, first = self.tables[ahead], self.key_of(ahead, 0)
        under_way = {f.key for f in self._staging if f is not None and f.copy.layer == ahead}
        for i, flight in enumerate(self._staging):
            if flight is not None:
                continue
            for key in range(first, first + self.state.num_experts):
                if not table.is_resident(key) and key not in under_way:
                    under_way.add(key)
                    self._fly(ahead, key, self.num_slots + i, Priority.PREFETCH)
                    break

    # -- outside any step

    def warm(self, layer: int, experts: Iterable[int]) -> None:
        """Make experts resident outside any step; counted as ``filled``, not as ``loads``.

        Others leave where their slots are needed, in the order of the eviction policy.

        Raises:
            ValueError: More experts than slots, an id outside [0, E) or given twice.
            RuntimeError: A running step holds the slots, or a load failed.
        """
        experts = sorted(experts)
        E = self.state.num_experts
        for expert in experts:
            if not 0 <= expert < E:
                raise ValueError(f"experts must lie in [0, {E - 1}], got {expert}")
        if len(set(experts)) != len(experts):
            raise ValueError(f"experts must be distinct, got {experts}")
        if len(experts) > self.num_slots:
            raise ValueError(
                f"experts must be at most the {self.num_slots} slots of layer {layer}, "
                f"got {len(experts)}"
            )
        table = self.tables[layer]
        with self.lock:
            self._settle()
            keys = [self.key_of(layer, expert) for expert in experts]
            plan = self._with_room(layer, lambda: self._plan_to_warm(layer, keys))
            leased: set[int] = set()
            self._filling = True
            try:
                for load in plan.loads:
                    self._load(layer, load, leased)
                for key, slot in plan.turns:
                    if key in leased:
                        self._arrive(layer, key, slot)
            finally:
                self._filling = False
                for key in leased:
                    table.release(key)
                self._give_up(layer)
                for changed in sorted(self._changed):
                    self._publish(changed)

    def _plan_to_warm(self, layer: int, keys: list[int]) -> Plan:
        plan = plan_step(self.tables[layer], keys, self._ranks[layer])
        if plan.follow:
            raise NoRoom(f"layer {layer}: a running step holds slots that warm() needs")
        return plan

    def fill(self, order: Iterable[tuple[int, int]] | None = None) -> None:
        """Fill the slots, so that the cache starts full.

        Args:
            order: ``(layer, expert)`` from the most wanted on; what does not fit is passed over.
                Default: expert by expert over all layers.
        """
        L, E = self.state.num_layers, self.state.num_experts
        if order is None:
            order = [(layer, expert) for expert in range(E) for layer in range(L)]
        chosen: list[list[int]] = [[] for _ in range(L)]
        left = {id(table): self.num_slots for table in self.tables}
        for layer, expert in order:
            table = id(self.tables[layer])
            if left[table]:
                left[table] -= 1
                chosen[layer].append(expert)
        for layer, experts in enumerate(chosen):
            self.warm(layer, experts)

    def residents(self, layer: int) -> list[int]:
        """Return the experts of a layer that have a slot, ascending."""
        first = self.key_of(layer, 0)
        keys = range(first, first + self.state.num_experts)
        return [key - first for key in keys if self.tables[layer].is_resident(key)]

    def background(self, layer: int) -> list[PagingRequest]:
        """Return the background requests of the layer's last step, ascending expert id.

        Experts that the router wanted and a resident expert stood in for; the predictor
        ``"background"`` fetches those whose affinity earns it.
        """
        record = self._record_L[layer]
        requests = [] if record is None else record.requests(layer)
        return [request for request in requests if request.priority is Priority.BACKGROUND]

    def metrics(self) -> OffloadMetrics:
        """Return the totals so far; does not stop the device."""
        expert_bytes = self.store.layout.expert_bytes
        device_ms = self._transfer.stalls_ms()
        layers = []
        for layer, counts in enumerate(self._counts_L):
            stall_ms = None
            if device_ms is not None:
                stall_ms = counts.stall_s * 1e3 + device_ms.get(layer, 0.0)
            layers.append(
                LayerMetrics(
                    layer=layer,
                    resident=len(self.residents(layer)),
                    pairs=counts.pairs,
                    hits=counts.hits,
                    misses=counts.pairs - counts.hits,
                    unique_misses=counts.unique_misses,
                    loads=counts.loads,
                    bytes_loaded=counts.loads * expert_bytes,
                    evictions=counts.evictions,
                    stall_ms=stall_ms,
                )
            )
        loads = sum(counts.loads for counts in self._counts_L)
        tables = {id(table): table for table in self.tables}.values()
        prefetched = self._prefetched
        return OffloadMetrics(
            loads=loads,
            bytes_loaded=loads * expert_bytes,
            evictions=sum(counts.evictions for counts in self._counts_L),
            waves=self._waves,
            superseded=self._reader.superseded,
            background=self._background,
            filled=self._filled,
            bypassed=self._bypassed,
            loads_by_tier=dict(self._loads_by_tier),
            bytes_by_tier={t: n * expert_bytes for t, n in self._loads_by_tier.items()},
            prefetch_issued=prefetched.issued,
            prefetch_useful=prefetched.useful,
            prefetch_late=prefetched.late,
            prefetch_cancelled=prefetched.cancelled,
            prefetch_failed=prefetched.failed,
            prefetch_wasted_bytes=prefetched.wasted_bytes,
            slots=sum(len(table.key_in_S) for table in tables),
            slots_used=sum(len(table.residents()) for table in tables),
            staging_slots=len(self._staging),
            home_bytes=self.store.home_bytes(),
            pin_refused_bytes=self.store.pin_refused_bytes,
            verified=self._verified,
            pager_restarts=self._pager.restarts,
            stall_ms=None if device_ms is None else sum(layer.stall_ms for layer in layers),
            layers=tuple(layers),
        )

    def reset_metrics(self) -> None:
        """Set all totals to zero; residency and history stay."""
        self._clear_counts()
        self._reader.superseded = 0
        self._pager.restarts = 0
        self._transfer.reset_metrics()

    def _clear_counts(self) -> None:
        self._counts_L = [LayerCounts() for _ in range(self.state.num_layers)]
        self._filled = self._waves = self._bypassed = self._verified = self._background = 0
        self._loads_by_tier = {tier.value: 0 for tier in Tier}
        self._prefetched = PrefetchAccount()

    def close(self) -> None:
        """Wait for copies under way and give up the slots; metrics stay readable."""
        self._pager.close()
        self._transfer.close()
        self._shut_down.detach()
        self.views_L = []


def check_timeout(timeout_s: float) -> None:
    """Refuse a bound of waits that is not a finite positive number of seconds."""
    if not isinstance(timeout_s, (int, float)) or isinstance(timeout_s, bool):
        raise TypeError(f"timeout_s must be a number of seconds, got {timeout_s!r}")
    if not 0 < timeout_s < float("inf"):
        raise ValueError(f"timeout_s must be finite and > 0, got {timeout_s}")


def _shut_down(pager: Pager, transfer) -> None:
    pager.close()
    transfer.synchronize()


_offloaders: "weakref.WeakSet[ExpertOffloader]" = weakref.WeakSet()


def _renew_locks() -> None:
    """In a forked child: a lock that another thread held would be held for ever."""
    for offloader in list(_offloaders):
        offloader.lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_locks)
