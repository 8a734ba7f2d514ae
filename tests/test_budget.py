"""Slots from shares and from bytes: every number typed by hand."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixtral import EXPERT_BYTES, make_model
from moe_gpu.huggingface.blocks import find_blocks
from moe_gpu.huggingface.budget import (
    MemoryNeeds,
    SlotBudget,
    memory_needs,
    parse_bytes,
    slots_of_share,
)
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
        ("0.1TB", 100000000000),
        ("1" + "0" * 400 + "B", 10**400),  # beyond what a float holds
    ],
)
def test_bytes(amount, expected):
    assert parse_bytes("gpu_memory", amount) == expected


@pytest.mark.parametrize(
    "amount, error",
    [
        ("GiB", ValueError),
        ("-2GiB", ValueError),
        (0, ValueError),
        ("0", ValueError),
        ("0GiB", ValueError),
        (-5, ValueError),
        (2.5, TypeError),
        (True, TypeError),
    ],
)
def test_refuses_bytes(amount, error):
    with pytest.raises(error, match="gpu_memory must be"):
        parse_bytes("gpu_memory", amount)


@pytest.mark.parametrize("amount", ["24", "1.5", "52M", "2 bananas"])
def test_says_which_units_there_are(amount):
    with pytest.raises(ValueError) as refused:
        parse_bytes("gpu_memory", amount)
    assert str(refused.value) == (
        "gpu_memory needs a unit (B, kB, MB, GB, KiB, MiB, GiB, ...), "
        f'as in "20GiB", got {amount!r}'
    )


@pytest.mark.parametrize("amount", [0, "0", " 0 ", "0GiB"])
def test_nothing_where_nothing_is_allowed(amount):
    assert parse_bytes("pinned_memory", amount, minimum=0) == 0


@pytest.mark.parametrize("amount", [-1, "-1B"])
def test_never_less_than_nothing(amount):
    with pytest.raises(ValueError, match="pinned_memory must be"):
        parse_bytes("pinned_memory", amount, minimum=0)


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


# 3 layers, 5 bytes an expert: 800 beside the slots, 810 with the staging slots
PARTS = MemoryNeeds(
    dense=500, kv_cache=200, workspace=100, slot=15, context_tokens=16, staging=10, layers=3
)


@pytest.mark.parametrize(
    "gpu_memory, total, per_layer, pool, staging",
    [
        (815, 1, 0, True, 10),
        (819, 1, 0, True, 10),
        (820, 2, 0, True, 10),
        (825, 3, 1, True, 10),
        (865, 11, 3, True, 10),
        (869, 11, 3, True, 10),
        (870, 12, 4, False, 10),  # 2K per layer
        (884, 12, 4, False, 10),  # what does not fill every layer stays unused
        (885, 15, 5, False, 10),
        (919, 21, 7, False, 10),
        (920, 24, 8, False, 0),  # all 8, which never stage
        (10**9, 24, 8, False, 0),
    ],
)
def test_a_pool_below_two_tokens_per_layer(gpu_memory, total, per_layer, pool, staging):
    slots = PARTS.split(gpu_memory, num_experts=8, top_k=2)
    assert slots == SlotBudget(total=total, layers=3, pool=pool, staging=staging)
    assert slots.per_layer == per_layer


def test_all_experts_of_few_are_no_pool():
    assert not PARTS.split(845, num_experts=3, top_k=2).pool
    assert PARTS.split(844, num_experts=3, top_k=2).pool


@given(st.integers(0, 2000), st.integers(1, 12), st.integers(1, 4))
def test_a_split_stays_within_the_budget(gpu_memory, num_experts, top_k):
    try:
        slots = PARTS.split(gpu_memory, num_experts, top_k)
    except ValueError:
        assert gpu_memory < 800 + min(10 + 5, 15 * num_experts)
        return
    spent = 800 + slots.staging + 5 * slots.total
    assert spent <= gpu_memory and 1 <= slots.total <= 3 * num_experts
    if slots.total < 3 * num_experts:  # no more would fit
        assert slots.staging == 10 and spent + (5 if slots.pool else 15) > gpu_memory
    assert slots.pool == (slots.per_layer < min(2 * top_k, num_experts))


def test_staging_counts_in_slots_per_layer_too():
    assert PARTS.slots_within(825, num_experts=8) == 1
    assert PARTS.slots_within(919, num_experts=8) == 7
    assert PARTS.slots_within(920, num_experts=8) == 8


@pytest.mark.parametrize(
    "verb, what",
    [
        (lambda needs: needs.slots_within(814, 8), "one expert slot in every layer 15: 825"),
        (lambda needs: needs.split(814, 8, 2), "one expert slot 5: 815"),
    ],
)
def test_a_refusal_states_the_staging_slots(verb, what):
    with pytest.raises(ValueError) as refusal:
        verb(PARTS)
    assert str(refusal.value) == (
        "gpu_memory=814 bytes is too small: dense weights take 500, the KV cache of 16 tokens "
        f"200, workspace 100, staging slots 10, and {what} in all"
    )


def test_needs_of_a_model():
    model = make_model(num_key_value_heads=2, tie_word_embeddings=True)
    blocks = find_blocks(model)
    layout, num_experts = common_layout(blocks)
    needs = memory_needs(model, blocks, layout, context_tokens=10)
    assert needs.staging == 0 and needs.layers == 2 and needs.expert == EXPERT_BYTES
    staged = memory_needs(model, blocks, layout, context_tokens=10, staging_slots=2)
    assert staged == replace(needs, staging=2 * EXPERT_BYTES)
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
