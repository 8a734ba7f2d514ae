"""load: the model that from_pretrained and attach make, its experts where the budgets say."""

import dataclasses
import gc
import importlib
import inspect
import json
import os
import threading
import weakref

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import moe_gpu
from checkpoints import edit, save
from mixtral import (  # noqa: F401 - the last is a fixture that runs by itself
    EXPERT_BYTES,
    EXPERTS,
    LAYERS,
    logits_of,
    make_model,
    prompt,
    text_of,
    without_interpreter,
)
from moe_gpu import CacheBonus, Exact
from moe_gpu.huggingface.attach import LOAD_ONLY
from moe_gpu.huggingface.options import Options
from moe_gpu.offload import LFU, pinning
from moe_gpu.offload.residency import Residency
from moe_gpu.offload.shards import CheckpointError, Shards
from moe_gpu.offload.tiers import Tier
from moe_gpu.offload.transfer import SimulatedLink, Transfer

ATTACHED, LOAD = (inspect.getmodule(function) for function in (moe_gpu.AttachedMoE, moe_gpu.load))
PART = importlib.import_module("moe_gpu.huggingface.part")
TOTAL = LAYERS * EXPERTS * EXPERT_BYTES  # of float32 experts
W1 = "model.layers.{}.block_sparse_moe.experts.{}.w1.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Shared: nobody writes into it."""
    return save(make_model(), tmp_path_factory.mktemp("mixtral"))


@pytest.fixture
def nothing_read(monkeypatch):
    """A refusal that comes after weights were read, or room was made for them, fails."""

    def read(*_, **__):
        raise AssertionError("too late to refuse")

    monkeypatch.setattr(Shards, "read", read)
    monkeypatch.setattr(Transfer, "__init__", read)


def open_files(folder):
    links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    return [p for p in map(os.path.realpath, links) if p.startswith(str(folder))]


def threads():
    return {t for t in threading.enumerate() if type(t).__module__ != "tqdm._monitor"}


# -- the same model

