"""The benchmarks run on any machine, say what they measured on, and refuse to time wrong results."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

PROFILING = Path(__file__).parents[1] / "profiling"
CONDITIONS = {"device", "torch", "transformers", "python", "commit", "cores", "threads"}
SPREAD = {"median", "p20", "p80", "p99"}


def run(script, out, prelude="", options=()):
    """Run a benchmark on the CPU in a process of its own, after some lines of code."""
    code = f"{prelude}\nimport runpy, sys\nsys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    arguments = [PROFILING / script, "--device", "cpu", "--quick", "--out", out, *options]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = os.pathsep.join(filter(None, [str(PROFILING), environment.get("PYTHONPATH")]))
    environment |= {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def results(script, folder, options=(), suffixes=("csv", "json", "md")):
    done = run(script, folder / "out.json", options=options)
    assert done.returncode == 0, done.stderr
    content = json.loads((folder / "out.json").read_text(encoding="utf-8"))
    text = (folder / "out.md").read_text(encoding="utf-8")
    assert set(content["conditions"]) >= CONDITIONS and content["conditions"]["quick"] is True
    measured = next(line for line in text.splitlines() if line.startswith("Measured on:"))
    for key in ("device", "torch", "commit"):
        assert str(content["conditions"][key]) in measured
    assert text.strip() in done.stdout  # the table that was printed
    assert sorted(path.name for path in folder.iterdir()) == [f"out.{name}" for name in suffixes]
    return content, text


def test_attached(tmp_path):
    content, text = results("bench_attached.py", tmp_path, suffixes=("json", "md"))
    fast = content["throughput"]
    stocks = {f"stock, {name}" for name in ("eager", "grouped_mm", "batched_mm")}
    ours = {"attached, Exact()", "attached, default"}
    generating = {"generate(), stock", "generate(), attached, default"}
    assert set(fast["tokens_per_s"]) == stocks | ours | generating
    for name in ours:
        assert set(fast["attached_over_stock"][name]) == stocks
    for figures in fast["tokens_per_s"].values():
        assert set(figures) == SPREAD and 0 < figures["p20"] <= figures["p80"]
    assert fast["generate_picks"] and fast["route_path"] == "reference"

    loads = {}
    for row in content["overhead"]:
        loads[row["resident"], row["policy"]] = row["loads_per_layer_and_step"]
        for name in ("stock_us", "attached_us", "route_us", "offloader_us"):
            assert row[name]["median"] > 0, name
        # a round's parts fit into it
        assert row["attached_us"]["p80"] > row["route_us"]["p20"] + row["offloader_us"]["p20"]
        assert set(row["added_us"]) == set(row["added_without_route_us"]) == SPREAD
    assert loads[1.0, "Exact()"] == loads[1.0, "default"] == 0 < loads[0.5, "Exact()"] <= 2

    resident, half = content["profile"]
    for case in (resident, half):
        calls = {row["function"]: row["calls"] for row in case["functions"]}
        assert calls["experts._mix"] == calls["record.read"] == 1
        assert calls["offloader._turns"] == 3  # two experts, and the end
        assert any(name.startswith("route call") for name in calls)
    assert "plan.plan_step" in {row["function"] for row in half["functions"]}
    assert "CPU time of the thread" in text


def test_loads(tmp_path):
    content, text = results("bench_offload.py", tmp_path, options=["--part", "loads"])
    loads = content["loads"]
    assert {row["from"] for row in loads["rows"]} == {
        "plain copy", "pageable", "disk, in the page cache", "disk, page cache dropped",
    }  # fmt: skip
    for row in loads["rows"]:
        assert row["gb_per_s"]["median"] > 0 and row["over_plain_copy"]["median"] > 0
        assert row["loads"] >= 8 and row["expert_mb"] == 1
    assert {"pinned"} == set(loads["skipped"]) and loads["skipped"]["pinned"] in text
    assert "link" not in content
    with (tmp_path / "out.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [float(line["gb_per_s_median"]) for line in lines] == [
        row["gb_per_s"]["median"] for row in loads["rows"]
    ]


def test_decode(tmp_path):
    content, text = results("bench_decode.py", tmp_path)
    decode = content["decode"]
    rows = {row["decode"]: row for row in decode["rows"]}
    moved = {name: row["mb_per_token"]["median"] for name, row in rows.items()}
    hits = {name: row["hit_rate"] for name, row in rows.items()}
    ours, synchronous = (
        f"{who}, half resident, Exact()" for who in ("moe-gpu", "synchronous copies")
    )
    assert moved["stock, all resident"] == moved["moe-gpu, all resident, Exact()"] == 0
    assert hits["moe-gpu, all resident, Exact()"] == 1 and hits["stock, all resident"] is None
    assert moved[ours] == moved[synchronous] > 0 and 0 < hits[ours] == hits[synchronous] < 1
    for row in rows.values():
        assert set(row["ms_per_token"]) == SPREAD and row["ms_per_token"]["p20"] > 0
    sizes = decode["model"]
    expert = 3 * sizes["hidden_size"] * sizes["intermediate_size"] * 4 / 1e6
    layers = sizes["num_hidden_layers"] * sizes["num_local_experts"] / 2
    assert moved["whole layers (stand-in for device_map)"] == pytest.approx(layers * expert)
    # a miss moves one expert, of two that each of the layers wants
    missed = (1 - hits[ours]) * 2 * sizes["num_hidden_layers"] * expert
    assert moved[ours] == pytest.approx(missed, rel=0.3)
    assert {row["over"] for row in decode["ratios"] if row["of"] == ours} == set(rows) - {ours}
    graphs = {name for name in decode["skipped"] if name.endswith(", graph")}
    assert len(graphs) == 2 and set(decode["skipped"]) - graphs == {"transformers device_map"}
    for reason in decode["skipped"].values():
        assert reason in text


def test_bytes_that_whole_modules_move(bench_decode, monkeypatch):
    """By construction, whether or not the logits were looked at before."""
    monkeypatch.setattr(bench_decode, "dispatch", lambda *_: None)
    cpu = torch.device("cpu")
    sizes = bench_decode.SMALL | {"hidden_size": 64, "intermediate_size": 32, "vocab_size": 50}
    stock = bench_decode.bench.random_mixtral(cpu, torch.float32, **sizes)
    text_T = torch.randint(50, (bench_decode.PROMPT + bench_decode.FEW,))
    run = bench_decode.dispatched(stock, text_T, cpu)
    with torch.no_grad():
        run.logits()
        for _ in range(2):
            run.token_s()
    experts = stock.model.layers[1].mlp.experts
    assert [moved for moved, _ in run.found] == [sum(p.nbytes for p in experts.parameters())] * 2


WRONG_EXPERTS = """
from moe_gpu.huggingface import experts
mix = experts._mix
experts._mix = lambda *arguments: mix(*arguments) * 1.01
"""
WRONG_BYTES = """
from moe_gpu.offload.store import ExpertStore
read_into = ExpertStore.read_into
def one_byte_off(self, layer, expert, start, stop, out):
    read_into(self, layer, expert, start, stop, out)
    out[-1] += 1
