"""The offloader: turns the step record of a layer into loads, turns and residency.

    record -> plan -> first copies -> (expert, slot) by (expert, slot) -> residency for the gate

One read of the record per layer and step is the only host synchronisation.

Shape suffixes: L layers, E experts, S slots per layer, N routed pairs of a call.
"""

import weakref
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..record import RecordReader, StepRecord
from ..requests import PagingRequest, Priority
from ..state import RouterState
from .eviction import EvictionPolicy, eviction_policy
from .plan import Load, plan_step
from .slots import SlotTable, check_slots, warn_few_slots
from .store import HostStore
from .transfer import make_transfer


class ExpertTurn(NamedTuple):
    """Compute this expert now, from this slot, for these pairs."""

    expert: int
    slot: int
    start: int  # its pairs are [start, stop) of the call's pairs, stably sorted by expert
    stop: int


@dataclass(frozen=True, kw_only=True)
class OffloadMetrics:
    """Totals since the start or the last reset.

    Attributes:
        loads: Experts copied to the device because a step needed them.
        bytes_loaded: Bytes of those copies.
        filled: Experts copied by :meth:`ExpertOffloader.warm` and ``fill``, outside any step.
        evictions: Experts whose slot was given to another.
        waves: Passes over the slots; more than one per step that needed more experts than slots.
        superseded: Step records that nobody read before the next route call.
        background: Requests for experts that were wanted but swapped away.
        stall_ms: Time that compute waited for copies; None on CUDA without ``timers=True``.
    """

    loads: int
    bytes_loaded: int
    filled: int
    evictions: int
    waves: int
    superseded: int
    background: int
    stall_ms: float | None


