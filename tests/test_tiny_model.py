"""The tiny model's recipe: its text, that a killed run resumes, and that its page tells the truth."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

EXAMPLES = Path(__file__).parents[1] / "examples"
TINY = EXAMPLES / "tiny_mixtral"
sys.path.append(str(EXAMPLES))

import corpus  # noqa: E402
import structured_text  # noqa: E402
import train_tiny  # noqa: E402


def test_a_file_is_on_one_side_by_its_name():
    names = [f"package/module_{i}.py" for i in range(2400)]
    held_out = [name for name in names if corpus.is_held_out(name)]
    assert 150 <= len(held_out) <= 250  # one in twelve
    assert held_out == [name for name in names if corpus.is_held_out(name)]


@pytest.fixture(scope="module")
def text():
    return corpus.build_corpus(seed=0, structured_files=300)


def test_no_document_is_on_both_sides(text):
    assert set(text) == {"code", "prose", "structured"}
    for domain, split in text.items():
        assert len(split.train) > 5 * len(split.held_out) > 0, domain
        assert not set(split.train) & set(split.held_out), domain


def test_domains_look_their_part(text):
    assert sum("def " in document for document in text["code"].train) > 300
    assert not any('"""Return' in document for document in text["code"].train)
    prose = " ".join(text["prose"].train)
    assert prose.count(" the ") > 10_000


def test_structured_text_is_reproducible_and_right():
    files = [structured_text.structured_file(0, index) for index in range(60)]
    assert files == [structured_text.structured_file(0, index) for index in range(60)]
    sums = re.findall(r"^(\d+) ([+-]) (\d+) = (\d+)$", "\n".join(files), flags=re.MULTILINE)
    assert len(sums) > 20
    for a, sign, b, c in sums:
        assert int(a) + (int(b) if sign == "+" else -int(b)) == int(c)
    objects = [line for line in "\n".join(files).splitlines() if re.match(r'^\{"name".*\}$', line)]
    assert objects and all(isinstance(json.loads(line), dict) for line in objects)


def test_shipped_model_is_what_its_record_says():
    record = json.loads((TINY / "training.json").read_text())
    rows = load_file(TINY / "held_out.safetensors")
    assert {domain: list(r.shape) for domain, r in rows.items()} == record["held_out_rows"]
    assert sum(f.stat().st_size for f in TINY.iterdir()) <= 16 * 2**20
    model = AutoModelForCausalLM.from_pretrained(
        TINY, dtype=torch.float32, experts_implementation="eager"
    ).eval()
    assert AutoTokenizer.from_pretrained(TINY).vocab_size <= model.config.vocab_size
    with torch.no_grad():
        logits = model(rows["structured"][:, :-1].long()).logits.float()
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), rows["structured"][:, 1:].long().flatten()
    )
    # the record rounds to two or three decimals
    assert loss.exp().item() == pytest.approx(record["perplexity"]["structured"], rel=2e-3)
    assert f"{record['perplexity']['code']:.2f}" in (TINY / "README.md").read_text()


RECIPE = (
    "--steps 4 --batch 2 --warmup 1 --layers 1 --experts 4 --top-k 2 --width 32 --expert-width 16 "
    "--heads 2 --kv-heads 1 --vocab 300 --checkpoint-every 2 --threads 1 --device cpu"
).split()


def test_training_goes_through_the_gates(monkeypatch, tmp_path):
    """And follows the losses of a model without gates, whose weights it leaves."""
    monkeypatch.setattr(sys, "argv", ["train_tiny.py", *RECIPE])
    args = train_tiny.parse_args()

    def batches(step):
        return torch.randint(300, (2, 257), generator=torch.Generator().manual_seed(step))

    trainer, plain = train_tiny.Trainer(args, batches), train_tiny.Trainer(args, batches)
    assert type(plain.finish()) is type(trainer.model) and not plain.moe._attached
    losses = [(trainer.train_step(), plain.train_step()) for _ in range(4)]
    assert all(loss == pytest.approx(other, rel=1e-3) for loss, other in losses)
    assert trainer.moe.metrics().tokens == 4 * 2 * 256 and trainer.moe.metrics().swaps == 0
    trainer.save(tmp_path / "checkpoint.pt", {})
    steps = trainer.step
    trainer.train_step()
    trainer.load(tmp_path / "checkpoint.pt", {})
    assert trainer.step == steps
    model = trainer.finish()
    bound = 0.05 * max(p.abs().max() for p in plain.model.parameters())
    for (name, p), q in zip(model.named_parameters(), plain.model.parameters(), strict=True):
        assert (p - q).abs().max() < bound, name


def train(out, *options):
    command = [sys.executable, str(EXAMPLES / "train_tiny.py"), "--out", str(out)]
    return subprocess.run([*command, *RECIPE, *options], capture_output=True, text=True)


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_weights(tmp_path):
    """Three runs that each read the standard library: for make test-all."""
    whole = train(tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    command = [sys.executable, str(EXAMPLES / "train_tiny.py"), "--out", str(tmp_path / "killed")]
    child = subprocess.Popen(
        [*command, *RECIPE], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    checkpoint = tmp_path / "killed" / "checkpoint.pt"
    while child.poll() is None and not checkpoint.exists():
        time.sleep(0.05)
    child.kill()
    child.wait()
    assert checkpoint.exists() and not (tmp_path / "killed" / "training.json").exists()
    resumed = train(tmp_path / "killed")
    assert resumed.returncode == 0, resumed.stderr
    a, b = (load_file(tmp_path / run / "model.safetensors") for run in ("whole", "killed"))
    assert all(torch.equal(a[name], b[name]) for name in a)
