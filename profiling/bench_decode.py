"""What decoding costs with half of the experts resident, and what it is worth that copies wait.

Usage:
    python profiling/bench_decode.py                  # CUDA where there is one
    python profiling/bench_decode.py --device cpu     # the same code; says little about a GPU
    python profiling/bench_decode.py --device cpu --quick

A model of Mixtral's layer sizes (scaled down on the CPU) decodes a given text, token by token. All
of it in one run, in turn:

* the stock model with everything resident, and the same attached with everything resident: called
  eagerly, and on CUDA replayed from a CUDA graph of one step over a static cache;
* attached with half of the experts resident, under ``Exact()`` and the default policy;
* the same offloader with synchronous copies on the compute stream;
* transformers' ``device_map`` CPU offload of half the layers' experts, which moves whole layers.
  Where it cannot be had, hooks that do what its hooks do stand in for it, under a name of their
  own.

On the CPU a simulated link carries every byte. Every logit is checked before anything is timed.
"""

import contextlib
import copy
import importlib.util
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from transformers import StaticCache

import _bench as bench
import moe_gpu
from bench_attached import MIXTRAL, POLICIES, PROMPT, Decoder
from moe_gpu import Exact
from moe_gpu.offload import offloader
from moe_gpu.offload.transfer import SimulatedLink, Transfer

SMALL = MIXTRAL | {
    "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4,
    "num_key_value_heads": 1, "vocab_size": 1000,
}  # fmt: skip
LAYERS = 4
FEW = 4  # tokens for who moves whole layers: on a GPU each takes half a second
OURS = "moe-gpu, half resident, Exact()"
SWAPPING = "moe-gpu, half resident, default"  # not the model's own routing


# -- who decodes


@dataclass(frozen=True)
class Counts:
    """What has been done so far, as far as it is counted."""

    moved_bytes: int = 0
    hits: int = 0
    pairs: int = 0


class Counted(Decoder):
    """A decoder that knows what had been counted when its prompt was done."""

    count: Callable[[], Counts] = staticmethod(Counts)
    at_prompt = Counts()

    def _prefill(self):
        past = super()._prefill()
        self.at_prompt = self.count()
        return past


class Captured(Counted):
    """Replays a CUDA graph of one step over a static cache."""

    def __init__(self, model, text_T: torch.Tensor, device: torch.device):
        super().__init__(model, text_T, device)
        self._cache = StaticCache(config=model.config, max_cache_len=len(text_T))
        self._token = self.tokens[0].clone()
        self._prefill()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._step()  # compiles kernels, allocates
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits = self._step()

    def _step(self) -> torch.Tensor:
        return self.model(self._token, past_key_values=self._cache, use_cache=True).logits

    def _prefill(self):
        self._cache.reset()  # in place: the graph keeps its addresses
        self.model(self.prompt, past_key_values=self._cache, use_cache=True)
        self.at_prompt = self.count()

    def _replay(self, token: torch.Tensor) -> None:
        self._token.copy_(token)
        self._graph.replay()

    def logits(self) -> torch.Tensor:
        """Return the logits of every decoded token, ``(T, V)``."""
        self._prefill()
        rows = []
        for token in self.tokens:
            self._replay(token)
            rows.append(self._logits[0].clone())
        return torch.cat(rows)

    def time_s(self) -> float:
        """Return the seconds that decoding takes, after an untimed prefill."""
        self._prefill()
        return bench.elapsed_s(lambda: [self._replay(token) for token in self.tokens], self.device)


@dataclass
class Alternative:
    """One line of the table.

    Attributes:
        decoder: Does the work.
        prepare: Called before each round.
        like: Name of the alternative whose logits it must have; None: the stock model's.
        may_fail: Without it, the rest is worth measuring.
        found: By round, bytes moved per token and the hit rate.
    """

    decoder: Counted
    prepare: Callable[[], object] = lambda: None
    like: str | None = None
    may_fail: bool = False
    found: list[tuple[float, float | None]] = field(default_factory=list)

    def logits(self) -> torch.Tensor:
        """Return the logits of every decoded token."""
        self.prepare()
        return self.decoder.logits()

    def token_s(self) -> float:
        """Take a round; return the seconds per token."""
        self.prepare()
        tokens = len(self.decoder.tokens)
        took_s = self.decoder.time_s() / tokens
        before, after = self.decoder.at_prompt, self.decoder.count()
        pairs = after.pairs - before.pairs
        hit_rate = (after.hits - before.hits) / pairs if pairs else None
        self.found.append(((after.moved_bytes - before.moved_bytes) / tokens, hit_rate))
        return took_s


