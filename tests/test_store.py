"""HostStore and ExpertLayout: where bytes lie, that they come back, and what is refused."""

import gc

import pytest
import torch

from moe_gpu.offload import ExpertLayout, HostStore, store
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
    monkeypatch.setattr(store, "page_lock", lambda *_: "quota of 8 MB")
    with pytest.warns(RuntimeWarning, match="layer 0.*could not be page-locked .quota") as caught:
        host, weights = make_store(layers=3, experts=4, device="cuda")
    assert len(caught) == 1 and host.pinned is False
    assert torch.equal(host.parameter(2, "down_proj"), weights[2]["down_proj"])


def test_page_locked_memory_is_unlocked_before_it_goes(monkeypatch):
    locked = {}
    monkeypatch.setattr(store, "page_lock", lambda address, size, _: locked.update({address: size}))
    monkeypatch.setattr(store, "_page_unlock", lambda address, memory: locked.pop(address))
    host, weights = make_store(layers=2, experts=4, device="cuda")
    assert host.pinned and sorted(locked.values()) == [4 * host.layout.expert_bytes] * 2
    host.drop(0)
    assert len(locked) == 1
    host.put(1, weights[1])
    assert len(locked) == 1, "replacing a layer unlocks the old memory"
    del host
    gc.collect()
    assert not locked


@pytest.mark.gpu
def test_pins_exactly_the_layer():
    host, _ = make_store(layers=1, experts=4, device="cuda")
    assert host.pinned and host.expert(0, 3).is_pinned()


@pytest.mark.gpu
def test_a_refused_pin_leaves_no_error_behind():
    memory = torch.empty(4096, dtype=torch.uint8)
    assert store.page_lock(memory.data_ptr(), 4096, torch.device("cuda")) is None
    cause = store.page_lock(memory.data_ptr(), 4096, torch.device("cuda"))  # already locked
    assert "cudaHostRegister" in cause
    assert torch.ones(3, device="cuda").sum().item() == 3
    torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())


def test_does_not_pin_for_the_cpu(monkeypatch):
    monkeypatch.setattr(store, "page_lock", lambda *_: pytest.fail("pinned for the CPU"))
    assert HostStore(make_store(1, 2)[0].layout, 1, 2).pinned is False
