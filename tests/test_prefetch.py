"""Prefetch: who earns a slot, what is fetched when, and what it is said to have cost."""

import threading
import time

import pytest
import torch

from moe_gpu.kernels.route_ref import Rule
from moe_gpu.offload.prefetch import check_predictors, hottest_missing, place_for
from moe_gpu.offload.slots import SlotTable
from offloading import assert_consistent, make_offloader, route, run_step


def make_table(residents, num_slots=4, probation=()):
    table = SlotTable(8, num_slots)
    for slot, key in enumerate(residents):
        table.load(key, slot)
    table.probation.update(probation)
    return table


def ascending(keys):
    return sorted(keys)


@pytest.mark.parametrize(
    "residents, probation, key, options, expected",
    [
        pytest.param([1, 2, 3], [], 0, {}, (3, None), id="a free slot"),
        pytest.param([1, 2, 3, 4], [], 5, {}, (0, 1), id="it earns the slot of the coldest"),
        pytest.param([1, 2, 3, 4], [], 0, {}, None, id="it is colder than everybody"),
        pytest.param([1, 2, 3, 4], [], 0, {"must_earn": False}, (0, 1), id="a prediction"),
        pytest.param([1, 2, 3, 4], [], 5, {"keep": [1, 2]}, (2, 3), id="others must stay"),
        pytest.param([1, 2, 3, 4], [3], 5, {}, (2, 3), id="one of four is on probation: that one"),
        pytest.param([1, 2, 3, 4], [3], 5, {"keep": [3]}, None, id="and it must stay"),
    ],
)
def test_place_for(residents, probation, key, options, expected):
    table = make_table(residents, probation=probation)
    options = {"must_earn": True} | options
    assert place_for(table, key, ascending, **options) == expected


def test_a_leased_expert_gives_no_place():
    table = make_table([1])
    for key in (2, 3, 4):
        table.load(key, table.free_slots()[0])
    for key in (1, 2, 3, 4):
        table.lease(key)
    assert place_for(table, 5, ascending, must_earn=False) is None


def test_hottest_missing():
    table = make_table([3, 1])
    affinity = [0.5, 0.9, 0.7, 0.9, 0.7, 0.0, 0.0, 0.0]
    assert hottest_missing(table, range(8), affinity) == 2, "not 1 or 3, the lower of equals"
    assert hottest_missing(table, [5, 6, 7], affinity) is None, "never wanted"


def test_names():
    assert check_predictors("affinity") == {"affinity"}
    assert check_predictors(()) == frozenset()


@pytest.fixture
def gated(monkeypatch):
    """An offloader whose copies on the pager's thread wait until they are let through."""
    made = []

    def make(**options):
        offloader, weights = make_offloader(layers=2, slots=4, **options)
        gate = threading.Event()
        inner = offloader._transfer.piece

        def piece(copy, start, stop):
            if threading.current_thread().name == "moe_gpu-pager":
                assert gate.wait(10)
            inner(copy, start, stop)

        offloader._pager._piece = piece
        made.append((offloader, gate))
        return offloader, weights, gate

    yield make
    for offloader, gate in made:
        gate.set()
        offloader.close()


def until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(1e-3)


def predict(offloader, layer, experts):
    assert offloader.wants_prediction(layer)
    offloader.predict(layer, torch.tensor([experts]))


def test_a_prediction_becomes_a_hit(gated):
    offloader, weights, gate = gated(prefetch=["next_gate"])
    gate.set()
    route(offloader.state, [[0, 1]])
    predict(offloader, 1, [0, 6])  # 6 is not resident
    run_step_with_flights(offloader, weights, 2)
    until(lambda: all(f.copy.is_over() for f in offloader.flights.on_way.values()))
    offloader.before_route(1)
    assert 6 in offloader.residents(1) and offloader.state.slot_of_LE[1, 6] >= 0
    route(offloader.state, [[0, 6]], layer=1)
    assert run_step(offloader, weights, 2, layer=1) == [0, 6]
    metrics = offloader.metrics()
    assert (metrics.prefetch_issued, metrics.prefetch_useful, metrics.prefetch_late) == (1, 1, 0)
    assert metrics.layers[1].unique_misses == 0 and metrics.loads == 1
    assert not offloader.cache.tables[1].probation, "its first use ends probation"


def run_step_with_flights(offloader, weights, pairs, layer=0):
    order = []
    for expert, slot, _, _ in offloader.step(layer, pairs):
        for name, weight in offloader.weights_of(layer)[slot].items():
            assert torch.equal(weight, weights[layer][name][expert])
        order.append(expert)
    return order


