"""ExpertOffloader: exact bytes under every history, and a sound state after every accident."""

import random
import warnings

import pytest
import torch

from moe_gpu import PagingRequest, Priority, RouterState
from moe_gpu.kernels.route_ref import Rule
from moe_gpu.offload import ExpertOffloader, pinning
from offloading import assert_consistent, make_offloader, make_store, route, run_step


def test_starts_with_the_first_experts():
    offloader, _ = make_offloader(layers=2, slots=3)
    assert offloader.cache.tables[1].slot_of_X == [0, 1, 2, -1, -1, -1, -1, -1]
    assert_consistent(offloader)
    assert (offloader.metrics().filled, offloader.metrics().loads) == (6, 0)


def test_hits_first_then_loads_with_the_spans_of_sorted_pairs():
    offloader, weights = make_offloader(slots=4)  # 0, 1, 2, 3 are resident
    route(offloader.state, [[5, 2], [2, 0], [5, 2]])
    turns = list(offloader.step(0, 6))
    assert [(t.expert, t.start, t.stop) for t in turns] == [(0, 0, 1), (2, 1, 4), (5, 4, 6)]
    assert turns[2].slot == offloader.cache.tables[0].slot_of_X[5]
    assert offloader.cache.tables[0].residents() == [0, 2, 3, 5], "1 had the lowest affinity and id"


def test_counts_add_up():
    offloader, weights = make_offloader(slots=3)
    assert offloader.store.layout.expert_bytes == 512  # 120 and 60 bytes, padded to 256 each
    for chosen in ([[0, 1]], [[5, 6]], [[5, 6]], [[0, 1], [2, 3], [4, 5]]):
        route(offloader.state, chosen)
        run_step(offloader, weights, 2 * len(chosen))
    metrics = offloader.metrics()
    # step 2 takes the slots of 2 and 0; step 4 finds 1 and 5, loads one over 6, then three more
    assert (metrics.loads, metrics.evictions, metrics.filled) == (2 + 4, 2 + 4, 3)
    assert metrics.bytes_loaded == 6 * 512
    assert metrics.waves == 1 + 1 + 1 + 2
    assert metrics.stall_ms > 0 and metrics.superseded == 0
    offloader.reset_metrics()
    assert offloader.metrics().loads == offloader.metrics().waves == 0
    assert offloader.metrics().stall_ms == 0.0


@pytest.mark.parametrize("inline", [True, False], ids=["this thread", "the pager's"])
def test_filling_stalls_nobody(inline):
    offloader, weights = make_offloader(slots=4, fill=False)
    offloader._transfer.runs_inline = lambda copy: inline
    offloader.fill()
    assert (offloader.metrics().filled, offloader.metrics().stall_ms) == (4, 0.0)
    route(offloader.state, [[0, 5]])
    run_step(offloader, weights, 2)
    if inline:  # else it may have arrived before anybody waits
        assert offloader.metrics().stall_ms > 0


@pytest.mark.parametrize("eviction", ["lru", "affinity"])
@pytest.mark.parametrize("slots", [1, 2, 5, 8])  # fewer than K; K; some; all
def test_exact_and_once_under_random_histories(slots, eviction):
    dice = random.Random(slots)
    offloader, weights = make_offloader(layers=2, slots=slots, eviction=eviction)
    loads = 0
    for step in range(60):
        layer, T = step % 2, dice.choice([1, 1, 1, 2, 12])
        chosen = [dice.sample(range(8), 2) for _ in range(T)]
        needed = {expert for experts in chosen for expert in experts}
        loads += len(needed - set(offloader.cache.tables[layer].residents()))
        route(offloader.state, chosen, layer)
        order = run_step(offloader, weights, 2 * T, layer)
        assert sorted(order) == sorted(needed)
    assert offloader.metrics().loads == loads, "each missing expert once per step"
    assert offloader.metrics().superseded == 0


def test_an_expert_loaded_and_evicted_in_one_step_is_not_resident():
    offloader, weights = make_offloader(slots=2, fill=False)
    route(offloader.state, [[3, 4], [5, 6], [6, 7]])
    run_step(offloader, weights, 6)
    assert sorted(offloader.cache.tables[0].residents()) != [3, 4]
    assert (offloader.state.slot_of_LE[0] >= 0).sum() == 2


