"""The GPU pass: stages that fail, hang or are missing, with scripts that stand in for the real ones."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

from moe_gpu import MoEGate, RouterState
from moe_gpu.kernels import layout
from moe_gpu.kernels.route import route

pytest.importorskip("transformers")

ROOT = Path(__file__).parents[1]
PROFILING = ROOT / "profiling"

LEAVES_A_GRANDCHILD = """
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
pathlib.Path(sys.argv[1], "grandchild").write_text(str(child.pid))
"""
# what a child of this test imports comes from the pass: no editable install may answer
NO_EDITABLE = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in getattr(f, "__module__", "")]
"""


@pytest.fixture
def gpu_pass(monkeypatch):
    monkeypatch.syspath_prepend(PROFILING)
    import gpu_pass

    monkeypatch.setattr(gpu_pass, "LEAST_S", 0.1)
    monkeypatch.setattr(gpu_pass, "SAY_EVERY_S", 0.2)
    # what the real one imports takes seconds
    script = "import json; print(json.dumps('looked'))"
    looks = stage(gpu_pass, "environment", script, seconds=5)
    monkeypatch.setattr(gpu_pass, "ENVIRONMENT", looks)
    return gpu_pass


def stage(gpu_pass, name, script, seconds=10.0, **more):
    """A stage that runs a script; its first argument is the folder of results."""
    command = lambda of, _: [sys.executable, "-c", script, str(of.folder)]  # noqa: E731
    return gpu_pass.Stage(name, seconds, command, **more)


def run(gpu_pass, tmp_path, stages, *options, minutes=1.0):
    """Run a pass; return its exit status and outcomes by stage."""
    before = signal.getsignal(signal.SIGTERM)
    out = tmp_path / "results"
    try:
        status = gpu_pass.main(
            ["--device", "cpu", "--out", str(out), "--minutes", str(minutes), *options], stages
        )
    finally:
        signal.signal(signal.SIGTERM, before)
    content = json.loads((out / "summary.json").read_text())
    return status, {line["stage"]: line for line in content["stages"]}


def writes(name):
    return f"import pathlib, sys; pathlib.Path(sys.argv[1], '{name}').write_text('x' * 100)"


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pid):
    deadline = time.monotonic() + 10
    while is_running(pid):
        assert time.monotonic() < deadline, "it survived"
        time.sleep(0.02)


def test_a_failure_stops_nobody_and_is_told(gpu_pass, tmp_path, capsys):
    order = "import pathlib, sys; open(pathlib.Path(sys.argv[1], 'order'), 'a').write('{}')"
    stages = [
        stage(gpu_pass, "a", order.format("a")),
        stage(gpu_pass, "b", order.format("b") + "; sys.exit('broken | badly')"),
        stage(gpu_pass, "c", order.format("c"), why_not=lambda _: "no such thing here"),
        stage(gpu_pass, "d", order.format("d"), figures=lambda folder: ["1.5 us (<= 2) met"]),
        stage(gpu_pass, "e", order.format("e"), figures=lambda folder: [][0]),
    ]
    status, found = run(gpu_pass, tmp_path, stages)
    assert status == 1
    assert (tmp_path / "results" / "order").read_text() == "abde"
    outcomes = {name: line["outcome"] for name, line in found.items()}
    assert outcomes == {
        "environment": "passed", "a": "passed", "b": "failed", "c": "skipped", "d": "passed",
        "e": "passed",
    }  # fmt: skip
    assert found["b"]["why"] == "exit status 1: broken | badly"
    assert found["c"]["why"] == "no such thing here"
    assert found["e"]["figures"][0].startswith("figures unreadable: IndexError")
    text = (tmp_path / "results" / "summary.md").read_text()
    assert "broken / badly" in text and "Not measured, or not to its end: c." in text
    table = capsys.readouterr().out.split("results in ")[1]
    assert "d               passed" in table and "1.5 us (<= 2) met" in table
    assert (tmp_path / "results" / "logs" / "b.log").read_text() == "broken | badly\n"


def test_single_stages(gpu_pass, tmp_path, capsys):
    stages = [stage(gpu_pass, name, writes(name)) for name in "abc"]
    status, found = run(gpu_pass, tmp_path, stages, "--stage", "a", "--stage", "b", "--skip", "b")
    assert status == 0
    assert [found[name]["outcome"] for name in "abc"] == ["passed", "not run", "not run"]
    assert found["b"]["why"] == found["c"]["why"] == "not chosen"
    assert (
        "Not measured, or not to its end: b, c."
        in (tmp_path / "results" / "summary.md").read_text()
    )
    assert gpu_pass.main(["--list"], stages) == 0
    assert capsys.readouterr().out.splitlines()[-3:] == [
        f"{name}                 10 parts" for name in "abc"
    ]


