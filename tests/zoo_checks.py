"""What a family must do to be called supported; each check takes a :class:`Subject`.

``tests/test_families.py`` runs them on the zoo, and ``profiling/families.py`` makes the table of
the README of them. A check that fails raises AssertionError, or what the library raises.

Shape suffixes: T tokens, E experts, K experts per token, D model width.
"""

import functools
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

import moe_gpu
from moe_gpu import CacheBonus, Exact, HitRateTarget, MassBudget, QualityBudget
from moe_gpu.huggingface.blocks import MoEBlock, find_blocks
from moe_gpu.huggingface.budget import memory_needs
from moe_gpu.huggingface.plan import plan_memory
from moe_gpu.huggingface.weights import common_layout
from moe_gpu.kernels.score_ref import GroupScore, ScoreRule, rank_experts, score_ref
from moe_gpu.policies import Policy
from zoo import LAYERS, VOCAB, WIDTH, Family

VERSION = tuple(map(int, transformers.__version__.split(".")[:2]))
STOCK_EXPERTS = ("eager", "grouped_mm", "batched_mm")

# two layers of sums of 100 products, in another order: 30 roundings of logits that are up to 10
CLOSE = {"rtol": 1e-5, "atol": 3e-5}


class Subject:
    """A family's model, and what it does without us, computed once.

    A check that attaches to the model detaches from it.
    """

    def __init__(self, family: Family):
        self.family = family
        self.model = family.make_model()
        self.blocks = find_blocks(self.model)
        self.E, self.K = self.blocks[0].router.num_experts, self.blocks[0].router.top_k

    @property
    def half(self) -> int:
        """Half of the experts."""
        return self.E // 2

    @functools.cached_property
    def logits(self) -> torch.Tensor:
        """Stock logits of :meth:`prefill_and_decode`."""
        return prefill_and_decode(self.model)

    @functools.cached_property
    def state(self) -> dict[str, torch.Tensor]:
        """Copies of the weights."""
        return {name: tensor.clone() for name, tensor in self.model.state_dict().items()}


def prompt(seed: int = 0, batch: int = 1, tokens: int = 7) -> torch.Tensor:
    """Return token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCAB, (batch, tokens), generator=generator)


@torch.no_grad()
def logits_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits of one call."""
    return model(ids).logits


@torch.no_grad()
def prefill_and_decode(model: nn.Module) -> torch.Tensor:
    """Return the logits of a prompt of two rows and of the token after it."""
    prefill = model(prompt(1, batch=2), use_cache=True)
    decode = model(prompt(2, batch=2, tokens=1), past_key_values=prefill.past_key_values)
    return torch.cat([prefill.logits, decode.logits], 1)


# -- (a) the router


@torch.no_grad()
def routed(block: MoEBlock, hidden_TD: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return logits, weights and ids of a block's router for hidden states given to the block."""
    seen = []
    hook = block.router.register_forward_hook(lambda module, *io: seen.append(io))
    block.module(hidden_TD.unsqueeze(0))
    hook.remove()
    ((_, *biases), (logits_TE, weights_TK, ids_TK)) = seen[0]
    for bias_E in biases:  # some blocks hand theirs to the router
        assert torch.equal(bias_E, block.bias())
    return logits_TE.reshape(len(hidden_TD), -1), weights_TK, ids_TK


def hidden_states(tokens: int, dtype: torch.dtype) -> torch.Tensor:
    """Return what a normalised layer hands to its router."""
    return torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(5)).to(dtype)


