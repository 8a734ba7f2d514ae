"""A random Mixtral small enough to run hundreds of times."""

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from moe_gpu.kernels import route

INTERPRETED = route._INTERPRET  # before the fixture below changes it
LAYERS, EXPERTS, TOP_K, VOCAB = 2, 8, 2, 97
EXPERT_BYTES = (2 * 48 * 32 + 32 * 48) * 4  # both are multiples of 256 bytes: no padding


def make_config(**changes):
    return MixtralConfig(
        **{
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_local_experts": EXPERTS,
            "num_experts_per_tok": TOP_K,
            "max_position_embeddings": 128,
            "initializer_range": 0.3,  # experts that differ: a wrong one shows
            "bos_token_id": 1,
            "eos_token_id": None,
        }
        | changes
    )


def make_model(seed=0, dtype=torch.float32, **changes):
    torch.manual_seed(seed)
    return MixtralForCausalLM(make_config(**changes)).to(dtype).eval()


def prompt(seed=0, batch=1, tokens=7):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCAB, (batch, tokens), generator=generator)


@torch.no_grad()
def logits_of(model, ids, **arguments):
    return model(ids.to(model.device), **arguments).logits


def text_of(model, ids, tokens=8, **arguments):
    ids = ids.to(model.device)
    arguments = {"attention_mask": torch.ones_like(ids), "do_sample": False} | arguments
    return model.generate(ids, max_new_tokens=tokens, **arguments)


@pytest.fixture(scope="module", autouse=True)
def without_interpreter():
    """On the CPU route by the reference: the interpreted kernel, tested elsewhere, is slow."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(route, "_INTERPRET", False)
        yield
