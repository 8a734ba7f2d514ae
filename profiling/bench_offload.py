"""How much of the copying does the offloader hide? Stalls against their lower bound.

Usage:
    python profiling/bench_offload.py            # about two minutes, any machine
    python profiling/bench_offload.py --quick    # a few seconds

The real offloader replays routing recorded from a trained model, against a simulated link: a copy
of n bytes takes n / bandwidth, one after another, on the pager's thread; compute is a wait of a
stated length. So the figures say how well copies are ordered and hidden, and nothing about how
fast any device is.

Lower bounds, computed for the very misses of each run and the compute times it really had:

    demand   no copy begins before its layer's router has spoken; then the link never rests, hits
             compute first, and each missing expert computes as soon as it and compute are free
    ahead    the same, but from the first router on the link never rests at all: what perfect
             prediction would leave

"ratio" is the measured stall over the bound that applies: demand, where nothing is fetched ahead,
and ahead for a prefill that streams.
"""

import argparse
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from moe_gpu import Exact, MassBudget, MoEGate, RouterState
from moe_gpu.offload import ExpertLayout, ExpertOffloader, ExpertStore

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "profiling" / "results"

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


COLUMNS = {
    "phase": "{}", "case": "{}", "hit_rate": "{:.1%}", "misses_per_call": "{:.2f}",
    "stall_ms_per_call": "{:.1f}", "bound": "{}", "bound_ms_per_call": "{:.1f}", "ratio": "{:.3f}",
    "prefetch_issued": "{}", "prefetch_useful": "{}", "prefetch_late": "{}",
    "prefetch_wasted_mb": "{:.0f}", "wall_ms_per_call": "{:.1f}",
}  # fmt: skip


def table(content: dict) -> str:
    """Return the results as Markdown."""
    lines = [list(COLUMNS), ["---"] * 2 + ["---:"] * (len(COLUMNS) - 2)]
    for row in content["rows"]:
        values = [(form, row[name]) for name, form in COLUMNS.items()]
        lines.append(["-" if value is None else form.format(value) for form, value in values])
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    facts = "; ".join(f"{key.replace('_', ' ')} {v}" for key, v in content["conditions"].items())
    return f"{__doc__.split('Usage:')[0].strip()}\n\n{body}\n\nConditions: {facts}.\n"


def main() -> None:
    """Run every case, print the table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "examples" / "tiny_mixtral")
    parser.add_argument("--slots", type=int, default=4, help="per layer")
    parser.add_argument("--quick", action="store_true", help="too short to believe")
    parser.add_argument("--case", help="only cases whose name contains this")
    parser.add_argument("--out", type=Path, default=RESULTS / "offload_link.json")
    args = parser.parse_args()

    rows, tokens, length = (1, 6, 128) if args.quick else (4, 32, 256)
    traces = record(args.model, rows, length)
    cases = [case for case in CASES if not args.case or args.case in case.name]
    calls = sum(rows * (tokens if case.phase == "decode" else 1) for case in cases)
    lines = []
    with tqdm(total=calls, unit="call") as bar:
        for case in cases:
            bar.set_description(f"{case.phase}: {case.name}")
            lines.append(measure(case, traces, args.slots, tokens, bar))
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"
    content = {
        "conditions": {
            "model": f"{args.model.name}, {args.slots} of {traces[0].shape[-1]} experts resident",
            "text": f"{rows} held-out pieces; decode {tokens} tokens of each, prefill {length}",
            "decode_ms": f"copy {DECODE.copy}, expert {DECODE.expert}, rest of a layer {DECODE.other}",
            "prefill_ms": f"copy {PREFILL.copy}, expert {PREFILL.expert}, rest {PREFILL.other}",
            "machine": f"{os.cpu_count()} cores, {platform.machine()}, shared",
            "torch": torch.__version__,
            "python": platform.python_version(),
            "commit": commit,
        },
        "rows": lines,
    }
    print(table(content))
    args.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    args.out.with_suffix(".md").write_text(table(content), encoding="utf-8")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
