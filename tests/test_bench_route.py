"""The route benchmarks time what is right and nothing else, and count and compare as they say."""

import contextlib
import csv
import dataclasses
import json
import os
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from moe_gpu.kernels import layout
from test_benchmarks import CONDITIONS, PROFILING, run

TESTS = Path(__file__).parent
POINT = {"T", "E", "K", "policy", "hits", "routing"}
P99 = "route, p99 (of graph replays: of means)"
LEAST = "eager call over the least launch, direct"
TAILS = {"mean", "p20", "p50", "p80", "p90", "p99"}


def results(script, folder):
    done = run(script, folder / "out.json")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["out.csv", "out.json", "out.md"]
    content = json.loads((folder / "out.json").read_text(encoding="utf-8"))
    text = (folder / "out.md").read_text(encoding="utf-8")
    assert set(content["conditions"]) >= CONDITIONS and content["conditions"]["quick"] is True
    assert "Measured on: device" in text and text.strip() in done.stdout
    rows = list(csv.DictReader((folder / "out.csv").open(encoding="utf-8")))
    assert len(rows) == len(content["rows"]) > 0
    for row, written in zip(content["rows"], rows, strict=True):
        assert row["unit"] == "us" and row["samples"] > 0
        assert 0 < row["p20"] <= row["p50"] <= row["p80"] <= row["p90"] <= row["p99"]
        assert written["what"] == row["what"] and float(written["mean"]) == row["mean"]
    return content, text


def test_route_on_the_cpu(tmp_path):
    content, text = results("bench_route.py", tmp_path)
    assert "raised to T" in content["conditions"]["max_policy_tokens"]
    assert set(content["rows"][0]) >= POINT | TAILS | {"what", "clock"}
    assert {row["clock"] for row in content["rows"]} == {"wall", "eager", "latency"}
    seen = {(r["T"], r["E"], r["K"], r["policy"], r["hits"], r["routing"]) for r in content["rows"]}
    assert {(1, 8, 2, policy, "half", "uniform") for policy in ("off", "bonus", "budget")} <= seen
    assert {(1, 8, 2, "budget", hits, "uniform") for hits in ("all", "half", "none")} <= seen
    assert (1, 8, 2, "budget", "half", "skewed") in seen and (16, 64, 6) in {s[:3] for s in seen}
    base = next(r for r in content["ratios"] if r["T"] == 16 and r["E"] == 64)
    assert base["chain_over_ours"]["median"] > 0 and "over_empty" not in base

    targets = {line["target"]: line for line in content["seed_targets"]}
    assert targets[P99]["graph replay"] is None  # no GPU here
    assert targets["route, median"]["latency"] > 0
    assert targets["hit rate"]["figure"] > 70 and "quality.json" in targets["hit rate"]["from"]
    assert [row["original_ns"] for row in content["original_router"]] == [110, 110]
    for name in ("SGLang Triton router", "vLLM topk_softmax", "triton_kernels topk"):
        assert f"{name}: runs on CUDA only" in text
    assert "stage costs" in content["not_measured"][0] and not content["stages"]


def test_affinity_on_the_cpu(tmp_path):
    content, _ = results("bench_affinity.py", tmp_path)
    assert {row["what"] for row in content["rows"]} == {
        "reference", "token by token", "closed form",
    }  # fmt: skip
    off = {
        (row["T"], row["choices"], row["decay"]): row["clamped_once_is_off_by"]
        for row in content["rows"] if row["what"] == "closed form"
    }  # fmt: skip
    assert off[1, "spread", 0.99] == off[64, "same", 0.99] == 0 < off[64, "spread", 0.99]


WRONG_REFERENCE = """
from moe_gpu.kernels import route
right = route.route_ref
def wrong(logits, weights, *rest, **more):
    right(logits, weights, *rest, **more)
    weights *= 1.01
route.route_ref = wrong
"""
WRONG_AFFINITY = WRONG_REFERENCE.replace("weights *= 1.01", "rest[2].affinity_LE += 1e-6")
WRONG_CHAIN = """
import _peers
right = _peers.Chain.__call__
_peers.Chain.__call__ = lambda self, logits: (right(self, logits)[0] * 1.01, right(self, logits)[1])
"""


