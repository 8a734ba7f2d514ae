"""The offloader: turns the step record of a layer into loads, turns and residency.

    record -> plan -> first copies -> (expert, slot) by (expert, slot) -> residency for the gate

One read of the record per layer and step is the only host synchronisation.

Shape suffixes: L layers, E experts, S slots of a table, N routed pairs of a call.
"""

import os
import threading
import weakref
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import torch

from ..metrics import OffloadMetrics
from ..record import RecordReader, StepRecord
from ..requests import PagingRequest, Priority
from ..state import RouterState
from .cache import Cache
from .counts import Counts
from .eviction import DEFAULT, Affinity, EvictionPolicy, eviction_policy
from .flights import Flights
from .gate_view import GateView
from .pager import Pager
from .plan import NoRoom, Plan, Rank, Turn, plan_step
from .prefetch import Prefetcher, check_predictors
from .read_ahead import ReadAhead
from .slots import NONE, check_slots, warn_few_slots
from .store import ExpertStore
from .transfer import NoTransfer, Transfer, make_transfer

STAGING_SLOTS = 2  # one computes while the next one's copy runs
STREAM_PAIRS = 16  # routed pairs per expert from which a prefill surely needs them all; untuned

Prefill = Literal["last", "warm", "keep"]


class ExpertTurn(NamedTuple):
    """Compute this expert now, from this slot, for these pairs."""

    expert: int
    slot: int  # index into ExpertOffloader.weights_of(layer)
    start: int  # its pairs are [start, stop) of the call's pairs, stably sorted by expert
    stop: int


