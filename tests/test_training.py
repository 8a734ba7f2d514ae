"""Training through the gate: the stock losses, gradients and weights, and a model to keep."""

import pytest
import torch
from torch.nn import functional as F
from transformers import MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

import moe_gpu
from mixtral import (  # noqa: F401 - the last is a fixture that runs by itself
    EXPERTS,
    LAYERS,
    logits_of,
    make_config,
    make_model,
    prompt,
    without_interpreter,
)
from moe_gpu import CacheBonus, Exact, MassBudget, MoEGate, QualityBudget

pytestmark = pytest.mark.usefixtures("one_thread")


def pair(dtype=torch.float32, **changes):
    """Two equal models in training mode."""
    return [make_model(dtype=dtype, **changes).train() for _ in range(2)]


def assert_same_gradients(model, stock, share):
    """Within a share of the largest entry of each gradient."""
    for (name, p), q in zip(model.named_parameters(), stock.parameters(), strict=True):
        assert q.grad is not None and q.grad.any(), name
        error, largest = (p.grad - q.grad).abs().max(), q.grad.abs().max()
        assert error <= share * largest, f"{name}: {error} of {largest}"


@pytest.mark.parametrize(
    "dtype, share", [(torch.float32, 2e-6), (torch.bfloat16, 2**-7)], ids=["float32", "bfloat16"]
)
def test_gradients_of_the_gate_are_those_of_mixtrals_router(dtype, share, device):
    """Through weights and logits, as the mixture and the balancing loss need them."""
    torch.manual_seed(3)
    router = MixtralTopKRouter(make_config()).to(device, dtype)
    torch.nn.init.normal_(router.weight, std=0.3)
    gate = MoEGate(32, EXPERTS, 2, device=device, dtype=dtype)
    gate.load_state_dict(router.state_dict())
    x_TD = torch.randn(40, 32, device=device, dtype=dtype)
    best_T3 = router(x_TD)[0].detach().float().topk(3, dim=1).values
    x_TD = x_TD[(best_T3.diff(dim=1) < -0.02).all(1)]  # equal logits are free to order
    T = len(x_TD)
    pull_TK, pull_TE = torch.randn(T, 2, device=device), torch.randn(T, 8, device=device)
    found = []
    for module in (router, gate):
        x = x_TD.clone().requires_grad_(True)
        logits, weights, ids = module(x)
        assert weights.dtype == torch.float32
        ((weights * pull_TK).sum() + 0.1 * (logits.float() * pull_TE).sum()).backward()
        found.append((ids, x.grad, module.weight.grad))
    (ids, x_grad, w_grad), (ids_, x_grad_, w_grad_) = found
    assert torch.equal(ids, ids_) and T > 30
    assert (x_grad - x_grad_).abs().max() <= share * x_grad.abs().max()
    assert (w_grad - w_grad_).abs().max() <= share * w_grad.abs().max()


@pytest.mark.parametrize(
    "implementation, dtype, share",
    [
        ("eager", torch.float32, 1e-5),
        ("grouped_mm", torch.float32, 1e-5),
        # "eager" rounds each expert's share to bfloat16: a last bit of a weight can show
        ("grouped_mm", torch.bfloat16, 2**-6),
    ],
    ids=str,
)
def test_losses_and_gradients_are_the_stock_models(implementation, dtype, share):
    (model, stock), ids = pair(dtype), prompt(0, batch=3, tokens=20)
    for each in (model, stock):
        each.set_experts_implementation(implementation)
    with moe_gpu.attach(model, resident=1.0, policy=Exact()) as moe:
        arguments = {"labels": ids, "output_router_logits": True}
        got, want = model(ids, **arguments), stock(ids, **arguments)
        torch.testing.assert_close(got.aux_loss, want.aux_loss, rtol=share, atol=0)
        torch.testing.assert_close(got.loss, want.loss, rtol=share, atol=0)
        assert len(got.router_logits) == LAYERS and got.aux_loss > 0
        got.loss.backward()
        want.loss.backward()
        assert_same_gradients(model, stock, share)
        assert moe.metrics().tokens == 60 and moe.metrics().hit_rate == 1.0


