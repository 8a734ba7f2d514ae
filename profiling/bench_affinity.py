"""What it takes to age the affinity by a call's choices: within the route kernel, and in PyTorch.

Usage:
    python profiling/bench_affinity.py                # CUDA where there is one
    python profiling/bench_affinity.py --device cpu   # the reference instead of the kernel

Affinity ages once a token, in token order: ``a = min(a * decay + boost * chosen, max_score)``.

* *in the kernel*: what the route kernel takes with this stage, less what routing alone takes
  (``_route_only``); the scratch through which its tiles tell each other is part of it.
* *token by token*: ``mul_``, ``index_add_`` and ``clamp_`` for every token.
* *closed form*: one ``index_add_`` of ``boost * decay ** age``, one clamp. Another result where the
  clamp binds within a call; the table says by how much.

Where all tokens choose the same experts, all additions meet at K addresses. Ours and the loop must
equal the reference bit for bit; the closed form where nothing is clamped. What is wrong is not
timed.
"""

import itertools
import time

import torch
from tqdm import tqdm

import _bench as bench
import _route_cases as cases
from _route_cases import Point
from moe_gpu.kernels.route import route_path
from moe_gpu.kernels.route_ref import Aging, Rule, age_affinity_ref, aging_of

TOKENS = (1, 16, 64, 256, 1024, 4096, 16384)
ROUTERS = ((8, 2), (128, 8))
BASE_DECAY = 0.99
DECAYS = (0.9, 1.0)  # besides
DECAYS_AT = (64, 4096)
CHOICES = ("spread", "same")
LOOP_TOKENS = 64  # three launches a token are too many beyond
SAFE = 1e3  # a clamp that does not bind
CPU_CELLS = 2**16
KERNEL, REFERENCE = "in the kernel", "reference"
LOOP, CLOSED = "token by token", "closed form"


def looped(affinity_E, ids_TK, boost_K, decay: float, max_score: float) -> torch.Tensor:
    """Age in place, token by token, as the rule says."""
    for ids_K in ids_TK:
        affinity_E.mul_(decay).index_add_(0, ids_K, boost_K).clamp_(max=max_score)
    return affinity_E


def closed_form(affinity_E, ids_TK, faded_N, decay: float, max_score: float) -> torch.Tensor:
    """Age in place by all tokens at once; ``faded_N`` is ``boost * decay ** age`` of each pair."""
    affinity_E.mul_(decay ** len(ids_TK)).index_add_(0, ids_TK.flatten(), faded_N)
    return affinity_E.clamp_(max=max_score)


def make_inputs(point: Point, choices: str, device: torch.device) -> list[torch.Tensor]:
    """Return logits whose choices spread, or are the same for all tokens."""
    inputs = cases.make_logits(point, device)
    if choices == "same":
        inputs = [logits_TE[:1].expand_as(logits_TE).contiguous() for logits_TE in inputs]
    return inputs


def aged(gate, ids_TK: torch.Tensor, max_score: float, one_by_one: bool = False) -> torch.Tensor:
    """Return what the definition makes of an affinity of zeros."""
    chosen_TE = torch.zeros(len(ids_TK), gate.num_experts, dtype=torch.bool)
    chosen_TE.scatter_(1, ids_TK.cpu(), True)
    zeros_E = torch.zeros(gate.num_experts)
    one_by_one = one_by_one or len(ids_TK) == 1
    aging = Aging.STEPS if one_by_one else aging_of(gate.decay, gate.boost, max_score)
    return age_affinity_ref(zeros_E, chosen_TE, gate.decay, gate.boost, max_score, aging)


def chains(gate, ids_TK: torch.Tensor, point: Point) -> tuple[dict, float]:
    """Return PyTorch's alternatives, checked, and how far the closed form is off with the clamp."""
    device, (T, K) = ids_TK.device, ids_TK.shape
    boost_K = torch.full((K,), gate.boost, device=device)
    age_T = torch.arange(T - 1, -1, -1, device=device)
    faded_N = (gate.boost * gate.decay**age_T).repeat_interleave(K)
    found = {CLOSED: lambda a, top: closed_form(a, ids_TK, faded_N, gate.decay, top)}
    if T <= LOOP_TOKENS:
        found[LOOP] = lambda a, top: looped(a, ids_TK, boost_K, gate.decay, top)
    zeros_E = torch.zeros(point.E, device=device)
    for name, age in found.items():
        top = gate.max_score if name == LOOP else SAFE * T
        got, want = age(zeros_E.clone(), top).cpu(), aged(gate, ids_TK, top, name == LOOP)
        exact, close = torch.equal(got, want), torch.allclose(got, want, rtol=1e-3, atol=1e-4)
        right = exact if name == LOOP else close
        cases.refuse_if(None if right else "another affinity", name, point)
    off = closed_form(zeros_E.clone(), ids_TK, faded_N, gate.decay, gate.max_score).cpu()
    error = (off - aged(gate, ids_TK, gate.max_score)).abs().max().item()
    affinity_E = torch.zeros(point.E, device=device)
    calls = {name: [lambda age=age: age(affinity_E, gate.max_score)] for name, age in found.items()}
    return calls, error


