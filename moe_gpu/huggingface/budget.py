"""How many slots per layer: from a count, from a share of the experts, or from bytes."""

import math
import re
from dataclasses import dataclass
from decimal import Decimal
from typing import NoReturn

from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ..offload import ExpertLayout
from ..offload.slots import check_slots
from .blocks import MoEBlock

_UNITS = {"B": 1}
for _power, _prefix in enumerate("KMGT", start=1):
    _UNITS |= {f"{_prefix}B": 1000**_power, f"{_prefix}IB": 1024**_power}


def parse_bytes(name: str, amount: int | str, minimum: int = 1) -> int:
    """Return a number of bytes from an int or from text such as ``"20GiB"`` or ``"512 MB"``.

    Args:
        name: Of the argument, for the refusal.
        amount: The number or the text. ``"0"`` needs no unit.
        minimum: Least amount accepted.

    Raises:
        TypeError: Neither an int nor text.
        ValueError: Text that is not a number and a unit, or an amount below the minimum.
    """
    if isinstance(amount, str) and amount.strip() == "0":
        num_bytes = 0
    elif isinstance(amount, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", amount)
        if match is None:
            raise ValueError(f'{name} must be bytes or text such as "20GiB", got {amount!r}')
        if match[2].upper() not in _UNITS:
            raise ValueError(
                f"{name} needs a unit (B, kB, MB, GB, KiB, MiB, GiB, ...), "
                f'as in "20GiB", got {amount!r}'
            )
        num_bytes = int(Decimal(match[1]) * _UNITS[match[2].upper()])
    elif isinstance(amount, int) and not isinstance(amount, bool):
        num_bytes = amount
    else:
        raise TypeError(f'{name} must be an int or text such as "20GiB", got {amount!r}')
    if num_bytes < minimum:
        raise ValueError(f"{name} must be >= {minimum} bytes, got {amount!r}")
    return num_bytes


@dataclass(frozen=True, kw_only=True)
class SlotBudget:
    """The slots that fit into a budget.

    Attributes:
        total: Slots in all, staging slots not counted.
        layers: MoE layers that they serve.
        pool: One pool over all layers, because fewer than two tokens' experts fit per layer; else
            every layer has as many of its own.
        staging: Bytes of the staging slots; 0 where every expert has a slot.
    """

    total: int
    layers: int
    pool: bool
    staging: int

    @property
    def per_layer(self) -> int:
        """Return the slots of each layer; of a pool, its share rounded down."""
        return self.total // self.layers


@dataclass(frozen=True, kw_only=True)
class MemoryNeeds:
    """What a model asks of the device, in bytes.

    Attributes:
        dense: Weights and buffers that are not experts.
        kv_cache: Keys and values of one sequence.
        workspace: Activations of a prefill in one call, and the logits of its last token. An
            estimate, untuned.
        slot: One slot in every MoE layer.
        context_tokens: What ``kv_cache`` and ``workspace`` are counted for.
        staging: Slots that experts pass through without displacing others.
        layers: MoE layers.
    """

    dense: int
    kv_cache: int
    workspace: int
    slot: int
    context_tokens: int
    staging: int = 0
    layers: int = 1

    @property
    def expert(self) -> int:
        """Return the bytes of one slot."""
        return self.slot // self.layers

    @property
    def beside_slots(self) -> int:
        """Return what is needed apart from slots and staging slots."""
        return self.dense + self.kv_cache + self.workspace

    def slots_within(self, gpu_memory: int, num_experts: int) -> int:
        """Return the slots per layer, at most E, that fit into a budget.

        Raises:
            ValueError: Not even one fits; states each part.
        """
        left = gpu_memory - self.beside_slots
        if left >= num_experts * self.slot:  # nothing ever passes through a staging slot
            return num_experts
        left -= self.staging
        if left < self.slot:
            self._refuse(gpu_memory, "one expert slot in every layer", self.slot)
        return left // self.slot

    def split(self, gpu_memory: int, num_experts: int, top_k: int) -> SlotBudget:
        """Return the slots that fit, a pool over layers where fewer than 2K per layer do.

        Args:
            gpu_memory: Bytes for all of: dense weights, KV cache, workspace, staging slots, slots.
            num_experts: Experts per layer E.
            top_k: Experts per token K.

        Raises:
            ValueError: Not even one slot fits; states each part.
        """
        left = gpu_memory - self.beside_slots
        if left >= num_experts * self.slot:
            total = num_experts * self.layers
            return SlotBudget(total=total, layers=self.layers, pool=False, staging=0)
        left -= self.staging
        if left < self.expert:
            self._refuse(gpu_memory, "one expert slot", self.expert)
        total, pool = left // self.expert, True
        if total // self.layers >= 2 * top_k:
            total, pool = total // self.layers * self.layers, False
        return SlotBudget(total=total, layers=self.layers, pool=pool, staging=self.staging)

    def _refuse(self, gpu_memory: int, what: str, size: int) -> NoReturn:
        staging = f"staging slots {self.staging:,}, " if self.staging else ""
        raise ValueError(
            f"gpu_memory={gpu_memory:,} bytes is too small: dense weights take {self.dense:,}, "
            f"the KV cache of {self.context_tokens:,} tokens {self.kv_cache:,}, workspace "
            f"{self.workspace:,}, {staging}and {what} {size:,}: "
            f"{self.beside_slots + self.staging + size:,} in all"
        )


def memory_needs(
    model,
    blocks: list[MoEBlock],
    layout: ExpertLayout,
    context_tokens: int,
    staging_slots: int = 0,
) -> MemoryNeeds:
    """Count what a transformers model needs on the device beside its expert slots.

    Args:
        model: A ``PreTrainedModel``, not attached; its weights may be on the meta device.
        blocks: Its MoE blocks.
        layout: Of their experts: down_proj holds D x F.
        context_tokens: Length of the one sequence to make room for, ``>= 1``.
        staging_slots: Device slots beside the ones that keep experts.
    """
    check_context_tokens(context_tokens)
    config = model.config.get_text_config()
    experts = {id(p) for block in blocks for p in block.experts.parameters()}
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}  # tied ones once
    dense = sum(t.nbytes for key, t in tensors.items() if key not in experts)

    item, D = model.dtype.itemsize, config.hidden_size
    F = math.prod(layout.fields["down_proj"].shape) // D  # some are transposed
    # hidden states and attention; gathered pairs, their outputs twice and weighted in float32;
    # the widest expert, which all tokens may visit
    token = 6 * D * item + blocks[0].router.top_k * D * (3 * item + 4) + 3 * F * item
    workspace = context_tokens * token + config.vocab_size * 4
    return MemoryNeeds(
        dense=dense,
        kv_cache=kv_cache_bytes(model, context_tokens),
        workspace=workspace,
        slot=len(blocks) * layout.expert_bytes,
        context_tokens=context_tokens,
        staging=staging_slots * layout.expert_bytes,
        layers=len(blocks),
    )


