"""Adaptive policies and meters on a model: every layer reports, nothing leaks into the text."""

import pytest
import torch

import moe_gpu
from mixtral import (  # noqa: F401 - the last is a fixture that runs by itself
    LAYERS,
    TOP_K,
    make_model,
    prompt,
    text_of,
    without_interpreter,
)
from moe_gpu import AdaptiveBonus, Exact, HitRateTarget, MassBudget, QualityTarget


@pytest.fixture(scope="module")
def model():
    return make_model()


def test_every_layer_is_steered_and_reports(model):
    policy = HitRateTarget(0.9, warm_tokens=4, price="mass")
    with moe_gpu.attach(model, slots=4, policy=policy, meters=True) as moe:
        reports = moe.control()
        assert [r.layer for r in reports] == list(range(LAYERS))
        assert all(r.is_cold and r.tokens == 0 and r.mode == "hit_rate" for r in reports)
        text_of(model, prompt(0, tokens=1), tokens=40)
        reports, metrics = moe.control(), moe.metrics()
        assert all(r.tokens == metrics.tokens and not r.is_cold for r in reports)
        assert all(0 < r.strength <= policy.max_budget for r in reports)
        assert [r.strength for r in reports] == moe.state.strength_L.tolist()
        assert len({r.strength for r in reports}) == LAYERS

        assert metrics.swaps == sum(metrics.swaps_by_rank) > 0
        assert len(metrics.swaps_by_rank) == TOP_K and metrics.swaps_by_rank[0] == 0
        by_layer = [layer.swaps_by_rank for layer in metrics.layers]
        assert metrics.swaps_by_rank == tuple(map(sum, zip(*by_layer, strict=True)))
        means = [layer.l1_change for layer in metrics.layers]
        assert metrics.l1_change == pytest.approx(sum(means) / LAYERS) and metrics.l1_change > 0
        assert metrics.moved_mass_p99 <= max(layer.moved_mass_p99 for layer in metrics.layers)
        assert metrics.as_dict()["layers"][0]["routing_kl"] == metrics.layers[0].routing_kl
        moe.reset_metrics()
        assert moe.metrics(wait=False).swaps_by_rank == (0,) * TOP_K
        assert [r.tokens for r in moe.control()] == [r.tokens for r in reports]


@pytest.mark.parametrize("policy", [QualityTarget(0.02), AdaptiveBonus()], ids=str)
def test_policies_change_in_place(model, policy):
    with moe_gpu.attach(model, slots=4, policy=Exact()) as moe:
        assert {r.mode for r in moe.control()} == {"off"}
        moe.set_policy(policy)
        assert "off" not in {r.mode for r in moe.control()}
        text_of(model, prompt(0, tokens=1), tokens=3)
        assert all(r.tokens > 0 for r in moe.control())
        moe.set_policy(MassBudget(0.5))
        assert {(r.mode, r.strength) for r in moe.control()} == {("off", 0.5)}
        assert moe.metrics().l1_change is None


def test_while_cold_the_text_is_the_models_own(model):
    ids = prompt(3, tokens=5)
    want = text_of(model, ids, tokens=12)
    with moe_gpu.attach(model, slots=4, policy=HitRateTarget(1.0, warm_tokens=64)) as moe:
        assert torch.equal(text_of(model, ids, tokens=12), want)
        assert moe.metrics().swaps == 0 and all(r.is_cold for r in moe.control())


def test_meters_must_be_a_bool(model):
    with pytest.raises(TypeError, match="meters must be True or False, got 1"):
        moe_gpu.attach(model, slots=4, meters=1)