def dense(weights_TK: torch.Tensor, ids_TK: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Return weights by expert, ``(T, E)``."""
    return weights_TK.new_zeros(len(ids_TK), num_experts).scatter(1, ids_TK, weights_TK)


def near_tied(
    logits_TE: torch.Tensor, rule: ScoreRule, bias_E: torch.Tensor | None, top_k: int
) -> torch.Tensor:
    """Return which tokens choose between experts, or groups, that rounding can exchange."""

    def is_tight(score_TN, chosen):
        score_TN = score_TN.sort(1, descending=True).values
        gap_T = score_TN[:, chosen - 1] - score_TN[:, chosen]
        return gap_T <= 4 * torch.finfo(torch.float32).eps * score_TN.abs().amax(1)

    scores = score_ref(logits_TE.float(), rule, bias_E)
    order_TE = rank_experts(scores.selection_TE, scores.candidate_TE)
    ranked_TE = scores.selection_TE.gather(1, order_TE)
    tight_T = is_tight(ranked_TE[:, : top_k + 1], top_k)
    if rule.has_groups:
        best_TGn = scores.selection_TE.unflatten(1, (rule.num_groups, -1)).sort(2, descending=True)
        take = 1 if rule.group_score == GroupScore.MAX else 2
        tight_T |= is_tight(best_TGn.values[:, :, :take].sum(2), rule.top_groups)
    return tight_T


def check_router(
    family: Family, dtype: torch.dtype = torch.float32, tokens: int = 64, **changes
) -> None:
    """The gate under exact routing does what the stock router does: ids, weights, dtypes."""
    model, hidden_TD = family.make_model(dtype=dtype, **changes), hidden_states(tokens, dtype)
    blocks = find_blocks(model)
    E, K = blocks[0].router.num_experts, blocks[0].router.top_k
    stock = [routed(block, hidden_TD) for block in blocks]
    with moe_gpu.attach(model, slots=E // 2, policy=Exact()) as moe:
        ours = [routed(block, hidden_TD) for block in blocks]
    for block, gate, want, got in zip(blocks, moe.gates, stock, ours, strict=True):
        logits_TE, weights_TK, ids_TK = got
        assert torch.equal(logits_TE, want[0]) and logits_TE.dtype == want[0].dtype
        assert weights_TK.dtype == want[1].dtype and weights_TK.shape == (tokens, K)
        assert ids_TK.dtype == want[2].dtype and ids_TK.shape == (tokens, K)
        tight_T = near_tied(logits_TE, gate.score_rule, block.bias(), K)
        # bfloat16 logits tie exactly, for one token in twenty
        assert tight_T.sum() <= (0 if dtype == torch.float32 else tokens // 4)
        assert len(want[2].sort(1).values.unique(dim=0)) > tokens // 8  # they differ indeed
        same_T = (ids_TK.sort(1).values == want[2].sort(1).values).all(1)
        assert same_T[~tight_T].all(), f"{(~same_T & ~tight_T).sum()} tokens routed otherwise"
        if dtype == torch.float32:
            got_TE, want_TE = (dense(weights, ids, E)[~tight_T] for _, weights, ids in (got, want))
            torch.testing.assert_close(got_TE, want_TE, rtol=2e-6, atol=2e-7)


# -- (b) and (c) the model


def check_logits(subject: Subject) -> None:
    """An attached model computes what it did, bit for bit the same whatever is resident."""
    model, bits = subject.model, []
    with moe_gpu.attach(model, slots=subject.half, pool=False, policy=Exact()) as moe:
        for history in ([], [3], [4, 5]):
            for seed in history:
                logits_of(model, prompt(seed, tokens=2))
            bits.append(prefill_and_decode(model))
        assert moe.metrics().loads > 0 and moe.metrics().swaps == 0
    with moe_gpu.attach(model, slots=subject.E, policy=Exact()) as moe:
        bits.append(prefill_and_decode(model))
        assert moe.metrics().loads == 0
    for got in bits:
        assert torch.equal(got, bits[0])
    torch.testing.assert_close(bits[0], subject.logits, **CLOSE)


@torch.no_grad()
def check_router_logits(subject: Subject) -> None:
    """Router logits, and the auxiliary loss where there is one, are the stock model's."""
    model, ids = subject.model, prompt(0, batch=2)
    stock = model(ids, labels=ids, output_router_logits=True)
    with moe_gpu.attach(model, slots=subject.half, policy=Exact()):
        got = model(ids, labels=ids, output_router_logits=True)
    if "router_logits" not in stock:  # some models of older versions keep them to themselves
        assert "router_logits" not in got and VERSION < (5, 23)
        return
    assert len(got.router_logits) == len(stock.router_logits) == len(subject.blocks)
    assert torch.equal(got.router_logits[0], stock.router_logits[0])  # before any expert
    torch.testing.assert_close(got.router_logits[1], stock.router_logits[1], **CLOSE)
    torch.testing.assert_close(got.loss, stock.loss)
    assert ("aux_loss" in stock) == subject.family.aux_loss
    if subject.family.aux_loss:
        torch.testing.assert_close(got.aux_loss, stock.aux_loss)


# -- (d) generation

GENERATE = {
    "greedy": {},
    "static cache": {"cache_implementation": "static"},
    "beams": {"num_beams": 2},
    "left padding": {},
}


def generate(model: nn.Module, way: str, tokens: int = 5) -> torch.Tensor:
    """Return the text that a model writes."""
    ids = prompt(0, batch=2)
    mask = torch.ones_like(ids)
    if way == "left padding":
        mask[0, :3] = 0
    options = {"do_sample": False, "pad_token_id": 0} | GENERATE[way]
    return model.generate(ids, attention_mask=mask, max_new_tokens=tokens, **options)


def check_generate(subject: Subject, way: str) -> None:
    """The attached model writes the stock text."""
    expected = generate(subject.model, way)
    with moe_gpu.attach(subject.model, slots=subject.half, policy=Exact()):
        assert torch.equal(generate(subject.model, way), expected)


# -- everything resident


@torch.no_grad()
def check_compile(subject: Subject) -> None:
    """With every expert resident the model is one graph, with the stock logits."""
    model, ids = subject.model, prompt(1, batch=2)
    expected = model(ids, use_cache=False).logits
    torch.compiler.reset()
    try:
        with moe_gpu.attach(model, resident=1.0, policy=Exact()) as moe:
            compiled = torch.compile(model, fullgraph=True, backend="eager")
            torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected, **CLOSE)
            assert moe.all_resident and moe.metrics().tokens == ids.numel()
    finally:
        torch.compiler.reset()


