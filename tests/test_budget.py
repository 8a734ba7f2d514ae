"""Slots from shares and from bytes: every number typed by hand."""

import pytest

from mixtral import EXPERT_BYTES, make_model
from moe_gpu.huggingface.budget import MemoryNeeds, memory_needs, parse_bytes, slots_of_share
from moe_gpu.huggingface.families import find_blocks
from moe_gpu.huggingface.weights import common_layout


@pytest.mark.parametrize(
    "amount, expected",
    [
        (5, 5),
        ("5B", 5),
        ("2KiB", 2048),
        ("2 kB", 2000),
        ("1.5MiB", 1572864),
        ("20GiB", 21474836480),
        ("20GB", 20000000000),
        (" 1 tib ", 1099511627776),
    ],
)
def test_bytes(amount, expected):
    assert parse_bytes("gpu_memory", amount) == expected


@pytest.mark.parametrize(
    "amount, error",
    [
        ("20", ValueError),
        ("GiB", ValueError),
        ("-2GiB", ValueError),
        ("2 bananas", ValueError),
        (0, ValueError),
        ("0GiB", ValueError),
        (-5, ValueError),
        (2.5, TypeError),
        (True, TypeError),
    ],
)
def test_refuses_bytes(amount, error):
    with pytest.raises(error, match="gpu_memory must be"):
        parse_bytes("gpu_memory", amount)


@pytest.mark.parametrize(
    "resident, num_experts, expected",
    [
        (0.5, 8, 4),
        (1.0, 8, 8),
        (0.3, 8, 2),  # 2.4
        (0.01, 8, 1),  # never below one
        (0.29, 100, 29),  # 28.999999999999996 in floating point
        (1, 8, 1),  # an int counts experts
        (8, 8, 8),
    ],
)
def test_shares(resident, num_experts, expected):
    assert slots_of_share(resident, num_experts) == expected


NEEDS = MemoryNeeds(dense=500, kv_cache=200, workspace=100, slot=50, context_tokens=16)


@pytest.mark.parametrize(
    "gpu_memory, slots",
    [(850, 1), (899, 1), (900, 2), (1200, 8), (10**9, 8)],  # never more than the experts
)
def test_slots_fill_what_is_left(gpu_memory, slots):
    assert NEEDS.slots_within(gpu_memory, num_experts=8) == slots


def test_a_refusal_states_each_part():
    with pytest.raises(ValueError) as refusal:
        NEEDS.slots_within(849, num_experts=8)
    assert str(refusal.value) == (
        "gpu_memory=849 bytes is too small: dense weights take 500, the KV cache of 16 tokens "
        "200, workspace 100, and one expert slot in every layer 50: 850 in all"
    )


def test_needs_of_a_model():
    model = make_model(num_key_value_heads=2, tie_word_embeddings=True)
    blocks = find_blocks(model)
    layout, num_experts = common_layout(blocks)
    needs = memory_needs(model, blocks, layout, context_tokens=10)
    assert num_experts == 8 and layout.expert_bytes == EXPERT_BYTES
    assert needs.slot == 2 * EXPERT_BYTES
    # per layer: q, o 32 x 32; k, v 16 x 32; two norms of 32; router 8 x 32
    layer = 2 * 32 * 32 + 2 * 16 * 32 + 2 * 32 + 8 * 32
    # tied embedding 97 x 32 once, last norm 32, two rotary buffers of 4
    assert needs.dense == 4 * (2 * layer + 97 * 32 + 32 + 2 * 4)
    # key and value, 2 layers, 2 heads of 8, float32
    assert needs.kv_cache == 10 * 2 * 2 * 2 * 8 * 4
    # hidden states 6 x 32, pairs 2 x 32 x (3 + 1), expert 3 x 48, all float32; logits 97
    assert needs.workspace == 4 * (10 * (6 * 32 + 2 * 32 * 4 + 3 * 48) + 97)
