"""Ctrl-C that is never lost.

Python drops an exception that is raised while a destructor runs, and with it one Ctrl-C in about
fifty during a start like ours. So it is also noted, and :func:`check` raises it again.
"""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_pressed = False


@contextmanager
def noted() -> Iterator[None]:
    """Note Ctrl-C while the block runs; it still raises KeyboardInterrupt at once."""
    global _pressed
    _pressed = False
    before = signal.signal(signal.SIGINT, _note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def deferred() -> Iterator[Callable[[], bool]]:
    """Only note the first Ctrl-C while the block runs, so that it can end in good order.

    Yields a function that says whether it came. A second one raises at once.
    """
    presses = 0

    def count(signum, frame):
        nonlocal presses
        presses += 1
        if presses > 1:
            _note(signum, frame)

    before = signal.signal(signal.SIGINT, count)
    try:
        yield lambda: presses > 0
    finally:
        signal.signal(signal.SIGINT, before)


def check() -> None:
    """Raise KeyboardInterrupt if Ctrl-C was pressed and lost."""
    if _pressed:
        raise KeyboardInterrupt


def forget() -> None:
    """Go on after a Ctrl-C that was answered."""
    global _pressed
    _pressed = False


def _note(signum, frame):
    global _pressed
    _pressed = True
    raise KeyboardInterrupt
