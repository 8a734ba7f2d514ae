"""Decode semantics side by side: cases by hand, the shipped eviction, and the live path hit for hit."""

import math

import pytest
import torch

pytest.importorskip("transformers")
import moe_gpu  # noqa: E402
from mixtral import VOCAB, make_model, without_interpreter  # noqa: E402, F401
from moe_gpu import CacheBonus, Exact, MassBudget, QualityBudget  # noqa: E402
from moe_gpu.kernels.score_ref import ScoreRule  # noqa: E402
from moe_gpu.offload.eviction import DEFAULT, POLICIES  # noqa: E402
from moe_gpu.offload.history import History  # noqa: E402
from moe_gpu.tuning.quality import Evaluation, Job  # noqa: E402
from moe_gpu.tuning.simulate import (  # noqa: E402
    LRU,
    CacheRule,
    DecodeCaches,
    chooser,
    route_side_by_side,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def mark(rows, num_experts=4):
    marked = torch.zeros(len(rows), num_experts, dtype=torch.bool)
    for row, experts in zip(marked, rows, strict=True):
        row[list(experts)] = True
    return marked


def use(caches, *rows, demand=None):
    needed = mark(rows)
    return caches.use(needed, needed if demand is None else mark(demand)).tolist()


def residents(caches):
    return [set(row.nonzero()[:, 0].tolist()) for row in caches.resident_BE]


# -- caches


def test_lru_by_hand():
    caches = DecodeCaches(2, 4, 2, LRU)
    assert residents(caches) == [{0, 1}, {0, 1}]
    assert use(caches, [2], [0]) == [1, 0]  # nobody was used: the lowest id leaves
    assert residents(caches) == [{1, 2}, {0, 1}]
    assert use(caches, [1], [2]) == [0, 1]
    assert residents(caches) == [{1, 2}, {0, 2}]  # 1 was never used, 0 was
    assert use(caches, [0], [1, 3]) == [1, 2]
    assert residents(caches) == [{0, 1}, {1, 3}]


def test_bypass_by_hand():
    """A newcomer below everybody passes through, until its affinity is above somebody's."""
    caches = DecodeCaches(1, 4, 2, CacheRule("affinity", decay=0.98, boost=0.02))
    for _ in range(3):
        assert use(caches, [0, 1]) == [0]  # affinities 0.0588
    for stays in (False, False, True):  # 0.0200 < 0.0576, 0.0396 < 0.0565, 0.0588 > 0.0554
        assert use(caches, [2]) == [1]
        assert residents(caches) == [{1, 2} if stays else {0, 1}]
    assert use(caches, [2]) == [0]


def test_without_bypass_the_newcomer_stays():
    rule = CacheRule("affinity", bypass=False, decay=0.5, boost=1.0, max_score=9.0)
    caches = DecodeCaches(1, 4, 2, rule)
    use(caches, [0, 1])
    use(caches, [0])
    caches._affinity_BE[0, 3] = -5.0
    assert use(caches, [3]) == [1]
    assert residents(caches) == [{0, 3}]


@pytest.mark.parametrize(
    "source, expected",
    [("demand", [0.1, 0.1, 0.0]), ("executed", [0.1, 0.0, 0.1]), ("served", [0.1, 0.0, 0.0])],
)
def test_what_ages_the_affinity(source, expected):
    caches = DecodeCaches(1, 4, 3, CacheRule(boost=0.1, affinity_from=source))
    use(caches, [0, 2], demand=[[0, 1]])
    assert caches._affinity_BE[0, :3].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("bypass", [False, True])
@pytest.mark.parametrize("eviction", POLICIES)
def test_who_leaves_is_the_shipped_policy(eviction, bypass):
    """Also where demand is swapped away: an expert can be wanted often and never be used."""
    B, E, K, S = 3, 12, 2, 6
    caches = DecodeCaches(B, E, S, CacheRule(eviction, bypass, affinity_from="demand"))
    histories, kept = [History(1, E) for _ in range(B)], [set(range(S)) for _ in range(B)]
    affinity_BE = torch.zeros(B, E)
    generator = torch.Generator().manual_seed(2)
    popular_E = torch.arange(1.0, E + 1)  # not those that are resident at first

    def draw(skew):
        weights_BE = torch.rand(B, E, generator=generator) * popular_E**skew
        return torch.zeros(B, E, dtype=torch.bool).scatter(1, weights_BE.topk(K).indices, True)

    misses = 0
    for _ in range(60):
        needed_BE, demand_BE = draw(0.5), draw(0)
        affinity_BE = (affinity_BE * 0.98 + demand_BE * torch.tensor(0.02)).clamp(max=1)
        found = caches.use(needed_BE, demand_BE)
        for b, history in enumerate(histories):
            needed = set(needed_BE[b].nonzero()[:, 0].tolist())
            history.touch(0, needed)
            history.learn(0, affinity_BE[b].tolist())
            missing = needed - kept[b]
            assert found[b] == len(missing)
            may_leave = (kept[b] - needed) | (missing if bypass else set())
            ranked = POLICIES[eviction]().rank(sorted(may_leave), history)
            kept[b] = (kept[b] | needed) - set(ranked[: len(missing)])
            misses += len(missing)
        assert residents(caches) == kept
    assert misses > 40


@pytest.mark.parametrize(
    "eviction, factor", [("affinity_over_age", 3), ("affinity_over_root_age", 3**0.5)]
)
def test_near_ties_go_as_python_divides(eviction, factor):
    B = 200
    caches, history = DecodeCaches(B, 2, 1, CacheRule(eviction)), History(1, 2)
    for expert in (0, 1, 1):  # ages 2 and 0
        used_BE = (torch.arange(2) == expert).expand(B, 2)
        caches.use(used_BE, used_BE)
        history.touch(0, [expert])
    young_B = torch.rand(B, generator=torch.Generator().manual_seed(0))
    caches._affinity_BE = torch.stack([young_B * factor, young_B], 1)
    want = []
    for affinity_E in caches._affinity_BE.tolist():
        history.learn(0, affinity_E)
        want.append(POLICIES[eviction]().rank(range(2), history))
    assert caches._order(torch.arange(B)).tolist() == want


def test_unknown_eviction():
    with pytest.raises(ValueError, match="eviction must be one of 'affinity', .*, got 'fifo'"):
        CacheRule("fifo")


def test_rules_say_what_they_are():
    assert (str(LRU), str(CacheRule())) == ("lru", "affinity over root age with bypass")


# -- routing


def logits(*rows):
    return torch.tensor(rows).log()[None]


@pytest.mark.parametrize("budget, is_swapped", [(0.2932, True), (0.2931, False)])
def test_a_swap_by_hand(budget, is_swapped):
    """Expert 2, w = 3/8, for resident 1, w = 1/8: squared price 0.0859375, price 0.29315."""
    logits_BTE = logits([0.4, 0.3, 0.2, 0.1], [0.5, 0.1, 0.3, 0.1])
    choose = chooser(QualityBudget(budget), 2, budget)
    steps = route_side_by_side(logits_BTE, 2, choose, DecodeCaches(1, 4, 2, LRU))
    assert steps.ids_BTK.tolist() == [[[0, 1], [0, 1] if is_swapped else [0, 2]]]
    assert steps.loads_BT.tolist() == [[0, 0 if is_swapped else 1]]
    assert steps.swaps_BT.tolist() == [[0, int(is_swapped)]]
    moved, l1, price = (0.25, 0.75, 0.0859375) if is_swapped else (0, 0, 0)
    assert steps.moved_BT.tolist() == [[0, pytest.approx(moved)]]
    assert steps.l1_BT.tolist() == [[0, pytest.approx(l1)]]  # 5/8, 3/8 become 5/6, 1/6
    assert steps.price_BT.tolist() == [[0, pytest.approx(price)]]
    weights = [5 / 6, 1 / 6] if is_swapped else [5 / 8, 3 / 8]
    assert steps.weights_BTK[0, 1].tolist() == pytest.approx(weights)


def test_two_swaps_are_priced_worst_with_best():
    shares = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05])  # 1 and 2 are missing, 3 and 4 stand in
    caches = DecodeCaches(1, 5, 3, LRU)
    caches.resident_BE[:] = torch.tensor([1, 0, 0, 1, 1]).bool()
    choose = chooser(QualityBudget(1.0), 3, 1.0)
    steps = route_side_by_side(
        shares.log().view(1, 1, 5), 3, choose, caches, ScoreRule(renormalize=False)
    )
    assert steps.ids_BTK.tolist() == [[[0, 3, 4]]] and steps.swaps_BT.item() == 2
    price = sum(m**2 + r**2 - 1.5 * m * r for m, r in ((0.15, 0.1), (0.2, 0.05))) / 0.85**2
    assert steps.price_BT.item() == pytest.approx(price)
    assert steps.moved_BT.item() == pytest.approx(0.2 / 0.85)
    assert steps.weights_BTK[0, 0].tolist() == pytest.approx([0.5, 0.1, 0.05])
    assert steps.l1_BT.item() == pytest.approx(0.35 + 0.15)