STORED = {
    "separate": {},
    "separate, sharded": {"sharded": True},
    "packed": {"packed": True},
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"], ids=["as stored", "to bf16"])
@pytest.mark.parametrize("stored", STORED)
def test_bitwise_what_attach_computes(stored, dtype, tied, tmp_path):
    save(make_model(tie_word_embeddings=tied), tmp_path, **STORED[stored])
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    text = text_of(reference, prompt(0, batch=2))
    with moe_gpu.attach(reference, slots=5, policy=Exact()):
        expected = logits_of(reference, prompt(1, tokens=20))
    for host_memory in (None, 5 * EXPERT_BYTES, 0):
        arguments = {"slots": 5, "policy": Exact(), "dtype": dtype, "verify": True}
        model, moe = moe_gpu.load(tmp_path, host_memory=host_memory, **arguments)
        with moe:
            assert type(model) is type(reference) and model.dtype == reference.dtype
            assert torch.equal(logits_of(model, prompt(1, tokens=20)), expected)
            assert torch.equal(text_of(model, prompt(0, batch=2)), text)
            assert moe.metrics().verified > 0
    assert not open_files(tmp_path)


def test_from_separate_and_packed_is_the_same(tmp_path):
    logits = []
    for packed in (False, True):
        save(make_model(), tmp_path / str(packed), packed=packed)
        with moe_gpu.load(tmp_path / str(packed), slots=3, host_memory=0)[1] as moe:
            logits.append(logits_of(moe.model, prompt()))
    assert torch.equal(*logits)


def test_accepts_a_path_as_text_and_shows_a_bar_where_asked(folder, capsys):
    moe_gpu.load(str(folder), slots=2, progress=False)[1].close()
    assert capsys.readouterr().err == ""
    model, moe = moe_gpu.load(str(folder), slots=2, progress=True, host_memory=3 * EXPERT_BYTES)
    moe.close()
    shown = capsys.readouterr().err
    # the bar ends at 100 %: it counts what is read, dense weights and the experts kept in memory
    assert "loading" in shown and "100%" in shown


def test_in_inference_mode_for_use_outside(folder):
    with torch.inference_mode():
        model, moe = moe_gpu.load(folder, slots=3, host_memory=0, policy=Exact())
        inside = logits_of(model, prompt())
    with moe:
        assert torch.equal(logits_of(model, prompt()), inside)


def test_two_at_once_from_one_folder(folder):
    (one, first), (two, second) = (moe_gpu.load(folder, slots=3, host_memory=0) for _ in range(2))
    expected = logits_of(one, prompt())
    first.close()
    with second:
        assert torch.equal(logits_of(two, prompt()), expected)


# -- options and homes


def option(name, value, get, expected=None):
    return pytest.param(name, value, get, value if expected is None else expected, id=name)


OPTIONS = [
    option("slots", 3, lambda moe: moe.offloader.num_slots, 6),  # of the pool
    option("resident", 0.5, lambda moe: moe.offloader.num_slots, 4),
    option("gpu_memory", "10.9MB", lambda moe: moe.offloader.num_slots, 3),
    option("context_tokens", 64, lambda moe: moe.offloader.num_slots, 3),
    option("pool", False, lambda moe: moe.offloader.is_pool),
    option("staging_slots", 1, lambda moe: moe.metrics().staging_slots),
    option("policy", CacheBonus(0.3), lambda moe: {g.policy for g in moe.gates}, {CacheBonus(0.3)}),
    option("eviction", "lfu", lambda moe: type(moe.offloader.eviction), LFU),
    option("bypass", True, lambda moe: moe.offloader.bypass),
    option("prefetch", iter(["affinity"]), lambda moe: moe.offloader.predictors, {"affinity"}),
    option("prefill", "warm", lambda moe: moe.offloader.prefill),
    option("stream_prefill", False, lambda moe: moe.offloader.stream_prefill),
    option("decay", 0.5, lambda moe: moe.gates[1].decay),
    option("boost", 0.5, lambda moe: moe.gates[1].boost),
    option("max_score", 2.5, lambda moe: moe.gates[1].max_score),
    option("affinity_from", "executed", lambda moe: moe.gates[1].affinity_from),
    option("max_policy_tokens", 7, lambda moe: moe.gates[1].max_policy_tokens),
    option("verify", True, lambda moe: moe.offloader.verify),
    option("audit", 0.5, lambda moe: moe.audit().rate),
    option("meters", True, lambda moe: moe.metrics().l1_change is not None),
    option("timers", True, lambda moe: moe.metrics().route_us_mean is not None),
    option("timeout_s", 5.0, lambda moe: moe.offloader._pager.timeout_s),
    option("link_gbps", 9.0, lambda moe: type(moe.offloader._transfer), SimulatedLink),
    # what these two do is tested below
    option("pinned_memory", 0, lambda moe: moe.metrics().home_bytes["pinned"]),
    option("residency", None, lambda moe: moe.metrics().filled, 6),
]


@pytest.mark.filterwarnings("ignore:.*experts (of|that) one token")
@pytest.mark.parametrize("name, value, get, expected", OPTIONS)
def test_every_option_arrives(name, value, get, expected, folder):
    arguments = {name: value}
    if name == "context_tokens":  # dense, KV, workspace, staging and 3 slots; 4,096 would not fit
        needs = 52_128 + 64 * 256 + 64 * 2_368 + 4 * 97 + 2 * EXPERT_BYTES
        arguments["gpu_memory"] = needs + 4 * EXPERT_BYTES - 1
    elif name not in ("slots", "resident", "gpu_memory"):
        arguments["slots"] = 3
    with moe_gpu.load(folder, **arguments)[1] as moe:
        logits_of(moe.model, prompt())
        assert get(moe) == expected


def test_no_option_is_left_out():
    names = [field.name for field in dataclasses.fields(Options)]
    assert sorted(parameter.values[0] for parameter in OPTIONS) == sorted(names)
    attaching, loading = (
        {name for name, p in inspect.signature(verb).parameters.items() if p.kind is p.KEYWORD_ONLY}
        for verb in (moe_gpu.attach, moe_gpu.load)
    )
    assert attaching - {"device"} == set(names)
    assert loading - attaching == LOAD_ONLY
    defaults = inspect.signature(moe_gpu.attach).parameters
    for name, parameter in inspect.signature(moe_gpu.load).parameters.items():
        assert name not in names or parameter.default == defaults[name].default


@pytest.mark.parametrize(
    "host_memory, in_memory",
    [
        (None, 16),
        ("1GiB", 16),
        (16 * EXPERT_BYTES - 1, 15),
        (5 * EXPERT_BYTES, 5),
        (EXPERT_BYTES - 1, 0),
        (0, 0),
    ],
)
def test_homes_follow_the_budget(host_memory, in_memory, folder):
    with moe_gpu.load(folder, slots=3, host_memory=host_memory, policy=Exact())[1] as moe:
        store = moe.offloader.store
        assert store.home_bytes() == {
            "pinned": 0,
            "pageable": in_memory * EXPERT_BYTES,
            "disk": (16 - in_memory) * EXPERT_BYTES,
        }
        # no layer has more than one expert more in memory than another
        kept = [sum(store.tier(layer, e) is Tier.PAGEABLE for e in range(8)) for layer in range(2)]
        assert max(kept) - min(kept) <= 1
        logits_of(moe.model, prompt(0, tokens=30))
        by_tier = moe.metrics().loads_by_tier
        assert (by_tier["pageable"] > 0) == (in_memory > 0)
        assert (by_tier["disk"] > 0) == (in_memory < 16)


def test_by_default_most_of_the_free_memory(folder, monkeypatch):
    monkeypatch.setattr(LOAD, "available_memory", lambda: 10 * EXPERT_BYTES)
    with moe_gpu.load(folder, slots=3)[1] as moe:
        assert moe.metrics().home_bytes["pageable"] == 8 * EXPERT_BYTES


def test_residency_decides_who_is_kept_in_memory(folder, tmp_path):
    file, hot = tmp_path / "r.safetensors", {(0, 7), (0, 3), (1, 5), (1, 6), (0, 6)}
    affinity_LE, resident_LE = torch.zeros(2, 8), torch.zeros(2, 8, dtype=torch.bool)
    for rank, (layer, expert) in enumerate(sorted(hot)):
        affinity_LE[layer, expert] = 0.2 + rank / 10
    resident_LE[1, 0] = True  # hotter than any that was not
    counts = [torch.zeros(2, 8, dtype=torch.int64) for _ in range(3)]
    Residency(affinity_LE, counts[0], resident_LE, *counts[1:]).save(file)
    arguments = {"slots": 3, "host_memory": 6 * EXPERT_BYTES, "residency": file}
    with moe_gpu.load(folder, **arguments)[1] as moe:
        store = moe.offloader.store
        kept = {(la, e) for la in range(2) for e in range(8) if store.tier(la, e) is Tier.PAGEABLE}
        assert kept == hot | {(1, 0)}
        resident = {(la, e) for la in range(2) for e in moe.offloader.residents(la)}
        assert resident == hot | {(1, 0)}


# -- what is refused, before anything is read


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({}, ValueError, "exactly one of slots, resident and gpu_memory, got {}"),
        ({"slots": 3, "resident": 0.5}, ValueError, "exactly one of slots"),
        ({"slots": 9}, ValueError, r"slots must lie in \[1, 8\]"),
        ({"slots": 3, "colour": 1}, TypeError, r"load\(\) got an unexpected .* 'colour'$"),
        ({"slot": 3}, TypeError, r"argument 'slot': did you mean 'slots'\?"),
        ({"slots": 3, "evict": "lru"}, TypeError, r"'evict': did you mean 'eviction'\?"),
        ({"slots": 3, "host_mem": 3}, TypeError, r"'host_mem': did you mean 'host_memory'\?"),
        ({"slots": 3, "prefetch": None}, TypeError, r"prefetch must hold names .*, got None"),
        ({"slots": 3, "prefetch": True}, TypeError, r"prefetch must hold names .*, got True"),
        ({"slots": 3, "residency": 3}, TypeError, "residency must be a path, got 3"),
        ({"slots": 3, "host_memory": "many"}, ValueError, "host_memory must be bytes or text"),
        ({"gpu_memory": "24"}, ValueError, r"gpu_memory needs a unit \(B, kB, .* got '24'"),
        ({"slots": 3, "host_memory": -1}, ValueError, "host_memory must be >= 0 bytes, got -1"),
        (
            {"slots": 3, "host_memory": 5, "pinned_memory": 6},
            ValueError,
            "pinned_memory=6 bytes must be <= host_memory=5",
        ),
        ({"slots": 3, "dtype": "int8"}, ValueError, "dtype must be one of 'auto', 'float32', "),
        ({"slots": 3, "dtype": torch.int8}, ValueError, "dtype must be one of .* torch.int8"),
        ({"slots": 3, "device": "abacus"}, ValueError, "CPU or CUDA device, got 'abacus'"),
        ({"slots": 3, "device": "meta"}, ValueError, "CPU or CUDA device, got 'meta'"),
        ({"slots": 3, "device": "cuda:99"}, ValueError, "'cuda:99' is not there: this PyTorch"),
        ({"slots": 3, "decay": 2}, ValueError, r"decay must be finite and in \[0, 1\]"),
        ({"slots": 3, "policy": "exact"}, TypeError, "policy must be one of"),
        ({"slots": 3, "eviction": "fifo"}, ValueError, "eviction must be one of"),
        ({"slots": 3, "prefetch": ["luck"]}, ValueError, "prefetch must be among"),
        ({"slots": 3, "context_tokens": 0}, ValueError, "context_tokens must be >= 1"),
        ({"slots": 3, "residency": "nowhere"}, FileNotFoundError, "nowhere"),
        (
            {"gpu_memory": "300KB", "context_tokens": 100},
            ValueError,
            r"gpu_memory=300,000 bytes is too small: dense weights take 52,128, the KV cache of "
            r"100 tokens 25,600, workspace 237,188, staging slots 36,864, and one expert slot 18,432",
        ),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_arguments(arguments, error, message, folder, nothing_read):
    with pytest.raises(error, match=message):
        moe_gpu.load(folder, **arguments)
    gc.collect()
    assert not open_files(folder)


@pytest.mark.parametrize(
    "arguments, stage",
    [
        ({}, "resolve"),
        ({"slots": 3, "decay": 2}, "resolve"),
        ({"slots": 3, "residency": "nowhere"}, "resolve"),
        ({"gpu_memory": 5}, "add_weights"),
        ({"slots": 9}, "add_weights"),
        ({"slots": 3, "host_memory": 5, "pinned_memory": 6}, "add_weights"),
    ],
)
def test_refused_before_a_download(arguments, stage, folder, monkeypatch):
    def download(*_, **__):
        raise AssertionError("too late to refuse")

    monkeypatch.setattr(LOAD, "resolve", lambda *_, **__: folder)
    monkeypatch.setattr(LOAD, stage, download)
    with pytest.raises((ValueError, FileNotFoundError)):
        moe_gpu.load("some-one/some-model", **arguments)


def test_from_the_hub_the_same_commit_twice(folder, monkeypatch):
    calls = []

    def snapshot_download(repository, **arguments):
        calls.append((repository, arguments["revision"], arguments["token"]))
        return str(folder)

    monkeypatch.setattr("moe_gpu.huggingface.checkpoint.snapshot_download", snapshot_download)
    moe_gpu.load("some-one/some-model", slots=3, revision="v1", token="t")[1].close()
    assert calls == [("some-one/some-model", "v1", "t"), ("some-one/some-model", folder.name, "t")]


def quantized(folder):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))


