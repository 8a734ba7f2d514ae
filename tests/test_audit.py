"""The audit of swaps: each figure against one computed by hand, and what it must not touch."""

import gc
import math
import random
from dataclasses import asdict

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F

import moe_gpu
from checkpoints import save
from mixtral import (  # noqa: F401 - the last is a fixture that runs by itself
    EXPERTS,
    LAYERS,
    logits_of,
    make_model,
    prompt,
    text_of,
    without_interpreter,
)
from moe_gpu import CacheBonus, Exact, MassBudget, MoEGate, QualityBudget, Routing
from moe_gpu.huggingface import audit
from moe_gpu.huggingface.audit import Auditor, LayerAuditor, rank_correlation, swap_pairs
from moe_gpu.kernels.route_ref import SIMILARITY

SWAP_ALL = MassBudget(1.0, protect=1)


# -- one layer, by hand

LOGITS = [3.0, 1.0, 0.0, -1.0, -1.0, 2.0, -2.0, -3.0]  # demand 0 and 5; 1 stands in for 5
Y, USED = [3.0, 4.0], [1.0, 0.0]


def make_auditor(rate=1.0, resident=(0, 1, 2), policy=SWAP_ALL, **options):
    gate = MoEGate(num_experts=8, top_k=2, policy=policy, **options)
    gate.set_resident(resident)
    return gate, LayerAuditor(gate, random.Random(0), rate, timeout_s=5.0)


def route_once(gate, auditor, logits=LOGITS, x=(7.0, 8.0), used=USED, y=Y):
    """Route one token, whose first expert says (9, 9) and whose last one says ``used``."""
    routing = gate.route(torch.tensor([logits]))
    auditor.draw(torch.tensor([x]), routing)
    auditor.sample(torch.tensor([[[9.0, 9.0], used]]), torch.tensor([y]))


def test_one_swap_by_hand():
    gate, auditor = make_auditor()
    route_once(gate, auditor)
    auditor.compare(0, lambda x: pytest.fail("nobody waits for expert 0"))
    assert auditor.counts() == {"sampled": 1, "compared": 0, "dropped": 0, "pending": 1}
    seen = []
    auditor.compare(5, lambda x: (seen.append(x), torch.tensor([[1.0, 2.0]]))[1])
    assert torch.equal(seen[0], torch.tensor([[7.0, 8.0]]))
    assert auditor.counts() == {"sampled": 1, "compared": 1, "dropped": 0, "pending": 0}

    own = math.e**2 / (math.e**3 + math.e**2)
    used = math.e / (math.e**3 + math.e)
    share = math.e / (math.e**3 + math.e**2)  # the price is about the demand's mass
    error = math.hypot(own * 1 - used * 1, own * 2) / 5
    price = math.sqrt(own**2 + share**2 - 2 * SIMILARITY * own * share)
    expected = torch.tensor([[error, 1 / math.sqrt(5), price]], dtype=torch.float64)
    torch.testing.assert_close(auditor.comparisons(), expected, rtol=1e-6, atol=0)
    auditor.compare(5, lambda x: pytest.fail("compared once"))
    auditor.sample(torch.zeros(1, 2, 2), torch.ones(1, 2))
    assert auditor.counts()["sampled"] == 1, "of a call that was sampled already"


def test_weights_that_do_not_sum_to_one():
    gate, auditor = make_auditor(renormalize=False)
    route_once(gate, auditor)
    auditor.compare(5, lambda x: torch.tensor([[1.0, 2.0]]))
    p = torch.tensor(LOGITS, dtype=torch.float64).softmax(0)
    error = math.hypot(p[5] - p[1], 2 * p[5]) / 5
    assert auditor.comparisons()[0, 0] == pytest.approx(error, rel=1e-6)


def test_the_price_is_the_one_that_the_rule_asks_for():
    """The budget that just allows a swap is its price."""
    gate, auditor = make_auditor()
    route_once(gate, auditor)
    auditor.compare(5, lambda x: x)
    price = auditor.comparisons()[0, 2].item()
    for budget, swaps in ((price * 0.9999, 0), (price * 1.0001, 1)):
        gate, _ = make_auditor(policy=QualityBudget(budget))
        gate.route(torch.tensor([LOGITS]))
        assert gate.metrics().swaps == swaps


