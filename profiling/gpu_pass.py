"""Everything that only a GPU can tell, in one command of nine minutes at most.

Usage:
    python3 profiling/gpu_pass.py                          # also: make gpu
    python3 profiling/gpu_pass.py --list
    python3 profiling/gpu_pass.py --stage tests --stage bench_route
    python3 profiling/gpu_pass.py --skip tests --minutes 5 --bundle results.tar.gz
    python3 profiling/gpu_pass.py --device cpu             # a small form, for CI

Needs the repository and a Python with torch, triton and transformers: nothing is installed, nothing
is downloaded. Each stage is a process of its own with a part of the time; what one leaves over, the
rest share. A stage that fails or takes too long does not stop the others. Results, one file per
stage, a log of each and ``summary.md`` go to ``profiling/results/<name of the GPU>/``.

The whole test suite, which compiles some hundred kernels, takes longer than its part: what only a
GPU can tell runs first, and the summary says how many tests did not run. ``--stage tests`` gives it
all of the time.

Without a git checkout the commit is what ``--commit`` or ``$MOE_GPU_COMMIT`` says.

Exit status: 1 if a stage failed or was timed out, 130 if interrupted.
"""

import argparse
import contextlib
import datetime
import glob
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from readme_table import is_met

ROOT = Path(__file__).resolve().parent.parent
PROFILING = ROOT / "profiling"
GRACE_S = 4.0  # between asking a stage to end and killing it
ENDING_S = 10.0  # kept for the summary
KILL_S = 10.0
LEAST_S = 5.0  # a stage that would have less does not begin
SAY_EVERY_S = 20.0
BUNDLE_BYTES = 15 << 20
SANITIZER_STATUS = 86  # of the sanitizer when it found something
OK, FAILED, LATE, SKIPPED, NOT_RUN = "passed", "failed", "timed out", "skipped", "not run"


@dataclass(frozen=True)
class Pass:
    """What all stages of a pass share."""

    device: str
    quick: bool
    folder: Path  # of the results
    python: str = sys.executable

    def script(self, name: str, *options: object) -> list[str]:
        """Return the command of a script of this folder."""
        command = [self.python, PROFILING / f"{name}.py", "--device", self.device, *options]
        return [*map(str, command), *(["--quick"] if self.quick else [])]


@dataclass(frozen=True)
class Stage:
    """One part of the pass.

    Attributes:
        name: Of the script.
        seconds: Its part of the time, in proportion: what it needs in nine minutes.
        command: What to run, for so many seconds.
        environment: Further variables.
        why_not: Why it cannot run here; None if it can.
        figures: What of its results the summary shows.
        verdict: Reads the log of a stage that ended by itself, with its exit status: what came of
            it, and why; None: the exit status says.
        ask: The signal that lets it end early with what it has.
    """

    name: str
    seconds: float
    command: Callable[[Pass, float], Sequence[str]]
    environment: dict[str, str] = field(default_factory=dict)
    why_not: Callable[[Pass], str | None] = lambda _: None
    figures: Callable[[Path], list[str]] = lambda _: []
    verdict: Callable[[str, int], tuple[str, str] | None] = lambda *_: None
    ask: signal.Signals = signal.SIGINT

    @property
    def results(self) -> str:
        """Return what its results are called, as the script calls them when it runs alone."""
        return self.name.removeprefix("bench_")


@dataclass
class Outcome:
    """What came of a stage."""

    stage: str
    outcome: str
    seconds: float = 0.0
    limit_seconds: float = 0.0
    why: str = ""
    figures: list[str] = field(default_factory=list)


# -- running