@pytest.mark.parametrize(
    "script, prelude, message",
    [
        ("bench_route.py", WRONG_REFERENCE, "moe-gpu is wrong"),
        ("bench_route.py", WRONG_CHAIN, "PyTorch chain is wrong"),
        ("bench_affinity.py", WRONG_AFFINITY, "moe-gpu, whole, is wrong"),
    ],
)
def test_refuses_to_time_what_is_wrong(script, prelude, message, tmp_path):
    done = run(script, tmp_path / "out.json", prelude)
    assert done.returncode == 1 and message in done.stderr, done.stderr
    content = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert all("is wrong at" in reason for reason in content["failed"])
    timed = {row["what"].split(",")[0] for row in content["rows"]}
    assert message.split(",")[0].removesuffix(" is wrong") not in timed
    text = (tmp_path / "out.md").read_text(encoding="utf-8")
    assert all(reason in text for reason in content["failed"])


# -- in this process


@pytest.fixture
def profiling(monkeypatch):
    """The scripts' modules by name."""
    monkeypatch.syspath_prepend(PROFILING)
    names = ("_timing", "_peers", "_route_cases", "_route_report", "bench_route", "bench_affinity")
    return types.SimpleNamespace(**{name.strip("_"): __import__(name) for name in names})


@pytest.fixture
def kernels(profiling):
    pytest.importorskip("triton")
    return __import__("_route_only")


@pytest.fixture
def bench_run(profiling, monkeypatch, device):
    """A run that takes the path of CUDA, kernels interpreted where there is none."""
    bench = profiling.bench_route
    effort = dataclasses.replace(bench.QUICK, rounds=1, samples=2, cold=1)
    if device == "cpu":
        monkeypatch.setattr(bench.Run, "on_cuda", True)
        monkeypatch.setattr(bench.bench, "l2_bytes", lambda device: 1 << 30)
        monkeypatch.setattr(profiling.timing, "CPU_FLUSH_BYTES", 1 << 10)
        monkeypatch.setattr(profiling.timing, "ROUND_S", 0.0)
    return bench.Run(torch.device(device), effort, None, 60)


def test_percentiles(profiling):
    values = [float(v) for v in range(10, 0, -1)]
    assert profiling.timing.percentiles(values, 2.0) == {
        "mean": 11, "p20": 6, "p50": 11, "p80": 18, "p90": 20, "p99": 20,
    }  # fmt: skip
    assert profiling.timing.percentiles([3.0])["p99"] == 3
    assert profiling.timing.spread(values)["p80"] == 9
    assert profiling.timing.difference([5.0, 7.0], [1.0, 2.0], 10)["median"] == 45


def test_least_bytes(profiling):
    # 3 tokens, 4 experts, 2 chosen, float32 logits
    logits, chosen = 3 * 4 * 4, 3 * 2 * (8 + 4)
    state = 4 * 4 + 4 + 2 * 4 * 4 + 2 * 8 * 4 + 2 * 8 * 8
    record = 4 * layout.record_width(4) + 4
    assert profiling.route_cases.least_bytes(3, 4, 2, 4) == logits + chosen + state + record


def test_the_grid_is_what_the_issue_asks(profiling):
    cases = profiling.route_cases
    points = cases.chosen_points()
    base = {(p.T, *p.router) for p in points if p.is_base}
    assert base == {(T, *router) for T in cases.TOKENS for router in cases.ROUTERS}
    assert {p.policy for p in points} == {"off", "bonus", "budget"}
    assert {p.hits for p in points} == {"all", "half", "none"}
    assert {p.routing for p in points} == {"uniform", "skewed"}
    assert len(points) == len(set(points)) < 150
    assert points[0].T in (1, 64) and points[-1].T not in (1, 64, 16384, 1048576)
    assert len(cases.all_points()) == 10 * 6 * 3 * 3 * 2


def test_policies_and_skew_do_something(profiling):
    cases = profiling.route_cases
    device, counts = torch.device("cpu"), {}
    for policy in cases.POLICIES:
        point = cases.Point(256, 64, 6, policy=policy)
        gate = cases.make_gate(point, device)
        logits_TE = cases.make_logits(point, device)[0]
        counts[policy] = cases.reference(logits_TE, gate).state.counters_LC[0, layout.SWAPS].item()
    assert counts["off"] == 0 < counts["bonus"] and 0 < counts["budget"]
    shares = {}
    for routing in cases.ROUTINGS:
        logits_TE = cases.make_logits(cases.Point(256, 64, 6, routing=routing), device)[0]
        shares[routing] = logits_TE.float().topk(6).indices.flatten().bincount().max().item()
    assert shares["skewed"] > 2 * shares["uniform"]
    assert len(cases.residents(64, "half")) == 32 and cases.residents(8, "none") == []


