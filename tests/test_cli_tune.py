"""python -m moe_gpu tune: what is printed, and refusals before weights are read."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
import transformers  # noqa: E402

import moe_gpu  # noqa: E402
from mixtral import make_model, without_interpreter  # noqa: E402, F401
from moe_gpu.__main__ import main  # noqa: E402
from moe_gpu.tuning.texts import rows_of  # noqa: E402

ROOT = Path(__file__).parent.parent
TINY = ROOT / "examples" / "tiny_mixtral"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def loud_again():
    """The command silences transformers for its process, which goes on here."""
    yield
    transformers.logging.enable_progress_bar()
    transformers.logging.set_verbosity_warning()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of the shipped one's vocabulary, hundreds of times smaller."""
    folder = tmp_path_factory.mktemp("model")
    make_model(seed=1, vocab_size=2048).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((TINY / name).read_bytes())
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.md"
    path.write_text((ROOT / "README.md").read_text(encoding="utf-8")[:6000], encoding="utf-8")
    return path


def run(capsys, folder, *arguments):
    assert main(["tune", str(folder), *map(str, arguments)]) == 0
    return capsys.readouterr()


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as exit:
        main(["tune", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert exit.value.code == 2 and out == ""
    assert err.count("\n") == 1, err
    return err


def test_table_on_stdout_progress_on_stderr(folder, text, tmp_path, capsys):
    options = ("--slots", 4, "--rows", 12, "--tokens", 16, "--max-perplexity", 2)
    out, err = run(capsys, folder, "--text", text, *options, "--out", tmp_path / "new" / "folder")
    assert out.startswith("mixtral: 2 MoE layers of 8 experts of 18.00 KiB, 2 per token\n")
    assert "Text: 9 rows of 16 tokens measured; 3 others calibrated the layers" in out
    assert "Note: 9 measured rows are too few to tell" in out
    assert out.splitlines()[-1].startswith("moe = moe_gpu.attach(model, slots=4, policy=policy")
    assert "4 of 8 resident" in err and "Warning" not in err
    saved = moe_gpu.TuneResult.load(tmp_path / "new" / "folder")
    assert str(saved) + "\n" == out


def test_json_is_the_result(folder, text, capsys):
    options = ("--resident", 0.5, "--rows", 12, "--tokens", 16, "--seed", 3, "--dtype", "float32")
    out, _ = run(capsys, folder, "--text", text, text, *options, "--json")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = [text.read_text(encoding="utf-8")] * 2
    model = make_model(seed=1, vocab_size=2048)
    rows_NT = rows_of(texts, tokenizer, 16, 12)
    with pytest.warns(UserWarning, match="too few to tell"):
        result = moe_gpu.tune(model, rows_NT, resident=0.5, seed=3, progress=False)
    found, want = json.loads(out), json.loads(json.dumps(result.as_dict()))
    assert found.keys() == want.keys() and found["recommended"]["slots"] == 4
    for a, b in zip(found["table"], want["table"], strict=True):
        assert (a["slots"], a["budget"], a["eviction"]) == (b["slots"], b["budget"], b["eviction"])
        assert a["loads_per_token"] == b["loads_per_token"]
        assert a["perplexity"] == pytest.approx(b["perplexity"], rel=1e-4)


@pytest.mark.filterwarnings("error::RuntimeWarning")  # fewer slots than a token needs
def test_a_model_larger_than_the_device(folder, text, capsys):
    options = ("--rows", 12, "--tokens", 16, "--max-perplexity", 2)
    whole, _ = run(capsys, folder, "--text", text, *options, "--slots", 4, 6)
    offloaded, _ = run(capsys, folder, "--text", text, *options, "--slots", 4, 6, "--offload")
    # in another order of sums the last digits of a change may differ
    assert [line[:52] for line in offloaded.splitlines()] == [
        line[:52] for line in whole.splitlines()
    ]
    memory, _ = run(capsys, folder, "--text", text, *options, "--gpu-memory", "1GiB", "--offload")
    assert "exact routing with 8 of 8 experts resident" in memory


@pytest.mark.parametrize(
    "options, message",
    [
        (["--slots", 1], "slots must hold the 2 experts of one token in every layer, got 1"),
        (["--slots", 9], "slots"),
        (["--slots", "x"], "invalid int value"),
        (["--resident", 1.5], "resident must be a share in (0, 1] or an int, got 1.5"),
        (["--resident", "half"], "argument --resident: invalid"),
        (["--slots", 4, "--resident", 0.5], "not allowed with argument"),
        (["--gpu-memory", "24"], "gpu_memory needs a unit"),
        (["--gpu-memory", "1kB"], "too small"),
        (["--max-perplexity", "-1"], "max_perplexity_increase must be finite and >= 0, got -1.0"),
        (["--max-perplexity", "nan"], "max_perplexity_increase must be finite and >= 0, got nan"),
        (["--rows", 0], "rows must be >= 1, got 0"),
        (["--rows", 1, "--tokens", 16], "at least 2 rows of text are needed"),
        (["--tokens", 0], "tokens must be >= 1, got 0"),
        (["--tokens", 100_000], "one row of 100001 tokens, got"),
        (["--tokens", 200], "tokens must be <= 128 for this model"),
        (["--dtype", "int8"], "invalid choice"),
        (["--device", "toaster"], "device toaster: "),
    ],
)
def test_refused_options(options, message, folder, text, capsys):
    assert message in refused(capsys, folder, "--text", text, *options)


def test_refused_before_weights_are_read(folder, text, capsys, monkeypatch):
    def read(*_, **__):
        raise AssertionError("weights were read")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", read)
    for options in (["--slots", 1], ["--rows", 1], ["--max-perplexity", -1], ["--tokens", 200]):
        refused(capsys, folder, "--text", text, *options)


def test_refused_files(folder, text, tmp_path, capsys):
    assert "the following arguments are required: --text" in refused(capsys, folder)
    missing = tmp_path / "missing"
    assert f"text {missing}: No such file" in refused(capsys, folder, "--text", missing)
    assert f"text {tmp_path}: Is a directory" in refused(capsys, folder, "--text", tmp_path)
    binary = tmp_path / "binary"
    binary.write_bytes(b"abc\xff")
    assert f"text {binary}: not UTF-8, invalid start byte at byte 3" in refused(
        capsys, folder, "--text", binary
    )
    assert "the folder has no config.json" in refused(capsys, tmp_path, "--text", text)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert "BertLMHeadModel has no MoE layer" in refused(capsys, tmp_path, "--text", text)
    (tmp_path / "config.json").write_bytes((TINY / "config.json").read_bytes())
    assert f"tokenizer of {tmp_path}: " in refused(capsys, tmp_path, "--text", text)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((TINY / name).read_bytes())
    assert f"model of {tmp_path}: " in refused(capsys, tmp_path, "--text", text, "--tokens", 16)


def test_without_matplotlib(folder, text, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    options = ("--text", text, "--out", tmp_path / "out")
    assert "tune.png needs matplotlib: pip install matplotlib" in refused(capsys, folder, *options)
    assert not (tmp_path / "out").exists()


def test_a_child_process(folder, text):
    options = ["--text", text, "--slots", "2", "--rows", "6", "--tokens", "8"]
    child = subprocess.run(
        [sys.executable, "-m", "moe_gpu", "tune", folder, *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr
    assert "pool=False" in child.stdout and "2 of 8 resident" in child.stderr
    assert "Warning" not in child.stderr and "Traceback" not in child.stderr
