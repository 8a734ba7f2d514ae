"""The handle of an attached model: metrics, policy, and the way back."""

import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from ..adaptive import Control, control_reports
from ..export import status_line
from ..gate import MoEGate
from ..latency import summarize_us
from ..metrics import CounterMirror, Metrics, meter_figures, routing_counts
from ..offload import ExpertOffloader
from ..offload.residency import Residency
from ..offload.tiers import available_memory
from ..policies import Policy
from ..waiting import wait_event
from .audit import Audit, Auditor
from .experts import (
    ATTRIBUTE,
    UNTRACEABLE,
    ExpertsLayer,
    NotCopyable,
    own_forward,
    switch_off,
    switch_on,
)
from .families import MoEBlock
from .options import Options, SlotChoice
from .router import RoutedForward
from .weights import ExpertWeights

FORWARD_S = 600.0  # how long a forward waits for one on another thread


class AttachedMoE(NotCopyable):
    """A model whose routers are gates and whose experts live in slots; made by ``attach`` or ``load``.

    As a context manager it detaches at the end; a loaded one closes.

    Forwards of the model on several threads wait for each other.

    Where every expert has a slot of its own (:attr:`all_resident`) the model's parameters are the
    slots: it trains, saves, loads and compiles as without us, gates included.

    Attributes:
        model: The attached model.
        state: Router state of all its MoE layers, on the device.
        gates: One gate per MoE layer.
        offloader: Moves the experts.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: list[MoEBlock],
        gates: list[MoEGate],
        weights: ExpertWeights,
        own_device: torch.device,
    ):
        self.model, self.gates, self.state = model, gates, gates[0].state
        self.offloader: ExpertOffloader | None = None
        self._blocks, self._own_device = blocks, own_device
        self._weights = weights
        self._layers: list[ExpertsLayer] = []
        self._configs = []
        self._own_forwards: list[tuple[nn.Module, object]] = []
        self._hooks = []
        self._held = threading.local()  # .locks: one per forward under way on the thread
        self._counters = CounterMirror(self.state.counters_LC)
        self._meters = CounterMirror(self.state.meters_LM) if gates[0].meters else None
        self._auditor: Auditor | None = None
        self._attached = self._closed = False

    def _attach(self, choice: SlotChoice, options: Options, residency: Residency | None) -> None:
        """Change the model. Undoes everything if any of it fails."""
        try:
            device = self.state.slot_of_LE.device
            self._weights.take(device)
            if self._own_device.type == "cuda":
                torch.cuda.empty_cache()  # what was taken is of other sizes than the slots
            self.offloader = ExpertOffloader(
                self.state,
                self._weights.store,
                choice.slots,
                pool=choice.pool,
                staging_slots=choice.staging,
                eviction=options.eviction,
                bypass=options.bypass,
                prefetch=options.prefetch,
                prefill=options.prefill,
                stream_prefill=options.stream_prefill,
                verify=options.verify,
                timers=options.timers,
                timeout_s=options.timeout_s,
                link_gbps=options.link_gbps,
                weights_L=self._weights.slots(),
            )
            if options.verify:
                self._weights.store.remember_checksums()
            if residency is None:
                self.offloader.fill()
            else:
                residency.restore(self.offloader)
            audits = [None] * len(self.gates)
            if options.audit:
                self._auditor = Auditor(options.audit, self.gates, options.timeout_s)
                audits = self._auditor.layers
            self._weights.show_slots(self.offloader.views_L)
            self._move_to(device)
            for layer, (block, gate) in enumerate(zip(self._blocks, self.gates, strict=True)):
                router, experts = block.router, block.experts
                following = self._blocks[layer + 1] if layer + 1 < len(self._blocks) else None
                most = options.max_policy_tokens
                here = ExpertsLayer(self.offloader, layer, most, audits[layer])
                views = self.offloader.views_L[layer]
                routed = RoutedForward(block, gate, here, views, following)
                self._own_forwards.append((router, router.__dict__.get("forward")))
                router.forward = routed
                self._layers.append(here)
                setattr(experts, ATTRIBUTE, here)
            self._hooks = [
                self.model.register_forward_pre_hook(self._enter, prepend=True),
                self.model.register_forward_hook(self._leave, always_call=True),
            ]
            self._configs = switch_on(self.model)
            for layer, block in zip(self._layers, self._blocks, strict=True):
                layer.own_forward = own_forward(block.experts)
            if self.state.slot_of_LE.is_cuda:
                # as after model.to(): compute may follow on any stream
                filled = torch.cuda.Event()
                filled.record(torch.cuda.current_stream(self.state.slot_of_LE.device))
                wait_event(filled, FORWARD_S, "the filling of the slots")
        except BaseException:
            # giving back what was loaded would need the memory that it was kept out of
            (self._abandon if self._weights.loaded else self._undo)()
            raise
        self._attached = True

    def _lock(self) -> threading.RLock:
        """Return the offloader's lock, held by this thread."""
        lock = self.offloader.lock
        if not lock.acquire(timeout=FORWARD_S):
            raise RuntimeError(
                f"another thread has been running this model for {FORWARD_S:g} s: its calls wait "
                "for each other"
            )
        return lock

    def _enter(self, module, args) -> None:
        # a trace of the hook would hold no lock when the graph runs
        if not (self._weights.all_resident and torch.compiler.is_compiling()):
            self._wait_for_others()

    def _leave(self, module, args, output) -> None:
        if not (self._weights.all_resident and torch.compiler.is_compiling()):
            self._let_others_run()

    @torch.compiler.disable(reason=UNTRACEABLE)
    def _wait_for_others(self) -> None:
        lock = self._lock()
        if not self._attached:  # ended while this thread waited: no hook will call _leave
            lock.release()
            return
        self._held.__dict__.setdefault("locks", []).append(lock)

    @torch.compiler.disable(reason=UNTRACEABLE)
    def _let_others_run(self) -> None:
        # none where the hook before ours raised, or ours did, while another thread's forward ran
        if locks := self._held.__dict__.get("locks"):
            locks.pop().release()

    def _undo(self) -> None:
        """Take back what :meth:`_attach` did, as far as it got; can be called again.

        What can fail comes first: while weights are missing, the routers refuse to compute.
        """
        self._free_slots()
        self._weights.give_back()
        self._move_to(self._own_device)
        self._let_go()

    def _abandon(self) -> None:
        self._free_slots()
        self._weights.give_up()
        self._let_go()
        for block in self._blocks:  # what runs first of an MoE layer, whichever module was called
            block.router.forward = refuse_closed

    def _free_slots(self) -> None:
        if self.offloader is not None:
            self.offloader.close()
        for layer in self._layers:  # this handle may live on: it must not keep the memory
            layer.weights_S = []
        if self._auditor is not None:
            self._auditor.close()

    def _let_go(self) -> None:
        for router, own in self._own_forwards:
            if own is None:
                router.__dict__.pop("forward", None)
            else:
                router.forward = own
        for block in self._blocks:
            block.experts.__dict__.pop(ATTRIBUTE, None)
        for hook in self._hooks:
            hook.remove()
        switch_off(self._configs)
        self._configs = []

    def _move_to(self, device: torch.device) -> None:
        if any(tensor.device != device for tensor in self.model.parameters()):
            self.model.to(device)

    def detach(self) -> None:
        """Give the model back as it was: weights, devices, forwards, saving. Frees the slots.

        A model that came from :func:`moe_gpu.load` ends up whole in host memory; where it does
        not fit there, :meth:`close` is what you want. Waits for a forward on another thread.
        Compute on streams other than the current one must have finished: see to that yourself.

        Raises:
            RuntimeError: Already detached, or called from inside an expert.
            MemoryError: A loaded model that host memory has no room for; nothing has changed.
        """
        with self._alone("detach"):
            if self._weights.loaded:
                needed, free = self._host_memory_to_detach(), available_memory()
                if free is not None and needed > free:
                    raise MemoryError(
                        f"detach() puts the whole model into host memory: that takes {needed:,} "
                        f"bytes more, {free:,} are available; close() frees the model instead"
                    )
            self._undo()
            self._attached = False

    def _host_memory_to_detach(self) -> int:
        """Return the bytes of host memory that a loaded model needs beyond what it has there."""
        needed = self._weights.host_bytes_to_give_back()
        if self.state.slot_of_LE.device != self._own_device:
            experts = {id(p) for block in self._blocks for p in block.experts.parameters()}
            needed += sum(p.nbytes for p in self.model.parameters() if id(p) not in experts)
        return needed

    def close(self) -> None:
        """Free a loaded model's experts for good: it cannot compute any more. Metrics stay readable.

        Waits for a forward on another thread. Compute on streams other than the current one must
        have finished: see to that yourself.

        Raises:
            RuntimeError: The model was attached, not loaded: :meth:`detach` gives it back. Or
                already detached or closed, or called from inside an expert.
        """
        if self._attached and not self._weights.loaded:
            raise RuntimeError(
                "close() would destroy the weights of a model that was attached, not loaded: "
                "detach() gives it back"
            )
        with self._alone("close"):
            self._abandon()
            self._attached, self._closed = False, True

    @contextmanager
    def _alone(self, verb: str) -> Iterator[None]:
        """Hold the lock while the model ends."""
        self._check_can_end(verb)
        lock = self._lock()
        try:
            self._check_can_end(verb)  # again: another thread may have been first
            yield
            self._leave_all()
        finally:
            lock.release()

    def _leave_all(self) -> None:
        """Give up the locks of this thread's forwards: the hook that would is gone."""
        while self._held.__dict__.get("locks"):
            self._let_others_run()

    @property
    def _status(self) -> str:
        return "attached" if self._attached else "closed" if self._closed else "detached"

    def _check_attached(self, verb: str) -> None:
        if not self._attached:
            raise RuntimeError(f"{verb}() needs an attached model: this one is {self._status}")

    def _check_can_end(self, verb: str) -> None:
        if not self._attached:
            raise RuntimeError(f"this model is already {self._status}")
        if any(layer.computing == threading.get_ident() for layer in self._layers):
            raise RuntimeError(f"{verb}() was called from inside an expert: let it finish first")

    @property
    def all_resident(self) -> bool:
        """Whether the expert parameters are whole: none is ever moved.

        So it is with as many slots per layer as experts, unless they are a pool or ``verify`` is on.
        """
        return self._weights.all_resident

    def set_policy(self, policy: Policy) -> None:
        """Route by another policy from now on; no weights move.

        Raises:
            TypeError: Not a policy.
            RuntimeError: Detached or closed.
        """
        self._check_attached("set_policy")
        if not isinstance(policy, Policy):
            raise TypeError(f"policy must be one of moe_gpu.policies, got {policy!r}")
        for gate in self.gates:
            gate.policy = policy

    def metrics(self, wait: bool = True) -> Metrics:
        """Return what routing and offloading have done so far.

        Args:
            wait: Synchronise with the device, so that routing counts are up to date. Without, they
                are as of an earlier such call, and the device is not stopped; on the CPU both are
                the same.
        """
        latencies_us = itertools.chain.from_iterable(gate.latencies_us() for gate in self.gates)
        figures, measured = vars(self.offloader.metrics()), {}
        counters_LC = self._counters.read(wait)
        if self.all_resident:  # what is traced or differentiated, only the device counts
            names = ("pairs", "hits", "misses", "unique_misses")
            counts = [routing_counts(row_C[None]) for row_C in counters_LC]
            layers = [
                replace(layer, **{name: count[name] for name in names})
                for layer, count in zip(figures["layers"], counts, strict=True)
            ]
            figures = figures | {"layers": tuple(layers)}
        if self._meters is not None:
            meters_LM, top_k = self._meters.read(wait), self.gates[0].top_k
            measured = meter_figures(meters_LM, top_k)
            rows = [meter_figures(row_M[None], top_k) for row_M in meters_LM]
            layers = [replace(x, **row) for x, row in zip(figures["layers"], rows, strict=True)]
            figures = figures | {"layers": tuple(layers)}
        return Metrics(
            **figures,
            **measured,
            **routing_counts(counters_LC),
            **summarize_us(list(latencies_us)),
            route_path=self.gates[0].last_route_path,
        )

    def status(self) -> str:
        """Return one line for a long run: hits, traffic, stalls. Does not stop the device."""
        return status_line(self.metrics(wait=False))

    def reset_metrics(self) -> None:
        """Set all counts and timers to zero; residency, affinity and activations stay."""
        for gate in self.gates:
            gate.reset_metrics()
        self.offloader.reset_metrics()
        self._counters.reset()
        if self._meters is not None:
            self._meters.reset()
        if self._auditor is not None:
            with self.offloader.lock:
                self._auditor.reset()

    def control(self) -> list[Control]:
        """Return what the controller of each layer is doing under an adaptive policy. Synchronises."""
        state = self.state
        return control_reports(state.control_LP, state.control_state_LS, state.strength_L)

    def audit(self) -> Audit:
        """Return what the audit of swaps has found so far. Synchronises.

        Raises:
            RuntimeError: Attached without ``audit``.
        """
        if self._auditor is None:
            raise RuntimeError("no swap is audited: attach(..., audit=0.01)")
        with self.offloader.lock:
            return self._auditor.report()

    def save_residency(self, path: str | Path) -> None:
        """Write who is resident and how hot each expert is, for ``residency=`` of a later start.

        The file appears whole or not at all (safetensors). Synchronises, and waits for a forward
        on another thread.

        Raises:
            FileNotFoundError: No folder to write it to.
            RuntimeError: Detached or closed.
        """
        with self.offloader.lock:
            kept = Residency.of(self.offloader)
        kept.save(path)

    def __enter__(self) -> "AttachedMoE":
        return self

    def __exit__(self, *exc_info) -> None:
        if self._attached:
            (self.close if self._weights.loaded else self.detach)()

    def __repr__(self) -> str:
        layers, experts = self.state.num_layers, self.state.num_experts
        sizes = f"{layers} layers of {experts} experts"
        if self._attached and self.offloader.is_pool:
            slots = f"a pool of {self.offloader.num_slots} for {layers * experts} experts"
            sizes = f"{layers} layers, {slots}"
        elif self._attached:
            slots = f"{self.offloader.num_slots} of {experts} experts resident per layer"
            sizes = f"{layers} layers, {slots}"
        return (
            f"AttachedMoE({type(self.model).__name__}, {self._status}, {sizes}, "
            f"policy={self.gates[0].policy})"
        )


def refuse_closed(*_, **__):
    """Stand in for what a closed model cannot do any more."""
    raise RuntimeError("this model was closed and its expert weights freed: load it again")
