"""Small random models of every family that attaches: two layers that run in milliseconds.

A family is a row of :data:`ZOO`; what its config says beyond :data:`COMMON` makes it use what only
that family has: groups of experts, correction biases, shared experts, layers without attention.
"""

import re
from dataclasses import dataclass, field

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

VOCAB, WIDTH, LAYERS = 97, 32, 2

COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,  # experts that differ: a wrong one shows
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": None,
}

# experts by the name that a config gives them
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LOCAL = {"num_local_experts": 8, "num_experts_per_tok": 2}
GROUPS = {
    "n_routed_experts": 16,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.5,
}

ALL_DENSE = {"first_k_dense_replace": 0}  # no dense layer before the first MoE layer
SPARSE = {"mlp_layer_types": ["sparse"] * LAYERS}
HEADS = {"head_dim": 8}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
INDEXED = LATENT | {"index_n_heads": 2, "index_head_dim": 8}
DELTA = {
    "shared_expert_intermediate_size": 40,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
} | HEADS


@dataclass(frozen=True, eq=False)
class Family:
    """One row of the zoo.

    Attributes:
        name: Of the row, and ``model_type`` of the config.
        config: Its class in transformers.
        arguments: Of the config, beside :data:`COMMON`.
        variants: Further settings of the router, by name: what else it can be told to do.
        aux_loss: Whether the model computes one where it is asked for router logits.
        since: First transformers in which it is as tested.
        limits: What it cannot do, by column of the table: what the refusal says, and the cell.
        in_full: Goes through every check; others, whose router is one of these under another
            name, through those that a new family can fail.
    """

    name: str
    config: str
    arguments: dict[str, object]
    variants: dict[str, dict[str, object]] = field(default_factory=dict)
    aux_loss: bool = True
    since: tuple[int, int] = (5, 17)
    limits: dict[str, tuple[str, str]] = field(default_factory=dict)
    in_full: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def is_available(self) -> bool:
        """Whether the installed transformers knows the family."""
        version = tuple(map(int, transformers.__version__.split(".")[:2]))
        return version >= self.since and hasattr(transformers, self.config)

    def make_config(self, **changes) -> transformers.PreTrainedConfig:
        """Return the small config of the family."""
        return getattr(transformers, self.config)(**COMMON | self.arguments | changes)

    def make_model(
        self, seed: int = 0, dtype: torch.dtype = torch.float32, **changes
    ) -> PreTrainedModel:
        """Return a random model in eval mode, nothing of it all zero."""
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(self.make_config(**changes))
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and not tensor.any():  # biases, and afmoe's router
                tensor.normal_(std=0.1 if "bias" in name else 0.3)
        kept = model._get_dtype_plan(dtype)  # some stay float32, as from_pretrained leaves them
        model.to(dtype)
        for name, tensor in model.state_dict(keep_vars=True).items():
            for pattern, own in kept.items():
                if re.search(pattern.replace("*", ".*"), name):
                    tensor.data = tensor.data.to(own)
        return model.eval()


RENORMALIZED = {"renormalized": {"norm_topk_prob": True}, "not": {"norm_topk_prob": False}}
IN_GROUPS = RENORMALIZED | {"one group": {"n_group": 1, "topk_group": 1}}


def _in_full(*arguments, **options) -> Family:
    return Family(*arguments, in_full=True, **options)


