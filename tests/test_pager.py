"""The pager alone: who goes first, what can be taken back, and that no wait is for ever."""

import gc
import threading
import time
import weakref

import pytest

from children import exit_status_of_fork
from moe_gpu import Priority
from moe_gpu.offload.pager import Copy, CopyState, Pager

EXPERT_BYTES, PIECE = 1000, 256  # three whole pieces and a short one
PIECES = [(0, 256), (256, 512), (512, 768), (768, 1000)]
URGENT, BACKGROUND, PREFETCH = Priority.URGENT, Priority.BACKGROUND, Priority.PREFETCH


class Work:
    """What a pager calls: notes it all, holds the thread where it is told to, fails on request."""

    def __init__(self):
        self.calls = []
        self.raises = {}  # (what, expert): error
        self.held = None  # (expert, start) of the piece that waits
        self.inside, self.go_on = threading.Event(), threading.Event()

    def _note(self, what, copy, *span):
        self.calls.append((what, copy.expert, *span))
        if ((what, copy.expert)) in self.raises:
            raise self.raises[what, copy.expert]

    def begin(self, copy):
        self._note("begin", copy)

    def piece(self, copy, start, stop):
        self._note("piece", copy, start, stop)
        if (copy.expert, start) == self.held:
            self.inside.set()
            assert self.go_on.wait(20)

    def finish(self, copy):
        self._note("finish", copy)

    def pieces(self):
        return [(expert, start) for what, expert, *span in self.calls if span for start in span[:1]]

    def finished(self):
        return [expert for what, expert, *_ in self.calls if what == "finish"]


@pytest.fixture
def work():
    return Work()


@pytest.fixture
def pager(work):
    made = make_pager(work)
    yield made
    work.go_on.set()
    made.close()


def make_pager(work, timeout_s=10.0):
    return Pager(work.begin, work.piece, work.finish, EXPERT_BYTES, timeout_s, PIECE)


def copy_of(expert, priority=URGENT):
    return Copy(0, expert, expert, priority)


def order(pager, expert, priority=URGENT):
    pager.order(copy := copy_of(expert, priority))
    return copy


@pytest.fixture
def busy(pager, work):
    """The pager's thread is inside the first piece of expert 0, until ``work.go_on``."""
    work.held = (0, 0)
    copy = order(pager, 0)
    assert work.inside.wait(10)
    return copy


def test_a_copy_is_begun_moved_in_pieces_and_finished(pager, work):
    assert pager._thread is None, "no thread before there is work"
    copy = order(pager, 5)
    pager.wait(copy)
    assert copy.state is CopyState.ISSUED and copy.is_over()
    moved = [("piece", 5, start, stop) for start, stop in PIECES]
    assert work.calls == [("begin", 5), *moved, ("finish", 5)]
    assert pager._thread.daemon and pager.restarts == 0


def test_the_most_urgent_goes_first_and_equals_in_order(pager, work, busy):
    priorities = [PREFETCH, BACKGROUND, URGENT, PREFETCH, BACKGROUND, URGENT]
    copies = [order(pager, i + 1, priority) for i, priority in enumerate(priorities)]
    work.go_on.set()
    for copy in copies:
        pager.wait(copy)
    assert work.finished() == [0, 3, 6, 2, 5, 1, 4]


def test_an_urgent_copy_overtakes_a_prefetch_between_two_pieces(pager, work):
    work.held = (1, 256)
    prefetch = order(pager, 1, PREFETCH)
    assert work.inside.wait(10)
    urgent = order(pager, 2)
    work.go_on.set()
    pager.wait(urgent)
    pager.wait(prefetch)
    starts = [start for start, _ in PIECES]
    assert work.pieces() == (
        [(1, 0), (1, 256)] + [(2, start) for start in starts] + [(1, 512), (1, 768)]
    )
    assert work.calls.count(("begin", 1)) == 1


def test_equals_do_not_interrupt_each_other(pager, work, busy):
    second = order(pager, 1)
    work.go_on.set()
    pager.wait(second)
    assert work.pieces() == [(expert, start) for expert in (0, 1) for start, _ in PIECES]


@pytest.mark.parametrize("which", ["queued", "running"])
def test_promotion(pager, work, which):
    work.held = (1, 0)
    running, queued = order(pager, 1, PREFETCH), order(pager, 2, PREFETCH)
    assert work.inside.wait(10)
    background = order(pager, 3, BACKGROUND)
    promoted = {"queued": queued, "running": running}[which]
    pager.promote(promoted)
    work.go_on.set()
    for copy in (running, queued, background):
        pager.wait(copy)
    assert work.finished() == {"queued": [2, 3, 1], "running": [1, 3, 2]}[which]


