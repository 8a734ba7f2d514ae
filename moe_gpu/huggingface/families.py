"""Which model families are known: how the router of each turns hidden states into a routing.

The family is told by the class name of the router. A new one is a row of :data:`FAMILIES` and a row
of ``tests/zoo.py``, whose tests compare it with the stock model.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn import functional as F

Logits = Callable[[nn.Module, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class RouterFamily:
    """How routers of one class turn hidden states into experts and weights.

    Attributes:
        logits: ``(router, hidden_states (T, D)) -> (T, E)``, as the router itself computes them.
        score: ``router -> dict``: keyword arguments of :class:`~moe_gpu.gate.MoEGate` that make its
            score rule this router's.
        weights_dtype: ``block -> dtype`` of its mixing weights; None: that of its logits.
        bias: ``block -> (E,)`` correction bias of the block's router; None where there is none.
        since: First transformers in which the class is as described here; before, its results had
            another order or its cache another size.
    """

    logits: Logits
    score: Callable[[nn.Module], dict[str, object]]
    weights_dtype: Callable[[nn.Module], torch.dtype | None]
    bias: Callable[[nn.Module], torch.Tensor | None] = lambda block: None
    since: tuple[int, int] = (5, 17)


# -- logits


def _linear(router: nn.Module, hidden_TD: torch.Tensor) -> torch.Tensor:
    return F.linear(hidden_TD, router.weight)


def _linear_with_bias(router: nn.Module, hidden_TD: torch.Tensor) -> torch.Tensor:
    return F.linear(hidden_TD, router.weight, router.bias)


def _linear_without_autocast(router: nn.Module, hidden_TD: torch.Tensor) -> torch.Tensor:
    with torch.autocast(hidden_TD.device.type, enabled=False):
        return _linear_in_float32(router, hidden_TD)


def _linear_in_float32(router: nn.Module, hidden_TD: torch.Tensor) -> torch.Tensor:
    return F.linear(hidden_TD.float(), router.weight.float())


def _linear_to_float32(router: nn.Module, hidden_TD: torch.Tensor) -> torch.Tensor:
    return F.linear(hidden_TD, router.weight).float()


def _linear_in_own_dtype(router: nn.Module, hidden_TD: torch.Tensor) -> torch.Tensor:
    return F.linear(hidden_TD.to(router.weight.dtype), router.weight)


def _linear_capped(router: nn.Module, hidden_TD: torch.Tensor) -> torch.Tensor:
    cap = router.router_logit_softcapping
    logits_TE = _linear_to_float32(router, hidden_TD)
    return cap * (logits_TE / cap).tanh() if cap > 0 else logits_TE


def _linear_of_gate(router: nn.Module, hidden_TD: torch.Tensor) -> torch.Tensor:
    return router.gate(hidden_TD).float()


def _linear_of_wg(router: nn.Module, hidden_TD: torch.Tensor) -> torch.Tensor:
    return router.wg(hidden_TD.to(router.wg.weight.dtype))


# -- score rules


def _softmax_of_chosen(router: nn.Module) -> dict[str, object]:
    return {"renormalize": True}


def _softmax(router: nn.Module) -> dict[str, object]:
    return {"renormalize": bool(router.norm_topk_prob)}


def _softmax_in_best_groups(router: nn.Module) -> dict[str, object]:
    rule = {"renormalize": False, "scaling_factor": router.routed_scaling_factor}
    if router.topk_method == "group_limited_greedy":
        groups = {"num_groups": router.num_group, "top_groups": router.topk_group}
        rule |= groups | {"group_score": "max"}
    elif router.topk_method != "greedy":
        raise ValueError(
            f"topk_method={router.topk_method!r} is not known: 'greedy', 'group_limited_greedy' are"
        )
    return rule


def _sigmoid_in_best_groups(router: nn.Module) -> dict[str, object]:
    return {
        "score": "sigmoid",
        "renormalize": bool(router.norm_topk_prob),
        "scaling_factor": router.routed_scaling_factor,
        "num_groups": router.num_group,
        "top_groups": router.topk_group,
        "group_score": "top2_sum",
    }


def _softmax_of_all(router: nn.Module) -> dict[str, object]:
    return {"renormalize": False}


def _sigmoid_of_chosen(router: nn.Module) -> dict[str, object]:
    return {"score": "sigmoid", "renormalize": True}


def _scaled_sigmoid(router: nn.Module) -> dict[str, object]:
    return _sigmoid_of_chosen(router) | {"scaling_factor": router.router_scaling_factor}


def _route_scaled_sigmoid(router: nn.Module) -> dict[str, object]:
    return _sigmoid_of_chosen(router) | {"scaling_factor": router.route_scale}


def _softmax_or_sigmoid(router: nn.Module) -> dict[str, object]:
    if router.expert_selection_fn == "softmax":
        return _softmax_of_chosen(router)
    return {"score": "sigmoid", "renormalize": bool(router.norm_topk_prob)}


def _sparsemixer(router: nn.Module) -> dict[str, object]:
    return {
        "score": "sparsemixer",
        "renormalize": False,
        "jitter_eps": router.router_jitter_noise,
    }


# -- dtypes of the weights, and correction biases


def _float32(block: nn.Module) -> torch.dtype:
    return torch.float32


def _of_logits(block: nn.Module) -> None:
    return None


def _of_model(block: nn.Module) -> torch.dtype:
    return block.experts.down_proj.dtype  # a router may stay float32


def _bias_of_router(block: nn.Module) -> torch.Tensor:
    return block.gate.e_score_correction_bias


def _bias_of_block(block: nn.Module) -> torch.Tensor:
    return block.e_score_correction_bias


def _expert_bias_of_block(block: nn.Module) -> torch.Tensor:
    return block.expert_bias


def _bias_of_statics(block: nn.Module) -> torch.Tensor:
    return block.gate.moe_statics.e_score_correction_bias.view(-1)


_QWEN = RouterFamily(_linear, _softmax, _of_logits)
_QWEN_RENORMALIZED = RouterFamily(_linear, _softmax_of_chosen, _of_logits)
_MIXTRAL = RouterFamily(_linear, _softmax_of_chosen, _float32)
_DEEPSEEK_V3 = RouterFamily(_linear_in_float32, _sigmoid_in_best_groups, _float32, _bias_of_router)
_DEEPSEEK_SPARSE = replace(_DEEPSEEK_V3, since=(5, 20))
_GRANITE = RouterFamily(_linear_to_float32, _softmax_of_chosen, _of_model, since=(5, 21))

FAMILIES = {
    "MixtralTopKRouter": _MIXTRAL,
    "Qwen2MoeTopKRouter": _QWEN,
    "Qwen3MoeTopKRouter": _QWEN,
    "Qwen3NextTopKRouter": _QWEN,
    "OlmoeTopKRouter": _QWEN,
    "PhimoeTopKRouter": RouterFamily(_linear, _sparsemixer, _of_logits),
    "DeepseekV2TopkRouter": RouterFamily(_linear_in_float32, _softmax_in_best_groups, _float32),
    "DeepseekV3TopkRouter": _DEEPSEEK_V3,
    "Glm4MoeTopkRouter": _DEEPSEEK_V3,
    "GptOssTopKRouter": RouterFamily(_linear_with_bias, _softmax_of_chosen, _of_logits),
    "GraniteMoeTopKRouter": _GRANITE,
    "MiniMaxM2TopKRouter": RouterFamily(
        _linear_in_own_dtype, _sigmoid_of_chosen, _float32, _bias_of_block
    ),
    # the same rules under other names
    "AfmoeTokenChoiceRouter": RouterFamily(
        _linear_of_gate, _route_scaled_sigmoid, _float32, _expert_bias_of_block
    ),
    "AXK1TopkRouter": _DEEPSEEK_V3,
    "Cohere2MoeTopKRouter": RouterFamily(_linear, _softmax_or_sigmoid, _of_model),
    "DeepseekV32TopkRouter": _DEEPSEEK_SPARSE,
    "Dots1TopkRouter": _DEEPSEEK_V3,
    "Ernie4_5_MoeTopKRouter": RouterFamily(
        _linear_without_autocast, _softmax_of_chosen, _of_model, _bias_of_statics
    ),
    "ExaoneMoeTopkRouter": _DEEPSEEK_V3,
    "FlexOlmoTopKRouter": _QWEN,
    "Glm4MoeLiteTopkRouter": _DEEPSEEK_V3,
    "GlmMoeDsaTopkRouter": _DEEPSEEK_SPARSE,
    "GraniteMoeHybridTopKRouter": _GRANITE,
    "GraniteMoeSharedTopKRouter": _GRANITE,
    "GraniteMoeSWATopKRouter": _GRANITE,
    "HunYuanMoEV1Gate": RouterFamily(_linear_of_wg, _softmax_of_chosen, _of_logits),
    "HYV3TopKRouter": RouterFamily(_linear_in_float32, _scaled_sigmoid, _float32, _bias_of_block),
    "JambaTopKRouter": RouterFamily(_linear, _softmax_of_all, _of_model),
    "LagunaTopKRouter": RouterFamily(
        _linear_capped, _sigmoid_of_chosen, _of_model, _bias_of_router
    ),
    "MellumTopKRouter": _QWEN,
    "MiMoV2FlashTopkRouter": _DEEPSEEK_V3,
    "MiniMaxTopKRouter": _MIXTRAL,
    "Qwen3_5MoeTopKRouter": _QWEN_RENORMALIZED,
    "SolarOpenTopkRouter": _DEEPSEEK_V3,
}

# families that cannot be attached, and why
REFUSED = {
    "Llama4Router": (
        "its router returns scores of every expert, and its experts take every token for each of "
        "them, scaled beforehand: there are no routed pairs to load experts for"
    ),
}

HOW_TO_ADD = (
    "To add a family:\n"
    "  1. give its router class a row in FAMILIES of moe_gpu/huggingface/families.py: how it makes\n"
    "     logits, its score rule, the dtype of its weights;\n"
    "  2. give it a row in tests/zoo.py: a small config of it;\n"
    "  3. run pytest tests/test_families.py, which compares it with the stock model."
)
