"""Transfers: on the CPU at once; on streams in an order that no timing can break."""

import random
import time

import pytest
import torch

from moe_gpu import Priority, RouterState
from moe_gpu.offload import ExpertLayout, ExpertOffloader, ExpertStore, offloader, pinning
from moe_gpu.offload.pager import Copy
from moe_gpu.offload.tiers import Tier
from moe_gpu.offload.transfer import StreamTransfer, Transfer, make_transfer, ring, streams
from offloading import make_store, route
from streams import FakeCuda


def test_cpu_copies_are_done_at_once():
    store, weights = make_store(layers=2, experts=4)
    slot_of_LE = torch.full((2, 4), -1, dtype=torch.int32)
    cpu = Transfer(store, slot_of_LE, groups=[3, 3, 2])
    copy = Copy(layer=1, expert=3, place=5, priority=Priority.URGENT)  # slot 2 of the second group
    assert cpu.runs_inline(copy)
    cpu.begin(copy)
    cpu.piece(copy, 0, 256)
    cpu.piece(copy, 256, 512)
    cpu.finish(copy)
    assert torch.equal(cpu.views_G[1]["down_proj"][2], weights[1]["down_proj"][3])
    assert torch.equal(cpu.bytes_of(5), store.expert(1, 3)) and cpu.is_complete(5)
    assert [tuple(m.shape) for m in cpu.memory_G] == [(3, 512), (3, 512), (2, 512)]
    cpu.publish(1, [-1, -1, -1, 2])
    assert slot_of_LE.tolist() == [[-1] * 4, [-1, -1, -1, 2]]


def test_a_simulated_link_takes_bytes_over_bandwidth():
    store, weights = make_store(layers=1, experts=4)
    slot_of_LE = torch.full((1, 4), -1, dtype=torch.int32)
    link = make_transfer(store, slot_of_LE, [2], timers=False, timeout_s=1, link_gbps=512e-9 / 0.02)
    start_s = time.perf_counter()
    for place in (0, 1):
        copy = Copy(0, place, place, Priority.URGENT)
        assert not link.runs_inline(copy)
        link.begin(copy)
        link.piece(copy, 0, 512)
    assert time.perf_counter() - start_s >= 0.04
    assert torch.equal(link.views_G[0]["down_proj"], weights[0]["down_proj"][:2])


def test_slots_that_do_not_fit_say_so(monkeypatch):
    store, _ = make_store(layers=1, experts=4)

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(MemoryError, match="5 expert slots of 512 bytes need 2,560 bytes on cpu.*2"):
        Transfer(store, torch.zeros(1, 4, dtype=torch.int32), groups=[3, 2])


@pytest.fixture
def fake_cuda(monkeypatch):
    def install(seed):
        cuda = FakeCuda(seed)
        monkeypatch.setattr(streams, "cuda", cuda)
        monkeypatch.setattr(ring, "cuda", cuda)
        monkeypatch.setattr(streams, "_copy", lambda to, source: cuda.current.queue(
            lambda: to.copy_(source)))  # fmt: skip
        monkeypatch.setattr(
            streams, "_page_locked", lambda shape: torch.empty(shape, dtype=torch.int32)
        )
        monkeypatch.setattr(pinning, "page_lock", lambda *_: None)
        monkeypatch.setattr(pinning, "page_unlock", lambda *_: None)
        monkeypatch.setattr(
            offloader, "make_transfer", lambda *args, link_gbps, **kw: StreamTransfer(*args, **kw)
        )
        return cuda

    return install


MIXED = [[Tier.PINNED, Tier.PAGEABLE] * 3] * 2  # pageable ones pass the ring on the pager's thread