def other_family(folder):
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9)).save_pretrained(folder)


def index_outside(folder):
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    weight_map = {"lm_head.weight": "../outside.safetensors"}
    text = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (quantized, ValueError, r"quantized \(gptq, 4 bits\).*{bf16} bytes"),
        (other_family, ValueError, "GPT2LMHeadModel has no MoE layer; known routers: Mixtral"),
        (lambda f: (f / "config.json").unlink(), ValueError, "the folder has no config.json"),
        (lambda f: (f / "model.safetensors").unlink(), CheckpointError, "safetensors"),
        (index_outside, CheckpointError, "outside.safetensors"),
        (lambda f: edit(f, **{W1.format(1, 3): None}), CheckpointError, "missing: 3"),
        (lambda f: edit(f, **{"model.norm.weight": None}), CheckpointError, "model.norm.weight"),
        (
            lambda f: edit(f, **{W1.format(0, 0): torch.zeros(5, 5)}),
            CheckpointError,
            r"w1.weight has shape \(5, 5\)",
        ),
        (
            lambda f: os.truncate(f / "model.safetensors", 100_000),
            CheckpointError,
            "100,000",
        ),
    ],
    ids=["quantized", "family", "no config", "no weights", "index", "expert", "dense", "shape",
         "truncated"],
)  # fmt: skip
def test_checkpoints(change, error, message, tmp_path, nothing_read):
    model = make_model()
    save(model, tmp_path)
    change(tmp_path)
    bf16 = f"{2 * sum(p.numel() for p in model.parameters()):,}"
    with pytest.raises(error, match=message.replace("{bf16}", bf16)):
        moe_gpu.load(tmp_path, slots=3)
    gc.collect()
    assert not open_files(tmp_path)


