"""Every family of the zoo through every check: router, model, generation, policies, files.

Those whose router is another's under a new name go through the slower ones with ``--all`` only.
"""

import functools
import json
from pathlib import Path

import pytest
import torch
import transformers

import moe_gpu
import zoo_checks as checks
from mixtral import INTERPRETED, without_interpreter  # noqa: F401 - a fixture that runs by itself
from moe_gpu.huggingface.budget import kv_cache_bytes
from moe_gpu.huggingface.families import FAMILIES, REFUSED
from moe_gpu.kernels import route
from zoo import AVAILABLE, COMMON, EXPERTS, GROUPS, LOCAL, ROWS, ZOO

TABLE = Path(__file__).parent.parent / "profiling" / "results" / "families.json"


def in_full_or_slow():
    """Return the families as parameters; those that are not checked in full are slow."""
    marks = [() if family.in_full else pytest.mark.slow for family in AVAILABLE]
    return [
        pytest.param(family, id=family.name, marks=mark)
        for family, mark in zip(AVAILABLE, marks, strict=True)
    ]


VARIANTS = [
    pytest.param(family, changes, id=f"{family}-{name}")
    for family in AVAILABLE
    for name, changes in ({"default": {}} | family.variants).items()
]

subject_of = functools.cache(checks.Subject)


@pytest.fixture(scope="module", params=AVAILABLE, ids=str)
def subject(request):
    """Shared: a check that attaches to the model detaches from it."""
    return subject_of(request.param)


@pytest.fixture(scope="module", params=in_full_or_slow())
def subject_in_full(request):
    """As above, of the families that are checked in full."""
    return subject_of(request.param)


@pytest.mark.parametrize("family, changes", VARIANTS)
def test_router(family, changes):
    checks.check_router(family, **changes)


@pytest.mark.parametrize("family, changes", VARIANTS)
def test_router_in_bfloat16(family, changes):
    checks.check_router(family, torch.bfloat16, **changes)


@pytest.mark.parametrize("family, changes", VARIANTS)
def test_router_through_the_kernel(family, changes, monkeypatch):
    monkeypatch.setattr(route, "_INTERPRET", INTERPRETED)
    checks.check_router(family, tokens=3, **changes)


def test_logits(subject):
    checks.check_logits(subject)


def test_router_logits(subject):
    checks.check_router_logits(subject)


@pytest.mark.parametrize("way", checks.GENERATE)
def test_generate(subject_in_full, way):
    checks.check_generate(subject_in_full, way)


def test_compile(subject_in_full):
    checks.check_compile(subject_in_full)


def test_training(subject):
    limit = subject.family.limits.get("train")
    if limit is None:
        checks.check_training(subject)
    else:
        with pytest.raises(RuntimeError, match=limit[0]):
            checks.check_training(subject)


def test_implementations(subject_in_full):
    checks.check_implementations(subject_in_full)


@pytest.mark.parametrize("policy", checks.POLICIES, ids=lambda p: type(p).__name__)
def test_policy(subject_in_full, policy):
    checks.check_policy(subject_in_full, policy)


def test_zero_budgets(subject_in_full):
    checks.check_zero_budgets(subject_in_full)


def test_memory(subject):
    checks.check_memory(subject)


def test_a_cache_that_slides_is_no_longer_than_its_window():
    model = ZOO["gpt_oss"].make_model(sliding_window=4)  # in one of the two layers
    per_token = 2 * 2 * 8 * 4  # keys and values, heads, of 8, float32
    assert kv_cache_bytes(model, 3) == (3 + 3) * per_token
    assert kv_cache_bytes(model, 10) == (4 + 10) * per_token


def test_detach(subject_in_full):
    checks.check_detach(subject_in_full)


def test_save_and_load(subject, tmp_path):
    checks.check_save(subject, tmp_path)
    checks.check_load(subject, tmp_path)


# -- the registry, and the table of it


