"""What ``attach`` and ``load`` can be asked for, checked before anything changes."""

import difflib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal, NamedTuple

from transformers import PreTrainedModel

from ..bounds import check_share
from ..gate import MoEGate
from ..offload import EvictionPolicy, ExpertLayout
from ..offload.eviction import DEFAULT, eviction_policy
from ..offload.offloader import STAGING_SLOTS, check_timeout
from ..offload.prefetch import check_predictors
from ..offload.slots import check_slots
from ..policies import Policy, QualityBudget
from .blocks import MoEBlock
from .budget import (
    MemoryNeeds,
    check_context_tokens,
    memory_needs,
    parse_bytes,
    slots_of_share,
)


def refuse_unknown(function: Callable, given: Iterable[str]) -> None:
    """Refuse keyword arguments that are neither a function's own nor options.

    Raises:
        TypeError: Names the first of them, and the argument that was probably meant.
    """
    own = inspect.signature(function).parameters.values()
    known = {parameter.name for parameter in own if parameter.kind is parameter.KEYWORD_ONLY}
    known |= {field.name for field in fields(Options)}
    for name in sorted(set(given) - known):
        nearest = difflib.get_close_matches(name, sorted(known), n=1)
        hint = f": did you mean {nearest[0]!r}?" if nearest else ""
        verb = function.__name__
        raise TypeError(f"{verb}() got an unexpected keyword argument {name!r}{hint}")


class SlotChoice(NamedTuple):
    """Slots on the device."""

    slots: int  # per layer, or of the pool in all
    pool: bool
    staging: int  # slots that experts pass through


@dataclass(frozen=True, kw_only=True)
class Options:
    """Keyword arguments of :func:`moe_gpu.attach`, where they are described.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: An argument outside its bounds.
    """

    slots: int | None = None
    resident: float | int | None = None
    gpu_memory: int | str | None = None
    context_tokens: int = 4096
    pool: bool | None = None
    staging_slots: int | None = None
    pinned_memory: int | str | None = None
    policy: Policy = QualityBudget(0.05)  # noqa: RUF009 - frozen dataclass
    eviction: str | EvictionPolicy = DEFAULT
    bypass: bool = True
    prefetch: Iterable[str] = ()
    prefill: Literal["last", "warm", "keep"] = "last"
    stream_prefill: bool = True
    residency: str | Path | None = None
    decay: float = 0.98
    boost: float = 0.02
    max_score: float = 1.0
    affinity_from: Literal["demand", "served", "executed"] = "served"
    max_policy_tokens: int = 64
    verify: bool = False
    timers: bool = False
    meters: bool = False
    audit: float | None = None
    timeout_s: float = 60.0
    link_gbps: float | None = None

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in ("slots", "resident", "gpu_memory")}
        given = {name: value for name, value in given.items() if value is not None}
        if len(given) != 1:
            raise ValueError(f"give exactly one of slots, resident and gpu_memory, got {given}")
        if self.gpu_memory is not None:
            parse_bytes("gpu_memory", self.gpu_memory)
        _ = self.pinned_bytes
        check_context_tokens(self.context_tokens)
        if self.prefill not in ("last", "warm", "keep"):
            raise ValueError(f"prefill must be 'last', 'warm' or 'keep', got {self.prefill!r}")
        staging = self.staging_slots
        if staging is not None and (
            not isinstance(staging, int) or isinstance(staging, bool) or staging < 0
        ):
            raise ValueError(f"staging_slots must be an int >= 0, got {staging!r}")
        for name in ("pool", "bypass", "stream_prefill", "verify", "timers", "meters"):
            value = getattr(self, name)
            if not isinstance(value, bool) and not (name == "pool" and value is None):
                raise TypeError(f"{name} must be True or False, got {value!r}")
        if self.audit is not None:
            check_share("audit", self.audit)
        if self.link_gbps is not None and not self.link_gbps > 0:
            raise ValueError(f"link_gbps must be > 0, got {self.link_gbps!r}")
        eviction_policy(self.eviction)
        check_timeout(self.timeout_s)
        # may be an iterator, of which nothing would be left
        object.__setattr__(self, "prefetch", check_predictors(self.prefetch))
        # the gate's own checks, here already: weights may have to be downloaded before there is one
        one_layer = replace(self.policy, layer_scale=()) if self._is_scaled else self.policy
        MoEGate(num_experts=1, top_k=1, **self.of_gates() | {"policy": one_layer})

    @property
    def _is_scaled(self) -> bool:
        return bool(getattr(self.policy, "layer_scale", ()))

    @property
    def pinned_bytes(self) -> int | None:
        """Return ``pinned_memory`` in bytes, None if it is not given."""
        if self.pinned_memory is None:
            return None
        return parse_bytes("pinned_memory", self.pinned_memory, minimum=0)

    def of_gates(self) -> dict[str, object]:
        """Return the ones that are keyword arguments of :class:`~moe_gpu.gate.MoEGate`."""
        return {
            "policy": self.policy,
            "decay": self.decay,
            "boost": self.boost,
            "max_score": self.max_score,
            "affinity_from": self.affinity_from,
            "max_policy_tokens": self.max_policy_tokens,
            "timers": self.timers,
            "meters": self.meters,
        }

    @property
    def most_staging(self) -> int:
        """Return the staging slots that are made unless every expert has a slot."""
        return STAGING_SLOTS if self.staging_slots is None else self.staging_slots

    def is_all_resident(self, choice: "SlotChoice", num_experts: int) -> bool:
        """Return whether the parameters can be the slots: one of its own for every expert.

        Not with ``verify``, which compares with a copy.
        """
        return not choice.pool and choice.slots == num_experts and not self.verify

    def choose_slots(
        self, model: PreTrainedModel, blocks: list[MoEBlock], layout: ExpertLayout, num_experts: int
    ) -> SlotChoice:
        """Return how many slots there are and who shares them.

        Args:
            model: The model; its weights may be on the meta device.
            blocks: Its MoE blocks.
            layout: Of their experts.
            num_experts: Experts per layer E.

        Raises:
            TypeError: Slots that are no number.
            ValueError: Slots outside their bounds, or a budget that is too small.
        """
        L, E, top_k = len(blocks), num_experts, blocks[0].router.top_k
        if self.gpu_memory is not None:
            needs = memory_needs(model, blocks, layout, self.context_tokens, self.most_staging)
            return self._within(parse_bytes("gpu_memory", self.gpu_memory), E, top_k, needs)
        if self.resident is not None:
            per_layer = slots_of_share(self.resident, E)
            is_share = isinstance(self.resident, float)
            total = max(1, int(self.resident * E * L + 1e-9)) if is_share else per_layer * L
        else:
            check_slots(self.slots, E)
            per_layer, total = self.slots, self.slots * L
        pool = per_layer < min(2 * top_k, E) if self.pool is None else self.pool
        staging = 0 if per_layer == E else self.most_staging
        return SlotChoice(total if pool else per_layer, pool, staging)

    def _within(self, gpu_memory: int, E: int, top_k: int, needs: MemoryNeeds) -> SlotChoice:
        budget = needs.split(gpu_memory, E, top_k)
        pool = budget.pool if self.pool is None else self.pool
        staging = self.most_staging if budget.staging else 0
        if pool:
            total = (gpu_memory - needs.beside_slots - budget.staging) // needs.expert
            return SlotChoice(min(total, E * needs.layers), True, staging)
        return SlotChoice(needs.slots_within(gpu_memory, E), False, staging)
