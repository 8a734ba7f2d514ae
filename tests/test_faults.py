"""Every fault that the offloader promises to survive, injected: it says what failed, and the next
forward computes the right bits."""

import errno
import gc
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import weakref
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import moe_gpu
from checkpoints import FILE, save
from children import exit_status_of_fork
from mixtral import (  # noqa: F401 - the last is a fixture that runs by itself
    EXPERT_BYTES,
    EXPERTS,
    LAYERS,
    VOCAB,
    logits_of,
    make_model,
    prompt,
    text_of,
    without_interpreter,
)
from moe_gpu import Exact
from moe_gpu.huggingface.attached import AttachedMoE  # noqa: F401 - the modules below exist
from moe_gpu.offload import pinning
from moe_gpu.offload.shards import CheckpointError
from moe_gpu.offload.tiers import Tier
from offloading import assert_consistent, make_offloader, route

pytestmark = pytest.mark.usefixtures("one_thread")
LOAD, ATTACHED = (inspect.getmodule(function) for function in (moe_gpu.load, moe_gpu.AttachedMoE))
FAILED = r"layer (\d): loading expert (\d) into slot \d of \d failed: "
SLOW = EXPERT_BYTES * 1e-9 / 0.02  # gbps: 20 ms an expert


@pytest.fixture(autouse=True)
def no_long_wait_for_a_lock(monkeypatch):
    monkeypatch.setattr(ATTACHED, "FORWARD_S", 20.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Shared: nobody writes into it."""
    return save(make_model(), tmp_path_factory.mktemp("mixtral"))


class Reference:
    """The same model with every expert resident: nothing moves, so nothing can fail."""

    def __init__(self, folder):
        self.model, self.moe = moe_gpu.load(folder, slots=EXPERTS, policy=Exact())
        self.stock = make_model()

    def logits(self, ids):
        return logits_of(self.model, ids)

    def needs(self, ids):
        """Experts that each layer computes for a text."""
        self.logits(ids)
        return [set(np.flatnonzero(r.executed_E)) for r in self.moe.offloader._record_L]


@pytest.fixture(scope="module")
def reference(folder):
    made = Reference(folder)
    yield made
    made.moe.close()


def load(folder, **options):
    """From disk, through the pager's thread, unless told otherwise."""
    defaults = {"slots": 3, "pool": False, "host_memory": 0, "policy": Exact(), "timeout_s": 20}
    return moe_gpu.load(folder, **defaults | options)


@pytest.fixture
def loaded(folder):
    """A model from disk; what a test did to it ends with the test."""
    model, moe = load(folder)
    yield model, moe
    if moe._attached:
        moe.close()


def assert_next_forward_is_right(model, moe, reference, seeds=(0, 5, 6)):
    for seed in seeds:
        ids = prompt(seed)
        assert torch.equal(logits_of(model, ids), reference.logits(ids))
    assert_consistent(moe.offloader)


def causes(error):
    while error is not None:
        yield error
        error = error.__cause__


@contextmanager
def bounded(seconds):
    start_s = time.monotonic()
    yield
    assert time.monotonic() - start_s < seconds


def on_threads(*jobs, timeout_s=60):
    """Run each job on a thread of its own; return results or exceptions, in order."""
    results = [None] * len(jobs)

    def run(i, job):
        try:
            results[i] = job()
        except BaseException as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=item, daemon=True) for item in enumerate(jobs)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + timeout_s
    for thread in threads:
        thread.join(max(0, deadline - time.monotonic()))
        assert not thread.is_alive(), "a thread hangs"
    return results


# -- files


