"""Exact routing gives the same bits whatever moved where and when, and what moved adds up."""

import inspect
import random
import warnings
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moe_gpu
from checkpoints import save
from mixtral import (  # noqa: F401 - the last is a fixture that runs by itself
    EXPERT_BYTES,
    EXPERTS,
    make_model,
    prompt,
    without_interpreter,
)
from moe_gpu import Exact, MassBudget
from moe_gpu.huggingface.attach import attach  # noqa: F401 - the modules below exist
from moe_gpu.offload import offloader as offloader_module
from moe_gpu.offload import pinning
from moe_gpu.offload.eviction import POLICIES
from moe_gpu.offload.prefetch import PREDICTORS
from moe_gpu.offload.tiers import Tier

pytestmark = pytest.mark.usefixtures("one_thread")
LAYERS = 3  # a first, a middle and a last one
LOAD = inspect.getmodule(moe_gpu.load)
PER_LAYER = ("pairs", "hits", "misses", "unique_misses", "loads", "bytes_loaded", "evictions")


class Reverse:
    """An eviction policy from outside: who was loaded by the highest id leaves first."""

    def rank(self, keys, history):
        return sorted(keys, reverse=True)


OPTIONS = {
    "eviction": st.sampled_from([*POLICIES, Reverse()]),
    "bypass": st.booleans(),
    "staging_slots": st.integers(0, 3),
    "prefetch": st.sets(st.sampled_from(PREDICTORS)),
    "prefill": st.sampled_from(["last", "warm", "keep"]),
    "stream_prefill": st.booleans(),
    "max_policy_tokens": st.sampled_from([1, 2, 64]),  # a longer call counts as a prefill
    "verify": st.booleans(),
    "affinity_from": st.sampled_from(["demand", "executed"]),
}
TEXTS = st.tuples(
    st.integers(0, 3),  # seed
    st.sampled_from([1, 2, 3, 12]),  # tokens of the prompt: one expert pair to nearly all experts
    st.sampled_from([1, 1, 3]),  # texts at once
    st.integers(0, 3),  # decode steps after it
)


@st.composite
def setups(draw):
    """Slots, tiers and a link, beside the options above."""
    pool = draw(st.booleans())
    slots = draw(st.integers(1, EXPERTS))
    mixes = [(tier,) for tier in Tier] + [tuple(Tier)]
    return {
        "options": draw(st.fixed_dictionaries(OPTIONS)) | {"slots": slots, "pool": pool},
        "mix": draw(st.sampled_from(mixes)),
        "link_gbps": draw(st.sampled_from([None, None, 1.0, 0.2])),  # 0.2: 92 us an expert
        "stream_pairs": draw(st.sampled_from([0.1, 16])),
        "seed": draw(st.integers(0, 2**16)),
    }


