"""The experts implementation "moe_gpu" of transformers: one product per expert, from its slot.

Pairs are sorted by expert on the device; each expert's slice goes through the slot that the
offloader names. Every pair's output is kept and the weighted sum is taken at the end, in route
order and in float32, so neither the order of loads nor waves can change a bit of the result.

Where every expert is resident, the parameters are whole, and the implementation that the model
had before runs on them wherever ours cannot: in a trace, in a CUDA graph, and where a gradient is
wanted.

Importing this module registers the name, once and for good: it is inert for a model that is not
attached, and unregistering while another model is attached would break that one.

Shape suffixes: T tokens, K experts per token, N = T * K pairs, D model width.
"""

import functools
import threading
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ..offload import ExpertOffloader
from ..ranges import profiler_range
from .audit import LayerAuditor
from .implementation import NAME, own_forward

ATTRIBUTE = "moe_gpu_layer"  # on an attached experts module
LINE_BYTES = 64  # products with a matrix that begins within a line can round otherwise
UNTRACEABLE = (
    "only an attached model with every expert resident can be traced whole or captured in a CUDA "
    "graph, others decide on the host what to load: attach(..., resident=1.0), without verify"
)


class NotCopyable:
    """Something on an attached model that has no meaning on a copy of it."""

    def __deepcopy__(self, memo):
        raise RuntimeError("an attached model cannot be copied: detach() first, or save_pretrained")

    def __reduce_ex__(self, protocol):
        raise RuntimeError(
            "an attached model cannot be pickled: detach() first, or save_pretrained"
        )


class ExpertsLayer(NotCopyable):
    """What an attached experts module knows about its offloader.

    Attributes:
        weights_S: The parameters in each slot that a turn can name, by name, staging slots last:
            made once, since indexing costs at every use.
        audit: Samples the layer's swaps; None where nothing does.
        all_resident: The parameters hold all experts, and slot e is expert e's.
        is_askew: Some expert does not begin at a line of memory, see :data:`LINE_BYTES`.
        own_forward: The implementation that the model had before.
        routed_by: Thread of the last route call, until its experts have run.
        computing: Thread that runs the experts now.
    """

    def __init__(
        self,
        offloader: ExpertOffloader,
        layer: int,
        max_policy_tokens: int,
        audit: LayerAuditor | None = None,
    ):
        self.offloader, self.layer = offloader, layer
        self.max_policy_tokens, self.audit = max_policy_tokens, audit
        self.all_resident = offloader.all_resident
        self.own_forward: Callable | None = None
        self.weights_S = offloader.weights_of(layer)
        self.is_askew = any(
            weight.data_ptr() % LINE_BYTES
            for weights in self.weights_S
            for weight in weights.values()
        )
        self.routed_by: int | None = None
        self.computing: int | None = None
        self._addresses = {n: w.data_ptr() for n, w in offloader.views_L[layer].items()}

    def has_moved(self, experts: nn.Module) -> str | None:
        """Return the name of a parameter that is not what was attached any more, None if all are."""
        for name, address in self._addresses.items():
            parameter = experts._parameters.get(name)
            if parameter is None or parameter.data_ptr() != address:
                return name
        return None

    def is_free_of_host(self, module: nn.Module, *inputs: torch.Tensor) -> bool:
        """Return whether a call must do without the host's books: traced, captured, differentiated.

        Args:
            module: The layer's router or experts, whose parameters may want a gradient.
            inputs: What it is called with.
        """
        if not self.all_resident:
            return False
        if torch.compiler.is_compiling() or is_capturing(inputs[0].device):
            return True
        return torch.is_grad_enabled() and any(
            tensor.requires_grad for tensor in (*inputs, *module.parameters())
        )


