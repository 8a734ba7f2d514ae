"""What the routing tests share: states with some experts resident, and one call on both paths."""

import torch

from moe_gpu import RouterState
from moe_gpu.kernels.route import route
from moe_gpu.kernels.route_ref import AffinityFrom, Rule, route_ref

STATE = ("affinity_LE", "activations_LE", "counters_LC", "record_LR")


def make_state(E, resident=(), strength=0.0, layers=1, device="cpu"):
    state = RouterState(layers, E, device=device)
    for slot, expert in enumerate(resident):
        state.slot_of_LE[:, expert] = slot
    state.strength_L.fill_(strength)
    return state


def both(logits_TE, resident, strength, *, num_valid=None, layer=0, layers=1, calls=1, **rules):
    """Route on the device's path and by the reference, from equal states; return both results."""
    E, device = logits_TE.shape[1], logits_TE.device
    T, K = logits_TE.shape[0], rules["top_k"]
    arguments = {
        "rule": Rule.EXACT, "protect": 0, "affinity_from": AffinityFrom.DEMAND,
        "decay": 0.99, "boost": 1.0, "max_score": 1.0,
    } | rules  # fmt: skip
    state = make_state(E, resident, strength, layers, device)
    state.reserve(T, arguments["decay"])
    want_state = make_state(E, resident, strength, layers)
    valid = None
    if num_valid is not None:
        valid = torch.tensor(num_valid, dtype=torch.int32, device=device)
    for _ in range(calls):
        got = route(logits_TE, state, layer, num_valid=valid, **arguments)
        want = (torch.empty(T, K), torch.empty(T, K, dtype=torch.int64))
        route_ref(logits_TE.cpu(), *want, num_valid, want_state, layer, **on_host(arguments))
    return got, state, want, want_state


def assert_same(got, state, want, want_state, scale=1.0):
    """Ids and integers exactly; weights, at most ``scale``, and moved mass to float32 rounding."""
    assert torch.equal(got[1].cpu(), want[1]), f"ids\n got {got[1]}\nwant {want[1]}"
    # one exponential and one division, each within 2 ulp of the true value, weights <= 1
    torch.testing.assert_close(got[0].cpu(), want[0], atol=5e-7 * scale, rtol=2e-6)
    for name in ("affinity_LE", "activations_LE", "record_LR"):
        assert torch.equal(getattr(state, name).cpu(), getattr(want_state, name)), name
    counters, wanted = state.counters_LC.cpu(), want_state.counters_LC
    exact = [0, 1, 2, 3, 4, 5, 7]
    assert torch.equal(counters[:, exact], wanted[:, exact]), f"{counters}\n{wanted}"
    # fixed point of a rounded float32 per swapping token
    assert (counters[:, 6] - wanted[:, 6]).abs().max() <= 8 * wanted[:, 5].max() + 1
    assert int(state.scratch.abs().sum()) == 0, "scratch must be zero between calls"


def on_host(arguments):
    return {n: v.cpu() if isinstance(v, torch.Tensor) else v for n, v in arguments.items()}