def test_a_row_does_not_see_its_neighbours():
    logits_BTE = torch.randn(4, 20, 8)
    rule, choose = CacheRule(), chooser(MassBudget(0.3), 2, 0.3)
    together = route_side_by_side(logits_BTE, 2, choose, DecodeCaches(4, 8, 3, rule))
    for b in range(4):
        alone = route_side_by_side(logits_BTE[b : b + 1], 2, choose, DecodeCaches(1, 8, 3, rule))
        for name in alone._fields:
            assert torch.equal(getattr(alone, name)[0], getattr(together, name)[b]), name
    assert together.swaps_BT.sum() > 0 and together.loads_BT.sum() > 0


def test_masked_experts_cost_nothing():
    logits_BTE = logits([0.5, 0.3, 0.2, 0.0])
    choose = chooser(QualityBudget(1.0), 2, 1.0)
    caches = DecodeCaches(1, 4, 2, LRU)
    caches.resident_BE[:] = torch.tensor([1, 0, 0, 1]).bool()
    steps = route_side_by_side(logits_BTE, 2, choose, caches)
    assert steps.ids_BTK.tolist() == [[[0, 3]]]
    assert steps.price_BT.item() == pytest.approx((3 / 8) ** 2)
    assert math.isfinite(steps.l1_BT.item())


