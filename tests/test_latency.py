"""RouteTimer: events of a device that is not there, read by several threads."""

import copy
import pickle
import sys
import threading
import time

import torch

from moe_gpu.latency import RouteTimer

CALLS = 2000


class Event:
    """An event that has passed; can be read once, like a call that is timed once."""

    def __init__(self):
        self.reads = 0

    def query(self):
        time.sleep(0)  # lets another thread in between the look and the pop
        return True

    def elapsed_time(self, end):
        self.reads += 1
        return 1.0


def test_threads_read_every_call_once():
    timer, errors = RouteTimer(keep=2 * CALLS), []
    events = [Event() for _ in range(CALLS)]
    timer._pending.extend((event, event) for event in events)

    def read():
        try:
            timer.latencies_us()
        except Exception as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=read) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    finally:
        sys.setswitchinterval(interval)
    assert not errors
    assert [event.reads for event in events] == [1] * CALLS
    assert timer.latencies_us() == [1000.0] * CALLS


def test_a_copy_keeps_what_was_measured_and_works():
    timer = RouteTimer()
    with timer.call(torch.device("cpu")):
        pass
    timer._pending.append((Event(), Event()))
    for twin in (copy.deepcopy(timer), pickle.loads(pickle.dumps(timer))):
        assert twin.latencies_us() == list(timer._done_us)
        with twin.call(torch.device("cpu")):
            pass
        assert len(twin.latencies_us()) == 2
    timer.reset()
    assert timer.latencies_us() == []
