"""Prefill: every missing expert once, the next layer's ahead, and a cache that is not flushed."""

import pytest
import torch

from moe_gpu.offload import offloader as offloader_module
from offloading import assert_consistent, make_offloader, route

OPTIONS = {"layers": 3, "slots": 4, "staging_slots": 2, "stream_prefill": False}
EVERYBODY = [[0, 1], [2, 3], [4, 5], [6, 7]]


def prefill(offloader, weights, chosen, layer=0):
    """Take a prefill's step; check the weights; return the experts in the order of their turns."""
    route(offloader.state, chosen, layer)
    order = []
    for expert, slot, _, _ in offloader.step(layer, sum(map(len, chosen)), is_prefill=True):
        for name, weight in offloader.weights_of(layer)[slot].items():
            assert torch.equal(weight, weights[layer][name][expert])
        order.append(expert)
    return order


def test_the_last_tokens_decide_who_stays():
    offloader, weights = make_offloader(**OPTIONS)  # 0 to 3 are resident
    chosen = EVERYBODY * 5 + [[5, 6], [6, 1]]
    assert sorted(prefill(offloader, weights, chosen)) == list(range(8))
    # routing decays by 0.9: the last tokens' experts, then those of the last round
    assert offloader.residents(0) == [1, 5, 6, 7]
    metrics = offloader.metrics()
    assert metrics.loads == 4 and metrics.evictions == 3
    assert metrics.bypassed == 1, "4 passed through"
    assert_consistent(offloader)


def test_warm_takes_whom_most_tokens_used():
    offloader, weights = make_offloader(prefill="warm", **OPTIONS)
    chosen = [[4, 5]] * 6 + [[6, 4]] * 5 + [[0, 7]] * 4 + [[1, 2], [3, 1]]
    prefill(offloader, weights, chosen)
    # tokens: 4 has 11, 5 six, 6 five, 0 and 7 four each, and the lower id stays
    assert offloader.residents(0) == [0, 4, 5, 6]


def test_keep_leaves_the_residents_alone():
    offloader, weights = make_offloader(prefill="keep", **OPTIONS)
    prefill(offloader, weights, EVERYBODY * 5)
    assert offloader.residents(0) == [0, 1, 2, 3]
    metrics = offloader.metrics()
    assert (metrics.loads, metrics.bypassed, metrics.evictions) == (4, 4, 0)


def test_keep_does_not_evict_idle_residents_either():
    offloader, weights = make_offloader(prefill="keep", **OPTIONS)
    prefill(offloader, weights, [[4, 5], [6, 7]] * 8)
    assert offloader.residents(0) == [0, 1, 2, 3]


@pytest.mark.parametrize("staging_slots", [1, 2, 3])
def test_the_next_layers_experts_come_while_this_layer_computes(monkeypatch, staging_slots):
    monkeypatch.setattr(offloader_module, "STREAM_PAIRS", 1)
    options = OPTIONS | {"stream_prefill": True, "staging_slots": staging_slots, "prefill": "keep"}
    offloader, weights = make_offloader(**options)
    for layer in range(3):
        assert sorted(prefill(offloader, weights, EVERYBODY, layer)) == list(range(8))
    metrics = offloader.metrics()
    assert metrics.loads == 3 * 4, "each missing expert once"
    assert metrics.prefetch_issued == metrics.prefetch_useful == 2 * staging_slots
    assert metrics.prefetch_wasted_bytes == 0
    assert_consistent(offloader)
    assert offloader.flights.staging == [None] * staging_slots, (
        "nothing is fetched past the last layer"
    )


def test_what_was_streamed_for_nothing_is_counted_and_its_slot_is_free_again(monkeypatch):
    monkeypatch.setattr(offloader_module, "STREAM_PAIRS", 1)
    offloader, weights = make_offloader(**OPTIONS | {"stream_prefill": True, "prefill": "keep"})
    prefill(offloader, weights, EVERYBODY, layer=0)
    for flight in offloader.flights.staging:
        offloader._pager.wait(flight.copy)  # 4 and 5 of layer 1 are there
    assert sorted(prefill(offloader, weights, [[0, 4], [6, 7]], layer=1)) == [0, 4, 6, 7]
    metrics = offloader.metrics()
    assert (metrics.prefetch_issued, metrics.prefetch_useful) == (2, 1)
    assert metrics.prefetch_wasted_bytes == offloader.store.layout.expert_bytes
    assert metrics.layers[1].loads == 4, "4, 6, 7, and 5 for nothing"


def test_a_short_prefill_does_not_stream():
    offloader, weights = make_offloader(**OPTIONS | {"stream_prefill": True})
    prefill(offloader, weights, EVERYBODY)  # one pair per expert
    assert offloader.flights.staging == [None, None]


def test_decode_after_a_prefill_left_in_the_middle(monkeypatch):
    monkeypatch.setattr(offloader_module, "STREAM_PAIRS", 1)
    offloader, weights = make_offloader(**OPTIONS | {"stream_prefill": True})
    route(offloader.state, EVERYBODY)
    turns = offloader.step(0, 8, is_prefill=True)
    for _ in range(5):
        next(turns)
    turns.close()
    for layer in (1, 0, 2, 0):
        route(offloader.state, [[4, 6]], layer)
        order = []
        for expert, slot, _, _ in offloader.step(layer, 2):
            weight = offloader.weights_of(layer)[slot]["down_proj"]
            assert torch.equal(weight, weights[layer]["down_proj"][expert])
            order.append(expert)
        assert sorted(order) == [4, 6]
    assert offloader.flights.staging == [None, None]
