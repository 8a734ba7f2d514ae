"""Orders copies: urgent ones first, in pieces, on a thread of its own where the host must work.

A copy is *queued*, then *running* (its first piece was begun), then *issued*: its bytes are in
the slot, or ordered on the copy stream so that compute which waits for the slot's event reads
them. A queued copy can be cancelled at no cost. Between two pieces of a copy a more urgent one
goes first, so a prefetch delays an urgent load by one piece at most.

Every wait is bounded, and says what it waited for.
"""

import enum
import itertools
import os
import threading
import time
import weakref
from collections.abc import Callable

from ..requests import Priority

PIECE_BYTES = 16 << 20  # under about 256 KiB, async copies turn synchronous; untuned above that

CLOSE_S = 10.0  # an exit does not wait longer for a copy that hangs; its thread is a daemon

_ORDER = {Priority.URGENT: 0, Priority.BACKGROUND: 1, Priority.PREFETCH: 2}


class CopyState(enum.Enum):
    """How far a copy is."""

    QUEUED = "queued"
    RUNNING = "running"
    ISSUED = "issued"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Copy:
    """One expert on its way into a place on the device.

    Attributes:
        layer, expert: Whose weights.
        place: Index of the slot among all slots of the device.
        priority: ``URGENT``, ``BACKGROUND`` or ``PREFETCH``.
        state: See :class:`CopyState`; changed by the pager only.
        error: Why it failed.
        made_s: When it was made, ``time.perf_counter``.
    """

    __slots__ = (
        "layer", "expert", "place", "priority", "state", "error", "done", "number", "made_s",
    )  # fmt: skip

    def __init__(self, layer: int, expert: int, place: int, priority: Priority):
        self.layer, self.expert, self.place, self.priority = layer, expert, place, priority
        self.state = CopyState.QUEUED
        self.error: BaseException | None = None
        self.done = 0  # bytes whose piece is over
        self.number = -1
        self.made_s = time.perf_counter()

    def is_over(self) -> bool:
        """Whether the pager will not touch it again."""
        return self.state in (CopyState.ISSUED, CopyState.FAILED, CopyState.CANCELLED)


