"""What the evaluation engine counts: exact routing, settings side by side, streams, refusals."""

from dataclasses import fields

import pytest
import torch

pytest.importorskip("transformers")
import moe_gpu  # noqa: E402
from mixtral import EXPERTS, LAYERS, TOP_K, VOCAB, make_model, without_interpreter  # noqa: E402, F401
from moe_gpu import CacheBonus, Exact, MassBudget, QualityBudget  # noqa: E402
from moe_gpu.tuning.quality import Evaluation, Job  # noqa: E402
from moe_gpu.tuning.simulate import LRU  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENS = 20


@pytest.fixture(scope="module")
def model():
    return make_model(seed=1)


@pytest.fixture(scope="module")
def rows_NT():
    return torch.randint(VOCAB, (6, TOKENS + 1), generator=torch.Generator().manual_seed(0))


def evaluate(model, rows_NT, *jobs, **options):
    found = dict(Evaluation(model, rows_NT, **options).run(jobs))
    assert set(found) == set(jobs)
    return [found[job] for job in jobs]


def assert_same(a, b, exactly=True):
    """Counts are equal; sums of logarithms too, but for the order in which matrices are added."""
    for field in fields(a):
        left, right = getattr(a, field.name), getattr(b, field.name)
        if exactly or field.name in ("loads_NT", "swaps_N", "agree_N", "pairs"):
            assert torch.equal(torch.as_tensor(left), torch.as_tensor(right)), field.name
        else:
            torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


def test_exact_routing_is_the_model(model, rows_NT):
    (outcome,) = evaluate(model, rows_NT, Job(Exact(), 4))
    with torch.no_grad():
        logits_NTV = model(rows_NT[:, :-1]).logits
    nll_NT = torch.nn.functional.cross_entropy(
        logits_NTV.transpose(1, 2), rows_NT[:, 1:], reduction="none"
    )
    torch.testing.assert_close(outcome.nll_N, nll_NT.sum(1).double(), rtol=1e-5, atol=0)
    assert not outcome.kl_N.any() and not outcome.swaps_N.any() and not outcome.moved_N.any()
    assert outcome.agree_N.tolist() == [TOKENS] * len(rows_NT)
    assert outcome.tokens == TOKENS and outcome.pairs == TOKENS * TOP_K * LAYERS
    assert outcome.loads_NT.max() <= TOP_K * LAYERS


def test_loads_of_exact_routing_fall_with_slots(model, rows_NT):
    jobs = [Job(Exact(), slots) for slots in (2, 4, 6, 8)]
    loads = [outcome.loads_N.sum().item() for outcome in evaluate(model, rows_NT, *jobs)]
    assert loads == sorted(loads, reverse=True) and loads[-1] == 0 < loads[-2]


def test_a_budget_of_zero_is_exact_routing(model, rows_NT):
    zeros = [QualityBudget(0.0), MassBudget(0.0), CacheBonus(0.0)]
    exact, *found = evaluate(model, rows_NT, *(Job(policy, 4) for policy in (Exact(), *zeros)))
    for outcome in found:
        assert torch.equal(outcome.loads_NT, exact.loads_NT)
        assert not (outcome.swaps_N.any() or outcome.moved_N.any() or outcome.l1_N.any())
        # ours weighs experts by a softmax over two, the model's own divides a softmax over all
        torch.testing.assert_close(outcome.nll_N, exact.nll_N, rtol=1e-6, atol=0)
        assert outcome.kl_N.abs().max() < 1e-4 * TOKENS and torch.equal(
            outcome.agree_N, exact.agree_N
        )
        assert_same(outcome, found[0])


def test_every_expert_resident_is_exact_routing(model, rows_NT):
    nothing, swaps = evaluate(
        model, rows_NT, Job(QualityBudget(0.0), 8), Job(QualityBudget(1.0), 8)
    )
    assert_same(nothing, swaps)


def test_side_by_side_is_alone(model, rows_NT):
    jobs = [Job(QualityBudget(budget), 4) for budget in (0.05, 0.2, 0.5)]
    together = evaluate(model, rows_NT, *jobs)
    for job, outcome in zip(jobs, together, strict=True):
        assert_same(evaluate(model, rows_NT, job)[0], outcome, exactly=False)
    swaps = [outcome.swaps_N.sum().item() for outcome in together]
    loads = [outcome.loads_N.sum().item() for outcome in together]
    assert 0 < swaps[0] < swaps[1] < swaps[2] and loads[0] > loads[1] > loads[2]