class Child:
    """A process in a group of its own, which ends as a whole.

    Args:
        command: What to run.
        environment: All of its variables.
        log: Where its output goes.
    """

    def __init__(self, command: Sequence[str], environment: dict[str, str], log: Path):
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL,
                stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def has_ended(self) -> bool:
        """Whether the process has; it is not reaped, so its group's number stays its own."""
        options = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, self._process.pid, options) is not None

    def wait(self, until_s: float, say: Callable[[], None] = lambda: None) -> bool:
        """Wait for the process; return whether it ended in time."""
        said_s = time.monotonic()
        while not self.has_ended():
            now_s = time.monotonic()
            if now_s > until_s:
                return False
            if now_s - said_s > SAY_EVERY_S:
                said_s = now_s
                say()
            time.sleep(0.05)
        return True

    def ask(self, which: signal.Signals) -> None:
        """Ask the process, and only it, to end."""
        os.kill(self._process.pid, which)

    def end(self) -> int:
        """Kill what is left of the group; return the exit status of the process."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        try:
            return self._process.wait(KILL_S)
        except subprocess.TimeoutExpired:  # held by the driver: the pass has no time for it
            return -signal.SIGKILL

    def last_line(self) -> str:
        """Return the last line of the output so far."""
        with self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - 2000))
            lines = file.read().decode(errors="replace").replace("\r", "\n").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")


def run_stage(stage: Stage, of: Pass, limit_s: float, environment: dict[str, str]) -> Outcome:
    """Run a stage within its time; say how it goes."""
    start_s = time.monotonic()
    outcome = Outcome(stage.name, SKIPPED, limit_seconds=round(limit_s, 1))
    if reason := stage.why_not(of):
        outcome.why = reason
        return outcome
    for old in of.folder.glob(f"{stage.results}*"):  # of an earlier pass: not to be taken for ours
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    print(f"{stage.name}: at most {limit_s:.0f} s", flush=True)
    grace_s = min(GRACE_S, limit_s / 4)
    command = stage.command(of, limit_s - grace_s)
    variables = environment | {"MOE_GPU_TEST_REPORT": str(of.folder / "tests.jsonl")}
    child = Child(command, variables | stage.environment, of.folder / "logs" / f"{stage.name}.log")

    def say() -> None:
        print(f"  {time.monotonic() - start_s:.0f} s: {child.last_line()[:120]}", flush=True)

    try:
        in_time = child.wait(start_s + limit_s - grace_s, say)
        if not in_time:
            child.ask(stage.ask)
            child.wait(start_s + limit_s)
    finally:
        status = child.end()
        outcome.seconds = round(time.monotonic() - start_s, 1)
    if not in_time:
        outcome.outcome, outcome.why = LATE, f"after {limit_s:.0f} s: {child.last_line()[:200]}"
    else:
        log = child.log.read_text(encoding="utf-8", errors="replace")
        outcome.outcome, outcome.why = stage.verdict(log, status) or by_status(status, child)
    outcome.figures = read_figures(stage, of.folder)
    return outcome


def by_status(status: int, child: Child) -> tuple[str, str]:
    """Return what an exit status says."""
    if status == 0:
        return OK, ""
    return FAILED, f"exit status {status}: {child.last_line()[:200]}"


def read_figures(stage: Stage, folder: Path) -> list[str]:
    """Return a stage's figures; what it did not write, or wrote otherwise, is no figure."""
    try:
        return stage.figures(folder)
    except FileNotFoundError:
        return []
    except Exception as error:  # a results file of another form must not end the pass
        return [f"figures unreadable: {type(error).__name__}: {error}"]


class Interrupted(BaseException):
    """SIGTERM, or SIGINT."""


def run_all(
    stages: Sequence[Stage], chosen: Sequence[str], of: Pass, seconds: float, finish: Callable,
    environment: dict[str, str],
) -> int:  # fmt: skip
    """Run the chosen stages in order, within so many seconds; return the exit status.

    Args:
        stages: All there are.
        chosen: Names of those to run.
        of: The pass.
        seconds: For all of them.
        finish: Called with the outcomes after every stage: what ends the pass later loses nothing.
        environment: Of the children.
    """
    end_s = time.monotonic() + seconds - min(ENDING_S, seconds / 10)
    outcomes = {stage.name: Outcome(stage.name, NOT_RUN, why="not chosen") for stage in stages}
    queue = [stage for stage in stages if stage.name in chosen]
    for stage in queue:
        outcomes[stage.name].why = "the pass ended before"
    running = None
    try:
        for number, stage in enumerate(queue):
            left_s = end_s - time.monotonic()
            # what earlier stages left over is shared by their parts of the time
            limit_s = left_s * stage.seconds / sum(later.seconds for later in queue[number:])
            if limit_s < min(LEAST_S, stage.seconds):
                outcomes[stage.name].why = "no time was left"
                continue
            running = stage
            outcome = run_stage(stage, of, limit_s, environment)
            outcomes[stage.name], running = outcome, None
            print(f"{stage.name}: {outcome.outcome} in {outcome.seconds} s {outcome.why}".rstrip())
            finish(list(outcomes.values()))
    except (KeyboardInterrupt, Interrupted):
        if running:
            figures = read_figures(running, of.folder)
            outcomes[running.name] = Outcome(running.name, LATE, why="interrupted", figures=figures)
        finish(list(outcomes.values()), is_last=True)
        return 130
    finish(list(outcomes.values()), is_last=True)
    return int(any(outcome.outcome in (FAILED, LATE) for outcome in outcomes.values()))


