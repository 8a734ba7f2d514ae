"""Adaptive policies: the strength of a swap rule follows what the layer measures.

The controller runs on the device, at the end of the route call, one per layer; the law is in
:mod:`moe_gpu.kernels.control_ref`. A policy only writes its parameters to the device.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from .bounds import check_int, check_real, check_share
from .kernels import layout
from .kernels.route_ref import Rule

# the floor from which a strength leaves 0, as a share of the largest
_SMALLEST = 2.0**-10
# chosen on simulated routers of 8 experts top-2 and 64 top-8 with half resident, whose text
# changes (tests/test_control.py): faster ones follow the noise of single tokens, which costs
# moved mass, and settle no sooner
_HIT_GAIN = 0.2  # octaves per unit of hit rate and token, for one expert a token
_HIT_LEAD = 12.0  # octaves per unit of recent error
_HIT_RECENT = 0.02  # weight of a pair
_HIT_CALL_GAIN = 4.0
_QUALITY_GAIN = 0.05  # octaves per token and relative error
_QUALITY_CALL_GAIN = 0.7


class _Steered:
    """What the two targets share: a budget rule whose strength the controller sets."""

    max_budget: float
    price: str
    protect: int
    warm_tokens: int
    average_tokens: float
    speed: float

    def _check(self) -> None:
        check_real("max_budget", self.max_budget, 0.0)
        if self.price not in ("output", "mass"):
            raise ValueError(f"price must be 'output' or 'mass', got {self.price!r}")
        check_int("protect", self.protect, 0)
        _check_times(self.warm_tokens, self.average_tokens)
        check_real("speed", self.speed, 0.0)
        if self.speed == 0:
            raise ValueError(f"speed must be > 0, got {self.speed}")

    @property
    def rule(self) -> Rule:
        """The kernel's rule for this price."""
        return Rule.OUTPUT if self.price == "output" else Rule.MASS

    @property
    def strength(self) -> float:
        """The budget after the warm-up."""
        return self.max_budget / 4

    def _controls(self, **own: float) -> list[float]:
        for gain in own.keys() & {"GAIN", "CALL_GAIN", "LEAD"}:
            own[gain] *= self.speed
        return _row(
            LARGEST=self.max_budget,
            SMALLEST=self.max_budget * _SMALLEST,
            START=self.strength,
            AVERAGE_RATE=1 / self.average_tokens,
            WARM_TOKENS=self.warm_tokens,
            **own,
        )


@dataclass(frozen=True)
class QualityTarget(_Steered):
    """Hold the router mass that swaps move, in the mean over tokens of each layer.

    The budget of a token goes up while less moves than the target and down while more does.

    Attributes:
        moved_mass: Target, as a share of a token's demand, in (0, 1].
        max_budget: Bound on the budget in force; no token ever gets more. Unit as ``price`` says.
            Finite, ``>= 0``.
        price: What the budget limits: ``"output"``, each swap as in
            :class:`~moe_gpu.policies.QualityBudget`; ``"mass"``, the moved mass of a token as in
            :class:`~moe_gpu.policies.MassBudget`.
        protect: The first ``protect`` experts of the demand are never swapped away.
        dead_band: Distance from the target, as a share of it, within which the budget rests. In
            [0, 1].
        warm_tokens: Tokens that are routed exactly before the controller begins.
        average_tokens: Time constant of the averages, ``>= 1``.
        speed: Factor on the gains. Finite, ``> 0``. Slower takes longer after a change of text, and
            moves a little less mass for the same hits.
    """

    moved_mass: float = 0.01
    max_budget: float = 0.5
    price: Literal["output", "mass"] = "output"
    protect: int = 1
    dead_band: float = 0.02
    warm_tokens: int = 64
    average_tokens: float = 96.0
    speed: float = 1.0

    def __post_init__(self) -> None:
        check_share("moved_mass", self.moved_mass, above_zero=True)
        check_share("dead_band", self.dead_band)
        self._check()

    def controls(self, top_k: int) -> list[float]:
        """Return a row of ``RouterState.control_LP``."""
        return self._controls(
            MODE=layout.MODE_QUALITY,
            TARGET=self.moved_mass,
            GAIN=_QUALITY_GAIN / self.moved_mass,
            CALL_GAIN=_QUALITY_CALL_GAIN / self.moved_mass,
            DEAD_BAND=self.dead_band * self.moved_mass,
        )


