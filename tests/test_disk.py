"""DiskExperts: an expert's run of bytes, in any pieces, from any storage; and what is refused."""

import os

import pytest
import torch
from safetensors.torch import save_file

from moe_gpu.offload import disk
from moe_gpu.offload.disk import DiskExperts, Source
from moe_gpu.offload.layout import ExpertLayout
from moe_gpu.offload.shards import CheckpointError, Shards

L, E, F, D = 2, 3, 27, 11  # odd: no parameter and no row ends where the next may begin
FP8 = torch.float8_e4m3fn
BLOCK = (8, 4)  # divides neither 27, 54 nor 11


def weights():
    return [
        {"gate_up_proj": torch.randn(E, 2 * F, D), "down_proj": torch.randn(E, D, F)}
        for _ in range(L)
    ]


def as_packed(layers):
    """Tensors of a checkpoint with packed experts, and the sources of each expert."""
    tensors = {f"{i}.{name}": t for i, layer in enumerate(layers) for name, t in layer.items()}
    sources = [
        [{name: [Source(f"{i}.{name}", expert)] for name in layer} for expert in range(E)]
        for i, layer in enumerate(layers)
    ]
    return tensors, sources


def as_separate(layers):
    """The same with three tensors for each expert."""
    tensors, sources = {}, []
    for i, layer in enumerate(layers):
        sources.append([])
        for e in range(E):
            names = [f"{i}.{e}.{part}" for part in ("w1", "w3", "w2")]
            gate, up = layer["gate_up_proj"][e].chunk(2)
            parts = (gate, up, layer["down_proj"][e])
            tensors |= {n: part.contiguous() for n, part in zip(names, parts, strict=True)}
            gate_up = [Source(names[0]), Source(names[1])]
            sources[i].append({"gate_up_proj": gate_up, "down_proj": [Source(names[2])]})
    return tensors, sources


def layout_of(dtype):
    parameters = {name: t.to(dtype) for name, t in weights()[0].items()}
    return ExpertLayout.of(parameters)


def runs_of(layers, layout):
    """Every expert's run of bytes by plain torch, (L, E, B): what reading must give."""
    runs = torch.zeros(L, E, layout.expert_bytes, dtype=torch.uint8)
    for run_EB, layer in zip(runs, layers, strict=True):
        for name, view in layout.views(run_EB).items():
            view.copy_(layer[name])
    return runs


def open_experts(folder, tensors, sources, dtype=torch.float32, **arguments):
    save_file(tensors, folder / "model.safetensors")
    return DiskExperts(layout_of(dtype), Shards(folder), sources, **arguments)


def read(experts, layer, expert, start, stop):
    out = torch.full((stop - start,), 255, dtype=torch.uint8)  # so that unwritten bytes show
    experts.read_into(layer, expert, start, stop, out)
    return out


def assert_reads(experts, runs_LEB):
    """Whole experts, and the last of them in every piece."""
    B = runs_LEB.shape[-1]
    for layer in range(L):
        for expert in range(E):
            assert torch.equal(read(experts, layer, expert, 0, B), runs_LEB[layer, expert])
    for start in range(0, B, 256):
        for stop in range(start, B + 1, 256):
            got = read(experts, L - 1, E - 1, start, stop)
            assert torch.equal(got, runs_LEB[-1, -1, start:stop]), (start, stop)


@pytest.mark.parametrize("at_once", [1 << 20, 100], ids=["at once", "in chunks"])
@pytest.mark.parametrize("store", [as_packed, as_separate])
@pytest.mark.parametrize(
    "stored, wanted",
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.bfloat16),
        (torch.bfloat16, torch.float16),
        (torch.bfloat16, torch.float32),
    ],
    ids=str,
)
def test_reads_and_converts(stored, wanted, store, at_once, tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "_AT_ONCE", at_once)
    layers = [{name: t.to(stored) for name, t in layer.items()} for layer in weights()]
    experts = open_experts(tmp_path, *store(layers), wanted)
    assert (experts.num_layers, experts.num_experts) == (L, E)
    assert_reads(experts, runs_of(layers, layout_of(wanted)))


