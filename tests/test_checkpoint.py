"""Checkpoints: the same model as from_pretrained, experts found on disk, and what is refused."""

import json
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

from mixtral import EXPERTS, LAYERS, logits_of, make_config, make_model, prompt
from moe_gpu.huggingface import checkpoint, loading
from moe_gpu.huggingface.checkpoint import (
    check_quantization,
    checkpoint_dtype,
    load_generation_config,
    meta_model,
    read_config,
    resolve,
    weight_bytes,
)
from moe_gpu.huggingface.families import MoEBlock, find_blocks
from moe_gpu.huggingface.loading import load_dense, locate_experts
from moe_gpu.offload.disk import DiskExperts
from moe_gpu.offload.layout import ExpertLayout
from moe_gpu.offload.shards import CheckpointError, Shards

GATE = "model.layers.1.mlp.experts.gate_up_proj"
W1 = "model.layers.1.block_sparse_moe.experts.{}.w1.weight"
Q = "model.layers.0.self_attn.q_proj.weight"


def save(model, folder, packed=False, sharded=False):
    """Save in either layout; transformers itself writes experts as separate tensors."""
    model.save_pretrained(folder, max_shard_size="60KB" if sharded else "1GB")
    if packed:
        assert not sharded
        tensors = {name: t.contiguous() for name, t in model.state_dict().items()}
        if model.config.tie_word_embeddings:
            tensors.pop("lm_head.weight")
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def edit(folder, **changes):
    """Change tensors of a checkpoint of one file; None removes one."""
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def blocks_of(model):
    """MoE blocks of any family whose experts are packed."""
    return [
        MoEBlock(name, module.gate, module.experts, None)
        for name, module in model.named_modules()
        if hasattr(module, "experts")
    ]


def load(folder, dtype=None, device="cpu", **arguments):
    """The dense part of a model, and its experts on disk."""
    config = read_config(folder)
    shards = Shards(folder)
    model = meta_model(config, dtype or checkpoint_dtype(config, shards))
    blocks = blocks_of(model)
    load_dense(model, blocks, shards, device, **arguments)
    load_generation_config(model, folder)
    parameters = dict(blocks[0].experts.named_parameters())
    sources = locate_experts(model, blocks, shards)
    block_size = arguments.get("block_size")
    return model, DiskExperts(ExpertLayout.of(parameters), shards, sources, block_size)


def fill_experts(model, experts):
    """Take the experts from disk into a model that lacks them only."""
    layout = experts._layout
    run_1B = torch.empty(1, layout.expert_bytes, dtype=torch.uint8)
    for layer, block in enumerate(blocks_of(model)):
        full = {n: torch.empty_like(p, device="cpu") for n, p in block.experts.named_parameters()}
        for expert in range(experts.num_experts):
            experts.read_into(layer, expert, 0, layout.expert_bytes, run_1B[0])
            for name, view_1 in layout.views(run_1B).items():
                full[name][expert] = view_1[0]
        for name, value in full.items():
            setattr(block.experts, name, torch.nn.Parameter(value))


def assert_same_model(model, experts, reference):
    """All that from_pretrained sets up, bit for bit; experts stay on meta until taken in."""
    on_meta = {name for name, p in model.named_parameters() if p.is_meta}
    assert on_meta == {
        f"{b.name}.experts.{n}" for b in blocks_of(model) for n in experts._layout.fields
    }
    fill_experts(model, experts)
    state, wanted = model.state_dict(), reference.state_dict()
    assert list(state) == list(wanted)
    for name, tensor in wanted.items():
        assert state[name].dtype == tensor.dtype and torch.equal(state[name], tensor), name
    buffers, wanted = dict(model.named_buffers()), dict(reference.named_buffers())
    assert list(buffers) == list(wanted)
    for name, tensor in wanted.items():
        assert buffers[name].dtype == tensor.dtype and torch.equal(buffers[name], tensor), name
    assert not model.training
    assert [p.requires_grad for p in model.parameters()] == [
        p.requires_grad for p in reference.parameters()
    ]
    assert model.config.to_dict() == reference.config.to_dict()
    assert model.generation_config == reference.generation_config
    assert torch.equal(logits_of(model, prompt()), logits_of(reference, prompt()))


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