def test_what_takes_too_long_is_killed_with_all_it_started(gpu_pass, tmp_path, capsys):
    hangs = "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    hangs += "print('still here', flush=True)\ntime.sleep(600)"
    stages = [
        stage(gpu_pass, "hangs", LEAVES_A_GRANDCHILD + hangs, seconds=1.0),
        stage(gpu_pass, "next", writes("next"), seconds=5.0),
    ]
    start_s = time.monotonic()
    status, found = run(gpu_pass, tmp_path, stages, minutes=8 / 60)
    assert time.monotonic() - start_s < 8
    assert status == 1 and found["hangs"]["outcome"] == "timed out"
    assert found["hangs"]["why"].endswith("still here")
    assert found["next"]["outcome"] == "passed"
    assert "s: still here" in capsys.readouterr().out  # how it goes, while it goes
    wait_until_gone(int((tmp_path / "results" / "grandchild").read_text()))


def test_what_a_stage_leaves_running_is_killed(gpu_pass, tmp_path):
    status, found = run(gpu_pass, tmp_path, [stage(gpu_pass, "leaves", LEAVES_A_GRANDCHILD)])
    assert status == 0 and found["leaves"]["outcome"] == "passed"
    wait_until_gone(int((tmp_path / "results" / "grandchild").read_text()))


def test_it_is_asked_first_and_keeps_what_it_has(gpu_pass, tmp_path):
    script = (
        "import pathlib, sys, time\n"
        "try: time.sleep(600)\n"
        "except KeyboardInterrupt: pathlib.Path(sys.argv[1], 'part').write_text('half of it')"
    )
    figures = {"figures": lambda folder: [(folder / "part").read_text()]}
    asked = stage(gpu_pass, "asked", script, seconds=1.0, **figures)
    status, found = run(gpu_pass, tmp_path, [asked], minutes=4 / 60)
    assert status == 1 and found["asked"]["outcome"] == "timed out"
    assert found["asked"]["figures"] == ["half of it"]


def test_without_time_a_stage_does_not_begin(gpu_pass, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_pass, "LEAST_S", 1000.0)
    late = stage(gpu_pass, "late", writes("late"), seconds=2000.0)
    status, found = run(gpu_pass, tmp_path, [late])
    assert status == 0 and found["late"]["why"] == "no time was left"
    assert found["late"]["outcome"] == "not run"


def test_results_of_an_earlier_pass_are_not_taken_for_its_own(gpu_pass, tmp_path):
    old = tmp_path / "results" / "a.json"
    (old.parent / "a_folder").mkdir(parents=True)
    old.write_text("old")
    (old.parent / "kept.json").write_text("old")
    run(gpu_pass, tmp_path, [stage(gpu_pass, "bench_a", "raise SystemExit(3)")])
    assert not old.exists() and not (old.parent / "a_folder").exists()
    assert (old.parent / "kept.json").exists()
    assert not list(old.parent.rglob("*.partial"))


def test_bundle_holds_everything_that_fits(gpu_pass, tmp_path, monkeypatch, capsys):
    large = (
        "import os, pathlib, sys; pathlib.Path(sys.argv[1], 'large').write_bytes(os.urandom(9000))"
    )
    stages = [stage(gpu_pass, "a", writes("small.json")), stage(gpu_pass, "b", large)]
    path = tmp_path / "deep" / "bundle.tar.gz"
    run(gpu_pass, tmp_path, stages, "--bundle", str(path))

    def packed():
        with tarfile.open(path) as archive:
            names = {name: archive.extractfile(name).read() for name in archive.getnames()}
        return names

    out = tmp_path / "results"
    files = {f"results/{file.relative_to(out)}" for file in out.rglob("*") if file.is_file()}
    assert set(packed()) == files > {"results/summary.md", "results/logs/b.log", "results/large"}
    assert packed()["results/summary.json"] == (out / "summary.json").read_bytes()

    monkeypatch.setattr(gpu_pass, "BUNDLE_BYTES", 8000)
    assert gpu_pass.bundle(out, path, 8000) == ["large"]
    assert set(packed()) == files - {"results/large"} and path.stat().st_size <= 8000


