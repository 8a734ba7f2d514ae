"""The fused kernel against its definition, and the promises a comparison cannot show."""

import pytest
import torch

from moe_gpu.kernels import launch as launch_module
from moe_gpu.kernels.launch import tile_of
from moe_gpu.kernels.route import _route, route
from moe_gpu.kernels.route_ref import AffinityFrom, Rule, route_ref, select_ref
from moe_gpu.kernels.score_ref import ScoreRule
from routing import STATE, assert_same, both, make_state

SHARES = ScoreRule(renormalize=False)
RULES = [  # rule, protect, strength: strong enough to swap often on unit-normal logits
    (Rule.EXACT, 0, 0.0),
    (Rule.BONUS, 0, 0.5),
    (Rule.BONUS, 1, 0.5),
    (Rule.RANGE_BONUS, 1, 0.2),
    (Rule.MASS, 0, 0.2),
    (Rule.MASS, 1, 0.2),
    (Rule.OUTPUT, 0, 0.3),
    (Rule.OUTPUT, 1, 0.3),
]
SHAPES = [  # T, E, K
    (1, 8, 2),  # Mixtral, decoding one token
    (7, 8, 2),  # rows beyond T in the tile
    (70, 8, 2),  # several tiles and chunks: ticket, scratch, last program
    (5, 13, 3),  # E not a power of two: padded columns must never win
    (3, 8, 8),  # K == E: a full sort, nobody outside to swap in
    (2, 1, 1),  # a single expert
    (9, 64, 6),  # DeepSeek-V2-Lite, K neither 2 nor a power of two
    (2, 160, 6),  # DeepSeek-V2, padded to 256
    (2, 512, 10),  # two warps a row
]


def half_of(E):
    return torch.randperm(E, generator=torch.Generator().manual_seed(E))[: (E + 1) // 2].tolist()


@pytest.mark.parametrize("T, E, K", SHAPES, ids=str)
@pytest.mark.parametrize("rule, protect, strength", RULES, ids=lambda v: str(getattr(v, "name", v)))
def test_matches_the_definition(T, E, K, rule, protect, strength, device):
    logits_TE = torch.randn(T, E, device=device)
    result = both(
        logits_TE, half_of(E), strength, top_k=K, rule=rule, protect=protect, calls=2,
        layers=3, layer=1,
    )  # fmt: skip
    assert_same(*result)
    if rule != Rule.EXACT and T * min(K - protect, E - K) >= 9:
        assert result[1].counters_LC[1, 5] > 0, "the strength was meant to swap something"


def test_largest_router(device):
    logits_TE = torch.randn(2, 1024, device=device)
    assert_same(*both(logits_TE, half_of(1024), 0.3, top_k=16, rule=Rule.MASS, protect=1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_logits(dtype, device):
    logits_TE = torch.randn(40, 8, device=device).to(dtype)  # bf16 ties at the cut in most tiles
    for rule, protect, strength in RULES[1:]:
        assert_same(*both(logits_TE, [1, 2, 5], strength, top_k=2, rule=rule, protect=protect))


@pytest.mark.parametrize("K", [2, 3], ids=["fast form", "general"])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"score_rule": SHARES}, id="share of all experts"),
        pytest.param({"affinity_from": AffinityFrom.EXECUTED}, id="affinity from executed"),
        pytest.param({"affinity_from": AffinityFrom.SERVED}, id="affinity from served"),
        pytest.param({"decay": 0.5, "boost": 0.3, "max_score": 0.8}, id="affinity constants"),
        pytest.param({"decay": 0.0, "boost": 2.0, "max_score": 4.0}, id="no memory"),
        pytest.param({"decay": 1.0, "boost": 0.125, "max_score": 3.0}, id="no forgetting"),
        pytest.param({"num_valid": 35}, id="padding"),
        pytest.param({"num_valid": 20, "rule": Rule.BONUS}, id="padding is not swapped"),
        pytest.param({"num_valid": 0}, id="all padding"),
        pytest.param({"num_valid": 99}, id="more valid than rows"),
    ],
)
def test_options(options, K, device):
    logits_TE = torch.randn(40, 8, device=device)
    options = {"rule": Rule.MASS, "protect": 1} | options
    assert_same(*both(logits_TE, [0, 3, 6], 0.2, top_k=K, **options))


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda x: x.t().contiguous().t(), id="column-major"),
        pytest.param(lambda x: x.repeat_interleave(2, 0)[::2], id="strided rows"),
        pytest.param(lambda x: torch.cat([x, x], 1)[:, : x.shape[1]], id="padded rows"),
        pytest.param(lambda x: x[:1].expand(x.shape), id="one row, stride 0"),
    ],
)
def test_any_strides(view, device):
    logits_TE = view(torch.randn(6, 8, device=device))
    assert_same(*both(logits_TE, [1, 2], 0.2, top_k=2, rule=Rule.MASS, protect=1))


