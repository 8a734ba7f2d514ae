"""The router of an attached layer: the gate behind the router's own ``forward``."""

import functools
import threading

import torch
from torch import nn

from ..gate import MoEGate, Routing
from ..kernels.score_ref import score_ref
from ..ranges import profiler_range
from .blocks import MoEBlock
from .experts import UNTRACEABLE, ExpertsLayer, NotCopyable, refuse_capture
from .implementation import NAME


class RoutedForward(NotCopyable):
    """Takes the place of ``router.forward`` on the router object, with its signature.

    The module stays the one that transformers made, so hooks on it, recorded router logits and
    its parameters keep working. It also notices, before a layer computes, what would make the
    experts compute nonsense.

    Args:
        block: Router and experts of the layer.
        gate: Routes the logits.
        layer: What the experts know about their offloader.
        following: The next layer's block, whose router is a predictor; None for the last.
    """

    def __init__(
        self,
        block: MoEBlock,
        gate: MoEGate,
        layer: ExpertsLayer,
        following: MoEBlock | None,
    ):
        functools.update_wrapper(self, block.router.forward)  # the signature
        self._block, self._gate, self._layer, self._following = block, gate, layer, following

    def __call__(self, hidden_states: torch.Tensor, *args, **kwargs):
        """Return ``(router_logits, weights, ids)`` for hidden states ``(..., D)``."""
        router = self._block.router
        if self._layer.is_free_of_host(router, hidden_states):
            hidden_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
            return tuple(self._gate_of(hidden_TD, self._bias(*args, **kwargs)))
        return self._route(hidden_states, self._bias(*args, **kwargs))

    def _bias(self, *given: torch.Tensor, **named: torch.Tensor) -> torch.Tensor | None:
        """Return the correction bias of a call: some blocks hand theirs to the router."""
        handed = (*given, *named.values())
        return handed[0] if handed else self._block.bias()

    def _gate_of(self, hidden_TD: torch.Tensor, bias_E: torch.Tensor | None) -> Routing:
        if self._gate.training != self._block.router.training:
            self._gate.training = self._block.router.training
        return self._gate.route(self._block.logits(hidden_TD), correction_bias=bias_E)

    # host decisions: traced, each new residency would be a new graph
    @torch.compiler.disable(reason=UNTRACEABLE)
    def _route(self, hidden_states, bias_E):
        router = self._block.router
        refuse_capture(hidden_states.device)
        self._check(router, self._block.experts)
        offloader = self._layer.offloader
        with profiler_range("moe_gpu::route"), offloader.lock:
            offloader.before_route(self._layer.layer)
            hidden_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
            routing = self._gate_of(hidden_TD, bias_E)
            if self._layer.audit is not None:
                self._layer.audit.draw(hidden_TD, routing, bias_E)
            self._layer.routed_by = threading.get_ident()
            self._predict(hidden_TD)
            return tuple(routing)

    def _predict(self, hidden_TD: torch.Tensor) -> None:
        """Apply the next layer's router to this layer's hidden states."""
        offloader, ahead = self._layer.offloader, self._layer.layer + 1
        if (
            self._following is None
            or not offloader.wants_prediction(ahead)
            or not 0 < len(hidden_TD) <= self._layer.max_policy_tokens
        ):
            return
        with torch.no_grad():
            logits_TE = self._following.logits(hidden_TD).float()
            # every layer of a model scores alike
            scores = score_ref(logits_TE, self._gate.score_rule, self._following.bias())
            score_TE = scores.selection_TE
            if scores.candidate_TE is not None:
                score_TE = score_TE.masked_fill(~scores.candidate_TE, -torch.inf)
            offloader.predict(ahead, score_TE.topk(self._gate.top_k, dim=-1).indices)

    def _check(self, router: nn.Module, experts: nn.Module) -> None:
        if router.training and torch.is_grad_enabled() and not self._layer.all_resident:
            raise RuntimeError(
                "an attached model is for inference: call eval() or torch.no_grad(), or detach(); "
                "it trains where every expert is resident: attach(..., resident=1.0), without verify"
            )
        # a config's own look-up runs Python code, which every layer and step would pay
        selected = object.__getattribute__(experts.config, "_experts_implementation_internal")
        if selected != NAME:
            raise RuntimeError(
                f"{self._block.name}: the experts implementation was changed to {selected!r} "
                f"while attached; set it to {NAME!r} again, or detach()"
            )
        if not self._layer.all_resident and (name := self._layer.has_moved(experts)):
            raise RuntimeError(
                f"{self._block.name}: {name} is no longer the device slots: the model was "
                "moved or converted while attached; detach() first"
            )
