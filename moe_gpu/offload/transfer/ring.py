"""A small ring of page-locked buffers, for experts whose home is not page-locked."""

import warnings
import weakref
from collections import deque

import torch
from torch import cuda

from ...waiting import wait_event
from .. import pinning
from ..pager import PIECE_BYTES

STAGING_BUFFERS = 3  # one is read into, one is copied from, one is on its way back


class StagingRing:
    """Page-locked buffers that bytes pass through, made when first needed.

    Where even these cannot be page-locked, they are ordinary memory: slower, and said once.

    Args:
        device: Where the bytes go.
        timeout_s: Bound of the wait for a buffer, in seconds.
    """

    def __init__(self, device: torch.device, timeout_s: float):
        self.device, self.timeout_s = device, timeout_s
        self._ring: deque[tuple[torch.Tensor, cuda.Event]] = deque()
        self._locked: list[torch.Tensor] = []
        self._unlock = weakref.finalize(self, _unlock_all, self._locked)

    def take(self) -> tuple[torch.Tensor, "cuda.Event"]:
        """Return the buffer that was used longest ago, free again, and the event to record."""
        if not self._ring:
            self._fill()
        buffer, event = self._ring[0]
        wait_event(event, self.timeout_s, "a staging buffer")
        self._ring.rotate(-1)
        return buffer, event

    def _fill(self) -> None:
        for _ in range(STAGING_BUFFERS):
            buffer = pinning.whole_pages(PIECE_BYTES)
            cause = pinning.page_lock(buffer, self.device)
            if cause is None:
                self._locked.append(buffer)
            elif not self._ring:
                warnings.warn(
                    f"the staging buffers ({STAGING_BUFFERS} x {PIECE_BYTES:,} bytes) could not be "
                    f"page-locked ({cause}): copies to the device do not overlap compute",
                    RuntimeWarning,
                    stacklevel=2,
                )
            self._ring.append((buffer, cuda.Event()))

    def close(self) -> None:
        """Give up the buffers; no copy may read them any more."""
        self._ring.clear()
        _unlock_all(self._locked)


def _unlock_all(locked: list[torch.Tensor]) -> None:
    while locked:
        pinning.page_unlock(locked.pop())
