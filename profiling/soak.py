"""A stress run of the offloader: random work, random options, random faults, every weight checked.

Usage:
    python profiling/soak.py                     # 30 seconds
    python profiling/soak.py --seconds 3600 --json profiling/results/soak_cpu.json
    python profiling/soak.py --sabotage          # checks off: the run must notice, and fail

The run is a sequence of short lives. Each makes an offloader with random options (slots, pool,
staging, eviction, bypass, prefetch, prefill, tiers, link), or loads the tiny model with such
options, works it at random and injects faults: read errors, copies that outlast their bound, a
copying thread that dies, bytes that change in a slot, consumers that raise or walk away. At the
end of a life faults stop, and everything must work and be right again: only then do its faults
count as survived.

Wrong weights are counted where they would be used: at each turn all bytes are compared with the
stored ones, before and after, and the model's logits with those of the model that never moved
anything. A hang is an operation that takes longer than its bounds allow. Every error must be the one
that a fault of its life is meant to become. Exit status 1 if any of this is not so, or a fault was
not survived. Another thread reads the metrics all the while.
"""

import argparse
import faulthandler
import json
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import moe_gpu
from moe_gpu import Exact, MassBudget, MoEGate, RouterState
from moe_gpu.offload import ExpertLayout, ExpertOffloader, ExpertStore, Tier
from moe_gpu.offload.disk import DiskExperts, Source
from moe_gpu.offload.eviction import POLICIES
from moe_gpu.offload.prefetch import PREDICTORS
from moe_gpu.offload.shards import Shards

ROOT = Path(__file__).parent.parent
TINY = ROOT / "examples" / "tiny_mixtral"

TIMEOUT_S = 0.4  # bound of a wait in every life
HANG_S = 60.0  # an operation waits for a few copies at most, each TIMEOUT_S
LIFE_S = 2.0
LIFE_CALLS = 12  # at least, however slow the machine is
FAULT_RATE = 0.03  # per piece of a copy
# what a call says where a fault made it fail; no other error is expected
BECOMES = {
    "read error": r"loading expert .* failed: .*Input/output error \(injected\)",
    "slow copy": r"loading expert .* failed: its copy has not completed after",
    "thread death": r"loading expert .* failed: the copying thread died: Killed",
    "changed byte": r"are not those stored for expert",
    "changed slot": r"are not those stored for expert",
    "consumer raised": r"^injected$",
    "walked away": r"slots are leased|a running step holds slots",  # to a step that is not over
}
OF_COPIES = ("read error", "slow copy", "thread death", "changed byte")


class Killed(BaseException):
    """Ends the copying thread as nothing that is caught could."""


class ConsumerError(Exception):
    """Raised in the middle of a step."""


class Tally:
    """What the whole run has seen."""

    def __init__(self):
        self.calls = self.lives = self.wrong_weights = self.hangs = 0
        self.loads = self.verified = self.restarts = 0
        self.injected, self.survived, self.refused = Counter(), Counter(), Counter()
        self.unexplained: list[str] = []
        self.moves: ExpertOffloader | None = None  # of the life that is on
        self.beat_s = time.monotonic()

    def beat(self) -> None:
        """Tell the watchdog that an operation has ended."""
        self.beat_s = time.monotonic()

    def add(self, metrics) -> None:
        """Add the metrics of a life that ends."""
        self.loads += metrics.loads + metrics.filled
        self.verified += metrics.verified
        self.restarts += metrics.pager_restarts

    def explain(self, error: Exception, injected: Counter) -> None:
        """Count an error by the fault of its life that explains it."""
        kinds = [kind for kind in injected if re.search(BECOMES[kind], str(error))]
        if kinds:
            self.refused[kinds[0]] += 1
        else:
            self.unexplained.append(f"{type(error).__name__}: {error}; faults: {dict(injected)}")

    def failed(self) -> bool:
        """Whether anything was wrong, hung, could not be explained, or did not recover."""
        faults_stay = self.injected != self.survived
        return bool(self.wrong_weights or self.hangs or self.unexplained or faults_stay)

    def report(self) -> dict:
        """Return everything by name."""
        return {
            "lives": self.lives,
            "calls": self.calls,
            "loads": self.loads,
            "checksums_compared": self.verified,
            "calls_that_raised": dict(self.refused),
            "errors_unexplained": self.unexplained[:20],
            "thread_restarts": self.restarts,
            "faults_injected": dict(self.injected),
            "faults_survived": dict(self.survived),
            "wrong_weights": self.wrong_weights,
            "hangs": self.hangs,
        }


