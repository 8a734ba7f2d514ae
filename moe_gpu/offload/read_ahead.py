"""Hints to the system: experts on disk that are wanted next, while another one is being read.

One thread that reads leaves the disk idle between its requests. So experts that wait in the pager's
queue are announced on a thread of their own: announcing takes time too, and is a hint only.
"""

import os
import queue
import threading
import weakref
from collections.abc import Callable

CLOSE_S = 2.0  # a disk that hangs is not waited for; the thread is a daemon
AHEAD = 8  # announcements that may wait; more would push each other out of the page cache


class ReadAhead:
    """Announces experts on a thread that starts when it is first needed.

    Args:
        read_ahead: ``(layer, expert)``: ask for the expert's bytes to be in memory soon.
    """

    def __init__(self, read_ahead: Callable[[int, int], None]):
        self._read_ahead = read_ahead
        self._start_afresh()
        _all.add(self)

    def _start_afresh(self) -> None:
        self._asked: queue.Queue[tuple[int, int] | None] = queue.Queue(AHEAD)
        self._thread: threading.Thread | None = None

    def ask(self, layer: int, expert: int) -> None:
        """Announce an expert, unless too many are waiting already; does not wait."""
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(
                target=_work,
                args=(self._asked, self._read_ahead),
                name="moe_gpu-ahead",
                daemon=True,
            )
            self._thread.start()
        try:
            self._asked.put_nowait((layer, expert))
        except queue.Full:
            pass  # it will be read without

    def close(self) -> None:
        """Announce no more, and end the thread, which holds on to the files; bounded."""
        try:
            while True:
                self._asked.get_nowait()
        except queue.Empty:
            if self._thread is not None:
                self._asked.put_nowait(None)
                self._thread.join(CLOSE_S)


def _work(asked: queue.Queue, read_ahead: Callable[[int, int], None]) -> None:
    while (expert := asked.get()) is not None:
        try:
            read_ahead(*expert)
        except Exception:  # the read itself will say what is wrong
            continue


_all: "weakref.WeakSet[ReadAhead]" = weakref.WeakSet()


def _forget_threads() -> None:
    """In a forked child: the thread is not here, and the queue's lock may be held for good."""
    for ahead in list(_all):
        ahead._start_afresh()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)