def test_pairs_worst_wanted_with_best_stand_in():
    assert swap_pairs([4, 1, 7, 2], [4, 1, 7, 2]) == []
    assert swap_pairs([4, 1, 7, 2], [4, 0, 6, 5]) == [(2, 0), (7, 6), (1, 5)]
    assert swap_pairs([4, 1, 7, 2], [4, 7, 3, 5]) == [(2, 3), (1, 5)]


def test_the_queue_drops_the_oldest():
    gate, auditor = make_auditor()
    for number in range(audit.WAITING + 3):
        route_once(gate, auditor, x=(float(number), 0.0))
    assert auditor.counts() == {"sampled": 67, "compared": 0, "dropped": 3, "pending": 64}
    seen = []
    auditor.compare(5, lambda x: (seen.append(x), x)[1])
    assert seen[0][:, 0].tolist() == list(range(3, 67))
    assert auditor.counts() == {"sampled": 67, "compared": 64, "dropped": 3, "pending": 0}


def test_the_latest_comparisons_are_kept(monkeypatch):
    monkeypatch.setattr(audit, "KEPT", 3)
    gate, auditor = make_auditor()
    assert auditor.comparisons().shape == (0, 3)
    for norm in (1.0, 2.0, 4.0, 5.0):
        route_once(gate, auditor, y=[norm, 0.0])
        auditor.compare(5, lambda x: torch.tensor([[0.0, 1.0]]))
    errors = auditor.comparisons()[:, 0]
    assert len(errors) == 3 and auditor.counts()["compared"] == 4
    shares = errors / errors.max()
    torch.testing.assert_close(shares.sort().values, torch.tensor([0.4, 0.5, 1]).double())


def test_only_the_wanted_expert_is_taken_out():
    gate, auditor = make_auditor()
    other = [3.0, 1.0, 0.0, -1.0, -1.0, -2.0, 2.0, -3.0]  # wants 6
    for logits in (LOGITS, other, LOGITS):
        route_once(gate, auditor, logits=logits)
    auditor.compare(6, lambda x: x)
    assert auditor.counts() == {"sampled": 3, "compared": 1, "dropped": 0, "pending": 2}
    auditor.compare(5, lambda x: x)
    assert auditor.counts() == {"sampled": 3, "compared": 3, "dropped": 0, "pending": 0}


def test_an_expert_that_fails_leaves_the_sample_waiting():
    gate, auditor = make_auditor()
    route_once(gate, auditor)
    before = auditor.counts()
    with pytest.raises(ZeroDivisionError):
        auditor.compare(5, lambda x: 1 / 0)
    assert auditor.counts() == before and not len(auditor.comparisons())
    auditor.compare(5, lambda x: x)
    assert auditor.counts()["compared"] == 1


def test_a_call_that_failed_is_not_sampled_by_the_next():
    gate, auditor = make_auditor()
    auditor.draw(torch.ones(1, 2), gate.route(torch.tensor([LOGITS])))  # its experts never ran
    gate.policy = Exact()
    route_once(gate, auditor)
    assert auditor.counts()["sampled"] == 0


def test_what_is_kept_holds_no_call():
    """Each sample is as large as itself."""
    gate, auditor = make_auditor()
    routing = gate.route(torch.tensor([LOGITS] * 4))
    auditor.draw(torch.randn(4, 2), routing)
    auditor.sample(torch.randn(4, 2, 2), torch.randn(4, 2))
    for sample in auditor._waiting:
        for part in (sample.x_D, sample.used_D, sample.terms_4):
            assert part.untyped_storage().nbytes() == part.nbytes


def test_what_is_drawn_holds_no_graph():
    gate, auditor = make_auditor()
    logits, x = (torch.tensor([row], requires_grad=True) for row in (LOGITS, [7.0, 8.0]))
    auditor.draw(x, gate.route(logits))
    parts = [part for part in auditor._drawn if isinstance(part, torch.Tensor)]
    assert len(parts) == 6 and not any(part.requires_grad for part in parts)


def test_outputs_of_norm_zero_are_no_figure():
    gate, auditor = make_auditor()
    route_once(gate, auditor, y=[0.0, 0.0])
    route_once(gate, auditor)
    auditor.compare(5, lambda x: torch.tensor([[1.0, 2.0]] * len(x)))
    found = auditor.comparisons()
    assert len(found) == 2 and found[0, 0] == math.inf
    figures = audit._figures(found)
    assert figures["error_mean"] == figures["error_p99"] == found[1, 0].item()
    assert audit._figures(found[:1]) == {}