def test_out_tensors_and_their_dtypes(device):
    logits_TE = torch.randn(5, 8, device=device)
    weights = torch.empty(5, 3, dtype=torch.float16, device=device)[:, :2]  # strided rows
    ids = torch.empty(5, 2, dtype=torch.int32, device=device)
    got = route(logits_TE, make_state(8, device=device), 0, top_k=2, out=(weights, ids))
    assert got[0] is weights and got[1] is ids
    want_weights, want_ids = route(logits_TE, make_state(8, device=device), 0, top_k=2)
    assert torch.equal(ids.long(), want_ids)
    assert torch.equal(weights, want_weights.half())


def test_no_tokens_no_launch(device):
    state = make_state(8, device=device)
    weights, ids = route(torch.empty(0, 8, device=device), state, 0, top_k=2)
    assert weights.shape == ids.shape == (0, 2)
    assert state.record_LR[0, 0] == 0


def test_strength_that_a_controller_broke_never_swaps(device):
    logits_TE = torch.randn(20, 8, device=device)
    demand = select_ref(logits_TE.cpu(), torch.zeros(8, dtype=torch.bool), 2).demand_TK
    for rule in (Rule.BONUS, Rule.RANGE_BONUS, Rule.MASS, Rule.OUTPUT):
        for strength in (float("nan"), -1.0, 0.0):
            state = make_state(8, [0, 1, 2, 3], strength, device=device)
            _, ids = route(logits_TE, state, 0, top_k=2, rule=rule)
            assert torch.equal(ids.cpu(), demand)


@pytest.mark.parametrize("rule, protect, strength", RULES, ids=lambda v: str(getattr(v, "name", v)))
@pytest.mark.parametrize("E, K", [(8, 2), (13, 5)], ids=str)
def test_any_bit_pattern(E, K, rule, protect, strength, device):
    """NaN, infinities, subnormals and huge values in every mixture, ties included."""
    T = 64 if E == 8 else 24
    bits = torch.randint(-(2**31), 2**31, (T, E), dtype=torch.int64).to(torch.int32)
    logits_TE = bits.view(torch.float32)
    specials = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 3e38, 1e-45])
    pick = torch.randint(0, 14, (T, E))
    logits_TE = torch.where(pick < 7, specials[pick % 7], logits_TE)
    logits_TE[0], logits_TE[1] = float("nan"), -float("inf")
    for amount in (strength, 3e38):
        got, state, want, want_state = both(
            logits_TE.to(device), half_of(E), amount, top_k=K, rule=rule, protect=protect
        )
        weights, ids = got[0].cpu(), got[1].cpu()
        assert ids.min() >= 0 and ids.max() < E
        assert all(len(set(row)) == K for row in ids.tolist())
        assert weights.isfinite().all() and (weights >= 0).all()
        torch.testing.assert_close(weights.sum(1), torch.ones(T), atol=1e-6, rtol=0)
        assert_same(got, state, want, want_state)


@pytest.mark.parametrize("K", [2, 3])
def test_non_finite_scores_share_nothing(K, device):
    """Without renormalising, the divisor sums over the finite scores of the row alone."""
    nan, inf = float("nan"), float("inf")
    rows = [[1, nan, 0.5, inf], [nan, nan, nan, nan], [inf, -inf, 2, nan], [300, -300, inf, 299]]
    logits_TE = torch.tensor(rows, device=device)
    result = both(logits_TE, [0, 2], 0.5, top_k=K, rule=Rule.MASS, score_rule=SHARES)
    assert_same(*result)
    weights = result[0][0].cpu()
    assert weights.isfinite().all()
    assert torch.equal(weights[1], torch.full((K,), 1 / K))


