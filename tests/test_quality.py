"""profiling/quality.py: the study resumes, its baselines and its control are what they claim."""

import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
from safetensors.torch import save_file  # noqa: E402

import moe_gpu  # noqa: E402
from mixtral import VOCAB, make_model, without_interpreter  # noqa: E402, F401
from moe_gpu import Exact, QualityBudget  # noqa: E402
from moe_gpu.kernels.score_ref import ScoreRule, score_ref  # noqa: E402
from moe_gpu.tuning.quality import Evaluation, Job  # noqa: E402
from moe_gpu.tuning.simulate import CacheRule  # noqa: E402

PROFILING = Path(__file__).parents[1] / "profiling"
RESULTS = PROFILING / "results"


@pytest.fixture(scope="module")
def study():
    """The scripts, imported by name as they import each other."""
    sys.path.insert(0, str(PROFILING))
    import quality
    import quality_baselines
    import quality_report

    yield quality, quality_baselines, quality_report
    sys.path.remove(str(PROFILING))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with held-out text of its own, as the study expects them."""
    folder = tmp_path_factory.mktemp("models") / "micro"
    make_model(seed=4).save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randint(VOCAB, (64, 25), generator=generator).int()  # noqa: E731
    save_file({"code": draw(), "prose": draw()}, folder / "held_out.safetensors")
    return folder


def test_study_runs_resumes_and_reports(study, folder, tmp_path, monkeypatch, capsys):
    quality, _, report = study
    monkeypatch.setattr(quality.quality_texts, "SEGMENTS", 2)
    store = tmp_path / "store"
    quality.run(folder, store, quick=True)
    files = set(store.rglob("*.safetensors"))
    report.report(store, tmp_path / "out")
    content = json.loads((tmp_path / "out" / "quality.json").read_text())
    assert {row["text"] for row in content["headline"]} == set(quality.TEXTS)
    half = next(row for row in content["headline"] if row["resident"] == "4 of 8")
    assert set(half["cut"]) >= {"mass budget", "quality budget", "original bonus", "rank window"}
    for text in quality.TEXTS:  # the optimum is in the tables, and one
        exact = {
            row["cache"]: row["loads_per_token"]
            for row in content["rows"]
            if (row["family"], row["text"], row["resident"]) == ("exact", text, "4 of 8")
        }
        assert exact.pop(quality.BELADY_CACHE) <= min(exact.values())
    for name in ("quality.md", "quality.png", "quality_kl.png"):
        assert (tmp_path / "out" / name).stat().st_size > 1000
    assert "At +0.5 % perplexity" in capsys.readouterr().out

    # what stands is not evaluated again, what is missing is
    lost = sorted(files)[0]
    lost.unlink()
    evaluated = []
    run = Evaluation.run
    monkeypatch.setattr(
        Evaluation, "run", lambda self, jobs: evaluated.extend(jobs) or run(self, jobs)
    )
    quality.run(folder, store, quick=True)
    assert len(evaluated) == 1 and set(store.rglob("*.safetensors")) == files
    monkeypatch.setattr(quality, "code_digest", lambda: "other code")
    quality.run(folder, store, quick=True)
    assert len(evaluated) > len(files)


def test_identity_in_the_committed_results():
    """A budget of 0 costs nothing; a strength that should swap is seen to swap."""
    rows = json.loads((RESULTS / "quality.json").read_text())["rows"]
    identity = [row for row in rows if row["family"] == "identity"]
    assert identity and all(
        abs(row["kl"]["value"]) < 1e-8 and row["swapped_pairs"] == 0 for row in identity
    )
    swept = [row for row in rows if row["family"] not in ("exact", "identity")]
    assert swept and all(row["swapped_pairs"] > 0 for row in swept)


SCORES = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0, 0.0]])


def scored(logits_BE):
    return score_ref(logits_BE, ScoreRule())


def residents(*ids):
    return torch.tensor([[expert in ids for expert in range(6)]])


@pytest.mark.parametrize(
    "window, who, expected",
    [
        pytest.param(3, (2, 3), [0, 2], id="rank 2 is inside a window of 3"),
        pytest.param(2, (2, 3), [0, 1], id="a window of K is the router's choice"),
        pytest.param(4, (3,), [0, 3], id="rank 3 is inside a window of 4"),
        pytest.param(6, (4, 5), [0, 4], id="the first is protected"),
    ],
)
def test_rank_window(study, window, who, expected):
    _, baselines, _ = study
    choose = baselines.RankWindow(window).chooser(2, torch.tensor([[float(window)]]))
    assert choose(scored(SCORES), residents(*who)).ids_TK.tolist() == [expected]


def test_running_range(study):
    _, baselines, _ = study
    choose = baselines.RunningRangeBonus(0.3).chooser(2, torch.tensor([[0.3]]))
    # range 5: a bonus of 1.5 lifts expert 2 over expert 1, not expert 3
    assert choose(scored(SCORES), residents(2)).ids_TK.tolist() == [[0, 2]]
    assert choose(scored(SCORES), residents(3)).ids_TK.tolist() == [[0, 1]]
    # a flat token: its own range would give 0.15, the running mean still gives nearly 1.5
    assert choose(scored(SCORES * 0.1 + 3), residents(3)).ids_TK.tolist() == [[0, 3]]
    fresh = baselines.RunningRangeBonus(0.3).chooser(2, torch.tensor([[0.3]]))
    assert fresh(scored(SCORES * 0.1 + 3), residents(3)).ids_TK.tolist() == [[0, 1]]


def test_null_takes_as_many_swaps_and_saves_nothing(study):
    _, baselines, _ = study
    rows_NT = torch.randint(VOCAB, (6, 30), generator=torch.Generator().manual_seed(1))
    policy = QualityBudget(0.6)
    null = baselines.null_of(policy, 4, CacheRule())
    jobs = [Job(Exact(), 4), Job(policy, 4), Job(null, 4)]
    found = dict(Evaluation(make_model(seed=4, num_hidden_layers=1), rows_NT).run(jobs))
    exact, swapped, random = (found[job] for job in jobs)
    assert random.swaps_N.sum() == swapped.swaps_N.sum() > 40
    assert random.swaps_N.tolist() == swapped.swaps_N.roll(1).tolist()
    assert swapped.loads_N.sum() < 0.8 * exact.loads_N.sum() < random.loads_N.sum()
    assert moe_gpu.QualityBudget is QualityBudget


def test_null_swaps_the_last_ranks_for_the_next(study):
    _, baselines, _ = study
    null = baselines.null_of(QualityBudget(9.0), 2, CacheRule())
    choose = null.chooser(2, torch.tensor([[9.0], [9.0]]))
    # residents at first: experts 0 and 1. Row 0 misses one, row 1 none; they exchange their counts
    scores_BE = torch.stack([SCORES[0].roll(1), SCORES[0]])  # row 0 wants 1 and 2
    picked = choose(scored(scores_BE), None)
    assert picked.demand_TK.tolist() == [[1, 2], [0, 1]]
    assert picked.ids_TK.tolist() == [[1, 2], [0, 2]]


def test_ideas_hold_the_shipped_rules(study):
    """Of the prices that were tried, two are rules of the library."""
    import quality_ideas
    from moe_gpu.kernels.route_ref import Rule, select_ref

    scores_BE = torch.randn(300, 16, generator=torch.Generator().manual_seed(2))
    resident_BE = torch.rand(300, 16, generator=torch.Generator().manual_seed(3)) < 0.5
    for priced, rule in (
        (quality_ideas.Priced(0.2), Rule.OUTPUT),
        (quality_ideas.Priced(0.1, gap=True, together=True), Rule.MASS),
    ):
        choose = priced.chooser(4, torch.full((300, 1), priced.strength))
        want = select_ref(scores_BE, resident_BE, 4, rule, priced.strength, 1)
        assert torch.equal(choose(scored(scores_BE), resident_BE).ids_TK, want.ids_TK)
        assert not torch.equal(want.ids_TK, want.demand_TK)