@dataclass(frozen=True)
class HitRateTarget(_Steered):
    """Hold the hit rate of each layer, at no more than a largest budget.

    Misses of protected experts cannot be avoided; a target above what they leave is reported
    (:class:`Control`), and the budget then stays at its bound.

    Attributes:
        target: Hits per pair, in [0, 1].
        max_budget: Bound on the budget in force; no token ever gets more. Unit as ``price`` says.
            Finite, ``>= 0``.
        price: As in :class:`QualityTarget`.
        protect: The first ``protect`` experts of the demand are never swapped away.
        dead_band: Distance from the target, in hits per pair, within which the budget rests. In
            [0, 1].
        warm_tokens: Tokens that are routed exactly before the controller begins.
        average_tokens: Time constant of the averages, ``>= 1``.
        speed: As in :class:`QualityTarget`.
    """

    target: float = 0.8
    max_budget: float = 0.5
    price: Literal["output", "mass"] = "output"
    protect: int = 1
    dead_band: float = 0.002
    warm_tokens: int = 64
    average_tokens: float = 96.0
    speed: float = 1.0

    def __post_init__(self) -> None:
        check_share("target", self.target)
        check_share("dead_band", self.dead_band)
        self._check()

    def controls(self, top_k: int) -> list[float]:
        """Return a row of ``RouterState.control_LP``."""
        return self._controls(
            MODE=layout.MODE_HIT_RATE,
            TARGET=self.target,
            GAIN=_HIT_GAIN * top_k**0.5,  # a hit rate of K pairs is so much less noisy
            CALL_GAIN=_HIT_CALL_GAIN,
            LEAD=_HIT_LEAD,
            RECENT_RATE=_HIT_RECENT * top_k,
            DEAD_BAND=self.dead_band,
        )


@dataclass(frozen=True)
class AdaptiveBonus:
    """The original adaptive bonus: a step up below the target hit rate, a step down above it.

    Attributes:
        target: Hits per pair, in [0, 1].
        learning_rate: The bonus moves by ``learning_rate * 0.01`` per token. Finite, ``>= 0``.
        dead_band: Distance above the target within which it rests, in [0, 1].
        bonus: Where it starts, in selection-score units, in [0, ``max_bonus``].
        max_bonus: Its bound. Finite, ``>= 0``.
        protect: The first ``protect`` experts of the demand are always executed.
        warm_tokens: Tokens that are routed exactly before it begins.
        average_tokens: Time constant of the hit rate, ``>= 1``; untuned.

    Source:
        ADR-092 (target 0.70, dead band 0.05, bonus in [0, 1]).
    """

    target: float = 0.70
    learning_rate: float = 1.0
    dead_band: float = 0.05
    bonus: float = 0.15
    max_bonus: float = 1.0
    protect: int = 0
    warm_tokens: int = 0
    average_tokens: float = 96.0

    rule = Rule.BONUS

    def __post_init__(self) -> None:
        check_share("target", self.target)
        check_real("learning_rate", self.learning_rate, 0.0)
        check_share("dead_band", self.dead_band)
        check_real("max_bonus", self.max_bonus, 0.0)
        check_real("bonus", self.bonus, 0.0)
        if self.bonus > self.max_bonus:
            raise ValueError(f"bonus must be <= max_bonus={self.max_bonus}, got {self.bonus}")
        check_int("protect", self.protect, 0)
        _check_times(self.warm_tokens, self.average_tokens)

    @property
    def strength(self) -> float:
        """The bonus after the warm-up."""
        return float(self.bonus)

    def controls(self, top_k: int) -> list[float]:
        """Return a row of ``RouterState.control_LP``."""
        return _row(
            MODE=layout.MODE_BONUS,
            TARGET=self.target,
            LARGEST=self.max_bonus,
            START=self.bonus,
            GAIN=self.learning_rate * 0.01,
            DEAD_BAND=self.dead_band,
            AVERAGE_RATE=1 / self.average_tokens,
            WARM_TOKENS=self.warm_tokens,
        )