def test_neither_folder_nor_hub_id(tmp_path):
    with pytest.raises(ValueError, match="must be a folder or .*: there is no folder '.*missing'"):
        moe_gpu.load(tmp_path / "missing", slots=3)
    with pytest.raises(ValueError, match="must be a folder or an id on the hub, got ''"):
        moe_gpu.load("", slots=3)
    with pytest.raises(TypeError, match="must be a folder or an id on the hub, got None"):
        moe_gpu.load(None, slots=3)


def test_fewer_slots_than_one_token_needs(folder):
    with pytest.warns(RuntimeWarning, match="a pool of 2 slots is smaller than the 4") as caught:
        moe_gpu.load(folder, slots=1)[1].close()
    assert caught[0].filename == __file__  # whose call it is


# -- while loaded, and after


def test_saves_what_was_loaded(folder, tmp_path):
    reference = AutoModelForCausalLM.from_pretrained(folder)
    model, moe = moe_gpu.load(folder, slots=3, host_memory=5 * EXPERT_BYTES)
    with moe:
        logits_of(model, prompt())
        model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.state_dict().keys() == reference.state_dict().keys()
    for name, tensor in reference.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert again.generation_config == reference.generation_config


@pytest.mark.parametrize("host_memory", [None, 5 * EXPERT_BYTES, 0])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_detach_makes_an_ordinary_model(tied, host_memory, tmp_path):
    save(make_model(tie_word_embeddings=tied), tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path)
    model, moe = moe_gpu.load(tmp_path, slots=3, host_memory=host_memory)
    logits_of(model, prompt())
    moe.detach()
    assert "detached" in repr(moe) and not open_files(tmp_path)
    ours, theirs = dict(model.named_parameters()), dict(reference.named_parameters())
    assert list(ours) == list(theirs)
    for name, parameter in theirs.items():
        assert torch.equal(ours[name], parameter), name
        assert ours[name].requires_grad == parameter.requires_grad
        assert ours[name].dtype == parameter.dtype
    assert torch.equal(logits_of(model, prompt()), logits_of(reference, prompt()))
    loss = model(prompt(), labels=prompt()).loss
    loss.backward()
    assert model.model.layers[0].mlp.experts.down_proj.grad.abs().sum() > 0
    model.zero_grad()
    model.load_state_dict(reference.state_dict())
    model.float().to("cpu")
    with moe_gpu.attach(model.requires_grad_(False), slots=3):
        pass
    with pytest.raises(RuntimeError, match="already detached"):
        moe.close()


