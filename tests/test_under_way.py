"""Steps that meet copies which are still under way, or have failed meanwhile: every interleaving
that once computed from the wrong bytes, computed twice, or had no slot left."""

import threading
import time

import pytest
import torch

from moe_gpu.offload import offloader as module
from offloading import assert_consistent, make_offloader, route, run_step


class Gates:
    """What the pager's thread waits for before it reads an expert, and what becomes of the read."""

    def __init__(self, offloader):
        self.offloader, self.read = offloader, []
        self._shut, self._errors = {}, {}
        self._piece = offloader._pager._piece
        offloader._pager._piece = self

    def __call__(self, copy, start, stop):
        key = copy.layer, copy.expert
        if threading.current_thread().name == "moe_gpu-pager":
            self.read.append(key)
            if key in self._shut:
                assert self._shut[key].wait(20)
        if self._errors.get(key):
            raise self._errors[key].pop(0)
        self._piece(copy, start, stop)

    def shut(self, layer, expert, *errors):
        """Hold reads of an expert; the first ones to be let go raise these."""
        self._shut[layer, expert] = threading.Event()
        self._errors[layer, expert] = list(errors)

    def open(self, layer, expert):
        self._shut[layer, expert].set()

    def open_all(self):
        for event in self._shut.values():
            event.set()

    def until_reading(self, layer, expert):
        until(lambda: (layer, expert) in self.read)


def until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(1e-3)


@pytest.fixture
def gated():
    """Layers of eight experts, 0 to 3 of each resident; urgent copies run inline unless ``link``."""
    made = []

    def make(link=False, **options):
        options = {"slots": 4, "timeout_s": 10.0} | options
        offloader, weights = make_offloader(layers=2, **options)
        if link:
            offloader._transfer.runs_inline = lambda copy: False
        made.append(Gates(offloader))
        return offloader, weights, made[-1]

    yield make
    for gates in made:
        gates.open_all()
        gates.offloader.close()


def prefetch(offloader, gates, expert, layer=1):
    """Predict an expert of the next layer, and return once its copy has begun."""
    route(offloader.state, [[0, 1]], layer - 1)
    offloader.predict(layer, torch.tensor([[expert]]))
    list(offloader.step(layer - 1, 2))
    gates.until_reading(layer, expert)
    assert (layer, expert) in offloader.flights.on_way


def stage(offloader, weights, gates, monkeypatch):
    """Stream ahead: expert 4 of layer 1 is on its way into the only staging slot."""
    monkeypatch.setattr(module, "STREAM_PAIRS", 0)
    route(offloader.state, [[0, 1]])
    list(offloader.step(0, 2, is_prefill=True))
    gates.until_reading(1, 4)
    [flight] = offloader.flights.staging
    assert (flight.copy.layer, flight.copy.expert) == (1, 4)
    return flight


def take(offloader, weights, chosen, layer, between=lambda: None, **options):
    """Take a step and check its weights; do something while the first expert computes."""
    route(offloader.state, [chosen], layer)
    order = []
    for expert, slot, _, _ in offloader.step(layer, len(chosen), **options):
        if not order:
            between()
        for name, weight in offloader.weights_of(layer)[slot].items():
            assert torch.equal(weight, weights[layer][name][expert]), (expert, name)
        order.append(expert)
    return order


# -- failures that somebody else notices


def test_a_prefetch_that_fails_while_its_step_has_begun(gated):
    """Another layer's step takes note of the failure; ours must not compute from the slot."""
    offloader, weights, gates = gated(prefetch=["next_gate"])
    gates.shut(1, 6, OSError("disk on fire"))
    prefetch(offloader, gates, 6)
    resident = offloader.residents(1)[0]
    assert resident < 6

    def fail_and_settle():
        copy = offloader.flights.on_way[1, 6].copy
        gates.open(1, 6)
        until(copy.is_over)
        take(offloader, weights, [0, 1], layer=0)

    assert take(offloader, weights, [resident, 6], 1, fail_and_settle) == [resident, 6]
    assert gates.read == [(1, 6)] * 2, "fetched again"
    assert_consistent(offloader)
    metrics = offloader.metrics()
    assert (metrics.prefetch_failed, metrics.prefetch_issued, metrics.loads) == (1, 0, 1)


@pytest.mark.parametrize("errors", [1, 2])
@pytest.mark.parametrize("where", ["slot", "staging slot"])
def test_a_copy_of_somebody_else_that_fails_is_made_once_more(gated, monkeypatch, where, errors):
    options = {"prefetch": ["next_gate"]} if where == "slot" else {"staging_slots": 1}
    offloader, weights, gates = gated(**options)
    expert = 6 if where == "slot" else 4
    gates.shut(1, expert, *[OSError("disk on fire")] * errors)
    if where == "slot":
        prefetch(offloader, gates, expert)
    else:
        stage(offloader, weights, gates, monkeypatch)
    threading.Timer(0.1, gates.open, [1, expert]).start()
    if errors == 2:
        with pytest.raises(RuntimeError, match=f"layer 1: loading expert {expert} .*disk on fire"):
            take(offloader, weights, [0, expert], 1)
        assert gates.read == [(1, expert)] * 2 and expert not in offloader.residents(1)
    assert set(take(offloader, weights, [0, expert], 1)) == {0, expert}
    assert_consistent(offloader)
    assert offloader.metrics().prefetch_failed == 1


