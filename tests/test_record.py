"""StepRecord and RecordReader: rows typed by hand, then what a real route call leaves."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from moe_gpu import Direction, PagingRequest, Priority, RouterState
from moe_gpu.kernels import layout
from moe_gpu.kernels.route_ref import Rule
from moe_gpu.record import RecordReader, StepRecord
from moe_gpu.waiting import page_locked, wait_event
from offloading import route

HALF_BITS = 0x3F000000  # 0.5 in float32


def test_parts_of_a_row():
    affinity = [HALF_BITS, 0, HALF_BITS]
    row_R = np.array([7, 2, 0, 0, 3, 0, 1, 1, 0, 2, 1, 0, 2, *affinity, 0, 0, 0, 7], dtype=np.int32)
    assert len(row_R) == layout.record_width(3)
    record = StepRecord.from_row(row_R)
    assert (record.generation, record.num_requests) == (7, 2)
    assert record.executed_E.tolist() == [3, 0, 1]
    assert record.waiting_E.tolist() == [1, 0, 2]
    assert record.priority_E.tolist() == [1, 0, 2]
    assert record.affinity_E.tolist() == [0.5, 0.0, 0.5]
    assert record.requests(layer=4) == [
        PagingRequest(4, 0, Direction.IN, Priority.URGENT, 1),
        PagingRequest(4, 2, Direction.IN, Priority.BACKGROUND, 2),
    ]


def make_state(residents=(), layers=2, experts=4):
    state = RouterState(layers, experts)
    for slot, expert in enumerate(residents):
        state.slot_of_LE[:, expert] = slot
    return state


def test_reads_what_the_call_wrote():
    state = make_state(residents=[0, 3])
    reader = RecordReader(state)
    route(state, [[3, 1], [1, 0]], layer=1)
    record = reader.read(1)
    assert record.generation == 1
    assert record.executed_E.tolist() == [1, 2, 0, 1]
    assert record.requests(1) == [PagingRequest(1, 1, Direction.IN, Priority.URGENT, 2)]
    assert torch.equal(torch.from_numpy(record.affinity_E.copy()), state.affinity_LE[1])
    assert reader.read(0).generation == 0, "the other layer was not routed"


def test_swapped_away_experts_are_background_requests():
    state = make_state(residents=[0, 3])
    state.strength_L.fill_(1.0)  # a budget that never binds
    route(state, [[0, 1]], rule=Rule.MASS, second=[3])
    requests = RecordReader(state).read(0).requests(0)
    assert requests == [PagingRequest(0, 1, Direction.IN, Priority.BACKGROUND, 1)]


def test_a_record_is_a_snapshot():
    state = make_state()
    reader = RecordReader(state)
    route(state, [[0, 1]])
    first = reader.read(0)
    route(state, [[2, 3]])
    reader.read(0)
    assert first.executed_E.tolist() == [1, 1, 0, 0]


def test_unread_generations_are_counted_once():
    state = make_state()
    reader = RecordReader(state)
    route(state, [[0, 1]])
    reader.read(0)
    assert reader.superseded == 0
    for _ in range(3):
        route(state, [[0, 1]])
    reader.read(0)
    reader.read(0)
    assert reader.superseded == 2
    route(state, [[0, 1]], layer=1)
    reader.read(1)
    assert reader.superseded == 2, "layers count apart"


def test_generations_wrap():
    state = make_state()
    reader = RecordReader(state)
    row = state.record_LR[0]
    for generation, superseded in ((2**31 - 1, 2**31 - 2), (-(2**31) + 1, 2**31 - 1)):
        row[0] = row[-1] = generation
        assert reader.read(0).generation == generation
        assert reader.superseded == superseded


def test_a_torn_record_is_refused():
    state = make_state()
    route(state, [[0, 1]])
    state.record_LR[0, -1] = 5
    with pytest.raises(RuntimeError, match="record of layer 0 is torn .generation 1 .* 5 at its"):
        RecordReader(state).read(0)


def test_follows_a_state_that_moved():
    state = make_state()
    reader = RecordReader(state)
    reader.read(0)
    state.record_LR = state.record_LR.clone()  # what .to(device) does
    route(state, [[2, 3]])
    assert reader.read(0).executed_E.tolist() == [0, 0, 1, 1]


def test_what_arrives_from_a_device_is_writable_outside_inference_mode(monkeypatch):
    made = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, pin_memory, **kw: made(*args, **kw))
    with torch.inference_mode():
        landing = page_locked(4, torch.int32)
    landing[:2].copy_(torch.ones(2, dtype=torch.int32))  # an inference tensor would refuse
    assert landing[:2].tolist() == [1, 1]


def test_waiting_is_bounded():
    class Event:
        looks = 0

        def query(self):
            self.looks += 1
            return self.looks == 100

    wait_event(Event(), 60, "a copy")
    never = Event()
    never.looks = 100
    with pytest.raises(RuntimeError, match="a copy has not completed after 0.02 s"):
        wait_event(never, 0.02, "a copy")


@pytest.mark.gpu
def test_reads_from_the_device():
    state = RouterState(2, 4, device="cuda")
    reader = RecordReader(state)
    state.record_LR[1, 2] = 9
    reader.request(0)
    assert reader.read(1).executed_E.tolist() == [9, 0, 0, 0]
    assert reader.read(0).executed_E.tolist() == [0, 0, 0, 0]


def test_a_capture_is_refused_with_its_reason(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    RecordReader(make_state()).request(0)  # in host memory: nothing to copy
    on_device = SimpleNamespace(num_layers=2, record_LR=SimpleNamespace(is_cuda=True))
    with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph: each layer reads"):
        RecordReader(on_device).request(0)