class Faults:
    """Breaks copies of one offloader at random, while it is on."""

    def __init__(self, offloader: ExpertOffloader, dice: random.Random, tally: Tally):
        self.on, self.injected = False, Counter()
        self._dice, self._tally = dice, tally
        self._bytes_of = offloader._transfer.bytes_of
        self._places = sum(len(memory_SB) for memory_SB in offloader._transfer.memory_G)
        self._inner = offloader._pager._piece
        offloader._pager._piece = self._piece

    def note(self, kind: str) -> None:
        """Count a fault."""
        self.injected[kind] += 1
        self._tally.injected[kind] += 1

    def _piece(self, copy, start: int, stop: int) -> None:
        kind = None
        if self.on and self._dice.random() < FAULT_RATE:
            kind = self._dice.choice(OF_COPIES)
        on_thread = threading.current_thread() is not threading.main_thread()
        if kind in ("slow copy", "thread death") and not on_thread:
            kind = "read error"
        if kind is not None:
            self.note(kind)
        if kind == "read error":
            raise OSError(5, "Input/output error (injected)")
        if kind == "thread death":
            raise Killed("injected")
        if kind == "slow copy":
            time.sleep(TIMEOUT_S * self._dice.uniform(0.5, 2))
        self._inner(copy, start, stop)
        if kind == "changed byte":
            self._bytes_of(copy.place)[self._dice.randrange(start, stop)] ^= 0x5A

    def maybe_change_a_slot(self) -> None:
        """Change a byte of an expert that may be resident."""
        if self.on and self._dice.random() < FAULT_RATE:
            self.note("changed slot")
            expert_B = self._bytes_of(self._dice.randrange(self._places))
            expert_B[self._dice.randrange(len(expert_B))] ^= 0x5A


def random_options(dice: random.Random, num_layers: int, num_experts: int, sabotage: bool) -> dict:
    """Return options of an offloader, slots included."""
    pool = dice.random() < 0.4
    per_layer = dice.randint(1, num_experts)
    return {
        "slots": per_layer * num_layers if pool else per_layer,
        "pool": pool,
        "staging_slots": dice.choice([0, 1, 2, 3]),
        "eviction": dice.choice(sorted(POLICIES)),
        "bypass": dice.random() < 0.5,
        "prefetch": dice.sample(PREDICTORS, dice.randint(0, len(PREDICTORS))),
        "prefill": dice.choice(["last", "warm", "keep"]),
        "stream_prefill": dice.random() < 0.7,
        "verify": not sabotage,
        "timeout_s": TIMEOUT_S,
        "link_gbps": dice.choice([None, None, 1.0, 0.1]),
    }


