"""Waiting on the host for the device, but never for ever."""

import time

import torch


def wait_event(event: "torch.cuda.Event", timeout_s: float, what: str) -> None:
    """Wait for a CUDA event.

    Spins at first, since a step's record takes microseconds, then sleeps between looks.

    Raises:
        RuntimeError: The event has not passed after ``timeout_s`` seconds; names ``what``.
    """
    start_s = time.perf_counter()
    while not event.query():
        waited_s = time.perf_counter() - start_s
        if waited_s > timeout_s:
            raise RuntimeError(f"{what} has not completed after {timeout_s:g} s")
        if waited_s > 500e-6:
            time.sleep(50e-6)
