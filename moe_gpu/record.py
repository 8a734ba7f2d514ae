"""The step record on the host: whom the last route call of a layer executed, and whom it misses.

The record is a mailbox, not a queue: each route call overwrites the row of its layer (layout in
:mod:`moe_gpu.kernels.layout`). Reading a row is the only host synchronisation that an offloader
needs per layer and step.

Shape suffixes: L layers, E experts, R int32 words of one row.
"""

from typing import NamedTuple

import numpy as np
import torch

from .kernels import layout
from .requests import Direction, PagingRequest, Priority
from .state import RouterState
from .waiting import page_locked, wait_event

FIELDS = layout.RECORD_FIELDS
_PRIORITY_OF_CODE = {
    layout.PRIORITY_URGENT: Priority.URGENT,
    layout.PRIORITY_BACKGROUND: Priority.BACKGROUND,
}


class StepRecord(NamedTuple):
    """One layer's record as NumPy arrays; a snapshot that later calls do not change."""

    generation: int  # of the route call, int32: wraps after 2**31 - 1
    num_requests: int  # experts whose priority is not PRIORITY_NONE
    executed_E: np.ndarray  # int32, tokens routed to each expert, residents included
    waiting_E: np.ndarray  # int32, tokens waiting for each missing expert
    priority_E: np.ndarray  # int32, PRIORITY_* of kernels/layout.py
    affinity_E: np.ndarray  # float32, after the call

    @classmethod
    def from_row(cls, row_R: np.ndarray) -> "StepRecord":
        """Name the parts of a record row, int32 ``(R,)``; the arrays are views of it."""
        first = layout.RECORD_HEADER
        E = (len(row_R) - first - layout.RECORD_TAIL) // FIELDS
        executed_E, waiting_E, priority_E, affinity_bits_E = (
            row_R[first + i * E : first + (i + 1) * E] for i in range(FIELDS)
        )
        return cls(
            int(row_R[0]),
            int(row_R[1]),
            executed_E,
            waiting_E,
            priority_E,
            affinity_bits_E.view(np.float32),
        )

    def requests(self, layer: int) -> list[PagingRequest]:
        """Return the paging requests, urgent and background, by ascending expert id.

        Args:
            layer: The layer that the record was read for.
        """
        return [
            PagingRequest(
                layer=layer,
                expert=expert,
                direction=Direction.IN,
                priority=_PRIORITY_OF_CODE[int(self.priority_E[expert])],
                tokens=int(self.waiting_E[expert]),
            )
            for expert in np.flatnonzero(self.priority_E).tolist()
        ]


class RecordReader:
    """Reads step records of one :class:`~moe_gpu.state.RouterState`, one synchronisation each.

    Attributes:
        superseded: Generations, counted from the first route call of the state, that the next
            call overwrote before this reader saw them.

    Args:
        state: The state whose records are read. It may move between devices.
        timeout_s: How long :meth:`read` waits for the device at most, in seconds.
    """

    def __init__(self, state: RouterState, timeout_s: float = 60.0):
        self.state = state
        self.timeout_s = timeout_s
        self.superseded = 0
        self._seen_L = [0] * state.num_layers
        self._bound: torch.Tensor | None = None  # the record tensor that the rows below belong to
        self._requested: int | None = None

    def request(self, layer: int) -> None:
        """Order the copy of a layer's record, so that work queued after it overlaps the wait.

        Optional before :meth:`read`, and void once the layer routes again: request anew then. Does
        nothing where the record is in host memory.

        Raises:
            RuntimeError: A CUDA graph is being captured.
        """
        if self.state.record_LR.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "an attached model cannot be captured in a CUDA graph: each layer reads its step "
                "record on the host"
            )
        self._bind()
        if self._arrived is not None:
            self._host_R.copy_(self._rows_L[layer], non_blocking=True)
            self._arrived.record(torch.cuda.current_stream(self._bound.device))
            self._requested = layer

    def read(self, layer: int) -> StepRecord:
        """Return the record of the last route call of ``layer``. Waits until that call is done.

        Raises:
            RuntimeError: The two generation words differ: another stream was routing with the
                same state. Or the device was not done in time.
        """
        self._bind()
        if self._arrived is None:
            row_R = self._rows_L[layer].copy()
        else:
            if self._requested != layer:
                self.request(layer)
            self._requested = None
            wait_event(self._arrived, self.timeout_s, f"layer {layer}: the device's work")
            row_R = self._host_R.numpy().copy()
        if row_R[0] != row_R[-1]:
            raise RuntimeError(
                f"the step record of layer {layer} is torn (generation {row_R[0]} at its start, "
                f"{row_R[-1]} at its end): route with one RouterState on one stream at a time"
            )
        record = StepRecord.from_row(row_R)
        newer = (record.generation - self._seen_L[layer]) % 2**32  # the device counts in int32
        self.superseded += max(0, newer - 1)
        self._seen_L[layer] = record.generation
        return record

    def __getstate__(self):
        # rows are views of the tensor they are bound to, which a copy of them would not be
        kept = ("state", "timeout_s", "superseded", "_seen_L")
        return {name: self.__dict__[name] for name in kept} | {"_bound": None, "_requested": None}

    def _bind(self) -> None:
        """Look at the record tensor; it is another one after the state moved."""
        record_LR = self.state.record_LR
        if record_LR is self._bound:
            return
        self._bound, self._requested = record_LR, None
        if record_LR.is_cuda:
            self._rows_L = list(record_LR.unbind(0))
            width = record_LR.shape[1]
            self._host_R = page_locked(width, torch.int32)
            self._arrived = torch.cuda.Event()
        else:
            self._rows_L = list(record_LR.numpy())
            self._host_R = self._arrived = None
