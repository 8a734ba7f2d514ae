"""The gate: which experts each token visits, with what weight, and which must be paged in.

    hidden -> logits -> demand (top K) -> swaps towards residents -> weights from the logits

All of it after the projection is one kernel launch that also counts, ages the affinity and
writes the paging requests. A policy steers the choice only: weights come from the untouched
logits, so with ``Exact()`` the gate is the model's own router.

Shape suffixes: T tokens, E experts, K experts per token, D model width, L layers.
"""

import enum
import inspect
import operator
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple, SupportsIndex

import torch
from torch import nn
from torch.nn import functional as F

from .adaptive import Adaptive, Control, control_reports
from .bounds import check_int, check_one_of, check_real
from .kernels import layout
from .kernels.checks import MAX_EXPERTS, MAX_TOP_K
from .kernels.route import route, route_path
from .kernels.route_ref import AffinityFrom, affinity_window
from .kernels.score_ref import Score, mixing_weights
from .latency import RouteTimer, summarize_us
from .metrics import Metrics, meter_figures, routing_counts
from .policies import Exact, Policy, layer_strengths
from .record import RecordReader
from .requests import PagingRequest
from .scores import make_score_rule
from .state import SCRATCH_TOKENS, RouterState

AFFINITY_FROM = {source.name.lower(): source for source in AffinityFrom}
WEIGHTS_DTYPES = (torch.float32, torch.float16, torch.bfloat16, None)


class Routing(NamedTuple):
    """What the gate decided for T tokens."""

    logits: torch.Tensor  # (T, E), as the router made them
    weights: torch.Tensor  # (T, K) float32 unless the gate was made with another dtype, best first
    ids: torch.Tensor  # (T, K) int64, K distinct experts per row