class OffloaderLife:
    """An offloader driven by hand over experts in all tiers that a machine without a GPU has."""

    L, E, K = 3, 8, 2

    def __init__(self, folder: Path, dice: random.Random, tally: Tally, sabotage: bool):
        self.dice, self.tally = dice, tally
        self.weights = load_file(folder / "model.safetensors")
        layout = ExpertLayout.of({"w": self.weights["layer.0"]})
        sources = [
            [{"w": (Source(f"layer.{la}", e),)} for e in range(self.E)] for la in range(self.L)
        ]
        files = DiskExperts(layout, Shards(folder), sources)
        tiers = [dice.choices([Tier.PAGEABLE, Tier.DISK], k=self.E) for _ in range(self.L)]
        store = ExpertStore(layout, self.L, self.E, tiers_LE=tiers, files=files)
        for layer in range(self.L):
            store.read(layer)
        store.remember_checksums()
        self.state = RouterState(self.L, self.E)
        options = random_options(dice, self.L, self.E, sabotage)
        policy = dice.choice([Exact(), MassBudget(0.3)])
        self.gates = [
            MoEGate(num_experts=self.E, top_k=self.K, policy=policy, state=self.state, layer=layer)
            for layer in range(self.L)
        ]
        self.offloader = ExpertOffloader(self.state, store, options.pop("slots"), **options)
        self.offloader.fill()
        self.slots_LS = [self.offloader.weights_of(layer) for layer in range(self.L)]
        self.left = None  # a step that was walked away from
        self.faults = Faults(self.offloader, dice, tally)

    def work(self) -> None:
        """Do one random thing."""
        if self.dice.random() < 0.1:
            layer = self.dice.randrange(self.L)
            count = self.dice.randint(0, min(self.offloader.num_slots, self.E))
            free = count - len(self.offloader.flights.on_way)
            self.offloader.warm(layer, self.dice.sample(range(self.E), max(0, free)))
            return
        T = self.dice.choice([1, 1, 1, 2, 8, 80])
        for layer in range(self.L):
            self.step(layer, torch.randn(T, self.E) * 3, T > 8)

    def step(self, layer: int, logits_TE: torch.Tensor, is_prefill: bool) -> None:
        """Route and compute one layer; leave in the middle now and then."""
        self.offloader.before_route(layer)
        _, _, ids_TK = self.gates[layer].route(logits_TE)
        if self.offloader.wants_prediction(layer + 1) and layer + 1 < self.L:
            self.offloader.predict(layer + 1, torch.randint(0, self.E, (1, self.K)))
        leave = self.dice.choice(["consumer raised", "walked away"])
        leaves_at = self.dice.randrange(200) if self.faults.on else -1
        turns = self.offloader.step(layer, ids_TK.numel(), is_prefill=is_prefill)
        for number, turn in enumerate(turns):
            stored = self.weights[f"layer.{layer}"][turn.expert]
            for _ in range(2):  # as compute begins, and ends
                if not torch.equal(self.slots_LS[layer][turn.slot]["w"], stored):
                    self.tally.wrong_weights += 1
                    break
                time.sleep(self.dice.choice([0, 0, 0, 1e-4]))
            if number == leaves_at:
                self.faults.note(leave)
                if leave == "walked away":
                    self.left = turns  # as a debugger or a traceback would
                    return
                raise ConsumerError("injected")

    def check(self) -> None:
        """Everything works: every expert of every layer, twice, and sound tables after it."""
        self.left = None
        for _ in range(2):
            for layer in range(self.L):
                every = torch.eye(self.E)[torch.randperm(self.E)] * 9
                self.step(layer, every, is_prefill=False)
        for table in self.offloader.cache.tables:
            table.check()
        E = self.E
        for layer in range(self.L):
            first = self.offloader.cache.key_of(layer, 0)
            row = self.offloader.cache.tables[layer].slot_of_X[first : first + E]
            seen = self.state.slot_of_LE[layer].tolist()
            assert all(a in (b, -1) for a, b in zip(seen, row, strict=True)), (seen, row)

    def close(self) -> None:
        """End the life."""
        self.tally.add(self.offloader.metrics())
        self.offloader.close()


