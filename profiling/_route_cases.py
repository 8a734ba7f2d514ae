"""What the route benchmarks measure: points of the grid, their inputs, gates and right answers.

A point's policy takes part at every number of tokens: ``max_policy_tokens``, beyond which a gate
routes exactly by default (64), is raised for it.

Shape suffixes: T tokens, E experts, K experts per token.
"""

import dataclasses
import itertools
import multiprocessing
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import NamedTuple

import torch
from tqdm import tqdm

from moe_gpu import CacheBonus, Exact, MoEGate, QualityBudget, RouterState
from moe_gpu.kernels import layout
from moe_gpu.kernels.route_ref import AffinityFrom, Rule, affinity_window, route_ref

TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 1048576)
ROUTERS = ((8, 2), (16, 2), (64, 6), (128, 8), (256, 8), (512, 10))  # E, K
FIRST = (1, 64, 16384, 1048576), ((8, 2), (128, 8), (256, 8))  # wanted most
POLICIES = {"off": Exact(), "bonus": CacheBonus(0.15), "budget": QualityBudget(0.05)}
HITS = {"all": 1.0, "half": 0.5, "none": 0.0}  # share of experts that are resident
ROUTINGS = ("uniform", "skewed")
DTYPE = torch.bfloat16
ZIPF = 1.0  # skewed: before noise, the r-th most wanted expert has mass 1 / r ** ZIPF
SAMPLE = 2048  # rows that are compared one by one; more than age the affinity at decay 0.99
FADED = 2.0**-23  # of the largest affinity
EDGE_ROWS = 512  # one row in so many may swap otherwise at the edge of a budget
INPUT_BYTES = 256 << 20  # of the inputs a benchmark goes round, at most
INPUTS = 8


@dataclasses.dataclass(frozen=True)
class Point:
    """One point of the grid."""

    T: int
    E: int
    K: int
    policy: str = "budget"  # of POLICIES
    hits: str = "half"  # of HITS
    routing: str = "uniform"  # of ROUTINGS

    @property
    def router(self) -> tuple[int, int]:
        """E and K."""
        return self.E, self.K

    @property
    def is_base(self) -> bool:
        """Whether only the size varies."""
        return (self.policy, self.hits, self.routing) == ("budget", "half", "uniform")

    def __str__(self) -> str:
        return f"T={self.T}, E={self.E}, K={self.K}, {self.policy}, {self.hits} hit, {self.routing}"


def chosen_points(
    tokens: Iterable[int] = TOKENS, routers: Iterable[tuple[int, int]] = ROUTERS
) -> list[Point]:
    """Return one factor at a time: all sizes at the base case, then what else varies, at some.

    The base is a budget with half of the experts resident and uniform routing. Most wanted first.
    """
    tokens, routers = sorted(tokens), list(routers)
    sizes = list(itertools.product(tokens, routers))
    some = [(T, router) for T, router in sizes if T in (1, 64, 16384)]
    ends = [(T, router) for T, router in some if router in ((8, 2), (128, 8))]
    points = [Point(T, *router) for T, router in sizes]
    points += [
        Point(T, *router, policy="off") for T, router in sizes if T in (1, 64, 16384, 1048576)
    ]
    points += [Point(T, *router, policy="bonus") for T, router in some]
    points += [Point(T, *router, hits=hits) for T, router in ends for hits in ("all", "none")]
    points += [Point(T, *router, routing="skewed") for T, router in ends]
    # a run that is cut short has the ends of the grid, in every respect, before its middle
    return sorted(
        dict.fromkeys(points), key=lambda p: (p.T not in FIRST[0]) + (p.router not in FIRST[1])
    )


def is_first(point: Point) -> bool:
    """Whether a point is one of those that the targets ask for."""
    at_ends = point.T in FIRST[0] and point.router in FIRST[1]
    return at_ends and (point.is_base or point.policy == "off")


def all_points(
    tokens: Iterable[int] = TOKENS, routers: Iterable[tuple[int, int]] = ROUTERS
) -> list[Point]:
    """Return the whole product."""
    product = itertools.product(sorted(tokens), routers, POLICIES, HITS, ROUTINGS)
    return [Point(T, *router, *rest) for T, router, *rest in product]


def residents(E: int, hits: str) -> list[int]:
    """Return the resident experts, ascending: a fixed random draw of the share in ``HITS``."""
    order = torch.randperm(E, generator=torch.Generator().manual_seed(E))
    return sorted(order[: round(E * HITS[hits])].tolist())


def make_gate(point: Point, device: torch.device, **more: object) -> MoEGate:
    """Return a gate for the point, its state new; ``more`` as :class:`MoEGate` takes it."""
    gate = MoEGate(
        more.pop("hidden_size", None), point.E, point.K, POLICIES[point.policy],
        max_policy_tokens=max(64, point.T), device=device, **more,
    )  # fmt: skip
    gate.set_resident(residents(point.E, point.hits))
    return gate