@pytest.mark.parametrize("options", [
    pytest.param({"staging_slots": 0}, id="waves"),
    pytest.param({"bypass": True, "eviction": "affinity"}, id="staging"),
    pytest.param({"pool": True}, id="pool"),
    pytest.param({"prefetch": ["affinity", "background"]}, id="prefetch"),
    pytest.param({"pool": True, "prefetch": ["affinity"]}, id="pool-prefetch"),
])  # fmt: skip
@pytest.mark.parametrize("tiers", [None, MIXED], ids=["pinned", "mixed"])
@pytest.mark.parametrize("slots", [1, 3, 6], ids=lambda s: f"{s}-slots")
@pytest.mark.parametrize("seed", range(3))
def test_compute_reads_the_right_bytes_whatever_the_timing(fake_cuda, seed, slots, tiers, options):
    """Random steps, prefills and warm-ups of two layers; compute and route calls read late."""
    cuda, dice = fake_cuda(seed), random.Random(seed)
    compute = cuda.current
    store, weights = make_store(layers=2, experts=6, tiers_LE=tiers or [[Tier.PINNED] * 6] * 2)
    state = RouterState(2, 6)
    moves = ExpertOffloader(state, store, slots * (2 if options.get("pool") else 1), **options)
    moves.fill()
    reads, weights_LS = [], [moves.weights_of(layer) for layer in range(2)]

    def read(layer, slot, expert):
        for name, weight in weights_LS[layer][slot].items():
            reads.append(torch.equal(weight, weights[layer][name][expert]))

    def published(layer):
        return list(moves._view.published_LE[layer])

    def look(layer, truth):
        reads.append(state.slot_of_LE[layer].tolist() == truth)

    for step in range(16):
        layer = step % 2
        chosen = [dice.sample(range(6), 2) for _ in range(dice.choice([1, 1, 4, 60]))]
        moves.before_route(layer)
        truth = published(layer)
        compute.queue(lambda la=layer, t=truth: look(la, t))  # as the gate does
        compute.queue(lambda la=layer, c=chosen: route(state, c, la))
        compute.synchronize()  # what reading the record from a device does
        is_prefill = len(chosen) > 4
        for expert, slot, _, _ in moves.step(layer, 2 * len(chosen), is_prefill=is_prefill):
            compute.queue(lambda la=layer, s=slot, e=expert: read(la, s, e))
        if dice.random() < 0.4:  # changes residency while all of that is still queued
            truth = published(layer)
            compute.queue(lambda la=layer, t=truth: look(la, t))
            free = slots - len(moves.flights.on_way)
            if free > 0:
                moves.warm(layer, dice.sample(range(6), dice.randint(1, free)))
    cuda.run_all()
    assert reads and all(reads)
    for layer in range(2):
        assert state.slot_of_LE[layer].tolist() == published(layer)
    moves.close()


@pytest.mark.parametrize("seed", range(8))
def test_warming_in_the_middle_of_a_step_waits_for_its_compute(fake_cuda, seed):
    cuda = fake_cuda(seed)
    store, weights = make_store(layers=1, experts=6, tiers_LE=[[Tier.PINNED] * 6])
    state, reads = RouterState(1, 6), []
    moves = ExpertOffloader(state, store, slots=2)
    moves.fill()
    route(state, [[0, 1]])
    down_S = moves.views_L[0]["down_proj"]
    for turns, (expert, slot, _, _) in enumerate(moves.step(0, 2)):
        cuda.current.queue(lambda s=slot, e=expert: reads.append(
            torch.equal(down_S[s], weights[0]["down_proj"][e])))  # fmt: skip
        if turns == 1:  # the first one's slot is free, but what reads it is still queued
            moves.warm(0, [5])
    cuda.run_all()
    assert reads == [True, True]
    moves.close()


def test_closing_waits_for_copies(fake_cuda):
    fake_cuda(seed=0)
    store, weights = make_store(layers=1, experts=6, tiers_LE=[[Tier.PINNED] * 6])
    moves = ExpertOffloader(RouterState(1, 6), store, slots=6)
    view = moves.views_L[0]["down_proj"]
    moves.fill()
    moves.close()
    assert torch.equal(view, weights[0]["down_proj"]) and moves.views_L == []


def test_stalls_are_measured_only_on_request(fake_cuda):
    cuda = fake_cuda(seed=1)
    for timers, expected_ms in ((False, None), (True, 1.0)):
        store, _ = make_store(layers=1, experts=6, tiers_LE=[[Tier.PINNED] * 6])
        state = RouterState(1, 6)
        moves = ExpertOffloader(state, store, slots=2, timers=timers)
        for _ in range(2):
            route(state, [[0, 1]])
            list(moves.step(0, 2))  # the second step waits for nothing
        cuda.run_all()
        assert moves.metrics().stall_ms == expected_ms
        moves.reset_metrics()
        assert moves.metrics().stall_ms == (0.0 if timers else None)
        moves.close()


@pytest.mark.gpu
@pytest.mark.parametrize("slots", [1, 3, 6])
def test_on_a_device(slots):
    """The same promise on real streams: large copies, compute that never waits on the host."""
    dice = random.Random(slots)
    state = RouterState(1, 6, device="cuda")
    weights = {"w": torch.randn(6, 1024, 1024)}
    layout = ExpertLayout.of(weights)
    store = ExpertStore(layout, 1, 6, "cuda")
    store.put(0, weights)
    moves = ExpertOffloader(state, store, slots, timers=True)
    moves.fill()
    sums, expected = [], []
    for _ in range(40):
        chosen = sorted(dice.sample(range(6), 2))
        state.record_LR[0, 2:8] = torch.tensor([int(e in chosen) for e in range(6)])
        state.record_LR[0, [0, -1]] += 1
        for expert, slot, _, _ in moves.step(0, 2):
            sums.append(moves.weights_of(0)[slot]["w"].double().sum())
            expected.append(weights["w"][expert].double().sum())
    torch.testing.assert_close(torch.stack(sums).cpu(), torch.stack(expected))
    assert moves.metrics().stall_ms >= 0
    moves.close()
