"""Shards: what lies where, reads of any piece, what is refused, and files that change."""

import errno
import gc
import json
import os
import random
import struct
import threading

import pytest
import torch
from safetensors.torch import save_file

from moe_gpu.offload import headers, shards
from moe_gpu.offload.shards import CheckpointError, Shards


def write(path, header, data):
    """A safetensors file by hand."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def index(folder, weight_map):
    text = weight_map if isinstance(weight_map, str) else json.dumps({"weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)


def memory(*shape, **arguments):
    return torch.empty(*shape, dtype=torch.uint8, **arguments)


def read(opened, name, start=0, stop=None):
    span = opened.tensors[name]
    stop = span.nbytes if stop is None else stop
    out = torch.full((stop - start,), 255, dtype=torch.uint8)
    opened.read(span, start, stop, out)
    return out.tolist()


@pytest.fixture
def folder(tmp_path):
    """One file of one tensor: the bytes 0 to 99."""
    header = {"a": {"dtype": "U8", "shape": [100], "data_offsets": [0, 100]}}
    write(tmp_path / "model.safetensors", header, bytes(range(100)))
    return tmp_path


def test_spans_by_hand(tmp_path):
    header = {
        "__metadata__": {"format": "pt"},
        "b": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [4, 16]},
        "a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
        "none": {"dtype": "I64", "shape": [0, 5], "data_offsets": [4, 4]},
    }
    text = json.dumps(header).encode() + b"   "  # writers pad with spaces
    write(tmp_path / "model.safetensors", text, bytes(range(16)))
    with Shards(tmp_path) as opened:
        assert opened.files == ["model.safetensors"]
        begin = 8 + len(text)
        assert opened.tensors == {
            "a": ("a", torch.float32, (), 0, begin, 4),
            "none": ("none", torch.int64, (0, 5), 0, begin + 4, 0),
            "b": ("b", torch.bfloat16, (2, 3), 0, begin + 4, 12),
        }
        assert read(opened, "b", 3, 7) == [7, 8, 9, 10]
        assert read(opened, "b", 12, 12) == []


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64, torch.bool],
    ids=str,
)
def test_loads_what_safetensors_saved(dtype, tmp_path):
    tensors = {"x": torch.randn(3, 5).to(dtype), "y": torch.ones((), dtype=dtype)}
    save_file(tensors | {"z": torch.empty(0, 2, dtype=dtype)}, tmp_path / "model.safetensors")
    with Shards(tmp_path) as opened:
        for name, tensor in tensors.items():
            loaded = opened.load(name)
            assert loaded.dtype == dtype and loaded.shape == tensor.shape
            assert torch.equal(loaded.float(), tensor.float())
        assert opened.load("z").shape == (0, 2)


def test_short_reads_go_on(folder, monkeypatch):
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, into, at: whole(fd, [into[0][:7]], at))
    with Shards(folder) as opened:
        assert read(opened, "a", 5, 98) == list(range(5, 98))


def test_index_of_linked_shards(tmp_path):
    """As in the cache of the hub, where every file is a link to ../../blobs."""
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    folder.mkdir(parents=True)
    for name, value in (("one", 1.0), ("two", 2.0)):
        save_file({name: torch.full((3,), value), "unlisted": torch.zeros(1)}, blobs / name)
        (folder / f"{name}.safetensors").symlink_to(f"../../blobs/{name}")
    index(folder, {"two": "two.safetensors", "one": "one.safetensors"})
    with Shards(folder) as opened:
        assert opened.files == ["two.safetensors", "one.safetensors"]
        assert set(opened.tensors) == {"one", "two"}
        assert opened.load("one").tolist() == [1.0] * 3
        assert opened.load("two").tolist() == [2.0] * 3


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors",
        "/etc/model.safetensors",
        "sub/model.safetensors",
        "..\\model.safetensors",
        "nul\0.safetensors",
        "..",
        "",
        "pytorch_model.bin",
        3,
    ],
)
def test_refuses_an_index_that_leaves_the_folder(name, tmp_path, monkeypatch):
    index(tmp_path, {"a": name})
    monkeypatch.setattr(os, "open", lambda *_: pytest.fail("opened something"))
    with pytest.raises(CheckpointError, match="maps a to .*must be a .safetensors file of this"):
        Shards(tmp_path)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "is not an index of safetensors"),
        ("[" * 200_000, "is not an index of safetensors"),
        ('{"weight_map": 1}', "is not an index of safetensors"),
        ("{}", "is not an index of safetensors: KeyError"),
        ('{"weight_map": {}}', "lists no tensors"),
        ('{"weight_map": {"b": "x.safetensors"}}', "lists b in x.safetensors, which does not hold"),
        ('{"weight_map": {"b": "y.safetensors"}}', "y.safetensors cannot be read.*No such file"),
    ],
    ids=["not JSON", "deep", "no map", "no weight_map", "empty", "lacks the tensor", "no file"],
)
def test_refuses_an_index(text, message, tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    index(tmp_path, text)
    with pytest.raises(CheckpointError, match=message):
        Shards(tmp_path)


def test_refuses_a_folder_without_safetensors(tmp_path):
    with pytest.raises(CheckpointError, match="has no model.safetensors nor model.safetensors.ind"):
        Shards(tmp_path)
    (tmp_path / "pytorch_model-00001-of-00002.bin").write_bytes(b"pickled")
    with pytest.raises(CheckpointError, match="holds pytorch_model-00001.*pickled: only safetens"):
        Shards(tmp_path)
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="is not a file"):
        Shards(tmp_path)


def entry(**changes):
    return {"dtype": "U8", "shape": [100], "data_offsets": [0, 100]} | changes


@pytest.mark.parametrize(
    "header, message",
    [
        pytest.param(b"{", "malformed header: JSON", id="not JSON"),
        pytest.param(b"\xff\xff", "malformed header: Unicode", id="not text"),
        pytest.param([1], "malformed header", id="a list"),
        pytest.param({"a": 1}, "malformed header", id="not an entry"),
        pytest.param({"a": entry(shape=[99])}, r"a, .* \[0, 99\), not \[0, 100\)", id="size"),
        pytest.param({"a": entry(dtype="F32")}, r"\[0, 400\), not \[0, 100\)", id="itemsize"),
        pytest.param({"a": entry(shape=[-100])}, "not understood at a", id="negative"),
        pytest.param({"a": entry(shape=[True, 100])}, "not understood at a", id="bool"),
        pytest.param({"a": entry(shape=100)}, "not understood at a", id="shape not a list"),
        pytest.param({"a": entry(dtype="F4")}, "not understood at a.*F4", id="unknown dtype"),
        pytest.param({"a": entry(dtype=["F4"])}, "not understood at a", id="dtype not text"),
        pytest.param({"a": entry(data_offsets=[0, 100, 100])}, "not understood", id="3 offsets"),
        pytest.param(
            {"a": entry(shape=[60], data_offsets=[0, 60]), "b": entry(data_offsets=[50, 100])},
            r"b, .* must lie at \[60, 160\), not \[50, 100\)",
            id="overlap",
        ),
        pytest.param(
            {"a": entry(shape=[40], data_offsets=[60, 100])}, r"must lie at \[0, 40\)", id="gap"
        ),
    ],
)
def test_refuses_a_header(header, message, tmp_path):
    write(tmp_path / "model.safetensors", header, bytes(100))
    with pytest.raises(CheckpointError, match=message):
        Shards(tmp_path)


@pytest.mark.parametrize(
    "size, message",
    [
        (0, "it has 0 bytes, its header would have 0"),
        (7, "it has 7 bytes, its header would have"),
        (40, "truncated or no safetensors file: it has 40 bytes, its header would have"),
        (-1, "truncated or damaged: it has {0} bytes, by its header it must have {1}"),
        (+1, "truncated or damaged: it has {0} bytes, by its header it must have {1}"),
    ],
)
def test_refuses_a_shard_of_another_size(size, message, folder):
    path = folder / "model.safetensors"
    full = path.stat().st_size
    size = size if size in (0, 7, 40) else full + size
    os.truncate(path, size)
    with pytest.raises(CheckpointError, match=message.format(size, full)):
        Shards(folder)


def test_refuses_an_endless_header(folder, monkeypatch):
    monkeypatch.setattr(headers, "_MAX_HEADER", 50)
    with pytest.raises(CheckpointError, match="its header would have"):
        Shards(folder)


def test_truncated_after_opening(folder):
    with Shards(folder) as opened:
        size = os.path.getsize(folder / "model.safetensors")
        os.truncate(folder / "model.safetensors", size - 50)
        for start, stop in ((0, 100), (60, 70), (0, 10)):  # partly, wholly, not at all cut off
            with pytest.raises(CheckpointError, match=f"had {size} bytes, now {size - 50}"):
                read(opened, "a", start, stop)


def test_written_to_after_opening(folder):
    with Shards(folder) as opened:
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"\0")
        os.utime(path, ns=(0, 10**9))  # clocks of file systems are coarse
        with pytest.raises(CheckpointError, match="model.safetensors changed on disk since"):
            read(opened, "a")


def test_replaced_after_opening_reads_what_was_opened(folder):
    with Shards(folder) as opened:
        save_file({"b": torch.zeros(7)}, folder / "new")
        os.replace(folder / "new", folder / "model.safetensors")
        assert read(opened, "a") == list(range(100))


def test_read_error_names_file_and_tensor_and_passes(folder, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    with Shards(folder) as opened:
        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", fail)
            with pytest.raises(
                CheckpointError, match="safetensors: reading 100 bytes of a fail"
            ) as e:
                read(opened, "a")
            assert e.value.__cause__.errno == errno.EIO
        assert read(opened, "a") == list(range(100))


@pytest.mark.parametrize(
    "start, stop, out, message",
    [
        (-1, 5, memory(6), r"must lie in \[0, 100\], the bytes of a, got -1 and 5"),
        (0, 101, memory(101), r"got 0 and 101"),
        (9, 8, memory(0), r"got 9 and 8"),
        (0, 8, memory(7), r"out must be uint8 of shape \(8,\), got .* \(7,\)"),
        (0, 8, memory(2, 4), r"got .* \(2, 4\)"),
        (0, 8, torch.empty(8), "got torch.float32"),
        (0, 8, memory(16)[::2], "contiguous on the host"),
        (0, 8, memory(8, device="meta"), "contiguous on the host, got meta"),
    ],
)
def test_refuses_reads(start, stop, out, message, folder):
    with Shards(folder) as opened, pytest.raises(ValueError, match=message):
        opened.read(opened.tensors["a"], start, stop, out)


def test_many_threads(folder):
    failures = []

    def work(seed):
        choose = random.Random(seed)
        for _ in range(200):
            start = choose.randrange(100)
            stop = choose.randrange(start, 101)
            if read(opened, "a", start, stop) != list(range(start, stop)):
                failures.append((start, stop))

    with Shards(folder) as opened:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_reads_and_closes_its_own(folder):
    with Shards(folder) as opened:
        child = os.fork()
        if child == 0:
            same = read(opened, "a") == list(range(100))
            opened.close()
            os._exit(0 if same else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert read(opened, "a") == list(range(100))


def open_files(folder):
    links = (f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd"))
    return sum(os.path.realpath(link).startswith(str(folder)) for link in links)


def test_closes_its_files(folder):
    opened = Shards(folder)
    assert open_files(folder) == 1
    opened.close()
    opened.close()
    assert open_files(folder) == 0
    with pytest.raises(CheckpointError, match="are closed"):
        read(opened, "a")
    with pytest.raises(CheckpointError, match="are closed"):
        opened.read_ahead(opened.tensors["a"])

    opened = Shards(folder)
    del opened
    gc.collect()
    assert open_files(folder) == 0

    os.rename(folder / "model.safetensors", folder / "x.safetensors")
    index(folder, {"a": "x.safetensors", "b": "x.safetensors"})
    with pytest.raises(CheckpointError) as refused:
        Shards(folder)
    assert open_files(folder) == 0, "closed at once, not with the traceback"
    assert "lists b in x.safetensors" in str(refused.value)


def test_a_reused_descriptor_is_not_mistaken_for_the_file(folder):
    """Another thread may close the files, and open others, while a read is under way."""
    opened = Shards(folder)
    fd = opened._files[0].fd
    other = os.open(folder / "model.safetensors", os.O_RDONLY)
    save_file({"a": torch.zeros(100, dtype=torch.uint8)}, folder / "other")
    wrong = os.open(folder / "other", os.O_RDONLY)
    os.dup2(wrong, fd)
    with pytest.raises(CheckpointError):
        read(opened, "a")
    os.dup2(other, fd)
    assert read(opened, "a") == list(range(100))
    os.close(other)
    os.close(wrong)
    opened.close()


def test_advice_covers_the_bytes_in_small_pieces(folder, monkeypatch):
    calls = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, *call: calls.append(call))
    monkeypatch.setattr(shards, "_READ_AHEAD", 40)
    with Shards(folder) as opened:
        span = opened.tensors["a"]
        opened.read_ahead(span, 10)
        at = span.offset
        assert [call[:2] for call in calls] == [(at + 10, 40), (at + 50, 40), (at + 90, 10)]
        assert {call[2] for call in calls} == {os.POSIX_FADV_WILLNEED}
        calls.clear()
        opened.drop_cache(span, 10, 10)  # to the kernel, a length of 0 is the rest of the file
        assert calls == []
        opened.drop_cache(span, 10, 30)
        assert calls == [(at + 10, 20, os.POSIX_FADV_DONTNEED)]
        with pytest.raises(ValueError, match="got 10 and 101"):
            opened.drop_cache(span, 10, 101)


def test_advice_cannot_fail(folder, monkeypatch):
    def fail(*_):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "posix_fadvise", fail)
    with Shards(folder) as opened:
        opened.read_ahead(opened.tensors["a"])
        opened.drop_cache(opened.tensors["a"])


def test_says_what_it_is(folder):
    with Shards(folder) as opened:
        assert repr(opened) == f"Shards({str(folder)!r}, 1 files, 1 tensors)"
