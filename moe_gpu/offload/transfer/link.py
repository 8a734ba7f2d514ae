"""A link of a stated bandwidth, on a machine that has none."""

import time

from ..pager import Copy
from .host import Transfer


class SimulatedLink(Transfer):
    """Slots on the CPU behind a link: a copy of n bytes takes n / bandwidth, one after another.

    For measuring how well copies are ordered and hidden, on a machine without a GPU: real bytes
    move through the same offloader, and the pager's thread sleeps until the link would be done.

    Args:
        link_gbps: Bandwidth in 10^9 bytes per second.
    """

    def __init__(self, *args, link_gbps: float, **kwargs):
        super().__init__(*args, **kwargs)
        self._seconds_per_byte = 1e-9 / link_gbps
        self._free_at_s = 0.0

    def runs_inline(self, copy: Copy) -> bool:
        """Never: the link takes its time."""
        return False

    def piece(self, copy: Copy, start: int, stop: int) -> None:
        """Move bytes and sleep until the link has carried them."""
        # a link takes the next copy that waits at once, however late this thread wakes up
        start_s = max(copy.made_s, self._free_at_s)
        super().piece(copy, start, stop)
        self._free_at_s = start_s + (stop - start) * self._seconds_per_byte
        time.sleep(max(0.0, self._free_at_s - time.perf_counter()))
