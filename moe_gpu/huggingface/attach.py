"""Attach the gate and the offloader to a transformers model, and detach them again."""

import itertools
from typing import Literal

import torch
from torch import nn

from ..gate import MoEGate
from ..latency import summarize_us
from ..metrics import Metrics, routing_counts
from ..offload import EvictionPolicy, ExpertOffloader, HostStore
from ..offload.eviction import eviction_policy
from ..offload.slots import check_slots, warn_few_slots
from ..policies import MassBudget, Policy
from ..state import RouterState
from .budget import memory_needs, parse_bytes, slots_of_share
from .experts import ATTRIBUTE, ExpertsLayer, switch_off, switch_on
from .families import MoEBlock, find_blocks
from .router import RoutedForward
from .weights import ExpertWeights, common_layout


class AttachedMoE:
    """A model whose routers are gates and whose experts live in slots; made by :func:`attach`.

    As a context manager it detaches at the end.

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
        store: HostStore,
        own_device: torch.device,
    ):
        self.model, self.gates, self.state = model, gates, gates[0].state
        self.offloader: ExpertOffloader | None = None
        self._blocks, self._own_device = blocks, own_device
        self._weights = ExpertWeights(model, blocks, store)
        self._configs = []
        self._own_forwards: list[tuple[nn.Module, object]] = []
        self._attached = False

    def _attach(self, slots: int, eviction: EvictionPolicy, timers: bool) -> None:
        """Change the model. Undoes everything if any of it fails."""
        try:
            self._weights.take()
            self.offloader = ExpertOffloader(
                self.state, self._weights.store, slots, eviction=eviction, timers=timers
            )
            self.offloader.fill()
            self._weights.show_slots(self.offloader.views_L)
            self._move_to(self.state.slot_of_LE.device)
            for layer, (block, gate) in enumerate(zip(self._blocks, self.gates, strict=True)):
                router, experts = block.router, block.experts
                routed = RoutedForward(block, gate, self.offloader.views_L[layer])
                self._own_forwards.append((router, router.__dict__.get("forward")))
                router.forward = routed
                setattr(experts, ATTRIBUTE, ExpertsLayer(self.offloader, layer))
            self._configs = switch_on(self.model)
        except BaseException:
            self._undo()
            raise
        self._attached = True

    def _undo(self) -> None:
        """Take back what :meth:`_attach` did, as far as it got; can be called again.

        What can fail comes first: while weights are missing, the routers refuse to compute.
        """
        if self.offloader is not None:
            self.offloader.close()
        self._weights.give_back()
        self._move_to(self._own_device)
        for router, own in self._own_forwards:
            if own is None:
                router.__dict__.pop("forward", None)
            else:
                router.forward = own
        for block in self._blocks:
            block.experts.__dict__.pop(ATTRIBUTE, None)
        switch_off(self._configs)

    def _move_to(self, device: torch.device) -> None:
        if any(tensor.device != device for tensor in self.model.parameters()):
            self.model.to(device)

    def detach(self) -> None:
        """Give the model back as it was: weights, devices, forwards, saving. Frees the slots.

        Raises:
            RuntimeError: Already detached.
        """
        if not self._attached:
            raise RuntimeError("this model is already detached")
        self._undo()
        self._attached = False

    def set_policy(self, policy: Policy) -> None:
        """Route by another policy from now on; no weights move.

        Raises:
            TypeError: Not a policy.
        """
        if not isinstance(policy, Policy):
            raise TypeError(f"policy must be Exact, CacheBonus or MassBudget, got {policy!r}")
        for gate in self.gates:
            gate.policy = policy

    def metrics(self) -> Metrics:
        """Return what routing and offloading have done so far. Synchronises."""
        offload = self.offloader.metrics()
        latencies_us = itertools.chain.from_iterable(gate.latencies_us() for gate in self.gates)
        return Metrics(
            **routing_counts(self.state.counters_LC),
            **summarize_us(list(latencies_us)),
            loads=offload.loads,
            bytes_loaded=offload.bytes_loaded,
            evictions=offload.evictions,
            waves=offload.waves,
            superseded=offload.superseded,
            stall_ms=offload.stall_ms,
            route_path=self.gates[0].last_route_path,
        )

    def reset_metrics(self) -> None:
        """Set all counts and timers to zero; residency, affinity and activations stay."""
        for gate in self.gates:
            gate.reset_metrics()
        self.offloader.reset_metrics()

    def __enter__(self) -> "AttachedMoE":
        return self

    def __exit__(self, *exc_info) -> None:
        if self._attached:
            self.detach()

    def __repr__(self) -> str:
        layers, experts = self.state.num_layers, self.state.num_experts
        status = "attached" if self._attached else "detached"
        return (
            f"AttachedMoE({type(self.model).__name__}, {status}, {layers} layers, "
            f"{self.offloader.num_slots} of {experts} experts resident, "
            f"policy={self.gates[0].policy})"
        )


def attach(
    model: nn.Module,
    *,
    slots: int | None = None,
    resident: float | int | None = None,
    gpu_memory: int | str | None = None,
    context_tokens: int = 4096,
    policy: Policy = MassBudget(0.05),  # noqa: B008 - frozen dataclass
    eviction: Literal["affinity", "lru"] | EvictionPolicy = "affinity",
    device: torch.device | str | None = None,
    decay: float = 0.99,
    boost: float = 1.0,
    max_score: float = 1.0,
    affinity_from: Literal["demand", "executed"] = "demand",
    max_policy_tokens: int = 64,
    timers: bool = False,
) -> AttachedMoE:
    """Route a transformers MoE model through gates, with part of its experts on the device.

    The expert weights move to host memory (page-locked for CUDA), S experts of each layer stay in
    slots on the device. The model's own objects stay: ``generate``, ``output_router_logits``,
    ``state_dict`` and ``save_pretrained`` work while attached (the last two copy the full weights
    in host memory). For inference: the experts have no backward pass.

    Exactly one of ``slots``, ``resident`` and ``gpu_memory`` says how many experts stay.

    Args:
        model: A ``PreTrainedModel`` with MoE layers of a known family, all on one device.
        slots: Experts per layer on the device, in [1, E].
        resident: The same as a share of E in (0, 1], rounded down, or as an int.
        gpu_memory: Bytes, or text such as ``"20GiB"``, for all of: dense weights, KV cache of
            ``context_tokens``, workspace, slots.
        context_tokens: Sequence length that ``gpu_memory`` makes room for.
        policy: How far routing may move towards resident experts.
        eviction: Who leaves when a slot is needed: ``"affinity"``, ``"lru"`` or an object with
            ``rank`` (:class:`~moe_gpu.offload.eviction.EvictionPolicy`).
        device: Where the model computes; it moves there. Default: where it is.
        decay: See :class:`~moe_gpu.gate.MoEGate`, as for the four below.
        boost: Affinity added to a chosen expert.
        max_score: Affinity clamp.
        affinity_from: What ages the affinity.
        max_policy_tokens: Calls with more tokens route exactly.
        timers: Measure route latency and, on CUDA, stalls.

    Returns:
        The handle: metrics, policy, detach.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: No MoE layer, an unknown family, or an argument outside its bounds.
        RuntimeError: Already attached.

    Example:
        >>> moe = moe_gpu.attach(model, slots=4)
        >>> model.generate(**inputs)
        >>> moe.metrics().hit_rate
        >>> moe.detach()
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a transformers PreTrainedModel, got {model!r}")
    blocks = find_blocks(model)
    if not hasattr(model, "set_experts_implementation"):
        raise TypeError(f"model must be a transformers PreTrainedModel, got {type(model).__name__}")
    if any(ATTRIBUTE in block.experts.__dict__ for block in blocks):
        raise RuntimeError("model is already attached: detach() it first")
    layout, num_experts = common_layout(blocks)
    own_device = _only_device(model)

    given = {"slots": slots, "resident": resident, "gpu_memory": gpu_memory}
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) != 1:
        raise ValueError(f"give exactly one of slots, resident and gpu_memory, got {given}")
    if resident is not None:
        slots = slots_of_share(resident, num_experts)
    elif gpu_memory is not None:
        needs = memory_needs(model, blocks, layout, context_tokens)
        slots = needs.slots_within(parse_bytes("gpu_memory", gpu_memory), num_experts)
    check_slots(slots, num_experts)
    eviction = eviction_policy(eviction)
    device = own_device if device is None else torch.device(device)

    # tensors made in inference mode could not be written outside it
    with torch.inference_mode(False), torch.no_grad():
        state = RouterState(len(blocks), num_experts, device=device)
        gates = [
            MoEGate(
                num_experts=num_experts,
                top_k=block.router.top_k,
                policy=policy,
                renormalize=block.family.renormalize(block.router),
                decay=decay,
                boost=boost,
                max_score=max_score,
                affinity_from=affinity_from,
                max_policy_tokens=max_policy_tokens,
                state=state,
                layer=layer,
                timers=timers,
            )
            for layer, block in enumerate(blocks)
        ]
        device = state.slot_of_LE.device  # "cuda" has an index now
        store = HostStore(layout, len(blocks), num_experts, device)
        moe = AttachedMoE(model, blocks, gates, store, own_device)
        moe._attach(slots, eviction, timers)
    if slots < gates[0].top_k:
        warn_few_slots(slots, gates[0].top_k)
    return moe


def _only_device(model: nn.Module) -> torch.device:
    """Return the device that the whole model is on."""
    devices = {tensor.device for tensor in itertools.chain(model.parameters(), model.buffers())}
    if len(devices) != 1:
        names = ", ".join(sorted(str(device) for device in devices))
        raise ValueError(f"model must be on one device, got {names}")
    return devices.pop()
