"""Attach the gate and the offloader to a transformers model."""

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from ..gate import MoEGate
from ..offload import EvictionPolicy, ExpertLayout, ExpertStore
from ..offload.eviction import DEFAULT
from ..offload.residency import Residency
from ..offload.slots import warn_few_slots
from ..offload.tiers import Tier, available_memory, host_budget, place
from ..policies import Policy, QualityBudget, layer_strengths
from ..state import RouterState
from .attached import AttachedMoE, refuse_closed
from .blocks import MoEBlock, find_blocks, score_arguments
from .experts import ATTRIBUTE
from .options import Options, SlotChoice, refuse_unknown
from .part import DevicePart, device_of, policy_of, split
from .weights import ExpertWeights, ResidentWeights, common_layout, refuse_gradients

# what load() takes beside the arguments of attach()
LOAD_ONLY = frozenset(
    ("dtype", "host_memory", "dequantize", "revision", "cache_dir", "token", "progress")
)


def attach(
    model: nn.Module,
    *,
    slots: int | None = None,
    resident: float | int | None = None,
    gpu_memory: int | str | None = None,
    context_tokens: int = 4096,
    pool: bool | None = None,
    staging_slots: int | None = None,
    pinned_memory: int | str | None = None,
    policy: Policy = QualityBudget(0.05),  # noqa: B008 - frozen dataclass
    eviction: str | EvictionPolicy = DEFAULT,
    bypass: bool = True,
    prefetch: Iterable[str] = (),
    prefill: Literal["last", "warm", "keep"] = "last",
    stream_prefill: bool = True,
    residency: str | Path | None = None,
    device: torch.device | str | None = None,
    decay: float = 0.98,
    boost: float = 0.02,
    max_score: float = 1.0,
    affinity_from: Literal["demand", "served", "executed"] = "served",
    max_policy_tokens: int = 64,
    verify: bool = False,
    timers: bool = False,
    meters: bool = False,
    audit: float | None = None,
    timeout_s: float = 60.0,
    link_gbps: float | None = None,
    **unknown,
) -> AttachedMoE:
    """Route a transformers MoE model through gates, with part of its experts on the device.

    The expert weights move to host memory (page-locked for CUDA as far as ``pinned_memory``
    allows), S experts of each layer stay in slots on the device. The model's own objects stay:
    ``generate``, ``output_router_logits``, ``state_dict`` and ``save_pretrained`` work while
    attached (the last two copy the full weights in host memory). For inference: the experts have
    no backward pass.

    With a slot for every expert (``resident=1.0``; no pool, no ``verify``) nothing moves: the
    model's parameters are the slots, and there is no copy of them. Then the attached model also
    trains, loads a state dict, and compiles (``torch.compile(model, fullgraph=True)``, CUDA
    graphs): wherever a gradient is wanted or a graph is made, the experts run as they would without
    us, on the gate's routing. :meth:`AttachedMoE.detach` leaves what was trained.

    Exactly one of ``slots``, ``resident`` and ``gpu_memory`` says how many experts stay.

    Args:
        model: A ``PreTrainedModel`` with MoE layers of a known family, on one device, or split over
            several by transformers' ``device_map``: each MoE layer then stays where it is.
        slots: Experts per layer on the device, in [1, E].
        resident: The same as a share of E in (0, 1], rounded down, or as an int.
        gpu_memory: Bytes, or text such as ``"20GiB"``, for all of: dense weights, KV cache of
            ``context_tokens``, workspace, staging slots, slots.
        context_tokens: Sequence length that ``gpu_memory`` makes room for.
        pool: One pool of slots for all layers. Default: where there are fewer than 2K per layer.
        staging_slots: Slots beside these that experts pass through without displacing anybody.
            Default: 2, or none where every expert has a slot.
        pinned_memory: Bytes of host memory to page-lock for experts. Default on CUDA: half of
            the free host memory at most.
        policy: How far routing may move towards resident experts.
        eviction: Who leaves when a slot is needed: ``"lru"``, ``"lfu"``, ``"affinity"``,
            ``"affinity_over_age"``, ``"affinity_over_root_age"`` or an object with ``rank``
            (:class:`~moe_gpu.offload.eviction.EvictionPolicy`). The default, with the constants
            below, is what ``profiling/results/eviction.md`` found best.
        bypass: A missing expert that ranks below everybody passes through a staging slot.
        prefetch: Predictors that fetch ahead: any of ``"next_gate"``, ``"background"``,
            ``"affinity"`` (:mod:`moe_gpu.offload.prefetch`).
        prefill: Whom a prefill leaves resident: ``"last"``, what its last tokens wanted;
            ``"warm"``, what most of its tokens used; ``"keep"``, whoever was there.
        stream_prefill: Copy the next layer's experts while a prefill computes the present one.
        residency: File of :meth:`AttachedMoE.save_residency`: start with its experts.
        device: Where the model computes; it moves there. Default: where it is.
        decay: Of the affinity per token, as in :class:`~moe_gpu.gate.MoEGate`.
        boost: Affinity added to a chosen expert; with ``1 - decay`` it is a rate of use that never
            saturates.
        max_score: Affinity clamp.
        affinity_from: What ages the affinity.
        max_policy_tokens: Calls with more tokens route exactly, and count as prefill.
        verify: Compare the checksum of an expert's weights with the stored one at every use. Slow,
            and not for training: a copy of every expert is kept to compare with.
        timers: Measure route latency and, on CUDA, stalls.
        meters: Measure on the device what swaps change (:class:`~moe_gpu.metrics.Metrics`).
        audit: Share of the swaps, in (0, 1], such as 0.01, on which the expert that was wanted is
            later compared with the one that was used (:meth:`AttachedMoE.audit`). Default, and 0:
            off. Keeps up to 64 swaps per layer, two vectors of the model's width each.
        timeout_s: Bound of every wait for a copy, in seconds.
        link_gbps: On the CPU, simulate a link of so many 10^9 bytes per second.
        **unknown: Refused, with what was probably meant.

    Returns:
        The handle: metrics, policy, detach.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: No MoE layer, an unknown family, or an argument outside its bounds.
        RuntimeError: Already attached, or closed.
        MemoryError: The slots do not fit on the device; the model is as it was.

    Example:
        >>> moe = moe_gpu.attach(model, slots=4)
        >>> model.generate(**inputs)
        >>> moe.metrics().hit_rate
        >>> moe.detach()
    """
    options = {n: v for n, v in locals().items() if n not in ("model", "device", "unknown")}
    for name in unknown:
        if name in LOAD_ONLY:
            raise TypeError(f"{name} is an argument of load(), not of attach()")
    refuse_unknown(attach, unknown)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a transformers PreTrainedModel, got {model!r}")
    blocks = find_blocks(model)
    if not hasattr(model, "set_experts_implementation"):
        raise TypeError(f"model must be a transformers PreTrainedModel, got {type(model).__name__}")
    if any(ATTRIBUTE in block.experts.__dict__ for block in blocks):
        raise RuntimeError("model is already attached: detach() it first")
    if any(block.router.__dict__.get("forward") is refuse_closed for block in blocks):
        refuse_closed()
    layout, num_experts = common_layout(blocks)
    refuse_sharded(model, blocks)
    parts = split(blocks)
    own_device = _only_device(model, parts)
    options = Options(**options)
    if own_device is None:
        _check_split(options, device)
    choices = [
        options.choose_slots(model, [blocks[number] for number in numbers], layout, num_experts)
        for numbers in parts
    ]
    layer_strengths(options.policy, len(blocks))
    kept = None
    if residency is not None:
        kept = Residency.load(residency)
        kept.check(len(blocks), num_experts)

    all_resident = all(options.is_all_resident(choice, num_experts) for choice in choices)
    if not all_resident:
        refuse_gradients(blocks)
    # tensors made in inference mode could not be written outside it
    with torch.inference_mode(False), torch.no_grad():
        devices = [
            torch.device(device_of(blocks[numbers[0]]) if device is None else device)
            for numbers in parts
        ]
        tiers_LE = [None] * len(blocks)
        if not all_resident:
            cuda = any(found.type == "cuda" for found in devices)
            tiers_LE = _choose_homes(model, len(blocks), num_experts, layout, cuda, options, kept)
        weigh = ResidentWeights if all_resident else ExpertWeights
        made = []
        for numbers, choice, place_of_part in zip(parts, choices, devices, strict=True):
            own = [blocks[number] for number in numbers]
            gates = make_gates(own, num_experts, options, place_of_part, numbers)
            store = ExpertStore(
                layout,
                len(own),
                num_experts,
                gates[0].state.slot_of_LE.device,
                tiers_LE=None if all_resident else [tiers_LE[number] for number in numbers],
            )
            made.append(DevicePart(numbers, own, gates, weigh(model, own, store), choice))
        moe = AttachedMoE(model, made, own_device)
        moe._attach(options, kept)
    for part in made:
        warn_of_few_slots(part.choice, part.blocks)
    return moe


