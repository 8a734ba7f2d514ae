"""What routing policies cost and save, with decode semantics: the study behind ``docs/quality.md``.

Usage:
    python profiling/quality.py                          # both shipped models; see below
    python profiling/quality.py --quick                  # a smoke test; its figures mean little
    python profiling/quality.py run MODEL [MODEL ...]    # evaluate, resumes where it stopped
    python profiling/quality.py run MODEL --main         # without the lesser baselines and controls
    python profiling/quality.py report                   # tables and plots from what has been run

MODEL is a folder; its name is the name of the model. Other training seeds of the shipped models
come from ``examples/train_tiny.py``, for example::

    python examples/train_tiny.py --seed 1 --out profiling/out/models/tiny_mixtral_1
    python examples/train_tiny.py --fine-grained --seed 1 --out profiling/out/models/tiny_fine_grained_1

Every setting is a file under ``profiling/out/quality``; it is evaluated again only if the model,
the text or the code that evaluates changed. Set OMP_NUM_THREADS=1 and run models in parallel:
the tensors of a step are small. One model takes about half an hour of one core.

Every token meets the expert cache that the tokens before it left. Rows that chose the rule and its
constants, rows that calibrate the layers and rows that are reported are three disjoint parts of the
held-out text (``quality_texts.py``).
"""

import argparse
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import AutoModelForCausalLM

import quality_texts
from _bench import RESULTS, ROOT, git_commit
from moe_gpu import CacheBonus, Exact, MassBudget, QualityBudget
from moe_gpu.tuning.calibrate import layer_sensitivity
from moe_gpu.tuning.quality import Evaluation, Job, Outcome
from moe_gpu.tuning.replay import OPTIMUM
from moe_gpu.tuning.replay_engine import BELADY, replay
from moe_gpu.tuning.simulate import LRU, CacheRule
from moe_gpu.tuning.trace import trace_of
from quality_baselines import RankWindow, RunningRangeBonus, null_of

STORE = ROOT / "profiling" / "out" / "quality"
SHIPPED = [ROOT / "examples" / name for name in ("tiny_mixtral", "tiny_fine_grained")]
TEXTS = ("held out", "switching domains", "own generations")
SOURCES = [
    *(ROOT / "moe_gpu" / "tuning" / name for name in ("simulate.py", "quality.py")),
    ROOT / "kernels" / "route_ref.py",
    *(ROOT / "profiling" / name for name in ("quality_baselines.py", "quality_texts.py")),
]

# where fewer strengths are measured, it is every other one
COARSE = {  # few experts, top-2
    "quality": (0.02, 0.04, 0.07, 0.1, 0.14, 0.18, 0.24, 0.32, 0.42, 0.05),  # last: the default
    "mass": (0.005, 0.015, 0.03, 0.06, 0.1, 0.15, 0.22, 0.32, 0.45),
    "range": (0.02, 0.04, 0.07, 0.11, 0.16, 0.22, 0.3, 0.4, 0.55),
    "bonus": (0.05, 0.15, 0.3, 0.5, 0.8, 1.2, 1.8),
    "window": (3, 4, 5, 6),
}
FINE = {  # many experts
    "quality": (0.006, 0.012, 0.022, 0.035, 0.05, 0.07, 0.1, 0.14, 0.2),
    "mass": (0.001, 0.003, 0.008, 0.016, 0.03, 0.05, 0.08, 0.13, 0.2),
    "range": (0.005, 0.012, 0.025, 0.045, 0.07, 0.1, 0.14, 0.2, 0.28),
    "bonus": (0.05, 0.15, 0.3, 0.5, 0.8, 1.2, 1.8),
    "window": (9, 10, 12, 16, 24),
}
BELADY_CACHE = "belady with bypass: the optimum"
SERVED, DEMAND = CacheRule(), CacheRule(affinity_from="demand")
EXACT_CACHES = [
    SERVED, LRU, *(CacheRule(name, bypass=False) for name in ("lfu", "affinity", "affinity_over_age"))
]  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A job with its place in the tables."""

    family: str
    job: Job


def curves(
    grid: dict, slots: int, scale: tuple[float, ...], full: bool, main_only: bool
) -> Iterator[Entry]:
    """Yield the settings of one cache size; not ``full`` is three rules at fewer strengths."""
    exact = EXACT_CACHES if full else EXACT_CACHES[:2]
    yield from (Entry("exact", Job(Exact(), slots, cache)) for cache in exact)
    families = {
        "quality budget, calibrated": lambda b: QualityBudget(b, scale),
        "mass budget": MassBudget,
        "range-scaled bonus, running": RunningRangeBonus,
    }
    if full:
        families |= {"quality budget": QualityBudget, "original bonus": CacheBonus}
    if full and not main_only:
        families |= {
            "range-scaled bonus, per token": lambda b: CacheBonus(b, "logit_range", 1),
            "rank window": RankWindow,
        }
    knob = {"original bonus": "bonus", "rank window": "window"}
    for family, make in families.items():
        name = knob.get(family, family.split(" ")[0].split("-")[0])
        step = 1 if full else 2
        for strength in grid[name][::step]:
            yield Entry(family, Job(make(strength), slots))
    if full:
        yield Entry("identity", Job(QualityBudget(0.0), slots))
    if full and not main_only:
        for budget in grid["quality"][2::2]:
            policy = QualityBudget(budget, scale)
            yield Entry("near-tie null", Job(null_of(policy, slots, SERVED), slots))
            yield Entry("quality budget, affinity from demand", Job(policy, slots, DEMAND))
            yield Entry("quality budget, LRU", Job(policy, slots, LRU))
        for strength in grid["range"][1::2]:
            yield Entry(
                "range-scaled bonus, running, LRU", Job(RunningRangeBonus(strength), slots, LRU)
            )


def key_of(*parts: object) -> str:
    """Return a short digest of what a result depends on."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def file_of(version: tuple, text: str, entry: Entry) -> str:
    """Return the name of the file that holds one result."""
    return f"{key_of(version, text, entry.job)}.safetensors"


