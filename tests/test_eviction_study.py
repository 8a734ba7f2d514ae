"""profiling/eviction.py: replay is the shipped classes, Belady is the optimum, claims follow data."""

import itertools
import json
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
from transformers import MixtralConfig, MixtralForCausalLM  # noqa: E402

from moe_gpu.offload.eviction import LRU, POLICIES, Affinity  # noqa: E402

PROFILING = Path(__file__).parents[1] / "profiling"
sys.path.insert(0, str(PROFILING))
import eviction as study  # noqa: E402
from eviction_replay import Contender, Probation, replay_policy  # noqa: E402
from eviction_traces import DRIFTS, Drift, Group, record, synthesize  # noqa: E402
from moe_gpu.tuning.replay_engine import BELADY, Ranking, replay  # noqa: E402

sys.path.remove(str(PROFILING))

RATE = (0.9, 0.1, 1.0)  # decay, boost, max_score: never saturates
SATURATES = (0.97, 0.3, 1.0)
RANKINGS = [
    Ranking("lru"),
    Ranking("lfu"),
    *[
        Ranking(policy, constants)
        for policy in study.LEARNING
        for constants in (RATE, SATURATES, study.PRESENT)
    ],
]
SHAPES = [  # E, K, L, capacities of the table
    pytest.param(4, 1, 1, [1, 2, 4], id="one expert a token, down to one slot, up to all"),
    pytest.param(7, 3, 1, [3, 5], id="no slot to spare"),
    pytest.param(5, 2, 3, [2, 5, 9], id="a pool with less than K slots per layer"),
    pytest.param(90, 2, 3, [40], id="more keys than a byte counts"),
]


def random_demand(E, K, L, tokens=60, streams=2, seed=0):
    rng = np.random.default_rng(seed)
    skew = np.log(np.arange(1, E + 1))  # some experts are asked for more often
    noise = rng.gumbel(size=(streams, tokens, L, E))
    return (skew - noise).argsort(axis=-1)[..., :K]


@pytest.mark.parametrize("E, K, L, capacities", SHAPES)
def test_replay_is_the_shipped_classes(E, K, L, capacities):
    demand_CTLK = random_demand(E, K, L, tokens=30)
    hits = replay(demand_CTLK, E, RANKINGS, capacities, unit=1)
    for (r, ranking), bypass, (z, capacity) in itertools.product(
        enumerate(RANKINGS), (0, 1), enumerate(capacities)
    ):
        policy, constants = POLICIES[ranking.policy](), ranking.constants
        for c, demand_TLK in enumerate(demand_CTLK):
            want_TL = replay_policy(demand_TLK, E, policy, capacity, bool(bypass), constants)
            assert hits[c, :, r, bypass, z].tolist() == want_TL.sum(1).tolist(), (ranking, bypass)


@pytest.mark.parametrize("E, K, L, capacities", SHAPES)
def test_belady_bounds_every_policy(E, K, L, capacities):
    demand_CTLK = random_demand(E, K, L, streams=6, seed=1)
    hits = replay(demand_CTLK, E, [*RANKINGS, BELADY], capacities, unit=60)[:, 0]
    optimum = hits[:, -1:]
    assert (hits[:, :, 0] <= optimum[:, :, 0]).all() and (hits <= optimum[:, :, 1:]).all()


def most_hits(demand_TLK, E, capacity, bypass):
    """Try every choice of residents."""
    T, L, _ = demand_TLK.shape
    steps = [frozenset(layer * E + demand_TLK[t, layer]) for t in range(T) for layer in range(L)]

    @cache
    def from_here(step, resident):
        if step == len(steps):
            return 0
        needed = steps[step]
        choices = resident | needed
        later = (
            from_here(step + 1, frozenset(kept))
            for size in range(min(capacity, len(choices)) + 1)
            for kept in itertools.combinations(sorted(choices), size)
            if bypass or needed <= set(kept)
        )
        return len(needed & resident) + max(later)

    return from_here(0, frozenset())