def test_detach_where_memory_is_short_changes_nothing(folder, monkeypatch):
    model, moe = moe_gpu.load(folder, slots=3, host_memory=5 * EXPERT_BYTES, policy=Exact())
    expected = logits_of(model, prompt())
    needed = (16 - 5 + 8) * EXPERT_BYTES  # what is on disk, and one layer twice
    with monkeypatch.context() as patch:
        patch.setattr(ATTACHED, "available_memory", lambda: needed - 1)
        message = rf"takes {needed:,} bytes more, {needed - 1:,} are available; close\(\)"
        with pytest.raises(MemoryError, match=message):
            moe.detach()
        assert "attached" in repr(moe)
        assert torch.equal(logits_of(model, prompt()), expected)
        patch.setattr(ATTACHED, "available_memory", lambda: needed)
        moe.detach()
    torch.testing.assert_close(logits_of(model, prompt()), expected)


def test_detach_that_failed_to_read_can_be_repeated(folder, monkeypatch):
    model, moe = moe_gpu.load(folder, slots=3, host_memory=0, policy=Exact())
    expected = logits_of(model, prompt())
    with monkeypatch.context() as patch:
        fail_reads_from(patch, layer=0)
        with pytest.raises(CheckpointError, match="unplugged"):
            moe.detach()
    with pytest.raises(RuntimeError):  # never with the weights of some slots
        logits_of(model, prompt())
    moe.detach()
    torch.testing.assert_close(logits_of(model, prompt()), expected)


