"""How fast do experts reach the device, and how much of their copying does the offloader hide?

Usage:
    python profiling/bench_offload.py                   # CUDA where there is one
    python profiling/bench_offload.py --device cpu      # some minutes
    python profiling/bench_offload.py --part link       # one part; --part loads is the other
    python profiling/bench_offload.py --device cpu --quick

*loads*: steps of the real offloader that miss every expert they need, from each tier, as a ratio to
plain asynchronous copies of the same sizes from page-locked memory (on the CPU: from memory to
memory). From the record of the routed step to the last byte; nothing computes.

*link*: the real offloader replays routing recorded from a trained model, against a simulated link: a
copy of n bytes takes n / bandwidth, one after another, on the pager's thread; compute is a wait of a
stated length. So the figures say how well copies are ordered and hidden, and nothing about how
fast any device is; they are the same on every machine.

Lower bounds, computed for the very misses of each run and the compute times it really had:

    demand   no copy begins before its layer's router has spoken; then the link never rests, hits
             compute first, and each missing expert computes as soon as it and compute are free
    ahead    the same, but from the first router on the link never rests at all: what perfect
             prediction would leave

"ratio" is the measured stall over the bound that applies: demand, where nothing is fetched ahead,
and ahead for a prefill that streams.
"""

import contextlib
import itertools
import math
import os
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import AutoModelForCausalLM

import _bench as bench
from bench_decode import flat
from moe_gpu import Exact, MassBudget, MoEGate, RouterState
from moe_gpu.offload import ExpertLayout, ExpertOffloader, ExpertStore
from moe_gpu.offload.disk import DiskExperts, Source
from moe_gpu.offload.shards import Shards
from moe_gpu.offload.tiers import Tier

PARTS = ("loads", "link")

# -- loads

MB = 1_000_000
SIZES_MB = {"cuda": (1, 4, 16, 64, 176, 352), "cpu": (1, 4, 16)}  # 352: Mixtral in bf16
MAX_BYTES = {"cuda": 3 << 30, "cpu": 256 << 20}  # of one size's experts
ROUND_BYTES = {"cuda": 1 << 30, "cpu": 64 << 20}  # moved per round at least
EXPERTS = 16  # half of them in slots


