"""What a route call takes, beside what a launch, routing alone and PyTorch take.

Usage:
    python profiling/bench_route.py                            # CUDA where there is one
    python profiling/bench_route.py --full --max-seconds 3600  # the whole product of the grid
    python profiling/bench_route.py --tokens 1,64 --routers 8x2,128x8
    python profiling/bench_route.py --peers FOLDER             # checkouts of other libraries
    python profiling/bench_route.py --device cpu               # the reference path

One factor varies at a time around a base case (``_route_cases``), every result is checked against
the reference first, and a wrong one of ours is not timed and fails the run; a peer that is wrong or
cannot be had is listed with the reason and not timed. Clocks, all in microseconds per call:

* *graph replay*: device time, many calls in one CUDA graph over rotating inputs, divided; its
  percentiles are of such means. Inputs stay in the second-level cache where they fit.
* *cold*: device time of one call between two events after that cache was overwritten. Compare with
  the empty kernel's, which contains the events.
* *eager*: the host's time per call, without waiting for the device. Beside it an empty kernel,
  called as ``kernel[grid](x)``, and launched directly as ours is, past Triton's look at arguments.
* *latency*: the same with a wait for the device in every call.
* *wall*: on the CPU, in place of the first two, one thread.

Routing alone is a kernel of ours with the same selection and no state, in two tile shapes, and the
libraries' where they are. The chain does all the work in PyTorch, exact routing only: less than a
policy does.
"""

import dataclasses
import functools
import itertools
import statistics
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

import _bench as bench
import _peers as peers
import _route_cases as cases
import _route_report as report
from _route_cases import Point
from moe_gpu.kernels.route_ref import Rule

OURS, EMPTY, CHAIN, COMPILED = "moe-gpu", "empty kernel", "PyTorch chain", "PyTorch chain, compiled"
DIRECT = "empty kernel, launched directly"
ROUTING_ONLY = ("routing only, our tile", "routing only, 256 columns", *peers.LIBRARIES)
COMPILED_AT = ((1, (8, 2)), (1, (128, 8)), (16384, (128, 8)))  # T, router: it takes seconds each
STAGES_AT = (1, 4, 16, 64, 4096)
STAGE_ROUTERS = ((8, 2), (128, 8), (256, 8))
WIDTHS = {(8, 2): 4096, (128, 8): 2048}  # D of a router with its projection, by E and K
PROJECTED_AT = (1, 64, 4096)
ORIGINAL_NS = {(8, 2): 110, (64, 2): 265, (256, 8): 2700}  # per token, one thread: not of this run
CPU_CELLS = 2**16  # T x E beyond which the reference path is not timed
EAGER_TOKENS = 4096  # beyond it the host waits for the device


@dataclasses.dataclass(frozen=True)
class Effort:
    """How much is measured."""

    rounds: int = 30
    round_seconds: float = 1.0  # of all rounds at one point
    samples: int = 1000  # of an eager call
    sample_seconds: float = 0.25
    cold: int = 50
    compiles: bool = True  # with torch.compile


# what takes microseconds is repeated often enough in this time, and the grid is large
ON_CUDA = Effort(round_seconds=0.4, sample_seconds=0.08, cold=30)
QUICK = Effort(
    rounds=3, round_seconds=0.05, samples=10, sample_seconds=0.05, cold=3, compiles=False
)