@pytest.mark.parametrize("use", ["forward", "inner", "generate", "state_dict", "save"])
def test_a_closed_model_says_so(use, folder, tmp_path):
    model, moe = moe_gpu.load(folder, slots=3, host_memory=5 * EXPERT_BYTES)
    logits_of(model, prompt())
    loads, rows = moe.metrics().loads, weakref.ref(moe.offloader.store.expert(0, 0))
    moe.close()
    uses = {
        "forward": lambda: logits_of(model, prompt()),
        "inner": lambda: model.model(prompt()),
        "generate": lambda: text_of(model, prompt()),
        "state_dict": model.state_dict,
        "save": lambda: model.save_pretrained(tmp_path),
    }
    with pytest.raises(RuntimeError, match="this model was closed .* load it again"):
        uses[use]()
    assert not list(tmp_path.glob("*.safetensors"))
    gc.collect()
    assert rows() is None and not open_files(folder)
    assert moe.metrics().loads == loads and "closed" in repr(moe) and moe.status()
    for verb in (moe.close, moe.detach):
        with pytest.raises(RuntimeError, match="already closed"):
            verb()
    assert "resident" not in repr(moe)
    for again in (
        lambda: moe_gpu.attach(model, slots=3),
        lambda: moe_gpu.attach(model.model, slots=3),
    ):
        with pytest.raises(RuntimeError, match="this model was closed .* load it again"):
            again()
    with pytest.raises(RuntimeError, match=r"set_policy\(\) needs an attached .* is closed"):
        moe.set_policy(Exact())


