"""Train the tiny Mixtral that the examples and benchmarks of this library run on.

    python examples/train_tiny.py               # trains, or resumes, into examples/tiny_mixtral
    python examples/train_tiny.py --fresh       # discards an earlier run first
    python examples/train_tiny.py --eval-only   # measures the weights already there
    python examples/train_tiny.py --fine-grained    # 64 small experts, into examples/tiny_fine_grained

Other seeds train on the same text. Nothing is downloaded: the text comes from the Python installation (see ``corpus.py``). The
number of steps is fixed, so the machine decides how long training takes, not how far it
gets. A run that is stopped, even by ``kill -9``, continues from its last checkpoint and
ends with the same bits as an uninterrupted one (same machine, same versions, same threads).

Training runs through the gates of this library, attached with every expert resident. With
``Exact()`` routing that is the model's own training, and the gates count what it routes. What is
saved is the detached model: a plain ``MixtralForCausalLM`` in bfloat16. Arithmetic is bfloat16
where the processor multiplies it natively, with float32 weights.

Shape suffixes: T tokens, E experts, K experts per token.
"""

import argparse
import hashlib
import json
import math
import os
import sys
import time
from pathlib import Path

# spinning threads stall each other as soon as other work wants a core: 6 s a step against 0.6 s
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

import moe_gpu
from corpus import DOMAINS, Split, build_corpus
from tiny_report import measure, write_report
from training_forward import use_training_forward

END_OF_TEXT = "<|endoftext|>"
SEQUENCE = 256  # tokens a row predicts; a row holds one more
HELD_OUT_ROWS = 64  # per domain
MAX_POSITIONS = 1024

# domain of each sequence, repeated through training: shares 8, 4 and 4 of 16
MIX = ("code", "prose", "code", "structured") * 4