def check_training(subject: Subject) -> None:
    """With every expert resident loss and gradients are the stock ones."""
    model, ids = subject.model, prompt(0, batch=2)

    def gradients():
        model.zero_grad(set_to_none=True)
        model.train()
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    loss, stock = gradients()
    try:
        model.zero_grad(set_to_none=True)
        with moe_gpu.attach(model, resident=1.0, policy=Exact()):
            own_loss, own = gradients()
    finally:
        model.zero_grad(set_to_none=True)
        model.eval()
    torch.testing.assert_close(own_loss, loss)
    assert set(own) == set(stock) and len(own) > 4 * LAYERS
    for name, gradient in stock.items():
        torch.testing.assert_close(own[name], gradient, rtol=1e-3, atol=1e-5)


# -- (e) what ran the experts before


def check_implementations(subject: Subject) -> None:
    """Whatever ran the experts before: ours while attached, the old one back afterwards."""
    model, ids = subject.model, prompt(0)
    own = model.get_experts_implementation()
    for name in STOCK_EXPERTS:
        model.set_experts_implementation(name)
        with torch.no_grad():
            before = model(ids).logits
            with moe_gpu.attach(model, slots=subject.half, policy=Exact()) as moe:
                assert set(model.get_experts_implementation().values()) == {"moe_gpu"}
                torch.testing.assert_close(model(ids).logits, before, **CLOSE)
                assert moe.metrics().pairs == len(subject.blocks) * ids.numel() * subject.K
            assert set(model.get_experts_implementation().values()) == {name}
            assert torch.equal(model(ids).logits, before)
    model.set_experts_implementation(own)


# -- (f) policies

POLICIES = [
    CacheBonus(1.0),
    MassBudget(0.8),
    QualityBudget(0.8),
    HitRateTarget(0.95, max_budget=2.0, warm_tokens=4, average_tokens=4),
]