@pytest.mark.parametrize("options", [
    pytest.param({}, id="staging"),
    pytest.param({"staging_slots": 0, "slots": 1}, id="waves"),
    pytest.param({"pool": True, "prefetch": ["next_gate", "affinity"]}, id="pool-prefetch"),
    pytest.param({"link_gbps": 1.0}, id="link"),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*experts (of|that) one token")
def test_read_error(folder, reference, monkeypatch, options):
    model, moe = load(folder, **options)
    with moe:
        good, left = os.preadv, [2]

        def fails_after_two(*args):
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return good(*args)

        monkeypatch.setattr(os, "preadv", fails_after_two)
        for _ in range(3):
            with pytest.raises(RuntimeError, match=FAILED + ".*Input/output error") as raised:
                logits_of(model, prompt(0))
            assert any(isinstance(cause, CheckpointError) for cause in causes(raised.value))
            assert folder.name in str(raised.value), "which file"
        monkeypatch.undo()
        assert_next_forward_is_right(model, moe, reference)


@contextmanager
def changed_on_disk(path, change):
    """Let ``change`` write to a file, then restore it so that it cannot be told."""
    before, stat = path.read_bytes(), path.stat()
    change()
    yield
    with open(path, "r+b") as file:  # in place: the same inode
        file.write(before)
        file.truncate()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def replace_by_other_shapes(path):
    tensors = {name: t.repeat(2, *[1] * (t.dim() - 1)) for name, t in load_file(path).items()}
    save_file(tensors, path.with_suffix(".new"), {"format": "pt"})
    with open(path, "r+b") as file:
        file.write(path.with_suffix(".new").read_bytes())


def touch_a_byte(path):
    time.sleep(0.02)  # past the granularity of the clock of the file system
    with open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        byte = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))


CHANGES = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path: os.truncate(path, 0),
    "other shapes": replace_by_other_shapes,
    "a byte": touch_a_byte,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_after_it_was_opened(folder, tmp_path, reference, change):
    path = Path(shutil.copytree(folder, tmp_path / "copy")) / FILE
    model, moe = load(path.parent)
    with moe:
        with changed_on_disk(path, lambda: CHANGES[change](path)):
            with pytest.raises(RuntimeError, match=FAILED + ".* changed on disk since .*load the"):
                logits_of(model, prompt(0))
        assert_next_forward_is_right(model, moe, reference)


def test_a_file_replaced_by_one_with_other_shapes_under_its_name(folder, tmp_path, reference):
    path = Path(shutil.copytree(folder, tmp_path / "copy")) / FILE
    model, moe = load(path.parent)
    with moe:
        tensors = load_file(path)
        wrong = next(name for name in tensors if ".experts.3." in name)
        save_file(tensors | {wrong: tensors[wrong][:-1].clone()}, path.with_suffix(".new"))
        os.replace(path.with_suffix(".new"), path)
        assert_next_forward_is_right(model, moe, reference)  # reads on from what it opened
    with pytest.raises(CheckpointError, match=re.escape(wrong)):
        load(path.parent)


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/etc/passwd", "a/b.safetensors"])
def test_an_index_that_names_a_file_elsewhere(folder, tmp_path, name):
    inside = Path(shutil.copytree(folder, tmp_path / "copy"))
    shutil.copy(inside / FILE, tmp_path / "elsewhere.safetensors")
    tensors = load_file(inside / FILE)
    (inside / FILE).unlink()
    index = {"metadata": {}, "weight_map": {tensor: name for tensor in tensors}}
    (inside / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="must be a .safetensors file of this folder"):
        load(inside)


def test_a_read_error_while_detaching(loaded, reference, monkeypatch):
    model, moe = loaded
    good, left = os.preadv, [3 * EXPERTS]

    def fails_later(*args):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return good(*args)

    monkeypatch.setattr(os, "preadv", fails_later)
    with pytest.raises(CheckpointError, match="Input/output error"):
        moe.detach()
    with pytest.raises(RuntimeError):  # weights are missing: refused, not computed
        logits_of(model, prompt(0))
    monkeypatch.undo()
    moe.detach()
    assert torch.equal(logits_of(model, prompt(0)), logits_of(reference.stock, prompt(0)))


# -- memory


def test_page_locking_refused(folder, reference, monkeypatch):
    tiers = [[Tier.PINNED] * EXPERTS for _ in range(LAYERS)]
    monkeypatch.setattr(LOAD, "place", lambda *_, **__: tiers)
    monkeypatch.setattr(pinning, "page_lock", lambda *_: "cudaHostRegister: over the quota")
    monkeypatch.setattr(pinning, "page_unlock", lambda *_: pytest.fail("was never locked"))
    with pytest.warns(RuntimeWarning) as warned:
        model, moe = load(folder)
    with moe:
        [said] = [str(w.message) for w in warned]
        assert "could not be page-locked (cudaHostRegister: over the quota)" in said
        assert "pinned_memory=" in said and "out of memory" not in said.lower()
        assert moe.metrics().pin_refused_bytes == LAYERS * EXPERTS * EXPERT_BYTES
        assert moe.metrics().home_bytes["pageable"] == LAYERS * EXPERTS * EXPERT_BYTES
        assert_next_forward_is_right(model, moe, reference)


