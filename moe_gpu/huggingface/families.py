"""Which model families are known: how each router scores, and where a model's MoE blocks are.

A block is a module with a router (attribute ``gate`` or ``router``) and packed ``experts``; the
family is told by the class name of the router. A new family is a row of :data:`FAMILIES` and a row
of ``tests/zoo.py``, whose tests compare it with the stock model.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import transformers
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


class MoEBlock(NamedTuple):
    """One MoE layer of a model."""

    name: str  # of the block within the model
    module: nn.Module
    router: nn.Module
    experts: nn.Module
    family: RouterFamily

    def logits(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        """Return the router's logits ``(T, E)``."""
        return self.family.logits(self.router, hidden_TD)

    def bias(self) -> torch.Tensor | None:
        """Return the router's correction bias ``(E,)``, None where it has none."""
        return self.family.bias(self.module)


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


def find_blocks(model: nn.Module) -> list[MoEBlock]:
    """Return the MoE blocks of a model in module order, which is layer order.

    Raises:
        ValueError: No block, a router of an unknown class or of a transformers too old, or experts
            that are not packed parameters with one weight up and one down.
    """
    known = ", ".join(FAMILIES)
    blocks = []
    for name, module in model.named_modules():
        experts = getattr(module, "experts", None)
        router = getattr(module, "gate", getattr(module, "router", None))
        if not (isinstance(experts, nn.Module) and isinstance(router, nn.Module)):
            continue
        found = type(router).__name__
        if found in REFUSED:
            raise ValueError(f"{name}: {found} cannot be attached: {REFUSED[found]}")
        if found not in FAMILIES:
            raise ValueError(
                f"{name}: router class {found} is not supported; known: {known}\n{HOW_TO_ADD}"
            )
        _check_version(name, found)
        _check_forward(name, module)
        _check_experts(name, experts)
        blocks.append(MoEBlock(name, module, router, experts, FAMILIES[found]))
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no MoE layer; known routers: {known}")
    return blocks


def score_arguments(block: MoEBlock) -> dict[str, object]:
    """Return the arguments of :class:`~moe_gpu.gate.MoEGate` that make it route as the block does.

    Raises:
        ValueError: A setting of the router that the gate does not know.
    """
    router, family = block.router, block.family
    try:
        rule = family.score(router)
    except ValueError as error:
        raise ValueError(f"{block.name}: {type(router).__name__} with {error}") from error
    return rule | {"weights_dtype": family.weights_dtype(block.module)}


def _check_version(name: str, found: str) -> None:
    major, minor = FAMILIES[found].since
    if tuple(map(int, transformers.__version__.split(".")[:2])) < (major, minor):
        raise ValueError(
            f"{name}: {found} is supported as of transformers {major}.{minor}, this is "
            f"{transformers.__version__}: upgrade it"
        )


def _check_forward(name: str, block: nn.Module) -> None:
    """Refuse a block that computes in another way: it may never call its router and experts."""
    own = block.__dict__.get("forward")
    if own is None or hasattr(block, "_hf_hook"):  # accelerate's wrapper calls the class's forward
        return
    function = inspect.unwrap(getattr(own, "__func__", own))
    if function is not inspect.unwrap(type(block).forward):
        raise ValueError(
            f"{name}: its forward was replaced by {getattr(function, '__module__', '?')}."
            f"{getattr(function, '__qualname__', function)}, which may compute without its router "
            "and experts: attach to a model without hub kernels (use_kernels=False)"
        )


def _check_experts(name: str, experts: nn.Module) -> None:
    names = {key for key, _ in experts.named_parameters()}
    weights = {"gate_up_proj", "down_proj"}
    if getattr(experts, "has_bias", False):
        weights |= {"gate_up_proj_bias", "down_proj_bias"}
    if any("base_layer" in key for key in names):
        raise ValueError(
            f"{name}: the experts hold an adapter: merge it (merge_and_unload) or remove it first"
        )
    if names != weights or not getattr(experts, "has_gate", True):
        raise ValueError(
            f"{name}: experts {type(experts).__name__} are not supported: they must hold "
            f"gate_up_proj and down_proj (and their biases), got {sorted(names)}"
        )