# -- the live path


@pytest.fixture(scope="module")
def model():
    return make_model(seed=1)


@torch.no_grad()
def decode(model, row_T):
    """Feed tokens one by one; return the log-probabilities of the next, ``(T, V)`` float64."""
    cache, logits = None, []
    for token in row_T[:-1]:
        out = model(token.view(1, 1), past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits[0, -1].double())
    return torch.stack(logits).log_softmax(1)


@pytest.mark.parametrize(
    "cache",
    [LRU, CacheRule("affinity", False, affinity_from="executed"), CacheRule()],
    ids=["lru", "affinity of the executed", "default"],
)
@pytest.mark.parametrize(
    "policy",
    [
        Exact(),
        CacheBonus(0.5),
        CacheBonus(0.2, "logit_range", 1),
        MassBudget(0.3),
        QualityBudget(0.2, (1.0, 2.0)),
    ],
    ids=str,
)
def test_simulation_is_the_live_path(model, policy, cache):
    assert cache.eviction == DEFAULT or not cache.bypass
    rows_NT = torch.randint(VOCAB, (2, 25))
    ((_, outcome),) = Evaluation(model, rows_NT).run([Job(policy, 3, cache)])
    options = {name: getattr(cache, name) for name in cache.__dataclass_fields__}
    for n, row_T in enumerate(rows_NT):
        exact_TV = decode(model, row_T)
        with moe_gpu.attach(model, slots=3, pool=False, policy=policy, **options) as moe:
            log_TV = decode(model, row_T)
            metrics = moe.metrics()
        nll = -log_TV.gather(1, row_T[1:, None]).sum().item()
        kl = (exact_TV.exp() * (exact_TV - log_TV)).sum().item()
        agree = (exact_TV.argmax(1) == log_TV.argmax(1)).sum()
        assert metrics.loads == metrics.misses == outcome.loads_N[n]
        assert metrics.swaps == outcome.swaps_N[n] and metrics.pairs == outcome.pairs
        assert metrics.moved_mass == pytest.approx(outcome.moved_N[n].item(), abs=1e-4)
        assert nll == pytest.approx(outcome.nll_N[n].item(), rel=1e-4)
        assert kl == pytest.approx(outcome.kl_N[n].item(), rel=1e-3, abs=1e-4)
        assert agree == outcome.agree_N[n]
    assert isinstance(policy, Exact) or outcome.swaps_N.sum() > 0


def test_streams_are_a_server_that_stays_up(model):
    """Two requests one after the other through the same slots."""
    rows_NT, policy = torch.randint(VOCAB, (4, 16)), QualityBudget(0.15)
    ((_, outcome),) = Evaluation(model, rows_NT, segments=2).run([Job(policy, 3)])
    for first in (0, 2):
        with moe_gpu.attach(model, slots=3, pool=False, policy=policy) as moe:
            for n in (first, first + 1):
                moe.reset_metrics()
                decode(model, rows_NT[n])
                assert moe.metrics().loads == outcome.loads_N[n]
                assert moe.metrics().swaps == outcome.swaps_N[n]
    ((_, cold),) = Evaluation(model, rows_NT).run([Job(policy, 3)])
    assert torch.equal(cold.loads_N[::2], outcome.loads_N[::2])
    assert not torch.equal(cold.loads_N[1::2], outcome.loads_N[1::2])