def attached(moe, decoder: Counted, policy) -> Alternative:
    """Return an attached model under a policy as an alternative."""

    def count() -> Counts:
        now = moe.metrics()
        return Counts(now.bytes_loaded, now.hits, now.pairs)

    decoder.count = count
    return Alternative(decoder, lambda: moe.set_policy(policy))


# -- peers


class SynchronousCopies(Transfer):
    """Copies on the compute stream of a CUDA device, each waited for before anything goes on."""

    def piece(self, copy, start, stop):
        """Copy and wait; see :meth:`Transfer.piece`."""
        super().piece(copy, start, stop)
        torch.cuda.current_stream(self.device).synchronize()


class SynchronousLink(SimulatedLink):
    """A simulated link that compute waits for at once."""

    def runs_inline(self, copy):
        """Whether to copy on the thread that computes: always."""
        return True


@contextlib.contextmanager
def synchronous_copies() -> Iterator[None]:
    """Make offloaders that are built meanwhile copy synchronously."""

    def make(store, slot_of_LE, groups, *, link_gbps=None, **options):
        if link_gbps is None:
            return SynchronousCopies(store, slot_of_LE, groups, **options)
        return SynchronousLink(store, slot_of_LE, groups, link_gbps=link_gbps, **options)

    own, offloader.make_transfer = offloader.make_transfer, make
    try:
        yield
    finally:
        offloader.make_transfer = own


class WholeLayers:
    """Does to the experts of every other layer what accelerate's hooks do to offloaded modules.

    Before a module runs, all its parameters are copied to the device; after it they are dropped.
    The copies at home are pageable, as accelerate's are.

    Args:
        model: Its weights move.
        device: Where it computes.
        link_gbps: On the CPU, pretend that such a link carries the bytes.
    """

    def __init__(self, model, device: torch.device, link_gbps: float | None):
        self.device, self.link_gbps, self.moved = device, link_gbps, 0
        for experts in offloaded_experts(model).values():
            homes = {name: p.detach().cpu() for name, p in experts.named_parameters()}
            self._drop(experts)
            experts.register_forward_pre_hook(lambda module, _, h=homes: self._fetch(module, h))
            experts.register_forward_hook(lambda module, *_: self._drop(module))

    def _fetch(self, module, homes):
        start_s = time.perf_counter()
        for name, home in homes.items():
            # a copy also where both are the host
            module._parameters[name].data = torch.empty_like(home, device=self.device).copy_(home)
            self.moved += home.nbytes
        if self.link_gbps is not None:
            due_s = sum(home.nbytes for home in homes.values()) / self.link_gbps * 1e-9
            time.sleep(max(0.0, due_s - (time.perf_counter() - start_s)))

    def _drop(self, module):
        for parameter in module.parameters():
            parameter.data = parameter.data.new_empty(0)


def offloaded_experts(model) -> dict[str, torch.nn.Module]:
    """Return the experts of every other layer by name: half of all experts."""
    return {
        f"model.layers.{i}.mlp.experts": layer.mlp.experts
        for i, layer in enumerate(model.model.layers)
        if i % 2
    }


def dispatch(model, device: torch.device) -> None:
    """Do what ``from_pretrained(..., device_map=...)`` does, half of the experts on the CPU.

    The last step of it, on a model that is there already: writing and reading a checkpoint of this
    size would take longer than the measurement.
    """
    from accelerate import dispatch_model

    homes = offloaded_experts(model)
    for experts in homes.values():
        experts.to("cpu")
    main = torch.cuda.current_device() if device.type == "cuda" else "cpu"
    device_map = {
        name: "cpu" if name in homes else main
        for name, module in model.named_modules()
        if any(True for _ in itertools.chain(module.parameters(False), module.buffers(False)))
    }
    dispatch_model(model, device_map, skip_keys=model._skip_keys_device_placement)


def why_no_device_map(device: torch.device) -> str | None:
    """Return why transformers' offload cannot be measured here; None if it can."""
    if device.type != "cuda":
        return "offloads from a GPU, and there is none"
    if importlib.util.find_spec("accelerate") is None:
        return "accelerate is not installed"
    return None


def whole_layers(
    stock, text_T: torch.Tensor, device: torch.device, link_gbps: float | None
) -> Alternative:
    """Return the stand-in for who moves whole layers."""
    model = copy.deepcopy(stock)
    layers = WholeLayers(model, device, link_gbps)
    decoder = Counted(model, text_T[: PROMPT + FEW], device)
    decoder.count = lambda: Counts(layers.moved)
    return Alternative(decoder)