Adaptive = QualityTarget | HitRateTarget | AdaptiveBonus

_MODES = {
    layout.MODE_OFF: "off",
    layout.MODE_QUALITY: "quality",
    layout.MODE_HIT_RATE: "hit_rate",
    layout.MODE_BONUS: "bonus",
}


@dataclass(frozen=True, kw_only=True)
class Control:
    """What a layer's controller is doing.

    Averages are over the last ``average_tokens`` or so that a policy could swap for, and start
    again at the end of the warm-up.

    Attributes:
        layer: MoE layer, counted from 0.
        mode: ``"off"``, ``"quality"``, ``"hit_rate"`` or ``"bonus"``.
        target: Moved mass per token, or hits per pair; None where off.
        strength: Budget or bonus of the next call.
        hit_rate: Hits per pair.
        moved_mass_per_token: As a share of a token's demand.
        feasible_hit_rate: The highest hit rate that any strength could have reached: 1 less the
            misses of protected experts.
        is_feasible: The target is not above it (moved mass always is feasible).
        is_clamped: The strength is at its bound.
        is_cold: Tokens are routed exactly, because of the warm-up or because fewer experts are
            resident than a token needs.
        tokens: Tokens since the start or ``RouterState.reset()``; stands still at 2 ** 24.
    """

    layer: int
    mode: str = "off"
    target: float | None = None
    strength: float = 0.0
    hit_rate: float = 0.0
    moved_mass_per_token: float = 0.0
    feasible_hit_rate: float = 1.0
    is_feasible: bool = True
    is_clamped: bool = False
    is_cold: bool = False
    tokens: int = 0


def control_reports(
    control_LP: torch.Tensor, state_LS: torch.Tensor, strength_L: torch.Tensor, first: int = 0
) -> list[Control]:
    """Turn device tensors, or rows of them, into reports. Synchronises.

    Args:
        control_LP: ``RouterState.control_LP``.
        state_LS: ``RouterState.control_state_LS``.
        strength_L: ``RouterState.strength_L``.
        first: Layer of the first row.
    """
    # one copy: it also belongs to one moment
    rows = torch.cat([control_LP, state_LS, strength_L[:, None]], dim=1).tolist()
    reports = []
    for layer, row in enumerate(rows, first):
        p, s, strength = row[: layout.NUM_CONTROLS], row[layout.NUM_CONTROLS : -1], row[-1]
        mode = _MODES[int(p[layout.MODE])]
        if mode == "off":
            reports.append(Control(layer=layer, strength=strength))
            continue
        flags = int(s[layout.FLAGS])
        is_cold = bool(flags & layout.FLAG_COLD) or s[layout.SEEN] < p[layout.WARM_TOKENS]
        reports.append(
            Control(
                layer=layer,
                mode=mode,
                target=p[layout.TARGET],
                strength=0.0 if is_cold else strength,
                hit_rate=s[layout.MEAN_HITS],
                moved_mass_per_token=s[layout.MEAN_MOVED],
                feasible_hit_rate=1 - s[layout.MEAN_UNAVOIDABLE],
                is_feasible=not flags & layout.FLAG_INFEASIBLE,
                is_clamped=bool(flags & layout.FLAG_CLAMPED),
                is_cold=is_cold,
                tokens=int(s[layout.SEEN]),
            )
        )
    return reports


def _check_times(warm_tokens: int, average_tokens: float) -> None:
    check_int("warm_tokens", warm_tokens, 0)
    check_real("average_tokens", average_tokens, 0.0)
    if average_tokens < 1:
        raise ValueError(f"average_tokens must be >= 1, got {average_tokens}")


def _row(**values: float) -> list[float]:
    row = [0.0] * layout.NUM_CONTROLS
    for name, value in values.items():
        row[getattr(layout, name)] = float(value)
    return row
