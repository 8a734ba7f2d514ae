"""Waiting on the host for the device, but never for ever; and where what it sends arrives."""

import os
import time

import torch

SPIN_S = 5e-3  # then sleep: 50 us of sleep last 100

_let_others_run = getattr(os, "sched_yield", lambda: time.sleep(0))


def page_locked(shape: int | torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """Return page-locked host memory that can be written again and again.

    Also where it is made in inference mode, whose tensors could not be written outside it.
    """
    with torch.inference_mode(False):
        return torch.empty(shape, dtype=dtype, pin_memory=True)


def wait_event(event: "torch.cuda.Event", timeout_s: float, what: str) -> None:
    """Wait for a CUDA event.

    Spins at first, since a step's record takes microseconds and a copy little more, without
    keeping the interpreter from the thread that orders copies; then sleeps between looks.

    Raises:
        RuntimeError: The event has not passed after ``timeout_s`` seconds; names ``what``.
    """
    start_s = time.perf_counter()
    while not event.query():
        waited_s = time.perf_counter() - start_s
        if waited_s > timeout_s:
            raise RuntimeError(f"{what} has not completed after {timeout_s:g} s")
        if waited_s > SPIN_S:
            time.sleep(50e-6)
        else:
            _let_others_run()