@contextlib.contextmanager
def importable(folder: Path) -> Iterator[dict[str, str]]:
    """Make ``moe_gpu`` importable without installing it; yield the variables that children need.

    ``kernels/`` belongs inside the package, as ``moe_gpu.kernels``, and the top of the tree on no
    path: Hugging Face's package of that name is looked up there.
    """
    package = folder / "moe_gpu"
    package.mkdir()
    for source in (ROOT / "moe_gpu").iterdir():
        if source.name != "__pycache__":
            (package / source.name).symlink_to(source)
    (package / "kernels").symlink_to(ROOT / "kernels")
    # safe path: a child's working directory, the top of the tree, is on no path of its own, but
    # neither is the folder of a script, whose neighbours it imports
    paths = [folder, *(ROOT / name for name in ("profiling", "tests", "examples"))]
    if before := os.environ.get("PYTHONPATH"):
        paths.append(before)
    yield {"PYTHONPATH": os.pathsep.join(map(str, paths)), "PYTHONSAFEPATH": "1"}


def surroundings(folder: Path) -> dict[str, str]:
    """Return further variables of the children: a log that is not held back, and no network.

    Args:
        folder: For Triton's cache, where there is no home to write to.
    """
    variables = {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    if "TRITON_CACHE_DIR" not in os.environ and not os.access(os.path.expanduser("~"), os.W_OK):
        variables["TRITON_CACHE_DIR"] = str(folder / "triton")
    return variables


# -- output


def write_whole(path: Path, text: str) -> None:
    """Write a file that appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def summary(outcomes: Sequence[Outcome], facts: dict) -> str:
    """Return the table of a pass as Markdown."""
    lines = ["| stage | outcome | s | figures |", "| --- | --- | ---: | --- |"]
    for outcome in outcomes:
        said = [outcome.why] if outcome.why else []
        shown = "<br>".join([*said, *outcome.figures]).replace("|", "/")
        lines.append(f"| {outcome.stage} | {outcome.outcome} | {outcome.seconds:.0f} | {shown} |")
    about = "; ".join(f"{name.replace('_', ' ')} {value}" for name, value in facts.items())
    missing = [outcome.stage for outcome in outcomes if outcome.outcome in (NOT_RUN, SKIPPED, LATE)]
    rest = (
        f"Not measured, or not to its end: {', '.join(missing)}." if missing else "All of it ran."
    )
    return "\n".join(["# GPU pass", "", f"{about}.", "", *lines, "", rest, ""])


def for_terminal(outcomes: Sequence[Outcome]) -> str:
    """Return the same for a terminal: a line per figure."""
    lines = []
    for outcome in outcomes:
        head = f"{outcome.stage:<15} {outcome.outcome:<10} {outcome.seconds:>6.1f} s  {outcome.why}"
        lines += [head.rstrip(), *(f"{'':<17}{figure}" for figure in outcome.figures)]
    return "\n".join(lines)


def bundle(folder: Path, path: Path, most_bytes: int = BUNDLE_BYTES) -> list[str]:
    """Pack a folder of results into one file of bounded size; return what was too large for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, left_out = path.with_name(path.name + ".partial"), []
    own = {path.absolute(), partial.absolute()}
    files = [file for file in folder.rglob("*") if file.is_file() and file.absolute() not in own]
    files.sort(key=_size)
    while True:
        with tarfile.open(partial, "w:gz") as archive:
            for file in files:
                archive.add(file, Path(folder.name) / file.relative_to(folder))
        if partial.stat().st_size <= most_bytes or not files:
            partial.replace(path)
            return left_out
        left_out.append(str(files.pop().relative_to(folder)))


def _size(path: Path) -> int:
    return path.stat().st_size


# -- the stages


def load(path: Path) -> dict:
    """Return the content of a results file."""
    return json.loads(path.read_text(encoding="utf-8"))


def seconds_for(stage: str, share: float) -> Callable[[Pass, float], list[str]]:
    """Return the command of a benchmark that ends its measurements by itself.

    Args:
        stage: Its script.
        share: Of its time that is for measurements; the rest is for imports, compiling, checks.
    """

    def command(of: Pass, seconds: float) -> list[str]:
        out = of.folder / f"{stage.removeprefix('bench_')}.json"
        return of.script(stage, "--out", out, "--max-seconds", max(1, int(share * seconds)))

    return command


def and_options(command: Callable, on_cuda: Sequence[str]) -> Callable[[Pass, float], list[str]]:
    """Return the command with further options where it runs on a GPU."""
    return lambda of, s: [*command(of, s), *(on_cuda if of.device == "cuda" else ())]


def plainly(stage: str, suffix: str = ".json") -> Callable[[Pass, float], list[str]]:
    """Return the command of a script that only needs to know where to write."""
    out = stage.removeprefix("bench_") + suffix
    return lambda of, _: of.script(stage, "--out", of.folder / out)


def tests_command(of: Pass, seconds: float) -> list[str]:
    """Return the command of the test suite, or on the CPU of a few files of it."""
    # not pytest's own script: its Python may be another
    command = [of.python, "-m", "pytest", "-p", "_test_report", "-p", "no:cacheprovider"]
    command += ["-q", "--durations=15", "-o", "faulthandler_timeout=100"]
    if of.device == "cpu":
        return [*command, str(ROOT / "tests" / "test_record.py")]
    if importlib.util.find_spec("xdist"):
        # by test, not by file: the largest file compiles hundreds of kernel variants. In order, a few
        # at a time: what _test_report puts first is done when the time is up
        workers = min(14, max(2, (os.cpu_count() or 2) - 2))
        command += ["-n", str(workers), "--dist", "load", "--maxschedchunk", "4"]
    return [*command, str(ROOT / "tests")]


def why_no_tests(of: Pass) -> str | None:
    """Return why the tests cannot run."""
    return None if importlib.util.find_spec("pytest") else "pytest is not installed"


def suite_figures(folder: Path) -> list[str]:
    """Return counts, failures and reasons to skip."""
    lines = (folder / "tests.jsonl").read_text(encoding="utf-8").splitlines()
    results = [json.loads(line) for line in lines if line.endswith("}")]
    found = max((result["collected"] for result in results if "collected" in result), default=0)
    results = [result for result in results if "outcome" in result]
    counts = Counter(result["outcome"] for result in results)
    figures = [", ".join(f"{count:,} {outcome}" for outcome, count in sorted(counts.items()))]
    if found > len(results):
        figures.append(f"{found - len(results):,} of {found:,} did not run")
    if not importlib.util.find_spec("hypothesis"):
        figures.append("hypothesis is not installed: tests that need it did not run")
    failed = [result for result in results if result["outcome"] == "failed"]
    figures += [f"FAILED {result['test']}: {result['why'][:120]}" for result in failed[:15]]
    if len(failed) > 15:
        figures.append(f"and {len(failed) - 15} more, in tests.jsonl")
    skips = Counter(r.get("why", "") for r in results if r["outcome"] == "skipped")
    figures += [f"skipped {count}: {why[:100]}" for why, count in skips.most_common(4)]
    return figures


def sanitizer() -> str | None:
    """Return where compute-sanitizer is."""
    homes = [os.environ.get(name, "") for name in ("CUDA_HOME", "CUDA_PATH")]
    homes += sorted(glob.glob("/usr/local/cuda*"), reverse=True)
    places = [os.path.join(home, "bin") for home in homes if home]
    return shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=os.pathsep.join(places)
    )