class ExpertOffloader:
    """Keeps experts in slots on the device and fetches the ones that a step misses.

    Owns the slots, and ``state.slot_of_LE``, which it changes in stream order only. A step uses
    the current stream of the state's device; one stream at a time. Threads take :attr:`lock`
    around a step.

    Attributes:
        state: The router state that the gates write.
        store: Home of the weights.
        cache: Who is in which slot, and what is known of their use.
        flights: Copies under way.
        eviction: The victim policy.
        views_L: Per layer, typed views ``(S, *shape)`` of its slots by parameter name.
        all_resident: The slots are the ``weights_L`` that were given: nothing ever moves, and
            expert e of each layer is in its slot e.
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
        weights_L: Per layer, tensors ``(E, *shape)`` by parameter name, on the state's device, that
            are to be the slots of an offloader with a slot for every expert. The store may be
            empty then.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: An argument outside its bounds, a state and a store that do not match, or
            ``weights_L`` with a pool, with fewer slots than experts or with ``verify``.
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
        weights_L: Sequence[Mapping[str, torch.Tensor]] | None = None,
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
        predictors = check_predictors(prefetch)
        if top_k is not None:
            warn_few_slots(slots, top_k, layers=L, pool=pool, staging_slots=staging_slots)

        self.state, self.store = state, store
        self.prefill, self.stream_prefill = prefill, stream_prefill
        self.bypass, self.verify = bypass, verify
        self.cache = Cache(L, E, slots, pool, self.eviction)
        self.all_resident = weights_L is not None
        self._counts = Counts.of(L)
        if self.all_resident:
            if pool or slots < E or staging_slots or verify:
                raise ValueError(
                    "weights_L needs a slot of its own for every expert, no staging slots and no "
                    f"verify, got {slots=} of {E}, {pool=}, {staging_slots=}, {verify=}"
                )
            self._transfer = NoTransfer(weights_L, state.slot_of_LE, timeout_s=timeout_s)
        else:
            self._transfer = make_transfer(
                store,
                state.slot_of_LE,
                self.cache.groups + [staging_slots] * (staging_slots > 0),
                timers=timers,
                timeout_s=timeout_s,
                link_gbps=link_gbps,
            )
        self.views_L = [self._transfer.views_G[0 if pool else layer] for layer in range(L)]
        self._pager = Pager(
            self._transfer.begin,
            self._transfer.piece,
            self._transfer.finish,
            store.layout.expert_bytes,
            timeout_s,
        )
        self._read_ahead = ReadAhead(store.read_ahead)
        # neither slots nor store may be freed under a copy; also when the interpreter exits
        self._shut_down = weakref.finalize(
            self, _shut_down, self._pager, self._transfer, self._read_ahead
        )
        self._running_L: list[weakref.ref | None] = [None] * L
        self._runs = _runs(self._running_L)
        self._view = GateView(self.cache, self._transfer)
        self.flights = Flights(
            self.cache,
            self._view,
            store,
            self._transfer,
            self._pager,
            self._read_ahead,
            self._counts,
            staging_slots,
            self._runs,
        )
        self._prefetcher = Prefetcher(predictors, self.cache, self.flights)
        self._is_simple = not verify and not predictors  # else a step of hits has more to do
        self._reader = RecordReader(state, timeout_s)
        self._record_L: list[StepRecord | None] = [None] * L
        self.lock = threading.RLock()
        state.is_owned = True
        _offloaders.add(self)
        if self.all_resident:
            self._seat_everybody()

    def _seat_everybody(self) -> None:
        for layer, table in enumerate(self.cache.tables):
            for expert in range(self.state.num_experts):
                table.load(expert, expert)
            self._view.changed.add(layer)
        self._counts.filled = self.state.num_layers * self.state.num_experts
        self._view.publish_all(())

    @property
    def num_slots(self) -> int:
        """Slots per layer, or of the pool."""
        return self.cache.num_slots

    @property
    def is_pool(self) -> bool:
        """Whether all layers share the slots."""
        return self.cache.is_pool

    @property
    def predictors(self) -> frozenset[str]:
        """Predictors that are on, see :mod:`moe_gpu.offload.prefetch`."""
        return self._prefetcher.predictors

    def weights_of(self, layer: int) -> list[dict[str, torch.Tensor]]:
        """Return the parameters in every slot that a turn of the layer can name, by name."""
        groups = [self.views_L[layer]]
        if self.flights.staging:
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
        return self._prefetcher.wants_prediction(layer)

    def predict(self, layer: int, ids_TK: torch.Tensor) -> None:
        """Say whom a layer will probably route to, before the layer below it takes its step.

        Args:
            layer: The layer predicted for.
            ids_TK: Its experts for each token, an integer tensor on the device.
        """
        self._prefetcher.predict(layer, ids_TK)

    def before_route(self, layer: int) -> None:
        """Let the gate see the experts of a layer whose prefetch has arrived."""
        if self.flights.on_way or self._view.changed:
            self.flights.settle()
            self._view.publish(layer, self.flights.on_way)

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
        cache, flights, transfer = self.cache, self.flights, self._transfer
        table, history, row = cache.tables[layer], cache.histories[layer], cache.row_of(layer)
        first = cache.key_of(layer, 0)
        needed = [first + expert for expert in spans]
        slots = [table.slot_of_X[key] for key in needed]
        if self._is_simple and not is_prefill and flights.are_none and NONE not in slots:
            yield from self._hits(layer, spans, record, slots)
            return
        history.touch(row, needed)
        history.learn(row, record.affinity_E.tolist())
        self._counts.step(layer, spans, self._view.published_LE[layer], record.num_requests)
        flights.settle()
        flights.drop_stale(layer, needed)
        plan = flights.with_room(layer, lambda: self._plan(layer, needed, record, is_prefill))
        self._counts.waves += plan.waves

        leased = set()
        streams = is_prefill and self._can_stream(layer, pairs)
        try:
            for key, slot in plan.turns:
                if slot < cache.num_slots and table.is_resident(key):
                    table.lease(key)
                    leased.add(key)
                    flights.use(layer, key)
            for load in plan.loads:
                flights.load(layer, load, leased)
            to_follow = len(plan.follow)
            if streams and not to_follow:  # the next layer's copies do not go before this one's
                flights.stream_ahead(layer + 1)
            elif self._prefetcher.predictors and not is_prefill:
                self._prefetcher.order(layer, record)
            # the plan's order, unless a slot is waited for
            own = {load.key for load in plan.loads} | {load.key for load in plan.follow.values()}
            turns = plan.turns
            if plan.follow or streams:
                turns = self._in_order(layer, plan, own, streams)
            for key, slot in turns:
                flights.arrive(layer, key, slot, self.verify, is_own=key in own)
                yield ExpertTurn(key - first, slot, *spans[key - first])
                if slot >= cache.num_slots:
                    flights.leave(slot)
                else:
                    table.release(key)
                    leased.discard(key)
                if key in plan.follow:
                    transfer.release(layer)
                    flights.load(layer, plan.follow[key], leased)
                    to_follow -= 1
                if streams and not to_follow and flights.free_staging():
                    transfer.release(layer)
                    flights.stream_ahead(layer + 1)
        finally:
            for key in leased:
                table.release(key)
            flights.give_up(layer)
            # else nothing is ever loaded over them
            if flights.staging or cache.num_slots < len(table.slot_of_X):
                transfer.release(layer)
            self._view.publish_all(flights.on_way)

    def _hits(self, layer, spans, record, slots):
        """Take a step that needs no plan; the device computes while the host keeps its books."""
        cache, table = self.cache, self.cache.tables[layer]
        first = cache.key_of(layer, 0)
        keys = [first + expert for expert in spans]
        leased = deque(keys)
        for key in keys:
            table.lease(key)
        try:
            for (expert, span), slot in zip(spans.items(), slots, strict=True):
                self._transfer.wait_ready(cache.place_of(layer, slot), layer)
                yield ExpertTurn(expert, slot, *span)
                table.release(leased.popleft())
        finally:
            for key in leased:
                table.release(key)
            row = cache.row_of(layer)
            cache.histories[layer].touch(row, keys)
            cache.histories[layer].learn(row, record.affinity_E.tolist())
            published_E = self._view.published_LE[layer]
            self._counts.step(layer, spans, published_E, record.num_requests)
            self._counts.waves += 1
            if self.flights.staging or cache.num_slots < len(table.slot_of_X):
                self._transfer.release(layer)
            self._view.publish_all(self.flights.on_way)

    def _in_order(self, layer: int, plan: Plan, loaded: set[int], streams: bool) -> Iterator[Turn]:
        """Yield the turns: hits first, while copies run, but nobody who holds up a copy.

        An expert that has arrived and whose slot somebody waits for goes before the hits, or the
        link would rest while they compute. The others go in the order in which their copies are
        really ordered, which that changes.
        """
        hits: deque[Turn] = deque()
        others: deque[Turn] = deque()
        later = {load.key for load in plan.follow.values()}
        for turn in plan.turns:
            is_hit = turn.slot < self.cache.num_slots and turn.key not in loaded
            if turn.key not in later:
                (hits if is_hit else others).append(turn)
        while hits or others:
            turn = (hits or others)[0]
            if hits and others:
                key, slot = others[0]
                is_wanted = key in plan.follow or (streams and slot >= self.cache.num_slots)
                if is_wanted and self.flights.has_arrived(layer, key, slot):
                    turn = others[0]
            (hits if hits and turn is hits[0] else others).popleft()
            yield turn
            if turn.key in plan.follow:
                load = plan.follow[turn.key]
                others.append(Turn(load.key, load.slot))

    def _read_spans(self, layer, pairs):
        """Read the record once; return ``{expert: (start, stop)}``, ascending, and the record."""
        last = self._record_L[layer]
        try:
            record = self._reader.read(layer)
        except RuntimeError as error:
            raise RuntimeError(f"{error}{self.flights.names()}") from error
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

    def _plan(self, layer: int, needed: list[int], record: StepRecord, is_prefill: bool) -> Plan:
        return plan_step(
            self.cache.tables[layer],
            needed,
            self.cache.ranks[layer],
            staged=self.flights.staged(layer, needed),
            staging=self.flights.free_staging(),
            bypass=self.bypass,
            everybody=self._rank_after_prefill(layer, record) if is_prefill else None,
        )

    def _rank_after_prefill(self, layer: int, record: StepRecord) -> Rank:
        """Return the order in which a prefill's experts, and those before it, leave."""
        history, table = self.cache.histories[layer], self.cache.tables[layer]
        if self.prefill == "last":
            # affinity was aged token by token: what the last tokens wanted stands highest
            return lambda keys: Affinity().rank(keys, history)
        if self.prefill == "warm":
            first = self.cache.key_of(layer, 0)
            tokens = {first + e: int(n) for e, n in enumerate(record.executed_E)}
            return lambda keys: sorted(keys, key=lambda key: (tokens.get(key, 0), -key))
        return lambda keys: sorted(keys, key=lambda key: (table.is_resident(key), key))

    def _can_stream(self, layer: int, pairs: int) -> bool:
        return (
            self.stream_prefill
            and bool(self.flights.staging)
            and layer + 1 < self.state.num_layers
            and pairs >= STREAM_PAIRS * self.state.num_experts
        )

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
        if len(experts) > self.cache.num_slots:
            raise ValueError(
                f"experts must be at most the {self.cache.num_slots} slots of layer {layer}, "
                f"got {len(experts)}"
            )
        table = self.cache.tables[layer]
        with self.lock:
            for other in range(self.state.num_layers):
                if self._runs(other):  # compute is queued on slots that it has given back
                    self._transfer.release(other)
            self.flights.settle()
            keys = [self.cache.key_of(layer, expert) for expert in experts]
            plan = self.flights.with_room(layer, lambda: self._plan_to_warm(layer, keys))
            leased: set[int] = set()
            self.flights.is_filling = True
            try:
                for load in plan.loads:
                    self.flights.load(layer, load, leased)
                for key, slot in plan.turns:
                    if key in leased:
                        self.flights.arrive(layer, key, slot, self.verify, is_own=True)
            finally:
                self.flights.is_filling = False
                for key in leased:
                    table.release(key)
                self.flights.give_up(layer)
                self._view.publish_all(self.flights.on_way)

    def _plan_to_warm(self, layer: int, keys: list[int]) -> Plan:
        plan = plan_step(self.cache.tables[layer], keys, self.cache.ranks[layer])
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
        left = {id(table): self.cache.num_slots for table in self.cache.tables}
        for layer, expert in order:
            table = id(self.cache.tables[layer])
            if left[table]:
                left[table] -= 1
                chosen[layer].append(expert)
        for layer, experts in enumerate(chosen):
            self.warm(layer, experts)

    def residents(self, layer: int) -> list[int]:
        """Return the experts of a layer that have a slot, ascending."""
        return self.cache.residents(layer)

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
        return self._counts.metrics(
            self.cache,
            self.store.layout.expert_bytes,
            self._transfer.stalls_ms(),
            # what is traced or captured runs without a step, and needs none
            superseded=0 if self.all_resident else self._reader.superseded,
            staging_slots=len(self.flights.staging),
            home_bytes=self.store.home_bytes(),
            pin_refused_bytes=self.store.pin_refused_bytes,
            pager_restarts=self._pager.restarts,
        )

    def reset_metrics(self) -> None:
        """Set all totals to zero; residency and history stay."""
        self._counts.reset()
        self._reader.superseded = 0
        self._pager.restarts = 0
        self._transfer.reset_metrics()

    def close(self) -> None:
        """Wait for copies under way and give up the slots; metrics stay readable."""
        self._read_ahead.close()
        self._pager.close()
        self._transfer.close()
        self._shut_down.detach()
        self.views_L = []
        self.state.is_owned = False