class Run:
    """The measurements of one run, as they come.

    Args:
        device: Where.
        effort: How much.
        folder: Of checkouts of other libraries.
        max_seconds: After this no measurement begins.
    """

    def __init__(
        self, device: torch.device, effort: Effort, folder: Path | None, max_seconds: float
    ):
        self.device, self.effort, self.folder = device, effort, folder
        self.deadline_s = time.perf_counter() + max_seconds
        self.rows: list[dict] = []
        self.ratios: list[dict] = []
        self.stages: list[dict] = []
        self.projected: list[dict] = []
        self.original: list[dict] = []
        self.absent: dict[str, str] = {}
        self.not_measured: list[str] = []
        self.failed: list[str] = []
        self._flush: torch.Tensor | None = None

    @property
    def on_cuda(self) -> bool:
        """Whether there are launches, graphs and caches to speak of."""
        return self.device.type == "cuda"

    @property
    def seconds_left(self) -> float:
        """Seconds in which measurements may begin."""
        return self.deadline_s - time.perf_counter()

    def attempt(self, what: object, measure: Callable[..., None], *arguments: object) -> None:
        """Measure unless time is up; what breaks does not take with it what was measured before.

        Nor does a wrong result, which is not timed.
        """
        if self.seconds_left < 0:
            self.not_measured.append(f"{what}: out of time")
            return
        try:
            measure(self, *arguments)
        except torch.OutOfMemoryError:
            self.not_measured.append(f"{what}: out of memory")
        except SystemExit as refusal:
            print(refusal)
            self.failed.append(str(refusal))
        except Exception as error:
            traceback.print_exc()
            self.failed.append(f"{what}: {type(error).__name__}: {error}"[:300])

    def add(self, point: Point, what: str, clock: str, seconds: list[float], **more) -> None:
        """Keep a measurement: one row of the long table."""
        self.rows.append(
            dataclasses.asdict(point) | {"what": what, "clock": clock, "unit": "us"}
            | bench.percentiles(seconds, 1e6) | {"samples": len(seconds)} | more
        )  # fmt: skip

    def rounds(self, point: Point, calls: dict[str, list]) -> dict[str, list[float]]:
        """Time alternatives in turn by graph replay, or wall time on the CPU."""
        replays = {}
        for name, each in calls.items():
            try:
                replays[name] = bench.Replay(each, self.device)
            except Exception as error:
                if name not in (*peers.LIBRARIES, COMPILED):
                    raise
                self.absent[f"{name} at {point}"] = f"no graph: {type(error).__name__}: {error}"
        seconds = bench.interleave(
            replays, self.effort.rounds, max_seconds=self.effort.round_seconds, label=str(point)
        )
        for name, taken in seconds.items():
            clock = "graph replay" if self.on_cuda else "wall"
            self.add(point, name, clock, taken, calls=replays[name].count)
        return seconds

    def cold(self, point: Point, calls: dict[str, list]) -> None:
        """Time single calls with cold caches."""
        if self._flush is None:
            self._flush = bench.flush_buffer(self.device)
        for name, each in calls.items():
            seconds = bench.cold_s(each, self.device, self._flush, self.effort.cold)
            self.add(point, name, "cold", seconds)

    def eager(self, point: Point, calls: dict[str, list]) -> dict[str, float]:
        """Time calls on the host; return the medians of what a call costs the host."""
        medians = {}
        for name, each in calls.items():
            for clock, wait in (("eager", False), ("latency", True)):
                seconds = bench.eager_s(
                    each, self.device, self.effort.samples, wait=wait,
                    max_seconds=self.effort.sample_seconds,
                )  # fmt: skip
                self.add(point, name, clock, seconds)
                if not wait:
                    medians[name] = statistics.median(seconds)
        return medians


def over(inputs: list[torch.Tensor], route) -> list:
    """Return one call per input."""
    return [functools.partial(route, logits_TE) for logits_TE in inputs]


# -- one point of the grid


def measure(run: Run, point: Point) -> None:
    """Check all alternatives at a point, then time them."""
    inputs = cases.make_logits(point, run.device)
    gate = cases.make_gate(point, run.device)
    got = gate.route(inputs[0])
    problem = cases.differs_from_reference((got.weights, got.ids), gate, inputs[0])
    cases.refuse_if(problem, OURS, point)
    calls = {OURS: over(inputs, gate.route)} | own_kernels(run, point, inputs)
    single = dict(calls)  # launches: for a chain of them a cold cache is one for the first only
    if point.hits == "half" and point.routing == "uniform" and point.policy != "bonus":
        calls |= {name: over(inputs, route) for name, route in others(run, point, gate).items()}
    calls = right_ones(run, point, calls, gate)

    seconds = run.rounds(point, calls)
    ratios = ratios_of(seconds)
    if not run.on_cuda or point.T <= EAGER_TOKENS:
        if run.on_cuda and point.T * point.E * 2 <= bench.l2_bytes(run.device):
            run.cold(point, single)
        eager = {name: calls[name] for name in (OURS, EMPTY) if name in calls}
        if run.on_cuda:
            eager[DIRECT] = [direct(calls[EMPTY][0])]
        if CHAIN in calls:
            lists = make_chain(point, run.device, lists=True)
            eager[f"{CHAIN}, with nonzero"] = over(inputs, lists)
        medians = run.eager(point, eager)
        for key, name in (("eager_over_launch", DIRECT), ("eager_over_triton_call", EMPTY)):
            if name in medians:
                ratios[key] = medians[OURS] / medians[name]
    run.ratios.append(dataclasses.asdict(point) | ratios)