def test_only_a_copy_that_has_not_begun_can_be_cancelled(pager, work, busy):
    queued, other = order(pager, 1, PREFETCH), order(pager, 2)
    assert pager.cancel(queued) and queued.state is CopyState.CANCELLED
    assert not pager.cancel(queued), "once"
    assert not pager.cancel(busy) and busy.state is CopyState.RUNNING
    with pytest.raises(RuntimeError, match="cancelled"):
        pager.wait(queued)
    work.go_on.set()
    pager.wait(busy)
    pager.wait(other)
    assert not pager.cancel(busy)
    assert 1 not in {expert for _, expert, *_ in work.calls}


def test_a_wait_is_bounded_and_says_for_what(pager, work):
    work.held = (0, 512)
    running, queued = order(pager, 0), order(pager, 1)
    assert work.inside.wait(10)
    pager.timeout_s = 0.1
    for copy, state, done in ((running, "running", 512), (queued, "queued", 0)):
        start_s = time.monotonic()
        message = rf"not completed after 0.1 s \({state}, {done} of 1,000 bytes\)"
        with pytest.raises(RuntimeError, match=message):
            pager.wait(copy)
        assert 0.1 <= time.monotonic() - start_s < 2
    work.go_on.set()
    pager.timeout_s = 10
    pager.wait(running)  # giving up a wait gives up nothing else
    pager.wait(queued)


@pytest.mark.parametrize("what", ["begin", "piece", "finish"])
def test_an_error_is_of_its_copy_alone(pager, work, busy, what):
    work.raises[what, 1] = OSError("disk on fire")
    bad, good = order(pager, 1), order(pager, 2)
    work.go_on.set()
    with pytest.raises(RuntimeError, match="disk on fire") as raised:
        pager.wait(bad)
    assert isinstance(raised.value.__cause__, OSError) and bad.state is CopyState.FAILED
    pager.wait(good)
    assert pager.restarts == 0


@pytest.mark.parametrize("what", ["begin", "piece", "finish"])
def test_a_dead_thread_fails_every_waiter_and_is_replaced(pager, work, busy, what):
    work.raises[what, 1] = SystemExit("no more")
    doomed = [order(pager, expert) for expert in (1, 2, 3)]
    said = []

    def wait(copy):
        with pytest.raises(RuntimeError) as raised:
            pager.wait(copy)
        said.append(str(raised.value))

    waiters = [threading.Thread(target=wait, args=[copy]) for copy in doomed]
    for waiter in waiters:
        waiter.start()
    work.go_on.set()
    for waiter in waiters:
        waiter.join(10)
    assert said == ["the copying thread died: SystemExit: no more"] * 3
    assert busy.state is CopyState.ISSUED, "it was over before"
    work.raises.clear()
    pager.wait(order(pager, 1))
    assert pager.restarts == 1
    pager.wait(order(pager, 2))
    assert pager.restarts == 1


def test_an_order_while_the_dead_thread_is_on_its_way_out(pager, work):
    work.raises["piece", 1] = SystemExit()
    with pytest.raises(RuntimeError, match="died: SystemExit"):
        pager.wait(order(pager, 1))
    pager._thread.is_alive = lambda: True  # as it is until its last line
    pager.wait(order(pager, 2))
    assert pager.restarts == 1


def test_a_thread_that_vanishes_without_a_word(pager, work, busy):
    gone = threading.Thread(target=lambda: None)
    gone.start()
    gone.join()
    pager._thread = gone
    start_s = time.monotonic()
    with pytest.raises(RuntimeError, match="the copying thread is gone"):
        pager.wait(busy)
    assert time.monotonic() - start_s < 5
    work.held = None
    pager.wait(order(pager, 1))
    assert pager.restarts == 1


def test_closing_cancels_what_has_not_begun_and_stops_after_the_piece(pager, work, busy):
    queued = order(pager, 1)
    threading.Timer(0.1, work.go_on.set).start()
    pager.close()
    assert not pager._thread.is_alive()
    assert queued.state is CopyState.CANCELLED
    assert busy.state is CopyState.FAILED and work.pieces() == [(0, 0)]
    for copy, message in ((queued, "cancelled"), (busy, "the offloader was closed")):
        with pytest.raises(RuntimeError, match=message):
            pager.wait(copy)
    with pytest.raises(RuntimeError, match="the offloader is closed"):
        order(pager, 2)
    with pytest.raises(RuntimeError, match="the offloader is closed"):
        pager.run_now(copy_of(2))
    pager.close()


