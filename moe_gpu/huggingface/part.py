"""The MoE layers of a model that compute on one device: gates, state, offloader and weights.

A model on one device is one part. One that transformers' ``device_map`` has split is a part for
each device that holds MoE layers: each with a router state and an offloader of its own, since both
work in the order of one device's stream.

Shape suffixes: L layers of the part, C counters, M meters.
"""

import threading
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from ..gate import MoEGate
from ..metrics import CounterMirror
from ..offload import ExpertOffloader
from ..offload.residency import Residency
from ..policies import Policy
from ..waiting import wait_event
from .audit import LayerAuditor
from .blocks import MoEBlock
from .experts import ATTRIBUTE, ExpertsLayer
from .implementation import own_forward
from .options import Options, SlotChoice
from .router import RoutedForward
from .weights import ExpertWeights, expert_parameters


def device_of(block: MoEBlock) -> torch.device:
    """Return the device that a block's experts are on."""
    return next(iter(expert_parameters(block).values())).device


def split(blocks: Sequence[MoEBlock]) -> list[list[int]]:
    """Return the numbers of the blocks on each device, devices in the order of their first block.

    Raises:
        ValueError: A router on another device than its experts.
    """
    numbers: dict[torch.device, list[int]] = {}
    for number, block in enumerate(blocks):
        device = next(block.experts.parameters()).device
        for parameter in block.router.parameters():
            if parameter.device != device:
                raise ValueError(
                    f"{block.name}: its router is on {parameter.device}, its experts on "
                    f"{device}: put both on one device, as a device_map of whole layers does"
                )
        numbers.setdefault(device_of(block), []).append(number)
    return list(numbers.values())


def policy_of(policy: Policy, numbers: Sequence[int]) -> Policy:
    """Return a policy for some of a model's layers: with their own factors, if it has any."""
    scale_L = getattr(policy, "layer_scale", ())
    if not scale_L:
        return policy
    return replace(policy, layer_scale=tuple(scale_L[number] for number in numbers))


class DevicePart:
    """The MoE layers of a model on one device.

    Attributes:
        numbers: Which of the model's MoE layers they are, ascending.
        blocks, gates: One per layer.
        state: Router state of these layers.
        weights: Their expert weights.
        offloader: Moves them; None until :meth:`take`.
        layers: What each experts module knows about its offloader.
        choice: Slots on the device.
        counters, meters: The state's, as the host last saw them; no meters where none are kept.

    Args:
        numbers: See above.
        blocks: See above.
        gates: See above; they share one state.
        weights: See above.
        choice: See above.
    """

    def __init__(
        self,
        numbers: Sequence[int],
        blocks: list[MoEBlock],
        gates: list[MoEGate],
        weights: ExpertWeights,
        choice: SlotChoice,
    ):
        self.numbers, self.blocks, self.gates, self.weights = list(numbers), blocks, gates, weights
        self.state, self.choice = gates[0].state, choice
        self.offloader: ExpertOffloader | None = None
        self.layers: list[ExpertsLayer] = []
        self.counters = CounterMirror(self.state.counters_LC)
        self.meters = CounterMirror(self.state.meters_LM) if gates[0].meters else None
        self._own_forwards: list[tuple[nn.Module, object]] = []

    @property
    def device(self) -> torch.device:
        """Where the layers compute."""
        return self.state.slot_of_LE.device

    def take(
        self, options: Options, residency: Residency | None, lock: "threading.RLock | None"
    ) -> None:
        """Take the weights out of the model, and put slots in their place.

        Args:
            options: As the user gave them.
            residency: Whom to start with, of these layers; None: the first experts.
            lock: That of the model's other parts, if there is one already.
        """
        self.weights.take(self.device)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # what was taken is of other sizes than the slots
        self.offloader = ExpertOffloader(
            self.state,
            self.weights.store,
            self.choice.slots,
            pool=self.choice.pool,
            staging_slots=self.choice.staging,
            eviction=options.eviction,
            bypass=options.bypass,
            prefetch=options.prefetch,
            prefill=options.prefill,
            stream_prefill=options.stream_prefill,
            verify=options.verify,
            timers=options.timers,
            timeout_s=options.timeout_s,
            link_gbps=options.link_gbps,
            weights_L=self.weights.slots(),
        )
        if lock is not None:  # a forward holds all parts at once
            self.offloader.lock = lock
        if options.verify:
            self.weights.store.remember_checksums()
        if residency is None:
            self.offloader.fill()
        else:
            residency.restore(self.offloader)
        self.weights.show_slots(self.offloader.views_L)

    def rebind(self, options: Options, audits: Sequence[LayerAuditor | None]) -> None:
        """Route and compute through the gates and the slots from now on.

        Args:
            options: As the user gave them.
            audits: Of each layer.
        """
        for layer, (block, gate) in enumerate(zip(self.blocks, self.gates, strict=True)):
            router, experts = block.router, block.experts
            following = self.blocks[layer + 1] if layer + 1 < len(self.blocks) else None
            here = ExpertsLayer(self.offloader, layer, options.max_policy_tokens, audits[layer])
            routed = RoutedForward(block, gate, here, following)
            self._own_forwards.append((router, router.__dict__.get("forward")))
            router.forward = routed
            self.layers.append(here)
            setattr(experts, ATTRIBUTE, here)

    def remember_own_forwards(self) -> None:
        """Note what ran the experts before, once the model has been switched to ours."""
        for layer, block in zip(self.layers, self.blocks, strict=True):
            layer.own_forward = own_forward(block.experts)

    def wait_until_filled(self, timeout_s: float) -> None:
        """Wait for the slots' copies, as after ``model.to()``: compute may follow on any stream."""
        if self.state.slot_of_LE.is_cuda:
            filled = torch.cuda.Event()
            filled.record(torch.cuda.current_stream(self.device))
            wait_event(filled, timeout_s, "the filling of the slots")

    def free_slots(self) -> None:
        """Close the offloader; its figures stay readable."""
        if self.offloader is not None:
            self.offloader.close()
        for layer in self.layers:  # the handle may live on: it must not keep the memory
            layer.weights_S = []

    def let_go(self) -> None:
        """Undo :meth:`rebind`, as far as it got."""
        for router, own in self._own_forwards:
            if own is None:
                router.__dict__.pop("forward", None)
            else:
                router.forward = own
        for block in self.blocks:
            block.experts.__dict__.pop(ATTRIBUTE, None)

    def set_policy(self, policy: Policy) -> None:
        """Route by another policy, given for the whole model."""
        for gate in self.gates:
            gate.policy = policy_of(policy, self.numbers)

    def reset_metrics(self) -> None:
        """Set all counts to zero."""
        for gate in self.gates:
            gate.reset_metrics()
        self.offloader.reset_metrics()
        self.counters.reset()
        if self.meters is not None:
            self.meters.reset()
