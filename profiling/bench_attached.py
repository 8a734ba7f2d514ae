"""What attaching costs where nothing is to be gained: every expert resident, or tensors tiny.

Usage:
    python profiling/bench_attached.py                # CUDA where there is one
    python profiling/bench_attached.py --device cpu   # some minutes
    python profiling/bench_attached.py --device cpu --quick

Three parts, each paired with the stock model in one run:

1. *Throughput*: decode of a model of Mixtral's layer sizes (scaled down on the CPU) with all
   experts resident, over the stock model with each of transformers' experts implementations,
   and over what ``generate`` picks by itself.
2. *Overhead*: a step of one token with tensors so small that only Python, dispatch and launches
   take time, attached minus stock, per layer.
3. *Profile*: which of our functions that time goes to, by cProfile, which inflates it.

On the CPU the route call is the PyTorch reference, dozens of operators that are one kernel launch
on a GPU. Its time is measured by itself and shown apart.
"""

import contextlib
import copy
import cProfile
import itertools
import pstats
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch

import _bench as bench
import moe_gpu
from moe_gpu import Exact, QualityBudget
from moe_gpu.kernels import route as route_module

POLICIES = {"Exact()": Exact(), "default": QualityBudget(0.05)}
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")  # of transformers
MIXTRAL = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
    "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2,
    "num_hidden_layers": 2, "vocab_size": 32000,
}  # fmt: skip
EIGHTH = MIXTRAL | {
    "hidden_size": 512, "intermediate_size": 1792, "num_attention_heads": 4,
    "num_key_value_heads": 1, "vocab_size": 4000,
}  # fmt: skip
TINY = {
    "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1,
    "num_hidden_layers": 4, "vocab_size": 512, "initializer_range": 0.3,
}  # fmt: skip
LAYERS = TINY["num_hidden_layers"]
ROUTERS = ((8, 2), (64, 6), (128, 8))  # E, K
PROMPT = 8  # tokens
LIBRARY, KERNELS = Path(moe_gpu.__file__).parent, Path(route_module.__file__).parent


# -- 1. throughput


class Decoder:
    """Decodes a given text token by token; every model does the same work.

    Args:
        model: Attached or not.
        text_T: Prompt and continuation.
        device: Of the model.
    """

    def __init__(self, model, text_T: torch.Tensor, device: torch.device):
        self.model, self.device = model, device
        self.prompt = text_T[:PROMPT].view(1, -1).to(device)
        self.tokens = [token.view(1, 1) for token in text_T[PROMPT:].to(device)]

    def logits(self) -> torch.Tensor:
        """Return the logits of every decoded token, ``(T, V)``."""
        past = self._prefill()
        out = [self.model(t, past_key_values=past, use_cache=True).logits[0] for t in self.tokens]
        return torch.cat(out)

    def time_s(self) -> float:
        """Return the seconds that decoding takes, after an untimed prefill."""
        past = self._prefill()

        def decode():
            for token in self.tokens:
                self.model(token, past_key_values=past, use_cache=True)

        return bench.elapsed_s(decode, self.device)

    def generate(self) -> torch.Tensor:
        """Return what ``generate`` writes after the prompt, of the same length."""
        return self.model.generate(
            self.prompt, attention_mask=torch.ones_like(self.prompt),
            max_new_tokens=len(self.tokens), do_sample=False, pad_token_id=0,
        )  # fmt: skip

    def _prefill(self):
        return self.model(self.prompt, use_cache=True).past_key_values


