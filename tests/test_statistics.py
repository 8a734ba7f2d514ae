"""Curves of loads against quality: interpolation and paired resampling, by hand."""

import math

import pytest
import torch

pytest.importorskip("transformers")
from moe_gpu.tuning.quality import Outcome  # noqa: E402
from moe_gpu.tuning.statistics import (  # noqa: E402
    cost_at,
    interval,
    kl_per_token,
    loads_at,
    loads_per_token,
    perplexity_change,
    resamples,
)


def table(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def outcome(nll_N, kl_N=(0.0, 0.0), loads_NT=((0,), (0,))):
    zeros_N = torch.zeros(len(nll_N), dtype=torch.float64)
    return Outcome(
        nll_N=table(*nll_N),
        kl_N=table(*kl_N),
        agree_N=zeros_N,
        loads_NT=torch.tensor(loads_NT, dtype=torch.int16),
        swaps_N=zeros_N,
        moved_N=zeros_N,
        l1_N=zeros_N,
        price_N=zeros_N,
        pairs=2,
    )


@pytest.mark.parametrize(
    "limit, loads",
    [
        (0.0, 100),
        (0.5, 90),
        (1.0, 80),
        (1.5, 60),  # 0.5 after 1.0 counts as 1.0: between 70 and 50
        (2.0, 50),
        (9.0, 50),  # a bound
    ],
)
def test_loads_at_a_cost(limit, loads):
    costs, curve = table([0.0, 1.0, 0.5, 2.0]), table([100, 80, 70, 50])
    assert loads_at(costs, curve, limit).item() == pytest.approx(loads)


def test_loads_at_takes_each_resample_by_itself():
    costs, curve = table([0, 1], [0, 4], [1, 2]), table([10, 5], [10, 2], [8, 4])
    assert loads_at(costs, curve, 1.0).tolist() == pytest.approx([5, 8, 8])


def test_cost_at_is_straight_in_logarithms():
    costs, curve = table([0.01, 0.04], [0.01, 0.16]), table([100, 25], [100, 25])
    assert cost_at(costs, curve, 50.0).tolist() == pytest.approx([0.02, 0.04])
    assert cost_at(costs, curve, 100.0).tolist() == pytest.approx([0.01, 0.01])
    assert cost_at(costs, curve, 25.0).tolist() == pytest.approx([0.04, 0.16])
    for beyond in (101.0, 24.0):
        assert all(map(math.isnan, cost_at(costs, curve, beyond).tolist()))


def test_cost_at_takes_the_segment_that_the_loads_lie_in():
    costs, curve = table([1, 2, 8]), table([64, 16, 4])
    assert cost_at(costs, curve, 8.0).item() == pytest.approx(4)


def test_resamples_begin_with_every_row_once():
    index_RN = resamples(5, draws=30, seed=3)
    assert index_RN.shape == (31, 5) and index_RN[0].tolist() == [0, 1, 2, 3, 4]
    assert index_RN.min() == 0 and index_RN.max() == 4
    assert torch.equal(index_RN, resamples(5, draws=30, seed=3))
    assert not torch.equal(index_RN, resamples(5, draws=30, seed=4))


def test_interval_leaves_the_estimate_out():
    values_R = torch.cat([table(1e9), torch.arange(101.0)])
    assert interval(values_R) == pytest.approx((2.5, 97.5))


def test_figures_are_per_token_and_paired():
    exact = outcome([20.0, 40.0], loads_NT=[[0] * 10] * 2)
    other = outcome([21.0, 42.0], [0.5, 1.5], [[1, 0] * 5, [2, 1] * 5])
    index_RN = torch.tensor([[0, 1], [0, 0], [1, 1]])
    change = [(math.exp(nats) - 1) * 100 for nats in (0.15, 0.1, 0.2)]  # in 10 tokens a row
    assert perplexity_change(other, exact, index_RN).tolist() == pytest.approx(change)
    assert kl_per_token(other, index_RN).tolist() == pytest.approx([0.1, 0.05, 0.15])
    assert loads_per_token(other, index_RN).tolist() == pytest.approx([1.0, 0.5, 1.5])