def quantized(tensors, scale_dtype):
    """Tensors with their scales, and what they mean, by plain torch."""
    stored, meant = {}, {}
    for name, tensor in tensors.items():
        *lead, R, C = tensor.shape
        blocks = (*lead, -(-R // BLOCK[0]), -(-C // BLOCK[1]))
        scales = torch.exp2(torch.randint(-6, 6, blocks).float()).to(scale_dtype)
        if scale_dtype != torch.float8_e8m0fnu:  # which holds powers of two only
            scales = (scales * 1.37).to(scale_dtype)
        wide = scales.float().repeat_interleave(BLOCK[0], -2)[..., :R, :]
        wide = wide.repeat_interleave(BLOCK[1], -1)[..., :C]
        stored |= {name: tensor.to(FP8), name + "_scale_inv": scales}
        meant[name] = tensor.to(FP8).float() * wide
    return stored, meant


@pytest.mark.parametrize("at_once", [1 << 20, 25], ids=["at once", "1 or 2 rows"])
@pytest.mark.parametrize("store", [as_packed, as_separate])
@pytest.mark.parametrize(
    "scales, wanted",
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float8_e8m0fnu, torch.bfloat16),
    ],
    ids=str,
)
def test_dequantizes_float8(scales, wanted, store, at_once, tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "_AT_ONCE", at_once)
    tensors, sources = store(weights())
    stored, meant = quantized(tensors, scales)
    experts = open_experts(tmp_path, stored, sources, wanted, block_size=BLOCK)
    layers = [
        {
            name: torch.stack(
                [
                    torch.cat([_row(meant[s.tensor], s.row) for s in fields[name]])
                    for fields in sources[layer]
                ]
            )
            for name in ("gate_up_proj", "down_proj")
        }
        for layer in range(L)
    ]
    assert_reads(experts, runs_of(layers, layout_of(wanted)))


def _row(tensor, row):
    return tensor if row is None else tensor[row]


def test_opaque_bytes_pass_as_they_are(tmp_path):
    """A dtype that is the layout's own needs no conversion, whatever it is."""
    packed = torch.randint(256, (1, 300), dtype=torch.uint8)
    save_file({"x": packed}, tmp_path / "model.safetensors")
    layout = ExpertLayout.of({"q": packed})
    experts = DiskExperts(layout, Shards(tmp_path), [[{"q": [Source("x", 0)]}]])
    assert read(experts, 0, 0, 0, 512).tolist() == packed[0].tolist() + [0] * 212


def change_source(**fields):
    return lambda tensors, sources: sources[1][2].update(fields)


def change_tensor(name, tensor):
    return lambda tensors, sources: tensors.update({name: tensor})


@pytest.mark.parametrize(
    "change, error, message",
    [
        (
            change_source(down_proj=[Source("gone")]),
            CheckpointError,
            "layer 1, expert 2, down_proj: the checkpoint in .* lacks tensor gone",
        ),
        (
            change_tensor("1.2.w3", torch.zeros(F, D + 1)),
            CheckpointError,
            r"expert 2, gate_up_proj: tensor 1.2.w3 has shape \(27, 12\), expected \(27, 11\)",
        ),
        (
            change_tensor("1.2.w2", torch.zeros(D * F)),
            CheckpointError,
            r"1.2.w2 has shape \(297,\), expected \(11, 27\)",
        ),
        (
            change_source(down_proj=[Source("packed", 3)]),
            CheckpointError,
            r"packed has shape \(3, 11, 27\), expected \(> 3, 11, 27\)",
        ),
        (change_source(down_proj=[Source("packed", -1)]), CheckpointError, "packed has shape"),
        (
            change_source(down_proj=[Source("1.2.w2", 0)]),
            CheckpointError,
            r"\(11, 27\), expected \(> 0, 11, 27\)",
        ),
        (
            change_tensor("1.2.w1", torch.zeros(F, D, dtype=torch.int32)),
            CheckpointError,
            "1.2.w1 is torch.int32, which does not become torch.float32",
        ),
        (
            change_tensor("1.2.w1", torch.zeros(F, D).to(FP8)),
            CheckpointError,
            "1.2.w1 is torch.float8_e4m3fn of shape .*only as a block-scaled.*block size: None",
        ),
        (
            change_source(gate_up_proj=[Source("1.2.w1")] * 4),
            ValueError,
            r"4 sources do not make a parameter of shape \(54, 11\)",
        ),
        (change_source(down_proj=[]), ValueError, "0 sources do not make a parameter"),
        (
            change_source(bias=[]),
            ValueError,
            "layer 1, expert 2: sources must be of .'down_proj', 'gate_up_proj'., got .'bias'",
        ),
        (
            lambda tensors, sources: sources[1].pop(),
            ValueError,
            "sources must have 3 experts in every layer, got 2 in layer 1",
        ),
    ],
)
def test_refuses_sources(change, error, message, tmp_path):
    tensors, sources = as_separate(weights())
    tensors["packed"] = torch.zeros(3, D, F)
    change(tensors, sources)
    with pytest.raises(error, match=message):
        open_experts(tmp_path, tensors, sources)


