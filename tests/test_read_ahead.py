"""ReadAhead: hints only, off the caller's thread, and never in anybody's way."""

import threading
import time

import pytest
import torch

from moe_gpu import RouterState
from moe_gpu.offload import ExpertOffloader, Tier
from moe_gpu.offload.read_ahead import AHEAD, ReadAhead
from offloading import make_store, route, run_step


def until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(1e-3)


def test_announces_in_order_on_its_own_thread():
    seen = []
    ahead = ReadAhead(lambda *expert: seen.append((expert, threading.current_thread().name)))
    for expert in range(3):
        ahead.ask(1, expert)
    until(lambda: len(seen) == 3)
    assert seen == [((1, expert), "moe_gpu-ahead") for expert in range(3)]
    ahead.close()
    assert not ahead._thread.is_alive()
    ReadAhead(print).close()  # nothing was ever asked


def test_a_slow_disk_makes_nobody_wait():
    let = threading.Event()
    seen = []
    ahead = ReadAhead(lambda layer, expert: (let.wait(10), seen.append(expert)))
    start_s = time.monotonic()
    for expert in range(3 * AHEAD):
        ahead.ask(0, expert)
    assert time.monotonic() - start_s < 5
    let.set()
    until(lambda: len(seen) >= AHEAD)
    ahead.close()
    assert seen == sorted(seen) and len(seen) <= AHEAD + 1, "what found no room is not announced"


def test_a_failed_hint_is_forgotten():
    seen = []

    def read_ahead(layer, expert):
        seen.append(expert)
        raise OSError("no such device")

    ahead = ReadAhead(read_ahead)
    ahead.ask(0, 1)
    ahead.ask(0, 2)
    until(lambda: seen == [1, 2])
    assert ahead._thread.is_alive()
    ahead.close()


class Files:
    """Experts on disk that are a tensor in truth; reads wait until they are let through."""

    def __init__(self, memory_LEB):
        self.memory_LEB, self.announced, self.let = memory_LEB, [], threading.Event()

    def read_into(self, layer, expert, start, stop, out):
        assert self.let.wait(10)
        out.copy_(self.memory_LEB[layer, expert, start:stop])

    def read_ahead(self, layer, expert):
        self.announced.append(expert)

    def close(self):
        pass


@pytest.mark.parametrize("tier, announced", [(Tier.DISK, [5, 6, 7]), (Tier.PAGEABLE, [])])
def test_what_waits_behind_another_read_is_announced(tier, announced):
    host, weights = make_store(layers=1, experts=8)
    files = Files(torch.stack([host.expert(0, expert) for expert in range(8)])[None])
    store, _ = make_store(layers=1, experts=8, tiers_LE=[[tier] * 8], files=files)
    if tier is Tier.PAGEABLE:
        store.put(0, weights[0])
    offloader = ExpertOffloader(RouterState(1, 8), store, 5)
    route(offloader.state, [[5, 6], [7, 0]])
    threading.Timer(0.1, files.let.set).start()  # until then all four are ordered
    assert sorted(run_step(offloader, weights, 4)) == [0, 5, 6, 7]
    until(lambda: len(files.announced) >= len(announced))
    assert files.announced == announced, "0 is read at once, the others wait for it"
    offloader.close()
