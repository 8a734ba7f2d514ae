"""Ctrl-C that is never lost.

Python drops an exception that is raised while a destructor runs, and with it one Ctrl-C in about
fifty during a start like ours. So it is also noted, and :func:`check` raises it again.
"""

import signal
from collections.abc import Iterator
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


def check() -> None:
    """Raise KeyboardInterrupt if Ctrl-C was pressed and lost."""
    if _pressed:
        raise KeyboardInterrupt


def _note(signum, frame):
    global _pressed
    _pressed = True
    raise KeyboardInterrupt