def check_policy(subject: Subject, policy: Policy) -> None:
    """A policy swaps, and what it chooses is a routing: distinct candidates, finite weights."""
    model, seen = subject.model, []
    with moe_gpu.attach(model, slots=subject.half, policy=policy, decay=0.9) as moe:
        hooks = [
            block.router.register_forward_hook(
                lambda module, inputs, output, layer=layer: seen.append((layer, *output))
            )
            for layer, block in enumerate(subject.blocks)
        ]
        for seed in range(16):
            logits_of(model, prompt(seed, batch=2, tokens=3))
        for hook in hooks:
            hook.remove()
        assert moe.metrics().swaps > 0
    for layer, logits_TE, weights_TK, ids_TK in seen:
        assert weights_TK.isfinite().all() and (weights_TK >= 0).all()
        assert (ids_TK.sort(1).values.diff(dim=1) > 0).all() and (ids_TK < subject.E).all()
        rule, bias_E = moe.gates[layer].score_rule, subject.blocks[layer].bias()
        candidate_TE = score_ref(logits_TE.float(), rule, bias_E).candidate_TE
        assert (candidate_TE is not None) == rule.has_groups
        if candidate_TE is not None:
            assert candidate_TE.gather(1, ids_TK).all(), "an expert of a group that was not chosen"


def check_zero_budgets(subject: Subject) -> None:
    """Policies that may not swap route exactly."""
    model = subject.model
    with moe_gpu.attach(model, slots=subject.half, policy=Exact()) as moe:
        exact = prefill_and_decode(model)
        for policy in (CacheBonus(0.0), MassBudget(0.0), QualityBudget(0.0)):
            moe.set_policy(policy)
            assert torch.equal(prefill_and_decode(model), exact), policy
        assert moe.metrics().swaps == 0


# -- memory


def check_memory(subject: Subject) -> None:
    """Budget and plan count what the model takes."""
    model, layout = subject.model, common_layout(subject.blocks)[0]
    needs = memory_needs(model, subject.blocks, layout, context_tokens=7)
    experts = sum(p.nbytes for b in subject.blocks for p in b.experts.parameters())
    all_bytes = sum(t.nbytes for t in {*model.parameters(), *model.buffers()})
    assert needs.dense == all_bytes - experts
    assert needs.layers == len(subject.blocks) == LAYERS
    # what pads an expert's parameters to 256 bytes
    assert 0 <= needs.slot * subject.E - experts < 4 * 256 * LAYERS * subject.E
    with torch.no_grad():
        cache = model(prompt(), use_cache=True).past_key_values
    assert needs.kv_cache == kv_bytes(cache)
    plan = plan_memory(model.config, context_tokens=7, dtype="float32", gpu_memory="1GiB")
    assert plan.device.dense_bytes == needs.dense and plan.device.kv_cache_bytes == needs.kv_cache
    assert plan.model.expert_bytes == needs.expert and plan.model.top_k == subject.K
    # hidden states, gathered pairs, and a run of the widest expert
    wide = max(p.shape[1] * p.shape[2] for p in model_experts(subject) if p.ndim == 3)
    assert plan.device.workspace_bytes > 7 * 4 * wide // WIDTH


def model_experts(subject: Subject) -> list[nn.Parameter]:
    """Return the parameters of the first layer's experts."""
    return list(subject.blocks[0].experts.parameters())


def kv_bytes(cache) -> int:
    """Return the bytes of keys and values in a cache."""
    names = ("keys", "values", "indexer_keys")
    tensors = [getattr(layer, name, None) for layer in cache.layers for name in names]
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))


# -- (g) saving, (h) loading