def kv_cache_bytes(model, context_tokens: int) -> int:
    """Count the keys and values of one sequence, as the model's cache keeps them.

    Latents count where those are kept (MLA), the window where attention slides. The states of
    layers without attention, which do not grow, are left out.
    """
    config = model.config.get_text_config()
    width_of = {}
    for module in model.modules():
        width = _kv_width(module)
        if width is not None:
            width_of[module.layer_idx] = width
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    default = 2 * head_dim * (getattr(config, "num_key_value_heads", None) or heads)
    elements = 0
    for index, layer in enumerate(DynamicCache(config=config).layers):
        if isinstance(layer, DynamicLayer):  # others keep no keys
            tokens = min(context_tokens, getattr(layer, "sliding_window", None) or context_tokens)
            elements += tokens * width_of.get(index, default)
    return elements * model.dtype.itemsize


def _kv_width(module) -> int | None:
    """Return what an attention module caches per token, in elements; None for other modules."""
    projections = getattr(module, "_modules", {})
    if getattr(module, "layer_idx", None) is None:
        return None
    if "kv_a_proj_with_mqa" in projections:
        indexer = projections.get("indexer")  # of sparse attention, whose keys are cached too
        return module.kv_a_proj_with_mqa.out_features + getattr(indexer, "head_dim", 0)
    if "k_proj" in projections and "v_proj" in projections:
        return module.k_proj.out_features + module.v_proj.out_features
    return None


def check_context_tokens(context_tokens: int) -> None:
    """Refuse a length of the sequence to make room for that is not an int >= 1."""
    if not isinstance(context_tokens, int) or isinstance(context_tokens, bool):
        raise TypeError(f"context_tokens must be an int, got {context_tokens!r}")
    if context_tokens < 1:
        raise ValueError(f"context_tokens must be >= 1, got {context_tokens}")


def slots_of_share(resident: float | int, num_experts: int) -> int:
    """Return the slots per layer for a share of the experts in (0, 1], or for an int of them.

    A share rounds down, but never below one slot.
    """
    if isinstance(resident, int) and not isinstance(resident, bool):
        check_slots(resident, num_experts, "resident")
        return resident
    if not isinstance(resident, float):
        raise TypeError(f"resident must be a share in (0, 1] or an int, got {resident!r}")
    if not 0 < resident <= 1:  # NaN fails too
        raise ValueError(f"resident must be a share in (0, 1] or an int, got {resident}")
    return max(1, math.floor(resident * num_experts + 1e-9))  # 0.29 * 100 is 28.999...