def test_the_context_manager_closes(folder):
    model, moe = moe_gpu.load(folder, slots=3)
    with pytest.raises(KeyError), moe:
        raise KeyError
    assert "closed" in repr(moe)
    with moe:  # entered again: nothing left to do
        pass


def test_a_model_that_is_dropped_frees_everything(folder):
    before = threads()
    model, moe = moe_gpu.load(folder, slots=3, host_memory=0, prefetch=["next_gate"])
    text_of(model, prompt())
    assert threads() > before  # the pager's
    store = weakref.ref(moe.offloader.store)
    del model, moe
    gc.collect()
    assert store() is None and not open_files(folder)
    assert threads() <= before


# -- a failure in the middle


def fail_reads_from(patch, layer):
    """Let reads of one layer's experts fail."""
    read = Shards.read

    def fails(self, span, start, stop, out):
        if f"layers.{layer}.block_sparse_moe.experts" in span.name:
            raise CheckpointError("the disk was unplugged")
        read(self, span, start, stop, out)

    patch.setattr(Shards, "read", fails)


def no_room(*_, **__):
    raise RuntimeError("[enforce fail at alloc_cpu.cpp] can't allocate memory")


@pytest.mark.parametrize("where", ["read", "half a layer", "slots", "attach", "interrupt"])
def test_a_failure_leaves_nothing_half(where, tmp_path, monkeypatch):
    save(make_model(num_hidden_layers=4), tmp_path)
    locked, place = {}, LOAD.place
    monkeypatch.setattr(pinning, "page_lock", lambda m, _: locked.update({m.data_ptr(): m}))
    monkeypatch.setattr(pinning, "page_unlock", lambda m: locked.pop(m.data_ptr()))

    def place_as_on_cuda(L, E, size, pinned, host, **arguments):
        return place(L, E, size, host // 2, host, **arguments)

    monkeypatch.setattr(LOAD, "place", place_as_on_cuda)
    before, arguments = threads(), {"slots": 3, "host_memory": 20 * EXPERT_BYTES}
    most_locked = []
    with monkeypatch.context() as patch:
        fails = {"error": (CheckpointError, "unplugged")}
        if where == "read":
            fail_reads_from(patch, layer=2)
        elif where == "half a layer":  # its page-locked experts are in, the others are not
            read = Shards.read

            def read_some(self, span, start, stop, out):
                if ".layers.2.block_sparse_moe.experts.4." in span.name:
                    most_locked.append(len(locked))
                    raise CheckpointError("the disk was unplugged")
                read(self, span, start, stop, out)

            patch.setattr(Shards, "read", read_some)
        elif where == "slots":
            fails["error"] = MemoryError, "need .* bytes on cpu.*ask for fewer slots"
            empty = torch.empty

            def counted(*size, **options):
                if size and size[0] == (6 * 2, EXPERT_BYTES):
                    no_room()
                return empty(*size, **options)

            patch.setattr(torch, "empty", counted)
        elif where == "attach":
            fails["error"] = RuntimeError, "alloc"
            patch.setattr(ATTACHED, "switch_on", no_room)
        else:
            fails["error"] = KeyboardInterrupt, None

            def interrupted(*_, **__):
                raise KeyboardInterrupt

            patch.setattr(PART, "RoutedForward", interrupted)
        error, message = fails["error"]
        give_backs = []
        patch.setattr(
            "moe_gpu.huggingface.weights.ExpertWeights.give_back", lambda _: give_backs.append(1)
        )
        with pytest.raises(error, match=message) as caught:  # and what its frames hold
            moe_gpu.load(tmp_path, **arguments)
        assert not give_backs, "the whole model would go into host memory"
    assert not locked and threads() <= before and not open_files(tmp_path)
    del caught
    if where == "half a layer":
        assert most_locked == [3]

    model, moe = moe_gpu.load(tmp_path, **arguments)
    assert len(locked) == 4
    logits_of(model, prompt())
    moe.close()
    assert not locked
