"""Forked children that are never waited for longer than a bound."""

import os
import signal
import time
import traceback
from collections.abc import Callable


def exit_status_of_fork(work: Callable[[], None], timeout_s: float = 20.0) -> int:
    """Fork, run ``work`` in the child, and return its exit status: 0 if it returned."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)  # none of the parent's clean-up
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError(f"the child was still running after {timeout_s:g} s")
