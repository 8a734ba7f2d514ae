"""Transfers: on the CPU at once; on streams in an order that no timing can break."""

import random

import pytest
import torch

from moe_gpu import RouterState
from moe_gpu.offload import ExpertOffloader, offloader, transfer
from moe_gpu.offload.transfer import StreamTransfer, Transfer
from offloading import make_store, route
from streams import FakeCuda


def test_cpu_copies_are_done_at_once():
    store, weights = make_store(layers=2, experts=4)
    slot_of_LE = torch.full((2, 4), -1, dtype=torch.int32)
    cpu = Transfer(store.layout, slot_of_LE, num_slots=3, timers=False)
    cpu.page_in(1, 2, store.expert(1, 3))
    assert torch.equal(cpu.views_L[1]["down_proj"][2], weights[1]["down_proj"][3])
    assert cpu.memory_L[1].shape == (3, store.layout.expert_bytes)
    cpu.publish(1, [-1, -1, -1, 2])
    assert slot_of_LE.tolist() == [[-1] * 4, [-1, -1, -1, 2]]


def test_cpu_stalls_are_the_copies_that_a_step_waits_for():
    store, _ = make_store(layers=1, experts=4)
    cpu = Transfer(store.layout, torch.zeros(1, 4, dtype=torch.int32), 2, timers=False)
    cpu.page_in(0, 0, store.expert(0, 0), urgent=False)
    assert cpu.stall_ms() == 0
    cpu.page_in(0, 0, store.expert(0, 0))
    assert cpu.stall_ms() > 0
    cpu.reset_metrics()
    assert cpu.stall_ms() == 0


@pytest.fixture
def fake_cuda(monkeypatch):
    def install(seed):
        cuda = FakeCuda(seed)
        monkeypatch.setattr(transfer, "cuda", cuda)
        monkeypatch.setattr(transfer, "_copy", lambda to, source: cuda.current.queue(
            lambda: to.copy_(source)))  # fmt: skip
        monkeypatch.setattr(
            transfer, "_page_locked", lambda shape: torch.empty(shape, dtype=torch.int32)
        )
        monkeypatch.setattr(offloader, "make_transfer", StreamTransfer)
        return cuda

    return install


@pytest.mark.parametrize("slots", [1, 2, 3, 6], ids=lambda s: f"{s}-slots")
@pytest.mark.parametrize("seed", range(12))
def test_compute_reads_the_right_bytes_whatever_the_timing(fake_cuda, seed, slots):
    """Random steps and warm-ups of two layers; compute and route calls read late."""
    cuda, dice = fake_cuda(seed), random.Random(seed)
    compute = cuda.current
    store, weights = make_store(layers=2, experts=6)
    state = RouterState(2, 6)
    moves = ExpertOffloader(state, store, slots)
    moves.fill()
    reads = []

    def read(layer, slot, expert):
        for name, view in moves.views_L[layer].items():
            reads.append(torch.equal(view[slot], weights[layer][name][expert]))

    def look(layer, truth):
        reads.append(state.slot_of_LE[layer].tolist() == truth)

    for step in range(16):
        layer = step % 2
        chosen = [dice.sample(range(6), 2) for _ in range(dice.choice([1, 1, 4]))]
        truth = list(moves.tables[layer].slot_of_E)
        compute.queue(lambda la=layer, t=truth: look(la, t))  # as the gate does
        compute.queue(lambda la=layer, c=chosen: route(state, c, la))
        compute.synchronize()  # what reading the record from a device does
        for expert, slot, _, _ in moves.step(layer, 2 * len(chosen)):
            compute.queue(lambda la=layer, s=slot, e=expert: read(la, s, e))
        if dice.random() < 0.4:  # changes residency while all of that is still queued
            truth = list(moves.tables[layer].slot_of_E)
            compute.queue(lambda la=layer, t=truth: look(la, t))
            moves.warm(layer, dice.sample(range(6), dice.randint(1, slots)))
    cuda.run_all()
    assert reads and all(reads)
    for layer in range(2):
        assert state.slot_of_LE[layer].tolist() == moves.tables[layer].slot_of_E


def test_closing_waits_for_copies(fake_cuda):
    fake_cuda(seed=0)
    store, weights = make_store(layers=1, experts=6)
    moves = ExpertOffloader(RouterState(1, 6), store, slots=6)
    view = moves.views_L[0]["down_proj"]
    moves.fill()
    moves.close()
    assert torch.equal(view, weights[0]["down_proj"]) and moves.views_L == []


def test_stalls_are_measured_only_on_request(fake_cuda):
    cuda = fake_cuda(seed=1)
    for timers, expected_ms in ((False, None), (True, 1.0)):
        store, _ = make_store(layers=1, experts=6)
        state = RouterState(1, 6)
        moves = ExpertOffloader(state, store, slots=2, timers=timers)
        for _ in range(2):
            route(state, [[0, 1]])
            list(moves.step(0, 2))  # the second step waits for nothing
        cuda.run_all()
        assert moves.metrics().stall_ms == expected_ms
        moves.reset_metrics()
        assert moves.metrics().stall_ms == (0.0 if timers else None)


@pytest.mark.gpu
@pytest.mark.parametrize("slots", [1, 3, 6])
def test_on_a_device(slots):
    """The same promise on real streams: large copies, compute that never waits on the host."""
    dice = random.Random(slots)
    state = RouterState(1, 6, device="cuda")
    weights = {"w": torch.randn(6, 1024, 1024)}
    layout = transfer.ExpertLayout.of(weights)
    store = offloader.HostStore(layout, 1, 6, "cuda")
    store.put(0, weights)
    moves = ExpertOffloader(state, store, slots, timers=True)
    moves.fill()
    sums, expected = [], []
    for _ in range(40):
        chosen = sorted(dice.sample(range(6), 2))
        state.record_LR[0, 2:8] = torch.tensor([int(e in chosen) for e in range(6)])
        state.record_LR[0, [0, -1]] += 1
        for expert, slot, _, _ in moves.step(0, 2):
            sums.append(moves.views_L[0]["w"][slot].double().sum())
            expected.append(weights["w"][expert].double().sum())
    torch.testing.assert_close(torch.stack(sums).cpu(), torch.stack(expected))
    assert moves.metrics().stall_ms >= 0
    moves.close()