def test_the_gate_sees_residency_only_where_it_changed():
    offloader, weights = make_offloader(slots=4)
    published = []
    inner = offloader._transfer.publish
    offloader._transfer.publish = lambda layer, row: (published.append(layer), inner(layer, row))
    for chosen in ([[0, 1]], [[0, 7]], [[0, 7]]):
        route(offloader.state, chosen)
        run_step(offloader, weights, 2)
    assert published == [0]


class Boom(Exception):
    pass


@pytest.mark.parametrize("after", range(6))
@pytest.mark.parametrize("how", ["raise", "close", "abandon"])
def test_a_step_left_in_the_middle(after, how):
    """Six experts through two slots: loads of three waves, left after each of the turns."""
    offloader, weights = make_offloader(slots=2)
    route(offloader.state, [[0, 3], [4, 5], [6, 7]])
    turns = offloader.step(0, 6)
    with pytest.raises(Boom):
        for seen, _ in enumerate(turns):
            if seen == after:
                if how == "close":
                    turns.close()
                    assert_consistent(offloader)
                raise Boom
    # "abandon": the generator is alive and suspended when the next step begins
    if how == "raise":
        del turns
        assert_consistent(offloader)
    for chosen in ([[3, 4]], [[0, 7]]):
        route(offloader.state, chosen)
        assert sorted(run_step(offloader, weights, 2)) == chosen[0]


def test_a_failed_load_names_it_and_the_next_step_works(monkeypatch):
    offloader, weights = make_offloader(layers=2, slots=3)
    good = offloader.store.expert

    def bad(layer, expert):
        if expert == 6:
            raise OSError("disk on fire")
        return good(layer, expert)

    monkeypatch.setattr(offloader.store, "expert", bad)
    route(offloader.state, [[0, 5], [6, 7]], layer=1)
    with pytest.raises(
        RuntimeError, match=r"layer 1: loading expert 6 into slot \d of 3 failed: disk on fire"
    ):
        list(offloader.step(1, 4))
    assert_consistent(offloader)
    assert not offloader.cache.tables[1].is_resident(6) and offloader.cache.tables[1].is_resident(5)
    monkeypatch.undo()
    route(offloader.state, [[0, 5], [6, 7]], layer=1)
    assert sorted(run_step(offloader, weights, 4, layer=1)) == [0, 5, 6, 7]


def test_a_step_needs_its_own_route_call():
    offloader, weights = make_offloader()
    with pytest.raises(RuntimeError, match="layer 0 has not been routed since its last step"):
        list(offloader.step(0, 2))
    route(offloader.state, [[0, 1]])
    run_step(offloader, weights, 2)
    with pytest.raises(RuntimeError, match="layer 0 has not been routed"):
        list(offloader.step(0, 2))
    route(offloader.state, [[0, 1]])
    with pytest.raises(RuntimeError, match="executed 2 pairs, this step has 4"):
        list(offloader.step(0, 4))
    assert_consistent(offloader)


def test_background_requests_are_counted_and_kept():
    offloader, weights = make_offloader(slots=2)  # 0, 1 resident
    assert offloader.background(0) == []
    offloader.state.strength_L.fill_(1.0)  # a budget that never binds
    route(offloader.state, [[0, 5]], rule=Rule.MASS, second=[1])
    assert run_step(offloader, weights, 2) == [0, 1]
    assert offloader.metrics().background == 1 and offloader.metrics().loads == 0
    [request] = offloader.background(0)
    assert isinstance(request, PagingRequest)
    assert (request.expert, request.priority, request.tokens) == (5, Priority.BACKGROUND, 1)
    route(offloader.state, [[4, 5]])
    run_step(offloader, weights, 2)
    assert offloader.metrics().background == 1 and offloader.background(0) == []