def throughput(device: torch.device, quick: bool, max_seconds: float) -> dict:
    """Time decode of a resident attached model and of the stock one."""
    sizes, scale = EIGHTH, "An eighth of the widths of Mixtral-8x7B"
    if device.type == "cuda":
        sizes, scale = MIXTRAL, "Layers of Mixtral-8x7B"
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tokens, rounds = (4, 2) if quick else (32, 15)
    if quick:
        sizes, scale = EIGHTH | {"hidden_size": 256, "intermediate_size": 512}, "A smoke test"
    stock = bench.random_mixtral(device, dtype, **sizes)
    picked = stock.config._experts_implementation
    attached = copy.deepcopy(stock)
    text_T = torch.randint(sizes["vocab_size"], (PROMPT + tokens,))
    plain, ours = Decoder(stock, text_T, device), Decoder(attached, text_T, device)

    def with_stock(implementation, run):
        stock.set_experts_implementation(implementation)
        return run()

    want_TV = with_stock("eager", plain.logits)
    with moe_gpu.attach(attached, resident=1.0) as moe:

        def with_policy(policy, run):
            moe.set_policy(policy)
            return run()

        runs = {f"stock, {name}": (with_stock, name, plain) for name in IMPLEMENTATIONS}
        runs |= {f"attached, {name}": (with_policy, p, ours) for name, p in POLICIES.items()}
        for name, (select, choice, decoder) in runs.items():
            bench.check_same(name, select(choice, decoder.logits), want_TV)
        alternatives = {
            name: lambda s=select, c=choice, d=decoder: s(c, d.time_s)
            for name, (select, choice, decoder) in runs.items()
        }
        generating = {
            "stock": (with_stock, picked, plain),
            "attached, default": (with_policy, POLICIES["default"], ours),
        }
        for name, (select, choice, decoder) in generating.items():
            alternatives[f"generate(), {name}"] = lambda s=select, c=choice, d=decoder: s(
                c, lambda d=d: bench.elapsed_s(d.generate, device)
            )
        seconds = bench.interleave(
            alternatives, rounds, max_seconds=max_seconds, label="throughput"
        )
        path = moe.metrics().route_path

    def over(name, stock_name):
        return bench.ratio(seconds[stock_name], seconds[name])

    stocks = [f"stock, {name}" for name in IMPLEMENTATIONS]
    ratios = {
        f"attached, {name}": {stock: over(f"attached, {name}", stock) for stock in stocks}
        for name in POLICIES
    }
    ratios["generate(), attached, default"] = {
        "generate(), stock": over("generate(), attached, default", "generate(), stock")
    }
    return {
        "model": sizes,
        "scale": scale,
        "dtype": str(dtype).removeprefix("torch."),
        "decoded_tokens": tokens,
        "prompt_tokens": PROMPT,
        "rounds": len(seconds[stocks[0]]),
        "route_path": path,
        "generate_picks": picked if device.type == "cpu" else f"{picked}, batched_mm for decode",
        "tokens_per_s": {
            name: bench.spread(tokens / s for s in times) for name, times in seconds.items()
        },
        "attached_over_stock": ratios,
    }


# -- 2. overhead


def clock_of(device: torch.device) -> Callable[[], float]:
    """Return the clock for Python time: on the CPU, where no device is waited for, CPU time.

    What else the machine does hardly counts then.
    """
    return time.perf_counter if device.type == "cuda" else time.thread_time


class Inside:
    """Sums up the time in route calls, and in the offloader between them, while it is in place.

    Args:
        handle: Of the attached model.
        clock: In seconds.
    """

    def __init__(self, handle, clock: Callable[[], float]):
        self.route_s = self.step_s = 0.0
        self._offloader, self._clock = handle.offloader, clock
        self._route, self._step = route_module._route, handle.offloader.step

    def __enter__(self):
        route_module._route, self._offloader.step = self._timed_route, self._timed_step
        return self

    def __exit__(self, *exc_info):
        route_module._route = self._route
        del self._offloader.step

    def _timed_route(self, *args):
        start_s = self._clock()
        self._route(*args)
        self.route_s += self._clock() - start_s

    def _timed_step(self, *args, **kwargs):
        start_s = self._clock()
        for turn in self._step(*args, **kwargs):
            self.step_s += self._clock() - start_s
            yield turn  # the experts compute meanwhile
            start_s = self._clock()
        self.step_s += self._clock() - start_s


