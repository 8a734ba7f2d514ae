"""Sequences recorded from an independent CPU implementation of the original router."""

import json
import os
from pathlib import Path

import pytest
import torch

from moe_gpu.kernels import layout
from moe_gpu.kernels.route import route
from moe_gpu.kernels.route_ref import AffinityFrom, Rule, route_ref
from routing import make_state

DEFAULT = Path(__file__).parents[2] / "shared" / "vectors"
FILE = Path(os.environ.get("MOE_GPU_VECTORS", DEFAULT)) / "adr092.jsonl"

pytestmark = pytest.mark.skipif(
    not FILE.exists(), reason="golden vectors are absent: set MOE_GPU_VECTORS to their folder"
)


def scenarios():
    if not FILE.exists():
        return [pytest.param(None, id="absent")]
    with FILE.open() as lines:
        rows = [json.loads(line) for line in lines]
    return [pytest.param(row, id=row["name"]) for row in rows]


def rules_of(scenario):
    names = ("top_k", "decay", "boost", "max_score")
    rules = {name: scenario[name] for name in names}
    return rules | {"rule": Rule.BONUS, "protect": 0, "affinity_from": AffinityFrom.EXECUTED}


def set_resident(state, experts):
    slot_of_E = torch.full_like(state.slot_of_LE[0], -1)
    slot_of_E[experts] = torch.arange(len(experts), dtype=torch.int32, device=slot_of_E.device)
    state.slot_of_LE[0] = slot_of_E


def by_reference(logits_TE, state, *, top_k, **rules):
    out = (torch.empty(len(logits_TE), top_k), torch.empty(len(logits_TE), top_k).long())
    route_ref(logits_TE, *out, None, state, 0, top_k=top_k, **rules)
    return out


def check(state, ids_TK, steps, E, within=0.0):
    """Compare one call with the steps it covered."""
    for row, step in zip(ids_TK.tolist(), steps, strict=True):
        assert sorted(row) == sorted(step["selected"])
    last = steps[-1]
    assert state.activations_LE[0].tolist() == last["activations"]
    counters = state.counters_LC[0].tolist()
    assert counters[layout.HITS] == last["hits"] and counters[layout.MISSES] == last["misses"]
    # one token rounds as the recording does: decay, then boost
    assert state.affinity_LE[0].tolist() == pytest.approx(last["affinity"], abs=within, rel=0)
    executed_E = state.record_LR[0, layout.RECORD_HEADER :][:E]
    missing = state.slot_of_LE[0] < 0
    requested = ((executed_E > 0) & missing).nonzero().flatten().tolist()
    assert requested == sorted({e for step in steps for e in step["requests"]})


@pytest.mark.parametrize("path", ["reference", "device"])
@pytest.mark.parametrize("scenario", scenarios())
def test_token_by_token(scenario, path, device):
    E, rules = scenario["num_experts"], rules_of(scenario)
    where = "cpu" if path == "reference" else device
    state = make_state(E, strength=scenario["bonus"], device=where)
    for step in scenario["steps"]:
        set_resident(state, step["resident"])
        logits_TE = torch.tensor([step["logits"]], dtype=torch.float32, device=where)
        if path == "reference":
            _, ids = by_reference(logits_TE, state, **rules)
        else:
            _, ids = route(logits_TE, state, 0, **rules)
        check(state, ids, [step], E)


@pytest.mark.parametrize("scenario", scenarios())
def test_runs_of_equal_residency_as_batches(scenario, device):
    E, rules = scenario["num_experts"], rules_of(scenario)
    state = make_state(E, strength=scenario["bonus"], device=device)
    steps = scenario["steps"]
    start = 0
    while start < len(steps):
        end = start + 1
        while end < len(steps) and steps[end]["resident"] == steps[start]["resident"]:
            end += 1
        set_resident(state, steps[start]["resident"])
        rows = [step["logits"] for step in steps[start:end]]
        _, ids = route(torch.tensor(rows, dtype=torch.float32, device=device), state, 0, **rules)
        check(state, ids, steps[start:end], E, within=2e-6 * max(1.0, rules["max_score"]))
        start = end