def test_closing_wakes_who_waits(pager, work, busy):
    queued, said = order(pager, 1), []

    def wait():
        with pytest.raises(RuntimeError) as raised:
            pager.wait(queued)
        said.append(str(raised.value))

    waiter = threading.Thread(target=wait)
    waiter.start()
    pager.timeout_s = 0.1
    pager.close()
    waiter.join(10)
    assert said == ["cancelled"]


def test_closing_does_not_wait_for_ever_and_a_late_piece_changes_nothing(work):
    pager = make_pager(work, timeout_s=0.2)
    work.held = (0, 0)
    stuck = order(pager, 0)
    assert work.inside.wait(10)
    start_s = time.monotonic()
    pager.close()
    assert time.monotonic() - start_s < 2
    assert stuck.state is CopyState.FAILED
    work.go_on.set()
    pager._thread.join(10)
    assert not pager._thread.is_alive()
    assert stuck.state is CopyState.FAILED and work.finished() == []


def test_closing_before_any_work(pager):
    pager.close()
    assert pager._thread is None


def test_a_copy_on_the_calling_thread(pager, work, busy):
    copy = copy_of(7)
    pager.run_now(copy)  # the thread is busy: nobody waits for it
    assert copy.state is CopyState.ISSUED
    assert work.calls[-3:] == [("begin", 7), ("piece", 7, 0, EXPERT_BYTES), ("finish", 7)]


@pytest.mark.parametrize("error", [OSError("no"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("what", ["begin", "piece", "finish"])
def test_a_copy_on_the_calling_thread_raises_its_own_error(pager, work, what, error):
    work.raises[what, 1] = error
    copy = copy_of(1)
    with pytest.raises(type(error)):
        pager.run_now(copy)
    assert copy.state is CopyState.FAILED and copy.error is error


def test_fork_in_the_middle(pager, work):
    """The thread does not live on in the child: what it had is lost, and new orders work."""
    work.held = (0, 256)
    running, queued = order(pager, 0), order(pager, 1, PREFETCH)
    assert work.inside.wait(10)
    with pager._changed:  # as if another thread held it: the fork must not inherit that
        status = exit_status_of_fork(lambda: in_child(pager, work, running, queued))
    assert status == 0
    work.go_on.set()
    pager.wait(running)
    pager.wait(queued)
    assert pager.restarts == 0


def in_child(pager, work, running, queued):
    for lost in (running, queued):
        with pytest.raises(RuntimeError, match="the process was forked"):
            pager.wait(lost)
        assert not pager.cancel(lost)
    work.held = None
    again = order(pager, 0)
    pager.wait(again)
    assert work.pieces()[-4:] == [(0, start) for start, _ in PIECES]
    pager.close()


def test_a_child_of_a_closed_pager_stays_closed(pager):
    pager.close()

    def work_of_child():
        with pytest.raises(RuntimeError, match="closed"):
            order(pager, 1)

    assert exit_status_of_fork(work_of_child) == 0


def test_an_idle_thread_keeps_nothing_alive_once_closed(work):
    pager = make_pager(work)
    pager.wait(order(pager, 0))
    pager.close()
    gone = weakref.ref(pager)
    del pager
    gc.collect()
    assert gone() is None


def test_many_threads_order_promote_and_cancel(work):
    """Every copy ends, once: issued or cancelled."""
    pager, copies, errors = make_pager(work), [], []

    def customer(first):
        try:
            for expert in range(first, first + 40):
                copy = order(pager, expert, (PREFETCH, BACKGROUND, URGENT)[expert % 3])
                copies.append(copy)
                if expert % 4 == 0:
                    pager.cancel(copy)
                elif expert % 2:
                    pager.promote(copy)
                if copy.state is not CopyState.CANCELLED:
                    pager.wait(copy)
        except BaseException as error:
            errors.append(error)

    customers = [threading.Thread(target=customer, args=[100 * i]) for i in range(4)]
    for thread in customers:
        thread.start()
    for thread in customers:
        thread.join(20)
    pager.close()
    assert not errors
    issued = [copy.expert for copy in copies if copy.state is CopyState.ISSUED]
    assert sorted(issued) == sorted(work.finished()) and len(copies) == 160
    assert all(copy.is_over() for copy in copies)
