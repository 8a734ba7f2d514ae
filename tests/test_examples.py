"""The examples as a newcomer runs them: what they write, how they refuse, what Ctrl-C leaves."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)

import moe_gpu

EXAMPLES = Path(__file__).parent.parent / "examples"
DEMO = EXAMPLES / "mixtral_inference.py"

SIZES = {
    "vocab_size": 257,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
}


@pytest.fixture(scope="module", autouse=True)
def importable():
    """The parts of the demo, as the script itself finds them; and its one thread undone."""
    sys.path.insert(0, str(EXAMPLES))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    sys.path.remove(str(EXAMPLES))


def save(model, folder):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(["<end>", *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def random_mixtral(tmp_path_factory):
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=8))
    return save(model, tmp_path_factory.mktemp("random_mixtral"))


@pytest.fixture(scope="module")
def dense_model(tmp_path_factory):
    return save(MistralForCausalLM(MistralConfig(**SIZES)), tmp_path_factory.mktemp("dense"))


def environment():
    """As a newcomer has it: the kernels' interpreter is for tests of the kernels."""
    return {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}


def test_quickstart():
    child = subprocess.run(
        [sys.executable, EXAMPLES / "quickstart.py"],
        env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    assert "PagingRequest(layer=0" in child.stdout
    assert re.search(r"^5 tokens, hits [\d.]+%, swaps \d+$", child.stdout, re.MULTILINE)


def test_without_torch_it_says_what_to_do():
    child = subprocess.run(  # -S: without the packages of the environment
        [sys.executable, "-S", DEMO], env=environment(), capture_output=True, text=True
    )
    assert (child.returncode, child.stdout) == (2, "")
    assert child.stderr == (
        "mixtral_inference.py: error: torch is not installed for this Python: activate .venv "
        "(`. .venv/bin/activate`), or pip install '.[hf]'\n"
    )


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """One run of the demo on the model that comes along."""
    folder = tmp_path_factory.mktemp("quick")
    options = [
        "--quick",
        "--verify",
        "--json",
        folder / "out.json",
        "--profile",
        folder / "prof",
    ]
    child = subprocess.run(
        [sys.executable, DEMO, *options], env=environment(), capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr
    return SimpleNamespace(folder=folder, stdout=child.stdout)


def test_json_has_what_was_measured(quick):
    content = json.loads((quick.folder / "out.json").read_text())
    assert [row["policy"] for row in content["rows"]] == ["exact", "bonus:0.15", "quality:0.05"]
    for row in content["rows"]:
        assert 0 < row["hit_rate"] <= 1 and 1 < row["perplexity"] < 1000
        assert row["loads_per_token"] > 0 and row["tokens_per_second"] > 0
        assert set(row["perplexity_by_domain"]) == {"code", "prose", "structured"}
    exact, *others = content["rows"]
    assert exact["swaps_per_token"] == exact["perplexity_change_percent"] == 0
    for row in others:
        assert row["swaps_per_token"] > 0 and row["hit_rate"] > exact["hit_rate"]
    where = content["conditions"]
    assert where["slots"] * 2 == where["layers"] * where["experts"]
    assert where["model"] == "tiny_mixtral" and where["text"] == "held-out text"
    assert {"device", "threads", "dtype", "torch", "seed", "eval_tokens"} <= set(where)
    assert content["generations"][0]["text"]


def test_bytes_are_those_of_the_experts_loaded(quick):
    config = json.loads((EXAMPLES / "tiny_mixtral" / "config.json").read_text())
    numbers = 3 * config["hidden_size"] * config["intermediate_size"]
    for row in json.loads((quick.folder / "out.json").read_text())["rows"]:
        mb = row["loads_per_token"] * numbers * getattr(torch, config["dtype"]).itemsize / 1e6
        assert row["mb_per_token"] == pytest.approx(mb, rel=0.01)  # slots round up to 256 bytes


def test_screen_shows_text_table_and_conditions(quick):
    content = json.loads((quick.folder / "out.json").read_text())
    first = content["generations"][0]
    assert first["prompt"] + first["text"] in quick.stdout
    for row in content["rows"]:
        (line,) = [x for x in quick.stdout.splitlines() if x.startswith(row["policy"])]
        assert f"{row['hit_rate']:.1%}" in line and f"{row['perplexity']:.3f}" in line
    assert content["conditions"]["torch"] in quick.stdout
    said = " ".join(quick.stdout.split())
    assert "no claim about speed" in said or torch.cuda.is_available()
    assert "prompt 1 of 1, under quality:0.05" in said
    assert "96 tokens are too few to tell 0.1 % of perplexity apart." in said
    assert "disk" not in said


def test_verify_says_what_it_compared(quick):
    verdict = json.loads((quick.folder / "out.json").read_text())["verify"]
    assert verdict["passed"] and verdict["sentence"] in quick.stdout
    assert verdict["histories"] >= 5 and verdict["texts"] >= 4 and verdict["loads"] > 0


def test_trace_has_the_ranges_and_nothing_else_is_left(quick):
    (trace,) = (quick.folder / "prof").iterdir()
    assert trace.name.endswith(".pt.trace.json")
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"moe_gpu::route", "moe_gpu::page_in", "moe_gpu::experts"} <= names
    assert sorted(p.name for p in quick.folder.iterdir()) == ["out.json", "prof"]


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory):
    """A run of the demo that holds no expert in host memory."""
    folder = tmp_path_factory.mktemp("on_disk")
    options = "--quick --eval-tokens 8 --policy exact --prompt a --prompt b --host-memory 0"
    child = subprocess.run(
        [sys.executable, DEMO, *options.split(), "--profile", folder / "prof"],
        env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    return SimpleNamespace(folder=folder, stdout=child.stdout)


def test_trace_has_the_copies_of_the_other_thread(on_disk):
    (trace,) = (on_disk.folder / "prof").iterdir()
    events = json.loads(trace.read_text())["traceEvents"]
    threads = {
        name: {event["tid"] for event in events if event.get("name") == f"moe_gpu::{name}"}
        for name in ("page_in", "experts")
    }
    assert threads["page_in"] and not threads["page_in"] & threads["experts"]


def test_it_says_what_came_from_disk(on_disk):
    said = " ".join(on_disk.stdout.split())
    assert "Homes: 0 experts in host memory, 32 on disk; 100 % of the bytes came from disk." in said
    if not torch.cuda.is_available():
        assert "within this machine's memory, or from its disk: tokens/s here is no claim" in said


def test_prompts_are_numbered_and_apart(on_disk):
    first, second = (on_disk.stdout.index(f"prompt {i} of 2, under exact") for i in (1, 2))
    assert on_disk.stdout[first:second].endswith("\n\n")


@pytest.mark.parametrize(
    "loads, said",
    [
        ([(3, 1), (0, 4)], "; 62 % of the bytes came from disk"),
        ([(0, 0)], ""),  # every expert has a slot
    ],
)
def test_share_from_disk(loads, said):
    from demo.report import from_disk

    rows = [{"loads_by_tier": dict(zip(("pageable", "disk"), pair, strict=True))} for pair in loads]
    assert from_disk(rows) == said


def test_a_torch_without_the_option_traces_all_the_same(monkeypatch, tmp_path):
    from demo.trace import write_trace

    monkeypatch.setattr(torch._C._profiler, "_ExperimentalConfig", lambda: None)
    assert write_trace(tmp_path / "prof", lambda: torch.ones(1) + 1).is_file()


def test_ctrl_c_leaves_no_partial_file(tmp_path):
    options = ["--json", tmp_path / "out.json", "--profile", tmp_path / "prof", "--verify"]
    options += ["--quick", "--eval-tokens", "4096"]
    child = subprocess.Popen(
        [sys.executable, "-u", DEMO, *options],
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    for line in child.stdout:  # past the text and the trace, into the measurements
        if line.startswith("wrote "):
            break
    child.send_signal(signal.SIGINT)
    _, stderr = child.communicate(timeout=60)
    assert child.returncode == 130, stderr
    assert stderr.splitlines()[-1] == "mixtral_inference.py: interrupted, no partial file is left"
    assert "Traceback" not in stderr
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(left) == 1 and json.loads(left[0].read_text())["traceEvents"]  # written before


def test_ctrl_c_at_the_last_moment_keeps_the_old_json(tmp_path, monkeypatch):
    from demo.report import write_json

    path = tmp_path / "out.json"
    write_json(path, {"first": 1})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", interrupted)
        write_json(path, {"second": 2})
    assert json.loads(path.read_text()) == {"first": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_ctrl_c_while_tracing_leaves_nothing(tmp_path):
    from demo.trace import write_trace

    with pytest.raises(KeyboardInterrupt):
        write_trace(tmp_path / "prof", interrupted)
    assert not list(tmp_path.iterdir())


def test_ctrl_c_in_a_destructor_is_not_lost(monkeypatch):
    from demo import interrupt

    class Dropped:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    ignored = []
    monkeypatch.setattr(sys, "unraisablehook", lambda event: ignored.append(event.exc_type))
    with interrupt.noted():
        interrupt.check()
        dropped = Dropped()
        del dropped
        assert ignored == [KeyboardInterrupt]
        with pytest.raises(KeyboardInterrupt):
            interrupt.check()


def interrupted(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "tokens, lengths", [(1, [1]), (7, [3, 3, 1]), (1000, [256, 256, 256, 232])]
)
def test_every_domain_takes_part_in_the_measurement(tokens, lengths):
    from demo.checkpoint import EvalText, pick_rows

    rows = torch.arange(2 * 257).view(2, 257)
    picked = pick_rows(EvalText("", {"a": rows, "b": rows, "c": rows}), tokens)
    assert [len(row) - 1 for _, row in picked] == lengths
    assert [domain for domain, _ in picked] == ["a", "b", "c", "a"][: len(lengths)]


@pytest.mark.parametrize(
    "options, sentence",
    [
        ("--slots 0", "must be a whole number >= 1, got '0'"),
        ("--slots two", "must be a whole number >= 1, got 'two'"),
        ("--slots 2 --resident 0.5", "not allowed with argument --slots"),
        ("--resident 0", "must lie in (0, 1], got '0'"),
        ("--resident nan", "must lie in (0, 1], got 'nan'"),
        ("--policy lru", "must be exact, bonus[:B], mass[:M], quality[:Q] or all, got 'lru'"),
        ("--policy mass:-0.1", "needs a finite strength >= 0, got 'mass:-0.1'"),
        ("--policy bonus:inf", "needs a finite strength >= 0, got 'bonus:inf'"),
        ("--policy exact:1", "must be exact"),
        ("--max-new-tokens -3", "must be a whole number >= 1, got '-3'"),
        ("--seed -1", "must be a whole number in [0, 9223372036854775807], got '-1'"),
        ("--threads 9999", "must be a whole number in [1, 1024], got '9999'"),
        ("--dtype int8", "invalid choice: 'int8'"),
        ("--json .", "is a folder"),
        ("--json nowhere/out.json", "there is no folder nowhere"),
        ("--profile setup.py", "is not a folder"),
        ("--verbose", "unrecognized arguments: --verbose"),
    ],
)
def test_refuses_options(options, sentence, capsys, monkeypatch):
    monkeypatch.chdir(EXAMPLES.parent)
    with pytest.raises(SystemExit, match="2"):
        demo_main(options)
    check_refusal(capsys, sentence)


@pytest.mark.parametrize(
    "options, sentence",
    [
        ("--device tpu", "--device tpu: must be cuda, cuda:N or cpu"),
        ("--device cuda:99", "--device cuda:99: this machine has"),
        ("--slots 9", "slots must lie in [1, 8], the experts per layer, got 9"),
        ("--gpu-memory 5parsecs", "\"20GiB\", got '5parsecs'"),
        ("--gpu-memory 1KiB", "gpu_memory=1,024 bytes is too small"),
        ("--eval-tokens 999999999", "--eval-tokens 999999999: Python's help topics has"),
        ("--max-new-tokens 600", "over the model's limit of 512"),
        ("--prompt=", "--prompt '': the tokenizer makes no token of it"),
    ],
)
def test_refuses_what_does_not_fit_the_model(options, sentence, capsys, random_mixtral):
    assert demo_main(f"--model {random_mixtral} {options}") == 2
    check_refusal(capsys, sentence)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_refuses_a_folder_that_lacks_files(name, capsys, random_mixtral, tmp_path):
    folder = shutil.copytree(random_mixtral, tmp_path / "model")
    (folder / name).unlink()
    (folder / "tokenizer_config.json").unlink()
    assert demo_main(f"--model {folder}") == 2
    missing = "tokenizer_config.json" if name == "tokenizer.json" else name
    check_refusal(capsys, f"the checkpoint lacks {missing}")


@pytest.mark.parametrize(
    "index, sentence",
    [
        ({"weight_map": {"a": "model-2.safetensors"}}, "the checkpoint lacks model-2.safetensors"),
        ({"weight_map": {"a": "../model.safetensors"}}, "names '../model.safetensors', outside"),
        ({"weights": {}}, "model.safetensors.index.json is not an index"),
    ],
)
def test_refuses_a_wrong_index(index, sentence, capsys, random_mixtral, tmp_path):
    folder = shutil.copytree(random_mixtral, tmp_path / "model")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert demo_main(f"--model {folder}") == 2
    check_refusal(capsys, sentence)


def test_refuses_a_damaged_file(capsys, random_mixtral, tmp_path):
    folder = shutil.copytree(random_mixtral, tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"cut")
    assert demo_main(f"--model {folder}") == 2
    check_refusal(capsys, f"--model {folder}: ")


def test_refuses_a_model_without_experts(capsys, dense_model):
    assert demo_main(f"--model {dense_model}") == 2
    check_refusal(capsys, "MistralForCausalLM has no MoE layer")


@pytest.mark.parametrize(
    "name, sentence",
    [
        ("./nowhere", "--model ./nowhere: there is no such folder"),
        ("somebody/no-such-model", "--model somebody/no-such-model: "),  # a hub id, offline
    ],
)
def test_refuses_a_model_that_is_not_there(name, sentence, capsys):
    assert demo_main(f"--model {name}") == 2
    check_refusal(capsys, sentence)


def test_a_single_id_has_nothing_to_decode(random_mixtral):
    from demo.measure import decode

    model = AutoModelForCausalLM.from_pretrained(random_mixtral)
    assert list(decode(model, torch.tensor([1]))) == []


def test_verify_tells_a_difference(random_mixtral):
    from demo.verify import verify

    model, twin = (AutoModelForCausalLM.from_pretrained(random_mixtral) for _ in range(2))
    moe = SimpleNamespace(set_policy=lambda policy: None, metrics=lambda: moe_gpu.Metrics())
    texts = [("text", torch.arange(1, 30))]
    assert verify(model, moe, twin, texts, lambda *_: None)["passed"]
    with torch.no_grad():
        twin.lm_head.weight[5, 5] += 1e-3
    verdict = verify(model, moe, twin, texts, lambda *_: None)
    assert not verdict["passed"] and "differs" in verdict["sentence"]


def test_a_difference_is_exit_status_1(random_mixtral, monkeypatch, capsys):
    import demo.verify

    verdict = {"passed": False, "sentence": "exact routing differs"}
    monkeypatch.setattr(demo.verify, "verify", lambda *_: verdict)
    options = "--policy exact --prompt a --max-new-tokens 1 --eval-tokens 2 --verify"
    assert demo_main(f"--model {random_mixtral} {options}") == 1
    assert "verify: exact routing differs" in capsys.readouterr().out


def demo_main(options):
    from mixtral_inference import main

    return main(options.split())


def check_refusal(capsys, sentence):
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("mixtral_inference.py: error: ") and sentence in line