@pytest.mark.parametrize(
    "E, K, L, capacity",
    [(4, 1, 1, 2), (5, 2, 1, 2), (5, 2, 1, 3), (2, 1, 3, 2), (3, 2, 2, 4)],
)
@pytest.mark.parametrize("bypass", [False, True])
def test_belady_is_the_best_that_exists(E, K, L, capacity, bypass):
    tokens = 10 if L == 1 else 6
    demand_CTLK = random_demand(E, K, L, tokens=tokens, streams=30, seed=2)
    hits = replay(demand_CTLK, E, [BELADY], [capacity], unit=tokens)[:, 0, 0, int(bypass), 0]
    assert hits.tolist() == [most_hits(demand, E, capacity, bypass) for demand in demand_CTLK]


@pytest.mark.parametrize(
    "ranking, bypass, capacity, steps, expected",
    [
        pytest.param(
            Ranking("lru"), False, 2, "01 12 01 01", [0, 1, 1, 2], id="lru: the needed never leave"
        ),
        pytest.param(Ranking("lru"), False, 2, "0 1 2 0 2", [0, 0, 0, 0, 1], id="lru thrashes"),
        pytest.param(
            Ranking("lfu"), True, 1, "0 0 1 0 1 1 1", [0, 1, 0, 1, 0, 0, 1],
            id="lfu, bypass: 1 stays when it was used as often, being younger",
        ),
        pytest.param(
            Ranking("affinity", RATE), False, 1, "0 0 1 0", [0, 1, 0, 0], id="a one-off displaces"
        ),
        pytest.param(
            Ranking("affinity", RATE), True, 1, "0 0 1 0", [0, 1, 0, 1], id="a one-off bypasses"
        ),
        pytest.param(
            Ranking("affinity", study.PRESENT), True, 1, "0 0 1 0", [0, 1, 0, 0],
            id="saturated: the newcomer always wins",
        ),
        pytest.param(
            Ranking("affinity", RATE), True, 3, "0 1 2 3 0", [0, 0, 0, 0, 0],
            id="free slots are filled first, then the newcomer of most affinity stays",
        ),
        pytest.param(BELADY, False, 2, "0 1 2 0 1", [0, 0, 0, 1, 0], id="belady keeps newcomers"),
        pytest.param(BELADY, True, 2, "0 1 2 0 1", [0, 0, 0, 1, 1], id="belady with bypass"),
    ],
)  # fmt: skip
def test_typed_by_hand(ranking, bypass, capacity, steps, expected):
    demand_TLK = np.array([[[int(expert) for expert in step]] for step in steps.split()])
    hits = replay(demand_TLK[None], 4, [ranking], [capacity], unit=1)
    assert hits[0, :, 0, int(bypass), 0].tolist() == expected


def test_a_pool_lends_slots_between_layers_typed_by_hand():
    demand_TLK = np.array([[[0], [0]], [[1], [0]], [[0], [0]]])  # layer 1 needs one expert only
    hits = replay(demand_TLK[None], 2, [Ranking("lru")], [3], unit=1)[0, :, 0, 0, 0]
    assert hits.tolist() == [0, 1, 2]


def test_layer_order_breaks_ties_towards_the_layer_that_runs_next():
    # a cycle over three layers in two slots: by layer order, who runs next is kept
    demand_TLK = np.zeros((6, 3, 1), dtype=int)
    by_layer, by_id = (
        replay(demand_TLK[None], 1, [Ranking("lru")], [2], unit=6, layer_order=order).sum((0, 1))
        for order in (True, False)
    )
    assert by_layer[0, 0, 0] > by_id[0, 0, 0]


def test_the_present_constants_are_lru():
    demand_CTLK = random_demand(9, 2, 1, tokens=200)
    hits = replay(demand_CTLK, 9, [Ranking("lru"), Ranking("affinity", study.PRESENT)], [4], 1)
    assert np.array_equal(hits[:, :, 0], hits[:, :, 1])


def test_too_few_slots_for_a_step():
    with pytest.raises(ValueError, match="capacities must be at least 2"):
        replay(random_demand(4, 2, 1), 4, RANKINGS, [1, 2], unit=1)


def test_probation_protects_what_was_used_again():
    demand_TLK = np.array([[[e]] for e in (0, 0, 1, 2, 0)])  # 1 and 2 are one-offs

    def hits(policy):
        return replay_policy(demand_TLK, 3, policy, 2, bypass=False)[:, 0].tolist()

    assert hits(LRU()) == [0, 1, 0, 0, 0]
    assert hits(Probation(protected=1)) == [0, 1, 0, 0, 1]
    assert hits(Probation(protected=0)) == hits(LRU())