def dispatched(stock, text_T: torch.Tensor, device: torch.device) -> Alternative:
    """Return transformers with half of the experts offloaded to the CPU."""
    model = copy.deepcopy(stock)
    offloaded = offloaded_experts(model).values()
    size = sum(p.nbytes for experts in offloaded for p in experts.parameters())
    dispatch(model, device)
    decoder = Counted(model, text_T[: PROMPT + FEW], device)
    # all offloaded parameters at every forward, by construction: asked before and after the tokens
    moved = itertools.count(0, size * FEW)
    decoder.count = lambda: Counts(next(moved))
    return Alternative(decoder, may_fail=True)


# -- the run


def decode(
    device: torch.device, quick: bool, link_gbps: float, layers: int, max_seconds: float
) -> dict:
    """Time decode with everything and with half of the experts resident, ours and the peers'."""
    is_cuda = device.type == "cuda"
    sizes = (MIXTRAL if is_cuda else SMALL) | {"num_hidden_layers": layers}
    if quick:
        sizes = sizes | {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
        sizes = sizes | {"num_key_value_heads": 1, "vocab_size": 1000}
    dtype, link = (torch.bfloat16, None) if is_cuda else (torch.float32, link_gbps)
    tokens, rounds = (4, 2) if quick else (32, 10)
    stock = bench.random_mixtral(device, dtype, **sizes)
    text_T = torch.randint(sizes["vocab_size"], (PROMPT + tokens,))
    runs = {"stock, all resident": Alternative(Counted(stock, text_T, device))}
    skipped = {}

    def attach(stack: contextlib.ExitStack, **options):
        model = copy.deepcopy(stock)
        moe = stack.enter_context(moe_gpu.attach(model, policy=Exact(), **options))
        return model, moe

    with contextlib.ExitStack() as stack:
        resident, moe = attach(stack, resident=1.0)
        name = "moe-gpu, all resident, Exact()"
        runs[name] = attached(moe, Counted(resident, text_T, device), Exact())
        for name, model in (
            ("stock, all resident, graph", stock),
            ("moe-gpu, all resident, Exact(), graph", resident),
        ):
            made = captured(model, text_T, device)
            if isinstance(made, str):
                skipped[name] = made
            else:
                runs[name] = Alternative(made, may_fail=True)

        half = {"slots": sizes["num_local_experts"] // 2, "pool": False, "link_gbps": link}
        pair = {"moe-gpu": attach(stack, **half)}
        with synchronous_copies():
            pair["synchronous copies"] = attach(stack, **half)
        decoders = {who: Counted(model, text_T, device) for who, (model, _) in pair.items()}
        for label, policy in POLICIES.items():
            for who, (_, moe) in pair.items():
                one = attached(moe, decoders[who], policy)
                one.like = SWAPPING if label == "default" else None
                runs[f"{who}, half resident, {label}"] = one
        skipped |= add_whole_layers(runs, stock, text_T, device, link)
        skipped |= check(runs)
        seconds = bench.interleave(
            {name: run.token_s for name, run in runs.items()},
            rounds, warmup=0, max_seconds=max_seconds, label="decode",  # the check was the warm-up
        )  # fmt: skip
    rows = [row(name, seconds[name], runs[name]) for name in runs]
    return {
        "model": sizes,
        "dtype": str(dtype).removeprefix("torch."),
        "decoded_tokens": tokens,
        "whole_layer_tokens": min(tokens, FEW),
        "prompt_tokens": PROMPT,
        "stock_experts": stock.config._experts_implementation,
        "link_gbps": link,
        "rows": rows,
        "ratios": ratios(seconds),
        "skipped": skipped,
    }


def captured(model, text_T: torch.Tensor, device: torch.device) -> Captured | str:
    """Return the model behind a CUDA graph, or why that cannot be."""
    if device.type != "cuda":
        return "no CUDA graphs without a CUDA device"
    try:
        return Captured(model, text_T, device)
    except Exception as error:  # without it, the rest is worth measuring
        return failure(error)


def add_whole_layers(
    runs: dict[str, Alternative], stock, text_T: torch.Tensor, device: torch.device,
    link_gbps: float | None,
) -> dict[str, str]:  # fmt: skip
    """Add who moves whole layers: transformers, or its stand-in; return why not the former."""
    name, reason = "transformers device_map", why_no_device_map(device)
    if reason is None:
        try:
            runs[name] = dispatched(stock, text_T, device)
            return {}
        except Exception as error:  # of foreign code
            reason = failure(error)
    runs["whole layers (stand-in for device_map)"] = whole_layers(stock, text_T, device, link_gbps)
    return {name: reason}


def failure(error: BaseException) -> str:
    """Return an error in one line."""
    return f"failed: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def check(runs: dict[str, Alternative]) -> dict[str, str]:
    """Drop peers whose logits are wrong, and return why; one of ours ends the run."""
    dropped, got = {}, {}
    for name, run in list(runs.items()):
        try:
            got[name] = run.logits()
            if name != SWAPPING:
                want_TV = got[run.like or next(iter(got))]
                bench.check_same(name, got[name], want_TV[: len(got[name])])
        except (Exception, SystemExit) as error:
            if not run.may_fail:
                raise
            dropped[name] = failure(error)
            del runs[name]
    return dropped


def row(name: str, token_s: list[float], run: Alternative) -> dict:
    """Return a line of the table."""
    moved, hit_rates = zip(*run.found[-len(token_s) :], strict=True)
    return {
        "decode": name,
        "rounds": len(token_s),
        "ms_per_token": bench.spread(token_s, 1e3),
        "tokens_per_s": bench.spread(1 / s for s in token_s),
        "mb_per_token": bench.spread(moved, 1e-6),
        "hit_rate": None if None in hit_rates else sum(hit_rates) / len(hit_rates),
    }


def ratios(seconds: dict[str, list[float]]) -> list[dict]:
    """Return how many times as fast ours is as each peer of the same kind."""
    pairs = [(OURS, name) for name in seconds if name != OURS]
    pairs.append((SWAPPING, "synchronous copies, half resident, default"))
    for way in ("", ", graph"):
        pairs.append((f"moe-gpu, all resident, Exact(){way}", f"stock, all resident{way}"))
    return [
        {"of": ours, "over": peer, "times_as_fast": bench.ratio(seconds[peer], seconds[ours])}
        for ours, peer in pairs
        if ours in seconds and peer in seconds
    ]


# -- output


def flat(row: dict) -> dict:
    """Return a line of the results for a CSV file: a spread becomes a column for each figure."""
    columns = {}
    for name, value in row.items():
        if isinstance(value, dict):
            columns |= {f"{name}_{key}": figure for key, figure in value.items()}
        else:
            columns[name] = value
    return columns


def report(content: dict) -> str:
    """Return the results as Markdown."""
    found = content["decode"]
    link = found["link_gbps"]
    lines = [
        {
            "decode": row["decode"],
            "ms/token, median (p20 to p80)": bench.with_spread(row["ms_per_token"], 2),
            "tokens/s": f"{row['tokens_per_s']['median']:,.1f}",
            "MB moved/token": f"{row['mb_per_token']['median']:,.1f}",
            "hit rate": "" if row["hit_rate"] is None else f"{row['hit_rate']:.1%}",
        }
        for row in found["rows"]
    ]
    times = [
        {
            "decode": row["of"],
            "over": row["over"],
            "times as fast, median (p20 to p80)": bench.with_spread(row["times_as_fast"]),
        }
        for row in found["ratios"]
    ]
    skipped = "; ".join(f"{name}: {why}" for name, why in found["skipped"].items())
    return "\n\n".join(
        [
            "# Decode with half of the experts resident",
            f"Measured on: {bench.facts(content['conditions'])} Written by "
            "`profiling/bench_decode.py`, which says what is done.",
            f"Not measured: {skipped}." if skipped else "Nothing was left out.",
            f"{found['model']}, {found['dtype']}, random weights, batch 1, "
            f"{found['decoded_tokens']} tokens after an untimed prompt of "
            f"{found['prompt_tokens']}; who moves whole layers, {found['whole_layer_tokens']}; stock "
            f"experts by {found['stock_experts']}, transformers' choice outside generate()"
            + (f"; a simulated link of {link:g} GB/s on the CPU." if link else "."),
            bench.table(lines),
            bench.table(times),
        ]
    )


@torch.no_grad()
def main() -> None:
    """Measure, print and write."""
    options, device, write = bench.arguments(
        __doc__,
        "decode",
        link_gbps={"type": float, "default": 1.0, "help": "on the CPU, GB/s of the simulated link"},
        layers={"type": int, "default": LAYERS, "help": "of the model"},
        max_seconds={"type": float, "default": 120, "help": "bound of the timed rounds"},
    )
    content = {
        "conditions": bench.conditions(device, quick=options.quick or None),
        "decode": decode(
            device, options.quick, options.link_gbps, options.layers, options.max_seconds
        ),
    }
    text = report(content)
    print(text)
    write(content, text, [flat(row) for row in content["decode"]["rows"]])


if __name__ == "__main__":
    main()