def own(gate, inputs: list[torch.Tensor], point: Point, device: torch.device) -> dict:
    """Return ours, checked bit for bit: the kernel with this stage and without, or the reference."""
    calls = {"whole": lambda: gate.route(inputs[0])}
    if on_kernel := route_path(device) == "triton":
        import _route_only as kernels
        from moe_gpu.kernels.launch import tile_of

        calls["with affinity"] = kernels.routed_until("affinity", calls["whole"])
    for name, call in calls.items():
        gate.state.reset()
        ids_TK = call().ids
        right = torch.equal(gate.affinity.cpu(), aged(gate, ids_TK, gate.max_score))
        cases.refuse_if(None if right else "another affinity", f"moe-gpu, {name},", point)
    if not on_kernel:
        return {REFERENCE: [lambda: aged(gate, ids_TK, gate.max_score)]}
    tile = tile_of(point.T, point.E, point.K)
    routes = [lambda x=x: gate.route(x) for x in inputs]
    return {
        "routing": [lambda x=x: kernels.route_only(x, point.K, tile) for x in inputs],
        "with affinity": [kernels.routed_until("affinity", route) for route in routes],
    }


def measure(point: Point, decay: float, choices: str, device: torch.device, quick: bool) -> list:
    """Return one row per alternative at one point."""
    gate = cases.make_gate(point, device, decay=decay)
    gate.state.reserve(point.T, decay)
    inputs = make_inputs(point, choices, device)
    ids_TK = cases.reference(inputs[0], gate, Rule.EXACT).ids.to(device)
    calls, error = chains(gate, ids_TK, point)
    calls |= own(gate, inputs, point, device)
    replays = {name: bench.Replay(each, device) for name, each in calls.items()}
    # on a GPU a round is a few milliseconds
    rounds, seconds = (3, 0.05) if quick else (30, 0.3 if device.type == "cuda" else 1.0)
    taken = bench.interleave(replays, rounds, max_seconds=seconds, label=str(point))
    if "routing" in taken:
        without = taken.pop("routing")
        paired = zip(taken.pop("with affinity"), without, strict=True)
        taken[KERNEL] = [whole - part for whole, part in paired]
    about = {"T": point.T, "E": point.E, "K": point.K, "decay": decay, "choices": choices}
    clock = "graph replay" if device.type == "cuda" else "wall"
    return [
        about | {"what": name, "clock": clock, "unit": "us", "samples": len(each)}
        | bench.percentiles(each, 1e6) | ({"clamped_once_is_off_by": error} if name == CLOSED else {})
        for name, each in taken.items()
    ]  # fmt: skip


def grid(quick: bool) -> list[tuple[Point, float, str]]:
    """Return points, decays and choices: one factor at a time around decay 0.99, spread."""
    tokens, routers = ((1, 64), ROUTERS[:1]) if quick else (TOKENS, ROUTERS)
    sizes = [Point(T, *r, policy="off") for T, r in itertools.product(tokens, routers)]
    found = [(point, BASE_DECAY, choices) for point in sizes for choices in CHOICES]
    found += [
        (point, decay, "spread") for point in sizes if point.T in DECAYS_AT for decay in DECAYS
    ]
    return found


def lines_of(rows: list[dict]) -> list[dict]:
    """Return the table: one line per point, one column per alternative."""
    lines: dict[tuple, dict] = {}
    for row in rows:
        about = {key: row[key] for key in ("T", "E", "K", "decay", "choices")}
        line = lines.setdefault(tuple(about.values()), about)
        line[f"{row['what']}, us"] = bench.with_spread({"median": row["p50"]} | row, 2)
        if "clamped_once_is_off_by" in row:
            line["closed form is off by"] = row["clamped_once_is_off_by"]
    return list(lines.values())


@torch.no_grad()
def main() -> None:
    """Measure, print and write."""
    options, device, write = bench.arguments(
        __doc__, "affinity",
        max_seconds={"type": float, "default": 60.0, "help": "begin no measurement after this"},
    )  # fmt: skip
    if device.type == "cpu":
        torch.set_num_threads(1)
    about = bench.conditions(
        device, boost=1.0, max_score=1.0, loop_up_to_tokens=LOOP_TOKENS, quick=options.quick
    )
    rows, not_measured, failed, start_s = [], [], [], time.perf_counter()
    for point, decay, choices in tqdm(grid(options.quick), desc="points", disable=None):
        name = f"{point}, decay {decay}, {choices}"
        if device.type == "cpu" and point.T * point.E > CPU_CELLS:
            not_measured.append(f"{name}: too large for the reference")
        elif time.perf_counter() - start_s > options.max_seconds:
            not_measured.append(f"{name}: out of time")
        else:
            try:
                rows += measure(point, decay, choices, device, options.quick)
            except SystemExit as refusal:  # what is right elsewhere is not lost with it
                print(refusal)
                failed.append(str(refusal))
    if device.type == "cpu":
        not_measured.append("in the kernel: CUDA only")
    parts = [f"# Affinity\n\nMeasured on: {bench.facts(about)}", bench.table(lines_of(rows))]
    for head, lines in (("Not measured", not_measured), ("Failed", failed)):
        if lines:
            parts.append(f"{head}:\n\n" + "\n".join(f"- {line}" for line in lines))
    text = "\n\n".join(parts)
    print(f"\n{text}")
    content = {"conditions": about, "rows": rows, "not_measured": not_measured, "failed": failed}
    write(content, text, rows)
    if failed:
        raise SystemExit(f"{len(failed)} measurements failed: {failed[0]}")


if __name__ == "__main__":
    main()
