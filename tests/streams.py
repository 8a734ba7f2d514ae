"""Device streams without a device: work is queued, and runs late, in any order events allow.

Stands in for the names of ``torch.cuda`` that ``moe_gpu.offload.transfer`` uses. Whatever order
the chosen seed gives is one that real hardware could take, so a missing wait shows as wrong bytes.
"""

import contextlib
import random
import threading
from collections import deque


class Mark:
    """A point in a stream."""

    done = False


class FakeStream:
    def __init__(self, cuda):
        self.cuda, self.work = cuda, deque()
        cuda.streams.append(self)

    def queue(self, job):
        with self.cuda.lock:
            self.work.append((None, job))
            self.cuda.run_some()

    def mark(self):
        mark = Mark()
        self.queue(lambda: setattr(mark, "done", True))
        return mark

    def wait_event(self, event):
        if event.mark is not None:  # CUDA: waiting for an event that was never recorded is no wait
            self.work.append((event.mark, lambda: None))

    def wait_stream(self, stream):
        self.work.append((stream.mark(), lambda: None))

    def synchronize(self):
        self.cuda.run_until(self.mark())


class FakeEvent:
    def __init__(self, cuda):
        self.cuda, self.mark = cuda, None

    def record(self, stream):
        self.cuda, self.mark = stream.cuda, stream.mark()

    def query(self):
        with self.cuda.lock:
            self.cuda.run_one()  # time passes while the host looks
            return self.mark is None or self.mark.done

    def synchronize(self):
        if self.mark is not None:
            self.cuda.run_until(self.mark)

    def elapsed_time(self, later):
        assert self.mark.done and later.mark.done
        return 0.5


class FakeCuda:
    def __init__(self, seed: int):
        self.random, self.streams = random.Random(seed), []
        self.lock = threading.RLock()
        self.default = self.Stream()
        self._here = threading.local()  # as in CUDA, each thread has its own current stream

    @property
    def current(self):
        return getattr(self._here, "stream", self.default)

    def Stream(self, device=None):  # noqa: N802 - stands in for a class
        return FakeStream(self)

    def Event(self, enable_timing=False):  # noqa: N802
        return FakeEvent(self)

    def current_stream(self, device=None):
        return self.current

    @contextlib.contextmanager
    def stream(self, stream):
        before, self._here.stream = self.current, stream
        yield
        self._here.stream = before

    def run_one(self) -> bool:
        with self.lock:
            ready = [
                s for s in self.streams if s.work and (s.work[0][0] is None or s.work[0][0].done)
            ]
            if ready:
                self.random.choice(ready).work.popleft()[1]()
            return bool(ready)

    def run_some(self):
        for _ in range(self.random.choice([0, 0, 1, 3])):
            self.run_one()

    def run_until(self, mark):
        with self.lock:
            while not mark.done:
                assert self.run_one(), "the streams wait for each other"

    def run_all(self):
        with self.lock:
            while self.run_one():
                pass
            assert not any(stream.work for stream in self.streams)