def check_detach(subject: Subject) -> None:
    """After detach the model is the one that was attached: objects, values, forwards."""
    model, modules, expected = subject.model, list(subject.model.modules()), subject.logits
    parameters = {name: (p, p.requires_grad) for name, p in model.named_parameters()}
    attributes = [(type(module), set(vars(module))) for module in modules]
    moe = moe_gpu.attach(model, slots=subject.half, policy=Exact())
    generate(model, "greedy")
    moe.detach()
    assert list(model.modules()) == modules
    assert [(type(module), set(vars(module))) for module in modules] == attributes
    for name, parameter in model.named_parameters():
        assert (parameter, parameter.requires_grad) == parameters[name]
        assert parameter.is_contiguous()
    state = model.state_dict()
    assert list(state) == list(subject.state)
    assert all(torch.equal(tensor, subject.state[name]) for name, tensor in state.items())
    assert torch.equal(prefill_and_decode(model), expected)


def check_save(subject: Subject, folder: Path) -> None:
    """What is saved while attached is the whole model."""
    model = subject.model
    with moe_gpu.attach(model, slots=subject.half, policy=Exact()):
        logits_of(model, prompt(0))
        state = model.state_dict()
        assert list(state) == list(subject.state)
        assert all(torch.equal(tensor, subject.state[name]) for name, tensor in state.items())
        model.save_pretrained(folder)
    again = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert all(torch.equal(t, subject.state[name]) for name, t in again.state_dict().items())


def check_load(subject: Subject, folder: Path) -> None:
    """``load`` computes, bit for bit, what attach does on the model of from_pretrained.

    Args:
        subject: The model.
        folder: Where :func:`check_save` left it.
    """
    reference = AutoModelForCausalLM.from_pretrained(folder).eval()
    with moe_gpu.attach(reference, slots=subject.half, policy=Exact()) as moe:
        expected = prefill_and_decode(reference)
        expert_bytes = moe.offloader.store.layout.expert_bytes
    text = generate(reference, "greedy")
    for host_memory in (subject.half * expert_bytes, 0):
        options = {"slots": subject.half, "host_memory": host_memory, "policy": Exact()}
        model, moe = moe_gpu.load(folder, **options, device="cpu")
        with moe:
            assert type(model) is type(reference) and not model.training
            assert torch.equal(prefill_and_decode(model), expected)
            assert torch.equal(generate(model, "greedy"), text)
            assert moe.metrics().loads_by_tier["disk"] > 0


# -- the table


def check_routing(subject: Subject, folder: Path) -> None:
    """Router in float32 and bfloat16, under every setting of the row; logits of the model."""
    for changes in ({}, *subject.family.variants.values()):
        check_router(subject.family, **changes)
        check_router(subject.family, torch.bfloat16, **changes)
    check_logits(subject)
    check_router_logits(subject)


def check_policies(subject: Subject, folder: Path) -> None:
    """Each policy, and each with a budget of nothing."""
    for policy in POLICIES:
        check_policy(subject, policy)
    check_zero_budgets(subject)


def check_generation(subject: Subject, folder: Path) -> None:
    """Each way of generating, and each implementation of the experts before."""
    for way in GENERATE:
        check_generate(subject, way)
    check_implementations(subject)


def check_saving(subject: Subject, folder: Path) -> None:
    """Saved while attached, and given back by detach."""
    check_save(subject, folder)
    check_detach(subject)


# what the columns of the table stand for, in an order in which load finds what save left
COLUMNS = {
    "parity": check_routing,
    "policies": check_policies,
    "generate": check_generation,
    "compile": lambda subject, folder: check_compile(subject),
    "train": lambda subject, folder: check_training(subject),
    "save": check_saving,
    "load": check_load,
    "plan": lambda subject, folder: check_memory(subject),
}


def outcome(column: str, subject: Subject, folder: Path) -> str:
    """Return the cell of one family: yes, or why not."""
    try:
        COLUMNS[column](subject, folder)
    except Exception as error:  # a cell each: the others are still worth knowing
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        why = lines[0] if lines else type(error).__name__
        limit = subject.family.limits.get(column)
        return limit[1] if limit is not None and limit[0] in why else f"fails: {why[:100]}"
    return "yes"