def why_no_sanitizer(of: Pass) -> str | None:
    """Return why compute-sanitizer cannot run."""
    if of.device == "cpu":
        return "checks code on a GPU"
    return None if sanitizer() else "compute-sanitizer is not installed"


def sanitized(tool: str, seconds: float) -> Stage:
    """Return the stage that runs the small form of the race hunt under a tool of the sanitizer."""

    def command(of: Pass, _: float) -> list[str]:
        # Without API errors: PyTorch makes calls to see whether they fail. Only our kernel is
        # looked at, and no compiler that the process starts.
        return [
            sanitizer() or "compute-sanitizer", "--tool", tool,
            "--target-processes", "application-only", "--report-api-errors", "no",
            "--kernel-name", "kns=route", "--error-exitcode", str(SANITIZER_STATUS),
            *replace(of, quick=True).script("race_hunt", "--out", of.folder / f"{tool}.json"),
        ]  # fmt: skip

    return Stage(
        tool, seconds, command, why_not=why_no_sanitizer, verdict=sanitizer_verdict,
        # PyTorch's allocator would hand out parts of large blocks: past their end is not out of bounds
        environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        figures=lambda folder: sanitizer_figures(folder / "logs" / f"{tool}.log"),
    )  # fmt: skip


def sanitizer_verdict(log: str, status: int) -> tuple[str, str] | None:
    """Return what a sanitizer's log says beside its exit status."""
    if "Device not supported" in log:
        return SKIPPED, "the sanitizer does not support this device"
    if status == SANITIZER_STATUS:
        return FAILED, "the sanitizer found something, see its log"
    if status == 0 and "SUMMARY" not in log:
        return FAILED, "the sanitizer said nothing"
    return None


