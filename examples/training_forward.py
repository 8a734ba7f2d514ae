"""Faster experts and attention for training a small Mixtral on a CPU.

They compute what transformers computes, in the dtype of the surrounding autocast; a trained
model needs neither.

Shape suffixes: T tokens, E experts, K experts per token, N routed pairs, D width, P padded rows.
"""

import torch
import torch.nn.functional as F
from transformers import MixtralForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

GROUP_ROWS = 128


def use_training_forward(model: MixtralForCausalLM) -> None:
    """Make ``model`` run the functions of this file."""
    ALL_EXPERTS_FUNCTIONS.register("padded", padded_experts_forward)
    ALL_ATTENTION_FUNCTIONS.register("batched", batched_attention_forward)
    model.set_experts_implementation("padded")
    model.set_attn_implementation("batched")


class _Dispatch(torch.autograd.Function):
    """Copy each token's row to the K places of its experts; gather, never scatter, gradients."""

    @staticmethod
    def forward(ctx, x_TD, token_of_P, place_TK):
        ctx.save_for_backward(place_TK)
        return x_TD[token_of_P]

    @staticmethod
    def backward(ctx, grad_PD):
        (place_TK,) = ctx.saved_tensors
        return sum(grad_PD[place_T] for place_T in place_TK.unbind(1)), None, None


class _Collect(torch.autograd.Function):
    """Fetch the K expert outputs of each token; padding rows get a zero gradient."""

    @staticmethod
    def forward(ctx, y_PD, place_TK):
        ctx.save_for_backward(place_TK)
        ctx.rows = y_PD.shape[0]
        return y_PD[place_TK]

    @staticmethod
    def backward(ctx, grad_TKD):
        (place_TK,) = ctx.saved_tensors
        grad_PD = grad_TKD.new_zeros(ctx.rows, grad_TKD.shape[-1])
        grad_PD[place_TK.reshape(-1)] = grad_TKD.flatten(0, 1)
        return grad_PD, None


def padded_experts_forward(
    self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Experts of one layer for training: one matrix product an expert, in the autocast dtype.

    Groups are padded to multiples of ``GROUP_ROWS``. oneDNN compiles a bfloat16 product for
    every new shape, and with the group sizes that routing gives, each call would be new.
    """
    device, (T, K) = hidden_states.device, top_k_index.shape
    is_mixed = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if is_mixed else hidden_states.dtype

    ids_N = top_k_index.reshape(-1)
    order_N = torch.argsort(ids_N, stable=True)
    counts_E = torch.bincount(ids_N, minlength=self.num_experts)
    padded_E = (counts_E + GROUP_ROWS - 1) // GROUP_ROWS * GROUP_ROWS
    ends_E = padded_E.cumsum(0)
    shift_E = (ends_E - padded_E) - (counts_E.cumsum(0) - counts_E)
    place_sorted_N = torch.arange(T * K, device=device) + shift_E[ids_N[order_N]]
    place_TK = torch.empty_like(order_N).scatter_(0, order_N, place_sorted_N).view(T, K)
    token_of_P = order_N.new_zeros(int(ends_E[-1])).scatter_(0, place_sorted_N, order_N // K)

    with torch.autocast(device.type, enabled=False):
        ends_E = ends_E.to(torch.int32)
        gate_up = self.gate_up_proj.to(dtype).transpose(1, 2)
        down = self.down_proj.to(dtype).transpose(1, 2)
        x_PD = _Dispatch.apply(hidden_states.to(dtype), token_of_P, place_TK)
        gate, up = F.grouped_mm(x_PD, gate_up, offs=ends_E).chunk(2, dim=-1)
        y_PD = F.grouped_mm(self.act_fn(gate) * up, down, offs=ends_E)
        y_TKD = _Collect.apply(y_PD, place_TK)
        return (y_TKD * top_k_weights.to(dtype).unsqueeze(-1)).sum(1)


def batched_attention_forward(
    module, query, key, value, attention_mask, scaling: float, **unused
) -> tuple[torch.Tensor, None]:
    """Causal attention for training as two batched products, in the autocast dtype.

    With rows this short, half the time of the fused CPU kernel in bfloat16.
    """
    (B, H, S, D), groups = query.shape, key.shape[1]
    device = query.device.type
    is_mixed = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if is_mixed else query.dtype
    with torch.autocast(device, enabled=False):
        q = query.to(dtype).reshape(B * groups, H // groups * S, D)
        k, v = (x.to(dtype).reshape(B * groups, S, D) for x in (key, value))
        future = torch.full((S, S), -torch.inf, dtype=dtype, device=q.device).triu_(1)
        future = future.repeat(H // groups, 1)
        scores = torch.baddbmm(future, q, k.transpose(1, 2), alpha=scaling)
        out = torch.bmm(scores.softmax(-1), v)
    return out.view(B, H, S, D).transpose(1, 2).contiguous(), None
