"""How fast experts reach the device, and what it is worth that their copies do not hold up compute.

Usage:
    python profiling/bench_copies.py                  # CUDA where there is one
    python profiling/bench_copies.py --device cpu     # the same code; says little about a GPU
    python profiling/bench_copies.py --device cpu --quick

Two parts, each with its peers in one run:

1. *Throughput*: steps of the real offloader that miss every expert they need, from each tier, as
   a ratio to plain asynchronous copies of the same sizes from page-locked memory (on the CPU:
   from memory to memory). From the record of the routed step to the last byte; nothing computes.
2. *Decode* of a model with half of its experts resident: the offloader against itself with
   synchronous copies on the compute stream, and against transformers' ``device_map`` CPU offload
   of half the layers' experts, which moves whole layers. Where ``accelerate`` is missing, hooks
   that do what its hooks do stand in for it, under a name of their own. On the CPU a simulated
   link carries every byte.
"""

import contextlib
import copy
import importlib.util
import itertools
import math
import os
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import _bench as bench
import moe_gpu
from bench_attached import MIXTRAL, POLICIES, PROMPT, Decoder
from moe_gpu import Exact, MoEGate, RouterState
from moe_gpu.offload import ExpertLayout, ExpertOffloader, ExpertStore, offloader
from moe_gpu.offload.disk import DiskExperts, Source
from moe_gpu.offload.shards import Shards
from moe_gpu.offload.tiers import Tier
from moe_gpu.offload.transfer import SimulatedLink, Transfer

MB = 1_000_000
SIZES_MB = {"cuda": (1, 4, 16, 64, 176, 352), "cpu": (1, 4, 16)}  # 352: Mixtral in bf16
MAX_BYTES = {"cuda": 3 << 30, "cpu": 256 << 20}  # of one size's experts
ROUND_BYTES = {"cuda": 1 << 30, "cpu": 64 << 20}  # moved per round at least
EXPERTS = 16  # half of them in slots
SMALL = MIXTRAL | {
    "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4,
    "num_key_value_heads": 1, "vocab_size": 1000,
}  # fmt: skip
LAYERS = 4


# -- 1. throughput


class Loads:
    """One layer whose steps need either half of its experts, in turn: every load is a miss.

    Args:
        device: Where the slots are.
        base_B: uint8, what the experts' bytes are made from.
        experts: E, even.
        tier: Where the experts live.
        folder: For files.
        cold: Drop the page cache of the files before each step.
    """

    def __init__(self, device, base_B, experts: int, tier: Tier, folder: Path, cold: bool = False):
        self.device, self.base_B, self.experts, self.cold = device, base_B, experts, cold
        self.bytes_of_step = experts // 2 * len(base_B)
        weights = {"w": torch.stack([base_B + e for e in range(experts)])}
        layout, files = ExpertLayout.of(weights), None
        if tier is Tier.DISK:
            save_file(weights, folder / "model.safetensors")
            with (folder / "model.safetensors").open("rb") as file:
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