class ModelLife:
    """The tiny trained model, loaded with random options, exact routing."""

    TOKENS, PREFILL = 14, 10

    def __init__(self, expected, dice: random.Random, tally: Tally, sabotage: bool):
        self.expected, self.dice, self.tally = expected, dice, tally
        options = random_options(dice, 4, 8, sabotage)
        if options["pool"]:
            options["slots"] = -(-options["slots"] // 4)
        self.model, self.moe = moe_gpu.load(
            TINY,
            policy=Exact(),
            device="cpu",
            host_memory=dice.choice([0, 3_000_000, 20_000_000]),
            max_policy_tokens=dice.choice([2, 64]),
            progress=False,
            **options,
        )
        self.offloader = self.moe.offloader
        self.faults = Faults(self.offloader, dice, tally)

    def work(self) -> None:
        """Run a prefill and a few tokens of one text, and compare."""
        ids, expected = self.dice.choice(self.expected)
        logits = prefill_and_decode(self.model, ids, self.PREFILL)
        if not torch.equal(logits, expected):
            self.tally.wrong_weights += 1

    def check(self) -> None:
        """Everything works: all texts."""
        for ids, expected in self.expected:
            if not torch.equal(prefill_and_decode(self.model, ids, self.PREFILL), expected):
                self.tally.wrong_weights += 1

    def close(self) -> None:
        """End the life."""
        self.tally.add(self.offloader.metrics())
        self.moe.close()


@torch.no_grad()
def prefill_and_decode(model, ids: torch.Tensor, prefill: int) -> torch.Tensor:
    """Return the logits of a prefill and of the tokens after it, one by one."""
    out = model(ids[None, :prefill], use_cache=True)
    logits = [out.logits[0]]
    for token in ids[prefill:]:
        out = model(token.view(1, 1), past_key_values=out.past_key_values, use_cache=True)
        logits.append(out.logits[0])
    return torch.cat(logits)


def expected_logits() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return texts and their logits with every expert resident."""
    rows = load_file(TINY / "held_out.safetensors")
    texts = [row[i, : ModelLife.TOKENS].long() for row in rows.values() for i in range(2)]
    model, moe = moe_gpu.load(TINY, resident=1.0, policy=Exact(), device="cpu", progress=False)
    with moe:
        return [(ids, prefill_and_decode(model, ids, ModelLife.PREFILL)) for ids in texts]


def live(life, dice: random.Random, tally: Tally, until_s: float) -> None:
    """Work one life until its time is over, then see that it recovers."""
    life.faults.on = True
    last = tally.calls + LIFE_CALLS
    while time.monotonic() < until_s or tally.calls < last:
        life.faults.maybe_change_a_slot()
        try:
            life.work()
        except (RuntimeError, ConsumerError) as error:
            tally.explain(error, life.faults.injected)
        tally.calls += 1
        tally.beat()
    life.faults.on = False
    for _ in range(20):  # a slow copy may still be under way, and a changed byte not yet used
        try:
            life.check()
            break
        except RuntimeError as error:
            tally.explain(error, life.faults.injected)
            time.sleep(TIMEOUT_S / 2)
        tally.beat()
    else:
        return
    tally.survived.update(life.faults.injected)


def watch(tally: Tally, ended: threading.Event) -> None:
    """End the process where an operation hangs: with every stack, and status 1."""
    while not ended.wait(0.1):
        if tally.moves is not None:  # as an exporter of metrics would, at any moment
            try:
                tally.moves.metrics().as_dict()
            except Exception as error:
                tally.unexplained.append(f"metrics(): {type(error).__name__}: {error}")
        if time.monotonic() - tally.beat_s > HANG_S:
            tally.hangs += 1
            faulthandler.dump_traceback(all_threads=True)
            print(json.dumps(tally.report(), indent=1), file=sys.stderr, flush=True)
            os._exit(1)


def main() -> int:
    """Run, print, write; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--lives", type=int, help="end after so many, whatever the time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the report here")
    parser.add_argument("--sabotage", action="store_true", help="no checksums: must fail")
    args = parser.parse_args()

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*experts (of|that) one token")
    dice, tally, ended = random.Random(args.seed), Tally(), threading.Event()
    torch.manual_seed(args.seed)
    threading.Thread(target=watch, args=(tally, ended), daemon=True).start()
    # a killed thread's traceback is no news here
    own_hook = threading.excepthook
    threading.excepthook = lambda info: None if info.exc_type is Killed else own_hook(info)
    with tempfile.TemporaryDirectory() as name, tqdm(total=args.seconds, unit="s") as bar:
        folder = Path(name)
        save_file(
            {f"layer.{la}": torch.randn(8, 40, 33) for la in range(OffloaderLife.L)},
            folder / "model.safetensors",
        )
        expected = expected_logits()
        start_s = time.monotonic()
        most = float("inf") if args.lives is None else args.lives
        while (spent_s := time.monotonic() - start_s) < args.seconds and tally.lives < most:
            is_model = tally.lives % 3 == 2
            kind, source = (ModelLife, expected) if is_model else (OffloaderLife, folder)
            life = kind(source, dice, tally, args.sabotage)
            tally.moves = life.offloader
            try:
                live(life, dice, tally, min(time.monotonic() + LIFE_S, start_s + args.seconds))
            finally:
                life.close()
            tally.lives += 1
            bar.n = round(min(args.seconds, spent_s), 1)
            faults = f"{tally.survived.total()}/{tally.injected.total()}"
            bar.set_postfix(calls=tally.calls, wrong=tally.wrong_weights, survived=faults)
    ended.set()

    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"
    conditions = {
        "seconds": round(time.monotonic() - start_s, 1),
        "seed": args.seed,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, CPU only",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit,
    }
    report = {"conditions": conditions} | tally.report()
    print(json.dumps(report, indent=1))
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return int(tally.failed())


if __name__ == "__main__":
    sys.exit(main())
