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
from ..metrics import Metrics, meter_figures, routing_counts, total_of
from ..offload import ExpertOffloader
from ..offload.residency import Residency
from ..offload.tiers import available_memory
from ..policies import Policy, layer_strengths
from ..state import RouterState
from .audit import Audit, Auditor
from .experts import UNTRACEABLE, ExpertsLayer, NotCopyable
from .implementation import switch_off, switch_on
from .options import Options
from .part import DevicePart

FORWARD_S = 600.0  # how long a forward waits for one on another thread


class AttachedMoE(NotCopyable):
    """A model whose routers are gates and whose experts live in slots; made by ``attach`` or ``load``.

    As a context manager it detaches at the end; a loaded one closes.

    Forwards of the model on several threads wait for each other.

    Where every expert has a slot of its own (:attr:`all_resident`) the model's parameters are the
    slots: it trains, saves, loads and compiles as without us, gates included.

    A model that is split over several devices has a router state and an offloader for each
    (:attr:`states`, :attr:`offloaders`); figures are those of the whole model.

    Attributes:
        model: The attached model.
        gates: One gate per MoE layer.
    """

    def __init__(self, model: nn.Module, parts: list[DevicePart], own_device: torch.device | None):
        self.model, self._parts = model, parts
        numbered = [pair for part in parts for pair in zip(part.numbers, part.gates, strict=True)]
        self.gates: list[MoEGate] = [gate for _, gate in sorted(numbered, key=lambda pair: pair[0])]
        # rows of all parts, one after the other, to rows by layer
        numbers = torch.tensor([number for part in parts for number in part.numbers])
        self._order_L = numbers.argsort()
        self._own_device = own_device  # None: the parts stay where they are
        self._configs = []
        self._hooks = []
        self._held = threading.local()  # .locks: one per forward under way on the thread
        self._auditor: Auditor | None = None
        self._attached = self._closed = False

    def _attach(self, options: Options, residency: Residency | None) -> None:
        """Change the model. Undoes everything if any of it fails."""
        try:
            for part in self._parts:
                first = self._parts[0].offloader
                kept = None if residency is None else residency.of_layers(part.numbers)
                part.take(options, kept, None if first is None else first.lock)
            audits = [None] * len(self.gates)
            if options.audit:
                self._auditor = Auditor(options.audit, self.gates, options.timeout_s)
                audits = self._auditor.layers
            if self._own_device is not None:
                self._move_to(self._parts[0].device)
            for part in self._parts:
                part.rebind(options, [audits[number] for number in part.numbers])
            self._hooks = [
                self.model.register_forward_pre_hook(self._enter, prepend=True),
                self.model.register_forward_hook(self._leave, always_call=True),
            ]
            self._configs = switch_on(self.model)
            for part in self._parts:
                part.remember_own_forwards()
            for part in self._parts:
                part.wait_until_filled(FORWARD_S)
        except BaseException:
            # giving back what was loaded would need the memory that it was kept out of
            (self._abandon if self._loaded else self._undo)()
            raise
        self._attached = True

    @property
    def state(self) -> RouterState:
        """Router state of all MoE layers, on the device.

        Raises:
            RuntimeError: The model is split over several devices.
        """
        return self._only("state", "states")

    @property
    def offloader(self) -> ExpertOffloader | None:
        """What moves the experts.

        Raises:
            RuntimeError: The model is split over several devices.
        """
        return self._only("offloader", "offloaders")

    @property
    def states(self) -> list[RouterState]:
        """Router states by device; their rows are that device's MoE layers, ascending."""
        return [part.state for part in self._parts]

    @property
    def offloaders(self) -> list[ExpertOffloader]:
        """What moves the experts of each device."""
        return [part.offloader for part in self._parts]

    @property
    def layers_of_devices(self) -> list[tuple[torch.device, list[int]]]:
        """Each device that has MoE layers, and which."""
        return [(part.device, list(part.numbers)) for part in self._parts]

    def _only(self, name: str, names: str):
        if len(self._parts) > 1:
            raise RuntimeError(
                f"this model is split over {len(self._parts)} devices, each with one of its own: "
                f"use {names}"
            )
        return getattr(self._parts[0], name)

    @property
    def _loaded(self) -> bool:
        return self._parts[0].weights.loaded

    @property
    def _layers(self) -> list[ExpertsLayer]:
        return [layer for part in self._parts for layer in part.layers]

    def _lock(self) -> threading.RLock:
        """Return the offloaders' lock, held by this thread."""
        lock = self._parts[0].offloader.lock
        if not lock.acquire(timeout=FORWARD_S):
            raise RuntimeError(
                f"another thread has been running this model for {FORWARD_S:g} s: its calls wait "
                "for each other"
            )
        return lock

    def _enter(self, module, args) -> None:
        # a trace of the hook would hold no lock when the graph runs
        if not (self.all_resident and torch.compiler.is_compiling()):
            self._wait_for_others()

    def _leave(self, module, args, output) -> None:
        if not (self.all_resident and torch.compiler.is_compiling()):
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
        for part in self._parts:
            part.weights.give_back()
        if self._own_device is not None:
            self._move_to(self._own_device)
        self._let_go()

    def _abandon(self) -> None:
        self._free_slots()
        for part in self._parts:
            part.weights.give_up()
        self._let_go()
        for part in self._parts:
            for block in part.blocks:  # what runs first of an MoE layer, whoever calls it
                block.router.forward = refuse_closed

    def _free_slots(self) -> None:
        for part in self._parts:
            part.free_slots()
        if self._auditor is not None:
            self._auditor.close()

    def _let_go(self) -> None:
        for part in self._parts:
            part.let_go()
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
        Experts that were in slots require a gradient again if they did when they were attached.

        Raises:
            RuntimeError: Already detached, or called from inside an expert.
            MemoryError: A loaded model that host memory has no room for; nothing has changed.
        """
        with self._alone("detach"):
            if self._loaded:
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
        (part,) = self._parts  # one device computes what was loaded
        needed = part.weights.host_bytes_to_give_back()
        if part.device != self._own_device:
            experts = {id(p) for block in part.blocks for p in block.experts.parameters()}
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
        if self._attached and not self._loaded:
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
        return all(part.weights.all_resident for part in self._parts)

    def set_policy(self, policy: Policy) -> None:
        """Route by another policy from now on; no weights move.

        Raises:
            TypeError: Not a policy.
            RuntimeError: Detached or closed.
        """
        self._check_attached("set_policy")
        if not isinstance(policy, Policy):
            raise TypeError(f"policy must be one of moe_gpu.policies, got {policy!r}")
        if getattr(policy, "layer_scale", ()):
            layer_strengths(policy, len(self.gates))  # refused before any part changes
        for part in self._parts:
            part.set_policy(policy)

    def metrics(self, wait: bool = True) -> Metrics:
        """Return what routing and offloading have done so far.

        Args:
            wait: Synchronise with the device, so that routing counts are up to date. Without, they
                are as of an earlier such call, and the device is not stopped; on the CPU both are
                the same.
        """
        latencies_us = itertools.chain.from_iterable(gate.latencies_us() for gate in self.gates)
        figures, measured = self._offload_figures(), {}
        counters_LC = self._by_layer([part.counters.read(wait) for part in self._parts])
        if self.all_resident:  # what is traced or differentiated, only the device counts
            names = ("pairs", "hits", "misses", "unique_misses")
            counts = [routing_counts(row_C[None]) for row_C in counters_LC]
            layers = [
                replace(layer, **{name: count[name] for name in names})
                for layer, count in zip(figures["layers"], counts, strict=True)
            ]
            figures = figures | {"layers": tuple(layers)}
        if self.gates[0].meters:
            meters_LM = self._by_layer([part.meters.read(wait) for part in self._parts])
            top_k = self.gates[0].top_k
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

    def _offload_figures(self) -> dict[str, object]:
        """Return the offloaders' figures by name, those by layer under the model's numbers."""
        figures = [part.offloader.metrics() for part in self._parts]
        layers = [
            replace(layer, layer=number)
            for part, found in zip(self._parts, figures, strict=True)
            for number, layer in zip(part.numbers, found.layers, strict=True)
        ]
        return vars(total_of(figures)) | {"layers": tuple(sorted(layers, key=lambda x: x.layer))}

    def _by_layer(self, rows: list[torch.Tensor]) -> torch.Tensor:
        """Return rows of all parts as rows by layer, on the host."""
        return torch.cat([part_L.cpu() for part_L in rows])[self._order_L]

    def status(self) -> str:
        """Return one line for a long run: hits, traffic, stalls. Does not stop the device."""
        return status_line(self.metrics(wait=False))

    def reset_metrics(self) -> None:
        """Set all counts and timers to zero; residency, affinity and activations stay."""
        for part in self._parts:
            part.reset_metrics()
        if self._auditor is not None:
            with self._parts[0].offloader.lock:
                self._auditor.reset()

    def control(self) -> list[Control]:
        """Return what the controller of each layer is doing under an adaptive policy. Synchronises."""
        names = ("control_LP", "control_state_LS", "strength_L")
        rows = [self._by_layer([getattr(state, name) for state in self.states]) for name in names]
        return control_reports(*rows)

    def audit(self) -> Audit:
        """Return what the audit of swaps has found so far. Synchronises.

        Raises:
            RuntimeError: Attached without ``audit``.
        """
        if self._auditor is None:
            raise RuntimeError("no swap is audited: attach(..., audit=0.01)")
        with self._parts[0].offloader.lock:
            return self._auditor.report()

    def save_residency(self, path: str | Path) -> None:
        """Write who is resident and how hot each expert is, for ``residency=`` of a later start.

        The file appears whole or not at all (safetensors). Synchronises, and waits for a forward
        on another thread.

        Raises:
            FileNotFoundError: No folder to write it to.
            RuntimeError: Detached or closed.
        """
        with self._parts[0].offloader.lock:
            kept = Residency.joined(
                [(part.numbers, Residency.of(part.offloader)) for part in self._parts]
            )
        kept.save(path)

    def __enter__(self) -> "AttachedMoE":
        return self

    def __exit__(self, *exc_info) -> None:
        if self._attached:
            (self.close if self._loaded else self.detach)()

    def __repr__(self) -> str:
        sizes = f"{len(self.gates)} layers of {self.gates[0].num_experts} experts"
        if self._attached:
            sizes = "; ".join(self._sizes_of(part) for part in self._parts)
        return (
            f"AttachedMoE({type(self.model).__name__}, {self._status}, {sizes}, "
            f"policy={self.gates[0].policy})"
        )

    def _sizes_of(self, part: DevicePart) -> str:
        layers, experts = part.state.num_layers, part.state.num_experts
        where = f" on {part.device}" if len(self._parts) > 1 else ""
        slots = f"{part.offloader.num_slots} of {experts} experts resident per layer"
        if part.offloader.is_pool:
            slots = f"a pool of {part.offloader.num_slots} for {layers * experts} experts"
        return f"{layers} layers{where}, {slots}"


def refuse_closed(*_, **__):
    """Stand in for what a closed model cannot do any more."""
    raise RuntimeError("this model was closed and its expert weights freed: load it again")