ExpertStore.read_into = one_byte_off
"""


@pytest.mark.parametrize(
    "script, prelude, message",
    [
        ("bench_attached.py", WRONG_EXPERTS, "attached, Exact() is wrong"),
        ("bench_offload.py", WRONG_BYTES, "is wrong: not timing it"),
        ("bench_decode.py", WRONG_EXPERTS, "moe-gpu, all resident, Exact() is wrong"),
    ],
)
def test_refuses_to_time_what_is_wrong(script, prelude, message, tmp_path):
    options = ["--part", "loads"] if script == "bench_offload.py" else []
    done = run(script, tmp_path / "out.json", prelude, options)
    assert done.returncode == 1 and message in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.fixture
def bench_decode(monkeypatch):
    monkeypatch.syspath_prepend(PROFILING)
    import bench_decode

    return bench_decode


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(PROFILING)
    return pytest.importorskip("_bench")


def test_every_round_starts_with_another_alternative(bench):
    order = []
    seconds = bench.interleave(
        {name: lambda name=name: order.append(name) or float(len(order)) for name in "abc"}, 3
    )
    assert "".join(order[3:]) == "abcbcacab"  # after the warm-up
    assert seconds == {"a": [4, 9, 11], "b": [5, 7, 12], "c": [6, 8, 10]}
    assert bench.ratio(seconds["a"], seconds["b"])["median"] == 11 / 12  # of 4/5, 9/7, 11/12


def test_a_file_appears_whole_or_not_at_all(bench, tmp_path, monkeypatch):
    path = tmp_path / "folder" / "file.json"
    bench.write_whole(path, "old")
    monkeypatch.setattr(bench.os, "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bench.write_whole(path, "new")
    assert path.read_text() == "old"


def test_what_was_not_measured_says_so(bench):
    lines = bench.table([{"case": "a", "us": 1.25}, {"case": "bb", "us": None}]).splitlines()
    assert lines[-1] == "| bb   | not measured |" and len({len(line) for line in lines}) == 1