def test_a_token_keeps_its_row():
    """Of three tokens the last two are drawn."""

    class Draws:
        values = iter([0.9, 0.1, 0.2])

        def random(self):
            return next(self.values)

    gate, _ = make_auditor()
    auditor = LayerAuditor(gate, Draws(), 0.5, timeout_s=5.0)
    other = [2.0, 1.0, 0.0, -1.0, -1.0, -2.0, 1.5, -3.0]  # wants 6
    auditor.draw(
        torch.tensor([[1.0], [2.0], [3.0]]), gate.route(torch.tensor([LOGITS, LOGITS, other]))
    )
    auditor.sample(torch.arange(6.0).view(3, 2, 1), torch.tensor([[1.0], [-5.0], [10.0]]))
    seen = {}
    for expert in (5, 6):
        auditor.compare(expert, lambda x, expert=expert: seen.setdefault(expert, x))
    assert {expert: x.item() for expert, x in seen.items()} == {5: 2.0, 6: 3.0}
    first, second = auditor.comparisons()[:, 0].tolist()
    e = math.exp
    assert first == pytest.approx(
        (e(2) / (e(3) + e(2)) * 2 - e(1) / (e(3) + e(1)) * 3) / 5, rel=1e-5
    )
    second_error = e(1.5) / (e(2) + e(1.5)) * 3 - e(1) / (e(2) + e(1)) * 5
    assert second == pytest.approx(abs(second_error) / 10, rel=1e-5)


def test_exact_routing_and_prefill_draw_nothing():
    class Draws:
        def random(self):
            pytest.fail("drew")

    gate, _ = make_auditor(max_policy_tokens=3)
    auditor = LayerAuditor(gate, Draws(), 1.0, timeout_s=5.0)
    auditor.draw(torch.ones(4, 2), gate.route(torch.tensor([LOGITS] * 4)))  # prefill
    gate.policy = Exact()
    auditor.draw(torch.ones(1, 2), gate.route(torch.tensor([LOGITS])))
    assert auditor._drawn is None