@pytest.mark.parametrize(
    "decay, boost, max_score, renormalize",
    [(0.99, 1.0, 1.0, True), (0.9, 0.3, 2.0, False), (1, 1, 9, True), (0.98, 0.02, 1.0, True)],
)
def test_batch_equals_sequence(decay, boost, max_score, renormalize, device):
    """T tokens at once leave the state that T calls leave, the affinity to rounding."""
    logits_TE = torch.randn(75, 8, device=device)
    rules = {"decay": decay, "boost": boost, "max_score": max_score}
    rules |= {
        "top_k": 2,
        "rule": Rule.MASS,
        "protect": 1,
        "score_rule": ScoreRule(renormalize=renormalize),
    }
    batch, sequence = (make_state(8, [1, 4, 6], 0.1, device=device) for _ in range(2))
    weights, ids = route(logits_TE, batch, 0, **rules)
    rows = [route(logits_TE[t : t + 1], sequence, 0, **rules) for t in range(75)]
    assert torch.equal(torch.cat([r[1] for r in rows]), ids)
    assert torch.equal(torch.cat([r[0] for r in rows]), weights)
    torch.testing.assert_close(
        batch.affinity_LE, sequence.affinity_LE, atol=2e-6 * max(1, max_score), rtol=0
    )
    assert torch.equal(batch.activations_LE, sequence.activations_LE)
    count = [0, 1, 2, 3, 5, 6, 7]  # unique misses are per call
    assert torch.equal(batch.counters_LC[:, count], sequence.counters_LC[:, count])


def test_tokens_beyond_the_window_are_skipped_not_lost(device):
    """decay 0.5 forgets after 25 tokens: the batch keeps two chunks, the sequence all."""
    logits_TE = torch.randn(200, 8, device=device)
    rules = {"top_k": 2, "decay": 0.5, "boost": 0.7, "max_score": 1.5}
    (_, batch, _, want) = both(logits_TE, [], 0.0, **rules)
    assert torch.equal(batch.affinity_LE.cpu(), want.affinity_LE)
    sequence = make_state(8, device=device)
    for t in range(200):
        route(logits_TE[t : t + 1], sequence, 0, **rules)
    torch.testing.assert_close(batch.affinity_LE, sequence.affinity_LE, atol=3e-6, rtol=0)


@pytest.mark.parametrize(
    "E, K, renormalize", [(8, 2, True), (13, 3, True), (16, 2, False)], ids=str
)
def test_same_bits_on_every_grid(E, K, renormalize, device, monkeypatch):
    logits_TE = torch.randn(70, E, device=device)

    def run(tile=None, programs=1024):
        monkeypatch.setattr(launch_module, "most_programs", lambda device: programs)
        if tile is not None:
            monkeypatch.setattr(launch_module, "tile_of", lambda T, E, K: tile)
        state = make_state(E, half_of(E), 0.2, device=device)
        rules = {
            "top_k": K,
            "rule": Rule.MASS,
            "protect": 1,
            "score_rule": ScoreRule(renormalize=renormalize),
        }
        outputs = [*route(logits_TE, state, 0, **rules), *route(logits_TE, state, 0, **rules)]
        monkeypatch.undo()
        return outputs + [getattr(state, name) for name in STATE]

    wanted = run()
    BLOCK_E = tile_of(70, E, K)[1]
    grids = [
        ((1, BLOCK_E, 1), 3),
        ((8, BLOCK_E, 1), 1024),
        ((32, BLOCK_E, 4), 1),
        ((32, BLOCK_E, 2), 2),
    ]
    for tile, programs in grids:  # rows per tile, programs that share them
        for got, want in zip(run(tile, programs), wanted, strict=True):
            assert torch.equal(got, want), (tile, programs)
    for got, want in zip(run(), wanted, strict=True):
        assert torch.equal(got, want), "a repeat changed bits"


class Launches:
    """Stands in for the kernel: counts launches, lets them through."""

    def __init__(self, kernel):
        self.kernel, self.grids = kernel, []

    def __getitem__(self, grid):
        self.grids.append(grid)
        return self.kernel[grid]


@pytest.mark.parametrize("T", [1, 64, 300])
def test_one_launch_per_call(T, device, monkeypatch):
    launches = Launches(launch_module.route_kernel)
    monkeypatch.setattr(launch_module, "route_kernel", launches)
    monkeypatch.setattr(launch_module, "_compiled", {})
    state = make_state(8, [0, 1], 0.1, device=device)
    route(torch.randn(T, 8, device=device), state, 0, top_k=2, rule=Rule.MASS, protect=1)
    assert len(launches.grids) == 1