def test_the_table_has_every_family_and_column():
    """Written by python profiling/families.py."""
    content = json.loads(TABLE.read_text())
    assert [row["family"] for row in content["rows"]] == list(ZOO)
    for row in content["rows"]:
        limits = {column: cell for column, (_, cell) in ZOO[row["family"]].limits.items()}
        assert row["cells"] == dict.fromkeys(checks.COLUMNS, "yes") | limits


def test_every_known_router_is_in_the_zoo():
    seen = {type(subject_of(family).blocks[0].router).__name__ for family in AVAILABLE}
    assert seen <= set(FAMILIES)
    if len(AVAILABLE) == len(ROWS):  # an older transformers lacks some
        assert seen == set(FAMILIES)


def test_a_setting_that_the_gate_does_not_know():
    model = ZOO["deepseek_v2"].make_model(topk_method="noaux_tc")
    message = r"model.layers.0.mlp: DeepseekV2TopkRouter with topk_method='noaux_tc' is not known"
    with pytest.raises(ValueError, match=message):
        moe_gpu.attach(model, slots=8)


def test_an_unknown_router_is_refused_with_what_is_known_and_how_to_add_it():
    config = transformers.Lfm2MoeConfig(
        **COMMON | EXPERTS | {"num_dense_layers": 0, "layer_types": ["full_attention", "conv"]}
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError) as refusal:
        moe_gpu.attach(model, slots=4)
    first, *lines = str(refusal.value).splitlines()
    assert first.startswith("model.layers.0.feed_forward: router class Lfm2MoeTopKRouter is not")
    assert first.endswith("known: " + ", ".join(FAMILIES))
    assert [line.split()[0] for line in lines] == ["To", "1.", "logits,", "2.", "3."]
    assert "families.py" in lines[1] and "tests/zoo.py" in lines[3]


def test_llama4_is_refused_with_the_reason():
    config = transformers.Llama4TextConfig(
        **COMMON | LOCAL | {"intermediate_size_mlp": 48, "head_dim": 8, "pad_token_id": 0}
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError) as refusal:
        moe_gpu.attach(model, slots=4)
    reason = f"Llama4Router cannot be attached: {REFUSED['Llama4Router']}"
    assert str(refusal.value) == f"model.layers.0.feed_forward: {reason}"


def test_experts_without_a_gate_are_refused():
    config = transformers.NemotronHConfig(
        **COMMON | GROUPS | {"layer_types": ["full_attention", "moe"], "head_dim": 8}
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match="router class NemotronHTopkRouter is not supported"):
        moe_gpu.attach(model, slots=8)


def test_a_router_that_leaves_autocast_does_so_attached_too():
    model = ZOO["ernie4_5_moe"].make_model()
    router = model.model.layers[1].mlp.gate
    hidden_TD = torch.randn(300, 32)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        stock = router(hidden_TD)
        with moe_gpu.attach(model, resident=1.0, policy=moe_gpu.Exact()):
            ours = router(hidden_TD)
    assert ours[0].dtype == stock[0].dtype == torch.float32
    assert torch.equal(ours[0], stock[0])
    assert torch.equal(ours[2].sort(1).values, stock[2].sort(1).values)


def test_a_bias_can_be_handed_by_its_name():
    model = ZOO["afmoe"].make_model()
    block = model.model.layers[1].mlp
    bias_E = torch.linspace(1, 0, block.router.num_experts)
    hidden = torch.randn(1, 40, 32)
    with torch.no_grad():
        stock = block.router(hidden, expert_bias=bias_E)[2]
        with moe_gpu.attach(model, resident=1.0, policy=moe_gpu.Exact()):
            ours = block.router(hidden, expert_bias=bias_E)[2]
            own = block.router(hidden, block.expert_bias)[2]
    assert torch.equal(ours.sort(1).values, stock.sort(1).values)
    assert not torch.equal(own.sort(1).values, stock.sort(1).values)