def _choose_homes(
    model: nn.Module,
    num_layers: int,
    num_experts: int,
    layout: ExpertLayout,
    cuda: bool,
    options: Options,
    kept: Residency | None,
) -> list[list[Tier]]:
    """Return where each expert of a model that is attached has its home."""
    total = num_layers * num_experts * layout.expert_bytes
    pinned = options.pinned_bytes
    if pinned is not None:  # page-locked memory that the CPU computes from would be wasted
        pinned = min(pinned, total) if cuda else 0
    pinned, _ = host_budget(total, pinned, total, cuda=cuda, available=_memory_for(model, total))
    return place(
        num_layers, num_experts, layout.expert_bytes, pinned, total, on_disk=False,
        heat=None if kept is None else kept.heat(),
    )  # fmt: skip


def make_gates(
    blocks: list[MoEBlock],
    num_experts: int,
    options: Options,
    device: torch.device,
    numbers: Sequence[int],
) -> list[MoEGate]:
    """Return a gate per block, all with one new state on the device.

    Args:
        blocks: Of one device.
        num_experts: E.
        options: As the user gave them.
        device: Where they route.
        numbers: Which of the model's MoE layers they are.
    """
    state = RouterState(len(blocks), num_experts, device=device)
    of_gates = options.of_gates()
    of_gates["policy"] = policy_of(options.policy, numbers)
    return [
        MoEGate(
            num_experts=num_experts,
            top_k=block.router.top_k,
            **score_arguments(block),
            state=state,
            layer=layer,
            **of_gates,
        )
        for layer, block in enumerate(blocks)
    ]