@contextmanager
def no_room_for_slots(number):
    """The device is out of memory at the allocation of that number for slots."""
    empty, left = torch.empty, [number]

    def full(*shape, **options):
        if options.get("dtype") is torch.uint8 and "device" in options:
            left[0] -= 1
            if left[0] < 0:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return empty(*shape, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", full)
        yield
    assert left[0] < 0


NO_ROOM = r"8 expert slots of 18,432 bytes need 147,456 bytes on cpu.*fewer slots.*2.00 GiB"


@pytest.mark.parametrize("number", range(LAYERS + 1))  # a layer's slots, or the staging slots
def test_no_device_memory_for_slots_when_attaching(reference, number):
    model = make_model()
    before = {name: (p, p.clone()) for name, p in model.named_parameters()}
    logits = logits_of(model, prompt(0))
    with no_room_for_slots(number), pytest.raises(MemoryError, match=NO_ROOM):
        moe_gpu.attach(model, slots=3, pool=False, policy=Exact())
    assert all(
        p is before[n][0] and torch.equal(p, before[n][1]) for n, p in model.named_parameters()
    )
    assert torch.equal(logits_of(model, prompt(0)), logits)
    assert not model._forward_pre_hooks and not model._forward_hooks
    with moe_gpu.attach(model, slots=3, pool=False, policy=Exact()) as moe:
        assert_next_forward_is_right(model, moe, reference)


def test_no_device_memory_for_slots_when_loading(folder, reference):
    with no_room_for_slots(1), pytest.raises(MemoryError, match=NO_ROOM):
        load(folder)
    model, moe = load(folder)
    with moe:
        assert_next_forward_is_right(model, moe, reference)


# -- the pager's thread


class Reads:
    """Stands between a store and its files: what reading an expert does besides."""

    def __init__(self, moe, patch):
        self.files, self.acts = moe.offloader.store.files, {}
        self.seen = []
        self._read = self.files.read_into
        patch.setattr(self.files, "read_into", self)

    def __call__(self, layer, expert, start, stop, out):
        self.seen.append((layer, expert))
        act = self.acts.get((layer, expert), self.acts.get("any"))
        if act is not None:
            act()
        self._read(layer, expert, start, stop, out)


@pytest.mark.parametrize(
    "death", [SystemExit("bye"), KeyboardInterrupt(), GeneratorExit()], ids=repr
)
@pytest.mark.parametrize("prefetch", [[], ["affinity", "next_gate"]], ids=["none", "prefetch"])
def test_the_thread_dies(folder, reference, monkeypatch, death, prefetch):
    model, moe = load(folder, prefetch=prefetch)
    with moe:
        reads = Reads(moe, monkeypatch)

        def die():
            raise death

        for times in (1, 2):
            reads.acts["any"] = die
            message = FAILED + f"the copying thread died: {type(death).__name__}"
            with bounded(5), pytest.raises(RuntimeError, match=message):
                logits_of(model, prompt(0))
            del reads.acts["any"]
            assert_next_forward_is_right(model, moe, reference)
            assert moe.metrics().pager_restarts >= times


def tokens_apart(reference):
    """Two prompts of one token, and an expert (layer, id) of the second alone."""
    for a in range(VOCAB):
        for b in range(VOCAB):
            needs = [reference.needs(torch.tensor([[token]])) for token in (a, b)]
            for layer in range(LAYERS):
                if alone := needs[1][layer] - needs[0][layer]:
                    return torch.tensor([[a]]), torch.tensor([[b]]), (layer, min(alone))


@pytest.mark.parametrize("staging_slots", [0, 2])
def test_a_copy_that_never_completes(folder, reference, monkeypatch, staging_slots):
    near, far, (layer, expert) = tokens_apart(reference)
    model, moe = load(folder, slots=4, timeout_s=0.3, staging_slots=staging_slots)
    with moe:
        logits_of(model, near)
        moe.offloader.warm(layer, moe.offloader.residents(layer))
        reads, go_on = Reads(moe, monkeypatch), threading.Event()
        try:
            while expert in moe.offloader.residents(layer):  # make room for the fault
                others = [e for e in range(EXPERTS) if e != expert]
                moe.offloader.warm(layer, others[:4])
                logits_of(model, near)
            reads.acts[layer, expert] = lambda: go_on.wait(20)
            for _ in range(3):
                with bounded(2), pytest.raises(RuntimeError) as raised:
                    logits_of(model, far)
                named = re.match(FAILED, str(raised.value)).groups()
                assert named == (str(layer), str(expert))
                assert "has not completed after 0.3 s (running, 0 of 18,432" in str(raised.value)
                with bounded(2):  # while the thread is stuck, what is resident computes
                    assert torch.equal(logits_of(model, near), reference.logits(near))
            assert reads.seen.count((layer, expert)) == 1, "one copy, waited for three times"
        finally:
            go_on.set()
        moe.offloader._pager.timeout_s = 20
        assert torch.equal(logits_of(model, far), reference.logits(far))
        assert reads.seen.count((layer, expert)) == 1, "and the bytes were used in the end"
        assert_next_forward_is_right(model, moe, reference)


def test_a_link_slower_than_the_bound(folder, reference):
    model, moe = load(folder, link_gbps=SLOW, timeout_s=20)
    with moe:
        moe.offloader._pager.timeout_s = 0.005  # of 20 ms
        with bounded(2), pytest.raises(RuntimeError, match=FAILED + ".*not completed after 0.005"):
            logits_of(model, prompt(0))
        moe.offloader._pager.timeout_s = 20
        assert_next_forward_is_right(model, moe, reference)


@pytest.mark.parametrize("what", ["fails", "never completes"])
def test_filling_the_slots_fails(folder, monkeypatch, what):
    """load() itself meets the fault: it says so, in bounded time, and leaves no thread."""
    go_on = threading.Event()
    preadv, main = os.preadv, threading.main_thread()

    def bad(*args):
        if threading.current_thread() is not main:
            if what == "fails":
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            go_on.wait(20)
        return preadv(*args)

    monkeypatch.setattr(os, "preadv", bad)
    before = set(threading.enumerate())
    with bounded(3), pytest.raises(RuntimeError, match=FAILED):
        load(folder, timeout_s=0.3)
    go_on.set()
    for thread in set(threading.enumerate()) - before:
        thread.join(5)
        assert not thread.is_alive()


# -- the consumer


class Explodes(torch.nn.Module):
    """An activation that does something at its n-th call."""

    def __init__(self, own, number, act):
        super().__init__()
        self.own, self.left, self.act = own, number, act

    def forward(self, x):
        self.left -= 1
        if self.left == 0:
            self.act()
        return self.own(x)


@contextmanager
def at_expert(model, layer, number, act):
    """Do something inside the n-th expert that a layer computes."""
    experts = model.model.layers[layer].mlp.experts
    own = experts.act_fn
    experts.act_fn = Explodes(own, number, act)
    yield experts.act_fn
    experts.act_fn = own


class Boom(Exception):
    pass


def boom():
    raise Boom


@pytest.mark.parametrize("options", [
    {"staging_slots": 0},
    {"prefetch": ["next_gate", "affinity"], "link_gbps": 0.5},
    {"pool": True, "link_gbps": 0.5},
], ids=["waves", "prefetch", "pool"])  # fmt: skip
@pytest.mark.parametrize("number", [1, 3, 6])
def test_an_exception_in_the_middle_of_a_forward(folder, reference, number, options):
    model, moe = load(folder, **options)
    with moe:
        for layer in range(LAYERS):
            with at_expert(model, layer, number, boom), pytest.raises(Boom):
                logits_of(model, prompt(0, tokens=12))
            assert not any(any(table.leases_S) for table in moe.offloader.cache.tables) or (
                moe.offloader.flights.on_way
            ), "a lease of nobody"
            ids = prompt(5)
            assert torch.equal(logits_of(model, ids), reference.logits(ids))


@pytest.mark.filterwarnings("ignore:.*experts (of|that) one token")
@pytest.mark.parametrize("staging_slots", [0, 2])
def test_an_exception_that_is_kept_keeps_no_slots(folder, reference, staging_slots):
    """A traceback (that of a notebook's last error, say) holds the frames of the failed forward."""
    model, moe = load(folder, slots=1, pool=True, staging_slots=staging_slots)
    with moe:
        with at_expert(model, 1, 1, boom), pytest.raises(Boom) as kept:
            logits_of(model, prompt(0))
        assert_next_forward_is_right(model, moe, reference)
        assert kept.value.__traceback__ is not None


def test_another_layer_inside_an_expert(folder, reference):
    """Steps in the middle of a step take neither its slots nor its staging slots."""
    hidden = torch.randn(1, 6, 32)
    model, moe = load(folder)
    found, wanted = [], []
    with moe, torch.no_grad():
        for number in (1, 2, 3, 4):
            for each, out in ((model, found), (reference.model, wanted)):
                block = each.model.layers[1].mlp
                with at_expert(each, 0, number, lambda b=block, o=out: o.append(b(hidden))):
                    out.append(logits_of(each, prompt(0)))
        assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))
        assert len(found) == 8
        assert_next_forward_is_right(model, moe, reference)


