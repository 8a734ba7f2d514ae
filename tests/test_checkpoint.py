"""A checkpoint before its weights: folder, config, dtype, quantisation, the model on meta."""

import json
import warnings

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from checkpoints import save
from loaded import assert_same_model, load
from mixtral import make_config, make_model
from moe_gpu.huggingface import checkpoint
from moe_gpu.huggingface.checkpoint import (
    add_weights,
    check_quantization,
    config_dtype,
    meta_model,
    read_config,
    resolve,
    stored_dtype,
    weight_bytes,
)
from moe_gpu.offload.shards import CheckpointError, Shards


def test_resolves_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve(tmp_path) == tmp_path and resolve(str(tmp_path)) == tmp_path
    assert add_weights(tmp_path, tmp_path) == tmp_path  # nothing to download
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="path_or_id must be a folder or .* hub, got 'file'"):
        resolve("file")
    for wrong in (tmp_path / "none", "./none", "none/", "org/none/", "a/b/c", "x" * 5000 + "/a/b"):
        with pytest.raises(ValueError, match=f"path_or_id must be .* no folder '{wrong}'"):
            resolve(wrong)


@pytest.mark.parametrize("read", [resolve, read_config])
def test_a_folder_with_a_typing_error_without_a_network(read, tmp_path, monkeypatch):
    calls = []

    def unreachable(name, **arguments):
        calls.append(name)
        raise LocalEntryNotFoundError("Got: ConnectError: no route\nAn error happened ...")

    monkeypatch.setattr(checkpoint, "snapshot_download", unreachable)
    monkeypatch.chdir(tmp_path)
    said = (
        "there is no folder 'nowhere', and as an id it could not be looked up on the hub: "
        "ConnectError: no route$"
    )
    with pytest.raises((FileNotFoundError, ValueError), match=said):
        read("nowhere")
    assert calls == ["nowhere"]


def test_the_config_of_a_repository(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtral"}))
    asked = []
    monkeypatch.setattr(
        checkpoint,
        "snapshot_download",
        lambda name, **how: asked.append((name, how["allow_patterns"])) or str(tmp_path),
    )
    assert read_config("org/model").model_type == "mixtral"
    assert asked == [("org/model", ["config.json"])]


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
    folder = resolve("org/model-1.0", revision="main", token="t")
    assert folder == tmp_path / "c0ffee" and len(calls) == 1
    assert add_weights(folder, "org/model-1.0", token="t") == folder
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
        add_weights(resolve("org/model"), "org/model")
    assert len(calls) == 1


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    config = {"model_type": "mine", "auto_map": {"AutoConfig": "code.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ValueError):
        read_config(tmp_path)


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
    save_file({"a": torch.zeros(1, dtype=torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="dtype must be given: neither config nor weights"):
        stored_dtype(Shards(tmp_path))
    save_file({"a": torch.zeros(1).half()}, tmp_path / "model.safetensors")
    assert stored_dtype(Shards(tmp_path)) == torch.float16
    config = make_config()
    assert config_dtype(config) is None
    config.dtype = torch.bfloat16
    assert config_dtype(config) == torch.bfloat16


FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [24, 20]}


@pytest.mark.parametrize("dequantize", [False, True])
@pytest.mark.parametrize(
    "found, message",
    [
        ({"quant_method": "gptq", "bits": 4}, r"\(gptq, 4 bits\)"),
        ({"quant_method": "compressed-tensors", "format": "pack"}, r"\(compressed-tensors, pack\)"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, r"\(bitsandbytes, 4 bits\)"),
        ({"quant_method": "fp8", "weight_block_size": None}, r"\(fp8\)"),
        ({"quant_method": "fp8", "weight_block_size": [0, 128]}, r"\(fp8\)"),
        ({"quant_method": "fp8", "weight_block_size": [1, 128, 128]}, r"\(fp8\)"),
        (FP8 | {"fmt": "e5m2"}, r"\(fp8, e5m2\)"),
    ],
)
def test_refuses_quantized_checkpoints(found, message, dequantize):
    config = make_config()
    config.quantization_config = found
    size = weight_bytes(meta_model(config, torch.bfloat16))
    with pytest.raises(
        ValueError, match=rf"quantized {message}.* take {size:,} bytes \(0.0 GiB\)$"
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
    with pytest.raises(ValueError, match=r"\(87.0 GiB\); load\(..., dequantize=True\) converts"):
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