def test_a_copy_of_ones_own_that_fails_is_not_made_again(gated):
    """Whoever asked hears of it; the next step tries again."""
    offloader, weights, gates = gated(link=True)
    gates.shut(0, 5, OSError("disk on fire"))
    gates.open(0, 5)
    with pytest.raises(RuntimeError, match="layer 0: loading expert 5 .*disk on fire"):
        take(offloader, weights, [0, 5], 0)
    assert gates.read == [(0, 5)]
    assert_consistent(offloader)
    assert take(offloader, weights, [0, 5], 0) == [0, 5]


def test_a_prefetch_that_fails_before_anybody_needs_it(gated):
    offloader, weights, gates = gated(prefetch=["next_gate"])
    gates.shut(1, 6, OSError("disk on fire"))
    prefetch(offloader, gates, 6)
    gates.open(1, 6)
    until(lambda: offloader.flights.on_way[1, 6].copy.is_over())
    assert set(take(offloader, weights, [6, 7], 1)) == {6, 7}, "fetched again, as a miss"
    assert_consistent(offloader)
    metrics = offloader.metrics()
    assert (metrics.prefetch_failed, metrics.prefetch_issued, metrics.loads) == (1, 0, 2)


# -- steps that are left


def test_what_an_abandoned_step_had_queued_is_taken_back(gated):
    """The link works for whoever comes next, not for a step that is over."""
    offloader, weights, gates = gated(link=True)
    gates.shut(0, 5)
    route(offloader.state, [[5, 6], [0, 7]])
    turns = offloader.step(0, 4)
    next(turns)
    gates.until_reading(0, 5)
    turns.close()
    gates.open(0, 5)
    assert set(take(offloader, weights, [0, 5], 0)) == {0, 5}
    assert gates.read == [(0, 5)], "6 and 7 were cancelled, 5 was finished and used"
    assert_consistent(offloader)


# -- no slot left


@pytest.mark.parametrize("fails", [False, True], ids=["arrives", "fails"])
def test_a_prefetch_holds_the_only_slot_that_a_step_could_take(gated, fails):
    offloader, weights, gates = gated(slots=1, prefetch=["next_gate"])
    gates.shut(1, 6, *[OSError("disk on fire")] * fails)
    prefetch(offloader, gates, 6)
    threading.Timer(0.1, gates.open, [1, 6]).start()
    assert take(offloader, weights, [5], 1) == [5]
    assert_consistent(offloader)
    assert offloader.metrics().stall_ms >= 90


def test_the_prefetch_is_right_but_its_slot_is_needed_twice(gated):
    offloader, weights, gates = gated(slots=1, prefetch=["next_gate"])
    gates.shut(1, 6)
    prefetch(offloader, gates, 6)
    threading.Timer(0.1, gates.open, [1, 6]).start()
    assert take(offloader, weights, [6, 7], 1) == [6, 7]
    assert gates.read == [(1, 6)]
    assert_consistent(offloader)


def test_a_staged_copy_holds_the_only_staging_slot(gated, monkeypatch):
    """And every slot is leased by a step that this one is taken in the middle of."""
    offloader, weights, gates = gated(
        slots=2, pool=True, staging_slots=1, fill=False, prefetch=["next_gate"]
    )
    offloader.warm(0, [0, 1])
    gates.shut(1, 0)
    monkeypatch.setattr(module, "STREAM_PAIRS", 0)

    def nested():
        gates.until_reading(1, 0)  # streamed ahead by the step around
        threading.Timer(0.1, gates.open, [1, 0]).start()
        assert take(offloader, weights, [5], 1) == [5]

    assert take(offloader, weights, [0, 1], 0, nested, is_prefill=True) == [0, 1]
    assert_consistent(offloader)


def test_a_step_in_the_middle_does_not_wait_its_way_into_the_others_staging_slot(gated):
    offloader, weights, gates = gated(
        link=True, slots=1, pool=True, staging_slots=1, fill=False, bypass=True
    )
    offloader.warm(0, [0])
    gates.shut(0, 5)

    def nested():
        gates.until_reading(0, 5)
        threading.Timer(0.1, gates.open, [0, 5]).start()
        with pytest.raises(RuntimeError, match="are missing and all 1 slots are leased"):
            take(offloader, weights, [7], 1)

    assert take(offloader, weights, [0, 5], 0, nested) == [0, 5]
    assert_consistent(offloader)
    assert take(offloader, weights, [7], 1) == [7]


def test_no_slot_will_ever_be_free(gated):
    offloader, weights, gates = gated(slots=2, pool=True, fill=False)
    offloader.warm(0, [0, 1])

    def nested():
        with pytest.raises(RuntimeError, match=r"experts \[13\] are missing and all 2 slots are"):
            take(offloader, weights, [5], 1)

    assert take(offloader, weights, [0, 1], 0, nested) == [0, 1]
    assert_consistent(offloader)


