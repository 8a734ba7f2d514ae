"""The mechanism: slot memory on the device, and copies into it in the right order.

:class:`Transfer` moves real bytes on the CPU at once, :class:`SimulatedLink` at the pace of a
link, :class:`StreamTransfer` on a CUDA device's copy engine, :class:`NoTransfer` none at all.
"""

from collections.abc import Sequence

import torch

from ..store import ExpertStore
from .host import Transfer
from .link import SimulatedLink
from .streams import StreamTransfer
from .whole import NoTransfer

__all__ = ["NoTransfer", "SimulatedLink", "StreamTransfer", "Transfer", "make_transfer"]


def make_transfer(
    store: ExpertStore,
    slot_of_LE: torch.Tensor,
    groups: Sequence[int],
    *,
    timers: bool,
    timeout_s: float,
    link_gbps: float | None = None,
) -> Transfer:
    """Build the transfer for the device that ``slot_of_LE`` is on.

    Raises:
        ValueError: A simulated link on a device that has a real one.
    """
    options = {"timers": timers, "timeout_s": timeout_s}
    if link_gbps is not None:
        if slot_of_LE.is_cuda:
            raise ValueError(f"link_gbps={link_gbps} simulates a link, which is for the CPU only")
        return SimulatedLink(store, slot_of_LE, groups, link_gbps=link_gbps, **options)
    kind = StreamTransfer if slot_of_LE.is_cuda else Transfer
    return kind(store, slot_of_LE, groups, **options)