def test_affinity_is_what_the_policy_sees():
    seen = []

    class Spy(Affinity):
        def rank(self, keys, history):
            seen.append([round(value, 6) for value in history.affinity])
            return super().rank(keys, history)

    demand_TLK = np.array([[[0]], [[0]], [[1]]])
    replay_policy(demand_TLK, 2, Spy(), 1, False, (0.5, 0.25, 0.3))
    assert seen == [[0.15, 0.25]]  # 0.25, then 0.3 of 0.375, then halved: learnt before eviction


@pytest.mark.parametrize("drift", DRIFTS.values(), ids=DRIFTS)
def test_synthetic_demand_is_distinct_seeded_and_differs_by_layer(drift):
    demand_TLK = synthesize(drift, 16, 3, 50, 2, seed=5)
    assert demand_TLK.shape == (50, 2, 3)
    assert demand_TLK.min() >= 0 and demand_TLK.max() < 16
    assert all(len(set(row)) == 3 for row in demand_TLK.reshape(-1, 3).tolist())
    assert np.array_equal(demand_TLK, synthesize(drift, 16, 3, 50, 2, seed=5))
    assert not np.array_equal(demand_TLK, synthesize(drift, 16, 3, 50, 2, seed=6))
    assert not np.array_equal(demand_TLK[:, 0], demand_TLK[:, 1])


STILL = Drift(zipf=0.0, session=10**9, rerank=0.0, phase=0, burst=0.0, memory=1, scan=0.0)


def kept(demand_TLK):
    """Return the share of experts that the token before needed too."""
    pairs = itertools.pairwise(demand_TLK[:, 0].tolist())
    return np.mean([len({*a} & {*b}) / len(a) for a, b in pairs])


@pytest.mark.parametrize(
    "change, expected",
    [
        pytest.param({}, (0.1, 0.16), id="even: K/E = 0.125"),
        pytest.param({"zipf": 1.5}, (0.3, 0.9), id="popular experts return"),
        pytest.param({"burst": 3.0, "memory": 50}, (0.3, 0.9), id="bursts return"),
        pytest.param({"burst": 3.0, "memory": 0.1}, (0.1, 0.16), id="without memory they do not"),
        pytest.param({"zipf": 1.5, "scan": 1.0}, (0.1, 0.16), id="a scan hides all"),
        pytest.param({"zipf": 1.5, "session": 1, "rerank": 1.0}, (0.1, 0.16), id="re-ranked"),
        pytest.param({"zipf": 1.5, "phase": 1}, (0.1, 0.16), id="a new phase every token"),
    ],
)
def test_each_knob_of_the_drift_does_what_it_says(change, expected):
    drift = Drift(**STILL.__dict__ | change)
    low, high = expected
    assert low < kept(synthesize(drift, 16, 2, 1500, 1, seed=0)) < high


def test_recorded_demand_is_what_the_model_routes():
    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=8,
        num_experts_per_tok=2, sliding_window=None, initializer_range=0.3,
    )  # fmt: skip
    model = MixtralForCausalLM(config).eval()
    rows_NT = torch.randint(0, 64, (3, 11))
    hooks = [len(layer.mlp.gate._forward_hooks) for layer in model.model.layers]
    demand = record(model, rows_NT, batch=2)
    assert hooks == [len(layer.mlp.gate._forward_hooks) for layer in model.model.layers]
    with torch.no_grad():
        logits = model(rows_NT, output_router_logits=True).router_logits
    for layer, logits_TE in enumerate(logits):
        want = logits_TE.topk(2).indices.view(3, 11, 2).numpy()
        assert np.array_equal(demand[:, :, layer], want)


