"""Weights of a checkpoint: the model of from_pretrained, experts found on disk, refusals."""

import warnings
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    MixtralForCausalLM,
    Qwen3MoeConfig,
)
from transformers.core_model_loading import WeightRenaming

from checkpoints import edit, save
from loaded import assert_same_model, blocks_of, load, meta_and_shards
from mixtral import EXPERTS, LAYERS, make_config, make_model
from moe_gpu.huggingface import origins
from moe_gpu.huggingface.blocks import find_blocks
from moe_gpu.huggingface.checkpoint import (
    meta_model,
)
from moe_gpu.huggingface.loading import load_dense
from moe_gpu.huggingface.origins import locate_experts
from moe_gpu.offload.shards import CheckpointError, Shards

GATE = "model.layers.1.mlp.experts.gate_up_proj"
W1 = "model.layers.1.block_sparse_moe.experts.{}.w1.weight"
Q = "model.layers.0.self_attn.q_proj.weight"


STORED = {
    "separate": {},
    "separate, sharded": {"sharded": True},
    "packed": {"packed": True},
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["as stored", "to bf16"])
@pytest.mark.parametrize("stored", STORED)
def test_same_as_from_pretrained(stored, dtype, tied, tmp_path):
    save(make_model(tie_word_embeddings=tied), tmp_path, **STORED[stored])
    model, experts = load(tmp_path, dtype)
    assert (experts.num_layers, experts.num_experts) == (LAYERS, EXPERTS)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype or "auto")
    assert_same_model(model, experts, reference)
    out = tmp_path / "again"
    model.save_pretrained(out)
    reference.save_pretrained(tmp_path / "reference")
    written = [load_file(f / "model.safetensors") for f in (out, tmp_path / "reference")]
    assert set(written[0]) == set(written[1])


SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_experts_per_tok": 2,
    "initializer_range": 0.3,
    "max_position_embeddings": 64,
}


FAMILIES = {
    "mixtral with yarn": lambda: make_config(
        head_dim=8,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    ),
    "qwen3": lambda: Qwen3MoeConfig(
        **SMALL, num_experts=EXPERTS, num_key_value_heads=2, head_dim=8, mlp_only_layers=[1]
    ),
    # a dense first layer, shared experts, and a correction bias that stays float32
    "deepseek v3": lambda: DeepseekV3Config(
        **SMALL, n_routed_experts=EXPERTS, n_group=2, topk_group=1, first_k_dense_replace=1,
        q_lora_rank=12, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8,
        num_key_value_heads=4,
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families(family, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family]())
    for name, buffer in model.named_buffers():
        if "bias" in name:
            buffer.normal_()
    model.save_pretrained(tmp_path)
    model, experts = load(tmp_path, torch.bfloat16)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert_same_model(model, experts, reference)


def test_separate_experts_keep_their_order(tmp_path):
    """More than ten: the tenth must not come after the first."""
    save(make_model(num_local_experts=12), tmp_path)
    model, experts = load(tmp_path)
    assert_same_model(model, experts, AutoModelForCausalLM.from_pretrained(tmp_path))


@pytest.mark.gpu
def test_loads_onto_a_gpu(tmp_path):
    save(make_model(tie_word_embeddings=True), tmp_path)
    model, _ = load(tmp_path, torch.bfloat16, "cuda")
    reference = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, device_map="cuda"
    )
    for name, tensor in [*reference.state_dict().items(), *reference.named_buffers()]:
        mine = model.get_parameter_or_buffer(name)
        assert mine.is_meta == ("experts" in name)
        assert mine.is_meta or torch.equal(mine, tensor), name