def test_batches_change_nothing(model, rows_NT):
    jobs = [Job(Exact(), 4), *(Job(MassBudget(budget), 4) for budget in (0.1, 0.3))]
    whole = evaluate(model, rows_NT, *jobs)
    for batch_rows in (1, 4, 13):
        for a, b in zip(whole, evaluate(model, rows_NT, *jobs, batch_rows=batch_rows), strict=True):
            assert_same(a, b, exactly=False)


def test_settings_that_do_not_fit_side_by_side_keep_their_own(model, rows_NT):
    jobs = [
        Job(QualityBudget(0.7), 4),
        Job(QualityBudget(0.7, protect=0), 4),
        Job(QualityBudget(0.7), 3),
        Job(QualityBudget(0.7), 4, LRU),
        Job(MassBudget(0.1), 4),
        Job(CacheBonus(0.3, "logit_range"), 4),
        Job(CacheBonus(0.3), 4),
    ]
    together = evaluate(model, rows_NT, *jobs)
    for job, outcome in zip(jobs, together, strict=True):
        assert_same(evaluate(model, rows_NT, job)[0], outcome)
    assert len({tuple(outcome.loads_N.tolist()) for outcome in together}) == len(jobs)


def test_streams_carry_the_cache_over(model, rows_NT):
    job = Job(QualityBudget(0.2), 4)
    (apart,), (streams,) = (evaluate(model, rows_NT, job, segments=s) for s in (1, 3))
    assert torch.equal(apart.loads_NT[::3], streams.loads_NT[::3])  # each stream's first row
    assert not torch.equal(apart.loads_NT[1:3], streams.loads_NT[1:3])
    # whatever the batch, a stream stays whole
    (small,) = evaluate(model, rows_NT, job, segments=3, batch_rows=2)
    assert_same(small, streams, exactly=False)
    exact, lru = evaluate(model, rows_NT, Job(Exact(), 4), Job(Exact(), 4, LRU), segments=3)
    assert exact.nll_N.equal(lru.nll_N) and not exact.loads_N.equal(lru.loads_N)


def test_a_layer_of_scale_zero_is_exact(model, rows_NT):
    exact, both, *alone = evaluate(
        model,
        rows_NT,
        Job(Exact(), 4),
        Job(QualityBudget(0.3), 4),
        Job(QualityBudget(0.3, (1.0, 0.0)), 4),
        Job(QualityBudget(0.3, (0.0, 1.0)), 4),
    )
    swaps = [outcome.swaps_N.sum().item() for outcome in (both, *alone)]
    assert 0 < swaps[1] < swaps[0] and 0 < swaps[2] < swaps[0]
    assert all(outcome.price_N.sum() > 0 for outcome in alone)
    none = evaluate(model, rows_NT, Job(QualityBudget(0.3, (0.0, 0.0)), 4))[0]
    assert torch.equal(none.loads_NT, exact.loads_NT) and not none.swaps_N.any()


def test_swaps_cost_kl_and_move_mass(model, rows_NT):
    (outcome,) = evaluate(model, rows_NT, Job(QualityBudget(0.5), 4))
    for name in ("kl_N", "swaps_N", "moved_N", "l1_N", "price_N"):
        assert (getattr(outcome, name) > 0).all(), name
    assert (outcome.swaps_N <= outcome.pairs).all()
    assert (outcome.agree_N < TOKENS).any()


def test_the_model_is_as_before(model, rows_NT):
    with torch.no_grad():
        before = model(rows_NT).logits
    evaluate(model, rows_NT, Job(QualityBudget(0.5), 4))

    class Broken:
        family, strength = "broken", 1.0

        def chooser(self, top_k, strength_B1):
            raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        evaluate(model, rows_NT, Job(Broken(), 4))
    for layer in model.model.layers:
        assert "forward" not in layer.mlp.gate.__dict__
        assert not layer.mlp.gate._forward_hooks
    with torch.no_grad():
        assert torch.equal(model(rows_NT).logits, before)