def is_capturing(device: torch.device) -> bool:
    """Return whether a CUDA graph is being captured from what runs on the device."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def refuse_capture(device: torch.device) -> None:
    """Raise ``RuntimeError`` where a CUDA graph is being captured: the host must take part."""
    if is_capturing(device):
        raise RuntimeError(UNTRACEABLE)


def experts_forward(
    module: nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """Compute the mixture of an attached layer; the interface of transformers' experts.

    Args:
        module: The experts module; its parameters are the device slots.
        hidden_states: ``(T, D)``.
        top_k_index: Expert ids, int64 ``(T, K)``, of the layer's last route call.
        top_k_weights: Mixing weights ``(T, K)``.

    Returns:
        ``(T, D)`` in the dtype of ``hidden_states``. Unless every expert is resident, it has no
        backward pass: one is refused when it is asked for.

    Raises:
        RuntimeError: Captured in a CUDA graph, while not every expert is resident.
    """
    attached = getattr(module, ATTRIBUTE, None)
    if attached is None:
        return own_forward(module)(module, hidden_states, top_k_index, top_k_weights)
    if attached.is_free_of_host(module, hidden_states, top_k_weights):
        attached.routed_by = None
        return attached.own_forward(module, hidden_states, top_k_index, top_k_weights)
    if attached.all_resident and attached.has_moved(module):
        # an adapter's weights, or ones that were assigned: ours would compute from the old ones
        attached.routed_by = None
        return attached.own_forward(module, hidden_states, top_k_index, top_k_weights)
    arguments = (hidden_states, top_k_weights, top_k_index, module, attached)
    if torch.is_grad_enabled():
        if any(parameter.requires_grad for parameter in module.parameters()):
            raise RuntimeError(
                f"layer {attached.layer}: the experts of an attached model have no gradient, but "
                "a parameter of theirs requires one: requires_grad_(False), torch.no_grad(), or "
                "attach(..., resident=1.0), without verify"
            )
        if hidden_states.requires_grad or top_k_weights.requires_grad:
            return _ForwardOnly.apply(*arguments)
    return _mix(*arguments)


class _ForwardOnly(torch.autograd.Function):
    """Slots hold other experts by the time a backward pass would read them."""

    @staticmethod
    def forward(ctx, *arguments):
        return _mix(*arguments)

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError(
            "the experts of an attached model have no backward pass: detach() first, or "
            "attach(..., resident=1.0), without verify"
        )


# reads the step record, orders copies on streams: nothing to trace
@torch.compiler.disable(reason=UNTRACEABLE)
def _mix(hidden_states, weights_TK, ids_TK, module, attached):
    (T, D), K, layer = hidden_states.shape, ids_TK.shape[1], attached.layer
    audit = attached.audit
    refuse_capture(hidden_states.device)
    if T == 0:
        return torch.empty_like(hidden_states)
    with profiler_range("moe_gpu::experts"), attached.offloader.lock:
        if attached.routed_by not in (None, threading.get_ident()):
            raise RuntimeError(
                f"layer {layer}: another thread routed while this one was about to compute its "
                "experts; call the model itself, whose calls wait for each other"
            )
        attached.routed_by = None
        attached.offloader.request(layer)
        # queued behind the request: the device sorts while the host waits and plans
        order_N = ids_TK.reshape(-1).argsort(stable=True)
        x_ND = hidden_states if T == 1 else hidden_states[order_N // K]  # T = 1: all pairs share it

        outputs, computed = {}, 0
        is_prefill = T > attached.max_policy_tokens
        attached.computing = threading.get_ident()
        try:
            for expert, slot, start, stop in attached.offloader.step(
                layer, T * K, is_prefill=is_prefill
            ):
                weights = attached.weights_S[slot]
                if attached.is_askew:  # packed, of odd sizes: as slots hold it, so to the same bits
                    weights = {name: weight.clone() for name, weight in weights.items()}
                x = x_ND if T == 1 else x_ND[start:stop]
                outputs[expert] = _run_expert(module, weights, x)
                computed += stop - start
                if audit is not None:
                    run = functools.partial(_run_expert, module, weights)
                    audit.compare(expert, run)
        finally:
            attached.computing = None
        if computed != T * K:  # another step of this layer closed ours
            raise RuntimeError(f"layer {layer}: two forwards of one attached model overlapped")

        sorted_ND = torch.cat([outputs[expert] for expert in sorted(outputs)])
        pairs_ND = torch.empty_like(sorted_ND).index_copy_(0, order_N, sorted_ND)
        weighted_TKD = pairs_ND.view(T, K, D) * weights_TK.float().unsqueeze(-1)  # float32
        mixed_TD = weighted_TKD.sum(1)
        if audit is not None:
            audit.sample(pairs_ND.view(T, K, D), mixed_TD)
        return mixed_TD.to(hidden_states.dtype)


def _run_expert(module, weights, x_ND):
    gate_up_ND = _project(module, weights, "gate_up_proj", x_ND)
    return _project(module, weights, "down_proj", module._apply_gate(gate_up_ND))


def _project(module, weights, name, x_ND):
    weight = weights[name].t() if module.is_transposed else weights[name]
    return F.linear(x_ND, weight, weights[f"{name}_bias"] if module.has_bias else None)


ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
