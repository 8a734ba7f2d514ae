"""ExpertStore and ExpertLayout: where bytes lie, that they come back, and what is refused."""

import gc
import mmap

import pytest
import torch

from moe_gpu.offload import ExpertLayout, ExpertStore, Tier, pinning
from moe_gpu.offload.layout import checksum
from offloading import SHAPES, make_store


def test_layout_by_hand():
    layout = ExpertLayout.of(
        {
            "a": torch.empty(3, 5, 7, dtype=torch.float32),  # 140 bytes: padded to 256
            "b": torch.empty(3, 128, dtype=torch.bfloat16),  # 256 bytes: exactly
            "c": torch.empty(3, dtype=torch.uint8),  # a scalar per expert
        }
    )
    assert [field.offset for field in layout.fields.values()] == [0, 256, 512]
    assert layout.expert_bytes == 768
    assert layout.fields["a"].shape == (5, 7) and layout.fields["c"].shape == ()


def test_views_share_the_memory():
    layout = ExpertLayout.of({"a": torch.empty(2, 3, 4), "b": torch.empty(2, 5).double()})
    memory = torch.zeros(2, layout.expert_bytes, dtype=torch.uint8)
    views = layout.views(memory)
    views["b"][1].fill_(2.5)
    assert views["b"].shape == (2, 5) and views["b"].dtype == torch.float64
    assert layout.view(memory, "b")[1].tolist() == [2.5] * 5
    assert not views["a"].any() and not views["b"][0].any()
    assert memory[1].view(torch.float64)[256 // 8 : 256 // 8 + 5].tolist() == [2.5] * 5


def test_gives_back_every_bit():
    host, weights = make_store(layers=2, experts=4)
    for layer, parameters in enumerate(weights):
        for name, shape in SHAPES.items():
            stored = host.parameter(layer, name)
            assert stored.shape == (4, *shape) and torch.equal(stored, parameters[name])
    first = host.layout.views(host.expert(1, 2).unsqueeze(0))
    assert torch.equal(first["down_proj"][0], weights[1]["down_proj"][2])


def test_accepts_any_strides():
    host, weights = make_store(layers=1, experts=4)
    host.put(0, {name: w.transpose(1, 2).contiguous().mT for name, w in weights[0].items()})
    assert torch.equal(host.parameter(0, "gate_up_proj"), weights[0]["gate_up_proj"])


@pytest.mark.parametrize(
    "change, message",
    [
        pytest.param(lambda w: w.pop("down_proj"), "must be .'down_proj', 'gate_up", id="missing"),
        pytest.param(
            lambda w: w.update(down_proj=torch.empty(4, 5, 4)),
            r"down_proj must be torch.float32 of shape \(4, 5, 3\), got .* \(4, 5, 4\)",
            id="shape",
        ),
        pytest.param(
            lambda w: w.update(down_proj=w["down_proj"].half()), "got torch.float16", id="dtype"
        ),
    ],
)
def test_refuses_other_weights_and_keeps_its_own(change, message):
    host, weights = make_store(layers=1, experts=4)
    other = dict(weights[0])
    change(other)
    with pytest.raises(ValueError, match=message):
        host.put(0, other)
    assert torch.equal(host.parameter(0, "down_proj"), weights[0]["down_proj"])


def test_refuses_a_layer_it_does_not_have():
    host, weights = make_store(layers=1, experts=4)
    with pytest.raises(ValueError, match=r"layer must lie in \[0, 0\], got 1"):
        host.put(1, weights[0])
    host.drop(0)
    with pytest.raises(RuntimeError, match="layer 0 is not in the store"):
        host.parameter(0, "down_proj")


def test_refused_pinning_warns_once_and_shows(monkeypatch):
    monkeypatch.setattr(pinning, "page_lock", lambda *_: "quota of 8 MB")
    with pytest.warns(RuntimeWarning, match="layer 0.*could not be page-locked .quota") as caught:
        host, weights = make_store(layers=3, experts=4, device="cuda")
    assert len(caught) == 1 and host.pinned is False
    assert host.pin_refused_bytes == 3 * 4 * 512
    assert host.home_bytes() == {"pinned": 0, "pageable": 3 * 4 * 512, "disk": 0}
    assert torch.equal(host.parameter(2, "down_proj"), weights[2]["down_proj"])


def test_page_locked_memory_is_unlocked_before_it_goes(monkeypatch):
    locked = {}
    monkeypatch.setattr(
        pinning, "page_lock", lambda memory, _: locked.update({memory.data_ptr(): memory.nbytes})
    )
    monkeypatch.setattr(pinning, "page_unlock", lambda memory: locked.pop(memory.data_ptr()))
    host, weights = make_store(layers=2, experts=4, device="cuda")
    assert host.pinned and sorted(locked.values()) == [4 * host.layout.expert_bytes] * 2
    host.drop(0)
    assert len(locked) == 1
    host.put(1, weights[1])
    assert len(locked) == 1, "replacing a layer unlocks the old memory"
    del host
    gc.collect()
    assert not locked


@pytest.mark.parametrize("num_bytes", [1, mmap.PAGESIZE, 3 * mmap.PAGESIZE + 1])
def test_memory_to_lock_shares_no_page(num_bytes):
    memories = [pinning.whole_pages(num_bytes) for _ in range(3)]
    for memory in memories:
        first, start = memory.data_ptr(), memory.untyped_storage().data_ptr()
        assert memory.nbytes == num_bytes and first % mmap.PAGESIZE == 0
        pages = -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        assert start <= first and first + pages <= start + memory.untyped_storage().nbytes()


@pytest.mark.gpu
def test_pins_exactly_the_layer():
    host, _ = make_store(layers=1, experts=4, device="cuda")
    assert host.pinned and host.expert(0, 3).is_pinned()


@pytest.mark.gpu
def test_a_refused_pin_leaves_no_error_behind():
    memory = torch.empty(4096, dtype=torch.uint8)
    assert pinning.page_lock(memory, torch.device("cuda")) is None
    cause = pinning.page_lock(memory, torch.device("cuda"))  # already locked
    assert "cudaHostRegister" in cause
    assert torch.ones(3, device="cuda").sum().item() == 3
    pinning.page_unlock(memory)


def test_does_not_pin_for_the_cpu(monkeypatch):
    monkeypatch.setattr(pinning, "page_lock", lambda *_: pytest.fail("pinned for the CPU"))
    assert ExpertStore(make_store(1, 2)[0].layout, 1, 2).pinned is False


class Files:
    """Experts on disk that are a tensor in truth."""

    def __init__(self, memory_LEB):
        self.memory_LEB, self.dropped = memory_LEB, []

    def read_into(self, layer, expert, start, stop, out):
        out.copy_(self.memory_LEB[layer, expert, start:stop])

    def drop_cache(self, layer, expert):
        self.dropped.append((layer, expert))


def make_mixed():
    """One layer of four experts, two of them in host memory, and the same all in host memory."""
    host, _ = make_store(layers=1, experts=4)
    files = Files(torch.stack([host.expert(0, expert) for expert in range(4)])[None])
    tiers_LE = [[Tier.PAGEABLE, Tier.DISK, Tier.DISK, Tier.PAGEABLE]]
    mixed = ExpertStore(host.layout, 1, 4, tiers_LE=tiers_LE, files=files)
    return mixed, host


def test_reads_host_experts_once_and_leaves_the_others_on_disk():
    mixed, host = make_mixed()
    seen = []
    mixed.read(0, seen.append)
    assert mixed.files.dropped == [(0, 0), (0, 3)] and seen == [512, 512]
    mixed.files.memory_LEB[0, 3].zero_()  # what host memory holds is not read again
    assert torch.equal(mixed.expert(0, 3), host.expert(0, 3))
    with pytest.raises(RuntimeError, match="expert 1 of layer 0 is not in host memory"):
        mixed.expert(0, 1)
    for expert in range(4):
        piece = torch.empty(256, dtype=torch.uint8)
        mixed.read_into(0, expert, 256, 512, piece)
        assert torch.equal(piece, host.expert(0, expert)[256:])
    assert mixed.home_bytes() == {"pinned": 0, "pageable": 1024, "disk": 1024}


def test_a_parameter_is_put_together_from_all_tiers():
    mixed, host = make_mixed()
    mixed.read(0)
    for name in SHAPES:
        assert torch.equal(mixed.parameter(0, name), host.parameter(0, name))
    out = torch.empty(4, *SHAPES["down_proj"])
    assert mixed.parameter(0, "down_proj", out=out) is out


def test_checksums_are_those_of_what_was_stored():
    mixed, host = make_mixed()
    mixed.read(0)
    sums = [host.checksum(0, expert) for expert in range(4)]
    assert [mixed.checksum(0, expert) for expert in range(4)] == sums and len(set(sums)) == 4
    mixed.files.memory_LEB[0, 1, 7] += 1
    assert mixed.checksum(0, 1) == sums[1], "remembered"


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda b: b.__setitem__(300, b[300] + 1), id="a byte"),
        pytest.param(lambda b: b.copy_(b.roll(4)), id="shifted by a word"),
        pytest.param(lambda b: b.copy_(b.view(2, -1).flip(0).flatten()), id="halves exchanged"),
        pytest.param(lambda b: b[256:].zero_(), id="the second half missing"),
    ],
)
def test_a_checksum_notices(damage):
    bytes_B = torch.randint(0, 255, (512,), dtype=torch.uint8)
    before = checksum(bytes_B)
    assert torch.equal(checksum(bytes_B.clone()), before)
    damage(bytes_B)
    assert not torch.equal(checksum(bytes_B), before)


def test_a_checksum_is_the_same_in_chunks_of_a_long_expert():
    words = torch.zeros((1 << 20) + 64, dtype=torch.int32)
    words[[3, 1 << 20]] = torch.tensor([5, 7], dtype=torch.int32)
    assert checksum(words.view(torch.uint8)).item() == (5 * 7) * 1_000_003 + 7 * 1
