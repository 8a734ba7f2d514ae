"""What :func:`moe_gpu.tune` found: the table, the recommendation, and both as files."""

import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from ..offload.eviction import DEFAULT
from ..policies import Exact, Policy, QualityBudget
from .result_text import result_text
from .trace import RoutingTrace

FORMAT = "moe_gpu tune 1"
ENOUGH_ROWS = 20  # from which a bootstrap interval says something


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting and what it costs and saves, measured with decode semantics.

    Attributes:
        slots: Resident experts per layer.
        budget: Of a :class:`~moe_gpu.policies.QualityBudget`; None for exact routing.
        eviction: Name of the eviction policy.
        bypass: Whether a newcomer that ranks last passes through.
        loads_per_token: Experts copied to the device, over all layers.
        mb_per_token: Of those, 10^6 bytes.
        hit_rate: Routed pairs whose expert was resident.
        perplexity: Per token.
        change: Of perplexity against exact routing, percent.
        change_low: Lower end of its 95 % interval (paired bootstrap over rows).
        change_high: Upper end.
        kl_per_token: KL divergence of the next token from exact routing's, nats.
        swaps_per_token: Pairs served by a stand-in, over all layers.
        is_recommended: The fewest loads of its slots within the target.
    """

    slots: int
    budget: float | None
    eviction: str
    bypass: bool
    loads_per_token: float
    mb_per_token: float
    hit_rate: float
    perplexity: float
    change: float
    change_low: float
    change_high: float
    kl_per_token: float
    swaps_per_token: float
    is_recommended: bool = False


@dataclass(frozen=True, kw_only=True)
class TuneResult:
    """What tuning found; ``print`` it for the table and the code to use.

    Attributes:
        model_type: As the config names it.
        num_layers, num_experts, top_k: Of the MoE layers.
        expert_bytes: Of one expert in a slot.
        max_perplexity_increase: The target, percent.
        tokens: Predicted per row.
        rows: Measured.
        calibration_rows: Others, that calibrated the layers.
        layer_scale: Factor on the budget by layer.
        table: Every setting measured, by slots, exact routing first, then by budget.
        replay: Hit rate of exact routing on the calibration rows, by slots and eviction; Belady's
            bound among them.
        notes: Sentences for the user.
        trace: Routing of the calibration rows; None for a result that was read from a file.
    """

    model_type: str
    num_layers: int
    num_experts: int
    top_k: int
    expert_bytes: int
    max_perplexity_increase: float
    tokens: int
    rows: int
    calibration_rows: int
    layer_scale: tuple[float, ...]
    table: tuple[Setting, ...]
    replay: dict[int, dict[str, float]]
    notes: tuple[str, ...] = ()
    trace: RoutingTrace | None = field(default=None, repr=False, compare=False)

    @property
    def slots(self) -> tuple[int, ...]:
        """Slots per layer that were tried, ascending."""
        return tuple(sorted({setting.slots for setting in self.table}))

    @property
    def is_enough_text(self) -> bool:
        """Whether intervals were compared with the target, and not mere estimates."""
        return self.rows >= ENOUGH_ROWS

    def choice(self, slots: int | None = None) -> Setting:
        """Return the recommended setting.

        Args:
            slots: One of :attr:`slots`. Default: of those with the fewest loads, usually the most.

        Raises:
            ValueError: Slots that were not tried.
        """
        if slots is not None and slots not in self.slots:
            raise ValueError(f"slots must be one of {self.slots}, got {slots!r}")
        chosen = [s for s in self.table if s.is_recommended and slots in (None, s.slots)]
        return min(chosen, key=lambda setting: (setting.loads_per_token, setting.slots))

    def policy_of(self, setting: Setting) -> Policy:
        """Return the policy of a row of the table."""
        if setting.budget is None:
            return Exact()
        return QualityBudget(setting.budget, self.layer_scale)

    def options_of(self, setting: Setting) -> dict[str, object]:
        """Return keyword arguments of :func:`moe_gpu.attach` for a row of the table."""
        options = {"slots": setting.slots, "policy": self.policy_of(setting)}
        if setting.slots < min(2 * self.top_k, self.num_experts):
            options["pool"] = False  # as measured; attach would share so few among the layers
        if setting.eviction != DEFAULT:
            options["eviction"] = setting.eviction
        if not setting.bypass:
            options["bypass"] = False
        return options

    @property
    def policy(self) -> Policy:
        """The recommended policy."""
        return self.policy_of(self.choice())

    @property
    def attach_options(self) -> dict[str, object]:
        """Keyword arguments of :func:`moe_gpu.attach` or ``load`` for what is recommended."""
        return self.options_of(self.choice())

    def __str__(self) -> str:
        return result_text(self)

    def as_dict(self) -> dict[str, object]:
        """Return everything but the trace, ready for JSON."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "trace"}
        own["table"] = [asdict(setting) for setting in self.table]
        own["replay"] = {str(slots): rates for slots, rates in self.replay.items()}
        choice = self.choice()
        options = {k: v for k, v in self.options_of(choice).items() if k != "policy"}
        policy = {"name": type(self.policy).__name__}
        if choice.budget is not None:
            policy |= {"budget": choice.budget, "layer_scale": list(self.layer_scale)}
        return {"format": FORMAT, **own, "recommended": {"policy": policy, **options}}

    def save(self, folder: str | Path, plot: bool = True) -> None:
        """Write ``tune.json``, ``tune.png`` and, if there is a trace, ``trace.safetensors``.

        Args:
            folder: Made if it is not there.
            plot: Whether to draw ``tune.png``.

        Raises:
            ModuleNotFoundError: A plot without matplotlib. The other files have been written.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / "tune.json.partial"
        partial.write_text(json.dumps(self.as_dict(), indent=1) + "\n", encoding="utf-8")
        os.replace(partial, folder / "tune.json")
        if self.trace is not None:
            self.trace.save(folder / "trace.safetensors")
        if plot:
            from .plot import plot_result

            plot_result(self, folder / "tune.png")

    @classmethod
    def load(cls, folder: str | Path) -> "TuneResult":
        """Read what :meth:`save` wrote, without the trace.

        Raises:
            OSError: No such folder or file.
            ValueError: Not such a file, or a damaged one.
        """
        path = Path(folder) / "tune.json"
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found.get("format") != FORMAT:
                raise ValueError(f"its format is {found.get('format')!r}, not {FORMAT!r}")
            own = {f.name: found[f.name] for f in fields(cls) if f.name != "trace"}
            own["table"] = tuple(Setting(**row) for row in own["table"])
            own["replay"] = {int(slots): rates for slots, rates in own["replay"].items()}
            own |= {name: tuple(own[name]) for name in ("layer_scale", "notes")}
            result = cls(**own)
            _ = result.policy
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a result of moe_gpu.tune: {error}") from error
        return result
