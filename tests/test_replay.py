"""moe_gpu/tuning/replay.py: a replay hits what a live offloader hits, to the last pair."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

import moe_gpu  # noqa: E402
from mixtral import VOCAB, make_model, without_interpreter  # noqa: E402, F401
from moe_gpu import Exact, MassBudget  # noqa: E402
from moe_gpu.kernels.score_ref import ScoreRule  # noqa: E402
from moe_gpu.offload.eviction import POLICIES  # noqa: E402
from moe_gpu.tuning.replay import OPTIMUM, default_slots, replay_trace  # noqa: E402
from moe_gpu.tuning.trace import RoutingTrace, record_trace  # noqa: E402

EXAMPLES = Path(__file__).parents[1] / "examples"


@torch.no_grad()
def live(model, row_T, **options):
    """Decode a row token by token and return hits and loads."""
    with moe_gpu.attach(model, policy=Exact(), **options) as moe:
        cache = None
        for token in row_T[:-1]:
            out = model(token.view(1, 1), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
        metrics = moe.metrics()
    return metrics.hits, metrics.loads


@pytest.fixture(scope="module")
def small():
    model = make_model(seed=3, num_hidden_layers=3)
    rows_NT = torch.randint(VOCAB, (2, 33), generator=torch.Generator().manual_seed(0))
    return model, rows_NT, record_trace(model, rows_NT)


@pytest.mark.parametrize("bypass", [False, True], ids=["keeps", "bypass"])
@pytest.mark.parametrize("eviction", sorted(POLICIES))
def test_hits_what_a_live_offloader_hits(small, eviction, bypass):
    model, rows_NT, trace = small
    for pool, sizes in ((False, [2, 3, 6]), (True, [2, 5])):
        found = replay_trace(trace, sizes, evictions=[eviction], pool=pool)
        for one in (one for one in found if one.bypass == (bypass and eviction != "lru")):
            for n, row_T in enumerate(rows_NT):
                where = {"slots": one.slots // 3 if pool else one.slots, "pool": pool}
                hits, loads = live(model, row_T, eviction=eviction, bypass=bypass, **where)
                assert hits == one.hits_N[n] and loads == one.pairs - hits, (pool, one.slots)


@pytest.mark.parametrize("name, slots", [("tiny_mixtral", 4), ("tiny_fine_grained", 32)])
def test_hits_what_the_trained_models_hit(name, slots):
    model = AutoModelForCausalLM.from_pretrained(EXAMPLES / name, dtype=torch.float32).eval()
    rows_NT = load_file(EXAMPLES / name / "held_out.safetensors")["code"][:1, :41].long()
    trace = record_trace(model, rows_NT)
    (one,) = [
        one
        for one in replay_trace(trace, [slots], evictions=["affinity_over_root_age"])
        if one.bypass
    ]
    hits, loads = live(model, rows_NT[0], slots=slots, pool=False)
    assert hits == one.hits_N[0] and loads == round(one.loads_per_token * 40)


def test_nothing_hits_more_than_the_optimum(small):
    *_, trace = small
    for pool in (False, True):
        found = replay_trace(trace, [2, 4], pool=pool)
        for slots in {one.slots for one in found}:
            best = {o.bypass: o.hits_N for o in found if o.slots == slots and o.eviction == OPTIMUM}
            for one in (one for one in found if one.slots == slots):
                assert (one.hits_N <= best[one.bypass]).all()
            assert (best[True] >= best[False]).all()


def test_an_adaptive_policy_is_refused(small):
    with pytest.raises(TypeError, match="policy must have a fixed strength"):
        replay_trace(small[2], policies=[moe_gpu.HitRateTarget(0.9)])


def test_starts_with_the_first_experts_of_every_layer():
    """One token that wants experts 0 and 3 of 4: with two slots one hit, with four two."""
    logits_LNTE = torch.tensor([3.0, 0.0, 0.0, 2.0]).expand(2, 1, 1, 4)
    trace = RoutingTrace(logits_LNTE, 2, ScoreRule(), 0, "")
    found = replay_trace(trace, [2, 4], evictions=["lru"])
    assert [one.hits_N.tolist() for one in found if not one.bypass] == [[2], [4]]
    (pooled,) = [o for o in replay_trace(trace, [3], evictions=["lru"], pool=True) if not o.bypass]
    assert pooled.slots == 6 and pooled.hits_N.tolist() == [2]  # experts 0 to 2 of both
    assert pooled.hit_rate == 0.5 and pooled.loads_per_token == 2


def test_a_policy_is_approximate_and_exact_at_zero(small):
    *_, trace = small
    found = replay_trace(
        trace,
        [3],
        evictions=["affinity_over_root_age"],
        policies=[MassBudget(0.0), MassBudget(0.5)],
    )
    exact = next(one for one in found if one.bypass and one.policy is None)
    none, some = (one for one in found if one.policy is not None)
    assert torch.equal(none.hits_N, exact.hits_N) and (some.hits_N > exact.hits_N).all()
    assert some.name.startswith("~ MassBudget(0.5), ")


def test_default_sizes():
    assert default_slots(64, 8) == [8, 16, 32, 48] and default_slots(8, 2) == [2, 4, 6]
    assert default_slots(4, 2) == [2, 3]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"slots": [1]}, r"slots must lie in \[2, 8\], got 1"),
        ({"slots": [9]}, r"slots must lie in \[2, 8\], got 9"),
        ({"slots": [2.0]}, r"slots must lie in \[2, 8\], got 2.0"),
        ({"slots": []}, "at least one"),
        ({"decay": float("nan")}, r"decay must lie in \[0, 1\]"),
        ({"max_score": 0.0}, "max_score finite and > 0"),
        ({"evictions": ["luck"]}, "eviction must be one of .*'belady', got 'luck'"),
        ({"policies": [MassBudget(1)], "pool": True}, "not with a pool"),
    ],
)
def test_refuses(small, options, message):
    with pytest.raises(ValueError, match=message):
        replay_trace(small[2], **options)