def test_the_auxiliary_loss_alone_reaches_the_routers():
    (model, stock), ids = pair(), prompt(0, batch=3, tokens=20)
    with moe_gpu.attach(model, resident=1.0, policy=Exact()):
        for each in (model, stock):
            each(ids, output_router_logits=True, labels=ids).aux_loss.backward()
        for layer, other in zip(model.model.layers, stock.model.layers, strict=True):
            grad, want = layer.mlp.gate.weight.grad, other.mlp.gate.weight.grad
            assert want.abs().max() > 1e-3
            torch.testing.assert_close(grad, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("policy", [Exact(), QualityBudget(0.05), MassBudget(0.5), CacheBonus(0.3)])
def test_no_policy_moves_a_token_where_everything_is_resident(policy):
    (model, stock), ids = pair(), prompt(0, batch=2)
    with moe_gpu.attach(model, resident=1.0, policy=policy) as moe:
        torch.testing.assert_close(model(ids).logits, stock(ids).logits, rtol=1e-5, atol=2e-5)
        assert moe.metrics().swaps == 0 and moe.metrics().tokens == 14


def test_router_jitter_noise():
    """Its noise comes before the router: drawn as ever, same seed, same result."""
    (model, stock), ids = pair(router_jitter_noise=0.2), prompt(0, batch=2)
    losses = []
    with moe_gpu.attach(model, resident=1.0, policy=Exact()):
        for each in (model, stock, stock):
            torch.manual_seed(1)
            loss = each(ids, labels=ids).loss
            loss.backward()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)
        torch.manual_seed(2)
        assert model(ids, labels=ids).loss.item() != pytest.approx(losses[0], rel=1e-4)
    for p in stock.parameters():
        p.grad /= 2  # two backward passes
    assert_same_gradients(model, stock, 1e-5)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_recomputes_the_same_routing(reentrant):
    (model, stock), ids = pair(), prompt(0, batch=2)
    with moe_gpu.attach(model, resident=1.0, policy=QualityBudget(0.05)) as moe:
        for each in (model, stock):
            each.gradient_checkpointing_enable({"use_reentrant": reentrant})
            each(ids, labels=ids).loss.backward()
        assert_same_gradients(model, stock, 1e-5)
        assert moe.metrics().tokens == 28, "routed again on the way back"


def test_autocast():
    (model, stock), ids = pair(), prompt(0, batch=2, tokens=20)
    with moe_gpu.attach(model, resident=1.0, policy=Exact()):
        losses = []
        for each in (model, stock):
            with torch.autocast("cpu", torch.bfloat16):
                loss = each(ids, labels=ids).loss
            loss.backward()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)
        experts = model.model.layers[0].mlp.experts
        assert experts.down_proj.grad.dtype == torch.float32 and experts.down_proj.grad.any()


def train(model, steps, seed=0):
    """Fine-tune on three fixed texts; return the loss of every step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01, fused=True)
    losses = []
    for step in range(steps):
        ids = prompt(step % 3, batch=4, tokens=16)
        loss = model(ids, labels=ids, output_router_logits=True).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return torch.tensor(losses)


def test_fine_tuning_follows_the_stock_curve_and_leaves_the_weights(tmp_path):
    (model, stock), ids = pair(), prompt(9)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    moe = moe_gpu.attach(model, resident=1.0, policy=Exact())
    got, want = train(model, 20), train(stock, 20)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=0)
    assert got[-1] < got[0] - 0.5, "it learned something"
    attached_logits = logits_of(model.eval(), ids)
    model.save_pretrained(tmp_path / "attached")
    moe.detach()
    trained = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, q in stock.named_parameters():
        assert not torch.equal(trained[name], before[name]), name
        # AdamW moves by lr whatever the gradient's size, and so does the rounding of a small one
        assert (trained[name] - q).abs().max() <= 2e-3, name
    torch.testing.assert_close(logits_of(model, ids), attached_logits, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "detached")
    for folder in ("attached", "detached"):
        again = MixtralForCausalLM.from_pretrained(tmp_path / folder).eval()
        for name, parameter in again.named_parameters():
            assert torch.equal(parameter, trained[name]), name
        assert torch.equal(logits_of(again, ids), logits_of(model, ids))


def test_evaluation_between_steps_sees_the_new_weights():
    """Without a gradient the experts run from the slots, which are what the optimizer steps."""
    (model, stock), ids = pair(), prompt(9)
    with moe_gpu.attach(model, resident=1.0, policy=Exact()):
        for _ in range(2):
            for each in (model, stock):
                train(each.train(), 2)
                each.eval()
            torch.testing.assert_close(
                logits_of(model, ids), logits_of(stock, ids), rtol=1e-3, atol=1e-3
            )


def test_experts_alone_and_routers_alone():
    """What keeps no gradient keeps its values, whichever part is frozen."""
    for part in ("experts", "gate"):
        model, ids = make_model().train(), prompt(0)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(f".mlp.{part}." in name)
        frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
        with moe_gpu.attach(model, resident=1.0):
            F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:]).backward()
            for name, parameter in model.named_parameters():
                assert (parameter.grad is None) == (name in frozen), name
            torch.optim.SGD(model.parameters(), lr=0.1).step()
        for name, parameter in model.named_parameters():
            if name in frozen:
                assert torch.equal(parameter, frozen[name]), name
