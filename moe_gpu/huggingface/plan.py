"""What fits where, from the config of a model alone.

    misses per token = (1 - hit_rate) * K * L
    tokens/s        <= bandwidth / (misses per token * expert_bytes)

The bounds count bytes and bandwidths only: no latency, no compute, one sequence.

K experts per token, L MoE layers, E experts per layer.
"""

import math
import warnings
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from ..offload.offloader import STAGING_SLOTS
from ..offload.tiers import Tier, available_memory, host_budget, place
from .blocks import find_blocks
from .budget import MemoryNeeds, SlotBudget, memory_needs, parse_bytes
from .checkpoint import check_quantization, config_dtype, meta_model, read_config
from .weights import common_layout

DTYPES = ("auto", "bfloat16", "float16", "float32")


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """What is planned for.

    Attributes:
        model_type: As the config names it.
        dtype: Of all weights and of the KV cache.
        moe_layers: L.
        num_experts: E.
        top_k: K.
        expert_bytes: One expert, as it lies in a slot.
        experts_bytes: All of them.
    """

    model_type: str
    dtype: str
    moe_layers: int
    num_experts: int
    top_k: int
    expert_bytes: int
    experts_bytes: int


@dataclass(frozen=True, kw_only=True)
class DevicePlan:
    """Device memory. All from ``slots`` on is None without a budget.

    Attributes:
        dense_bytes: Weights and buffers that are not experts.
        kv_cache_bytes: Keys and values of one sequence of ``context_tokens``.
        workspace_bytes: Activations of its prefill; an estimate.
        context_tokens: See above.
        everything_resident_bytes: A budget with which no expert ever moves.
        gpu_memory: The budget: for the three above, staging slots and slots.
        slots: Slots in all.
        slots_per_layer: Of each layer; of a pool, its share rounded down.
        pool: Whether the slots are one pool over all layers.
        slots_bytes: Of all slots.
        staging_bytes: Slots that experts pass through without displacing others.
        unused_bytes: Left of the budget.
    """

    dense_bytes: int
    kv_cache_bytes: int
    workspace_bytes: int
    context_tokens: int
    everything_resident_bytes: int
    gpu_memory: int | None
    slots: int | None = None
    slots_per_layer: int | None = None
    pool: bool | None = None
    slots_bytes: int | None = None
    staging_bytes: int | None = None
    unused_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class HostPlan:
    """Homes of the experts.

    Attributes:
        available_memory: Free on this machine, where defaults come from; None if unknown.
        host_memory: Bytes for experts in host memory.
        pinned_memory: Page-locked part of it.
        experts: Number of experts by tier.
        bytes: The same in bytes.
    """

    available_memory: int | None
    host_memory: int
    pinned_memory: int
    experts: dict[str, int]
    bytes: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What a token moves, and how many tokens the links allow.

    Attributes:
        assumed_hit_rate: As stated.
        hit_rate: As counted: what was assumed, unless the slots allow less, or never miss.
        pairs_per_token: K x L.
        misses_per_token: Experts loaded per token, on average.
        bytes_per_token: Of those.
        disk_bytes_per_token: Part of these that is read from disk, if misses are spread evenly
            over all homes.
        link_gbps: Assumed bandwidth from host to device, 10^9 bytes/s.
        disk_gbps: Assumed bandwidth of the disk.
        link_tokens_per_s: Upper bound from the link alone; None where nothing moves.
        disk_tokens_per_s: Upper bound from the disk alone; None where nothing is read.
        tokens_per_s: The lower of both, reached where they overlap perfectly.
    """

    assumed_hit_rate: float
    hit_rate: float
    pairs_per_token: int
    misses_per_token: float
    bytes_per_token: int
    disk_bytes_per_token: int
    link_gbps: float
    disk_gbps: float
    link_tokens_per_s: float | None
    disk_tokens_per_s: float | None
    tokens_per_s: float | None


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """What fits where, and what the links allow.

    Attributes:
        model: What is planned for.
        device: Device memory.
        host: Homes of the experts.
        traffic: Per token.
        notes: Sentences for the user.
    """

    model: ModelSizes
    device: DevicePlan
    host: HostPlan
    traffic: Traffic
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, object]:
        """Return every figure by part and name, ready for JSON."""
        return asdict(self) | {"notes": list(self.notes)}


def plan_memory(
    model: str | Path | PreTrainedConfig,
    *,
    gpu_memory: int | str | None = None,
    host_memory: int | str | None = None,
    pinned_memory: int | str | None = None,
    context_tokens: int = 4096,
    dtype: str = "auto",
    hit_rate: float = 0.8,
    link_gbps: float = 25.0,
    disk_gbps: float = 3.0,
) -> MemoryPlan:
    """Plan the memory of a model on a CUDA device from its config; no weights are read.

    Args:
        model: Folder with a ``config.json``, the path of such a file, a hub id, or a config.
        gpu_memory: Bytes, or text such as ``"24GiB"``, for all of: dense weights, KV cache of
            ``context_tokens``, workspace, staging slots, slots. Default: sizes only.
        host_memory: Bytes for experts in host memory. Default: what
            :func:`~moe_gpu.offload.tiers.host_budget` takes on this machine.
        pinned_memory: Page-locked part of it; default as above.
        context_tokens: Length of the one sequence to make room for, ``>= 1``.
        dtype: One of ``DTYPES``; ``"auto"`` is the config's own, else bfloat16.
        hit_rate: Assumed share of routed pairs whose expert is resident, in [0, 1].
        link_gbps: Assumed bandwidth from host to device, 10^9 bytes/s, ``> 0``.
        disk_gbps: Assumed bandwidth of the disk, 10^9 bytes/s, ``> 0``.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: An argument outside its bounds, no such model or one that is not supported, a
            quantized checkpoint, or a budget that is too small.

    Example:
        >>> plan_memory("examples/tiny_mixtral", gpu_memory="16MiB").device.slots_per_layer
    """
    if gpu_memory is not None:
        gpu_memory = parse_bytes("gpu_memory", gpu_memory)
    if host_memory is not None:
        host_memory = parse_bytes("host_memory", host_memory, minimum=0)
    if pinned_memory is not None:
        pinned_memory = parse_bytes("pinned_memory", pinned_memory, minimum=0)
    _check("hit_rate", hit_rate, lambda value: 0 <= value <= 1, "in [0, 1]")
    _check("link_gbps", link_gbps, lambda value: 0 < value < math.inf, "finite and > 0")
    _check("disk_gbps", disk_gbps, lambda value: 0 < value < math.inf, "finite and > 0")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")

    config = model if isinstance(model, PreTrainedConfig) else read_config(model)
    sizes, needs = _count(config, dtype, context_tokens)
    slots, notes = None, []
    if gpu_memory is not None:
        slots = needs.split(gpu_memory, sizes.num_experts, sizes.top_k)
        notes += _slot_notes(slots, sizes, hit_rate)
    host, host_notes = _plan_host(sizes, slots, host_memory, pinned_memory)
    return MemoryPlan(
        model=sizes,
        device=_plan_device(sizes, needs, gpu_memory, slots),
        host=host,
        traffic=_count_traffic(sizes, slots, host, hit_rate, link_gbps, disk_gbps),
        notes=(*notes, *host_notes),
    )


def _check(name, value, is_within, bound):
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not is_within(value):
        raise ValueError(f"{name} must be {bound}, got {value}")


def _count(config, dtype, context_tokens) -> tuple[ModelSizes, MemoryNeeds]:
    check_quantization(config)
    if dtype == "auto":
        dtype = config_dtype(config) or torch.bfloat16
    else:
        dtype = getattr(torch, dtype)
    model = meta_model(config, dtype, attention="eager")  # the config's may not be installed here
    blocks = find_blocks(model)
    layout, num_experts = common_layout(blocks, on_meta=True)
    top_k = blocks[0].router.top_k
    sizes = ModelSizes(
        model_type=config.model_type,
        dtype=str(model.dtype).removeprefix("torch."),
        moe_layers=len(blocks),
        num_experts=num_experts,
        top_k=top_k,
        expert_bytes=layout.expert_bytes,
        experts_bytes=len(blocks) * num_experts * layout.expert_bytes,
    )
    return sizes, memory_needs(model, blocks, layout, context_tokens, STAGING_SLOTS)


def _plan_device(
    sizes: ModelSizes, needs: MemoryNeeds, gpu_memory: int | None, slots: SlotBudget | None
) -> DevicePlan:
    figures = {}
    if slots is not None:
        slots_bytes = slots.total * sizes.expert_bytes
        figures = {
            "slots": slots.total,
            "slots_per_layer": slots.per_layer,
            "pool": slots.pool,
            "slots_bytes": slots_bytes,
            "staging_bytes": slots.staging,
            "unused_bytes": gpu_memory - needs.beside_slots - slots.staging - slots_bytes,
        }
    return DevicePlan(
        dense_bytes=needs.dense,
        kv_cache_bytes=needs.kv_cache,
        workspace_bytes=needs.workspace,
        context_tokens=needs.context_tokens,
        everything_resident_bytes=needs.beside_slots + sizes.experts_bytes,
        gpu_memory=gpu_memory,
        **figures,
    )


def _plan_host(
    sizes: ModelSizes, slots: SlotBudget | None, host_memory, pinned_memory
) -> tuple[HostPlan, list[str]]:
    available = available_memory()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pinned, host = host_budget(
            host_memory, pinned_memory, sizes.experts_bytes, cuda=True, available=available
        )
    tiers_LE = []
    if not _has_all_resident(slots, sizes):  # else the slots are their only home
        tiers_LE = place(
            sizes.moe_layers, sizes.num_experts, sizes.expert_bytes, pinned, host, on_disk=True
        )
    counts = Counter(tier for tiers_E in tiers_LE for tier in tiers_E)
    experts = {tier.value: counts[tier] for tier in Tier}
    plan = HostPlan(
        available_memory=available,
        host_memory=host,
        pinned_memory=pinned,
        experts=experts,
        bytes={tier: count * sizes.expert_bytes for tier, count in experts.items()},
    )
    return plan, [str(warning.message) for warning in caught]


def _has_all_resident(slots: SlotBudget | None, sizes: ModelSizes) -> bool:
    return slots is not None and slots.total == sizes.moe_layers * sizes.num_experts


def _reachable(slots: SlotBudget | None, sizes: ModelSizes) -> float:
    """Return the highest hit rate there can be: a token meets K different experts per layer."""
    if slots is None:
        return 1.0
    return min(1.0, slots.total / (sizes.top_k * sizes.moe_layers))


def _slot_notes(slots: SlotBudget, sizes: ModelSizes, hit_rate: float) -> list[str]:
    pairs, reachable = sizes.top_k * sizes.moe_layers, _reachable(slots, sizes)
    if _has_all_resident(slots, sizes):
        return ["every expert is resident: no expert ever moves"]
    if hit_rate > reachable:
        return [
            f"a hit rate of {hit_rate:.1%} is out of reach: {slots.total:,} slots for the {pairs:,} "
            f"experts of one token allow {reachable:.1%} at most, which is counted with"
        ]
    return []


def _count_traffic(
    sizes: ModelSizes,
    slots: SlotBudget | None,
    host: HostPlan,
    assumed: float,
    link_gbps: float,
    disk_gbps: float,
) -> Traffic:
    pairs = sizes.top_k * sizes.moe_layers
    if _has_all_resident(slots, sizes):
        hit_rate = 1.0
    else:
        hit_rate = min(assumed, _reachable(slots, sizes))
    misses = (1 - hit_rate) * pairs
    moved = misses * sizes.expert_bytes
    read = moved * host.bytes[Tier.DISK.value] / sizes.experts_bytes
    link = link_gbps * 1e9 / moved if moved else None
    disk = disk_gbps * 1e9 / read if read else None
    return Traffic(
        assumed_hit_rate=assumed,
        hit_rate=hit_rate,
        pairs_per_token=pairs,
        misses_per_token=misses,
        bytes_per_token=round(moved),
        disk_bytes_per_token=round(read),
        link_gbps=link_gbps,
        disk_gbps=disk_gbps,
        link_tokens_per_s=link,
        disk_tokens_per_s=disk,
        tokens_per_s=min((bound for bound in (link, disk) if bound is not None), default=None),
    )