def test_warm_keeps_what_it_can_and_evicts_by_policy():
    offloader, weights = make_offloader(slots=3, eviction="lru")  # 0, 1, 2
    route(offloader.state, [[0, 2]])
    run_step(offloader, weights, 2)
    offloader.warm(0, [7, 2])
    assert offloader.cache.tables[0].residents() == [0, 2, 7], "1 was used longest ago"
    assert (offloader.metrics().loads, offloader.metrics().filled) == (0, 4)
    assert_consistent(offloader)


@pytest.mark.parametrize(
    "experts, message",
    [
        ([0, 8], r"experts must lie in \[0, 7\], got 8"),
        ([-1], r"experts must lie in \[0, 7\], got -1"),
        ([1, 1], r"experts must be distinct, got \[1, 1\]"),
        ([0, 1, 2, 3], "experts must be at most the 3 slots of layer 0, got 4"),
    ],
)
def test_warm_refuses(experts, message):
    offloader, _ = make_offloader(slots=3)
    with pytest.raises(ValueError, match=message):
        offloader.warm(0, experts)
    assert_consistent(offloader)


def test_warm_does_not_take_slots_from_a_running_step():
    offloader, _ = make_offloader(slots=2)
    route(offloader.state, [[0, 1]])
    for _ in offloader.step(0, 2):
        with pytest.raises(RuntimeError, match="running step|leased"):
            offloader.warm(0, [4, 5])
    assert offloader.cache.tables[0].residents() == [0, 1]


@pytest.mark.parametrize(
    "slots, error, message",
    [
        (0, ValueError, r"slots must lie in \[1, 8\], the experts per layer, got 0"),
        (9, ValueError, r"slots must lie in \[1, 8\], the experts per layer, got 9"),
        (2.0, TypeError, "slots must be an int, got 2.0"),
        (True, TypeError, "slots must be an int, got True"),
    ],
)
def test_refuses_slots(slots, error, message):
    store, _ = make_store(1, 8)
    with pytest.raises(error, match=message):
        ExpertOffloader(RouterState(1, 8), store, slots)


def test_refuses_a_store_of_another_shape():
    store, _ = make_store(1, 8)
    with pytest.raises(ValueError, match="store holds 1 layers of 8 experts, the state has 2 of 8"):
        ExpertOffloader(RouterState(2, 8), store, 4)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"slots": 1, "top_k": 2, "staging_slots": 2},
            "slots=1 per layer is fewer than the 2 experts that one token needs there: every token "
            "loads in every layer, which is slow",
        ),
        (
            {"slots": 1, "top_k": 4, "staging_slots": 2},  # three at a time
            "slots=1 per layer is fewer than the 4 experts that one token needs there: every token "
            "loads in every layer, in several passes, which is slow",
        ),
        ({"slots": 2, "top_k": 2, "staging_slots": 0}, None),
        (
            {"slots": 4, "top_k": 2, "layers": 4, "pool": True, "staging_slots": 2},
            "a pool of 4 slots is smaller than the 8 experts of one token (4 layers x top-2): "
            "every token loads some, which is slow",
        ),
        (
            {"slots": 1, "top_k": 2, "layers": 1, "pool": True, "staging_slots": 0},
            "a pool of 1 slot is smaller than the 2 experts of one token (1 layer x top-2): "
            "every token loads some, in several passes, which is slow",
        ),
        ({"slots": 8, "top_k": 2, "layers": 4, "pool": True}, None),
    ],
)
def test_warns_where_one_token_needs_more_slots(options, message):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_offloader(**options)
    assert [str(warning.message) for warning in caught] == [message] * (message is not None)


def test_a_forked_child_does_not_wait_for_the_parents_device(monkeypatch):
    offloader, _ = make_offloader()
    calls = []
    monkeypatch.setattr(offloader._transfer, "synchronize", lambda: calls.append(1))
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    offloader._shut_down()
    assert not calls
    pinning.page_unlock(pinning.whole_pages(8))  # asks CUDA for nothing


def test_works_in_and_out_of_inference_mode():
    offloader, weights = make_offloader(slots=3)
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with mode():
            route(offloader.state, [[0, 4], [5, 6]])
            run_step(offloader, weights, 4)