ROWS = [
    _in_full("mixtral", "MixtralConfig", LOCAL),
    _in_full(
        "qwen2_moe", "Qwen2MoeConfig", EXPERTS | {"shared_expert_intermediate_size": 40},
        RENORMALIZED,
    ),
    _in_full("qwen3_moe", "Qwen3MoeConfig", EXPERTS | HEADS, RENORMALIZED),
    _in_full("qwen3_next", "Qwen3NextConfig", EXPERTS | DELTA, RENORMALIZED),
    _in_full("olmoe", "OlmoeConfig", EXPERTS, RENORMALIZED),
    _in_full(
        "phimoe", "PhimoeConfig", LOCAL, {"far": {"router_jitter_noise": 0.5}},
        limits={
            "train": (
                "a sparsemixer router draws its experts at random",
                "refused: its training draws experts at random",
            ),
        },
    ),
    _in_full(
        "deepseek_v2", "DeepseekV2Config",
        GROUPS | LATENT | ALL_DENSE | {"topk_method": "group_limited_greedy"},
        {"greedy": {"topk_method": "greedy"}},
        aux_loss=False,
    ),
    _in_full(
        "deepseek_v3", "DeepseekV3Config", GROUPS | LATENT | ALL_DENSE, IN_GROUPS,
        aux_loss=False,
    ),
    _in_full(
        "glm4_moe", "Glm4MoeConfig", GROUPS | HEADS | ALL_DENSE, IN_GROUPS, aux_loss=False
    ),
    _in_full("gpt_oss", "GptOssConfig", LOCAL | HEADS | {"rope_parameters": None}),
    _in_full("granitemoe", "GraniteMoeConfig", LOCAL, since=(5, 21)),
    _in_full("minimax_m2", "MiniMaxM2Config", LOCAL | HEADS),
    # routers of the same kinds under other names
    Family(
        "afmoe", "AfmoeConfig",
        EXPERTS | HEADS | {"num_dense_layers": 0, "route_scale": 1.5}, aux_loss=False,
    ),
    Family("axk1", "AXK1Config", GROUPS | LATENT | ALL_DENSE, aux_loss=False),
    Family(
        "cohere2_moe", "Cohere2MoeConfig", EXPERTS | HEADS | {"expert_selection_fn": "softmax"},
        {"sigmoid": {"expert_selection_fn": "sigmoid"}}, aux_loss=False,
    ),
    Family(
        "deepseek_v32", "DeepseekV32Config", GROUPS | INDEXED | SPARSE, aux_loss=False,
        since=(5, 20),
    ),
    Family("dots1", "Dots1Config", GROUPS | HEADS | ALL_DENSE, aux_loss=False),
    Family(
        "ernie4_5_moe", "Ernie4_5_MoeConfig",
        {"moe_num_experts": 8, "moe_k": 2, "moe_layer_start_index": 0},
    ),
    Family(
        "exaone_moe", "ExaoneMoeConfig",
        EXPERTS | HEADS | SPARSE | {
            "num_shared_experts": 1, "n_group": 4, "topk_group": 2,
            "layer_types": ["full_attention"] * LAYERS,
        },
        aux_loss=False,
    ),
    Family("flex_olmo", "FlexOlmoConfig", EXPERTS, RENORMALIZED),
    Family("glm4_moe_lite", "Glm4MoeLiteConfig", GROUPS | LATENT | SPARSE, aux_loss=False),
    Family(
        "glm_moe_dsa", "GlmMoeDsaConfig", GROUPS | INDEXED | SPARSE, aux_loss=False,
        since=(5, 20),
    ),
    Family(
        "granitemoehybrid", "GraniteMoeHybridConfig",
        LOCAL | {
            "shared_intermediate_size": 40, "layer_types": ["mamba", "attention"],
            "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8,
        },
        since=(5, 21),
    ),
    Family(
        "granitemoeshared", "GraniteMoeSharedConfig", LOCAL | {"shared_intermediate_size": 40},
        since=(5, 21),
    ),
    Family("granitemoe_swa", "GraniteMoeSWAConfig", LOCAL, since=(5, 21)),
    Family(
        "hunyuan_v1_moe", "HunYuanMoEV1Config", HEADS | {"num_experts": 8, "moe_topk": 2},
        aux_loss=False,
    ),
    Family(
        "hy_v3", "HYV3Config", EXPERTS | HEADS | SPARSE, aux_loss=False
    ),
    Family(
        "jamba", "JambaConfig",
        EXPERTS | {
            "expert_layer_period": 1, "expert_layer_offset": 0, "attn_layer_period": 2,
            "attn_layer_offset": 1, "mamba_dt_rank": 4,
        },
        since=(5, 21),
    ),
    Family("laguna", "LagunaConfig", EXPERTS | HEADS | SPARSE, {
        "capped": {"moe_router_logit_softcapping": 2.0},
    }),
    Family("mellum", "MellumConfig", EXPERTS | HEADS, RENORMALIZED),
    Family("mimo_v2_flash", "MiMoV2FlashConfig", GROUPS | HEADS | {"v_head_dim": 6} | SPARSE,
           aux_loss=False),
    Family("minimax", "MiniMaxConfig", LOCAL | HEADS | {
        "layer_types": ["full_attention", "linear_attention"],
    }),
    Family("qwen3_5_moe_text", "Qwen3_5MoeTextConfig", EXPERTS | DELTA),
    Family("solar_open", "SolarOpenConfig", GROUPS | HEADS | ALL_DENSE, aux_loss=False),
]  # fmt: skip

ZOO = {family.name: family for family in ROWS}
AVAILABLE = [family for family in ROWS if family.is_available]