def sanitizer_figures(log: Path) -> list[str]:
    """Return its summary lines."""
    text = log.read_text(encoding="utf-8", errors="replace")
    return [line.strip("= ") for line in text.splitlines() if "SUMMARY" in line]


def hunt_figures(folder: Path) -> list[str]:
    """Return how often what was repeated."""
    rows = load(folder / "race_hunt.json")["rows"]
    wrong = [row for row in rows if row["wrong_runs"] or row["reference"] != "same"]
    runs = sum(row["runs"] for row in rows)
    figures = [f"{runs:,} repeats at {len(rows)} points and grids, {len(wrong)} of which differ"]
    return figures + [f"{row['point']}, {row['grid']}: {row['differing']}" for row in wrong[:5]]


def route_figures(folder: Path) -> list[str]:
    """Return the targets, each with what was found."""
    figures = []
    for target in load(folder / "route.json").get("targets", []):
        met = {True: "met", False: "NOT MET", None: ""}[is_met(target)]
        figure = target["figure"]
        shown = "not measured" if figure is None else f"{figure:.3g}"
        figures.append(f"{target['target']}: {shown} ({target['wanted']}) {met}".rstrip())
    return figures


def affinity_figures(folder: Path) -> list[str]:
    """Return what affinity costs for one token and for many."""
    rows = load(folder / "affinity.json")["rows"]
    of_ours = [row for row in rows if row["what"] in ("in the kernel", "reference")]
    ends = [of_ours[0], of_ours[-1]] if of_ours else []
    return [
        f"{row['what']}, T={row['T']}, ({row['E']}, {row['K']}): {row['p50']:.2f} us"
        for row in ends
    ]


def offload_figures(folder: Path) -> list[str]:
    """Return the rates of the largest experts, from each tier."""
    rows = load(folder / "offload.json").get("loads", {}).get("rows", [])
    largest = max((row["expert_mb"] for row in rows), default=0)
    return [
        f"{row['expert_mb']} MB from {row['from']}: {row['gb_per_s']['median']:.1f} GB/s, "
        f"{row['over_plain_copy']['median']:.2f} of a plain copy"
        for row in rows
        if row["expert_mb"] == largest
    ]


def decode_figures(folder: Path) -> list[str]:
    """Return the time of a token, by alternative."""
    rows = load(folder / "decode.json")["decode"]["rows"]
    figures = []
    for row in rows:
        hits = "" if row["hit_rate"] is None else f", {row['hit_rate']:.0%} hits"
        moved = (
            f", {row['mb_per_token']['median']:,.0f} MB" if row["mb_per_token"]["median"] else ""
        )
        figures.append(
            f"{row['decode']}: {row['ms_per_token']['median']:.2f} ms/token{moved}{hits}"
        )
    return figures


def attached_figures(folder: Path) -> list[str]:
    """Return what attaching does to throughput."""
    over = load(folder / "attached.json")["throughput"]["attached_over_stock"]
    return [
        f"{name} over {stock}: {ratio['median']:.2f}"
        for name, stocks in over.items()
        for stock, ratio in stocks.items()
    ]


def trace_figures(name: str) -> Callable[[Path], list[str]]:
    """Return a function that says what a trace script wrote."""

    def figures(folder: Path) -> list[str]:
        files = [file for file in (folder / name).rglob("*") if file.is_file()]
        return [f"{len(files)} files, {sum(map(_size, files)) / 1e6:.1f} MB"] if files else []

    return figures