def test_correlation_of_ranks():
    def correlation(*rows):
        return rank_correlation(*(torch.tensor(row, dtype=torch.float64) for row in rows))

    assert correlation([1, 2, 3], [1, 10, 11]) == pytest.approx(1)
    assert correlation([1, 2, 3], [5, 4, -1]) == pytest.approx(-1)
    # ranks 1, 2.5, 2.5, 4 against 1, 3, 2, 4
    assert correlation([1, 2, 2, 3], [1, 3, 2, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert correlation([1, 1, 1], [1, 2, 3]) is correlation([1], [2]) is correlation([], []) is None


# -- in a model


class Oracle:
    """Does what the audit does, from what hooks see and weights that were copied beforehand."""

    def __init__(self, model):
        self.calls = []  # (layer, x_TD, logits_TE, weights_TK, ids_TK, y_TD)
        self.weights = []
        self.hooks = []
        for layer, decoder in enumerate(model.model.layers):
            experts = decoder.mlp.experts
            self.weights.append([p.detach().clone() for p in experts.parameters()])
            self.hooks += [
                decoder.mlp.gate.register_forward_hook(self._routed),
                decoder.mlp.register_forward_hook(
                    lambda _, x, y, layer=layer: self.calls.append(
                        (layer, x[0].flatten(0, 1), *self.routing, y.flatten(0, 1))
                    )
                ),
            ]

    def _routed(self, _, x, routing):
        self.routing = routing

    def expert(self, layer, e, x):
        gate_up, down = (weight[e].to(x.device) for weight in self.weights[layer])
        gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, down).float()

    def comparisons(self, layer, most_tokens=64):
        """Error, cosine and price, sorted by price; and how many swaps still wait."""
        found, waiting = [], []
        for at, x_TD, logits_TE, weights_TK, ids_TK, y_TD in self.calls:
            if at != layer:
                continue
            executed = set(ids_TK.flatten().tolist())
            found += [terms for m, terms in waiting if m in executed]
            waiting = [(m, terms) for m, terms in waiting if m not in executed]
            if len(x_TD) > most_tokens:
                continue
            for x, logits, weights, ids, y in zip(
                x_TD, logits_TE.float(), weights_TK, ids_TK.tolist(), y_TD, strict=True
            ):
                demand = logits.argsort(descending=True, stable=True)[: len(ids)].tolist()
                gone = [e for e in demand[::-1] if e not in ids]
                came = [e for e in ids if e not in demand]
                shares = logits.exp() / logits[demand].exp().sum()
                for m, r in zip(gone, came, strict=True):
                    wanted, used = self.expert(layer, m, x), self.expert(layer, r, x)
                    moved = shares[m] * wanted - weights[ids.index(r)] * used
                    price = shares[m] ** 2 + shares[r] ** 2 - 1.5 * shares[m] * shares[r]
                    cosine = torch.cosine_similarity(wanted, used, dim=0)
                    waiting.append((m, (moved.norm() / y.float().norm(), cosine, price.sqrt())))
        found = torch.tensor(sorted(found, key=lambda terms: terms[2]), dtype=torch.float64)
        return found.view(-1, 3), len(waiting)


@torch.no_grad()
def decode(model, batch=1, tokens=40, seed=0):
    """Feed random tokens one at a time after a prefill; return all logits."""
    ids = prompt(seed, batch, 7 + tokens).to(model.device)
    out = model(ids[:, :7], use_cache=True)
    logits = [out.logits]
    for t in range(7, 7 + tokens):
        out = model(ids[:, t : t + 1], past_key_values=out.past_key_values)
        logits.append(out.logits)
    return torch.cat(logits, 1)


def assert_as_the_oracle(moe, oracle, most_tokens=64, rtol=1e-4):
    report = moe.audit()
    every = []
    for layer in range(LAYERS):
        expected, pending = oracle.comparisons(layer, most_tokens)
        found = moe._auditor.layers[layer].comparisons()
        found = found[found[:, 2].argsort()]
        assert len(expected) > 3
        torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol / 10)
        mine = report.layers[layer]
        assert (mine.layer, mine.compared, mine.pending) == (layer, len(expected), pending)
        assert mine.dropped == 0 and mine.sampled == mine.compared + mine.pending
        assert mine.error_mean == pytest.approx(expected[:, 0].mean().item(), rel=rtol)
        every.append(expected)
    error, cosine, price = torch.cat(every).unbind(1)
    assert report.sampled == sum(layer.sampled for layer in report.layers)
    assert report.compared == len(error)
    assert report.error_mean == pytest.approx(error.mean().item(), rel=rtol)
    assert report.error_p50 == pytest.approx(error.quantile(0.5).item(), rel=rtol)
    assert report.error_p99 == pytest.approx(error.quantile(0.99).item(), rel=rtol)
    assert report.cosine_mean == pytest.approx(cosine.mean().item(), rel=rtol, abs=rtol)
    assert report.price_mean == pytest.approx(price.mean().item(), rel=rtol)
    assert report.price_correlation == pytest.approx(rank_correlation(price, error), abs=0.02)


