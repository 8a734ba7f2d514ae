"""python -m moe_gpu replay."""

import json

import pytest
import torch

pytest.importorskip("transformers")

from moe_gpu.__main__ import main  # noqa: E402
from moe_gpu.kernels.score_ref import ScoreRule  # noqa: E402
from moe_gpu.tuning.trace import RoutingTrace  # noqa: E402


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "trace.safetensors"
    logits_LNTE = torch.randn(2, 3, 20, 8, generator=torch.Generator().manual_seed(0))
    RoutingTrace(logits_LNTE, 2, ScoreRule(), 1_000_000, "abc").save(path)
    return str(path)


def test_table(trace, capsys):
    assert main(["replay", trace]) == 0
    out = capsys.readouterr().out
    assert "3 rows of 20 tokens, 2 layers, 8 experts, top-2" in out
    for word in ("2 of 8", "4 of 8", "6 of 8", "\nlru ", "\nbelady with bypass "):
        assert word in out


def test_json_and_options(trace, capsys):
    asked = ["--slots", "3", "5", "--eviction", "lru", "belady", "--quality", "0.1", "--json"]
    assert main(["replay", trace, *asked]) == 0
    content = json.loads(capsys.readouterr().out)
    rows = content["replayed"]
    assert {row["slots"] for row in rows} == {3, 5} and len(rows) == 2 * (1 + 2 + 1)
    assert {row["eviction"] for row in rows if not row["is_approximate"]} == {"lru", "belady"}
    for row in rows:
        assert row["mb_per_token"] == pytest.approx(row["loads_per_token"])
        assert row["loads_per_token"] == pytest.approx(4 * (1 - row["hit_rate"]))


def test_pool_and_plot(trace, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    plot = tmp_path / "replay.png"
    assert main(["replay", trace, "--pool", "--slots", "4", "--plot", str(plot)]) == 0
    assert "8 of 16" in capsys.readouterr().out
    assert plot.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["none.safetensors"], "none.safetensors: "),
        (["TRACE", "--slots", "1"], "slots must lie in [2, 8], got 1"),
        (["TRACE", "--eviction", "luck"], "invalid choice: 'luck'"),
        (["TRACE", "--quality", "-1"], "budget must be finite and >= 0"),
        (["TRACE", "--decay", "2"], "decay must lie in [0, 1]"),
        (["TRACE", "--pool", "--quality", "0.1"], "not with a pool"),
        (["TRACE", "--plot", "none/replay.png"], "there is no such folder"),
    ],
)
def test_refuses_in_one_sentence(trace, arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["replay", *(trace if a == "TRACE" else a for a in arguments)])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and message in err and len(err.splitlines()) == 1