def test_hit_rates_per_unit_do_not_depend_on_the_layout():
    demand = np.stack([random_demand(4, 2, 3, tokens=20, streams=2, seed=s) for s in range(5)])
    group = Group("g", list("abcde"), 4, demand, unit=10)
    apart = group.rates(replay(group.layers_apart(), 4, [BELADY], [4], 10))
    pooled = group.rates(replay(group.pooled(), 4, [BELADY], [12], 10))
    assert apart.shape == pooled.shape == (5, 2 * 2, 1, 2, 1)
    assert np.allclose(apart, pooled), "everything fits, so only first uses miss"
    assert apart[:, [1, 3]].mean() > apart[:, [0, 2]].mean()


class Gains:
    """Stands in for Rates: one trace whose gain has a mean and a spread."""

    group = Group("g", ["t"], 2, np.zeros((1, 1, 1, 1, 1)), 1)

    def __init__(self, mean, spread):
        self.draws = np.concatenate([[mean], np.linspace(mean - spread, mean + spread, 101)])

    def gain(self, contender):
        return self.draws[:, None] * (contender.ranking.policy != "lru")


@pytest.mark.parametrize(
    "recorded, synthetic, wins",
    [
        pytest.param(Gains(0.02, 0.01), Gains(0.02, 0.01), True, id="both"),
        pytest.param(Gains(0.02, 0.03), Gains(0.2, 0.01), False, id="not surely where recorded"),
        pytest.param(Gains(0.01, 0.005), Gains(-0.2, 0.01), False, id="not over all"),
    ],
)
def test_lru_is_the_default_unless_the_candidate_surely_wins(recorded, synthetic, wins):
    candidate = Contender(Ranking("affinity", RATE), bypass=True)
    decision = study.decide(candidate, [candidate], [recorded, synthetic])
    assert decision["default"]["policy"] == ("affinity" if wins else "lru")
    assert ("does not reliably beat LRU" in decision["sentence"]) != wins
    assert decision["sentence"].count("the default is LRU") != wins
    assert "loses" not in decision["sentence"]


def test_the_decision_names_the_traces_that_it_loses():
    candidate = Contender(Ranking("affinity", RATE), bypass=True)
    reported = [Gains(0.02, 0.01), Gains(0.05, 0.01), Gains(-0.01, 0.005)]
    sentence = study.decide(candidate, [candidate], reported)["sentence"]
    assert "It loses to LRU, in points, on g: t (-1.00)." in sentence


def test_constants_are_chosen_by_their_gain():
    even = Group("even", ["t"], 8, random_demand(8, 2, 1, tokens=300)[:1, None], unit=300)
    chosen, sweep = study.choose([even], decays=(0.5, 0.99), boosts=(None, 1.0))
    best = {(c.ranking.policy, c.bypass): c.ranking.constants for c in chosen}
    assert best["affinity", True] == (0.99, 0.01, 1.0)  # nothing drifts: a long memory
    gains = [row["gain"] for row in sweep if row["policy"] == "affinity" and row["bypass"]]
    assert max(gains) > 0 and gains[1] == gains[3] == 0  # boost 1 saturates: LRU


def test_a_quick_run_writes_three_files_that_agree(tmp_path, monkeypatch):
    out = tmp_path / "eviction.json"
    monkeypatch.setattr(sys, "argv", ["eviction.py", "--quick", "--out", str(out)])
    study.main()
    content = json.loads(out.read_text())
    report = out.with_suffix(".md").read_text()
    assert content["quick"] and report == study.markdown(content)
    assert content["decision"]["sentence"] in report and "smoke test" in report
    assert out.with_suffix(".png").stat().st_size > 10_000
    below_the_optimum(content)


def below_the_optimum(content):
    place = ("group", "trace", "slots_per_layer")
    optimum = {
        (row["layout"], *map(str, map(row.get, place))): row["hit_rate"]["value"]
        for row in content["rows"]
        if row["title"] == "Belady, bypass"
    }
    assert optimum
    for row in content["rows"]:
        layout = row["layout"].removesuffix(", ties by id")
        best = optimum[layout, *map(str, map(row.get, place))]
        assert all(a <= b for a, b in zip(row["hit_rate"]["value"], best, strict=True)), row


def test_committed_results_say_what_was_measured():
    results = PROFILING / "results"
    content = json.loads((results / "eviction.json").read_text())
    assert not content["quick"]
    assert (results / "eviction.md").read_text() == study.markdown(content)
    assert content["decision"]["sentence"] in study.markdown(content)
    below_the_optimum(content)
