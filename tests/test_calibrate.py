"""Layer sensitivities: what one layer alone costs, and the scale that follows from it."""

import pytest
import torch

pytest.importorskip("transformers")
from mixtral import VOCAB, make_model, without_interpreter  # noqa: E402, F401
from moe_gpu import QualityBudget  # noqa: E402
from moe_gpu.tuning import calibrate  # noqa: E402
from moe_gpu.tuning.calibrate import layer_sensitivity  # noqa: E402
from moe_gpu.tuning.quality import Evaluation, Job  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def rows_NT():
    return torch.randint(VOCAB, (12, 25), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def lopsided():
    """The last layer's experts do little, so that to swap them costs little."""
    model = make_model(seed=1)
    model.model.layers[1].mlp.experts.down_proj.data *= 0.2
    return model


def test_what_a_layer_alone_costs(lopsided, rows_NT):
    found = layer_sensitivity(lopsided, rows_NT, slots=4, budget=0.3)
    jobs = [Job(QualityBudget(0.3, scale), 4) for scale in ((1.0, 0.0), (0.0, 1.0))]
    outcomes = dict(Evaluation(lopsided, rows_NT).run(jobs))
    for layer, job in enumerate(jobs):
        outcome = outcomes[job]
        assert found.swaps[layer] == outcome.swaps_N.sum() >= calibrate.FEWEST_SWAPS
        cost = outcome.kl_N.sum() / outcome.price_N.sum()
        assert found.kl_per_price[layer] == pytest.approx(cost.item())
    strong, weak = found.kl_per_price
    assert weak < strong / 3
    strong_scale, weak_scale = found.layer_scale
    assert weak_scale * strong_scale == pytest.approx(1)
    assert weak_scale / strong_scale == pytest.approx((strong / weak) ** 0.5)
    assert weak_scale > 1.3


@pytest.mark.parametrize(
    "costs, scale",
    [
        ([4.0, 1.0], [0.5**0.5, 2**0.5]),  # geometric mean 2
        ([4.0, None, 1.0], [0.5**0.5, 1, 2**0.5]),  # unknown: 1, and not part of the mean
        ([1e6, 1.0], [0.25, 4]),  # clamped
        ([2.0, 2.0], [1, 1]),
        ([None, None], [1, 1]),
        ([0.0, 3.0], [1, 1]),  # nothing measured is nothing known
        ([-1e-9, 3.0, 3.0], [1, 1, 1]),
    ],
)
def test_scale(costs, scale):
    assert calibrate._scale(costs) == pytest.approx(scale)


def test_too_few_swaps_to_tell(lopsided, rows_NT):
    found = layer_sensitivity(lopsided, rows_NT[:1], slots=4, budget=1e-3)
    assert max(found.swaps) < calibrate.FEWEST_SWAPS
    assert found.kl_per_price == (None, None) and found.layer_scale == (1, 1)


def test_nothing_to_swap(lopsided, rows_NT):
    with pytest.raises(ValueError, match="slots must be under the 8 experts, got 8"):
        layer_sensitivity(lopsided, rows_NT, slots=8)


def test_repeatable(lopsided, rows_NT):
    one, two = (layer_sensitivity(lopsided, rows_NT, slots=3, budget=0.3) for _ in range(2))
    assert one == two