@pytest.mark.parametrize(
    "rows, options, error, message",
    [
        ([[1, 2]], {}, TypeError, "must be a tensor of token ids"),
        (torch.zeros(2, 3), {}, TypeError, "must be a tensor of token ids"),
        (torch.ones(3, dtype=torch.long), {}, ValueError, r"got \(3,\)"),
        (torch.ones(3, 1, dtype=torch.long), {}, ValueError, "at least 2 tokens"),
        (torch.ones(0, 5, dtype=torch.long), {}, ValueError, r"got \(0, 5\)"),
        (torch.ones(4, 5, dtype=torch.long), {"segments": 3}, ValueError, "divide the 4 rows"),
        (torch.ones(4, 5, dtype=torch.long), {"segments": 0}, ValueError, "got 0"),
    ],
)
def test_refused_rows(model, rows, options, error, message):
    with pytest.raises(error, match=message):
        Evaluation(model, rows, **options)


@pytest.mark.parametrize("slots", [TOP_K - 1, EXPERTS + 1])
def test_refused_slots(model, rows_NT, slots):
    with pytest.raises(ValueError, match=rf"slots must lie in \[2, 8\], got {slots}"):
        evaluate(model, rows_NT, Job(Exact(), slots))


def test_a_scale_of_another_depth_is_refused(model, rows_NT):
    with pytest.raises(ValueError, match="layer_scale must have 2 factors"):
        evaluate(model, rows_NT, Job(QualityBudget(0.1, (1.0,)), 4))


def test_an_attached_model_needs_its_handle(model, rows_NT):
    with moe_gpu.attach(model, slots=4) as moe:
        with pytest.raises(ValueError, match="model is attached: give the handle"):
            Evaluation(model, rows_NT)
    with pytest.raises(ValueError, match="not attached any more"):
        Evaluation(moe, rows_NT)
    Evaluation(model, rows_NT)


@pytest.mark.filterwarnings("ignore:a pool of 2 slots")
@pytest.mark.parametrize("slots", [1, 4])  # a pool of 2; slots of each layer
def test_an_attached_model_through_its_handle(model, rows_NT, slots):
    jobs = [Job(Exact(), 4), Job(QualityBudget(0.2), 4), Job(QualityBudget(0.5), 4)]
    want = evaluate(model, rows_NT, *jobs)
    options = {"policy": QualityBudget(0.3), "meters": True}
    with moe_gpu.attach(model, slots=slots, **options) as moe:
        model.generate(rows_NT[:1, :5], max_new_tokens=5, do_sample=False)
        state = {name: tensor.clone() for name, tensor in moe.state.named_buffers()}
        for a, b in zip(want, evaluate(moe, rows_NT, *jobs, batch_rows=12), strict=True):
            assert_same(a, b, exactly=False)
        for name in ("affinity_LE", "activations_LE", "counters_LC", "meters_LM", "strength_L"):
            assert torch.equal(getattr(moe.state, name), state[name]), name
        assert all(gate.policy == options["policy"] for gate in moe.gates)
        assert all("route" not in gate.__dict__ for gate in moe.gates)
        model.generate(rows_NT[:1, :5], max_new_tokens=5, do_sample=False)
        assert moe.metrics().tokens == 2 * 9


def test_an_error_leaves_the_handle_as_it_was(model, rows_NT):
    with moe_gpu.attach(model, slots=4, policy=QualityBudget(0.3)) as moe:
        with pytest.raises(ValueError, match="layer_scale must have 2 factors"):
            evaluate(moe, rows_NT, Job(QualityBudget(0.1, (1.0,)), 4))
        assert all(gate.policy == QualityBudget(0.3) for gate in moe.gates)
        assert all("route" not in gate.__dict__ for gate in moe.gates)


def test_adaptive_policies_are_refused(model, rows_NT):
    with pytest.raises(TypeError, match="policy must have a fixed strength, got HitRateTarget"):
        evaluate(model, rows_NT, Job(moe_gpu.HitRateTarget(0.9), 4))


def test_a_model_without_experts_is_refused(rows_NT):
    with pytest.raises(ValueError, match="Linear has no MoE layer"):
        Evaluation(torch.nn.Linear(2, 2), rows_NT)