# -- threads


def test_two_models_on_two_threads(folder, reference):
    texts = [
        [text_of(reference.stock, prompt(seed)) for seed in seeds] for seeds in ((0, 1), (2, 3))
    ]
    options = [{"prefetch": ["next_gate"]}, {"pool": True, "link_gbps": 2.0, "slots": 2}]
    both = [load(folder, **each) for each in options]

    def write(model, seeds):
        return [text_of(model, prompt(seed)) for seed in seeds for _ in range(2)]

    results = on_threads(lambda: write(both[0][0], (0, 1)), lambda: write(both[1][0], (2, 3)))
    for (_, moe), found, wanted in zip(both, results, texts, strict=True):
        assert len(found) == 4
        assert all(torch.equal(f, wanted[i // 2]) for i, f in enumerate(found))
        assert moe.metrics().loads > 0
        moe.close()


def test_two_threads_of_one_model_wait_for_each_other(loaded, reference):
    model, moe = loaded
    wanted = [text_of(reference.stock, prompt(seed)) for seed in range(3)]
    jobs = [lambda s=seed: [text_of(model, prompt(s)) for _ in range(2)] for seed in range(3)]
    for found, text in zip(on_threads(*jobs), wanted, strict=True):
        assert all(torch.equal(each, text) for each in found)
    assert_next_forward_is_right(model, moe, reference)


def test_two_threads_of_a_part_of_a_model_are_refused_rather_than_wrong(loaded, reference):
    """The model's own hooks do not see these calls."""
    model, moe = loaded
    ids = [prompt(0), prompt(1)]  # of one length: the record of one would serve the other
    with torch.no_grad():
        wanted = [reference.model.model(each).last_hidden_state for each in ids]

    @torch.no_grad()
    def call(which):
        right = refused = 0
        for _ in range(20):
            try:
                found = model.model(ids[which]).last_hidden_state
            except RuntimeError as error:
                assert re.search("another thread|not been routed|overlapped|pairs", str(error))
                refused += 1
            else:
                assert torch.equal(found, wanted[which])
                right += 1
        return right, refused

    results = on_threads(lambda: call(0), lambda: call(1))
    assert all(sum(result) == 20 for result in results), results
    assert_next_forward_is_right(model, moe, reference)


def test_a_call_that_is_refused_does_not_free_another_threads_forward(loaded, reference):
    """A hook that runs before ours fails while another thread computes: whose lock is it?"""
    model, moe = loaded
    inside, go_on = threading.Event(), threading.Event()

    def wait():
        inside.set()
        assert go_on.wait(20)

    def refuse(*_):
        if threading.current_thread() is threading.main_thread():
            raise Boom

    hook = model.register_forward_pre_hook(refuse, prepend=True)
    with at_expert(model, 0, 1, wait):
        results = []
        thread = threading.Thread(
            target=lambda: results.append(logits_of(model, prompt(0))), daemon=True
        )
        thread.start()
        assert inside.wait(20)
        with pytest.raises(Boom):
            logits_of(model, prompt(1))
        assert not moe.offloader.lock.acquire(blocking=False), "the other thread still computes"
        go_on.set()
        thread.join(20)
    hook.remove()
    assert torch.equal(results[0], reference.logits(prompt(0)))
    assert moe.offloader.lock.acquire(blocking=False), "and gave the lock back"
    moe.offloader.lock.release()
    assert_next_forward_is_right(model, moe, reference)


def test_a_forward_does_not_wait_for_ever_for_another_threads(loaded, reference, monkeypatch):
    model, moe = loaded
    monkeypatch.setattr(ATTACHED, "FORWARD_S", 0.2)
    with moe.offloader.lock:
        refused = lambda: logits_of(model, prompt(0))  # noqa: E731
        with bounded(5):
            found = on_threads(refused, moe.detach, moe.close)
    assert all("another thread has been running this model for 0.2 s" in str(e) for e in found)
    assert_next_forward_is_right(model, moe, reference)


# -- processes


def test_fork_while_copies_are_queued(folder, reference):
    ids = prompt(0)
    wanted, other = reference.logits(ids), reference.logits(prompt(3))
    model, moe = load(folder, prefetch=["affinity", "next_gate"], link_gbps=SLOW, slots=4)
    with moe:
        for _ in range(20):
            logits_of(model, prompt(3, tokens=1))
            if moe.offloader.flights.on_way:
                break
        assert moe.offloader.flights.on_way, "no copy is under way"

        def child():
            assert torch.equal(logits_of(model, ids), wanted)
            assert torch.equal(logits_of(model, prompt(3)), other)
            assert_nothing_leased_without_a_copy(moe.offloader)
            moe.close()

        assert exit_status_of_fork(child) == 0
        assert torch.equal(logits_of(model, ids), wanted)
        assert moe.metrics().pager_restarts == 0


def assert_nothing_leased_without_a_copy(offloader):
    for table in {id(table): table for table in offloader.cache.tables}.values():
        table.check()
        flights = [
            f
            for f in offloader.flights.on_way.values()
            if offloader.cache.tables[f.copy.layer] is table
        ]
        assert sum(table.leases_S) == len(flights)


def test_fork_while_another_thread_computes(folder, reference):
    """The child has the lock of a thread that it does not have."""
    ids = prompt(0)
    wanted = reference.logits(ids)
    model, moe = load(folder)
    inside, go_on = threading.Event(), threading.Event()

    def wait():
        inside.set()
        assert go_on.wait(20)

    with moe, at_expert(model, 1, 1, wait) as act:
        thread = threading.Thread(target=lambda: logits_of(model, ids), daemon=True)
        thread.start()
        assert inside.wait(20)

        def child():
            act.left = -1
            assert torch.equal(logits_of(model, ids), wanted)

        assert exit_status_of_fork(child) == 0
        go_on.set()
        thread.join(20)
        assert_next_forward_is_right(model, moe, reference)


EXIT = """
import threading, time
import torch
from moe_gpu import RouterState
from moe_gpu.offload import ExpertLayout, ExpertOffloader, ExpertStore
from offloading import make_offloader, route

def leave_copies(stuck):
    moves, _ = make_offloader(layers=2, slots=4, fill=False, prefetch=["affinity"], timeout_s=0.5)
    transfer = moves._transfer
    transfer.runs_inline = lambda copy: copy.layer == 0
    good = transfer.piece
    def piece(copy, start, stop):
        if copy.layer == 1:
            threading.Event().wait(None if stuck else 0.2)
        good(copy, start, stop)
    moves._pager._piece = piece
    for expert in range(4):
        moves.cache.histories[1].affinity[expert] = 1.0
        route(moves.state, [[0, 1]], layer=0)
        list(moves.step(0, 2))
    assert len(moves.flights.on_way) == 4
    return moves

keep = [leave_copies(False), leave_copies(True)]
print(len(threading.enumerate()), "threads", flush=True)
"""


def test_interpreter_exit_with_copies_in_flight():
    """One link that is slow, one that is stuck for ever."""
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    start_s = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", EXIT], capture_output=True, text=True, timeout=60, env=environment
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert done.stdout == "3 threads\n"
    assert time.monotonic() - start_s < 50


def test_an_offloader_is_collected_with_copies_in_flight():
    offloader, _ = make_offloader(
        layers=2, slots=4, fill=False, prefetch=["affinity"], link_gbps=512e-9 / 0.05
    )
    for expert in range(3):
        offloader.cache.histories[1].affinity[expert] = 1.0
        route(offloader.state, [[0, 1]], layer=0)
        list(offloader.step(0, 2))
    assert offloader.flights.on_way
    thread = offloader._pager._thread
    memory = [weakref.ref(m.untyped_storage()) for m in offloader._transfer.memory_G]
    gone = weakref.ref(offloader)
    with bounded(5):
        del offloader
        gc.collect()
    assert gone() is None and not thread.is_alive(), "the thread ends before its memory goes"
    gc.collect()
    assert not any(ref() for ref in memory)


# -- the end of an attachment


class Streamer:
    """Does something when generate hands over the n-th token."""

    def __init__(self, number, act):
        self.left, self.act = number, act

    def put(self, tokens):
        self.left -= 1
        if self.left == 0:
            self.act()

    def end(self):
        pass


def generate(model, ids, streamer, tokens=12):
    mask = torch.ones_like(ids)
    return model.generate(
        ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, streamer=streamer
    )


ENDS = ["attached", "loaded"]


def start(folder, how):
    if how == "loaded":
        return load(folder, prefetch=["next_gate"], link_gbps=2.0)
    model = make_model()
    return model, moe_gpu.attach(model, slots=3, policy=Exact(), prefetch=["affinity"])


@pytest.mark.parametrize("how", ENDS)
@pytest.mark.parametrize("where", ["streamer", "thread"])
def test_detach_in_the_middle_of_generation(folder, reference, how, where):
    ids = prompt(0)
    wanted = text_of(reference.stock, ids, tokens=12)
    model, moe = start(folder, how)
    other = threading.Thread(target=moe.detach)
    act = moe.detach if where == "streamer" else other.start
    assert torch.equal(generate(model, ids, Streamer(5, act)), wanted)
    if where == "thread":
        other.join(20)
    assert "detached" in repr(moe)
    assert torch.equal(text_of(model, ids, tokens=12), wanted)
    assert torch.equal(logits_of(model, ids), logits_of(reference.stock, ids))
    with pytest.raises(RuntimeError, match="already detached"):
        moe.detach()
    with moe_gpu.attach(model, slots=3, policy=Exact()):
        assert torch.equal(text_of(model, ids, tokens=12), wanted)


@pytest.mark.parametrize("verb", ["detach", "close"])
def test_the_end_is_refused_inside_an_expert(loaded, reference, verb):
    model, moe = loaded
    refused = []

    def end():
        with pytest.raises(RuntimeError, match=rf"{verb}\(\) was called from inside an expert"):
            getattr(moe, verb)()
        refused.append(verb)

    ids = prompt(0)
    with at_expert(model, 1, 2, end):
        assert torch.equal(logits_of(model, ids), reference.logits(ids))
    assert refused == [verb]
    assert_next_forward_is_right(model, moe, reference)


def test_detach_between_two_layers_of_a_forward(folder, reference):
    """The rest of the forward is the stock model's; nothing is held afterwards."""
    model, moe = load(folder)
    ids, stock = prompt(0), reference.stock
    hook = model.model.layers[1].register_forward_pre_hook(
        lambda *_: moe.detach() if "attached" in repr(moe) else None
    )
    torch.testing.assert_close(logits_of(model, ids), logits_of(stock, ids), rtol=1e-5, atol=1e-5)
    hook.remove()
    assert torch.equal(logits_of(model, ids), logits_of(stock, ids))
    [free] = on_threads(lambda: moe.offloader.lock.acquire(blocking=False))
    assert free, "no forward holds the lock"


def test_two_threads_detach_while_a_third_waits_to_compute(folder, reference):
    model, moe = load(folder)
    ids, lock = prompt(0), moe.offloader.lock
    jobs = [moe.detach, moe.detach, lambda: logits_of(model, ids)]
    lock.acquire()
    threading.Timer(0.3, lambda: None)
    done = []
    runner = threading.Thread(target=lambda: done.extend(on_threads(*jobs)))
    runner.start()
    time.sleep(0.2)  # all three wait
    lock.release()
    runner.join(60)
    ended = [str(each) for each in done[:2]]
    assert sorted(ended) == ["None", "this model is already detached"]
    assert torch.equal(done[2], logits_of(reference.stock, ids)) or torch.equal(
        done[2], reference.logits(ids)
    )
    # on this thread: a new one may have the identity of one that is gone
    assert lock.acquire(blocking=False), "no forward holds the lock"


@pytest.mark.parametrize("where", ["streamer", "thread"])
def test_close_in_the_middle_of_generation(folder, where):
    model, moe = load(folder, prefetch=["next_gate"], link_gbps=2.0)
    other = threading.Thread(target=moe.close)
    act = moe.close if where == "streamer" else other.start
    with bounded(10), pytest.raises(RuntimeError, match="this model was closed"):
        generate(model, prompt(0), Streamer(5, act), tokens=90)
    if where == "thread":
        other.join(20)
    assert "closed" in repr(moe) and moe.metrics().tokens >= 7
    with pytest.raises(RuntimeError, match="this model was closed"):
        logits_of(model, prompt(0))
    for end in (moe.close, moe.detach):
        with pytest.raises(RuntimeError, match="already closed"):
            end()


def test_a_closed_offloader_refuses_a_step():
    offloader, _ = make_offloader(slots=4)
    route(offloader.state, [[0, 7]])
    turns = offloader.step(0, 2)
    next(turns)
    offloader.close()
    offloader.close()
    turns.close()
    route(offloader.state, [[0, 7]])
    with pytest.raises(RuntimeError, match="the offloader is closed"):
        list(offloader.step(0, 2))
    with pytest.raises(RuntimeError, match="the offloader is closed"):
        offloader.warm(0, [6])


# -- checksums


def corrupt(memory_B):
    memory_B[1000] ^= 1


@pytest.mark.parametrize("pool", [False, True], ids=["per-layer", "pool"])
def test_a_flipped_byte_in_a_slot(folder, reference, pool):
    model, moe = load(folder, verify=True, pool=pool)
    with moe:
        ids = prompt(0)
        assert_next_forward_is_right(model, moe, reference)
        verified = moe.metrics().verified
        assert verified > 0
        wrong = 0
        for memory_SB in moe.offloader._transfer.memory_G:
            for memory_B in memory_SB:
                corrupt(memory_B)
                try:
                    assert torch.equal(logits_of(model, ids), reference.logits(ids))
                except RuntimeError as error:
                    message = r"layer \d: the weights in slot \d+ are not those stored for expert"
                    assert re.match(message, str(error))
                    wrong += 1
                assert torch.equal(logits_of(model, ids), reference.logits(ids))
        assert wrong > 0, "no flipped byte was ever about to be computed from"
        assert_next_forward_is_right(model, moe, reference)


def test_a_flipped_byte_in_host_memory(folder, reference):
    model, moe = load(folder, verify=True, host_memory=None)
    with moe:
        ids, store = prompt(0), moe.offloader.store
        layer, expert = 1, min(reference.needs(ids)[1] - set(moe.offloader.residents(1)))
        corrupt(store.expert(layer, expert))
        for _ in range(2):
            message = f"layer {layer}: the weights in slot .* not those stored for expert {expert}"
            with pytest.raises(RuntimeError, match=message):
                logits_of(model, ids)
            assert expert not in moe.offloader.residents(layer)
        corrupt(store.expert(layer, expert))  # the same bit again: as it was
        assert_next_forward_is_right(model, moe, reference)


@pytest.mark.parametrize("options", [{}, {"link_gbps": 2.0, "prefetch": ["next_gate", "affinity"]}],
                         ids=["plain", "prefetch"])  # fmt: skip
def test_a_byte_that_flips_on_the_way(folder, reference, monkeypatch, options):
    """Once per expert: the bytes on disk are right, so that loading it again helps."""
    model, moe = load(folder, verify=True, **options)
    with moe:
        transfer, flipped = moe.offloader._transfer, set()
        piece = transfer.piece

        def bad_link(copy, start, stop):
            piece(copy, start, stop)
            if (copy.layer, copy.expert) not in flipped:
                flipped.add((copy.layer, copy.expert))
                corrupt(transfer.bytes_of(copy.place))

        moe.offloader._pager._piece = bad_link
        ids, errors = prompt(0), 0
        for _ in range(3 * LAYERS * EXPERTS):
            try:
                found = logits_of(model, ids)
            except RuntimeError as error:
                assert "are not those stored" in str(error)
                errors += 1
            else:
                assert torch.equal(found, reference.logits(ids))
                break
        else:
            pytest.fail("never right again")
        assert 0 < errors <= len(flipped)
        for seed in (5, 6):
            for _ in range(LAYERS * EXPERTS):
                try:
                    assert torch.equal(
                        logits_of(model, prompt(seed)), reference.logits(prompt(seed))
                    )
                    break
                except RuntimeError as error:
                    assert "are not those stored" in str(error)
            else:
                pytest.fail("never right again")