def digest_of(folder: Path) -> str:
    """Return a digest of a model and its text."""
    names = ("model.safetensors", "held_out.safetensors")
    return key_of(*((folder / name).read_bytes() for name in names))


def code_digest() -> str:
    """Return a digest of the code that decides the figures."""
    return key_of(*(path.read_bytes() for path in SOURCES))


def save(path: Path, outcome: Outcome, entry: Entry, cache: str = "") -> None:
    """Write one result whole or not at all."""
    tensors = {name: value for name, value in vars(outcome).items() if name != "pairs"}
    described = {
        "family": entry.family,
        "policy": repr(entry.job.policy),
        "strength": repr(float(entry.job.policy.strength)),
        "slots": str(entry.job.slots),
        "cache": cache or str(entry.job.cache),
        "pairs": str(outcome.pairs),
    }
    partial = path.with_suffix(".partial")
    save_file({name: value.contiguous() for name, value in tensors.items()}, partial, described)
    partial.replace(path)


def load(path: Path) -> tuple[dict, Outcome]:
    """Read one result: what it is of, and the counts."""
    with safe_open(path, framework="pt") as file:
        described = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return described, Outcome(**tensors, pairs=int(described["pairs"]))


def run(folder: Path, store: Path, quick: bool, main_only: bool = False) -> None:
    """Evaluate every setting on one model that has not been evaluated yet."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    ).eval()
    E, K = model.config.num_local_experts, model.config.num_experts_per_tok
    grid = FINE if E > 16 else COARSE
    rows = slice(12, 14) if quick else quality_texts.ROWS
    sizes = sorted({max(K, slots) for slots in (K, E // 4, E // 2, 3 * E // 4)})
    home = store / folder.name
    home.mkdir(parents=True, exist_ok=True)
    version = digest_of(folder), code_digest(), quick

    scale = calibrated(model, folder, home, version, quick)
    texts = {
        "held out": lambda: quality_texts.held_out(folder, rows),
        "switching domains": lambda: quality_texts.switching(folder, rows),
        "own generations": lambda: quality_texts.generated(model, folder, rows),
    }
    plan = [
        (
            text,
            slots,
            list(curves(grid, slots, scale, text == "held out" and slots == E // 2, main_only)),
        )
        for text in TEXTS
        for slots in (
            [E // 2, *(s for s in sizes if s != E // 2)] if text == "held out" else [E // 2]
        )
    ]
    bar = tqdm(total=sum(len(entries) for *_, entries in plan), unit="setting", desc=folder.name)
    wanted = {file_of(version, text, entry): text for text, _, entries in plan for entry in entries}
    optima = {
        (text, slots): f"{key_of(version, text, slots, OPTIMUM)}.safetensors"
        for text, slots, _ in plan
    }
    wanted |= {name: text for (text, _), name in optima.items()}
    config = model.config
    index = {
        "model": folder.name,
        "experts": E,
        "top_k": K,
        "layers": config.num_hidden_layers,
        "expert_bytes": 3 * config.hidden_size * config.intermediate_size * 2,  # as bf16
        "layer_scale": scale,
        "quick": quick,
        "commit": git_commit(),
        "texts": wanted,
    }
    # first of all: a report of what is there can be made at any time
    partial = home / "index.partial"
    partial.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    partial.replace(home / "index.json")
    for text, slots, entries in plan:
        paths = {entry: home / file_of(version, text, entry) for entry in entries}
        todo = [entry for entry in entries if not paths[entry].exists()]
        bar.update(len(entries) - len(todo))
        optimum = home / optima[text, slots]
        if not todo and optimum.exists():
            continue
        segments = quality_texts.SEGMENTS if text == "switching domains" else 1
        evaluation = Evaluation(model, texts[text](), segments)
        by_job = {entry.job: entry for entry in todo}
        bar.set_postfix_str(f"{text}, {slots} of {E}")
        for job, outcome in evaluation.run(list(by_job)):
            save(paths[by_job[job]], outcome, by_job[job])
            bar.update()
        if not optimum.exists():
            save(optimum, with_optimum(evaluation, slots, segments), entries[0], BELADY_CACHE)
    bar.close()


def with_optimum(evaluation: Evaluation, slots: int, segments: int) -> Outcome:
    """Return exact routing with the loads of Belady's optimum, which knows what comes."""
    ((_, exact),) = evaluation.run([Job(Exact(), slots)])
    demand_NTLK = trace_of(evaluation).demand().numpy()
    N, T, L, K = demand_NTLK.shape
    # rows of a stream follow one another; every layer has a cache of its own
    demand = demand_NTLK.reshape(N // segments, segments * T, L, K).transpose(0, 2, 1, 3)
    demand = demand.reshape(-1, segments * T, 1, K)
    hits = replay(demand, evaluation.num_experts, [BELADY], [slots], unit=1, filled=True)
    loads = K - hits[:, :, 0, 1, 0].reshape(N // segments, L, segments * T)
    loads_NT = torch.from_numpy(loads.sum(1).reshape(N, T)).to(torch.int16)
    return replace(exact, loads_NT=loads_NT)


def calibrated(model, folder, home, version, quick) -> tuple[float, ...]:
    """Return the layer scale, measured on rows of its own."""
    path = home / f"calibration-{key_of(version)}.json"
    if not path.exists():
        rows = slice(56, 57) if quick else quality_texts.CALIBRATION_ROWS
        rows_NT = quality_texts.held_out(folder, rows)
        found = layer_sensitivity(model, rows_NT, model.config.num_local_experts // 2)
        path.write_text(json.dumps(list(found.layer_scale)) + "\n", encoding="utf-8")
    return tuple(json.loads(path.read_text(encoding="utf-8")))


def main() -> None:
    """Parse the command line and do it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", nargs="?", choices=("all", "run", "report"), default="all")
    parser.add_argument("models", nargs="*", type=Path, help="default: the shipped ones")
    parser.add_argument(
        "--main", action="store_true", help="without the lesser baselines and the controls"
    )
    parser.add_argument("--quick", action="store_true", help="a smoke test")
    parser.add_argument("--store", type=Path, default=STORE, help="where single results are kept")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where tables and plots go")
    args = parser.parse_intermixed_args()  # options may stand between command and models
    models = args.models or SHIPPED
    for folder in models:
        if not re.fullmatch(r"\w+", folder.name) or not (folder / "config.json").exists():
            parser.error(f"{folder} is no folder of a model")
    if args.quick and args.out == RESULTS:
        args.store, args.out = STORE.parent / "quality_quick", STORE.parent
    if args.command in ("all", "run"):
        for folder in models:
            run(folder, args.store, args.quick, args.main)
    if args.command in ("all", "report"):
        from quality_report import report

        report(args.store, args.out)


if __name__ == "__main__":
    main()