@pytest.mark.parametrize("T", [40, 2400])  # all rows compared, and the last ones
@pytest.mark.parametrize(
    "name, change",
    [
        ("other ids", lambda gate, got: got[1].__setitem__(-1, got[1][-1].flip(0))),
        ("weights are off", lambda gate, got: got[0].add_(1e-5)),
        ("another affinity", lambda gate, got: gate.affinity.add_(1e-6)),
        ("activations", lambda gate, got: gate.activations[0].add_(1)),
        ("counters", lambda gate, got: gate.state.counters_LC[0, layout.HITS].add_(1)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_wrong_is_seen(profiling, T, name, change):
    cases = profiling.route_cases
    point = cases.Point(T, 8, 2, policy="bonus")
    gate = cases.make_gate(point, torch.device("cpu"))
    logits_TE = cases.make_logits(point, torch.device("cpu"))[0]
    want = cases.reference(logits_TE, gate)
    got = want.weights.clone(), want.ids.clone()
    for tensor in ("affinity_LE", "activations_LE", "counters_LC", "record_LR"):
        getattr(gate.state, tensor).copy_(getattr(want.state, tensor))
    assert cases.differs_from_reference(got, gate, logits_TE) is None
    change(gate, got)
    assert name in cases.differs_from_reference(got, gate, logits_TE)


def test_a_peer_is_right_up_to_ties_and_order(profiling):
    differs = profiling.peers.differs
    logits_TE = torch.tensor([[3.0, 2.0, 1.0, 0.0], [3.0, 1.0, 1.0, 0.0]])
    want = torch.tensor([[0.7, 0.3], [0.8, 0.2]]), torch.tensor([[0, 1], [0, 1]])
    assert differs(want, want, logits_TE) is None
    other_order = want[0].flip(1), want[1].flip(1).to(torch.int16)
    assert differs(other_order, want, logits_TE) is None
    other_of_a_tie = want[0], torch.tensor([[0, 1], [0, 2]])
    assert differs(other_of_a_tie, want, logits_TE) is None
    assert "other experts in 1" in differs(
        (want[0], torch.tensor([[0, 2], [0, 1]])), want, logits_TE
    )
    assert "weights" in differs((want[0] * 1.001, want[1]), want, logits_TE)
    assert differs((want[0].bfloat16(), want[1]), want, logits_TE) is None
    assert "range" in differs((want[0], want[1] + 3), want, logits_TE)
    assert "weights" in differs((want[0] * float("nan"), want[1]), want, logits_TE)


def test_the_chain_counts_what_the_reference_counts(profiling):
    cases, bench = profiling.route_cases, profiling.bench_route
    point = cases.Point(5, 8, 2, policy="off")
    gate = cases.make_gate(point, torch.device("cpu"))
    logits_TE = cases.make_logits(point, torch.device("cpu"), torch.float32)[0]
    chain = bench.make_chain(point, torch.device("cpu"), lists=True)
    chain(logits_TE)
    want = cases.reference(logits_TE, gate).state
    assert torch.equal(chain.activations_E, want.activations_LE[0])
    assert chain.hits == want.counters_LC[0, layout.HITS]
    priority_E = want.record_LR[0, layout.RECORD_HEADER + 16 : layout.RECORD_HEADER + 24]
    assert chain.requests.flatten().tolist() == (priority_E > 0).nonzero().flatten().tolist()


# -- kernels


@pytest.mark.parametrize("T, E, K", [(1, 8, 2), (70, 8, 2), (5, 13, 3), (9, 64, 6)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_routing_alone(profiling, kernels, T, E, K, dtype, device):
    from moe_gpu.kernels.launch import tile_of

    cases = profiling.route_cases
    point = cases.Point(T, E, K, policy="off")
    logits_TE = cases.make_logits(point, torch.device(device), dtype)[0]
    want = cases.reference(logits_TE, cases.make_gate(point, torch.device("cpu")))
    for tile in (tile_of(T, E, K), kernels.columns_tile(E)):
        weights_TK, ids_TK = kernels.route_only(logits_TE, K, tile)
        assert torch.equal(ids_TK.cpu(), want.ids)
        torch.testing.assert_close(weights_TK.cpu(), want.weights, atol=1e-6, rtol=1e-5)


def test_writes_are_taken_out_of_a_kernel(kernels):
    source = """
@triton.jit
def kernel(a_ptr, b_ptr, n):
    row_ptr = b_ptr + 4
    if n > 0:
        tl.store(row_ptr, tl.load(a_ptr))
    old = tl.atomic_add(b_ptr, 1)
    tl.store(a_ptr, old)
    tl.atomic_or(a_ptr, 1, mask=n > 1)
"""
    left = kernels.without_writes(source, ("b_ptr",))
    assert "tl.store(row_ptr" not in left and "        pass" in left
    for kept in ("old = tl.atomic_add(b_ptr, 1)", "tl.store(a_ptr, old)", "tl.atomic_or(a_ptr, 1"):
        assert kept in left  # what is asked for is no mere write


@pytest.mark.parametrize("T, E, K", [(1, 8, 2), (70, 8, 2), (3, 16, 4)], ids=str)
def test_stages(profiling, kernels, bench_run, T, E, K):
    """Checks every stage against the reference, then takes times: here only that there are some."""
    bench = profiling.bench_route
    bench.measure_stages(bench_run, bench.Point(T, E, K))
    (costs,) = bench_run.stages
    assert set(costs) == {
        "T", "E", "K", "routing_us", "affinity", "counters", "requests", "bonus", "budget",
        "bookkeeping",
    }  # fmt: skip
    assert len(bench_run.rows) == 6


def test_a_stage_that_does_something_else_is_refused(profiling, kernels, bench_run, monkeypatch):
    # such as one that does not take effect: the whole kernel in its place
    monkeypatch.setattr(kernels, "routed_until", lambda stage, call: call)
    bench = profiling.bench_route
    bench.measure_stages(bench_run, bench.Point(4, 8, 2))
    assert not bench_run.rows and not bench_run.stages
    (reason,) = bench_run.absent.values()
    assert "until affinity is wrong, not timed: activations_LE" in reason


def test_the_kernel_is_itself_again(kernels):
    from moe_gpu.kernels import route

    launch = kernels.launch_until("counters")
    # a launch remembers compiled kernels: neither may find the other's
    assert (
        launch._compiled is not kernels.importlib.import_module("moe_gpu.kernels.launch")._compiled
    )
    whole = route.launch
    with pytest.raises(ZeroDivisionError):
        kernels.routed_until("counters", lambda: 1 / 0)()
    assert route.launch is whole


def test_what_faded_before_the_rows_that_are_compared(profiling):
    cases = profiling.route_cases
    point = cases.Point(4096, 64, 1, policy="off")
    logits_TE = torch.randn(4096, 64, dtype=torch.bfloat16)
    logits_TE[:, 0] = -100
    logits_TE[0, 0] = 100  # once, long ago
    gate = cases.make_gate(point, torch.device("cpu"))
    got = cases.reference(logits_TE, gate)
    gate.__dict__["state"] = got.state
    assert gate.affinity[0] > 0
    assert cases.differs_from_reference((got.weights, got.ids), gate, logits_TE) is None
    gate.state.affinity_LE[0, 0] = 1e-3
    found = cases.differs_from_reference((got.weights, got.ids), gate, logits_TE)
    assert found == "another affinity"


def test_stage_costs_by_hand(profiling):
    us = {
        "routing": 2.0, "affinity": 2.25, "counters": 2.5, "requests": 2.75, "bonus": 3.0,
        "budget": 3.75,
    }  # fmt: skip
    costs = profiling.bench_route.stage_costs({n: [v * 1e-6] * 3 for n, v in us.items()})
    found = {name: spread["median"] for name, spread in costs.items()}
    assert found == pytest.approx(
        {"routing_us": 2, "affinity": 0.25, "counters": 0.25, "requests": 0.25, "bonus": 0.25}
        | {"budget": 1, "bookkeeping": 0.75}
    )  # fmt: skip


def test_a_point_on_the_path_of_cuda(profiling, kernels, bench_run, monkeypatch):
    bench, peers = profiling.bench_route, profiling.peers

    def wrong(logits_TE):
        weights_TK, ids_TK = torch.softmax(logits_TE.float(), 1).topk(2)
        return weights_TK, ids_TK  # not renormalised

    def broken(logits_TE):
        raise RuntimeError("no kernel image")

    def right(logits_TE):
        weights_TK, ids_TK = torch.softmax(logits_TE.float(), 1).topk(2)
        return weights_TK / weights_TK.sum(1, keepdim=True), ids_TK.int()

    names = list(peers.LIBRARIES)
    routes = dict(zip(names, (wrong, broken, right), strict=True))
    monkeypatch.setattr(peers, "libraries", lambda *_: (routes, {"some other": "not here"}))
    bench.measure(bench_run, bench.Point(16, 8, 2))
    (ratios,) = bench_run.ratios
    for name in ("over_empty", "over_routing_only", "chain_over_ours"):
        assert ratios[name]["median"] > 0
    assert ratios["eager_over_launch"] > 0 and ratios["eager_over_triton_call"] > 0
    assert ratios["routing_only"] in bench.ROUTING_ONLY
    timed = {row["what"] for row in bench_run.rows if row["clock"] == "graph replay"}
    assert timed == {"moe-gpu", "empty kernel", *bench.ROUTING_ONLY[:2], "PyTorch chain", names[2]}
    assert {row["clock"] for row in bench_run.rows} == {"graph replay", "cold", "eager", "latency"}
    reasons = list(bench_run.absent.values())
    assert any("wrong, not timed: weights" in reason for reason in reasons)
    assert any("no kernel image" in reason for reason in reasons) and "not here" in reasons


def test_what_is_out_of_time_says_so(profiling, bench_run, monkeypatch):
    bench = profiling.bench_route
    monkeypatch.setattr(bench_run, "deadline_s", 0.0)
    monkeypatch.setattr(bench, "compile_ahead", lambda *_: None)
    bench.measure_all(bench_run, [bench.Point(1, 8, 2)], quick=True)
    assert not bench_run.rows
    assert {line.rpartition(": ")[2] for line in bench_run.not_measured} == {"out of time"}
    assert len(bench_run.not_measured) == 4  # stages, projection, the point, the compiled chain


def stay(seconds):
    time.sleep(seconds)


def test_compilers_end_when_their_time_is_up(profiling, capsys):
    start_s = time.perf_counter()
    profiling.route_cases.compile_in_processes(stay, [(60.0,)], max_seconds=0.5)
    assert time.perf_counter() - start_s < 30
    assert "out of time" in capsys.readouterr().out


def test_the_compiled_chain_beside_the_call(profiling, kernels, bench_run, monkeypatch):
    bench, point = profiling.bench_route, profiling.route_cases.Point(4, 8, 2)
    bench.measure_compiled(bench_run, point)
    assert not bench_run.rows and "quick run" in bench_run.absent[bench.COMPILED]
    bench_run.ratios.append(dataclasses.asdict(point))
    chain = bench.make_chain(point, bench_run.device, lists=False)
    monkeypatch.setattr(bench, "compiled_chain", lambda *_: {bench.COMPILED: chain})
    bench.measure_compiled(bench_run, point)
    assert len(bench_run.rows) == 2 and bench_run.ratios[0]["compiled_over_ours"]["median"] > 0


def test_what_breaks_costs_itself_only(profiling, bench_run):
    def breaks(run, error):
        raise error

    bench_run.attempt("a", breaks, ValueError("no graph"))
    bench_run.attempt("b", breaks, torch.OutOfMemoryError())
    bench_run.attempt("c", lambda run: run.rows.append("measured"))
    assert bench_run.failed == ["a: ValueError: no graph"] and bench_run.rows == ["measured"]
    assert bench_run.not_measured == ["b: out of memory"]
    bench_run.attempt("d", breaks, SystemExit("moe-gpu is wrong"))
    assert bench_run.failed[1:] == ["moe-gpu is wrong"]


def test_a_whole_run_on_the_path_of_cuda(profiling, kernels, bench_run, monkeypatch):
    bench, report, device = profiling.bench_route, profiling.route_report, bench_run.device
    monkeypatch.setattr(bench, "compile_ahead", lambda *_: None)
    with torch.no_grad():
        points = profiling.route_cases.chosen_points((1,), ((8, 2),))
        bench.measure_all(bench_run, points, quick=True)
    content = bench.content_of(bench_run, {"device": str(device)}, 3e12)
    assert not bench_run.failed and len(content["ratios"]) == len(points) == 6
    figures = {line["target"]: line["figure"] for line in content["targets"]}
    for name in (
        "over empty, T=1, (8, 2), budget", "chain over ours, the least of all points",
        LEAST, "eager call over the least launch, kernel[grid](x)", "eager call, p99, us",
        "affinity, counters and requests, T <= 64, the most, us",
    ):  # fmt: skip
        assert figures[name] is not None, name
    assert content["projected"][0]["D"] == 4096
    text = report.text_of(json.loads(json.dumps(content)))
    for head in ("By point", "On the host", "Cold caches", "What each stage adds", "Seed targets"):
        assert f"## {head}" in text


def test_transformers_router_that_is_wrong_is_not_timed(profiling, monkeypatch):
    bench = profiling.bench_route
    here = bench.Run(torch.device("cpu"), bench.QUICK, None, 60)

    def router(hidden_TD):
        logits_TE = hidden_TD[:, :8]
        weights_TK, ids_TK = logits_TE.float().softmax(1).topk(2, largest=False)
        return logits_TE, weights_TK / weights_TK.sum(1, keepdim=True), ids_TK

    monkeypatch.setattr(bench.peers, "transformers_router", lambda *_: router)
    with torch.no_grad():
        bench.measure_projected(here, bench.Point(3, 8, 2), width=16)
    assert not here.rows and "wrong, not timed" in next(iter(here.absent.values()))


def test_a_loop_that_is_wrong_is_refused(profiling, monkeypatch):
    bench = profiling.bench_affinity
    monkeypatch.setattr(bench, "looped", lambda a, *_: a + 0.5)
    point = bench.Point(3, 8, 2, policy="off")
    with pytest.raises(SystemExit, match="token by token is wrong"):
        bench.measure(point, 0.99, "spread", torch.device("cpu"), quick=True)


@pytest.mark.parametrize("decay", [0.0, 0.99, 1.0])
def test_affinity_within_the_kernel(profiling, kernels, device, decay):
    bench = profiling.bench_affinity
    point = bench.Point(40, 8, 2, policy="off")
    rows = bench.measure(point, decay, "same", torch.device(device), quick=True)
    assert {row["what"] for row in rows} == {"in the kernel", "token by token", "closed form"}


AHEAD = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import _route_only as kernels
import aot
from moe_gpu.kernels import _route_kernel
from moe_gpu.kernels.launch import columns_of, tile_of

found = {}
for variant in (aot.Variant(8, 2, 1, aot.EXACT, 0), aot.Variant(128, 8, 64, aot.EXACT, 0)):
    for stage in kernels.NOT_WRITTEN:
        _route_kernel.route_kernel = kernels.launch_until(stage).route_kernel
        found[f"{variant.E} {stage}"] = aot.compile_variant(variant, "sm_90")
for E, K in ((8, 2), (128, 8), (512, 10)):
    for tile in (kernels.columns_tile(E), tile_of(64, E, K)):
        BLOCK_K = columns_of(tile[0], K)
        constants = {"E": E, "K": K, "BLOCK_T": tile[0], "BLOCK_E": tile[1], "BLOCK_K": BLOCK_K}
        types = {"logits_ptr": "*bf16", "weights_ptr": "*fp32", "ids_ptr": "*i64"}
        kernel = kernels.route_only_kernel
        signature = {
            name: "constexpr" if name in constants else types.get(name, "i32")
            for name in kernel.arg_names
        }
        source = ASTSource(kernel, signature, constants)
        binary = triton.compile(
            source, target=GPUTarget("cuda", 90, 32), options={"num_warps": tile[2]}
        )
        found[f"{E} alone {tile}"] = aot._cuda_usage(binary)
source = ASTSource(kernels.empty_kernel, {"x_ptr": "*bf16"}, {})
triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 1})
print(json.dumps(found))
"""


def test_kernels_compile_for_a_gpu(kernels):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(PROFILING), str(TESTS), os.environ.get("PYTHONPATH", "")]
    )
    child = subprocess.run(
        [sys.executable, "-c", AHEAD], env=environment, capture_output=True, text=True, timeout=120
    )
    assert child.returncode == 0, child.stderr[-3000:]
    found = json.loads(child.stdout.splitlines()[-1])
    assert len(found) >= 9 and not any(usage["spill"] for usage in found.values()), found


# -- peers


def package(folder, path, text):
    """Write a module, and packages around it."""
    file = folder / path
    file.parent.mkdir(parents=True, exist_ok=True)
    for parent in file.parents:
        if parent == folder:
            break
        (parent / "__init__.py").touch()
    file.write_text(text, encoding="utf-8")


SOFTMAX_TOPK = """
import torch
def topk_of(x, k):
    values, ids = x.float().softmax(1).topk(k)
    return values / values.sum(1, keepdim=True), ids
"""
TRITON_KERNELS = f"""{SOFTMAX_TOPK}
from types import SimpleNamespace
def topk(x, k, apply_softmax=True):
    values, ids = topk_of(x, k)
    return SimpleNamespace(vals=values.to(x.dtype), indx=ids.to(torch.int16))
"""
SGLANG = f"""{SOFTMAX_TOPK}
from sglang.jit_kernel import moe_route_radix
from sglang.jit_kernel.utils import cache_once, is_arch_support_pdl, load_jit
from sglang.kernel_api_logging import debug_kernel_api
_router_triton_kernel = None
@debug_kernel_api
def moe_fused_gate(scores, bias, topk, scoring_func="sigmoid", renormalize=True):
    assert scoring_func == "softmax" and not moe_route_radix.covered(scores, bias, topk)
    values, ids = topk_of(scores + bias, topk)
    return values, ids.int()
"""


@pytest.fixture
def anywhere(profiling, monkeypatch):
    """Libraries' adapters run on the CPU; what they import is forgotten afterwards."""
    monkeypatch.setattr(profiling.peers, "_only_on_cuda", lambda device: None)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield profiling.peers
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("sglang", "triton_kernels"):
            del sys.modules[name]


def test_libraries_from_a_folder(anywhere, tmp_path):
    peers, cpu = anywhere, torch.device("cpu")
    routes, absent = peers.libraries(8, 2, cpu)
    assert not routes and set(absent) == set(peers.LIBRARIES)
    assert "cannot import triton_kernels" in absent["triton_kernels topk"]
    assert "no moe_fused_gate.py" in peers.libraries(8, 2, cpu, tmp_path)[1]["SGLang Triton router"]

    package(tmp_path, "triton/python/triton_kernels/topk.py", TRITON_KERNELS)
    package(tmp_path, "sglang/moe_fused_gate.py", SGLANG)
    routes, absent = peers.libraries(8, 2, cpu, tmp_path)
    assert set(routes) == {"triton_kernels topk", "SGLang Triton router"}
    logits_TE = torch.randn(5, 8)
    values, ids = torch.softmax(logits_TE, 1).topk(2)
    want = values / values.sum(1, keepdim=True), ids
    for route in routes.values():
        assert peers.differs(route(logits_TE), want, logits_TE) is None


@pytest.mark.parametrize("more", ["", ", bool renormalize", ", bool renormalize, Tensor? bias"])
def test_vllm_by_its_schema(anywhere, monkeypatch, more):
    peers = anywhere
    monkeypatch.setitem(sys.modules, "vllm", types.ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm._moe_C", types.ModuleType("vllm._moe_C"))
    library = torch.library.Library("_moe_C", "DEF")
    out = "Tensor(a!) topk_weights, Tensor(b!) topk_indices, Tensor(c!) token_expert_indices"
    library.define(f"topk_softmax({out}, Tensor gating_output{more}) -> ()")

    def topk_softmax(weights_TK, ids_TK, rows_TK, logits_TE, renormalize, *bias):
        values, ids = logits_TE.softmax(1).topk(2)
        weights_TK.copy_(values / values.sum(1, keepdim=True))
        ids_TK.copy_(ids)
        assert renormalize is True and bias in ((), (None,))

    library.impl("topk_softmax", topk_softmax, "CPU")
    try:
        routes, absent = peers.libraries(8, 2, torch.device("cpu"))
        if not more:
            assert "does not renormalize" in absent["vLLM topk_softmax"]
            return
        logits_TE = torch.randn(3, 8)
        values, ids = torch.softmax(logits_TE, 1).topk(2)
        got = routes["vLLM topk_softmax"](logits_TE)
        want = values / values.sum(1, keepdim=True), ids
        assert got[1].dtype == torch.int32 and peers.differs(got, want, logits_TE) is None
    finally:
        library._destroy()


def test_compile_without_a_compiler(profiling, monkeypatch):
    monkeypatch.setattr(profiling.peers.shutil, "which", lambda name: None)
    chain = profiling.peers.Chain(torch.ones(4, dtype=torch.bool), 2, lists=False)
    with pytest.raises(profiling.peers.Absent, match=r"needs one of g\+\+"):
        profiling.peers.compiled(chain, torch.device("cpu"))


# -- clocks, on a device that is none


class Device:
    """Names of ``torch.cuda`` that the clocks use. Work takes time on it only when it runs."""

    def __init__(self, monkeypatch):
        self.now_us, self.queue, self.capturing, self.log = 0.0, [], None, []
        for name in ("Stream", "CUDAGraph", "Event", "graph", "stream"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "current_stream", self.Stream)
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronize)

    def launch(self, us, name="call"):
        target = self.queue if self.capturing is None else self.capturing
        target.append((us, name))

    def synchronize(self, device=None):
        assert self.capturing is None, "a capture cannot wait"
        for us, done in self.queue:
            if callable(done):
                done(self.now_us)
            else:
                self.log.append(done)
            self.now_us += us
        self.queue.clear()

    def Stream(self):
        return types.SimpleNamespace(wait_stream=lambda other: None)

    def CUDAGraph(self):
        graph = types.SimpleNamespace(work=[])
        graph.replay = lambda: self.queue.extend([(3.0, "graph launch"), *graph.work])
        return graph

    def Event(self, enable_timing=False):
        assert enable_timing
        event = types.SimpleNamespace()
        event.record = lambda: self.queue.append((0.0, lambda now: setattr(event, "us", now)))
        event.elapsed_time = lambda end: (end.us - event.us) * 1e-3
        return event

    @contextlib.contextmanager
    def graph(self, graph, stream):
        self.synchronize()
        self.capturing = graph.work
        yield
        self.capturing = None

    def stream(self, stream):
        return contextlib.nullcontext()


def test_replay_divides_a_graph_by_its_calls(profiling, monkeypatch):
    device, cuda = Device(monkeypatch), torch.device("cuda")
    calls = [lambda name=name: device.launch(2.0, name) for name in "abc"]
    replay = profiling.timing.Replay(calls, cuda, count=5)
    device.log.clear()
    assert replay() == pytest.approx((3 + 5 * 2) / 5 * 1e-6)
    # once to keep the device busy, once for the time; round the inputs in turn
    assert "".join(n for n in device.log if len(n) == 1) == "abcababcab"
    assert profiling.timing.Replay(calls[:1], cuda).count == profiling.timing.GRAPH_CALLS


def test_cold_calls_leave_the_flush_out(profiling, monkeypatch):
    device, cuda = Device(monkeypatch), torch.device("cuda")
    flush = types.SimpleNamespace(zero_=lambda: device.launch(100.0, "flush"))
    calls = [lambda: device.launch(2.0), lambda: device.launch(4.0)]
    seconds = profiling.timing.cold_s(calls, cuda, flush, 4)
    assert seconds == pytest.approx([2e-6, 4e-6, 2e-6, 4e-6])
    assert device.log.count("flush") == 4


def test_eager_calls_wait_between_batches_only(profiling, monkeypatch):
    waits, calls = [], []
    monkeypatch.setattr(profiling.timing, "synchronize", lambda device: waits.append(len(calls)))
    eager_s, cpu = profiling.timing.eager_s, torch.device("cpu")
    seconds = eager_s([lambda: calls.append(1)], cpu, 10, wait=False, batch=4)
    assert len(seconds) == 10 and waits == [1, 5, 9, 11]  # one call to warm up
    waits.clear(), calls.clear()
    eager_s([lambda: calls.append(1)], cpu, 3, wait=True)
    assert waits == [1, 2, 3, 4, 4]
    assert len(eager_s([lambda: None], cpu, 10**6, wait=False, batch=7, max_seconds=0.0)) == 7


def test_copy_counts_both_ways(profiling, monkeypatch):
    timing = profiling.timing
    monkeypatch.setattr(timing, "COPY_BYTES", {"cpu": 1000})
    monkeypatch.setattr(timing, "interleave", lambda alternatives, rounds: {"copy": [1e-6] * 3})
    assert timing.copy_bytes_per_s(torch.device("cpu")) == pytest.approx(2e9)


# -- tables


def test_targets_and_bandwidth_by_hand(profiling):
    report, cases = profiling.route_report, profiling.route_cases
    one = dataclasses.asdict(cases.Point(1, 8, 2)) | {"what": "moe-gpu"}
    large = dataclasses.asdict(cases.Point(1048576, 8, 2, policy="off")) | {"what": "moe-gpu"}
    tails = dict.fromkeys(("mean", "p20", "p80", "p90"), 6.0)
    rows = [
        one | tails | {"clock": "graph replay", "p50": 5.0, "p99": 9.0},
        one | tails | {"clock": "eager", "p50": 11.0, "p99": 30.0},
        large | tails | {"clock": "graph replay", "p50": 50.0, "p99": 51.0},
    ]
    size = cases.least_bytes(1048576, 8, 2)
    (bandwidth,) = report.bandwidths(rows, "moe-gpu", copy_bytes_per_s=2 * size / 50e-6)
    assert bandwidth["of_copy_bandwidth"] == pytest.approx(0.5)
    assert not report.bandwidths(rows, "moe-gpu", None)

    seeds = {line["target"]: line for line in report.seed_targets(rows, "moe-gpu")}
    assert seeds[P99]["graph replay"] == 9 and seeds[P99]["eager"] == 30
    assert seeds["calls/s"]["eager"] == pytest.approx(1e6 / 6)
    assert seeds["route, mean"]["latency"] is None

    ratio = {"over_empty": {"median": 1.2}, "chain_over_ours": {"median": 7.0}}
    point = dataclasses.asdict(cases.Point(1, 8, 2))
    stage = {"T": 64, "E": 8, "K": 2, "bookkeeping": {"median": 0.5}}
    content = {
        "projected": [], "rows": rows, "ratios": [point | ratio | {"eager_over_launch": 1.4}],
        "stages": [stage, stage | {"T": 4096, "bookkeeping": {"median": 9.0}}],
        "bandwidth": [bandwidth],
    }  # fmt: skip
    found = {line["target"]: line["figure"] for line in report.targets(content, "moe-gpu")}
    assert found["over empty, T=1, (8, 2), budget"] == 1.2
    assert found["over empty, T=1, (8, 2), off"] is None
    assert found["chain over ours, the least of all points"] == 7
    assert found["of the copy's bandwidth, T=1048576, the least, off"] == pytest.approx(0.5)
    assert found["eager call, p99, us"] == 30 and found[LEAST] == 1.4
    assert found["affinity, counters and requests, T <= 64, the most, us"] == 0.5
