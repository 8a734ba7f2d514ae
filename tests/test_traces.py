"""Traces: their figures are what stands in them, and TensorBoard's plugin serves our ranges."""

import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

PROFILING = Path(__file__).parents[1] / "profiling"
LAYERS = 4  # of the tiny model
TOKENS = 3  # that --quick decodes


@pytest.fixture
def figures(monkeypatch):
    monkeypatch.syspath_prepend(PROFILING)
    return pytest.importorskip("_trace_figures")


# -- figures, by hand


@pytest.mark.parametrize(
    "spans, others, together, length",
    [
        ([(0, 10)], [(10, 20)], 0, 10),  # touching
        ([(0, 10)], [(2, 3), (4, 6)], 3, 10),
        ([(0, 10)], [(-5, 2), (8, 30)], 4, 10),
        ([(0, 4), (2, 6)], [(1, 5), (3, 8)], 5, 6),  # overlapping ones count once
        ([(8, 9), (0, 1)], [(0, 9)], 2, 2),  # in any order
        ([(0, 3), (5, 8)], [(2, 6), (7, 20)], 3, 6),  # one that spans two, two in one
        ([], [(0, 1)], 0, 0),
    ],
)
def test_time_that_spans_share(figures, spans, others, together, length):
    spans, others = ([figures.Span(*span) for span in given] for given in (spans, others))
    assert figures.shared_us(spans, others) == together == figures.shared_us(others, spans)
    assert figures.length_us(spans) == length


def event(cat, name, ts, dur, tid=1, **args):
    """An event as torch writes it."""
    return {"ph": "X", "cat": cat, "name": name, "pid": 7, "tid": tid, "ts": ts, "dur": dur,
            "args": args}  # fmt: skip


def memory(device_type, total):
    args = {"Device Type": device_type, "Device Id": 0, "Bytes": 1, "Total Allocated": total}
    return {"ph": "i", "cat": "cpu_instant_event", "name": "[memory]", "ts": 0, "pid": 7, "tid": 1,
            "args": args}  # fmt: skip


def on_gpu(cat, name, ts, dur, stream, correlation, **args):
    return event(cat, name, ts, dur, stream, correlation=correlation, **args) | {"pid": 0}


