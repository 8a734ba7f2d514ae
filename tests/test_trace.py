"""moe_gpu/tuning/trace.py: what was recorded is what the routers said, and comes back from a file."""

import pytest
import torch

pytest.importorskip("transformers")
from safetensors.torch import save_file  # noqa: E402

import moe_gpu  # noqa: E402
from mixtral import VOCAB, make_model, without_interpreter  # noqa: E402, F401
from moe_gpu.kernels.score_ref import GroupScore, Score, ScoreRule  # noqa: E402
from moe_gpu.tuning.trace import FORMAT, RoutingTrace, record_trace  # noqa: E402


def rows(n=3, tokens=6, seed=0):
    return torch.randint(VOCAB, (n, tokens + 1), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_records_what_the_routers_said(dtype):
    model, rows_NT = make_model(dtype=dtype), rows()
    trace = record_trace(model, rows_NT, expert_bytes=7, batch_rows=2)
    assert trace.logits_LNTE.shape == (2, 3, 6, 8) and trace.logits_LNTE.dtype == dtype
    assert (trace.num_layers, trace.rows, trace.tokens, trace.num_experts) == (2, 3, 6, 8)
    assert (trace.top_k, trace.rule, trace.expert_bytes) == (2, ScoreRule(), 7)
    with torch.no_grad():
        said = model(rows_NT[:, :-1], output_router_logits=True).router_logits
    for layer in range(2):
        torch.testing.assert_close(trace.logits_LNTE[layer].flatten(0, 1), said[layer])
    assert record_trace(model, rows()).text == trace.text
    assert record_trace(model, rows(seed=1)).text != trace.text


def test_demand_is_the_order_of_the_gate():
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0], [torch.nan, 0.0, 1.0, 1.0]])
    trace = RoutingTrace(logits[None, None], 2, ScoreRule(), 0, "")
    assert trace.demand().tolist() == [[[[1, 2]], [[2, 3]]]]  # (N, T, L, K)
    two = RoutingTrace(torch.stack([logits, logits.flip(1)])[:, None], 2, ScoreRule(), 0, "")
    assert two.demand()[0, 0].tolist() == [[1, 2], [1, 2]]


def test_attached_model_is_recorded_through_its_handle():
    model, rows_NT = make_model(), rows()
    want = record_trace(model, rows_NT)
    with moe_gpu.attach(model, slots=3, policy=moe_gpu.MassBudget(9.0)) as moe:
        got = record_trace(moe, rows_NT)
    assert torch.equal(got.demand(), want.demand())


def test_file_holds_everything(tmp_path):
    trace = record_trace(make_model(dtype=torch.bfloat16), rows(), expert_bytes=9)
    trace.save(tmp_path / "trace.safetensors")
    again = RoutingTrace.load(tmp_path / "trace.safetensors")
    assert torch.equal(again.logits_LNTE, trace.logits_LNTE)
    same = ("top_k", "rule", "expert_bytes", "text")
    assert all(getattr(again, name) == getattr(trace, name) for name in same)
    assert [path.name for path in tmp_path.iterdir()] == ["trace.safetensors"]
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        trace.save(tmp_path / "none" / "trace.safetensors")


def test_score_rule_and_bias_come_back(tmp_path):
    rule = ScoreRule(
        score=Score.SIGMOID, renormalize=False, scaling_factor=2.5, num_groups=4, top_groups=2,
        group_score=GroupScore.MAX,
    )  # fmt: skip
    logits_LNTE, bias_LE = torch.randn(2, 3, 4, 8), torch.randn(2, 8)
    trace = RoutingTrace(logits_LNTE, 2, rule, 0, "", bias_LE)
    trace.save(tmp_path / "trace.safetensors")
    again = RoutingTrace.load(tmp_path / "trace.safetensors")
    assert again.rule == rule and torch.equal(again.bias_LE, bias_LE)
    assert torch.equal(again.demand(), trace.demand())
    plain = RoutingTrace(logits_LNTE, 2, ScoreRule(), 0, "").demand()
    assert not torch.equal(again.demand(), plain)


WHOLE = {"format": FORMAT, "top_k": "2", "score_rule": "{}", "expert_bytes": "0", "text": ""}


@pytest.mark.parametrize(
    "changes, logits, message",
    [
        ({"format": "other"}, torch.zeros(1, 1, 1, 4), "is not a routing trace"),
        ({"top_k": "5"}, torch.zeros(1, 1, 1, 4), "damaged"),
        ({"top_k": "two"}, torch.zeros(1, 1, 1, 4), "damaged"),
        ({"expert_bytes": "-1"}, torch.zeros(1, 1, 1, 4), "damaged"),
        ({}, torch.zeros(1, 1, 4), "damaged"),
        ({"score_rule": "["}, torch.zeros(1, 1, 1, 4), "damaged"),
        ({"score_rule": '{"depth": 1}'}, torch.zeros(1, 1, 1, 4), "damaged"),
        ({"score_rule": '{"num_groups": 3}'}, torch.zeros(1, 1, 1, 4), "damaged"),
        ({}, torch.zeros(1, 0, 1, 4), "damaged"),
        ({}, torch.zeros(1, 1, 1, 4, dtype=torch.int32), "damaged"),
    ],
)
def test_other_files_are_refused(tmp_path, changes, logits, message):
    path = tmp_path / "trace.safetensors"
    save_file({"logits": logits}, path, metadata=WHOLE | changes)
    with pytest.raises(ValueError, match=f"trace=.*{message}"):
        RoutingTrace.load(path)


def test_half_a_file_is_refused(tmp_path):
    path = tmp_path / "trace.safetensors"
    record_trace(make_model(), rows()).save(path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="cannot be read"):
        RoutingTrace.load(path)
    with pytest.raises(OSError):
        RoutingTrace.load(tmp_path / "none")