def test_a_copy_that_hangs_in_the_only_slot_is_named(gated):
    offloader, weights, gates = gated(slots=1, prefetch=["next_gate"], timeout_s=0.2)
    gates.shut(1, 6)
    prefetch(offloader, gates, 6)
    for refused in (lambda: take(offloader, weights, [5], 1), lambda: offloader.warm(1, [5])):
        with pytest.raises(RuntimeError, match="layer 1: loading expert 6 .*completed after 0.2 s"):
            refused()
    gates.open(1, 6)
    until(lambda: offloader.flights.on_way[1, 6].copy.is_over())
    assert take(offloader, weights, [5], 1) == [5]
    assert_consistent(offloader)


def test_warming_waits_for_a_slot_too(gated):
    offloader, weights, gates = gated(prefetch=["next_gate"])
    gates.shut(1, 6)
    prefetch(offloader, gates, 6)
    threading.Timer(0.1, gates.open, [1, 6]).start()
    offloader.warm(1, [2, 3, 4, 5])
    assert offloader.residents(1) == [2, 3, 4, 5]
    assert_consistent(offloader)


# -- one expert on two ways


def test_an_expert_that_got_a_slot_while_it_is_staged_is_computed_once(gated, monkeypatch):
    offloader, weights, gates = gated(staging_slots=1)
    gates.shut(1, 4)
    flight = stage(offloader, weights, gates, monkeypatch)
    offloader.warm(1, [4])
    assert not flight.copy.is_over() and 4 in offloader.residents(1)
    assert take(offloader, weights, [2, 4], 1) in ([2, 4], [4, 2])
    gates.open(1, 4)
    until(flight.copy.is_over)
    assert take(offloader, weights, [2, 4], 1) in ([2, 4], [4, 2])
    assert offloader.flights.staging == [None]
    metrics = offloader.metrics()
    assert metrics.prefetch_wasted_bytes == offloader.store.layout.expert_bytes
    assert (metrics.prefetch_issued, metrics.prefetch_useful) == (1, 0)


def test_a_staged_expert_is_not_prefetched_as_well(gated, monkeypatch):
    offloader, weights, gates = gated(staging_slots=1, prefetch=["next_gate"])
    gates.shut(1, 4)
    flight = stage(offloader, weights, gates, monkeypatch)
    offloader._running_L[1] = None
    route(offloader.state, [[0, 1]])
    offloader.predict(1, torch.tensor([[4]]))
    list(offloader.step(0, 2))
    assert not offloader.flights.on_way, "it is on its way already"
    gates.open(1, 4)
    until(flight.copy.is_over)
    assert gates.read == [(1, 4)]


def test_dropping_a_staged_copy_is_not_the_arrival_of_another(gated, monkeypatch):
    """Expert 4 arrives in a staging slot; a second copy of it, into a slot of its own, hangs."""
    offloader, weights, gates = gated(link=True, staging_slots=1, timeout_s=0.2)
    flight = stage(offloader, weights, gates, monkeypatch)
    until(flight.copy.is_over)
    gates.shut(1, 4)
    with pytest.raises(RuntimeError, match="layer 1: loading expert 4 .* has not completed"):
        offloader.warm(1, [4])
    assert (1, 4) in offloader.flights.on_way
    with pytest.raises(RuntimeError, match="layer 1: loading expert 4 .* has not completed"):
        take(offloader, weights, [0, 4], 1)
    gates.open(1, 4)
    offloader._pager.timeout_s = 10
    assert sorted(take(offloader, weights, [0, 4], 1)) == [0, 4]
    assert_consistent(offloader)


def test_a_stale_staged_copy_that_is_running_counts_as_wasted_only(gated, monkeypatch):
    offloader, weights, gates = gated(staging_slots=1)
    gates.shut(1, 4)
    flight = stage(offloader, weights, gates, monkeypatch)
    assert sorted(take(offloader, weights, [0, 7], 1)) == [0, 7]  # 4 is not needed after all
    gates.open(1, 4)
    until(flight.copy.is_over)
    take(offloader, weights, [0, 7], 1)
    metrics = offloader.metrics()
    assert (metrics.prefetch_issued, metrics.prefetch_useful, metrics.prefetch_late) == (1, 0, 0)
    assert metrics.prefetch_wasted_bytes == offloader.store.layout.expert_bytes


# -- steps inside steps


@pytest.mark.parametrize("staging_slots", [1, 3])
def test_a_step_in_the_middle_of_a_step_takes_nothing_from_it(gated, staging_slots):
    offloader, weights, gates = gated(slots=1, staging_slots=staging_slots)
    inner = []

    def nested():
        inner.extend(take(offloader, weights, [4, 5, 6, 7], 1))

    assert sorted(take(offloader, weights, [0, 5, 6, 7], 0, nested)) == [0, 5, 6, 7]
    assert sorted(inner) == [4, 5, 6, 7]
    assert_consistent(offloader)
    route(offloader.state, [[2, 3]])
    assert sorted(run_step(offloader, weights, 2)) == [2, 3]