@torch.no_grad()
def read_text(model, seed, tokens, batch, steps):
    """Logits of a prefill and of the decode steps after it."""
    ids = prompt(seed, batch, tokens + steps).to(model.device)
    out = model(ids[:, :tokens], use_cache=True)
    logits = [out.logits]
    for step in range(steps):
        end = tokens + step
        out = model(ids[:, end : end + 1], past_key_values=out.past_key_values)
        logits.append(out.logits)
    return torch.cat(logits, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model = make_model(num_hidden_layers=LAYERS)
    return save(model, tmp_path_factory.mktemp("mixtral"))


@pytest.fixture(scope="module")
def expected(folder):
    """Logits of a text when every expert is resident: nothing is ever loaded."""
    model, moe = moe_gpu.load(folder, slots=EXPERTS, policy=Exact())

    @cache
    def logits(*text):
        found = read_text(model, *text)
        assert moe.metrics().loads == 0
        return found

    yield logits
    moe.close()


def load(folder, options, mix, link_gbps, stream_pairs, seed, patch):
    """Load with every expert in a tier drawn from ``mix``."""
    dice = random.Random(seed)

    def place(num_layers, num_experts, *_, **__):
        return [[dice.choice(mix) for _ in range(num_experts)] for _ in range(num_layers)]

    patch.setattr(LOAD, "place", place)
    patch.setattr(offloader_module, "STREAM_PAIRS", stream_pairs)
    if not torch.cuda.is_available():
        patch.setattr(pinning, "page_lock", lambda *_: None)
        patch.setattr(pinning, "page_unlock", lambda *_: None)
        options = options | {"link_gbps": link_gbps}
    return moe_gpu.load(folder, policy=Exact(), timeout_s=20, **options)


def assert_adds_up(moe):
    """Host counts, the device's counters, totals and what each layer says are one story."""
    offloader, metrics = moe.offloader, moe.metrics()
    assert metrics.pairs == metrics.hits + metrics.misses
    for name in PER_LAYER:
        assert sum(getattr(la, name) for la in metrics.layers) == getattr(metrics, name), name
    assert metrics.bytes_loaded == metrics.loads * EXPERT_BYTES
    assert sum(metrics.loads_by_tier.values()) == metrics.loads
    assert sum(metrics.bytes_by_tier.values()) == metrics.bytes_loaded
    assert sum(metrics.home_bytes.values()) == LAYERS * EXPERTS * EXPERT_BYTES

    wasted = metrics.prefetch_wasted_bytes // EXPERT_BYTES
    waiting = sum(len(t.probation) for t in {id(t): t for t in offloader.cache.tables}.values())
    staged = sum(f is not None and f.copy.is_over() for f in offloader.flights.staging)
    assert metrics.prefetch_failed == metrics.pager_restarts == 0
    assert metrics.prefetch_late <= metrics.prefetch_useful
    assert metrics.prefetch_useful + wasted <= metrics.prefetch_issued
    assert metrics.prefetch_issued <= metrics.prefetch_useful + wasted + waiting + staged
    # a prefetch that came in time is a hit, a late one the load of a miss
    urgent = metrics.loads - metrics.prefetch_issued
    assert urgent <= metrics.unique_misses <= urgent + metrics.prefetch_useful

    for layer, table in enumerate(offloader.cache.tables):
        table.check()
        assert sum(table.leases_S) == sum(
            offloader.cache.tables[flight.copy.layer] is table
            for flight in offloader.flights.on_way.values()
        )
        first = offloader.cache.key_of(layer, 0)
        slot_of_E = table.slot_of_X[first : first + EXPERTS]
        for flight in offloader.flights.on_way.values():
            if flight.copy.layer == layer:
                slot_of_E[flight.copy.expert] = -1
        assert moe.state.slot_of_LE[layer].tolist() == slot_of_E
        assert metrics.layers[layer].resident == sum(
            s != -1 for s in table.slot_of_X[first:][:EXPERTS]
        )
    return metrics


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(setup=setups(), texts=st.lists(st.tuples(TEXTS, st.booleans()), min_size=2, max_size=5))
def test_exact_output_is_independent_of_everything_else(setup, texts, folder, expected):
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.filterwarnings("ignore", ".*experts (of|that) one token")
        model, moe = load(folder, **setup, patch=patch)
        with moe:
            for text, swaps in texts:
                if swaps:  # leaves a history that exact routing would not
                    moe.set_policy(MassBudget(1.0, protect=0))
                    read_text(model, *text)
                    moe.set_policy(Exact())
                else:
                    assert torch.equal(read_text(model, *text), expected(*text)), text
            metrics = assert_adds_up(moe)
            options = setup["options"]
            ahead = options["prefetch"] or (options["stream_prefill"] and options["staging_slots"])
            if not ahead:
                assert metrics.loads == metrics.unique_misses
                assert metrics.prefetch_issued == metrics.prefetch_useful == 0
            if options["slots"] == EXPERTS:
                assert metrics.loads == metrics.misses == 0
            assert (metrics.verified > 0) == (options["verify"] and metrics.pairs > 0)
            assert metrics.superseded == 0