def test_registered_op(device):
    state = make_state(8, [0, 1], 0.1, device=device)
    args = (
        torch.randn(5, 8, device=device), torch.empty(5, 2, device=device),
        torch.empty(5, 2, dtype=torch.int64, device=device), None,
        state.slot_of_LE, state.strength_L, state.affinity_LE, state.activations_LE,
        state.counters_LC, state.record_LR, state.scratch,
        0, 2, int(Rule.MASS), 1, 64, True, 1, 0.99, 1.0, 1.0,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.moe_gpu.route_.default, args)
    assert callable(_route)


BAD = [  # what is wrong, arguments of route, what the message must say
    (lambda d: {"logits": torch.zeros(8, device=d)}, ValueError, r"logits must be 2-D"),
    (lambda d: {"logits": torch.zeros(2, 7, device=d)}, ValueError, r"8 columns.*got 7"),
    (lambda d: {"logits": torch.zeros(2, 8, dtype=torch.int64, device=d)}, TypeError, "int64"),
    (lambda d: {"logits": torch.zeros(2, 8, dtype=torch.float64, device=d)}, TypeError, "float64"),
    (lambda d: {"logits": torch.zeros(2, 8, device="meta")}, ValueError, "logits are on meta"),
    (lambda d: {"top_k": 0}, ValueError, r"top_k must lie in \[1, 8\].*got 0"),
    (lambda d: {"top_k": 9}, ValueError, r"top_k must lie in \[1, 8\].*got 9"),
    (lambda d: {"layer": 1}, ValueError, r"layer must lie in \[0, 0\], got 1"),
    (lambda d: {"num_valid": torch.tensor(1, device=d)}, TypeError, "num_valid must be one int32"),
    (
        lambda d: {"out": (torch.zeros(2, 3, device=d), torch.zeros(2, 2, device=d))},
        ValueError,
        r"out weights must have shape \(2, 2\), got \(2, 3\)",
    ),
    (
        lambda d: {"out": (torch.zeros(2, 2, device=d), torch.zeros(2, 2, device=d))},
        TypeError,
        "out ids must be int32 or int64",
    ),
]


@pytest.mark.parametrize("bad, error, message", BAD, ids=[b[2] for b in BAD])
def test_refusals_change_nothing(bad, error, message, device):
    state = make_state(8, device=device)
    arguments = {"logits": torch.zeros(2, 8, device=device), "layer": 0, "top_k": 2} | bad(device)
    with pytest.raises(error, match=message):
        route(arguments.pop("logits"), state, arguments.pop("layer"), **arguments)
    assert all(int(getattr(state, name).sum()) == 0 for name in STATE)


def test_longer_than_the_scratch_that_a_state_starts_with(device):
    """Nothing fades at decay 1, so every token of a long call needs room."""
    logits_TE = torch.randn(4300, 8, device=device)
    state = make_state(8, device=device)
    with pytest.raises(ValueError, match="a call of 4300 tokens with decay=1.0 needs"):
        route(logits_TE, state, 0, top_k=2, decay=1.0)
    first = state.scratch
    rules = {"top_k": 2, "decay": 1.0, "boost": 2**-12, "max_score": 1.0}
    got, state, want, want_state = both(logits_TE, [], 0.0, **rules)
    assert_same(got, state, want, want_state)
    assert state.scratch.numel() > first.numel() and any(
        kept.numel() == first.numel() for kept in state._outgrown
    ), "a captured graph may still use the first"


def test_a_million_tokens_by_the_reference():
    logits_TE = torch.randn(1_000_003, 8)
    out = (torch.empty(1_000_003, 2), torch.empty(1_000_003, 2, dtype=torch.int64))
    state = make_state(8, [0, 1, 2, 3])
    rules = {"top_k": 2, "rule": Rule.EXACT, "protect": 0}
    rules |= {"affinity_from": AffinityFrom.DEMAND, "decay": 0.9, "boost": 1.0, "max_score": 1.0}
    route_ref(logits_TE, *out, None, state, 0, **rules)
    assert state.counters_LC[0, :2].tolist() == [1_000_003, 2_000_006]
    assert state.activations_LE.sum() == 2_000_006
    assert torch.equal(out[1], logits_TE.topk(2).indices)


def test_more_experts_than_the_kernel_holds(device):
    with pytest.raises(ValueError, match=r"num_experts must lie in \[1, 1024\], got 1025"):
        route(torch.zeros(1, 1025, device=device), make_state(1025, device=device), 0, top_k=2)