FINE_GRAINED = {
    "out": Path(__file__).parent / "tiny_fine_grained",
    "experts": 64,
    "top_k": 8,
    "expert_width": 32,
    "steps": 1800,
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "tiny_mixtral")
    parser.add_argument(
        "--fine-grained", action="store_true", help="other defaults: 64 experts, top-8, width 32"
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--resume", action="store_true", help="continue if possible (the default)")
    mode.add_argument("--fresh", action="store_true", help="discard an earlier run in --out")
    mode.add_argument("--eval-only", action="store_true", help="measure the weights in --out")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--checkpoint-every", type=int, default=100, metavar="STEPS")

    recipe = parser.add_argument_group("recipe: a resumed run must repeat these")
    recipe.add_argument("--seed", type=int, default=0, help="of the weights and of the batches")
    recipe.add_argument("--text-seed", type=int, default=0, help="of the generated text")
    recipe.add_argument("--steps", type=int, default=2500)
    recipe.add_argument("--batch", type=int, default=16, help=f"sequences of {SEQUENCE} a step")
    recipe.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    recipe.add_argument("--warmup", type=int, default=100, metavar="STEPS")
    recipe.add_argument("--weight-decay", type=float, default=0.1)
    recipe.add_argument("--aux-coef", type=float, default=0.001, help="load-balancing loss")
    recipe.add_argument("--vocab", type=int, default=2048)
    recipe.add_argument("--layers", type=int, default=4)
    recipe.add_argument("--experts", type=int, default=8)
    recipe.add_argument("--top-k", type=int, default=2)
    recipe.add_argument("--width", type=int, default=256)
    recipe.add_argument("--expert-width", type=int, default=192)
    recipe.add_argument("--heads", type=int, default=4)
    recipe.add_argument("--kv-heads", type=int, default=2)
    parser.set_defaults(recipe=[action.dest for action in recipe._group_actions])
    args = parser.parse_args()
    if args.fine_grained:
        parser.set_defaults(**FINE_GRAINED)
        args = parser.parse_args()
    return args


# --- data


def train_tokenizer(corpus: dict[str, Split], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE over equal amounts of each domain; every digit is its own token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    share = min(sum(map(len, corpus[domain].train)) for domain in DOMAINS)
    texts = ["".join(spread(corpus[domain].train))[:share] for domain in DOMAINS]
    tokenizer.train_from_iterator((line for t in texts for line in t.splitlines(True)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def spread(texts: list[str]) -> list[str]:
    """The same texts in a fixed order unrelated to their names."""
    return sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """All texts as one stream of ids, an end-of-text token before each."""
    ids = []
    for text in spread(texts):
        ids += [
            tokenizer.bos_token_id,
            *tokenizer.encode(text, add_special_tokens=False, verbose=False),
        ]
    return torch.tensor(ids, dtype=torch.int32)


def held_out_rows(stream: torch.Tensor) -> torch.Tensor:
    """Rows of ``SEQUENCE + 1`` ids at equal distances through ``stream``, none overlapping."""
    width = SEQUENCE + 1
    available = stream.numel() // width
    if available < HELD_OUT_ROWS:
        raise ValueError(f"held-out text fills {available} rows, {HELD_OUT_ROWS} are needed")
    picks = torch.arange(HELD_OUT_ROWS) * available // HELD_OUT_ROWS
    return stream[: available * width].view(available, width)[picks].contiguous()


class Batches:
    """Training batches as a pure function of the step, so resuming needs no saved position.

    Each domain is read in windows of ``SEQUENCE + 1`` ids, shuffled anew every epoch and cut
    at a different offset.
    """

    def __init__(self, streams: dict[str, torch.Tensor], batch: int, seed: int):
        self.streams, self.batch, self.seed = streams, batch, seed
        self._orders: dict[tuple[str, int], tuple[int, torch.Tensor]] = {}

    def __call__(self, step: int) -> torch.Tensor:
        """Ids of batch number ``step``: (batch, SEQUENCE + 1) int64."""
        rows = []
        for index in range(step * self.batch, (step + 1) * self.batch):
            cycle, place = divmod(index, len(MIX))
            domain = MIX[place]
            rows.append(self._window(domain, cycle * MIX.count(domain) + MIX[:place].count(domain)))
        return torch.stack(rows).long()

    def _window(self, domain: str, number: int) -> torch.Tensor:
        stream = self.streams[domain]
        windows = stream.numel() // SEQUENCE - 2
        epoch, place = divmod(number, windows)
        if (domain, epoch) not in self._orders:
            generator = torch.Generator().manual_seed(stable_int(self.seed, domain, epoch))
            offset = int(torch.randint(SEQUENCE, (), generator=generator))
            self._orders[domain, epoch] = offset, torch.randperm(windows, generator=generator)
        offset, order = self._orders[domain, epoch]
        start = int(order[place]) * SEQUENCE + offset
        return stream[start : start + SEQUENCE + 1]


def stable_int(*parts: object) -> int:
    """A 48-bit integer that depends on ``parts`` only."""
    return int(hashlib.sha256(repr(parts).encode()).hexdigest()[:12], 16)


# --- model


def build_model(args: argparse.Namespace) -> MixtralForCausalLM:
    """A Mixtral with fresh weights from ``args.seed``."""
    torch.manual_seed(args.seed)
    config = MixtralConfig(
        vocab_size=args.vocab,
        hidden_size=args.width,
        intermediate_size=args.expert_width,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        head_dim=args.width // args.heads,
        num_local_experts=args.experts,
        num_experts_per_tok=args.top_k,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        router_aux_loss_coef=args.aux_coef,
        sliding_window=None,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    return MixtralForCausalLM(config)


def balance_loss(logits_TE: torch.Tensor, k: int) -> torch.Tensor:
    """Load-balancing loss of one layer over a whole batch; 1 when the load is even.

    The Switch loss, per layer: the mean over all layers at once, as in transformers, lets one
    layer's dead expert hide behind another layer's busy one. Over the whole batch, not per
    sequence, an expert may serve one domain only without penalty.
    """
    E = logits_TE.shape[1]
    probs_TE = logits_TE.float().softmax(-1)
    ids_TK = probs_TE.topk(k, dim=-1).indices
    share_E = torch.bincount(ids_TK.reshape(-1), minlength=E) / ids_TK.numel()
    return E * (share_E * probs_TE.mean(0)).sum()


# --- training


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up, then a cosine down to 2 % of the peak."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    progress = (step - args.warmup) / max(1, args.steps - args.warmup)
    return args.lr * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def make_optimizer(model: torch.nn.Module, args: argparse.Namespace) -> torch.optim.AdamW:
    """AdamW; norms are not decayed."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, args.lr, (0.9, 0.95), 1e-8, args.weight_decay, fused=True)


def has_fast_bfloat16(device: str) -> bool:
    """Whether ``device`` multiplies bfloat16 faster than float32."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported()
    return torch.cpu._is_avx512_bf16_supported()


class Trainer:
    """Owns the model, the optimizer and the clock of a run; nobody else may step them.

    The model is attached until :meth:`finish`.
    """

    def __init__(self, args: argparse.Namespace, batches: Batches):
        self.args, self.batches = args, batches
        self.model = build_model(args).to(args.device).train()
        use_training_forward(self.model)
        self.moe = moe_gpu.attach(self.model, resident=1.0, policy=moe_gpu.Exact())
        self.optimizer = make_optimizer(self.model, args)
        self.is_mixed = has_fast_bfloat16(args.device)
        self.step, self.wall_s, self.cpu_s, self.sessions = 0, 0.0, 0.0, 1
        self._router_logits: list[torch.Tensor] = []
        for layer in self.model.model.layers:
            layer.mlp.gate.register_forward_hook(
                lambda _, __, out: self._router_logits.append(out[0])
            )

    def train_step(self) -> float:
        """Take one step and return its cross-entropy in nats a token."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.args)
        ids = self.batches(self.step).to(self.args.device)
        self._router_logits.clear()
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.is_mixed):
            logits = self.model(ids[:, :-1]).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
        balance = sum(balance_loss(x, self.args.top_k) for x in self._router_logits)
        (loss + self.args.aux_coef * balance).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return loss.item()

    def fit(self, checkpoint: Path, fingerprint: dict) -> None:
        """Train to the last step, with a checkpoint now and then."""
        bar = tqdm(total=self.args.steps, initial=self.step, unit="step", mininterval=1.0)
        wall, cpu, smooth = time.perf_counter(), time.process_time(), None
        while self.step < self.args.steps:
            loss = self.train_step()
            smooth = loss if smooth is None else 0.98 * smooth + 0.02 * loss
            bar.set_postfix(loss=f"{smooth:.3f}", refresh=False)
            bar.update()
            if self.step % self.args.checkpoint_every == 0 or self.step == self.args.steps:
                self.wall_s += time.perf_counter() - wall
                self.cpu_s += time.process_time() - cpu
                wall, cpu = time.perf_counter(), time.process_time()
                self.save(checkpoint, fingerprint)
        bar.close()

    def finish(self) -> MixtralForCausalLM:
        """Detach the model and return it, trained."""
        self.moe.detach()
        return self.model

    def save(self, path: Path, fingerprint: dict) -> None:
        """Write a checkpoint that is either whole or absent."""
        state = {
            "fingerprint": fingerprint,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "clock": (self.step, self.wall_s, self.cpu_s, self.sessions),
        }
        part = path.with_suffix(".part")
        torch.save(state, part)
        os.replace(part, path)

    def load(self, path: Path, fingerprint: dict) -> None:
        """Continue from a checkpoint of the same recipe and the same text."""
        state = torch.load(path, map_location="cpu", weights_only=True)
        theirs = state["fingerprint"]
        differing = [key for key in fingerprint if theirs.get(key) != fingerprint[key]]
        if differing:
            raise SystemExit(f"{path.name} has another {', '.join(differing)}; use --fresh")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        self.step, self.wall_s, self.cpu_s, self.sessions = state["clock"]
        self.sessions += 1


def save_model(model: MixtralForCausalLM, out: Path) -> None:
    """Write the weights in bfloat16, and the configuration, in Hugging Face layout."""
    model.generation_config.pad_token_id = model.config.eos_token_id
    model.to(torch.bfloat16).save_pretrained(out)


def prepare(args: argparse.Namespace, is_resumed: bool) -> tuple[Batches, dict, dict]:
    """Build the text; return training batches, held-out rows and what identifies the run."""
    corpus = build_corpus(args.text_seed)
    if is_resumed:
        tokenizer = AutoTokenizer.from_pretrained(args.out)
    else:
        tokenizer = train_tokenizer(corpus, args.vocab)
        tokenizer.save_pretrained(args.out)
    rows = {domain: held_out_rows(encode(tokenizer, corpus[domain].held_out)) for domain in DOMAINS}
    streams = {domain: encode(tokenizer, corpus[domain].train) for domain in DOMAINS}
    digest = hashlib.sha256()
    for stream in streams.values():
        digest.update(stream.numpy().tobytes())
    text = {"text": digest.hexdigest(), **{f"{d}_tokens": s.numel() for d, s in streams.items()}}
    recipe = {key: getattr(args, key) for key in args.recipe}
    return Batches(streams, args.batch, args.seed), rows, recipe | text


def train(args: argparse.Namespace) -> dict:
    """Train to the end and save the model; return the record of the run."""
    checkpoint = args.out / "checkpoint.pt"
    if args.fresh:
        for name in ("checkpoint.pt", "training.json"):
            (args.out / name).unlink(missing_ok=True)
    if (args.out / "training.json").exists() and not checkpoint.exists():
        raise SystemExit(
            f"{args.out.name} is trained: --eval-only measures it, --fresh starts anew"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    batches, held_out, fingerprint = prepare(args, checkpoint.exists())
    trainer = Trainer(args, batches)
    if checkpoint.exists():
        trainer.load(checkpoint, fingerprint)
    trainer.fit(checkpoint, fingerprint)
    save_model(trainer.finish(), args.out)
    save_file(held_out, args.out / "held_out.safetensors")
    return {
        "recipe": {key: fingerprint[key] for key in args.recipe},
        "sequence": SEQUENCE,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "training_text_tokens": {d: fingerprint[f"{d}_tokens"] for d in DOMAINS},
        "tokens_seen": args.steps * args.batch * SEQUENCE,
        "wall_s": round(trainer.wall_s, 1),
        "cpu_s": round(trainer.cpu_s, 1),
        "sessions": trainer.sessions,
        "device": args.device,
        "threads": args.threads,
        "compute_dtype": "bfloat16" if trainer.is_mixed else "float32",
        "weights_dtype": "bfloat16",
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    record = json.loads((args.out / "training.json").read_text()) if args.eval_only else train(args)
    model = MixtralForCausalLM.from_pretrained(args.out, dtype=torch.float32).to(args.device).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.out)
    measured = measure(model, tokenizer, load_file(args.out / "held_out.safetensors"))
    write_report(args.out, record | measured)
    if not args.eval_only:
        (args.out / "checkpoint.pt").unlink()


if __name__ == "__main__":
    main()