DEVICE_TRACE = [
    {"ph": "M", "name": "process_name", "ts": 0, "pid": 7, "tid": 0, "args": {}},
    event("user_annotation", "ProfilerStep#1", 0, 100),
    event("user_annotation", "moe_gpu::route", 0, 10),
    event("cuda_runtime", "cudaStreamIsCapturing", 1, 1, correlation=1),  # leads to nothing
    event("cuda_driver", "cuLaunchKernelEx", 3, 2, correlation=2),
    event("user_annotation", "moe_gpu::route", 20, 20),
    event("cuda_driver", "cuLaunchKernelEx", 22, 2, correlation=3),
    event("cuda_runtime", "cudaGraphLaunch", 30, 2, correlation=4),
    event("cuda_driver", "cuLaunchKernelEx", 25, 2, tid=2, correlation=5),  # another thread's
    event("cuda_runtime", "cudaLaunchKernel", 50, 2, correlation=6),  # in no range
    event("user_annotation", "moe_gpu::page_in", 52, 9, tid=2),
    event("cuda_runtime", "cudaMemcpyAsync", 53, 2, tid=2, correlation=7),
    event("cuda_runtime", "cudaMemcpyAsync", 60, 1, tid=2, correlation=8),
    event("cuda_runtime", "cudaMemcpyAsync", 70, 1, correlation=9),  # not a load
    on_gpu("kernel", "route_kernel", 5, 4, 7, 2),
    on_gpu("kernel", "route_kernel", 24, 2, 7, 3),
    on_gpu("kernel", "gemm", 33, 5, 7, 4),
    on_gpu("kernel", "route_kernel", 38, 2, 7, 4),
    on_gpu("kernel", "other", 41, 1, 7, 5),
    on_gpu("kernel", "experts", 55, 25, 7, 6),
    on_gpu("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 60, 10, 20, 7, bytes=1000),
    on_gpu("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 70, 30, 20, 8, bytes=3000),
    on_gpu("gpu_memcpy", "Memcpy HtoD (Pageable -> Device)", 100, 1, 7, 9, bytes=32),
    event("gpu_user_annotation", "moe_gpu::route", 5, 4, 7),
    memory(1, 500), memory(1, 900), memory(1, 100), memory(0, 64), memory(20, 10**9),
]  # fmt: skip


def test_figures_of_a_gpu_trace(figures):
    got = figures.summarize(DEVICE_TRACE)
    route = got["ranges"]["moe_gpu::route"]
    # one launch, then a launch and a graph of two kernels: 4, and 2 + 7 us
    assert route == {
        "count": 2, "host_us": 15, "launches": 1.5, "device_work": 2, "device_us": 6.5,
    }  # fmt: skip
    assert set(got["ranges"]) == {"moe_gpu::route", "moe_gpu::page_in"}
    assert got["device_ranges"] == ["moe_gpu::route"]
    # 60 to 100, of which the experts' kernel covers 60 to 80
    assert got["loads"] == {
        "count": 1, "bytes": 4000, "us": 40, "threads": 1, "overlap": 0.5,
    }  # fmt: skip
    assert got["peak_bytes"] == {"cuda": 900, "host": 64}


def test_figures_of_a_cpu_trace(figures):
    moved = {"Input Dims": [[100], [100], []]}
    got = figures.summarize(
        [
            event("user_annotation", "moe_gpu::page_in", 0, 10),
            event("cpu_op", "aten::copy_", 1, 5, **moved),
            event("cpu_op", "aten::mm", 12, 10),  # 20 to 22 beside the other thread's load
            event("user_annotation", "moe_gpu::page_in", 20, 10, tid=2),
            event("cpu_op", "aten::copy_", 21, 5, tid=2, **moved),
            event("cpu_op", "aten::copy_", 40, 5, **moved),  # no load
        ]
    )
    assert got["loads"] == {
        "count": 2, "bytes": 200, "us": 20, "threads": 2, "overlap": 0.1,
    }  # fmt: skip
    page_in = got["ranges"]["moe_gpu::page_in"]
    assert page_in["launches"] is page_in["device_us"] is got["peak_bytes"] is None
    assert figures.summarize([])["loads"] is None


def test_a_report_says_what_is_not_measured(figures):
    traces = pytest.importorskip("_traces")
    runs = {"eager": figures.summarize(DEVICE_TRACE), "graph": {"not_measured": "no such thing"}}
    text = traces.report("Title", {"conditions": {"device": "a GPU"}, "runs": runs})
    assert "graph no such thing" in text and "a GPU" in text
    row = next(line for line in text.splitlines() if "moe_gpu::route" in line)
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        "eager", "moe_gpu::route", "2", "15", "6.5", "1.5", "2", "yes",
    ]  # fmt: skip


# -- the scripts, and TensorBoard


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with a run per trace, and the summaries by script."""
    folder = tmp_path_factory.mktemp("traces")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["OMP_NUM_THREADS"] = "1"
    summaries = {}
    for script, more in (("trace_gate", []), ("trace_decode", ["--prefetch", "next_gate"])):
        out = folder / script
        command = [sys.executable, PROFILING / f"{script}.py", "--device", "cpu", "--quick"]
        done = subprocess.run(
            [*command, "--out", out, *more],
            env=environment, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        text = (out / "summary.md").read_text(encoding="utf-8")
        assert text.strip() in done.stdout and "graph needs a CUDA device" in text
        summaries[script] = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    return folder, summaries


def trace_of(folder):
    (path,) = folder.glob("moe_gpu.*.pt.trace.json.gz")
    assert {entry.name for entry in folder.iterdir()} == {path.name}
    return path


def test_gate_calls_are_traced(written):
    folder, summaries = written
    figures = summaries["trace_gate"]["runs"]["eager"]
    calls = {f"moe_gpu::{part} T={T}" for part in ("project", "route") for T in (1, 4, 80)}
    assert set(figures["ranges"]) == calls
    assert all(row["count"] == 2 and row["host_us"] > 0 for row in figures["ranges"].values())
    assert figures["peak_bytes"]["host"] > 0
    assert trace_of(folder / "trace_gate" / "eager").stat().st_size < 2**20


def test_a_decode_is_traced_with_its_loads(written):
    folder, summaries = written
    runs, text = summaries["trace_decode"]["runs"], ""
    for name in ("eager", "memory"):
        counts = {range_: row["count"] for range_, row in runs[name]["ranges"].items()}
        layers = LAYERS * (TOKENS + 1)  # with the prefill
        assert counts.pop("moe_gpu::page_in") > 0
        assert counts == {
            "moe_gpu::prefill": 1, "moe_gpu::token": TOKENS,
            "moe_gpu::route": layers, "moe_gpu::experts": layers,
        }  # fmt: skip
        with gzip.open(trace_of(folder / "trace_decode" / name), "rt", encoding="utf-8") as file:
            text = file.read()
        assert '"worker' not in text and "ProfilerStep#1" in text and "ProfilerStep#0" not in text
    loads = runs["eager"]["loads"]
    assert loads["threads"] == 2, "the copying thread's ranges are not in the trace"
    assert loads["bytes"] == runs["eager"]["bytes_by_the_books"] > 0
    assert 0 <= loads["overlap"] <= 1
    assert runs["memory"]["peak_bytes"]["host"] > 0 and runs["memory"]["loads"] is None


@pytest.fixture(scope="module")
def plugin(written):
    pytest.importorskip("tensorboard")
    pytest.importorskip("torch_tb_profiler")
    sys.path.insert(0, str(PROFILING))
    try:
        from _tensorboard import serving
    finally:
        sys.path.remove(str(PROFILING))
    with serving(written[0]) as served:
        yield served


def test_tensorboard_finds_every_trace(plugin):
    assert plugin.runs == ["trace_decode/eager", "trace_decode/memory", "trace_gate/eager"]
    for run in plugin.runs:
        views = plugin.get_json("views", run=run)
        assert {"Overview", "Operator", "Trace"} <= set(views)
        assert ("Memory" in views) == (run != "trace_decode/eager")
        assert plugin.of_run(run) == {"run": run, "worker": "moe_gpu", "span": "1"}


def test_tensorboard_serves_our_ranges(plugin):
    for run, ranges in {
        "trace_gate/eager": {"moe_gpu::route T=1", "moe_gpu::project T=80"},
        "trace_decode/eager": {"moe_gpu::token", "moe_gpu::route", "moe_gpu::page_in"},
    }.items():
        events = plugin.get_json("trace", **plugin.of_run(run))["traceEvents"]
        assert ranges <= {event["name"] for event in events}
        assert "aten::linear" in plugin.get("operation/table", **plugin.of_run(run)).decode()
    overview = plugin.get_json("overview", **plugin.of_run("trace_decode/eager"))
    steps = [row[0] for row in overview["steps"]["rows"]]
    assert steps == ["1", "2", "3", "4"]  # the prefill and the tokens


@pytest.mark.parametrize("run", ["trace_decode/memory", "trace_gate/eager"])
def test_tensorboard_shows_memory(plugin, run):
    query = plugin.of_run(run)
    curve = plugin.get_json("memory_curve", **query)
    assert curve["metadata"]["devices"] == ["CPU"] and len(curve["rows"]["CPU"]) > 10
    table = plugin.get_json("memory", **query, memory_metric="KB")
    assert any("aten::" in row[0] for row in table["rows"]["CPU"])
    assert plugin.get_json("memory_events", **query)["rows"]["CPU"]


def test_a_screenshot_without_a_browser_says_so(monkeypatch):
    monkeypatch.syspath_prepend(PROFILING)
    screenshot = pytest.importorskip("screenshot")
    monkeypatch.setattr(screenshot.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match="no browser: none of chromium"):
        with screenshot.browsing():
            pass


def test_a_server_that_ends_is_reported(monkeypatch, tmp_path):
    pytest.importorskip("tensorboard")
    monkeypatch.syspath_prepend(PROFILING)
    tensorboard = pytest.importorskip("_tensorboard")
    monkeypatch.setattr(tensorboard.sys, "executable", shutil.which("false"))
    with pytest.raises(RuntimeError, match="no trace below"):
        with tensorboard.serving(tmp_path):
            pass
    (tmp_path / "moe_gpu.1.pt.trace.json").write_text("{}")
    with pytest.raises(RuntimeError, match="TensorBoard ended"):
        with tensorboard.serving(tmp_path):
            pass