def test_interrupted_it_still_sums_up(tmp_path):
    """In a process of its own, which gets the signal that a time limit sends."""
    code = f"""
import pathlib, sys
sys.path.insert(0, {str(PROFILING)!r})
import gpu_pass
def stage(name, script):
    command = lambda of, _: [sys.executable, "-c", script, str(of.folder)]
    return gpu_pass.Stage(name, 10.0, command)
gpu_pass.ENVIRONMENT = stage("environment", "")
hang = "import pathlib, sys, time; pathlib.Path(sys.argv[1], 'begun').touch(); time.sleep(600)"
stages = [stage("a", "print('done')"), stage("b", hang), stage("c", "")]
sys.exit(gpu_pass.main(["--device", "cpu", *sys.argv[1:]], stages))
"""
    out, path = tmp_path / "results", tmp_path / "bundle.tar.gz"
    child = subprocess.Popen(
        [sys.executable, "-c", code, "--out", out, "--bundle", path],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 30
    while not (out / "begun").exists():
        assert time.monotonic() < deadline and child.poll() is None
        time.sleep(0.02)
    child.send_signal(signal.SIGTERM)
    shown, _ = child.communicate(timeout=30)
    assert child.returncode == 130
    lines = json.loads((out / "summary.json").read_text())["stages"]
    assert [line["outcome"] for line in lines] == ["passed", "passed", "timed out", "not run"]
    assert lines[2]["why"] == "interrupted" and lines[3]["why"] == "the pass ended before"
    assert "results in" in shown
    with tarfile.open(path) as archive:
        assert "results/summary.md" in archive.getnames()


def test_the_stages_name_real_scripts(gpu_pass, tmp_path):
    assert 500 <= sum(each.seconds for each in gpu_pass.STAGES) <= 600  # of nine minutes
    for device in ("cpu", "cuda"):
        of = gpu_pass.Pass(device, False, tmp_path)
        for each in gpu_pass.STAGES:
            command = [*map(str, each.command(of, 100.0))]
            scripts = [Path(part) for part in command if part.endswith(".py")]
            assert all(path.is_file() for path in scripts) and scripts or each.name == "tests"
            assert each.figures(tmp_path) == [] if each.name.startswith("trace") else True


@pytest.mark.parametrize(
    "log, status, outcome",
    [
        ("========= ERROR SUMMARY: 0 errors\n", 0, None),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", 0, None),
        ("========= Invalid __global__ write\n========= ERROR SUMMARY: 1 error\n", 86, "failed"),
        ("========= Error: Device not supported. Please refer\n", 1, "skipped"),
        ("nothing\n", 0, "failed"),
        ("Traceback\n", 1, None),  # the exit status says it
    ],
)
def test_what_the_sanitizer_says(gpu_pass, log, status, outcome):
    verdict = gpu_pass.sanitizer_verdict(log, status)
    assert (verdict and verdict[0]) == outcome


def test_tests_are_counted_though_they_are_cut_short(gpu_pass, tmp_path):
    """A small suite of its own that interrupts itself, through the plugin that the stage uses."""
    (tmp_path / "test_few.py").write_text(
        "import pytest\n"
        "def test_a(): pass\n"
        "def test_b(): assert 1 == 2, 'really'\n"
        "@pytest.mark.skip(reason='not here')\n"
        "def test_c(): pass\n"
        "@pytest.fixture\n"
        "def broken(): raise ValueError('set-up')\n"
        "def test_d(broken): pass\n"
        "def test_e(): raise KeyboardInterrupt\n"
    )
    environment = os.environ | {
        "PYTHONPATH": str(PROFILING), "MOE_GPU_TEST_REPORT": str(tmp_path / "tests.jsonl"),
    }  # fmt: skip
    environment.pop("PYTEST_XDIST_WORKER", None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "_test_report", "-p", "no:cacheprovider"]
    subprocess.run(
        [*command, "--rootdir", tmp_path, tmp_path], cwd=tmp_path, env=environment,
        capture_output=True, timeout=60,
    )  # fmt: skip
    counts, cut, *failures, skips = gpu_pass.suite_figures(tmp_path)
    assert counts == "2 failed, 1 passed, 1 skipped" and cut == "1 of 5 did not run"
    assert failures[0].startswith("FAILED test_few.py::test_b: AssertionError: really")
    assert "test_d" in failures[1] and "set-up" in failures[1]
    assert "not here" in skips


def test_targets_come_from_the_route_benchmark(gpu_pass, tmp_path):
    assert gpu_pass.read_figures(gpu_pass.STAGES[1], tmp_path) == []  # no file, no figures
    targets = [
        {"target": "over empty", "wanted": "<= 1.3", "figure": 1.2},
        {"target": "chain", "wanted": ">= 5", "figure": 4.0},
        {"target": "p99", "wanted": "< 25", "figure": None},
    ]
    (tmp_path / "route.json").write_text(json.dumps({"targets": targets}))
    assert gpu_pass.route_figures(tmp_path) == [
        "over empty: 1.2 (<= 1.3) met", "chain: 4 (>= 5) NOT MET", "p99: not measured (< 25)",
    ]  # fmt: skip


# -- without an installation


@pytest.mark.parametrize("how", ["in a script's folder", "at the top of the tree"])
def test_the_library_imports_without_being_installed(how, gpu_pass, tmp_path):
    script = NO_EDITABLE + (
        "import importlib.util, moe_gpu, moe_gpu.kernels.route, _bench\n"
        "found = importlib.util.find_spec('kernels')\n"
        "print(moe_gpu.__file__, moe_gpu.kernels.route.__file__, found and found.origin, sep='\\n')"
    )
    with gpu_pass.importable(tmp_path) as variables:
        environment = dict(os.environ) | variables
        cwd = ROOT if how == "at the top of the tree" else PROFILING
        child = subprocess.run(
            [sys.executable, "-c", script], cwd=cwd, env=environment, capture_output=True, text=True
        )
    assert child.returncode == 0, child.stderr
    package, route, other = child.stdout.splitlines()
    assert package == str(tmp_path / "moe_gpu" / "__init__.py")
    assert route == str(tmp_path / "moe_gpu" / "kernels" / "route.py")
    assert not other.startswith(str(ROOT / "kernels"))  # Hugging Face's, if there is one


def test_a_real_stage_on_the_cpu(gpu_pass, tmp_path):
    stages = [each for each in gpu_pass.STAGES if each.name == "race_hunt"]
    status, found = run(gpu_pass, tmp_path, stages)
    assert status == 0, found
    assert found["race_hunt"]["figures"] == ["15 repeats at 5 points and grids, 0 of which differ"]
    content = json.loads((tmp_path / "results" / "race_hunt.json").read_text())
    assert content["is_clean"] and content["conditions"]["path"] == "reference"


# -- the race hunt


@pytest.fixture
def race_hunt(monkeypatch):
    monkeypatch.syspath_prepend(PROFILING)
    import race_hunt

    return race_hunt


class Racy:
    """Answers alike but for one run in five, in which one tensor differs in one bit."""

    def __init__(self, name):
        self.name, self.calls = name, 0

    def __call__(self):
        self.calls += 1
        results = {
            "weights": torch.tensor([0.5, float("nan")]), "counters_LC": torch.arange(3),
            "scratch": torch.zeros(4, dtype=torch.int32),
        }  # fmt: skip
        if self.calls % 5 == 0 and self.name:
            results[self.name].view(torch.uint8)[0] ^= 1
        return results


@pytest.mark.parametrize("name", ["weights", "counters_LC", "scratch"])
def test_a_race_is_found(race_hunt, name):
    call = Racy(name)
    found = race_hunt.repeat(call, call(), repeats=20, max_seconds=60)
    assert (found.runs, found.wrong_runs) == (20, 4) and name in found.names
    assert ("scratch is not zero" in found.names) == (name == "scratch")
    together = race_hunt.repeat_together([Racy(None), call], 10, 60, torch.device("cpu"))
    assert (together.runs, together.wrong_runs) == (10, 2) and name in together.names


def test_no_race_is_invented(race_hunt):
    call = Racy(None)
    found = race_hunt.repeat(call, call(), repeats=20, max_seconds=60)
    assert dataclasses.astuple(found) == (20, 0, set())
    assert race_hunt.repeat(call, call(), repeats=20, max_seconds=0).runs == 1


def test_a_lost_addition_is_found(race_hunt, monkeypatch):
    """Of a real gate, which one time in ten counts one pair too few."""
    route, calls = MoEGate.route, []

    def loses(self, *arguments, **more):
        routed = route(self, *arguments, **more)
        calls.append(1)
        self.state.counters_LC[self.layer, layout.PAIRS] -= int(len(calls) % 10 == 0)
        return routed

    monkeypatch.setattr(MoEGate, "route", loses)
    points = (race_hunt.Point(2, 8, 2),)  # interpreted, where this process interprets kernels
    rows = race_hunt.hunt(points, torch.device("cpu"), repeats=8, seconds=60)
    assert [row["differing"] for row in rows] == [["counters_LC"]] * 2
    assert all(0 < row["wrong_runs"] < row["runs"] == 8 for row in rows)
    assert rows[0]["reference"] == "same"


def test_grids_are_what_is_asked_for(race_hunt, monkeypatch):
    launch = pytest.importorskip("moe_gpu.kernels.launch")
    grids, device = [], torch.device("cuda" if torch.cuda.is_available() else "cpu")

    class Kernel:
        def __getitem__(self, grid):
            return lambda *_, **__: grids.append(grid)

    state = RouterState(1, 8, device=device)
    monkeypatch.setattr(launch, "route_kernel", Kernel())
    monkeypatch.setattr(launch, "_compiled", {})  # no way past it
    monkeypatch.setattr("moe_gpu.kernels.route.route_path", lambda _: "triton")
    for most in (None, 1, 2):
        with race_hunt.programs(most):
            route(torch.zeros(70, 8, device=device), state, 0, top_k=2)
    tiles = -(-70 // launch.tile_of(70, 8, 2)[0])
    assert tiles > 2 and grids == [(tiles,), (1,), (2,)]


# -- what the README shows of it

MARKED = "a\n<!-- {0}: begin -->\nold\n<!-- {0}: end -->\nb\n"


@pytest.fixture
def filled(tmp_path):
    """The text of a README after the script has filled it from a folder of results."""
    readme, page = tmp_path / "README.md", tmp_path / "quality.md"
    page.write_text(MARKED.format("measured"))
    results = tmp_path / "results"
    results.mkdir()

    def fill(*names):
        readme.write_text("".join(map(MARKED.format, ("measured", "families", *names))))
        where = ["--readme", readme, "--page", page, "--results", results]
        command = [sys.executable, PROFILING / "readme_table.py", *where]
        child = subprocess.run(command, capture_output=True, text=True)
        assert child.returncode == 0, child.stderr
        check = subprocess.run([*command, "--check"], capture_output=True, text=True)
        assert check.returncode == 0, check.stderr
        return readme.read_text()

    fill.results = results
    return fill


def test_without_a_gpu_the_readme_says_so(filled):
    (filled.results / "route.json").write_text("{}")  # of no GPU: not in a folder of one
    assert "begin -->\nSpeed on a GPU, this library or any other: not measured.\n<!--" in filled(
        "speed"
    )
    assert "speed" not in filled()  # a README without a place for it stays without


def test_the_readme_shows_what_a_gpu_measured(filled, monkeypatch):
    monkeypatch.syspath_prepend(PROFILING)
    import _route_report as report

    base = {"T": 1, "E": 8, "K": 2, "policy": "budget", "hits": "half", "routing": "uniform"}
    times = {"p20": 1.9, "p50": 2.0, "mean": 2.5, "p80": 2.6, "p90": 2.7, "p99": 3.0}
    ratios = [base | {"over_empty": {"median": 1.25}, "chain_over_ours": {"median": 4.5}}]
    route = {
        "conditions": {"device": "NVIDIA H100", "driver": "580.1", "commit": "abc", "quick": False},
        "rows": [base | times | {"what": "moe-gpu", "clock": "graph replay"}],
        "ratios": ratios, "bandwidth": [], "stages": [], "not_measured": ["T=16384: out of time"],
    }  # fmt: skip
    route["targets"] = report.targets(route, "moe-gpu")
    route["seed_targets"] = report.seed_targets(route["rows"], "moe-gpu")
    spread = {"median": 12.0, "p20": 11.0, "p80": 13.0, "p99": 14.0}
    decode = {
        "model": {"num_hidden_layers": 4, "hidden_size": 4096},
        "rows": [
            {"decode": "half", "ms_per_token": spread, "mb_per_token": spread, "hit_rate": 0.75},
            {"decode": "stock", "ms_per_token": spread, "mb_per_token": spread, "hit_rate": None},
        ],
    }
    folder = filled.results / "nvidia-h100"
    folder.mkdir()
    (folder / "route.json").write_text(json.dumps(route))
    (folder / "decode.json").write_text(json.dumps({"decode": decode}))
    text = filled("speed")
    assert "On NVIDIA H100." in text and "driver 580.1; commit abc. From" in text
    assert "| route, median | < 10 us | 2.00 | not measured | not measured | 1 token," in text
    assert "| calls/s | 140,000 to 200,000 | 400,000 |" in text
    assert "| over empty, T=1, (8, 2), budget | <= 1.3 | 1.25 | met |" in text
    assert "| chain over ours, the least of all points | >= 5 | 4.50 | **not met** |" in text
    assert "| eager call, p99, us | < 25 | not measured |  |" in text
    assert "| half | 12.00 (11.00 to 13.00) | 12 | 75% |" in text
    assert "Model: num_hidden_layers 4, hidden_size 4096." in text
    assert "Not measured there: T=16384: out of time." in text
    assert "results/nvidia-h100/`" in text