def test_base_model_without_its_prefix(tmp_path):
    model = make_model(tie_word_embeddings=True)
    save(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(bare, tmp_path / "model.safetensors", {"format": "pt"})
    reference = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(reference.lm_head.weight, model.lm_head.weight)
    assert_same_model(*load(tmp_path), reference)


def test_tied_weights_of_which_only_the_other_is_stored(tmp_path):
    save(make_model(tie_word_embeddings=True), tmp_path)
    embedding = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    edit(tmp_path, **{"model.embed_tokens.weight": None, "lm_head.weight": embedding})
    model, experts = load(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_same_model(model, experts, AutoModelForCausalLM.from_pretrained(tmp_path))


def test_tied_weights_stored_with_different_values_stay_apart(tmp_path):
    save(make_model(tie_word_embeddings=True), tmp_path)
    edit(tmp_path, **{"lm_head.weight": torch.randn(97, 32)})
    model, experts = load(tmp_path)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert_same_model(model, experts, AutoModelForCausalLM.from_pretrained(tmp_path))


def test_holds_one_stored_tensor_at_a_time(tmp_path, monkeypatch):
    save(make_model(), tmp_path)
    alive, most = weakref.WeakSet(), []

    def counted(shards, name):
        most.append(len(alive))
        tensor = own(shards, name)
        alive.add(tensor)
        return tensor

    own = Shards.load
    monkeypatch.setattr(Shards, "load", counted)
    loaded = []
    model, _ = load(tmp_path, torch.bfloat16, progress=loaded.append)
    assert len(most) == 17 and not any(most)
    dense = {id(p): p.nbytes for n, p in model.named_parameters() if "experts" not in n}
    assert sum(loaded) == sum(dense.values())


def test_changes_no_random_state(tmp_path):
    save(make_model(), tmp_path)
    before = torch.get_rng_state()
    load(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({Q: None}, f"lacks 1 weights of MixtralForCausalLM: {Q}"),
        ({"lm_head.weight": None}, "lacks 1 weights of MixtralForCausalLM: lm_head.weight"),
        (
            {f"model.layers.{i}.{n}.weight": None for i in range(2) for n in (
                "input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")},
            r"lacks 8 weights.*: model.layers.0.input_layernorm.weight, .* and 3 more",
        ),
        (
            {Q: torch.zeros(32, 31)},
            rf"{Q} has shape \(32, 31\), expected \(32, 32\) for {Q}",
        ),
        (
            {"model.layers.0.mlp.gate.weight": torch.zeros(8, 32)},
            "block_sparse_moe.gate.weight and .*mlp.gate.weight both become model.layers.0.mlp.ga",
        ),
        ({Q: torch.zeros(32, 32).to(torch.float8_e4m3fn)}, f"{Q} is torch.float8_e4m3fn.*: None"),
    ],
    ids=["missing", "missing head", "many missing", "shape", "twice", "float8"],
)  # fmt: skip
def test_refuses_dense_weights(changes, message, tmp_path):
    save(make_model(), tmp_path)
    edit(tmp_path, **changes)
    model, blocks, shards = meta_and_shards(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        load_dense(model, blocks, shards, "cpu")
    if "float8" not in message:
        assert all(p.is_meta for p in model.parameters()), "refused before anything was loaded"


@pytest.mark.parametrize(
    "packed, changes, message",
    [
        (
            False,
            {W1.format(3): None},
            rf"{GATE} needs 8 experts, 0 to 7, .* has 7 of .experts.\*.w1.weight; missing: 3",
        ),
        (False, {W1.format(8): torch.zeros(48, 32)}, "has 9 of .*; missing: none"),
        (False, {W1.format("03"): torch.zeros(48, 32)}, "has 9 of .*; missing: none"),
        (
            False,
            {W1.format(e): None for e in range(8)},
            "has 0 of .*; missing: 0, 1, 2, 3, 4, 5, 6, 7",
        ),
        (False, {W1.format(3): None, W1.format(8): torch.zeros(48, 32)}, "missing: 3"),
        (True, {GATE: None}, f"lacks expert weights: nothing becomes {GATE}"),
        (True, {GATE: torch.zeros(9, 96, 32)}, rf"{GATE} has shape \(9, 96, 32\), expected \(8,"),
        (True, {W1.format(0): torch.zeros(48, 32)}, f"experts.0.w1.weight and {GATE} both become"),
    ],
    ids=[
        "missing",
        "too many",
        "again",
        "no w1",
        "other number",
        "packed lost",
        "packed E",
        "twice",
    ],
)
def test_refuses_experts(packed, changes, message, tmp_path):
    save(make_model(), tmp_path, packed=packed)
    edit(tmp_path, **changes)
    model, blocks, shards = meta_and_shards(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        locate_experts(model, blocks, shards)


def test_refuses_experts_that_are_more_than_stacked(tmp_path, monkeypatch):
    save(make_model(), tmp_path)
    model, blocks, shards = meta_and_shards(tmp_path)
    transforms = origins.get_model_conversion_mapping(model)
    transforms[2].operations.append(origins.Concatenate(dim=1))
    monkeypatch.setattr(origins, "get_model_conversion_mapping", lambda _: transforms)
    with pytest.raises(
        CheckpointError, match="down_proj is made of .*w2.weight by MergeModul.*attach"
    ):
        locate_experts(model, blocks, shards)


def test_refuses_both_layouts_in_any_order(tmp_path, monkeypatch):
    save(make_model(), tmp_path, packed=True)
    edit(tmp_path, **{W1.format(0): torch.zeros(48, 32)})
    model, blocks, shards = meta_and_shards(tmp_path)
    monkeypatch.setattr(origins, "dot_natural_key", lambda key: ("block_sparse" in key, key))
    with pytest.raises(CheckpointError, match=f"{GATE} and .*experts.0.w1.weight both become"):
        locate_experts(model, blocks, shards)


def test_a_right_name_is_not_renamed(tmp_path, monkeypatch):
    """As from_pretrained does where a renaming for older checkpoints goes too far."""
    save(make_model(), tmp_path)
    own = origins.get_model_conversion_mapping
    too_far = WeightRenaming("lm_head", "nowhere")
    monkeypatch.setattr(origins, "get_model_conversion_mapping", lambda m: [*own(m), too_far])
    model, _ = load(tmp_path)
    assert not model.lm_head.weight.is_meta


def test_unexpected_weights_are_named_once(tmp_path):
    save(make_model(), tmp_path)
    old = "model.layers.0.self_attn.rotary_emb.inv_freq"  # what older checkpoints hold
    edit(
        tmp_path,
        **{"extra.weight": torch.zeros(2), "more.bias": torch.zeros(2), old: torch.zeros(4)},
    )
    with pytest.warns(RuntimeWarning, match="2 tensors .*left out: extra.weight, more.b") as caught:
        model, experts = load(tmp_path)
    assert len(caught) == 1
    assert_same_model(model, experts, AutoModelForCausalLM.from_pretrained(tmp_path))


def test_nothing_is_unexpected_in_what_transformers_wrote(tmp_path):
    save(make_model(), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(tmp_path)


def test_a_buffer_that_nothing_computes_is_refused(tmp_path, monkeypatch):
    save(make_model(), tmp_path)
    monkeypatch.setattr(MixtralForCausalLM, "initialize_weights", lambda self: None)
    model, blocks, shards = meta_and_shards(tmp_path)
    with pytest.raises(RuntimeError, match="does not say how to compute model.rotary_emb.inv_freq"):
        load_dense(model, blocks, shards, "cpu")


def test_blocks_of_mixtral_are_the_known_ones(tmp_path):
    model = meta_model(make_config(), torch.float32)
    known = [(b.name, b.experts) for b in find_blocks(model)]
    assert known == [(b.name, b.experts) for b in blocks_of(model)]