# The most valuable first: an interrupted pass has what could be had by then.
STAGES = (
    Stage("race_hunt", 55, seconds_for("race_hunt", 0.75), figures=hunt_figures),
    Stage("bench_route", 130, seconds_for("bench_route", 0.8), figures=route_figures),
    Stage(
        "tests", 85, tests_command, why_not=why_no_tests, figures=suite_figures,
        environment={"TORCHINDUCTOR_COMPILE_THREADS": "1"},  # in each of the workers
    ),
    Stage(
        "bench_decode", 55, and_options(seconds_for("bench_decode", 0.2), ("--layers", "2")),
        figures=decode_figures,
    ),
    sanitized("memcheck", 30),
    sanitized("racecheck", 30),
    Stage("bench_affinity", 22, seconds_for("bench_affinity", 0.5), figures=affinity_figures),
    Stage(
        "bench_offload", 30,
        and_options(seconds_for("bench_offload", 0.2), ("--part", "loads", "--mb", "4", "64")),
        figures=offload_figures,
    ),
    Stage("trace_gate", 22, plainly("trace_gate", ""), figures=trace_figures("trace_gate")),
    Stage("trace_decode", 32, plainly("trace_decode", ""), figures=trace_figures("trace_decode")),
    Stage("bench_attached", 40, seconds_for("bench_attached", 0.35), figures=attached_figures),
)  # fmt: skip
# always first: it says where results belong
ENVIRONMENT = Stage("environment", 15, plainly("environment"))


# -- the pass


def machine(of: Pass, first: Path, environment: dict[str, str]) -> tuple[Outcome, dict]:
    """Look at the machine, from a folder of its own; return what was found."""
    outcome = run_stage(ENVIRONMENT, replace(of, folder=first, quick=False), 60, environment)
    print(f"environment: {outcome.outcome} in {outcome.seconds} s {outcome.why}".rstrip())
    path = first / "environment.json"
    return outcome, load(path) if path.exists() else {}


def results_folder(of: Pass, found: dict) -> Path:
    """Return where results belong, unless the command line says."""
    if of.quick or of.device == "cpu":
        return PROFILING / "out" / f"gpu_pass_{of.device}"
    return Path(found.get("folder", PROFILING / "results" / "unknown-gpu"))


def parse(arguments: Sequence[str] | None, names: Sequence[str]) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="a smoke test of every stage")
    parser.add_argument("--stage", action="append", choices=names, help="only these; repeatable")
    parser.add_argument("--skip", action="append", default=[], choices=names, help="not these")
    parser.add_argument("--list", action="store_true", help="name the stages, run nothing")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all of it")
    parser.add_argument("--out", type=Path, help="folder for the results")
    parser.add_argument("--bundle", type=Path, help="also write all results into this .tar.gz")
    parser.add_argument(
        "--commit", default=os.environ.get("MOE_GPU_COMMIT"), help="of a tree without its history"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None, stages: Sequence[Stage] = STAGES) -> int:
    """Run the pass; return the exit status."""
    start_s = time.monotonic()
    options = parse(arguments, [stage.name for stage in stages])
    if options.list:
        print("\n".join(f"{stage.name:<15} {stage.seconds:>4.0f} parts" for stage in stages))
        return 0
    chosen = [
        stage.name for stage in stages
        if stage.name in (options.stage or [stage.name]) and stage.name not in options.skip
    ]  # fmt: skip
    of = Pass(options.device, options.quick or options.device == "cpu", Path())
    signal.signal(signal.SIGTERM, _interrupt)
    with tempfile.TemporaryDirectory() as work, importable(Path(work)) as variables:
        environment = dict(os.environ) | variables | surroundings(Path(work))
        environment.pop("TRITON_INTERPRET", None)
        commit = {}
        if options.commit:
            commit["commit"] = environment["MOE_GPU_COMMIT"] = options.commit
        first = Path(work) / "results"
        looked, found = machine(of, first, environment)
        folder = (options.out or results_folder(of, found)).absolute()
        shutil.copytree(first, folder, dirs_exist_ok=True)
        of = replace(of, folder=folder)
        began = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        facts = {"began": began, **found.get("conditions", {}), **commit, "quick": of.quick}

        def finish(outcomes: list[Outcome], is_last: bool = False) -> None:
            everything = [looked, *outcomes]
            content = {"conditions": facts, "stages": [asdict(outcome) for outcome in everything]}
            write_whole(folder / "summary.json", json.dumps(content, indent=1) + "\n")
            write_whole(folder / "summary.md", summary(everything, facts))
            left_out = bundle(folder, options.bundle) if options.bundle else []
            if is_last:
                if left_out:
                    print(f"too large for the bundle: {', '.join(left_out)}")
                print(f"\nresults in {folder}\n\n{for_terminal(everything)}")

        left_s = 60 * options.minutes - (time.monotonic() - start_s)
        status = run_all(stages, chosen, of, left_s, finish, environment)
    return status or int(looked.outcome != OK)


def _interrupt(*_: object) -> None:
    raise Interrupted


if __name__ == "__main__":
    sys.exit(main())
