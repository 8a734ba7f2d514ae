"""Which numbers of slots per layer are tuned for."""

from collections.abc import Sequence

from torch import nn

from ..huggingface.attached import AttachedMoE
from ..huggingface.blocks import find_blocks
from ..huggingface.budget import memory_needs, parse_bytes, slots_of_share
from ..huggingface.experts import ATTRIBUTE
from ..huggingface.weights import common_layout
from ..offload import ExpertLayout
from ..offload.offloader import STAGING_SLOTS
from ..offload.slots import check_slots


def expert_layout(model: nn.Module | AttachedMoE) -> tuple[ExpertLayout, int]:
    """Return the layout of an expert and the experts per layer of a model or a handle.

    Raises:
        ValueError: An unknown family, or an attached model without its handle.
    """
    if isinstance(model, AttachedMoE):
        return model.offloader.store.layout, model.state.num_experts
    blocks = find_blocks(model)
    if any(ATTRIBUTE in block.experts.__dict__ for block in blocks):
        raise ValueError(
            "model is attached: give the handle that attach() or load() returned, or detach()"
        )
    return common_layout(blocks, on_meta=True)


def slot_counts(
    model: nn.Module | AttachedMoE,
    slots: int | Sequence[int] | None = None,
    resident: float | int | None = None,
    gpu_memory: int | str | None = None,
    context_tokens: int = 4096,
) -> list[int]:
    """Return the slots per layer to try, ascending; the arguments are :func:`moe_gpu.tune`'s.

    Args:
        model: As there; its weights may be on the meta device.
        slots: See there, as for the others.
        resident: See there.
        gpu_memory: See there. Of a pool, what is each layer's share, rounded down.
        context_tokens: See there.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: More than one of the three, or slots outside [K, E].
    """
    given = {"slots": slots, "resident": resident, "gpu_memory": gpu_memory}
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) > 1:
        raise ValueError(f"give at most one of slots, resident and gpu_memory, got {given}")
    layout, E = expert_layout(model)
    module = model.model if isinstance(model, AttachedMoE) else model
    blocks = find_blocks(module)
    K = blocks[0].router.top_k
    if gpu_memory is not None:
        needs = memory_needs(module, blocks, layout, context_tokens, STAGING_SLOTS)
        sizes = [needs.split(parse_bytes("gpu_memory", gpu_memory), E, K).per_layer]
    elif resident is not None:
        sizes = [slots_of_share(resident, E)]
    elif slots is not None:
        several = isinstance(slots, Sequence) and not isinstance(slots, str)
        sizes = list(slots) if several else [slots]
        if not sizes:
            raise ValueError("slots must be a number or several, got none")
        for count in sizes:
            check_slots(count, E)
    else:
        sizes = [size for size in (K, E // 4, E // 2, 3 * E // 4) if K <= size < E] or [E]
    if min(sizes) < K:
        raise ValueError(
            f"slots must hold the {K} experts of one token in every layer, got {min(sizes)}: with "
            "fewer there is nothing to keep"
        )
    return sorted(set(sizes))