@pytest.mark.parametrize(
    "name, tensor, message",
    [
        ("0.0.w1_scale_inv", torch.ones(4, 2), r"shape \(4, 2\), expected .* \(4, 3\).* 8 x 4 of"),
        ("0.0.w1_scale_inv", torch.ones(4, 3).int(), "is torch.int32"),
        ("0.0.w1_scale_inv", None, "scales of 0.0.w1: the checkpoint.*lacks tensor 0.0.w1_scale"),
        ("0.0.w1", torch.ones(F, D).to(torch.float8_e5m2), "w1 is torch.float8_e5m2"),
        ("0.0.w1", torch.ones(F, D).to(torch.int8), "w1 is torch.int8 of shape"),
    ],
)
def test_refuses_scales(name, tensor, message, tmp_path):
    tensors, sources = as_separate(weights())
    stored, _ = quantized(tensors, torch.float32)
    stored.pop(name)
    if tensor is not None:
        stored[name] = tensor
    with pytest.raises(CheckpointError, match=message):
        open_experts(tmp_path, stored, sources, torch.bfloat16, block_size=BLOCK)


def test_refuses_a_row_of_a_scalar(tmp_path):
    save_file({"x": torch.zeros(())}, tmp_path / "model.safetensors")
    layout = ExpertLayout.of({"scale": torch.empty(E)})
    with pytest.raises(CheckpointError, match=r"tensor x has shape \(\), expected \(> 0\)"):
        DiskExperts(layout, Shards(tmp_path), [[{"scale": [Source("x", 0)]}]])


def test_refuses_scaled_vectors(tmp_path):
    """Their rows would share a scale."""
    stored, _ = quantized({"bias": torch.randn(E, D)}, torch.float32)
    save_file(stored, tmp_path / "model.safetensors")
    layout = ExpertLayout.of({"bias": torch.empty(E, D)})
    with pytest.raises(CheckpointError, match="bias is torch.float8_e4m3fn"):
        DiskExperts(layout, Shards(tmp_path), [[{"bias": [Source("bias", 1)]}]], BLOCK)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((2, 0, 0, 256), r"layer must lie in \[0, 1\], got 2"),
        ((-1, 0, 0, 256), r"layer must lie in \[0, 1\], got -1"),
        ((0, 3, 0, 256), r"expert must lie in \[0, 2\], got 3"),
        ((0, 0, -256, 0), r"multiples of 256 in \[0, 3840\], got -256 and 0"),
        ((0, 0, 0, 4096), "got 0 and 4096"),
        ((0, 0, 512, 256), "got 512 and 256"),
        ((0, 0, 128, 256), "got 128 and 256"),
        ((0, 0, 0, 128), "got 0 and 128"),
    ],
)
def test_refuses_reads(arguments, message, tmp_path):
    experts = open_experts(tmp_path, *as_packed(weights()))
    size = max(0, arguments[3] - arguments[2])
    with pytest.raises(ValueError, match=message):
        experts.read_into(*arguments, torch.empty(size, dtype=torch.uint8))


@pytest.mark.parametrize(
    "out", [torch.empty(255, dtype=torch.uint8), torch.empty(256), torch.empty(2, 128).byte()]
)
def test_refuses_other_memory(out, tmp_path):
    experts = open_experts(tmp_path, *as_packed(weights()))
    with pytest.raises(ValueError, match=r"out must be uint8 of shape \(256,\), got"):
        experts.read_into(0, 0, 0, 256, out)


def test_advice_is_for_the_experts_own_bytes(tmp_path, monkeypatch):
    advice = {}
    for name in ("read_ahead", "drop_cache"):
        monkeypatch.setattr(
            Shards, name, lambda _, span, *at, name=name: advice.setdefault(name, []).append((span.name, *at))
        )  # fmt: skip
    experts = open_experts(tmp_path, *as_packed(weights()), torch.bfloat16)
    experts.read_ahead(1, 2)
    experts.drop_cache(1, 2)
    gate_up, down = 2 * F * D * 4, D * F * 4  # as stored, in float32
    own = [("1.gate_up_proj", 2 * gate_up, 3 * gate_up), ("1.down_proj", 2 * down, 3 * down)]
    assert advice == {"read_ahead": own, "drop_cache": own}


def test_truncated_while_reading(tmp_path):
    layers = weights()
    experts = open_experts(tmp_path, *as_separate(layers))
    os.truncate(tmp_path / "model.safetensors", 5000)
    with pytest.raises(CheckpointError, match="changed on disk"):
        read(experts, 1, 2, 0, 3840)