def meta_and_shards(folder):
    model = meta_model(read_config(folder), torch.float32)
    return model, blocks_of(model), Shards(folder)


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
    ids=["missing", "too many", "no w1", "other number", "packed lost", "packed E", "twice"],
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
    transforms = loading.get_model_conversion_mapping(model)
    transforms[2].operations.append(loading.Concatenate(dim=1))
    monkeypatch.setattr(loading, "get_model_conversion_mapping", lambda _: transforms)
    with pytest.raises(CheckpointError, match="down_proj is made of .*w2.weight by .MergeModul"):
        locate_experts(model, blocks, shards)


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


def test_generation_config(tmp_path):
    model = make_model()
    model.generation_config.update(temperature=0.7, do_sample=True, eos_token_id=[2, 5])
    save(model, tmp_path)
    loaded, _ = load(tmp_path)
    assert loaded.generation_config.eos_token_id == [2, 5]
    assert loaded.generation_config.temperature == 0.7
    (tmp_path / "generation_config.json").unlink()
    loaded, _ = load(tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.generation_config == reference.generation_config
    assert loaded.generation_config.eos_token_id is None


def test_meta_model_takes_no_memory_and_leaves_the_config_alone():
    config = make_config(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32)
    config.quantization_config = {"quant_method": "gptq"}
    before = config.to_dict()
    model = meta_model(config, torch.bfloat16)
    assert config.to_dict() == before and not hasattr(model.config, "quantization_config")
    assert all(t.is_meta for t in [*model.parameters(), *model.buffers()])
    assert not model.training and model.dtype == torch.bfloat16
    experts = 32 * 8 * 3 * 4096 * 14336 * 2
    assert experts < weight_bytes(model) < 1.04 * experts


def test_weight_bytes_counts_tied_weights_once():
    sizes = [
        weight_bytes(meta_model(make_config(tie_word_embeddings=tied), torch.float32))
        for tied in (False, True)
    ]
    assert sizes[0] - sizes[1] == 97 * 32 * 4


def test_dtype_of_the_checkpoint(tmp_path):
    config = make_config()
    save_file({"a": torch.zeros(1, dtype=torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="dtype must be given: neither config nor weights"):
        checkpoint_dtype(config, Shards(tmp_path))
    save_file({"a": torch.zeros(1).half()}, tmp_path / "model.safetensors")
    assert checkpoint_dtype(config, Shards(tmp_path)) == torch.float16
    config.dtype = torch.bfloat16
    assert checkpoint_dtype(config, Shards(tmp_path)) == torch.bfloat16


FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [24, 20]}


@pytest.mark.parametrize("dequantize", [False, True])
@pytest.mark.parametrize(
    "found, message",
    [
        ({"quant_method": "gptq", "bits": 4}, r"\(quant_method=gptq, bits=4\)"),
        ({"quant_method": "compressed-tensors", "format": "pack"}, "tensors, format=pack"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bytes, load_in_4bit=True"),
        ({"quant_method": "fp8", "weight_block_size": None}, r"\(quant_method=fp8\)"),
        ({"quant_method": "fp8", "weight_block_size": [0, 128]}, "fp8, weight_block_size"),
        (FP8 | {"fmt": "e5m2"}, "fmt=e5m2"),
    ],
)
def test_refuses_quantized_checkpoints(found, message, dequantize):
    config = make_config()
    config.quantization_config = found
    size = "0.0 GB"
    with pytest.raises(
        ValueError, match=rf"quantized .*{message}.*bfloat16 the model takes {size}$"
    ):
        check_quantization(config, dequantize)


def test_says_how_large_and_that_float8_could_be_converted():
    config = make_config(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, vocab_size=32000,
        num_key_value_heads=8, num_attention_heads=32,
    )  # fmt: skip
    assert check_quantization(config) is None and check_quantization(config, True) is None
    config.quantization_config = FP8
    assert check_quantization(config, dequantize=True) == (24, 20)
    with pytest.raises(ValueError, match="takes 93.4 GB; dequantize=True converts it"):
        check_quantization(config)


@pytest.mark.parametrize("packed", [False, True], ids=["separate", "packed"])
def test_dequantizes_float8(packed, tmp_path):
    """Against plain arithmetic: each block of 24 x 20 times its scale, rounded once."""
    rows, columns = FP8["weight_block_size"]
    model = make_model()
    save(model, tmp_path, packed=packed)
    tensors = load_file(tmp_path / "model.safetensors")
    meant = dict(tensors)
    for name, tensor in list(tensors.items()):
        if "_proj" in name or "experts" in name:
            *lead, R, C = tensor.shape
            scale = torch.rand(*lead, -(-R // rows), -(-C // columns)) + 0.1
            wide = scale.repeat_interleave(rows, -2).repeat_interleave(columns, -1)[..., :R, :C]
            tensors |= {name: tensor.to(torch.float8_e4m3fn), f"{name}_scale_inv": scale}
            meant[name] = tensors[name].float() * wide
    reference = tmp_path / "meant"
    make_model().save_pretrained(reference)
    save_file(meant, reference / "model.safetensors", {"format": "pt"})
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": FP8}))

    block_size = check_quantization(read_config(tmp_path), dequantize=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # scales are not unexpected
        loaded, experts = load(tmp_path, torch.bfloat16, block_size=block_size)
    wanted = AutoModelForCausalLM.from_pretrained(reference, dtype=torch.bfloat16)
    loaded.config._name_or_path = wanted.config._name_or_path
    assert_same_model(loaded, experts, wanted)


def test_resolves_folders(tmp_path):
    assert resolve(tmp_path) == tmp_path and resolve(str(tmp_path)) == tmp_path
    (tmp_path / "file").touch()
    for wrong in (tmp_path / "file", tmp_path / "none", "./none", "a/b/c"):
        with pytest.raises(
            ValueError, match="path_or_id must be a folder or an id on the hub, got"
        ):
            resolve(wrong)


@pytest.mark.parametrize(
    "weight_map, files",
    [
        (None, ["model.safetensors"]),
        ({"a": "m-2.safetensors", "b": "m-1.safetensors"}, ["m-1.safetensors", "m-2.safetensors"]),
    ],
    ids=["one file", "index"],
)
def test_downloads_only_what_it_reads(weight_map, files, tmp_path, monkeypatch):
    calls = []

    def snapshot_download(repository, **arguments):
        calls.append((repository, arguments))
        folder = tmp_path / "c0ffee"
        folder.mkdir(exist_ok=True)
        if weight_map:
            text = json.dumps({"weight_map": weight_map})
            (folder / "model.safetensors.index.json").write_text(text)
        return str(folder)

    monkeypatch.setattr(checkpoint, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    assert resolve("org/model-1.0", revision="main", token="t") == tmp_path / "c0ffee"
    (first, asked), (second, weights) = calls
    assert first == second == "org/model-1.0"
    assert asked["token"] == weights["token"] == "t"
    assert asked["ignore_patterns"] == weights["ignore_patterns"] == ["*/*"]
    assert "*.json" in asked["allow_patterns"]
    assert not any("safetensors" in p or p.endswith(("bin", "*")) for p in asked["allow_patterns"])
    assert asked["revision"] == "main" and weights["revision"] == "c0ffee"
    assert weights["allow_patterns"] == files


def test_an_index_on_the_hub_is_checked_before_it_is_followed(tmp_path, monkeypatch):
    text = json.dumps({"weight_map": {"a": "../x.safetensors"}})
    (tmp_path / "model.safetensors.index.json").write_text(text)
    calls = []
    monkeypatch.setattr(
        checkpoint, "snapshot_download", lambda *_, **kw: calls.append(kw) or str(tmp_path)
    )
    with pytest.raises(CheckpointError, match="maps a to"):
        resolve("org/model")
    assert len(calls) == 1


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    config = {"model_type": "mine", "auto_map": {"AutoConfig": "code.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ValueError):
        read_config(tmp_path)


def test_blocks_of_mixtral_are_the_known_ones(tmp_path):
    model = meta_model(make_config(), torch.float32)
    known = [(b.name, b.experts) for b in find_blocks(model)]
    assert known == [(b.name, b.experts) for b in blocks_of(model)]
