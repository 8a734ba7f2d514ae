"""The parts of loading put together: a model, and its experts still on disk."""

import torch

from mixtral import logits_of, prompt
from moe_gpu.huggingface.blocks import MoEBlock
from moe_gpu.huggingface.checkpoint import (
    config_dtype,
    load_generation_config,
    meta_model,
    read_config,
    stored_dtype,
)
from moe_gpu.huggingface.loading import load_dense
from moe_gpu.huggingface.origins import locate_experts
from moe_gpu.offload.disk import DiskExperts
from moe_gpu.offload.layout import ExpertLayout
from moe_gpu.offload.shards import Shards


def blocks_of(model):
    """MoE blocks of any family whose experts are packed."""
    return [
        MoEBlock(name, module, module.gate, module.experts, None)
        for name, module in model.named_modules()
        if hasattr(module, "experts")
    ]


def load(folder, dtype=None, device="cpu", **arguments):
    """The dense part of a model, and its experts on disk."""
    config = read_config(folder)
    shards = Shards(folder)
    model = meta_model(config, dtype or config_dtype(config) or stored_dtype(shards))
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


def meta_and_shards(folder):
    model = meta_model(read_config(folder), torch.float32)
    return model, blocks_of(model), Shards(folder)