def throughput(device: torch.device, quick: bool, max_seconds: float) -> dict:
    """Time loads of each size from each tier, and plain copies."""
    sizes = SIZES_MB[device.type][: 1 if quick else None]
    rows, skipped = [], {}
    places = {"pinned": (Tier.PINNED, False)} if device.type == "cuda" else {}
    if not places:
        skipped["pinned"] = "no page-locked memory without a CUDA device"
    places |= {"pageable": (Tier.PAGEABLE, False), "disk, in the page cache": (Tier.DISK, False)}
    places |= {"disk, page cache dropped": (Tier.DISK, True)}
    for megabytes in sizes:
        # the offloader aligns experts to 256 bytes
        expert_bytes = math.ceil(megabytes * MB / 256) * 256
        experts = min(EXPERTS, MAX_BYTES[device.type] // expert_bytes // 2 * 2)
        rows += _of_size(
            device, expert_bytes, experts, places, quick, max_seconds / len(sizes), skipped
        )
    return {"rows": rows, "skipped": skipped}


def _of_size(device, expert_bytes, experts, places, quick, max_seconds, skipped):
    steps = max(2, ROUND_BYTES[device.type] // (experts // 2 * expert_bytes))
    base_B = torch.randint(256, (expert_bytes,), dtype=torch.uint8)
    with contextlib.ExitStack() as stack:
        runs = {"plain copy": _plain_copies(device, base_B, experts // 2)}
        for name, (tier, cold) in places.items():
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            loads = Loads(device, base_B, experts, tier, folder, cold)
            stack.callback(loads.close)
            if loads.store.pin_refused_bytes:
                skipped[f"{name}, {expert_bytes / MB:.0f} MB"] = "page-locking was refused"
                continue
            for _ in range(2):
                loads.step_s(check=True)
            runs[name] = loads.step_s
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


# -- 2. decode


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
def synchronous_copies():
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


def with_device_map(model, device: torch.device, folder: Path, offload: str = "cpu"):
    """Load the model again with ``device_map``, the experts of every other layer on the CPU."""
    model.save_pretrained(folder)
    homes = offloaded_experts(model)
    main = torch.cuda.current_device() if device.type == "cuda" else "cpu"
    device_map = {
        name: offload if name in homes else main
        for name, module in model.named_modules()
        if any(True for _ in itertools.chain(module.parameters(False), module.buffers(False)))
    }
    return AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=model.dtype,
        device_map=device_map,
        offload_folder=str(folder / "offload"),
    ).eval()


def why_no_device_map(device: torch.device) -> str | None:
    """Return why transformers' offload cannot be measured here; None if it can."""
    if device.type != "cuda":
        return "offloads from a GPU, and there is none"
    if importlib.util.find_spec("accelerate") is None:
        return "accelerate is not installed"
    return None


def decode(device: torch.device, quick: bool, link_gbps: float, max_seconds: float) -> dict:
    """Time decode with half the experts resident, ours and the peers'."""
    is_cuda = device.type == "cuda"
    sizes = (MIXTRAL if is_cuda else SMALL) | {"num_hidden_layers": LAYERS}
    if quick:
        sizes = sizes | {"hidden_size": 64, "intermediate_size": 128}
    dtype, link = (torch.bfloat16, None) if is_cuda else (torch.float32, link_gbps)
    tokens, rounds = (4, 2) if quick else (32, 10)
    stock = bench.random_mixtral(device, dtype, **sizes)
    text_T = torch.randint(sizes["vocab_size"], (PROMPT + tokens,))
    plain = Decoder(stock, text_T, device)
    want_TV = plain.logits()
    runs = {"stock, all resident": (plain, lambda: 0, None)}  # decoder, bytes so far, before
    skipped = {}

    def attach(stack):
        model = copy.deepcopy(stock)
        options = {"slots": sizes["num_local_experts"] // 2, "pool": False, "link_gbps": link}
        moe = stack.enter_context(moe_gpu.attach(model, policy=Exact(), **options))
        return moe, Decoder(model, text_T, device)

    with contextlib.ExitStack() as stack:
        ours = attach(stack)
        with synchronous_copies():
            synchronous = attach(stack)
        for label, policy in POLICIES.items():
            for who, (moe, decoder) in (("moe-gpu", ours), ("synchronous copies", synchronous)):
                runs[f"{who}, {label}"] = (
                    decoder,
                    lambda moe=moe: moe.metrics().bytes_loaded,
                    lambda moe=moe, policy=policy: moe.set_policy(policy),
                )

        hooked = copy.deepcopy(stock)
        layers = WholeLayers(hooked, device, link)
        name = "whole layers (stand-in for device_map)"
        runs[name] = (Decoder(hooked, text_T, device), lambda: layers.moved, None)

        name = "transformers device_map"
        skipped[name] = why_no_device_map(device)
        if skipped[name] is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            decoder = Decoder(with_device_map(stock, device, folder), text_T, device)
            # all offloaded parameters at every forward, by construction
            homes = offloaded_experts(stock).values()
            moves = sum(p.nbytes for experts in homes for p in experts.parameters())
            runs[name] = (decoder, itertools.count(0, moves * (tokens + 1)).__next__, None)

        def prepare(name):
            decoder, moved, before = runs[name]
            if before is not None:
                before()
            return decoder, moved

        got = {name: prepare(name)[0].logits() for name in runs}
        for name, got_TV in got.items():
            # the default policy is not the model's own routing, but the same for both copies
            swaps = name.endswith("default")
            bench.check_same(name, got_TV, got["moe-gpu, default"] if swaps else want_TV)
        per_forward: dict[str, list[float]] = {name: [] for name in runs}

        def counted(name):
            decoder, moved = prepare(name)
            before = moved()
            took_s = decoder.time_s()
            per_forward[name].append((moved() - before) / (tokens + 1))
            return took_s

        seconds = bench.interleave(
            {name: lambda n=name: counted(n) for name in runs},
            rounds, max_seconds=max_seconds, label="decode",
        )  # fmt: skip
    rows = [
        {
            "decode": name,
            "rounds": len(times),
            "tokens_per_s": bench.spread(tokens / s for s in times),
            "mb_per_forward": bench.spread(per_forward[name][1:], 1 / MB),
        }
        for name, times in seconds.items()
    ]
    ours_s = seconds["moe-gpu, Exact()"]
    return {
        "model": sizes,
        "dtype": str(dtype).removeprefix("torch."),
        "decoded_tokens": tokens,
        "prompt_tokens": PROMPT,
        "link_gbps": link,
        "rows": rows,
        "moe_gpu_exact_over": {
            name: bench.ratio(times, ours_s)
            for name, times in seconds.items()
            if times is not ours_s
        },
        "default_policy_over_synchronous": bench.ratio(
            seconds["synchronous copies, default"], seconds["moe-gpu, default"]
        ),
        "skipped": {name: reason for name, reason in skipped.items() if reason},
    }


# -- output


def report(content: dict) -> str:
    """Return the results as Markdown."""
    copies, text = content["throughput"], content["decode"]
    link = text["link_gbps"]
    loads = [
        {
            "expert, MB": str(row["expert_mb"]),
            "from": row["from"],
            "GB/s, median (p20 to p80)": bench.with_spread(row["gb_per_s"], 2),
            "over a plain copy": bench.with_spread(row["over_plain_copy"]),
        }
        for row in copies["rows"]
    ]
    decodes = [
        {
            "decode": row["decode"],
            "tokens/s, median (p20 to p80)": bench.with_spread(row["tokens_per_s"], 2),
            "MB moved per forward": f"{row['mb_per_forward']['median']:,.1f}",
        }
        for row in text["rows"]
    ]
    ratios = [
        {"moe-gpu, Exact() over": name, "ratio, median (p20 to p80)": bench.with_spread(figures)}
        for name, figures in text["moe_gpu_exact_over"].items()
    ]
    skipped = copies["skipped"] | text["skipped"]
    return "\n\n".join(
        [
            "# Copies of experts to the device",
            f"Measured on: {bench.facts(content['conditions'])} Written by "
            "`profiling/bench_copies.py`, which says what is done.",
            "Not measured: " + "; ".join(f"{n}: {why}" for n, why in skipped.items()) + "."
            if skipped
            else "Nothing was left out.",
            "## Throughput",
            "Steps that miss all they need, through the offloader.",
            bench.table(loads),
            "## Decode with half the experts resident",
            f"{text['model']}, {text['dtype']}, random weights, batch 1, {text['decoded_tokens']} "
            f"tokens after an untimed prompt of {text['prompt_tokens']}"
            + (f"; a simulated link of {link:g} GB/s on the CPU." if link else ".")
            + " Bytes are means over the prompt and the tokens.",
            bench.table(decodes),
            bench.table(ratios),
        ]
    )


@torch.no_grad()
def main() -> None:
    """Measure both parts, print and write them."""
    options, device, write = bench.arguments(
        __doc__,
        "copies",
        link_gbps={"type": float, "default": 1.0, "help": "on the CPU, GB/s of the simulated link"},
        max_seconds={"type": float, "default": 120, "help": "bound of each part's timed rounds"},
    )
    content = {
        "conditions": bench.conditions(device, quick=options.quick or None),
        "throughput": throughput(device, options.quick, options.max_seconds),
        "decode": decode(device, options.quick, options.link_gbps, options.max_seconds),
    }
    text = report(content)
    print(text)
    write(content, text)


if __name__ == "__main__":
    main()