class Loads:
    """One layer whose steps need either half of its experts, in turn: every load is a miss.

    Args:
        device: Where the slots are.
        base_B: uint8, what the experts' bytes are made from.
        experts: E, even.
        tier: Where the experts live.
        folder: For files; what is there already is used.
        cold: Drop the page cache of the files before each step.
    """

    def __init__(self, device, base_B, experts: int, tier: Tier, folder: Path, cold: bool = False):
        self.device, self.base_B, self.experts, self.cold = device, base_B, experts, cold
        self.bytes_of_step = experts // 2 * len(base_B)
        weights = {"w": torch.stack([base_B + e for e in range(experts)])}
        layout, files = ExpertLayout.of(weights), None
        if tier is Tier.DISK:
            path = folder / "model.safetensors"
            if not path.exists():
                save_file(weights, path)
                with path.open("rb") as file:
                    os.fsync(file.fileno())  # dirty pages stay in the cache
            sources = [[{"w": [Source("w", e)]} for e in range(experts)]]
            files = DiskExperts(layout, Shards(folder), sources)
        self.store = ExpertStore(
            layout, 1, experts, device, tiers_LE=[[tier] * experts], files=files
        )
        if tier is not Tier.DISK:
            self.store.put(0, weights)
        self.state = RouterState(1, experts, device=device)
        self.gate = MoEGate(num_experts=experts, top_k=1, state=self.state)
        self.offloader = ExpertOffloader(self.state, self.store, experts // 2, staging_slots=0)
        self.offloader.fill()
        self.slots = self.offloader.weights_of(0)
        wanted_TE = torch.eye(experts, device=device)
        self.halves = itertools.cycle([wanted_TE[experts // 2 :], wanted_TE[: experts // 2]])

    def step_s(self, check: bool = False) -> float:
        """Take one step; return its seconds, from the routed record to the last byte."""
        if self.cold:
            for expert in range(self.experts):
                self.store.files.drop_cache(0, expert)
        self.gate.route(next(self.halves))
        loads = self.offloader.metrics().loads

        def step():
            for turn in self.offloader.step(0, self.experts // 2):
                if check:
                    want_B = self.base_B + turn.expert
                    if not torch.equal(self.slots[turn.slot]["w"].cpu(), want_B):
                        raise SystemExit(f"expert {turn.expert} is wrong: not timing it")

        took_s = bench.elapsed_s(step, self.device)
        loads = self.offloader.metrics().loads - loads
        if loads != self.experts // 2:
            raise SystemExit(
                f"{loads} loads in a step of {self.experts // 2} misses: not timing it"
            )
        return took_s

    def close(self) -> None:
        """Free slots and experts."""
        self.offloader.close()
        self.store.close()


def loads(
    device: torch.device, sizes_mb: list[int], quick: bool, max_seconds: float
) -> Iterator[dict]:
    """Time loads of each size from each tier, and plain copies; yield what is known so far."""
    rows, skipped = [], {}
    places = {"pinned": (Tier.PINNED, False)} if device.type == "cuda" else {}
    if not places:
        skipped["pinned"] = "no page-locked memory without a CUDA device"
    places |= {"pageable": (Tier.PAGEABLE, False), "disk, in the page cache": (Tier.DISK, False)}
    places |= {"disk, page cache dropped": (Tier.DISK, True)}
    for megabytes in sizes_mb:
        # the offloader aligns experts to 256 bytes
        expert_bytes = math.ceil(megabytes * MB / 256) * 256
        experts = max(2, min(EXPERTS, MAX_BYTES[device.type] // expert_bytes // 2 * 2))
        rows += _of_size(
            device, expert_bytes, experts, places, quick, max_seconds / len(sizes_mb), skipped
        )
        yield {"rows": rows, "skipped": skipped}


def _of_size(device, expert_bytes, experts, places, quick, max_seconds, skipped):
    steps = max(2, ROUND_BYTES[device.type] // (experts // 2 * expert_bytes))
    base_B = torch.randint(256, (expert_bytes,), dtype=torch.uint8)
    with contextlib.ExitStack() as stack:
        runs = {"plain copy": _plain_copies(device, base_B, experts // 2)}
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for name, (tier, cold) in places.items():
            layer = Loads(device, base_B, experts, tier, folder, cold)
            stack.callback(layer.close)
            if layer.store.pin_refused_bytes:
                skipped[f"{name}, {expert_bytes / MB:.0f} MB"] = "page-locking was refused"
                continue
            for _ in range(2):
                layer.step_s(check=True)
            runs[name] = layer.step_s
        seconds = bench.interleave(
            {name: lambda r=run: sum(r() for _ in range(steps)) for name, run in runs.items()},
            2 if quick else 12,
            max_seconds=max_seconds,
            label=f"{expert_bytes / MB:.0f} MB",
        )
    moved = steps * experts // 2 * expert_bytes
    return [
        {
            "from": name,
            "expert_mb": round(expert_bytes / MB),
            "loads": steps * experts // 2,
            "rounds": len(times),
            "gb_per_s": bench.spread(moved / s / 1e9 for s in times),
            "over_plain_copy": bench.ratio(seconds["plain copy"], times),
        }
        for name, times in seconds.items()
    ]


def _plain_copies(device, base_B, count):
    """Return a function that copies ``count`` experts to the device and returns its seconds."""
    is_cuda = device.type == "cuda"
    sources = [base_B.pin_memory() if is_cuda else base_B.clone() for _ in range(count)]
    targets = torch.empty(count, len(base_B), dtype=torch.uint8, device=device).unbind(0)

    def copy_all():
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source, non_blocking=True)

    return lambda: bench.elapsed_s(copy_all, device)


# -- link

EXPERT_BYTES = 1 << 20  # small: real bytes move too, and must not be what takes the time


@dataclass(frozen=True)
class Timing:
    """What the simulated device takes, in milliseconds."""

    copy: float  # one expert over the link
    other: float  # a layer beside its experts
    expert: float  # compute of one expert


@dataclass
class Step:
    """What one layer's step really took, in milliseconds."""

    before: float  # from the end of the step before
    hits: list[float]  # compute of each
    misses: list[float]


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    phase: str
    name: str
    options: dict
    policy: object = Exact()
    bound: str = "demand"


DECODE = Timing(copy=20.0, other=2.0, expert=1.0)
PREFILL = Timing(copy=28.0, other=14.0, expert=10.0)
CASES = [
    Case("decode", "lru", {"eviction": "lru"}),
    Case("decode", "affinity", {"eviction": "affinity"}),
    Case("decode", "default", {}),
    Case("decode", "prefetch next_gate", {"prefetch": ["next_gate"]}),
    Case("decode", "prefetch affinity", {"prefetch": ["affinity"]}),
    Case("decode", "mass budget 0.05", {}, MassBudget(0.05)),
    Case("decode", "mass budget 0.05, prefetch background", {"prefetch": ["background"]},
         MassBudget(0.05)),
    Case("decode", "mass budget 0.05, prefetch all",
         {"prefetch": ["next_gate", "background", "affinity"]}, MassBudget(0.05)),
    Case("decode", "pool", {"pool": True}),
    Case("prefill", "no streaming", {"stream_prefill": False}),
    Case("prefill", "streaming", {}, bound="ahead"),
    Case("prefill", "streaming, 4 staging slots", {"staging_slots": 4}, bound="ahead"),
    Case("prefill", "no staging slots", {"staging_slots": 0}),
]  # fmt: skip


@torch.no_grad()
def record(model_path: Path, rows: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Record routing of held-out text.

    Returns:
        ``logits (N, L, T, E)`` of each router, and ``ahead``: the next layer's router applied to
        the same hidden states (the last layer's is never used).
    """
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    text = load_file(model_path / "held_out.safetensors")
    pieces = [piece[i, :tokens].long() for i in range(rows) for piece in text.values()][:rows]
    routers = [layer.mlp.gate for layer in model.model.layers]
    hidden: list[torch.Tensor] = []
    hooks = [r.register_forward_pre_hook(lambda _, args: hidden.append(args[0])) for r in routers]
    try:
        logits, ahead = [], []
        for piece in pieces:
            hidden.clear()
            model(piece[None])
            x_LTD = [x.reshape(-1, x.shape[-1]) for x in hidden]
            logits.append(
                torch.stack([x @ r.weight.T for x, r in zip(x_LTD, routers, strict=True)])
            )
            later = [*routers[1:], routers[0]]
            ahead.append(torch.stack([x @ r.weight.T for x, r in zip(x_LTD, later, strict=True)]))
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(logits), torch.stack(ahead)


class Run:
    """One case: an offloader over a simulated link, and the bounds of what it had to do."""

    def __init__(self, case: Case, timing: Timing, layers: int, experts: int, slots: int):
        self.case, self.timing, self.layers = case, timing, layers
        layout = ExpertLayout.of({"w": torch.empty(experts, EXPERT_BYTES, dtype=torch.uint8)})
        store = ExpertStore(layout, layers, experts)
        for layer in range(layers):
            w_EB = torch.full((experts, EXPERT_BYTES), layer, dtype=torch.uint8)
            w_EB[:, 0] = torch.arange(experts)
            store.put(layer, {"w": w_EB})
        state = RouterState(layers, experts)
        pool = case.options.get("pool", False)
        self.offloader = ExpertOffloader(
            state,
            store,
            slots * (layers if pool else 1),
            link_gbps=EXPERT_BYTES / timing.copy * 1e-6,
            **case.options,
        )
        self.offloader.fill()
        self.gates = [
            MoEGate(
                num_experts=experts,
                top_k=2,
                policy=case.policy,
                decay=0.98,
                boost=0.02,
                state=state,
                layer=layer,
            )  # as attach does
            for layer in range(layers)
        ]
        self.weights_LS = [self.offloader.weights_of(layer) for layer in range(layers)]
        self.steps: list[Step] = []
        self.demand_ms = self.ahead_ms = 0.0

    def forward(self, logits_LTE: torch.Tensor, ahead_LTE: torch.Tensor, is_prefill: bool) -> None:
        """Run one call of T tokens through all layers."""
        steps = []
        for layer, gate in enumerate(self.gates):
            start_s = time.perf_counter()
            time.sleep(self.timing.other / 1e3)
            self.offloader.before_route(layer)
            _, _, ids_TK = gate.route(logits_LTE[layer])
            if layer + 1 < self.layers and self.offloader.wants_prediction(layer + 1):
                self.offloader.predict(layer + 1, ahead_LTE[layer].topk(2, dim=-1).indices)
            resident = set(self.offloader.state.slot_of_LE[layer].ge(0).nonzero()[:, 0].tolist())
            step = Step((time.perf_counter() - start_s) * 1e3, [], [])
            for turn in self.offloader.step(layer, ids_TK.numel(), is_prefill=is_prefill):
                start_s = time.perf_counter()
                first, second = self.weights_LS[layer][turn.slot]["w"][:2].tolist()
                if (first, second) != (turn.expert, layer):
                    raise SystemExit(f"wrong weights: layer {layer}, {turn}; not timing it")
                time.sleep(self.timing.expert / 1e3)
                took = step.hits if turn.expert in resident else step.misses
                took.append((time.perf_counter() - start_s) * 1e3)
            steps.append(step)
        self.steps += steps
        self.demand_ms += sum(stalls(self.timing.copy, [step]) for step in steps)
        self.ahead_ms += stalls(self.timing.copy, steps)


def stalls(copy_ms: float, steps: list[Step]) -> float:
    """Return the stall of an ideal schedule whose link never rests from the first step on."""
    now = link = stalled = 0.0
    for number, step in enumerate(steps):
        now += step.before * (number > 0) + sum(step.hits)
        for compute in step.misses:
            link += copy_ms
            stalled += max(0.0, link - now)
            now = max(now, link) + compute
    return stalled


def measure(case: Case, traces, slots: int, tokens: int, bar: tqdm) -> dict:
    """Replay one case and return its line."""
    logits_NLTE, ahead_NLTE = traces
    _, L, T, E = logits_NLTE.shape
    timing = DECODE if case.phase == "decode" else PREFILL
    run = Run(case, timing, L, E, slots)
    start_s = time.perf_counter()
    run.offloader.reset_metrics()
    calls = 0
    for logits_LTE, ahead_LTE in zip(logits_NLTE, ahead_NLTE, strict=True):
        chunks: Iterator = (
            ((logits_LTE[:, t : t + 1], ahead_LTE[:, t : t + 1]) for t in range(tokens))
            if case.phase == "decode"
            else iter([(logits_LTE, ahead_LTE)])
        )
        for logits, ahead in chunks:
            run.forward(logits, ahead, case.phase == "prefill")
            calls += 1
            bar.update()
    seconds = time.perf_counter() - start_s
    metrics = run.offloader.metrics()
    run.offloader.close()
    bound = run.demand_ms if case.bound == "demand" else run.ahead_ms
    misses = sum(len(step.misses) for step in run.steps)
    turns = misses + sum(len(step.hits) for step in run.steps)
    return {
        "phase": case.phase,
        "case": case.name,
        "calls": calls,
        "misses_per_call": misses / calls,
        "loads_per_call": metrics.loads / calls,
        "stall_ms_per_call": metrics.stall_ms / calls,
        "bound": case.bound,
        "bound_ms_per_call": bound / calls,
        "ratio": metrics.stall_ms / bound if bound else None,
        "ahead_bound_ms_per_call": run.ahead_ms / calls,
        "hit_rate": 1 - misses / turns,
        "prefetch_issued": metrics.prefetch_issued,
        "prefetch_useful": metrics.prefetch_useful,
        "prefetch_late": metrics.prefetch_late,
        "prefetch_cancelled": metrics.prefetch_cancelled,
        "prefetch_wasted_mb": metrics.prefetch_wasted_bytes / 1e6,
        "wall_ms_per_call": seconds * 1e3 / calls,
    }


def link(options: Namespace) -> dict:
    """Replay every case over the simulated link."""
    pieces, tokens, length = (1, 6, 128) if options.quick else (4, 32, 256)
    traces = record(options.model, pieces, length)
    cases = [case for case in CASES if not options.case or options.case in case.name]
    calls = sum(pieces * (tokens if case.phase == "decode" else 1) for case in cases)
    conditions = {
        "model": f"{options.model.name}, {options.slots} of {traces[0].shape[-1]} experts resident",
        "text": f"{pieces} held-out pieces; decode {tokens} tokens of each, prefill {length}",
        "decode_ms": f"copy {DECODE.copy}, expert {DECODE.expert}, rest of a layer {DECODE.other}",
        "prefill_ms": f"copy {PREFILL.copy}, expert {PREFILL.expert}, rest {PREFILL.other}",
    }
    rows = []
    with tqdm(total=calls, unit="call", leave=False, disable=None) as bar:
        for case in cases:
            bar.set_description(f"{case.phase}: {case.name}")
            rows.append(measure(case, traces, options.slots, tokens, bar))
    return {"conditions": conditions, "rows": rows}


# -- output

COLUMNS = {
    "phase": "{}", "case": "{}", "hit_rate": "{:.1%}", "misses_per_call": "{:.2f}",
    "stall_ms_per_call": "{:.1f}", "bound": "{}", "bound_ms_per_call": "{:.1f}", "ratio": "{:.3f}",
    "prefetch_issued": "{}", "prefetch_useful": "{}", "prefetch_late": "{}",
    "prefetch_wasted_mb": "{:.0f}", "wall_ms_per_call": "{:.1f}",
}  # fmt: skip


def report(content: dict) -> str:
    """Return the results as Markdown."""
    parts = [
        "# Copies of experts to the device",
        f"Measured on: {bench.facts(content['conditions'])} Written by "
        "`profiling/bench_offload.py`, which says what is done.",
    ]
    if found := content.get("loads"):
        rows = [
            {
                "expert, MB": str(row["expert_mb"]),
                "from": row["from"],
                "GB/s, median (p20 to p80)": bench.with_spread(row["gb_per_s"], 2),
                "over a plain copy": bench.with_spread(row["over_plain_copy"]),
            }
            for row in found["rows"]
        ]
        skipped = "; ".join(f"{name}: {why}" for name, why in found["skipped"].items())
        parts += [
            "## Loads",
            "Steps that miss all they need, through the offloader, against plain copies.",
            *([f"Not measured: {skipped}."] if skipped else []),
            bench.table(rows),
        ]
    if found := content.get("link"):
        rows = [
            {
                name.replace("_", " "): "-" if row[name] is None else form.format(row[name])
                for name, form in COLUMNS.items()
            }
            for row in found["rows"]
        ]
        parts += [
            "## Stalls over a simulated link",
            f"The same on every machine: {bench.facts(found['conditions'])}",
            bench.table(rows),
        ]
    return "\n\n".join(parts)


@torch.no_grad()
def main() -> None:
    """Measure the parts, print and write them; what is done is kept if the rest is cut short."""
    options, device, write = bench.arguments(
        __doc__,
        "offload",
        part={"choices": PARTS, "action": "append", "help": "only this part"},
        mb={"type": int, "nargs": "+", "help": "sizes of an expert, in MB"},
        model={"type": Path, "default": bench.ROOT / "examples" / "tiny_mixtral"},
        slots={"type": int, "default": 4, "help": "per layer of the model"},
        case={"help": "of the link, only cases whose name contains this"},
        max_seconds={"type": float, "default": 120, "help": "bound of the loads' timed rounds"},
    )
    sizes_mb = options.mb or SIZES_MB[device.type][: 1 if options.quick else None]
    parts = options.part or PARTS
    content = {"conditions": bench.conditions(device, quick=options.quick or None)}
    if "link" in parts:
        content["link"] = link(options)
        write(content, report(content))
    if "loads" in parts:
        for found in loads(device, sizes_mb, options.quick, options.max_seconds):
            content["loads"] = found
            write(content, report(content), [flat(row) for row in found["rows"]])
    print(f"\n{report(content)}")


if __name__ == "__main__":
    main()