def test_a_late_prediction_is_waited_for_and_not_fetched_twice(gated):
    offloader, weights, gate = gated(prefetch=["next_gate"])
    route(offloader.state, [[0, 1]])
    predict(offloader, 1, [6, 7])
    run_step_with_flights(offloader, weights, 2)
    assert offloader.state.slot_of_LE[1, 6] == -1, "not resident for the gate while it is under way"
    route(offloader.state, [[6, 7]], layer=1)
    threading.Timer(0.05, gate.set).start()
    assert sorted(run_step(offloader, weights, 2, layer=1)) == [6, 7]
    metrics = offloader.metrics()
    assert (metrics.prefetch_issued, metrics.prefetch_useful, metrics.prefetch_late) == (1, 1, 1)
    assert metrics.loads == 2 == metrics.layers[1].unique_misses
    assert metrics.layers[1].stall_ms > 10


def test_a_wrong_prediction_is_taken_back_before_it_costs_anything(gated):
    offloader, weights, gate = gated(prefetch=["next_gate"])
    blocker = offloader.flights.begin(
        0, 7, offloader.cache.tables[0].evict(3), _background()
    )  # the link is busy
    until(lambda: blocker.copy.state.value == "running")
    route(offloader.state, [[0, 1]])
    predict(offloader, 1, [6, 0])
    run_step_with_flights(offloader, weights, 2)
    route(offloader.state, [[0, 1]], layer=1)
    run_step_with_flights(offloader, weights, 2, layer=1)
    metrics = offloader.metrics()
    assert (metrics.prefetch_issued, metrics.prefetch_cancelled) == (0, 1)
    assert metrics.prefetch_wasted_bytes == 0 and 6 not in offloader.residents(1)
    gate.set()


def _background():
    from moe_gpu import Priority

    return Priority.BACKGROUND


def test_a_useless_prefetch_is_counted_when_it_leaves(gated):
    offloader, weights, gate = gated(prefetch=["next_gate"])
    gate.set()
    route(offloader.state, [[0, 1]])
    predict(offloader, 1, [6, 0])
    run_step_with_flights(offloader, weights, 2)
    until(lambda: all(f.copy.is_over() for f in offloader.flights.on_way.values()))
    for chosen in ([2, 3], [4, 5], [1, 7], [2, 0]):  # nobody wants 6
        route(offloader.state, [chosen], layer=1)
        run_step(offloader, weights, 2, layer=1)
    metrics = offloader.metrics()
    assert 6 not in offloader.residents(1)
    assert metrics.prefetch_wasted_bytes == offloader.store.layout.expert_bytes
    assert (metrics.prefetch_issued, metrics.prefetch_useful) == (1, 0)


def test_swapped_away_experts_are_fetched_in_the_background(gated):
    offloader, weights, gate = gated(prefetch=["background"], eviction="affinity")
    gate.set()
    for _ in range(3):  # 5 is wanted each time, 0 stands in
        route(offloader.state, [[1, 5]], rule=Rule.BONUS, second=[0])
        offloader.state.strength_L.fill_(9.0)
        run_step_with_flights(offloader, weights, 2)
        until(lambda: all(f.copy.is_over() for f in offloader.flights.on_way.values()))
        offloader.before_route(0)
    assert 5 in offloader.residents(0)
    assert offloader.metrics().loads_by_tier["pageable"] == offloader.metrics().loads >= 1


def test_the_hottest_missing_expert_of_the_next_layer_is_fetched(gated):
    offloader, weights, gate = gated(prefetch=["affinity"], eviction="affinity")
    gate.set()
    history = offloader.cache.histories[1]
    history.learn(0, [0.1, 0.2, 0.3, 0.4, 0.0, 0.0, 0.35, 0.0])
    route(offloader.state, [[0, 1]])
    run_step_with_flights(offloader, weights, 2)
    until(lambda: all(f.copy.is_over() for f in offloader.flights.on_way.values()))
    offloader.before_route(1)
    assert offloader.residents(1) == [1, 2, 3, 6], "0 was the coldest"
    route(offloader.state, [[0, 1]])
    run_step_with_flights(offloader, weights, 2)
    assert offloader.residents(1) == [1, 2, 3, 6], "nobody else earns a place"
    assert_consistent(offloader)


def test_a_failed_prefetch_is_counted_and_the_step_loads_it_itself(gated):
    offloader, weights, gate = gated(prefetch=["next_gate"])
    inner = offloader._pager._piece

    def bad(copy, start, stop):
        if threading.current_thread().name == "moe_gpu-pager":
            raise OSError("bad sector")
        inner(copy, start, stop)

    offloader._pager._piece = bad
    route(offloader.state, [[0, 1]])
    predict(offloader, 1, [6, 0])
    run_step_with_flights(offloader, weights, 2)
    until(lambda: all(f.copy.is_over() for f in offloader.flights.on_way.values()))
    route(offloader.state, [[0, 6]], layer=1)
    assert sorted(run_step(offloader, weights, 2, layer=1)) == [0, 6]
    metrics = offloader.metrics()
    assert (metrics.prefetch_failed, metrics.prefetch_issued, metrics.loads) == (1, 0, 1)
