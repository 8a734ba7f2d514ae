"""plan_step: plans typed by hand, then what every plan must keep."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_gpu.offload.eviction import LRU, Affinity
from moe_gpu.offload.history import History
from moe_gpu.offload.plan import Load, checked, plan_step
from moe_gpu.offload.slots import SlotTable

ASCENDING = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]  # affinity: higher ids are hotter


def by(affinity):
    """Rank by these affinities, ties to the lower key."""
    return lambda keys: sorted(keys, key=lambda key: (affinity[key], key))


def make_table(residents, num_slots, num_experts=8):
    """Residents in slots 0, 1, ... in the order given."""
    table = SlotTable(num_experts, num_slots)
    for slot, expert in enumerate(residents):
        table.load(expert, slot)
    return table


@pytest.mark.parametrize(
    "residents, num_slots, needed, turns, loads, follow, waves",
    [
        pytest.param([5, 2], 2, [2, 5], [(2, 1), (5, 0)], [], {}, 1, id="all resident"),
        pytest.param([5, 2], 2, [], [], [], {}, 0, id="nobody needed"),
        pytest.param(
            [5], 3, [1, 5], [(5, 0), (1, 1)], [Load(1, 1, None)], {}, 1, id="a free slot first"
        ),
        pytest.param(
            [7, 3, 4], 3, [1, 7], [(7, 0), (1, 1)], [Load(1, 1, 3)], {}, 1,
            id="coldest resident leaves, not the hit",
        ),
        pytest.param(
            [4], 3, [1, 2, 3], [(1, 1), (2, 2), (3, 0)],
            [Load(1, 1, None), Load(2, 2, None), Load(3, 0, 4)], {}, 1,
            id="free slots, then victims",
        ),
        pytest.param(
            [], 1, [2, 6], [(2, 0), (6, 0)], [Load(2, 0, None)], {2: Load(6, 0, 2)}, 2,
            id="one slot: in turn",
        ),
        pytest.param(
            [0, 1, 2], 3, [0, 1, 2, 5], [(0, 0), (1, 1), (2, 2), (5, 0)],
            [], {0: Load(5, 0, 0)}, 2,
            id="all slots hit: the coldest hit leaves once computed",
        ),
        pytest.param(
            [6, 0], 2, [0, 6, 7], [(0, 1), (6, 0), (7, 1)], [], {0: Load(7, 1, 0)}, 2,
            id="a hit that stays keeps its slot",
        ),
        pytest.param(
            [6], 2, [1, 2, 3, 6], [(6, 0), (1, 1), (2, 0), (3, 1)],
            [Load(1, 1, None)], {6: Load(2, 0, 6), 1: Load(3, 1, 1)}, 2,
            id="the slot that is free first goes to the load that computes first",
        ),
        pytest.param(
            [7, 6], 2, [1, 2, 3, 6, 7], [(6, 1), (7, 0), (1, 1), (2, 0), (3, 1)],
            [], {6: Load(1, 1, 6), 7: Load(2, 0, 7), 1: Load(3, 1, 1)}, 3,
            id="three waves, the last takes the coldest of the second",
        ),
    ],
)  # fmt: skip
def test_plans_by_hand(residents, num_slots, needed, turns, loads, follow, waves):
    table = make_table(residents, num_slots)
    assert plan_step(table, needed, by(ASCENDING)) == (turns, loads, follow, waves)


def test_the_hit_that_leaves_computes_first():
    plan = plan_step(make_table([0, 6], 2), [0, 6, 7], by(ASCENDING[::-1]))
    assert plan.turns == [(6, 1), (0, 0), (7, 1)] and plan.follow == {6: Load(7, 1, 6)}


def test_a_policy_that_forgets_experts_is_named():
    forgetful = checked("Forgetful", lambda keys: keys[1:])
    for needed in ([5], [0, 1, 5]):  # a victim outside the step, a victim within it
        with pytest.raises(RuntimeError, match=r"policy Forgetful ranked \[0, 1\] as \[1\]"):
            plan_step(make_table([0, 1], 2), needed, forgetful)


def test_the_ranking_chooses_the_victim():
    table, history = make_table([1, 2, 3], 3), History(1, 8)
    history.touch(0, [1])
    history.touch(0, [2, 3])
    history.learn(0, ASCENDING[::-1])
    lru = plan_step(table, [5], lambda keys: LRU().rank(keys, history))
    assert lru.loads == [Load(5, 0, 1)]
    affinity = plan_step(table, [5], lambda keys: Affinity().rank(keys, history))
    assert affinity.loads == [Load(5, 2, 3)]


def test_a_leased_expert_is_never_a_victim():
    table = make_table([0, 1], 2)
    table.lease(0)  # the coldest
    assert plan_step(table, [5], by(ASCENDING)).loads == [Load(5, 1, 1)]
    # a hit that somebody else leases stays too, although later waves need room
    plan = plan_step(table, [0, 1, 5, 6], by(ASCENDING))
    assert plan.follow == {1: Load(5, 1, 1), 5: Load(6, 1, 5)}
    table.lease(1)
    with pytest.raises(RuntimeError, match=r"experts \[5\] are missing and all 2 slots are leased"):
        plan_step(table, [5], by(ASCENDING))


@pytest.mark.parametrize(
    "residents, num_slots, needed, options, turns, loads, follow, waves",
    [
        pytest.param(
            [6, 7], 2, [5], {}, [(5, 0)], [Load(5, 0, 6)], {}, 1,
            id="newcomers stay by default, whoever they are",
        ),
        pytest.param(
            [6, 7], 2, [5], {"bypass": True}, [(5, 2)], [Load(5, 2, None)], {}, 1,
            id="bypass: the coldest of all passes through",
        ),
        pytest.param(
            [4, 7], 2, [5], {"bypass": True}, [(5, 0)], [Load(5, 0, 4)], {}, 1,
            id="bypass: a warmer newcomer stays",
        ),
        pytest.param(
            [6], 2, [1], {"bypass": True}, [(1, 1)], [Load(1, 1, None)], {}, 1,
            id="bypass: a free slot is filled all the same",
        ),
        pytest.param(
            [6, 7], 2, [1, 5, 6, 7], {}, [(6, 0), (7, 1), (1, 2), (5, 3)],
            [Load(1, 2, None), Load(5, 3, None)], {}, 1,
            id="no idle resident: newcomers pass through",
        ),
        pytest.param(
            [6, 7], 2, [1, 2, 3, 4, 6], {}, [(6, 0), (1, 1), (2, 2), (3, 3), (4, 2)],
            [Load(1, 1, 7), Load(2, 2, None), Load(3, 3, None)], {2: Load(4, 2, None)}, 2,
            id="more than staging slots: each passes on its slot in turn",
        ),
        pytest.param(
            [6, 7], 2, [1, 2, 3, 6], {"staged": {2: 3, 1: 2}, "staging": []},
            [(6, 0), (2, 3), (1, 2), (3, 1)], [Load(3, 1, 7)], {}, 1,
            id="what is staged already is not fetched again",
        ),
        pytest.param(
            [0, 7], 2, [0, 1, 5, 7], {"everybody": by(ASCENDING)},
            [(0, 0), (7, 1), (1, 2), (5, 0)], [Load(1, 2, None)], {0: Load(5, 0, 0)}, 2,
            id="prefill: the best of all stay, the others leave or pass through",
        ),
        pytest.param(
            [3, 7], 2, [0, 1, 5], {"everybody": by(ASCENDING)},
            [(5, 0), (0, 2), (1, 3)], [Load(5, 0, 3), Load(0, 2, None), Load(1, 3, None)], {}, 1,
            id="prefill: an idle resident that ranks high stays",
        ),
    ],
)  # fmt: skip
def test_plans_with_two_staging_slots(
    residents, num_slots, needed, options, turns, loads, follow, waves
):
    table = make_table(residents, num_slots)
    options = {"staging": [2, 3]} | options
    plan = plan_step(table, needed, by(ASCENDING), **options)
    assert plan == (turns, loads, follow, waves)


@st.composite
def situations(draw):
    num_experts = draw(st.integers(1, 9))
    num_slots = draw(st.integers(1, num_experts))
    order = draw(st.permutations(range(num_experts)))
    residents = order[: draw(st.integers(0, num_slots))]
    needed = sorted(draw(st.sets(st.integers(0, num_experts - 1))))
    affinity = draw(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=9, max_size=9))
    # at least one slot stays free of foreign leases
    leased = draw(st.sets(st.sampled_from(residents), max_size=num_slots - 1)) if residents else ()
    return num_experts, num_slots, residents, needed, affinity, leased


@settings(derandomize=True, deadline=None)
@given(
    situations(),
    st.integers(0, 3),  # staging slots
    st.integers(0, 2),  # of them taken by experts that were staged ahead
    st.booleans(),
    st.booleans(),
)
def test_every_plan_keeps_the_rules(situation, num_staging, num_ahead, bypass, prefill):
    num_experts, num_slots, residents, needed, affinity, foreign = situation
    table = make_table(residents, num_slots, num_experts)
    for expert in foreign:
        table.lease(expert)
    ahead = [e for e in needed if e not in residents][: min(num_ahead, num_staging)]
    staged = {expert: num_slots + i for i, expert in enumerate(ahead)}
    options = {
        "staged": staged,
        "staging": range(num_slots + len(ahead), num_slots + num_staging),
        "bypass": bypass,
        "everybody": by(affinity[::-1]) if prefill else None,
    }
    plan = plan_step(table, needed, by(affinity), **options)
    assert plan == plan_step(table, needed, by(affinity), **options)

    hits = [expert for expert in needed if expert in residents]
    computed, loaded, in_staging = [], [], {slot: expert for expert, slot in staged.items()}

    def load(order):  # the table refuses a leased victim, a taken slot, a resident expert
        loaded.append(order.key)
        if order.slot >= num_slots:
            assert order.victim is None and order.slot not in in_staging
            in_staging[order.slot] = order.key
            return
        if order.victim is not None:
            assert order.victim not in needed or order.victim in computed
            assert table.evict(order.victim) == order.slot
        table.load(order.key, order.slot)
        table.lease(order.key)

    for expert in hits:
        table.lease(expert)
    for order in plan.loads:
        load(order)
    for expert, slot in plan.turns:
        computed.append(expert)
        if slot >= num_slots:
            assert in_staging.pop(slot) == expert
        else:
            assert table.slot_of_X[expert] == slot
            table.release(expert)
        if expert in plan.follow:
            load(plan.follow[expert])
        table.check()

    assert sorted(computed) == needed, "everybody once"
    assert sorted(computed[: len(hits)]) == hits, "hits first"
    assert computed[len(hits) :] == list(staged) + loaded, "then in the order of the copies"
    assert sorted(loaded) == sorted(set(needed) - set(residents) - set(ahead)), "once each"
    assert set(foreign) <= set(table.residents()), "foreign leases are respected"
    if bypass and num_staging and not prefill:  # who passed through ranks below who stayed
        passed = [e for e in loaded if not table.is_resident(e)]
        idle = [e for e in residents if e not in needed and e not in foreign]
        stayed = [e for e in idle if table.is_resident(e)]
        assert all((affinity[p], p) < (affinity[s], s) for p in passed for s in stayed) or len(
            table.free_slots()
        )
    if len(needed) <= num_slots - len(set(foreign) - set(needed)) and not (bypass or prefill):
        assert plan.waves == bool(needed), "no more waves than it takes"