class Pager:
    """Runs copies, one piece at a time, on one thread that starts when it is first needed.

    Attributes:
        restarts: Times that a dead thread was replaced.

    Args:
        begin: Called before the first piece of a copy.
        piece: ``(copy, start, stop)``: move these bytes of the expert.
        finish: Called after the last piece.
        expert_bytes: Length of every copy.
        timeout_s: Bound of every wait, in seconds.
        piece_bytes: Longest piece; a multiple of 256.
    """

    def __init__(
        self,
        begin: Callable[[Copy], None],
        piece: Callable[[Copy, int, int], None],
        finish: Callable[[Copy], None],
        expert_bytes: int,
        timeout_s: float,
        piece_bytes: int = PIECE_BYTES,
    ):
        self._begin, self._piece, self._finish = begin, piece, finish
        self._expert_bytes, self._piece_bytes = expert_bytes, piece_bytes
        self.timeout_s = timeout_s
        self.restarts = 0
        self._numbers = itertools.count()
        self._start_afresh()
        _pagers.add(self)

    def _start_afresh(self) -> None:
        self._changed = threading.Condition()
        self._queue: list[Copy] = []  # short: sorted at each choice
        self._thread: threading.Thread | None = None
        self._death: BaseException | None = None
        self._closed = False

    @property
    def is_busy(self) -> bool:
        """Whether a copy that is ordered now would have to wait, or overtake another."""
        return bool(self._queue)

    def run_now(self, copy: Copy) -> None:
        """Run a whole copy on the calling thread, ahead of everything queued; raises its error."""
        if self._closed:
            raise RuntimeError("the offloader is closed")
        copy.state = CopyState.RUNNING
        try:
            self._begin(copy)
            self._piece(copy, 0, self._expert_bytes)
            self._finish(copy)
        except BaseException as error:
            copy.state, copy.error = CopyState.FAILED, error
            raise
        copy.state = CopyState.ISSUED

    def order(self, copy: Copy) -> None:
        """Queue a copy for the thread.

        Raises:
            RuntimeError: The pager is closed.
        """
        with self._changed:
            if self._closed:
                raise RuntimeError("the offloader is closed")
            self._ensure_thread()
            copy.number = next(self._numbers)
            self._queue.append(copy)
            self._changed.notify_all()

    def promote(self, copy: Copy, priority: Priority = Priority.URGENT) -> None:
        """Change the priority of a copy that is not over."""
        with self._changed:
            copy.priority = priority
            self._changed.notify_all()

    def cancel(self, copy: Copy) -> bool:
        """Give up a copy that has not begun; return whether that was so."""
        with self._changed:
            if copy.state is not CopyState.QUEUED:
                return False
            copy.state = CopyState.CANCELLED
            self._queue.remove(copy)
            return True

    def wait(self, copy: Copy) -> None:
        """Wait until a copy is issued.

        Raises:
            RuntimeError: It failed, the thread died, or it took longer than ``timeout_s``; says
                which, for the caller to add whose copy it was.
        """
        deadline = time.monotonic() + self.timeout_s
        with self._changed:
            while not copy.is_over():
                left = deadline - time.monotonic()
                if left <= 0:
                    raise RuntimeError(
                        f"its copy has not completed after {self.timeout_s:g} s "
                        f"({copy.state.value}, {copy.done:,} of {self._expert_bytes:,} bytes)"
                    )
                if self._thread is not None and not self._thread.is_alive():
                    self._bury(RuntimeError("the copying thread is gone"))
                    continue
                self._changed.wait(min(left, 0.5))  # a killed thread notifies nobody
        if copy.state is not CopyState.ISSUED:
            raise RuntimeError(str(copy.error or copy.state.value)) from copy.error

    def close(self) -> None:
        """Cancel what has not begun, and stop the thread once its piece is over; bounded."""
        with self._changed:
            self._closed = True
            for copy in list(self._queue):
                if copy.state is CopyState.QUEUED:
                    copy.state = CopyState.CANCELLED
                    self._queue.remove(copy)
            self._changed.notify_all()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(min(self.timeout_s, CLOSE_S))
        with self._changed:
            self._fail_all(RuntimeError("the offloader was closed"))

    def _ensure_thread(self) -> None:
        # a thread that died is still alive while it unwinds, but takes no more orders
        if self._thread is not None and self._thread.is_alive() and self._death is None:
            return
        if self._thread is not None:
            if self._death is None:
                self._bury(RuntimeError("the copying thread is gone"))
            self.restarts += 1
            self._death = None
        # a daemon: an exit never waits for a copy that hangs
        self._thread = threading.Thread(target=self._work, name="moe_gpu-pager", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        try:
            while True:
                with self._changed:
                    while not self._queue and not self._closed:
                        self._changed.wait()
                    if self._closed:
                        return
                    copy = min(self._queue, key=lambda c: (_ORDER[c.priority], c.number))
                    is_first = copy.state is CopyState.QUEUED
                    copy.state = CopyState.RUNNING
                self._advance(copy, is_first)
        except BaseException as death:  # not of a copy: the thread itself ends
            with self._changed:
                self._bury(death)

    def _advance(self, copy: Copy, is_first: bool) -> None:
        start = copy.done
        stop = min(start + self._piece_bytes, self._expert_bytes)
        state, error = CopyState.RUNNING, None
        try:
            if is_first:
                self._begin(copy)
            self._piece(copy, start, stop)
            if stop == self._expert_bytes:
                self._finish(copy)
                state = CopyState.ISSUED
        except Exception as caught:
            state, error = CopyState.FAILED, caught
        with self._changed:
            if copy.is_over():  # buried, or closed meanwhile
                return
            copy.done, copy.state, copy.error = stop, state, error
            if copy.is_over():
                self._queue.remove(copy)
                self._changed.notify_all()

    def _bury(self, death: BaseException) -> None:
        self._death = death
        name = f"{type(death).__name__}: {death}" if str(death) else type(death).__name__
        self._fail_all(RuntimeError(f"the copying thread died: {name}"))

    def _fail_all(self, error: BaseException) -> None:
        for copy in self._queue:
            copy.state, copy.error = CopyState.FAILED, error
        self._queue.clear()
        self._changed.notify_all()

    def _after_fork(self) -> None:
        """In the child: the thread is not here, and its lock may be held for good."""
        lost = self._queue
        closed = self._closed
        self._start_afresh()
        self._closed = closed
        for copy in lost:
            copy.state, copy.error = CopyState.FAILED, RuntimeError("the process was forked")


_pagers: "weakref.WeakSet[Pager]" = weakref.WeakSet()


def _forget_threads() -> None:
    for pager in list(_pagers):
        pager._after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)