def check_timeout(timeout_s: float) -> None:
    """Refuse a bound of waits that is not a finite positive number of seconds."""
    if not isinstance(timeout_s, (int, float)) or isinstance(timeout_s, bool):
        raise TypeError(f"timeout_s must be a number of seconds, got {timeout_s!r}")
    if not 0 < timeout_s < float("inf"):
        raise ValueError(f"timeout_s must be finite and > 0, got {timeout_s}")


def _runs(running_L: list):
    """Return what tells whether a layer's step is under way; without a reference to the offloader."""

    def runs(layer: int) -> bool:
        turns = running_L[layer] and running_L[layer]()
        return turns is not None and turns.gi_frame is not None

    return runs


def _shut_down(pager: Pager, transfer: Transfer, read_ahead: ReadAhead) -> None:
    read_ahead.close()
    pager.close()
    if not torch.cuda._is_in_bad_fork():  # a child has nothing to wait for, and CUDA refuses it
        transfer.synchronize()


_offloaders: "weakref.WeakSet[ExpertOffloader]" = weakref.WeakSet()


def _renew_locks() -> None:
    """In a forked child: a lock that another thread held would be held for ever."""
    renewed: dict[int, threading.RLock] = {}  # a model's offloaders share one
    for offloader in list(_offloaders):
        offloader.lock = renewed.setdefault(id(offloader.lock), threading.RLock())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_locks)