@pytest.mark.parametrize(
    "batch, top_k, options",
    [
        (1, 2, {"policy": SWAP_ALL}),
        (1, 2, {"policy": SWAP_ALL, "max_policy_tokens": 6}),  # the prompt has 7: prefill
        (3, 3, {"policy": MassBudget(0.6, protect=0), "slots": 5}),  # several swaps of a token
        (2, 2, {"policy": CacheBonus(0.5), "pool": True, "slots": 3}),
        (2, 3, {"policy": QualityBudget(0.4), "prefetch": ["next_gate", "background"]}),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*experts (of|that) one token")
def test_every_comparison_is_the_oracles(batch, top_k, options, monkeypatch):
    monkeypatch.setattr(audit, "WAITING", 10_000)
    model = make_model(num_experts_per_tok=top_k)
    oracle = Oracle(model)
    with moe_gpu.attach(model, **{"slots": 4, "audit": 1.0} | options) as moe:
        decode(model, batch)
        assert moe.audit().sampled == moe.metrics().swaps > 10
        assert_as_the_oracle(moe, oracle, options.get("max_policy_tokens", 64))


def test_in_bfloat16(monkeypatch):
    monkeypatch.setattr(audit, "WAITING", 10_000)
    model = make_model(dtype=torch.bfloat16)
    oracle = Oracle(model)
    with moe_gpu.attach(model, slots=4, policy=SWAP_ALL, audit=1.0) as moe:
        decode(model, batch=2)
        assert_as_the_oracle(moe, oracle, rtol=0.02)


def test_of_a_loaded_model(tmp_path):
    model = make_model()
    folder = save(model, tmp_path)
    options = {"slots": 4, "policy": SWAP_ALL, "audit": 0.5}
    with moe_gpu.attach(model, **options) as moe:
        decode(model)
        expected = moe.audit()
    loaded, moe = moe_gpu.load(folder, device="cpu", host_memory=0, **options)  # from disk
    with moe:
        decode(loaded)
        assert moe.audit() == expected and expected.compared > 5
    assert moe.audit().compared == expected.compared, "figures outlive the weights"


@torch.no_grad()
def mix(model, tokens, seed=0):
    """One call of each layer's block by itself."""
    x = torch.randn(1, tokens, 32, generator=torch.Generator().manual_seed(seed))
    return torch.cat([decoder.mlp(x) for decoder in model.model.layers])


@pytest.fixture(scope="module")
def model():
    """Shared: a test that attaches to it detaches from it."""
    return make_model()


def test_the_rate_is_kept_in_each_layer(model):
    reports = []
    for rate in (1.0, 0.3, 0.3):
        with moe_gpu.attach(model, slots=4, policy=SWAP_ALL, audit=rate) as moe:
            for seed in range(20):
                mix(model, tokens=40, seed=seed)
            reports.append(moe.audit())
    every, some, again = reports
    assert some == again, "the same run draws the same"
    for layer in range(LAYERS):
        swaps, drawn = every.layers[layer].sampled, some.layers[layer].sampled
        assert swaps > 100
        assert abs(drawn - 0.3 * swaps) < 4 * math.sqrt(0.21 * swaps)


def test_changes_no_bit_and_no_load(model):
    def run(**options):
        with moe_gpu.attach(model, slots=4, policy=SWAP_ALL, **options) as moe:
            logits = [decode(model, batch) for batch in (1, 3)]
            metrics = asdict(moe.metrics())
        timed = ("stall_ms", "layers")
        return logits, {name: value for name, value in metrics.items() if name not in timed}

    logits, metrics = run()
    audited_logits, audited_metrics = run(audit=1.0)
    assert metrics["swaps"] > 0 and metrics == audited_metrics
    assert all(map(torch.equal, logits, audited_logits))


@pytest.mark.parametrize("off", [{}, {"audit": None}, {"audit": 0}, {"audit": 0.0}], ids=str)
def test_off_takes_nothing(model, off, monkeypatch):
    monkeypatch.setattr(Auditor, "__init__", lambda *_: pytest.fail("made"))
    with moe_gpu.attach(model, slots=4, policy=SWAP_ALL, **off) as moe:
        decode(model, tokens=2)
        assert all(layer.audit is None for layer in moe._layers)
        with pytest.raises(RuntimeError, match=r"no swap is audited: attach\(\.\.\., audit=0.01\)"):
            moe.audit()
        moe.reset_metrics()


def test_exact_routing_never_samples(model):
    with moe_gpu.attach(model, slots=4, policy=Exact(), audit=1.0) as moe:
        decode(model, tokens=4)
        report = moe.audit()
        assert report.sampled == 0 and report.error_mean is report.price_correlation is None
        moe.set_policy(SWAP_ALL)
        decode(model, tokens=4)
        assert moe.audit().sampled > 0


def test_reset(model):
    with moe_gpu.attach(model, slots=4, policy=SWAP_ALL, audit=1.0) as moe:
        decode(model)
        assert moe.audit().compared and moe.audit().pending
        moe.reset_metrics()
        empty = moe.audit()
        assert (empty.sampled, empty.compared, empty.dropped, empty.pending) == (0, 0, 0, 0)
        assert empty.error_mean is None
        decode(model)
        again = moe.audit()
        assert again.sampled == again.compared + again.dropped + again.pending > 0


def test_detach_frees(model):
    moe = moe_gpu.attach(model, slots=4, policy=SWAP_ALL, audit=1.0)
    decode(model)
    before = moe.audit()
    kept = [
        StorageWeakRef(part.untyped_storage())
        for layer in moe._auditor.layers
        for sample in layer._waiting
        for part in (sample.x_D, sample.used_D)
    ]
    assert len(kept) == 2 * before.pending > 0
    moe.detach()
    gc.collect()
    assert all(memory.expired() for memory in kept)
    after = moe.audit()
    assert after.pending == 0 and after.dropped == before.dropped + before.pending
    assert after.sampled == before.sampled and after.error_mean == before.error_mean
    decode(model, tokens=1)
    assert moe.audit() == after


class Fails(torch.nn.Module):
    """An activation that fails once, at the n-th expert."""

    def __init__(self, act_fn, call):
        super().__init__()
        self.act_fn, self.left = act_fn, call

    def forward(self, x):
        self.left -= 1
        if self.left == 0:
            raise FloatingPointError("in an expert")
        return self.act_fn(x)


@pytest.mark.parametrize("call", range(1, 7))
def test_an_exception_in_the_middle_of_a_forward(call):
    """In an expert of the model or of the audit, all of them in turn."""
    model = make_model()
    experts = model.model.layers[1].mlp.experts
    own_act = experts.act_fn
    with moe_gpu.attach(model, slots=4, policy=SWAP_ALL, audit=1.0) as moe:
        decode(model, tokens=6)
        experts.act_fn = Fails(own_act, call)
        with pytest.raises(FloatingPointError):
            decode(model)
        experts.act_fn = own_act
        for table in moe.offloader.cache.tables:
            table.check()
            assert not any(table.leases_S)
        decode(model)
        report = moe.audit()
        for part in (report, *report.layers):
            assert part.sampled == part.compared + part.dropped + part.pending > 0
        assert all(torch.isfinite(layer.comparisons()).all() for layer in moe._auditor.layers)


def test_in_inference_mode_and_out_of_it(model):
    """Samples of one mode are compared in another."""
    with torch.inference_mode():
        moe = moe_gpu.attach(model, slots=4, policy=SWAP_ALL, audit=1.0)
        with torch.inference_mode():
            text_of(model, prompt(0), tokens=12)
    pending = moe.audit().pending
    for seed in range(20):
        model(prompt(seed, tokens=1))  # gradients are on; the weights ask for none in slots
    assert moe.audit().compared > 0 < pending
    with torch.inference_mode():
        logits_of(model, prompt(1))
        moe.audit()
    moe.reset_metrics()
    text_of(model, prompt(1), tokens=12)
    assert moe.audit().compared > 0
    moe.detach()


@pytest.mark.parametrize(
    "rate, error, message",
    [
        (True, TypeError, "audit must be a number, got True"),
        ("1%", TypeError, "audit must be a number, got '1%'"),
        (1.5, ValueError, r"audit must lie in \[0, 1\], got 1.5"),
        (-0.1, ValueError, r"audit must lie in \[0, 1\], got -0.1"),
        (math.nan, ValueError, r"audit must lie in \[0, 1\], got nan"),
    ],
    ids=str,
)
def test_refuses(model, rate, error, message):
    with pytest.raises(error, match=message):
        moe_gpu.attach(model, slots=4, audit=rate)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, rtol", [(torch.float32, 1e-3), (torch.bfloat16, 0.02)], ids=str)
def test_on_a_device(dtype, rtol, monkeypatch):
    monkeypatch.setattr(audit, "WAITING", 10_000)
    model = make_model(dtype=dtype)
    options = {"slots": 4, "policy": SWAP_ALL, "device": "cuda"}
    with moe_gpu.attach(model, **options):
        expected = decode(model, batch=2)
    oracle = Oracle(model)
    with moe_gpu.attach(model, audit=1.0, **options) as moe:
        assert torch.equal(decode(model, batch=2), expected)
        assert_as_the_oracle(moe, oracle, rtol=rtol)


def test_reports_are_ready_for_json(model):
    with moe_gpu.attach(model, slots=EXPERTS - 2, policy=SWAP_ALL, audit=1) as moe:
        decode(model)
        found = asdict(moe.audit())
    assert found["rate"] == 1.0 and [layer["layer"] for layer in found["layers"]] == [0, 1]
    assert found.keys() - {"rate", "layers"} == found["layers"][0].keys() - {"layer"}


def test_routing_is_what_a_gate_returns():
    assert Routing._fields == ("logits", "weights", "ids"), "draw() takes them in this order"