class Steps:
    """Steps of one token each, without a KV cache, so that all steps are alike.

    Args:
        model: Attached or not.
        device: Of the model.
        count: Steps of one round; the next round goes on with other tokens.
    """

    def __init__(self, model, device: torch.device, count: int):
        self.model, self.device, self.count = model, device, count
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(TINY["vocab_size"], (512, 1, 1), generator=generator)
        self.tokens = itertools.cycle(tokens.to(device))

    def run(self) -> list[torch.Tensor]:
        """Take the steps of a round; return the logits of each."""
        tokens = itertools.islice(self.tokens, self.count)
        return [self.model(token, use_cache=False).logits[0] for token in tokens]

    def time_s(self) -> float:
        """Return the seconds of one step in one layer."""
        took_s = bench.elapsed_s(self.run, self.device, clock_of(self.device))
        return took_s / self.count / LAYERS


@contextlib.contextmanager
def tiny_pair(device: torch.device, E: int, K: int, resident: float, policy, steps: int):
    """Make a stock model and an attached copy of it; yield their steps and the handle."""
    sizes = TINY | {"num_local_experts": E, "num_experts_per_tok": K}
    model = bench.random_mixtral(device, torch.float32, **sizes)
    stock, ours = Steps(copy.deepcopy(model), device, steps), Steps(model, device, steps)
    want_TV = torch.cat(stock.run())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a second one would find nothing to do, and spin
    try:
        with moe_gpu.attach(model, resident=resident, pool=False, policy=policy) as moe:
            bench.check_same(f"attached, {E} top-{K}", torch.cat(ours.run()), want_TV)
            yield stock, ours, moe
    finally:
        torch.set_num_threads(threads)