def warn_of_few_slots(choice: SlotChoice, blocks: list[MoEBlock]) -> None:
    """Warn the caller's caller where one token alone needs more experts than there are slots."""
    warn_few_slots(
        choice.slots,
        blocks[0].router.top_k,
        layers=len(blocks),
        pool=choice.pool,
        staging_slots=choice.staging,
        stacklevel=4,
    )


def _memory_for(model: nn.Module, expert_bytes: int) -> int | None:
    """Return the host memory that experts can take: weights that are there already may stay."""
    free = available_memory()
    on_host = all(parameter.device.type == "cpu" for parameter in model.parameters())
    return free if free is None or not on_host else free + expert_bytes


def _only_device(model: nn.Module, parts: list[list[int]]) -> torch.device | None:
    """Return the device that the whole model is on; None where a ``device_map`` has split it.

    Raises:
        ValueError: On several devices without a ``device_map``, by which inputs follow.
    """
    devices = {tensor.device for tensor in itertools.chain(model.parameters(), model.buffers())}
    if len(devices) == 1:
        return devices.pop()
    if getattr(model, "hf_device_map", None) is None:
        names = ", ".join(sorted(str(device) for device in devices))
        raise ValueError(
            f"model must be on one device, or be split by from_pretrained(device_map=...), got {names}"
        )
    return None


def _check_split(options: Options, device: torch.device | str | None) -> None:
    """Refuse what has no meaning for a model on several devices."""
    if device is not None:
        raise ValueError(
            f"device={str(device)!r} would move the whole model, which is split over several "
            "devices: leave it out, each MoE layer computes where it is"
        )
    if options.gpu_memory is not None:
        raise ValueError(
            "gpu_memory is for a model on one device: this one is split over several, give slots "
            "or resident, which count for each MoE layer"
        )


def refuse_sharded(model: nn.Module, blocks: list[MoEBlock]) -> None:
    """Refuse a model whose layers are spread over processes.

    Raises:
        ValueError: Tensor or expert parallelism, or sharded data parallelism.
    """
    shards = getattr(model, "_tp_size", None) or 1
    spread = [
        f"{block.name}.experts.{name}"
        for block in blocks
        for name, parameter in block.experts.named_parameters()
        if hasattr(parameter, "device_mesh")  # a DTensor
    ]
    if (
        shards > 1
        or spread
        or any(getattr(block.experts, "_is_expert_parallel", False) for block in blocks)
    ):
        what = f", such as {spread[0]}" if spread else ""
        raise ValueError(
            f"model is sharded over processes{what}: each holds a part of every expert, or of their "
            "number, and attach moves whole ones between one host and its devices. Load it without "
            'tp_plan; over the GPUs of one machine split whole layers with device_map="auto"'
        )