class MoEGate(nn.Module):
    """Top-K router that prefers experts already on the device.

    Owns the router weight (unless ``hidden_size`` is None) and one row of a
    :class:`RouterState`; nothing of the state enters a ``state_dict``. The defaults are Mixtral's
    rule of scores and weights; the arguments from ``renormalize`` to ``correction_bias`` make it
    another family's (:mod:`moe_gpu.kernels.score_ref` says what each means).

    Args:
        hidden_size: Model width D; None builds a router without a projection (:meth:`route`).
        num_experts: E, in [1, 1024].
        top_k: K, in [1, min(E, 16)].
        policy: How far the choice may move towards residents, see :mod:`moe_gpu.policies`.
        renormalize: Weights of the executed experts sum to 1 (Mixtral); otherwise they are their
            masses: the softmax over all experts, or the sigmoids.
        score: ``"softmax"``, ``"sigmoid"`` (DeepSeek-V3) or ``"sparsemixer"`` (Phi-3.5-MoE, not for
            training). A softmax over the K chosen logits (gpt-oss) is softmax with ``renormalize``.
        scaling_factor: What weights are multiplied by, finite, ``> 0``.
        num_groups: Runs of equal length that the experts divide into, in [1, 32].
        top_groups: How many of them a token may visit, in [1, num_groups].
        group_score: By what groups rank: ``"top2_sum"`` (DeepSeek-V3) or ``"max"`` (DeepSeek-V2).
        softcap: Bound of the logits by ``softcap * tanh(logits / softcap)``, ``>= 0``; 0: none.
        jitter_eps: Of sparsemixer, half the relative distance within which experts share a softmax,
            ``>= 0``.
        correction_bias: Own a buffer ``e_score_correction_bias``, float32 (E,), zeros: added to the
            selection scores, never to a weight. Another one can be given to each call.
        decay: Affinity factor per token, in [0, 1].
        boost: Affinity added to a chosen expert, finite, ``>= 0``.
        max_score: Affinity clamp, finite, ``> 0``.
        affinity_from: ``"demand"`` ages the affinity by what the router wanted, ``"served"`` by
            what of it was not swapped away, ``"executed"`` by what ran (the original behaviour;
            it locks in whatever is resident).
        max_policy_tokens: Calls with more tokens route exactly: their union of experts covers
            nearly the layer, so a swap buys nothing.
        state: Shared state of a model; None makes one with a single layer.
        layer: This gate's row in ``state``.
        timers: Record the latency of each route call.
        meters: Measure on the device what swaps change: ``moved_mass_p99``, ``l1_change``,
            ``routing_kl`` and ``swaps_by_rank`` of :class:`~moe_gpu.metrics.Metrics`.
        device: Where the parameters, and the state if none is given, live.
        dtype: Of the router weight.
        weights_dtype: Of the mixing weights; None: that of the logits.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: An argument outside the bounds above.

    Example:
        >>> gate = MoEGate(hidden_size=16, num_experts=8, policy=moe_gpu.QualityBudget(0.05))
        >>> gate.set_resident([0, 3])
        >>> logits, weights, ids = gate(torch.randn(5, 16))
        >>> ids.shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        hidden_size: int | None = None,
        num_experts: int = 8,
        top_k: int = 2,
        policy: Policy = Exact(),  # noqa: B008 - frozen dataclass
        *,
        renormalize: bool = True,
        score: Literal["softmax", "sigmoid", "sparsemixer"] = "softmax",
        scaling_factor: float = 1.0,
        num_groups: int = 1,
        top_groups: int = 1,
        group_score: Literal["top2_sum", "max"] = "top2_sum",
        softcap: float = 0.0,
        jitter_eps: float = 0.01,
        correction_bias: bool = False,
        decay: float = 0.99,
        boost: float = 1.0,
        max_score: float = 1.0,
        affinity_from: Literal["demand", "served", "executed"] = "demand",
        max_policy_tokens: int = 64,
        state: RouterState | None = None,
        layer: int = 0,
        timers: bool = False,
        meters: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        weights_dtype: torch.dtype | None = torch.float32,
    ):
        super().__init__()
        check_int("num_experts", num_experts, 1, MAX_EXPERTS)
        check_int("top_k", top_k, 1, min(num_experts, MAX_TOP_K))
        if hidden_size is not None:
            check_int("hidden_size", hidden_size, 1)
        check_int("max_policy_tokens", max_policy_tokens, 0)
        check_int("layer", layer, 0)
        check_real("decay", decay, 0.0, 1.0)
        check_real("boost", boost, 0.0)
        check_real("max_score", max_score, 0.0)
        if max_score == 0:
            raise ValueError(f"max_score must be > 0, got {max_score}")
        check_one_of("affinity_from", affinity_from, AFFINITY_FROM)
        rule = make_score_rule(
            num_experts,
            top_k,
            score=score,
            renormalize=renormalize,
            scaling_factor=scaling_factor,
            num_groups=num_groups,
            top_groups=top_groups,
            group_score=group_score,
            softcap=softcap,
            jitter_eps=jitter_eps,
            correction_bias=correction_bias,
        )
        if weights_dtype not in WEIGHTS_DTYPES:
            raise TypeError(
                "weights_dtype must be float32, float16, bfloat16 or None, the dtype of the "
                f"logits, got {weights_dtype!r}"
            )
        if state is None:
            state = RouterState(layer + 1, num_experts, device=device)
        elif state.num_experts != num_experts:
            raise ValueError(
                f"num_experts={num_experts} does not match the state's {state.num_experts}"
            )
        check_int("layer", layer, 0, state.num_layers - 1)

        self.hidden_size, self.num_experts, self.top_k = hidden_size, num_experts, top_k
        self.score_rule, self.weights_dtype = rule, weights_dtype
        self.decay, self.boost, self.max_score = float(decay), float(boost), float(max_score)
        self._window = affinity_window(self.decay)
        self.affinity_from, self.max_policy_tokens = affinity_from, max_policy_tokens
        # no submodule: DDP would broadcast its buffers before every forward, see register_state()
        self.__dict__["state"], self.layer = state, layer
        if not isinstance(meters, bool):
            raise TypeError(f"meters must be True or False, got {meters!r}")
        self.meters = meters
        self.policy = policy
        self._last_path: str | None = None
        self._reader = RecordReader(state)
        self._timer = RouteTimer() if timers else None
        if hidden_size is None:
            self.register_parameter("weight", None)
        else:
            weight_ED = torch.empty(num_experts, hidden_size, device=device, dtype=dtype)
            self.weight = nn.Parameter(weight_ED)
            self.reset_parameters()
        bias_E = torch.zeros(num_experts, device=device) if correction_bias else None
        self.register_buffer("e_score_correction_bias", bias_E)

    def reset_parameters(self) -> None:
        """Initialise the router weight as Mixtral does."""
        nn.init.normal_(self.weight, std=0.02)

    @property
    def policy(self) -> Policy:
        """The policy in force.

        Assigning one also sets its strength on the device; an adaptive one begins again, cold, and
        any other switches the controller off.
        """
        return self._policy

    @policy.setter
    def policy(self, policy: Policy) -> None:
        if not isinstance(policy, Policy):
            raise TypeError(f"policy must be one of moe_gpu.policies, got {policy!r}")
        strengths_L = layer_strengths(policy, self.state.num_layers)
        self._is_adaptive = isinstance(policy, Adaptive)
        row = policy.controls(self.top_k) if self._is_adaptive else [0.0] * layout.NUM_CONTROLS
        self.state.set_policy(self.layer, strengths_L[self.layer], row)
        self._policy = policy

    def forward(
        self, hidden_states: torch.Tensor, num_valid: torch.Tensor | None = None
    ) -> Routing:
        """Project and route every token.

        Args:
            hidden_states: Activations, shape ``(..., D)``; leading dimensions flatten to T.
            num_valid: See :meth:`route`.

        Returns:
            The routing of the T tokens, see :class:`Routing`.
        """
        if self.weight is None:
            raise RuntimeError("this gate was built without hidden_size: call route(logits)")
        _check_float_tensor("hidden_states", hidden_states)
        if hidden_states.ndim == 0 or hidden_states.shape[-1] != self.hidden_size:
            raise ValueError(
                f"hidden_states must have {self.hidden_size} columns, "
                f"got shape {tuple(hidden_states.shape)}"
            )
        x_TD = hidden_states.reshape(-1, self.hidden_size)
        return self.route(F.linear(x_TD, self.weight), num_valid=num_valid)

    def route(
        self,
        logits: torch.Tensor,
        *,
        num_valid: torch.Tensor | None = None,
        correction_bias: torch.Tensor | None = None,
        out: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> Routing:
        """Route T tokens from their logits: one kernel launch, no host synchronisation.

        Where ``logits`` require a gradient, weights are recomputed from them in PyTorch at the
        chosen ids, so the gradient is that of the model's own mixing rule.

        Args:
            logits: ``(T, E)``, float32, float16 or bfloat16 (float64 is routed as float32), any
                strides.
            num_valid: Device scalar int32; rows from there on are padding: weight 0, distinct ids
                in range, no effect on any state.
            correction_bias: ``(E,)`` to use in place of the gate's own buffer.
            out: ``(weights, ids)`` tensors to write to; nothing is allocated then.

        Returns:
            ``logits`` as given, weights and ids, see :class:`Routing`.

        Raises:
            ValueError: Wrong shape or device, or ``out`` where a gradient is required.
            TypeError: Logits that are not floating point.
            RuntimeError: A gradient in training mode through a sparsemixer router, whose training
                rule is another.
        """
        _check_float_tensor("logits", logits)
        if num_valid is not None and not isinstance(num_valid, torch.Tensor):
            raise TypeError(f"num_valid must be an int32 tensor on the device, got {num_valid!r}")
        needs_grad = logits.requires_grad and torch.is_grad_enabled()
        if needs_grad and out is not None:
            raise ValueError("out cannot be given for logits that require a gradient")
        if needs_grad and self.training and self.score_rule.score == Score.SPARSEMIXER:
            raise RuntimeError(
                "a sparsemixer router draws its experts at random in training, which the gate does "
                "not do: call eval(), or call it under torch.no_grad()"
            )
        if correction_bias is None:
            # a module looks its buffers up last, and slowly
            correction_bias = self._buffers["e_score_correction_bias"]
        T = logits.shape[0] if logits.ndim == 2 else 0
        policy = self._policy
        # asked of numbers first: of T, each side would be a graph of its own in a trace
        if self._window > SCRATCH_TOKENS and T > SCRATCH_TOKENS:
            if logits.shape[1] == self.num_experts:  # else route() refuses
                self.state.reserve(T, self.decay)
        # float64 (gradient checks) is routed as float32 and weighed as float64
        scores = logits.float() if logits.dtype == torch.float64 else logits
        if correction_bias is not None and correction_bias.dtype == torch.float64:
            correction_bias = correction_bias.float()
        arguments = {
            "top_k": self.top_k,
            "rule": policy.rule,
            "protect": policy.protect,
            "max_policy_tokens": self.max_policy_tokens,
            "score_rule": self.score_rule,
            "correction_bias": correction_bias,
            "weights_dtype": self.weights_dtype or scores.dtype,
            "affinity_from": AFFINITY_FROM[self.affinity_from],
            "decay": self.decay,
            "boost": self.boost,
            "max_score": self.max_score,
            "num_valid": num_valid,
            "out": out,
            "control": self._is_adaptive,
            "meters": self.meters,
        }
        if self._timer is None or not self._timer.can_time(scores.device):
            weights_TK, ids_TK = route(scores, self.state, self.layer, **arguments)
        else:
            with self._timer.call(logits.device):
                weights_TK, ids_TK = route(scores, self.state, self.layer, **arguments)
        path = route_path(logits.device)
        # a module's attributes are slow to set; a trace must not depend on what was there
        if torch.compiler.is_compiling() or path != self._last_path:
            self._last_path = path
        if needs_grad:
            wide = logits if logits.dtype == torch.float64 else logits.float()
            weights_TK = mixing_weights(wide, ids_TK, self.score_rule)
            if num_valid is not None:
                weights_TK = weights_TK.masked_fill(_padding_rows(T, num_valid), 0.0)
            if logits.dtype != torch.float64:
                weights_TK = weights_TK.to(self.weights_dtype or logits.dtype)
        return Routing(logits, weights_TK, ids_TK)

    def set_resident(self, expert_ids: Iterable[SupportsIndex]) -> None:
        """Declare exactly these experts to be on the device, for use without an offloader.

        Raises:
            TypeError: An id that is not an int.
            ValueError: An id outside [0, E) or given twice.
            RuntimeError: An offloader owns residency.
        """
        if self.state.is_owned:
            raise RuntimeError(
                "set_resident() is for a gate without an offloader: this model's has one, which "
                "says who is resident"
            )
        # ids out of NumPy or a tensor are as good as Python's
        expert_ids = [_as_int("expert id", expert) for expert in expert_ids]
        for expert in expert_ids:
            check_int("expert id", expert, 0, self.num_experts - 1)
        if len(set(expert_ids)) != len(expert_ids):
            raise ValueError(f"expert ids must be distinct, got {expert_ids}")
        slot_of_E = torch.full((self.num_experts,), -1, dtype=torch.int32)
        slot_of_E[expert_ids] = torch.arange(len(expert_ids), dtype=torch.int32)
        self.state.slot_of_LE[self.layer] = slot_of_E.to(self.state.slot_of_LE.device)

    def requests(self) -> list[PagingRequest]:
        """Return the paging requests of the last call, ascending expert id. Synchronises."""
        return self._reader.read(self.layer).requests(self.layer)

    @property
    def affinity(self) -> torch.Tensor:
        """Decayed activation history, float32 ``(E,)``, on the device."""
        return self.state.affinity_LE[self.layer]

    @property
    def activations(self) -> torch.Tensor:
        """Tokens that executed each expert, int64 ``(E,)``, on the device."""
        return self.state.activations_LE[self.layer]

    @property
    def renormalize(self) -> bool:
        """Whether weights of the executed experts sum to 1, before the scaling factor."""
        return self.score_rule.renormalize

    def latencies_us(self) -> list[float]:
        """Return recent latencies of the route call; empty without ``timers=True``."""
        return [] if self._timer is None else self._timer.latencies_us()

    @property
    def last_route_path(self) -> str | None:
        """``"triton"`` or ``"reference"``: what ran the last call; None before the first."""
        return self._last_path

    def metrics(self) -> Metrics:
        """Return this layer's counts so far. Synchronises."""
        return Metrics(
            **routing_counts(self.state.counters_LC[self.layer : self.layer + 1]),
            **summarize_us(self.latencies_us()),
            **(meter_figures(self._meters(), self.top_k) if self.meters else {}),
            superseded=self._reader.superseded,
            route_path=self._last_path,
        )

    def reset_metrics(self) -> None:
        """Set this layer's counters, meters and timers to zero.

        Affinity, activations and the controller stay.
        """
        self.state.counters_LC[self.layer].zero_()
        self.state.meters_LM[self.layer].zero_()
        self._reader.superseded = 0
        if self._timer is not None:
            self._timer.reset()

    def control(self) -> Control:
        """Return what the controller of an adaptive policy is doing. Synchronises."""
        state, row = self.state, slice(self.layer, self.layer + 1)
        return control_reports(
            state.control_LP[row], state.control_state_LS[row], state.strength_L[row], self.layer
        )[0]

    def _meters(self) -> torch.Tensor:
        return self.state.meters_LM[self.layer : self.layer + 1]

    def runtime_state_dict(self) -> dict[str, torch.Tensor]:
        """Return a copy of this layer's residency, history, counts and control.

        See :meth:`RouterState.runtime_state_dict`; ``state_dict`` holds parameters only.
        """
        return self.state.runtime_state_dict(self.layer)

    def load_runtime_state_dict(
        self, saved: Mapping[str, torch.Tensor], strict: bool = True
    ) -> None:
        """Continue from a :meth:`runtime_state_dict`, see :class:`RouterState` for what it refuses."""
        self.state.load_runtime_state_dict(saved, self.layer, strict)

    def register_state(self) -> None:
        """Make the state a submodule, whose tensors are then non-persistent buffers of the model.

        For ``torch.export``, which writes to registered buffers only. Not for training in several
        processes: there rank 0's buffers overwrite everybody's.
        """
        self.state = self.state

    def _apply(self, fn, recurse=True):
        self.state._apply(fn)
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        """Show the sizes, the policy and what else is not the default in ``print(model)``."""
        shown = [f"D={self.hidden_size}, E={self.num_experts}, K={self.top_k}"]
        if self.state.num_layers > 1:
            shown.append(f"layer={self.layer} of {self.state.num_layers}")
        shown.append(f"policy={self._policy}")
        values = vars(self) | vars(self.score_rule)
        values["correction_bias"] = self.e_score_correction_bias is not None
        values["timers"] = self._timer is not None
        if self.score_rule.score != Score.SPARSEMIXER:
            del values["jitter_eps"]
        own = ("hidden_size", "num_experts", "top_k", "state", "layer")  # shown above
        for name, parameter in inspect.signature(MoEGate.__init__).parameters.items():
            if name in values and name not in own:
                value = values[name]
                value = value.name.lower() if isinstance(value, enum.Enum) else value
                if value != parameter.default:
                    shown.append(f"{name}={value!r}")
        return ", ".join(shown)


def _padding_rows(T: int, num_valid: torch.Tensor) -> torch.Tensor:
    return (torch.arange(T, device=num_valid.device) >= num_valid.reshape(())).unsqueeze(1)


def _check_float_tensor(name: str, value: torch.Tensor) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {value.dtype}")


def _as_int(name: str, value: SupportsIndex) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int, got {value!r}") from None