def offloader_alone_s(moe, K: int, device: torch.device, count: int) -> list[float]:
    """Return the seconds of offloader steps that nothing is computed in, of random routing."""
    took_s = []
    for i in range(count):
        layer = i % LAYERS
        moe.gates[layer].route(torch.randn(1, moe.state.num_experts, device=device))

        def step(layer=layer):
            moe.offloader.before_route(layer)
            for _ in moe.offloader.step(layer, K):
                pass

        took_s.append(bench.elapsed_s(step, device, clock_of(device)))
    return took_s[count // 4 :]  # the cache is as it stays by then


def overhead(device: torch.device, quick: bool, max_seconds: float) -> list[dict]:
    """Time what attaching adds to a step of one layer, in as many cases as there is time for."""
    steps, rounds = (2, 3) if quick else (2, 250)
    start_s = time.perf_counter()
    routers = ROUTERS[:1] if quick else ROUTERS
    # where all is resident no policy swaps; half resident, only Exact() has a result to check
    cases = [(1.0, "Exact()"), (1.0, "default"), (0.5, "Exact()")]
    rows = []
    alone = 40 if quick else 4000  # steps
    if device.type == "cuda" and not quick:
        alone = 400
    for (E, K), (resident, policy) in itertools.product(routers, cases):
        left_s = max_seconds - (time.perf_counter() - start_s)
        if left_s < 0:
            break
        with tiny_pair(device, E, K, resident, POLICIES[policy], steps) as (stock, ours, moe):
            inside: list[tuple[float, float]] = []

            def attached(ours=ours, moe=moe, inside=inside):
                with Inside(moe, clock_of(device)) as parts:
                    took_s = ours.time_s()
                calls = steps * LAYERS
                inside.append((parts.route_s / calls, parts.step_s / calls))
                return took_s

            moe.reset_metrics()
            seconds = bench.interleave(
                {"stock": stock.time_s, "attached": attached}, rounds,
                max_seconds=max_seconds / len(cases) / len(routers), label=f"{E} top-{K}",
            )  # fmt: skip
            loads = moe.metrics().loads / (len(inside) * steps * LAYERS)
            moe.reset_metrics()
            alone_s = offloader_alone_s(moe, K, device, alone)
            alone_loads = moe.metrics().loads / alone
        took_s = seconds["attached"]
        routes_s, steps_s = zip(*inside[1:], strict=True)  # the first was the warm-up
        host_s = [took - route for took, route in zip(took_s, routes_s, strict=True)]
        rows.append(
            {
                "experts": E,
                "top_k": K,
                "resident": resident,
                "policy": policy,
                "rounds": len(took_s),
                "steps_per_round": steps,
                "loads_per_layer_and_step": loads,
                "stock_us": bench.spread(seconds["stock"], 1e6),
                "attached_us": bench.spread(took_s, 1e6),
                "added_us": bench.difference(took_s, seconds["stock"], 1e6),
                "route_us": bench.spread(routes_s, 1e6),
                "offloader_us": bench.spread(steps_s, 1e6),
                "offloader_alone_us": bench.spread(alone_s, 1e6),
                "offloader_alone_loads": alone_loads,
                "added_without_route_us": bench.difference(host_s, seconds["stock"], 1e6),
            }
        )
    return rows


# -- 3. profile


def profile(device: torch.device, quick: bool, max_seconds: float) -> list[dict]:
    """Say which of our functions the Python time goes to, in as many cases as there is time for."""
    steps = 4 if quick else 100
    start_s = time.perf_counter()
    routers = ROUTERS[:1] if quick else (ROUTERS[0], ROUTERS[-1])
    cases = []
    for (E, K), resident in itertools.product(routers, (1.0, 0.5)):
        if time.perf_counter() - start_s > max_seconds:
            break
        with tiny_pair(device, E, K, resident, Exact(), steps) as (_, ours, _):
            ours.run()
            profiler = cProfile.Profile()
            profiler.runcall(ours.run)
        rows = by_function(pstats.Stats(profiler), steps * LAYERS)
        cases.append({"experts": E, "top_k": K, "resident": resident, "functions": rows})
    return cases


def by_function(stats: pstats.Stats, calls: int) -> list[dict]:
    """Return the time of each of our functions and of the library calls it makes itself.

    The route call counts as one function, with all that it calls.

    Args:
        stats: Of the profile.
        calls: Steps times layers in it.
    """
    own_s, count, inside = defaultdict(float), defaultdict(int), defaultdict(dict)
    for function, (_, number, own, _, callers) in stats.stats.items():
        name = our_name(function)
        if name:
            own_s[name] += own
            count[name] += number
            continue
        for caller, (_, number, _, cumulative) in callers.items():
            if (user := our_name(caller)) is not None:
                own_s[user] += cumulative
                if user != ROUTE_CALL:
                    inside[user][plain_name(function)] = (number, cumulative)
    rows = []
    for name in sorted(own_s, key=own_s.get, reverse=True):
        us = own_s[name] / calls * 1e6
        if us < 0.05:
            continue
        largest = sorted(inside[name].items(), key=lambda item: -item[1][1])[:8]
        rows.append(
            {
                "function": name,
                "calls": count[name] / calls if name != ROUTE_CALL else 1.0,
                "us": us,
                "library_calls": [
                    {"name": callee, "calls": number / calls, "us": spent_s / calls * 1e6}
                    for callee, (number, spent_s) in largest
                ],
            }
        )
    return rows


ROUTE_CALL = "route call (the reference on a CPU, one launch on a GPU)"
REFERENCE = ("route_ref.py", "layout.py")


def our_name(function: tuple[str, int, str]) -> str | None:
    """Return how a function of this library is called in the table; None for any other."""
    path = Path(function[0])
    in_route = path.name in REFERENCE or function[2] in ("_route", "__init__")
    if path.parent == KERNELS and in_route:
        return ROUTE_CALL
    if path.is_relative_to(LIBRARY) or path.parent == KERNELS:
        return f"{path.stem}.{function[2]}"
    return None


def plain_name(function: tuple[str, int, str]) -> str:
    """Return a short name of a library function."""
    path, _, name = function
    if path == "~":  # built in
        return name.removeprefix("<").removesuffix(">").removeprefix("built-in method ")
    return f"{Path(path).stem}.{name}"


# -- output


def report(content: dict) -> str:
    """Return the results as Markdown."""
    fast, overheads = content["throughput"], content["overhead"]
    speeds = [
        {"decode": name, "tokens/s, median (p20 to p80)": bench.with_spread(figures, 1)}
        for name, figures in fast["tokens_per_s"].items()
    ]
    ratios = [
        {"": name, "over": stock, "ratio, median (p20 to p80)": bench.with_spread(figures)}
        for name, stocks in fast["attached_over_stock"].items()
        for stock, figures in stocks.items()
    ]
    added = [
        {
            "E, K": f"{row['experts']}, {row['top_k']}",
            "resident": f"{row['resident']:.0%}",
            "policy": row["policy"],
            "loads": f"{row['loads_per_layer_and_step']:.2f}",
            "stock": bench.with_spread(row["stock_us"], 0),
            "added": bench.with_spread(row["added_us"], 0),
            "of it the route call": bench.with_spread(row["route_us"], 0),
            "the offloader's step": bench.with_spread(row["offloader_us"], 0),
            "such a step alone (loads)": f"{bench.with_spread(row['offloader_alone_us'], 0)} "
            f"({row['offloader_alone_loads']:.2f})",
            "added without the route call": bench.with_spread(row["added_without_route_us"], 0),
        }
        for row in overheads
    ]
    parts = [
        "# What attaching costs",
        f"Measured on: {bench.facts(content['conditions'])} Written by "
        "`profiling/bench_attached.py`, which says what is done.",
        "## Decode with every expert resident",
        f"{fast['scale']}: {fast['model']}, {fast['dtype']}, random weights, batch 1, "
        f"{fast['decoded_tokens']} tokens after a prompt of {fast['prompt_tokens']}, "
        f"{fast['rounds']} rounds in turn; `generate()` includes the prompt. What it picks by "
        f"itself for the stock model: {fast['generate_picks']}.",
        bench.table(speeds),
        bench.table(ratios),
        "## Added per layer and step, microseconds",
        f"One token, {content['tiny']}, float32, one thread; medians (p20 to p80) of paired rounds by "
        f"{content['clock']}. Stock is transformers' default implementation, grouped_mm; the "
        "offloader's step is what it does from the read of the record on (on a GPU its wait for "
        "the record included), without the experts' products; alone: of random routing, and "
        "nothing computes in between.",
        bench.table(added),
        "## Where it goes",
        "cProfile, Exact(), microseconds per layer and step, inflated by the profiler: a "
        "function's own time with the library calls that it makes itself, the largest of "
        "which are named.",
    ]
    for case in content["profile"]:
        parts.append(
            f"{case['experts']} experts, top-{case['top_k']}, {case['resident']:.0%} resident"
        )
        rows = [
            {
                "function": row["function"],
                "calls": f"{row['calls']:.1f}",
                "us": f"{row['us']:.1f}",
                "of it": ", ".join(
                    f"{part['name']} {part['us']:.1f}" for part in row["library_calls"][:3]
                ),
            }
            for row in case["functions"][:20]
        ]
        parts.append(bench.table(rows))
    return "\n\n".join(parts)


@torch.no_grad()
def main() -> None:
    """Measure the three parts, print and write them."""
    options, device, write = bench.arguments(
        __doc__, "attached",
        max_seconds={"type": float, "default": 1e9, "help": "cases that begin later are left out"},
    )  # fmt: skip
    left_s = options.max_seconds
    content = {
        "conditions": bench.conditions(device, quick=options.quick or None),
        "clock": "wall time" if device.type == "cuda" else "CPU time of the thread",
        "tiny": ", ".join(f"{key} {value}" for key, value in TINY.items()),
        "throughput": throughput(device, options.quick, 0.3 * left_s),
        "overhead": [], "profile": [],
    }  # fmt: skip
    try:
        content["overhead"] = overhead(device, options.quick, 0.5 * left_s)
        content["profile"] = profile(device, options.quick, 0.2 * left_s)
    except KeyboardInterrupt:  # asked to end: with what there is
        print("interrupted")
    text = report(content)
    print(text)
    write(content, text)


if __name__ == "__main__":
    main()
