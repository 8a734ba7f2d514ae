"""Small offloaders for tests: known weights, records made by the reference, no model."""

import torch

from moe_gpu import RouterState
from moe_gpu.kernels.route_ref import AffinityFrom, Rule, route_ref
from moe_gpu.offload import ExpertLayout, ExpertOffloader, ExpertStore

SHAPES = {"gate_up_proj": (6, 5), "down_proj": (5, 3)}  # odd: offsets need their alignment


def make_store(
    layers: int, experts: int, device="cpu", **arguments
) -> tuple[ExpertStore, list[dict]]:
    """A store of random weights, and the weights themselves, per layer and name."""
    weights = [
        {name: torch.randn(experts, *shape) for name, shape in SHAPES.items()}
        for _ in range(layers)
    ]
    store = ExpertStore(ExpertLayout.of(weights[0]), layers, experts, device, **arguments)
    for layer, parameters in enumerate(weights):
        store.put(layer, parameters)
    return store, weights


def make_offloader(layers=1, experts=8, slots=4, fill=True, staging_slots=0, **arguments):
    """An offloader and its weights; without staging slots, later waves take the step's own."""
    store, weights = make_store(layers, experts)
    state = RouterState(layers, experts)
    offloader = ExpertOffloader(state, store, slots, staging_slots=staging_slots, **arguments)
    if fill:
        offloader.fill()
    return offloader, weights


def route(state: RouterState, chosen: list[list[int]], layer=0, rule=Rule.EXACT, second=None):
    """Route one token per row of ``chosen`` so that exactly these experts are executed.

    With ``second``, each token's next-best experts: what a swap may choose.
    """
    T, K = len(chosen), len(chosen[0])
    logits_TE = torch.full((T, state.num_experts), -9.0)
    for t, experts in enumerate(chosen):
        for rank, expert in enumerate(experts):
            logits_TE[t, expert] = 1.0 - rank / 64
        for rank, expert in enumerate(second or []):
            logits_TE[t, expert] = 0.5 - rank / 64
    weights_TK, ids_TK = torch.empty(T, K), torch.empty(T, K, dtype=torch.int64)
    route_ref(
        logits_TE, weights_TK, ids_TK, None, state, layer, top_k=K, rule=rule, protect=0,
        affinity_from=AffinityFrom.DEMAND, decay=0.9, boost=1.0, max_score=4.0,
    )  # fmt: skip
    return weights_TK, ids_TK


def run_step(offloader, weights, pairs, layer=0):
    """Take a whole step; check that each slot holds its expert; return the experts in order."""
    order = []
    for expert, slot, _, _ in offloader.step(layer, pairs):
        for name, weight in offloader.weights_of(layer)[slot].items():
            assert torch.equal(weight, weights[layer][name][expert]), (expert, name)
        order.append(expert)
    assert_consistent(offloader)
    return order


def assert_consistent(offloader):
    """Between steps: tables are sound, nothing is leased, and the gate sees what is true."""
    E = offloader.state.num_experts
    assert not offloader.flights.on_way
    for layer, table in enumerate(offloader.cache.tables):
        table.check()
        assert not any(table.leases_S)
        first = offloader.cache.key_of(layer, 0)
        assert offloader.state.slot_of_LE[layer].tolist() == table.slot_of_X[first : first + E]