def own_kernels(run: Run, point: Point, inputs: list[torch.Tensor]) -> dict[str, list]:
    """Return calls of the kernels that bound ours from below; none on the CPU."""
    if not run.on_cuda:
        return {}
    import _route_only as kernels
    from moe_gpu.kernels.launch import most_programs, tile_of

    T, E, K = point.T, point.E, point.K
    tile, columns = tile_of(T, E, K), kernels.columns_tile(E)
    programs = min(-(-T // tile[0]), most_programs(run.device))
    calls = {EMPTY: [functools.partial(kernels.launch_empty, inputs[0], programs, tile[2])]}
    calls[ROUTING_ONLY[0]] = over(inputs, lambda x: kernels.route_only(x, K, tile))
    if columns != tile:
        calls[ROUTING_ONLY[1]] = over(inputs, lambda x: kernels.route_only(x, K, columns))
    return calls


def direct(empty: functools.partial) -> Callable[[], None]:
    """Return the same launch of the empty kernel, past Triton's front door."""
    import _route_only as kernels

    return kernels.direct_launch(*empty.args)


def make_chain(point: Point, device: torch.device, lists: bool) -> peers.Chain:
    """Return PyTorch's chain for a point."""
    resident_E = torch.zeros(point.E, dtype=torch.bool)
    resident_E[cases.residents(point.E, point.hits)] = True
    chain = peers.Chain(resident_E.to(device), point.K, lists)
    chain.prepare(point.T)
    return chain


def others(run: Run, point: Point, gate) -> dict:
    """Return the routers of other make that can be had; note why the rest cannot."""
    chain = make_chain(point, run.device, lists=False)
    routes, absent = peers.libraries(point.E, point.K, run.device, run.folder)
    run.absent |= absent
    return {CHAIN: chain} | routes


def compiled_chain(run: Run, point: Point) -> dict:
    """Return the chain under torch.compile, or note why there is none."""
    try:
        if not run.effort.compiles:
            raise peers.Absent("left out of a quick run: it compiles for seconds")
        chain = make_chain(point, run.device, lists=False)
        return {COMPILED: peers.compiled(chain, run.device)}
    except peers.Absent as reason:
        run.absent[COMPILED] = str(reason)
        return {}


def measure_compiled(run: Run, point: Point) -> None:
    """Time the chain under torch.compile beside the whole call."""
    inputs = cases.make_logits(point, run.device)
    gate = cases.make_gate(point, run.device)
    routes = {OURS: gate.route} | compiled_chain(run, point)
    calls = right_ones(run, point, {name: over(inputs, f) for name, f in routes.items()}, gate)
    if COMPILED not in calls:
        return
    beside = f"{OURS}, beside the compiled chain"
    seconds = run.rounds(point, {beside: calls[OURS], COMPILED: calls[COMPILED]})
    ratios = report.find(run.ratios, **dataclasses.asdict(point))
    if ratios is not None and COMPILED in seconds:
        ratios["compiled_over_ours"] = bench.ratio(seconds[COMPILED], seconds[beside])


def right_ones(run: Run, point: Point, calls: dict[str, list], gate) -> dict[str, list]:
    """Return the alternatives that route as the reference does; note the others."""
    logits_TE = calls[OURS][0].args[0][-cases.sampled(point.T) :]
    want = cases.reference(logits_TE, gate, Rule.EXACT)
    return {
        name: each for name, each in calls.items()
        if name in (OURS, EMPTY) or is_right(run, point, name, each[0], logits_TE, want)
    }  # fmt: skip


def is_right(run: Run, point: Point, name: str, call, logits_TE: torch.Tensor, want) -> bool:
    """Whether a call routes its last rows as wanted; note it if not."""
    rows = slice(-len(logits_TE), None)
    try:
        weights_TK, ids_TK = call()
        got = weights_TK[rows].cpu(), ids_TK[rows].cpu()
    except Exception as error:  # of foreign code
        run.absent[f"{name} at {point}"] = f"failed: {type(error).__name__}: {error}"[:300]
        return False
    problem = peers.differs(got, (want.weights, want.ids), logits_TE)
    if name in (*ROUTING_ONLY[:2], CHAIN):  # ours: nothing that follows would be true
        cases.refuse_if(problem, name, point)
    if problem:
        run.absent[f"{name} at {point}"] = f"wrong, not timed: {problem}"
    return not problem


def ratios_of(seconds: dict[str, list[float]]) -> dict[str, object]:
    """Return ours over others, and chains over ours, by paired rounds."""
    ours, found = seconds[OURS], {}
    if EMPTY in seconds:
        found["over_empty"] = bench.ratio(ours, seconds[EMPTY])
    alone = {name: seconds[name] for name in ROUTING_ONLY if name in seconds}
    if alone:
        best = min(alone, key=lambda name: statistics.median(alone[name]))
        found |= {"over_routing_only": bench.ratio(ours, alone[best]), "routing_only": best}
    if CHAIN in seconds:
        found["chain_over_ours"] = bench.ratio(seconds[CHAIN], ours)
    return found


# -- what each stage adds


def measure_stages(run: Run, point: Point) -> None:
    """Time the route kernel in part and whole, each part checked against the reference."""
    import _route_only as kernels
    from moe_gpu.kernels.launch import tile_of

    inputs = cases.make_logits(point, run.device)
    exact = dataclasses.replace(point, policy="off")
    tile = tile_of(point.T, point.E, point.K)
    calls = {"routing": over(inputs, lambda x: kernels.route_only(x, point.K, tile))}
    want = cases.reference(inputs[0], cases.make_gate(exact, run.device))
    problem = peers.differs(calls["routing"][0](), (want.weights, want.ids), inputs[0])
    cases.refuse_if(problem, "routing only", point)
    for stage in kernels.NOT_WRITTEN:
        gate = cases.make_gate(exact, run.device)
        shortened = [kernels.routed_until(stage, call) for call in over(inputs, gate.route)]
        got = shortened[0]()
        if problem := differs_until(stage, got, gate, want):  # nothing else rests on this kernel
            run.absent[f"stages at {point}"] = f"until {stage} is wrong, not timed: {problem}"
            return
        calls[stage] = shortened
    for name, policy in (("requests", "off"), ("bonus", "bonus"), ("budget", "budget")):
        gate = cases.make_gate(dataclasses.replace(point, policy=policy), run.device)
        got = gate.route(inputs[0])
        problem = cases.differs_from_reference((got.weights, got.ids), gate, inputs[0])
        cases.refuse_if(problem, f"{OURS} with {policy}", point)
        calls[name] = over(inputs, gate.route)
    seconds = run.rounds(point, {f"until {name}": each for name, each in calls.items()})
    seconds = {name.removeprefix("until "): taken for name, taken in seconds.items()}
    run.stages.append({"T": point.T, "E": point.E, "K": point.K} | stage_costs(seconds))


def differs_until(stage: str, got, gate, want: cases.Answer) -> str | None:
    """Return how a shortened call differs: it must do its stages, and none beyond them."""
    if not torch.equal(got.ids.cpu(), want.ids):
        return "other ids"
    written = {
        "affinity_LE": True, "activations_LE": stage == "counters",
        "counters_LC": stage == "counters", "record_LR": False,
    }  # fmt: skip
    for name, is_written in written.items():
        mine, whole = getattr(gate.state, name).cpu(), getattr(want.state, name)
        if not torch.equal(mine, whole if is_written else torch.zeros_like(whole)):
            return f"{name} is not that of this stage"
    return None


def stage_costs(seconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Return what each stage adds in microseconds, by paired rounds.

    Affinity, counters and requests add to one another in this order, over routing alone; what
    tiles exchange through the scratch counts as affinity. A policy adds to all of them.
    """
    steps = {
        "affinity": "routing", "counters": "affinity", "requests": "counters",
        "bonus": "requests", "budget": "requests",
    }  # fmt: skip
    costs = {of: bench.difference(seconds[of], seconds[less], 1e6) for of, less in steps.items()}
    whole = bench.difference(seconds["requests"], seconds["routing"], 1e6)
    return {"routing_us": bench.spread(seconds["routing"], 1e6)} | costs | {"bookkeeping": whole}


# -- with the projection, and the original router


def measure_projected(run: Run, point: Point, width: int) -> None:
    """Time gate and transformers' router from hidden states: the same projection in both."""
    generator = torch.Generator(run.device).manual_seed(0)
    gate = cases.make_gate(point, run.device, hidden_size=width, dtype=cases.DTYPE)
    gate.requires_grad_(False)
    try:
        router = peers.transformers_router(point.E, point.K, width, gate.weight.data)
    except peers.Absent as reason:
        run.absent["transformers' router"] = str(reason)
        return
    inputs = [
        torch.randn(point.T, width, generator=generator, device=run.device, dtype=cases.DTYPE)
        for _ in range(4)
    ]
    logits_TE, *stock = router(inputs[0])
    want = cases.reference(logits_TE, gate, Rule.EXACT)
    if problem := peers.differs(tuple(stock), (want.weights, want.ids), logits_TE):
        run.absent[f"transformers' router at {point}"] = f"wrong, not timed: {problem}"
        return
    got = gate(inputs[0])
    problem = cases.differs_from_reference((got.weights, got.ids), gate, got.logits)
    cases.refuse_if(problem, f"{OURS} with projection", point)
    calls = {
        f"{OURS}, from hidden states": over(inputs, gate),
        "transformers' router, from hidden states": over(inputs, router),
    }
    ours, stock = run.rounds(point, calls).values()
    ratios = {"D": width, "transformers_over_ours": bench.ratio(stock, ours)}
    run.eager(point, calls)
    run.projected.append(dataclasses.asdict(point) | ratios)


def measure_original(run: Run, point: Point) -> None:
    """Time the reference path per token, beside the known time of the original router."""
    inputs = cases.make_logits(point, run.device, torch.float32)
    gate = cases.make_gate(point, run.device)
    got = gate.route(inputs[0])
    problem = cases.differs_from_reference((got.weights, got.ids), gate, inputs[0])
    cases.refuse_if(problem, OURS, point)
    calls = {OURS: over(inputs, gate.route)}
    routes = {CHAIN: make_chain(point, run.device, lists=True)} | compiled_chain(run, point)
    calls |= {name: over(inputs, route) for name, route in routes.items()}
    calls = right_ones(run, point, calls, gate)
    seconds = run.rounds(point, {f"{name}, float32": each for name, each in calls.items()})
    per_token = {
        name.removesuffix(", float32"): bench.spread(s, 1e9 / point.T)
        for name, s in seconds.items()
    }
    about = {"T": point.T, "E": point.E, "K": point.K}
    original = {"original_ns": ORIGINAL_NS[point.router]}
    run.original.append(about | original | {"ns_per_token": per_token})


# -- the run


def parse(options, quick: bool, on_cuda: bool) -> list[Point]:
    """Return the points that the command line asks for."""
    tokens, routers = cases.TOKENS, cases.ROUTERS
    if quick:
        tokens, routers = (1, 16), ((8, 2), (64, 6))
    if options.tokens:
        tokens = [int(T) for T in options.tokens.split(",")]
    if options.routers:
        routers = [tuple(map(int, router.split("x"))) for router in options.routers.split(",")]
    return (cases.all_points if options.full else cases.chosen_points)(tokens, routers)


def compile_ahead(points: list[Point], stages: list[Point], max_seconds: float) -> None:
    """Compile the kernels that will be timed, several at once."""
    staged = [dataclasses.replace(p, policy=policy) for p in stages for policy in cases.POLICIES]
    least = [
        dataclasses.replace(p, T=cases.smallest_like(p.T, p.E, p.K), hits="half", routing="uniform")
        for p in [*points, *staged]
    ]
    in_parts = {p for p in least[len(points) :] if p.policy == "off"}
    work = [(p, p in in_parts) for p in least]
    cases.compile_in_processes(cases.compile_point, work, max_seconds)


def measure_all(run: Run, points: list[Point], quick: bool) -> None:
    """Measure everything, in the order of its worth."""
    tokens, chosen = {p.T for p in points}, {p.router for p in points}
    if run.on_cuda:
        stages = [
            Point(T, *router) for T in STAGES_AT for router in STAGE_ROUTERS
            if T in tokens and router in chosen
        ]  # fmt: skip
        compile_ahead(points, stages, 0.3 * run.seconds_left)
        for point in tqdm(stages, desc="stages", disable=None):
            run.attempt(f"stages at {point}", measure_stages, point)
    else:
        run.not_measured.append("stage costs, empty kernel, cold caches, copy bandwidth: CUDA only")
        for T, router in itertools.product((1, 64), list(ORIGINAL_NS)[: 1 if quick else None]):
            point = Point(T, *router, policy="off")
            run.attempt(f"per token, {point}", measure_original, point)
    for T, (router, width) in itertools.product(PROJECTED_AT, WIDTHS.items()):
        point = Point(T, *router)
        if T in tokens and router in chosen and (run.on_cuda or T * width <= 2**18):
            run.attempt(f"with the projection, {point}", measure_projected, point, width)
    sizes = [point for point in points if run.on_cuda or point.T * point.E <= CPU_CELLS]
    measure_points(run, [point for point in sizes if cases.is_first(point)])
    for point in sizes:  # not before: a compilation can outlast the time that is left
        if point.is_base and (point.T, point.router) in COMPILED_AT:
            run.attempt(f"{COMPILED} at {point}", measure_compiled, point)
    measure_points(run, [point for point in sizes if not cases.is_first(point)])
    run.not_measured += [
        f"{point}: too large for the reference path" for point in points if point not in sizes
    ]


def measure_points(run: Run, points: list[Point]) -> None:
    """Measure points of the grid."""
    for point in tqdm(points, desc="points", disable=None):
        run.attempt(point, measure, point)


def content_of(run: Run, about: dict, copy_bytes_per_s: float | None) -> dict:
    """Return the results."""
    content = {
        "conditions": about, "copy_gb_per_s": copy_bytes_per_s and copy_bytes_per_s / 1e9,
        "rows": run.rows, "ratios": run.ratios, "stages": run.stages,
        "projected": run.projected, "original_router": run.original,
        "bandwidth": report.bandwidths(run.rows, OURS, copy_bytes_per_s),
        "seed_targets": report.seed_targets(run.rows, OURS), "absent": run.absent,
        "not_measured": run.not_measured, "failed": run.failed,
    }  # fmt: skip
    return content | {"targets": report.targets(content, OURS) if run.on_cuda else []}


@torch.no_grad()
def main() -> None:
    """Measure, print and write."""
    options, device, write = bench.arguments(
        __doc__, "route",
        full={"action": "store_true", "help": "the whole product of the grid"},
        tokens={"help": "such as 1,64"},
        routers={"help": "such as 8x2,128x8"},
        peers={"type": Path, "help": "folder with checkouts of other libraries"},
        max_seconds={"type": float, "default": 150.0, "help": "begin no measurement after this"},
    )  # fmt: skip
    if device.type == "cpu":
        torch.set_num_threads(1)
    points = parse(options, options.quick, device.type == "cuda")
    # before the conditions, which hold the clocks: an idle GPU's are low
    copy_bytes_per_s = bench.copy_bytes_per_s(device) if device.type == "cuda" else None
    about = bench.conditions(
        device, logits=str(cases.DTYPE).removeprefix("torch."), quick=options.quick,
        policies=", ".join(f"{name} {policy}" for name, policy in cases.POLICIES.items()),
        max_policy_tokens="raised to T (64 by default: larger calls route exactly)",
        full_grid=options.full, max_seconds=options.max_seconds,
    )  # fmt: skip
    effort = ON_CUDA if device.type == "cuda" else Effort()
    run = Run(device, QUICK if options.quick else effort, options.peers, options.max_seconds)
    try:
        measure_all(run, points, options.quick)
    except KeyboardInterrupt:  # asked to end: with what there is
        run.not_measured.append("interrupted: the rest of the points")
    content = content_of(run, about, copy_bytes_per_s)
    text = report.text_of(content)
    print(f"\n{text}")
    write(content, text, run.rows)
    if run.failed:
        raise SystemExit(f"{len(run.failed)} measurements failed: {run.failed[0]}")


if __name__ == "__main__":
    main()