def make_logits(point: Point, device: torch.device, dtype: torch.dtype = DTYPE) -> list:
    """Return some inputs of the point, ``(T, E)`` each, as many as :data:`INPUT_BYTES` hold."""
    size = point.T * point.E * dtype.itemsize
    count = max(1, min(INPUTS, INPUT_BYTES // size))
    generator = torch.Generator(device).manual_seed(0)
    offset_E = torch.zeros(point.E)
    if point.routing == "skewed":
        rank_E = torch.randperm(point.E, generator=torch.Generator().manual_seed(1))
        offset_E = -ZIPF * torch.log1p(rank_E)
    offset_E = offset_E.to(device, dtype)
    shape = (point.T, point.E)
    return [
        torch.randn(shape, generator=generator, device=device, dtype=dtype).add_(offset_E)
        for _ in range(count)
    ]


def least_bytes(T: int, E: int, K: int, logits_bytes: int = DTYPE.itemsize) -> int:
    """Return what a route call must at least read and write.

    Logits once, K ids (int64) and weights (float32) a token; of the state, residency and strength
    read, affinity, activations and counters read and written, the step record written and its
    generation read.
    """
    tokens = T * E * logits_bytes + T * K * (8 + 4)
    state = 4 * E + 4 + 2 * (4 + 8) * E + 2 * 8 * layout.NUM_COUNTERS
    return tokens + state + 4 * layout.record_width(E) + 4


# -- is it right


class Answer(NamedTuple):
    """What the reference makes of some rows."""

    weights: torch.Tensor
    ids: torch.Tensor
    state: RouterState


def reference(logits_TE: torch.Tensor, gate: MoEGate, rule: Rule | None = None) -> Answer:
    """Route by the definition, on the CPU, from a new state with the gate's residents.

    Args:
        logits_TE: On any device.
        gate: Its sizes, residents, policy and affinity constants.
        rule: In place of the policy's.
    """
    state = RouterState(1, gate.num_experts)
    for name in ("slot_of_LE", "strength_L"):
        getattr(state, name).copy_(getattr(gate.state, name).cpu())
    state.reserve(logits_TE.shape[0], gate.decay)
    T, K = logits_TE.shape[0], gate.top_k
    weights_TK, ids_TK = torch.empty(T, K), torch.empty(T, K, dtype=torch.int64)
    route_ref(
        logits_TE.cpu(), weights_TK, ids_TK, None, state, 0,
        top_k=K, rule=gate.policy.rule if rule is None else rule, protect=gate.policy.protect,
        affinity_from=AffinityFrom[gate.affinity_from.upper()],
        decay=gate.decay, boost=gate.boost, max_score=gate.max_score,
    )  # fmt: skip
    return Answer(weights_TK, ids_TK, state)


def sampled(T: int, decay: float = 0.99) -> int:
    """Return how many of the last rows of T stand for all of them.

    All where they are few; else enough for the affinity, beginning where a chunk of the kernel does.
    """
    least = max(SAMPLE, affinity_window(decay) + layout.CHUNK)
    return T if T <= least else least + (T - least) % layout.CHUNK


def differs_from_reference(
    got: tuple[torch.Tensor, torch.Tensor], gate: MoEGate, logits_TE: torch.Tensor
) -> str | None:
    """Return how a call's results and the state that it left differ; None if they are right.

    The gate was new before the call. Of a large call the last rows are compared (see
    :func:`sampled`), and the counters with what its own ids imply. So they are where a swap at the
    very edge of a budget fell the other way, by an exponential rounded otherwise: in a row of
    :data:`EDGE_ROWS` at most.
    """
    weights_TK, ids_TK = (tensor.cpu() for tensor in got)
    T, n = len(ids_TK), sampled(len(ids_TK), gate.decay)
    want = reference(logits_TE[-n:], gate)
    other_T = (ids_TK[-n:] != want.ids).any(1)
    others, is_budget = int(other_T.sum()), gate.policy.rule in (Rule.MASS, Rule.OUTPUT)
    if others > (-(-n // EDGE_ROWS) if is_budget and n > 1 else 0):
        return f"other ids in {others} of {n} rows"
    error_TK = (weights_TK[-n:] - want.weights).abs() - 2e-6 * want.weights
    error = error_TK[~other_T].max().item() if others < n else 0.0
    if not error <= 5e-7:
        return f"weights are off by {error:.2g}"
    affinity_E, wanted_E = gate.affinity.cpu(), want.state.affinity_LE[0]
    if n < T:  # a choice before the rows that are compared leaves at most this
        faded_E = (wanted_E == 0) & (affinity_E <= FADED * gate.max_score)
        affinity_E = torch.where(faded_E, 0.0, affinity_E)
    if not torch.equal(affinity_E, wanted_E):
        return "another affinity"
    if n < T or others:
        return _differs_from_ids(ids_TK, gate)
    for name in ("activations_LE", "record_LR"):
        if not torch.equal(getattr(gate.state, name).cpu(), getattr(want.state, name)):
            return f"another {name}"
    counters_C, wanted_C = gate.state.counters_LC[0].cpu(), want.state.counters_LC[0]
    off_C = (counters_C - wanted_C).abs()
    # a rounded float32 per token that swaps
    allowed = 8 * int(wanted_C[layout.SWAPS]) + 1
    if off_C[layout.MOVED_MASS] > allowed or off_C.sum() > off_C[layout.MOVED_MASS]:
        return f"counters {counters_C.tolist()}, not {wanted_C.tolist()}"
    return None


def _differs_from_ids(ids_TK: torch.Tensor, gate: MoEGate) -> str | None:
    """Compare the counts with the executed ids; of swaps and moved mass those know nothing."""
    executed_E = ids_TK.flatten().bincount(minlength=gate.num_experts)
    if not torch.equal(gate.activations.cpu(), executed_E):
        return "other activations than its ids"
    missing_E = gate.state.slot_of_LE[0].cpu() < 0
    misses = int(executed_E[missing_E].sum())
    wanted = {
        layout.TOKENS: len(ids_TK), layout.PAIRS: ids_TK.numel(),
        layout.HITS: ids_TK.numel() - misses, layout.MISSES: misses,
        layout.UNIQUE_MISSES: int((executed_E > 0)[missing_E].sum()), layout.PADDED: 0,
    }  # fmt: skip
    counters = gate.state.counters_LC[0].tolist()
    if any(counters[column] != count for column, count in wanted.items()):
        return f"counters {counters}, not {wanted}"
    return None


def refuse_if(problem: str | None, name: str, point: object) -> None:
    """End the benchmark over a wrong result.

    Raises:
        SystemExit: There is a problem.
    """
    if problem:
        raise SystemExit(f"{name} is wrong at {point} ({problem}): not timing it")


# -- compiling ahead


def compile_in_processes(
    work: Callable[..., None], arguments: Iterable[tuple], max_seconds: float
) -> None:
    """Run calls that compile kernels in processes, which leave them in Triton's cache on the disk.

    What fails or takes too long here compiles later, where it is used, or fails there and is told.
    """
    arguments = list(dict.fromkeys(arguments))
    workers = max(1, min(14, (os.cpu_count() or 2) - 2, len(arguments)))
    context = multiprocessing.get_context("spawn")  # a CUDA context does not survive a fork
    pool = ProcessPoolExecutor(workers, mp_context=context)
    futures = [pool.submit(work, *call) for call in arguments]
    problems = set()
    try:
        done = as_completed(futures, timeout=max_seconds)
        for future in tqdm(done, total=len(futures), desc="compiling", leave=False, disable=None):
            if error := future.exception():
                problems.add(f"{type(error).__name__}: {error}")
    except TimeoutError:
        problems.add("out of time")
    finally:
        # a compiler that went on would share processors and GPU with what is measured next
        for process in list(pool._processes.values()):
            process.kill()
        pool.shutdown(cancel_futures=True)
    for problem in sorted(problems):
        print(f"compiling ahead: {problem}")


def smallest_like(T: int, E: int, K: int, tokens: Iterable[int] = TOKENS) -> int:
    """Return the least T of some whose call runs the same compiled kernel."""
    from moe_gpu.kernels.launch import tile_of

    def kernel(T: int) -> tuple:
        tile = tile_of(T, E, K)
        return *tile, T <= tile[0]

    return min((t for t in tokens if kernel(t) == kernel(T)), default=T)


def compile_point(point: Point, in_parts: bool) -> None:
    """Compile on CUDA what a point needs, and with ``in_parts`` the route kernel's parts too."""
    import _route_only as kernels
    from moe_gpu.kernels.launch import tile_of

    device = torch.device("cuda")
    gate, logits_TE = make_gate(point, device), make_logits(point, device)[0]
    calls = [lambda: gate.route(logits_TE)]
    if in_parts:
        calls += [kernels.routed_until(stage, calls[0]) for stage in kernels.NOT_WRITTEN]
    for tile in {tile_of(point.T, point.E, point.K), kernels.columns_tile(point.E)}:
        calls.append(lambda tile=tile: kernels.route_only(logits_TE, point.K, tile))
    for call in calls:
        call()
    torch.cuda.synchronize()
