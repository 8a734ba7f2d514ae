"""A warm restart: the second start begins with what the first one ended with."""

import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import moe_gpu
from checkpoints import save
from mixtral import (  # noqa: F401 - the last is a fixture that runs by itself
    EXPERTS,
    LAYERS,
    logits_of,
    make_model,
    prompt,
    text_of,
    without_interpreter,
)
from moe_gpu import Exact, files
from moe_gpu.offload.residency import FORMAT, Residency

TINY = "examples/tiny_mixtral"
TEXT = "def add(a, b):\n    return a + b\n\n\ndef sub(a, b):\n    return"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Shared: nobody writes into it."""
    return save(make_model(), tmp_path_factory.mktemp("mixtral"))


@pytest.fixture(scope="module")
def used(folder, tmp_path_factory):
    """A file after some text with four slots a layer, and the residency in it."""
    file = tmp_path_factory.mktemp("residency") / "hot.safetensors"
    with moe_gpu.load(folder, slots=4, policy=Exact())[1] as moe:
        for seed in range(3):
            text_of(moe.model, prompt(seed), tokens=6)
        moe.save_residency(file)
    return file


def start(way, folder, **arguments):
    if way == "load":
        return moe_gpu.load(folder, **arguments)[1]
    return moe_gpu.attach(AutoModelForCausalLM.from_pretrained(folder), **arguments)


def residents(moe):
    return [moe.offloader.residents(layer) for layer in range(moe.state.num_layers)]


# -- what comes back


@pytest.mark.parametrize("way", ["attach", "load"])
def test_everything_comes_back_bit_for_bit(way, folder, used, tmp_path):
    kept = Residency.load(used)
    with start(way, folder, slots=4, residency=used, policy=Exact()) as moe:
        state, before = moe.state, moe.metrics()
        assert torch.equal(state.affinity_LE, kept.affinity_LE)
        assert torch.equal(state.activations_LE, kept.activations_LE)
        assert before.loads == 0 and before.filled == LAYERS * 4 and before.tokens == 0
        assert residents(moe) == [row.nonzero().flatten().tolist() for row in kept.resident_LE]
        assert [h.affinity for h in moe.offloader.cache.histories] == kept.affinity_LE.tolist()
        moe.save_residency(tmp_path / "again")
    again = Residency.load(tmp_path / "again")
    for name, tensor in vars(kept).items():
        mask = kept.uses_LE > 0 if name == "ages_LE" else slice(None)  # never used: just old
        assert torch.equal(getattr(again, name)[mask], tensor[mask]), name


@pytest.mark.parametrize("eviction", ["lru", "lfu", "affinity", "affinity_over_age"])
@pytest.mark.parametrize("pool", [False, True], ids=["per-layer", "pool"])
def test_goes_on_as_if_it_had_never_stopped(pool, eviction, folder, tmp_path):
    """The same victims and the same loads as the run that was not interrupted."""
    arguments = {"slots": 3, "pool": pool, "eviction": eviction, "policy": Exact()}
    # boosts that do not saturate, so that recency and affinity disagree
    arguments |= {"boost": 0.3, "max_score": 5.0, "decay": 0.9}
    with moe_gpu.load(folder, **arguments)[1] as moe:
        for seed in range(3):
            text_of(moe.model, prompt(seed), tokens=6)
        moe.save_residency(tmp_path / "r")
        moe.reset_metrics()
        expected = [steps(moe, seed) for seed in range(3, 6)]
    with moe_gpu.load(folder, residency=tmp_path / "r", **arguments)[1] as moe:
        assert [steps(moe, seed) for seed in range(3, 6)] == expected


def steps(moe, seed):
    """Take a few steps; who is resident then, and how much has been loaded."""
    text_of(moe.model, prompt(seed, tokens=2), tokens=3)
    metrics = moe.metrics()
    return residents(moe), metrics.hits, metrics.loads, metrics.evictions


@pytest.mark.parametrize("way", ["attach", "load"])
@pytest.mark.parametrize("slots", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("pool", [False, True], ids=["per-layer", "pool"])
@pytest.mark.filterwarnings("ignore:.*experts (of|that) one token")
def test_any_number_of_slots_holds_the_hottest(pool, slots, way, folder, used):
    heat_LE = Residency.load(used).heat()
    with start(way, folder, slots=slots, pool=pool, residency=used) as moe:
        chosen = {(la, e) for la, row in enumerate(residents(moe)) for e in row}
        assert len(chosen) == slots * LAYERS
        everybody = {(la, e) for la in range(LAYERS) for e in range(EXPERTS)}
        for group in (
            [everybody] if pool else [{p for p in everybody if p[0] == la} for la in (0, 1)]
        ):
            inside = [heat_LE[la][e] for la, e in group & chosen]
            outside = [heat_LE[la][e] for la, e in group - chosen]
            assert not outside or min(inside) >= max(outside)
        logits_of(moe.model, prompt())


@pytest.mark.parametrize("way", ["attach", "load"])
@pytest.mark.parametrize("slots", [3, 4])
def test_the_first_tokens_hit_more_often(slots, way, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    first, second = ids[:, :-8], ids[:, -8:]
    arguments = {"slots": slots, "policy": Exact(), "pool": False}
    with start(way, TINY, **arguments) as moe:
        text_of(moe.model, first, tokens=12)
        moe.save_residency(tmp_path / "r")
    rates = {}
    for name, warm in (("cold", {}), ("warm", {"residency": tmp_path / "r"})):
        with start(way, TINY, **arguments, **warm) as moe:
            for token in second[0, :4]:
                logits_of(moe.model, token.view(1, 1))
            rates[name] = moe.metrics().hit_rate
    assert rates["warm"] > rates["cold"] + 0.05, rates


def test_output_does_not_depend_on_it(folder, used):
    logits = []
    for arguments in ({}, {"residency": used}):
        with moe_gpu.load(folder, slots=3, policy=Exact(), **arguments)[1] as moe:
            logits.append(logits_of(moe.model, prompt()))
    assert torch.equal(*logits)


def test_can_be_saved_after_the_end_and_to_a_folder_that_exists(folder, tmp_path):
    _, moe = moe_gpu.load(folder, slots=3)
    text_of(moe.model, prompt())
    file = tmp_path / "none" / "r"
    with pytest.raises(FileNotFoundError, match=f"path='{file}' .* no folder '{file.parent}'"):
        moe.save_residency(file)
    assert not list(tmp_path.iterdir())
    moe.save_residency(tmp_path / "before")
    moe.close()
    moe.save_residency(tmp_path / "after")
    assert (tmp_path / "before").read_bytes() == (tmp_path / "after").read_bytes()


# -- the file


@pytest.mark.parametrize("stage", ["save_file", "os.replace"])
def test_a_file_appears_whole_or_not_at_all(stage, used, tmp_path, monkeypatch):
    kept, file = Residency.load(used), tmp_path / "r"

    def fails(tensors, path, *_, **__):
        with open(path if stage == "save_file" else tensors, "ab") as partial:
            partial.write(b"half")
        raise OSError("no space left on device")

    for earlier in (None, b"what was there before"):
        if earlier:
            file.write_bytes(earlier)
        with monkeypatch.context() as patch:
            if stage == "save_file":
                patch.setattr(files, "save_file", fails)
            else:
                patch.setattr(os, "replace", fails)
            with pytest.raises(OSError, match="no space left"):
                kept.save(file)
        assert [path.name for path in tmp_path.iterdir()] == ([file.name] if earlier else [])
    assert file.read_bytes() == b"what was there before"
    kept.save(file)
    assert file.read_bytes() == used.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def rewrite(file, metadata=None, **changes):
    tensors = load_file(file)
    for name, tensor in changes.items():
        tensors.pop(name)
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, file, {"format": FORMAT} if metadata is None else metadata)


REFUSED = {
    "another tool's": (lambda f: rewrite(f, {}), "is not a file of save_residency"),
    "another version": (lambda f: rewrite(f, {"format": "x 2"}), "is not a file of save_residency"),
    "truncated": (lambda f: os.truncate(f, 200), "cannot be read"),
    "a byte short": (lambda f: os.truncate(f, f.stat().st_size - 1), "cannot be read"),
    "empty": (lambda f: os.truncate(f, 0), "cannot be read"),
    "text": (lambda f: f.write_text("not safetensors at all"), "cannot be read"),
    "a tensor missing": (lambda f: rewrite(f, uses_LE=None), "cannot be read.*uses_LE"),
    "another shape": (lambda f: rewrite(f, uses_LE=torch.zeros(2, 7)), "is damaged"),
    "no rows": (lambda f: rewrite(f, **{name: torch.zeros(16) for name in NAMES}), "is damaged"),
    "not finite": (lambda f: rewrite(f, affinity_LE=torch.full((2, 8), torch.nan)), "is damaged"),
}
NAMES = ("affinity_LE", "activations_LE", "resident_LE", "ages_LE", "uses_LE")


@pytest.mark.parametrize("way", ["attach", "load"])
@pytest.mark.parametrize("damage", REFUSED)
def test_refuses_what_it_did_not_write(damage, way, folder, used, tmp_path):
    file = tmp_path / "r.safetensors"
    file.write_bytes(used.read_bytes())
    change, message = REFUSED[damage]
    change(file)
    with pytest.raises(ValueError, match=f"residency='{file}' {message}"):
        start(way, folder, slots=3, residency=file)


@pytest.mark.parametrize("way", ["attach", "load"])
def test_refuses_another_model_and_no_file(way, folder, used, tmp_path):
    sizes = {"num_hidden_layers": 1, "num_local_experts": 4}
    other = save(make_model(**sizes), tmp_path / "other")
    with pytest.raises(ValueError, match="is of 2 layers of 8 experts, the model has 1 of 4"):
        start(way, other, slots=3, residency=used)
    for missing in (tmp_path / "none", tmp_path):
        with pytest.raises(OSError):
            start(way, folder, slots=3, residency=missing)