class ExpertOffloader:
    """Keeps S experts of each layer on the device and fetches the ones that a step misses.

    Owns the slots, and ``state.slot_of_LE``, which it changes in stream order only. A step uses
    the current stream of the state's device; one stream, and one thread, at a time.

    Attributes:
        state: The router state that the gates write.
        store: Home of the weights.
        num_slots: Slots per layer, S.
        tables: Bookkeeping of each layer's slots.
        eviction: The victim policy.
        views_L: Per layer, typed views ``(S, *shape)`` of the slots by parameter name.

    Args:
        state: See above; its device is where the slots live.
        store: See above; a layer must be in it before its first step or :meth:`warm`.
        slots: S, in [1, E].
        eviction: ``"affinity"``, ``"lru"`` or an object with
            :meth:`~moe_gpu.offload.eviction.EvictionPolicy.rank`.
        top_k: Experts per token; fewer slots than that draw a warning.
        timers: On CUDA, measure how long compute waits for copies (the CPU always does).

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: Slots outside their bounds, or a state and a store that do not match.

    Example:
        >>> offloader = ExpertOffloader(state, store, slots=4)
        >>> offloader.fill()
        >>> for turn in offloader.step(layer, pairs):  # after the layer's route call
        ...     out[turn.start : turn.stop] = compute(x[turn.start : turn.stop], turn.slot)
    """

    def __init__(
        self,
        state: RouterState,
        store: HostStore,
        slots: int,
        *,
        eviction: str | EvictionPolicy = "affinity",
        top_k: int | None = None,
        timers: bool = False,
    ):
        L, E = state.num_layers, state.num_experts
        check_slots(slots, E)
        if (store.num_layers, store.num_experts) != (L, E):
            raise ValueError(
                f"store holds {store.num_layers} layers of {store.num_experts} experts, "
                f"the state has {L} of {E}"
            )
        self.eviction = eviction_policy(eviction)
        if top_k is not None and slots < top_k:
            warn_few_slots(slots, top_k)
        self.state, self.store, self.num_slots = state, store, slots
        self.tables = [SlotTable(E, slots) for _ in range(L)]
        self._reader = RecordReader(state)
        self._transfer = make_transfer(store.layout, state.slot_of_LE, slots, timers)
        self.views_L = self._transfer.views_L
        # neither slots nor store may be freed under a copy
        weakref.finalize(self, self._transfer.synchronize)
        self._record_L: list[StepRecord | None] = [None] * L
        self._running_L: list[weakref.ref | None] = [None] * L
        self._changed_L = [False] * L
        self._clear_counts()

    def request(self, layer: int) -> None:
        """Order the read of a layer's record ahead of :meth:`step`; see ``RecordReader``."""
        self._reader.request(layer)

    def step(self, layer: int, pairs: int) -> Generator[ExpertTurn, None, None]:
        """Yield the experts of the layer's last route call, each when its weights are in order.

        Hits come first, then missing experts. When the consumer asks for the next turn, compute
        of the last one must be queued: its slot may be given away. A consumer that stops early
        (an exception, ``close()``) leaves everything consistent. A step that was abandoned
        without either is closed by the layer's next step.

        Args:
            layer: Layer to compute; its gate has routed since the layer's last step.
            pairs: Routed (token, expert) pairs of the call, N.

        Raises:
            RuntimeError: No new route call, a record that does not have N pairs, or a load that
                failed (names layer, expert, slot and cause). Nothing hangs on to a slot, and the
                next step works.
        """
        running = self._running_L[layer] and self._running_L[layer]()
        if running is not None:
            running.close()
        turns = self._turns(layer, pairs)
        self._running_L[layer] = weakref.ref(turns)
        return turns

    def _turns(self, layer, pairs):
        spans, record = self._read_spans(layer, pairs)
        table, transfer = self.tables[layer], self._transfer
        table.touch(spans)
        plan = plan_step(table, list(spans), self.eviction, record.affinity_E)
        missing = len(plan.loads) + len(plan.follow)
        self._waves += plan.waves
        self._background += max(0, record.num_requests - missing)

        leased = set()
        try:
            for expert, _ in plan.turns[: len(plan.turns) - missing]:
                table.lease(expert)
                leased.add(expert)
            for load in plan.loads:
                self._load(layer, load)
                table.lease(load.expert)
                leased.add(load.expert)
            for expert, slot in plan.turns:
                transfer.wait_ready(layer, slot)
                yield ExpertTurn(expert, slot, *spans[expert])
                table.release(expert)
                leased.discard(expert)
                if expert in plan.follow:
                    transfer.release(layer)
                    load = plan.follow[expert]
                    self._load(layer, load)
                    table.lease(load.expert)
                    leased.add(load.expert)
        finally:
            for expert in leased:
                table.release(expert)
            if self.num_slots < self.state.num_experts:  # else nothing is ever loaded over them
                transfer.release(layer)
            self._publish(layer)

    def _read_spans(self, layer, pairs):
        """Read the record once; return ``{expert: (start, stop)}``, ascending, and the record."""
        last = self._record_L[layer]
        record = self._reader.read(layer)
        if record.generation == (0 if last is None else last.generation):
            raise RuntimeError(f"layer {layer} has not been routed since its last step")
        self._record_L[layer] = record
        spans, start = {}, 0
        for expert in record.executed_E.nonzero()[0].tolist():
            spans[expert] = (start, start := start + int(record.executed_E[expert]))
        if start != pairs:
            raise RuntimeError(
                f"layer {layer}: the last route call executed {start} pairs, this step has {pairs}"
            )
        return spans, record

    def _load(self, layer: int, load: Load, urgent: bool = True) -> None:
        table = self.tables[layer]
        self._changed_L[layer] = True
        if load.victim is not None:
            table.evict(load.victim)
            self._evictions += 1
        try:
            expert_B = self.store.expert(layer, load.expert)
            self._transfer.page_in(layer, load.slot, expert_B, urgent=urgent)
        except Exception as error:
            raise RuntimeError(
                f"layer {layer}: loading expert {load.expert} into slot {load.slot} of "
                f"{self.num_slots} failed: {error}"
            ) from error
        table.load(load.expert, load.slot)
        if urgent:
            self._loads += 1
        else:
            self._filled += 1

    def _publish(self, layer: int) -> None:
        """Make the gate's view of a layer the table's; once per step, if anything changed."""
        if self._changed_L[layer]:
            self._transfer.publish(layer, self.tables[layer].slot_of_E)
            self._changed_L[layer] = False

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
        record = self._record_L[layer]
        affinity_E = np.zeros(E, np.float32) if record is None else record.affinity_E
        plan = plan_step(self.tables[layer], experts, self.eviction, affinity_E)
        if plan.follow:
            raise RuntimeError(f"layer {layer}: a running step holds slots that warm() needs")
        try:
            for load in plan.loads:
                self._load(layer, load, urgent=False)
        finally:
            self._publish(layer)

    def fill(self) -> None:
        """Give every layer's slots to its first S experts, so that the cache starts full."""
        for layer in range(self.state.num_layers):
            self.warm(layer, range(self.num_slots))

    def background(self, layer: int) -> list[PagingRequest]:
        """Return the background requests of the layer's last step, ascending expert id.

        What a prefetcher would fetch: experts that the router wanted and a resident expert stood
        in for. A step does not fetch them.
        """
        record = self._record_L[layer]
        requests = [] if record is None else record.requests(layer)
        return [request for request in requests if request.priority is Priority.BACKGROUND]

    def metrics(self) -> OffloadMetrics:
        """Return the totals so far; does not stop the device."""
        return OffloadMetrics(
            loads=self._loads,
            bytes_loaded=self._loads * self.store.layout.expert_bytes,
            filled=self._filled,
            evictions=self._evictions,
            waves=self._waves,
            superseded=self._reader.superseded,
            background=self._background,
            stall_ms=self._transfer.stall_ms(),
        )

    def reset_metrics(self) -> None:
        """Set all totals to zero; residency and history stay."""
        self._clear_counts()
        self._reader.superseded = 0
        self._transfer.reset_metrics()

    def _clear_counts(self) -> None:
        self._loads = self._filled = self._evictions = self._waves = self._background = 0

    def close(self) -> None:
        """Wait for copies under way and give up the slots; metrics stay readable."""
        self._transfer.close()
        self.views_L = self._transfer.views_L
