"""Routing policies: how far the gate may prefer experts that are already on the device.

All of them choose from one family of sets. The executed experts are the router's demand (its
top K) with its lowest-ranked missing experts replaced by the best resident experts outside the
demand; a policy decides how many replacements ("swaps") a token may take. The exact rules are
in :mod:`moe_gpu.kernels.route_ref`.
"""

from dataclasses import dataclass
from typing import Literal

from .adaptive import AdaptiveBonus, HitRateTarget, QualityTarget
from .bounds import check_int, check_real
from .kernels.route_ref import FLOAT32_MAX, Rule


@dataclass(frozen=True)
class Exact:
    """Never swap: the model's own routing."""

    rule = Rule.EXACT
    strength = 0.0
    protect = 0


@dataclass(frozen=True)
class CacheBonus:
    """Add a bonus to the selection score of every resident expert, then take the top K.

    The bonus steers the choice only; mixing weights come from the unbiased scores.

    Attributes:
        bonus: In selection-score units (``scale="absolute"``), or as a fraction of the token's
            score range (``scale="logit_range"``). Finite, ``>= 0``. The unit is a logit, but with a
            correction bias or groups of sigmoids a probability or a sigmoid, in which 0.15 is far
            more: take ``"logit_range"`` there.
        scale: ``"absolute"`` or ``"logit_range"``: bonus x (max - min of the token's finite
            selection scores).
        protect: The first ``protect`` experts of the demand are always executed. 0 with an
            absolute bonus of 0.15 is the original memory-aware router.

    Source:
        ADR-092 (absolute); Cache-Prior, arXiv 2412.00099 (range-scaled, here with the token's
        own range instead of a running mean, so that the rule has no state).
    """

    bonus: float = 0.15
    scale: Literal["absolute", "logit_range"] = "absolute"
    protect: int = 0

    def __post_init__(self) -> None:
        check_real("bonus", self.bonus, 0.0)
        check_int("protect", self.protect, 0)
        if self.scale not in ("absolute", "logit_range"):
            raise ValueError(f"scale must be 'absolute' or 'logit_range', got {self.scale!r}")

    @property
    def rule(self) -> Rule:
        """The kernel's rule for this scale."""
        return Rule.BONUS if self.scale == "absolute" else Rule.RANGE_BONUS

    @property
    def strength(self) -> float:
        """What ``RouterState.strength_L`` starts as."""
        return float(self.bonus)


@dataclass(frozen=True)
class MassBudget:
    """Swap while the router mass that moves stays within a share of the token's demand.

    Attributes:
        budget: Largest ``sum(p(swapped away) - p(stand-in)) / sum(p(demand))`` per token, p the
            mass of :mod:`moe_gpu.kernels.score_ref`: the softmax over all experts, or sigmoids. 0 allows no swap. Finite, ``>= 0``; 1 or more never binds.
        protect: The first ``protect`` experts of the demand are never swapped away.

    Source:
        Cumulative mass rule of the Mass-Budget router (kennydd001/ervf), solved exactly: within
        the nested family of sets, the longest allowed prefix has the fewest misses.
    """

    budget: float
    protect: int = 1

    rule = Rule.MASS

    def __post_init__(self) -> None:
        check_real("budget", self.budget, 0.0)
        check_int("protect", self.protect, 0)

    @property
    def strength(self) -> float:
        """What ``RouterState.strength_L`` starts as."""
        return float(self.budget)


@dataclass(frozen=True)
class QualityBudget:
    """Swap while each swap changes the layer's output by little: the best rule measured so far.

    A swap of expert m for its stand-in r is priced at
    ``sqrt(w(m)^2 + w(r)^2 - 1.5 w(m) w(r))``, w the router's mass as a share of the demand's: what
    is lost, and beside it the weight that leaves and the weight that comes in. A stand-in as good
    as the router's own choice is therefore not free, and the tail of the demand is cheap. Each swap
    is priced by itself, so that the last one of every token costs the same: many small changes
    harm less than one large one.

    Attributes:
        budget: Largest price of one swap. 0 allows none; 1 or more never binds. Finite, ``>= 0``.
        layer_scale: Factor on the budget by layer, for layers that are more or less sensitive than
            the rest (:func:`moe_gpu.tune` measures it). Empty: 1 everywhere. Finite, ``>= 0``.
        protect: The first ``protect`` experts of the demand are never swapped away.

    Source:
        ``docs/quality.md``; the constant is ``SIMILARITY`` of :mod:`moe_gpu.kernels.route_ref`.
    """

    budget: float
    layer_scale: tuple[float, ...] = ()
    protect: int = 1

    rule = Rule.OUTPUT

    def __post_init__(self) -> None:
        check_real("budget", self.budget, 0.0)
        if not isinstance(self.layer_scale, (tuple, list)):
            raise TypeError(f"layer_scale must be a tuple of numbers, got {self.layer_scale!r}")
        for factor in self.layer_scale:
            check_real("layer_scale", factor, 0.0)
        object.__setattr__(self, "layer_scale", tuple(map(float, self.layer_scale)))
        check_int("protect", self.protect, 0)

    @property
    def strength(self) -> float:
        """The budget, which ``layer_scale`` multiplies."""
        return float(self.budget)


def layer_strengths(policy: "Policy", num_layers: int) -> list[float]:
    """Return what ``RouterState.strength_L`` starts as under a policy.

    Raises:
        ValueError: A ``layer_scale`` of another number of layers.
    """
    scale_L = getattr(policy, "layer_scale", ()) or (1.0,) * num_layers
    if len(scale_L) != num_layers:
        raise ValueError(
            f"layer_scale must have {num_layers} factors, one per MoE layer, got {len(scale_L)}"
        )
    return [min(policy.strength * factor, FLOAT32_MAX) for factor in scale_L]


Policy = (
    Exact | CacheBonus | MassBudget | QualityBudget | QualityTarget | HitRateTarget | AdaptiveBonus
)
