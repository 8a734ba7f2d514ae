"""A conversation with the attached model in the terminal."""

import argparse
import sys
import time
from contextlib import suppress

import torch
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel, StoppingCriteria
from transformers import PreTrainedTokenizerBase as Tokenizer

import moe_gpu
from moe_gpu.export import Meter, status_line
from moe_gpu.metrics import Metrics

from . import checkpoint, interrupt, measure, options, session
from .errors import Refusal, one_line
from .history import History
from .screen import Writing, out

CONTEXT = 4096  # tokens, at most: keys and values of more would need a larger --gpu-memory
REFRESH = 0.25  # seconds between two readings of the metrics, which wait for the device

HELP = """\
/reset       forget the conversation, not what is resident
/policy [P]  show the policy, or set exact, bonus[:B], mass[:M] or quality[:Q]
/stats       totals of routing and loading, prompts included
/help        this
/quit        leave, as Ctrl-D does
Ctrl-C stops an answer.
A line that ends with \\ goes on in the next; // stands for a first /."""


def run(args: argparse.Namespace) -> int:
    """Load, attach and talk until the user leaves; return the exit status."""
    device = session.pick_device(args.device)
    checkpoint.check_name(args.model)
    budget = session.memory_budget(args)
    tokenizer = checkpoint.load_tokenizer(args.model)
    config = checkpoint.load_config(args.model).get_text_config()
    limit = min(getattr(config, "max_position_embeddings", None) or CONTEXT, CONTEXT)
    if args.max_new_tokens >= limit:
        raise Refusal(
            f"--max-new-tokens {args.max_new_tokens}: the conversation may have {limit} tokens, "
            f"which leaves none for the question"
        )
    model, moe = session.load(args, device, context_tokens=limit, **budget)
    with moe:
        interrupt.check()
        Chat(args, model, moe, tokenizer, limit).talk()
    return 0


class Chat:
    """Reads lines, obeys commands, lets the model answer."""

    def __init__(
        self,
        args: argparse.Namespace,
        model: PreTrainedModel,
        moe: "moe_gpu.AttachedMoE",
        tokenizer: Tokenizer,
        limit: int,
    ):
        self._args, self._model, self._moe, self._tokenizer = args, model, moe, tokenizer
        self._history = History(tokenizer, model.config, limit)
        self._is_interactive = sys.stdin.isatty() and out.is_terminal
        self._left = False
        self._set_policy(args.text_policy)

    def talk(self) -> None:
        """Go on until the user leaves."""
        self._prepare_streams()
        self._greet()
        while not self._left:
            line = None
            try:
                line = self._read()
                if line is None:
                    return
                if line.startswith("/") and not line.startswith("//"):
                    self._obey(*line[1:].split(maxsplit=1))
                elif line.strip():
                    self._answer(line.removeprefix("/") if line.startswith("//") else line)
            except Refusal as refusal:
                say(f"error: {refusal}")
            except KeyboardInterrupt:  # at the prompt, or a moment after the answer's end
                if line is None and not self._is_interactive:
                    raise
                interrupt.forget()
                say("\nCtrl-D or /quit leaves.")
            except BrokenPipeError:
                out.on_broken_pipe()  # nobody reads: ends the program with status 1

    def _prepare_streams(self) -> None:
        if self._is_interactive:
            with suppress(ImportError):  # not on every system
                import readline  # noqa: F401 - makes input() edit and remember lines
        for stream in (sys.stdin, sys.stdout):
            with suppress(AttributeError):  # not a file, in tests
                stream.reconfigure(errors="replace")

    def _greet(self) -> None:
        name = measure.label(self._policy)
        state, slots = self._moe.state, int((self._moe.state.slot_of_LE >= 0).sum())
        model = checkpoint.short_name(self._args.model)
        if not self._history.has_template:
            say(
                f"{model} is a base model without a chat template: it goes on with your text "
                f"instead of answering it."
            )
        say(
            f"{model}: {slots} of {state.num_layers * state.num_experts} experts resident, policy "
            f"{name}, {self._history.limit:,} tokens of context. /help lists the commands."
        )

    def _read(self) -> str | None:
        """Return what the user says next, None at the end."""
        lines = []
        while True:
            try:
                prompt = "... " if lines else "\n> "
                line = input(prompt if self._is_interactive else "")
            except EOFError:
                if self._is_interactive:
                    print()
                return "\n".join(lines) if lines else None
            if not self._is_interactive:
                print(f"> {line}", flush=True)
            lines.append(line.removesuffix("\\"))
            if not line.endswith("\\"):
                return "\n".join(lines)

    def _obey(self, command: str = "", argument: str = "") -> None:
        takes_argument = command == "policy"
        known = {
            "reset": self._reset,
            "policy": self._show_or_set_policy,
            "stats": self._show_stats,
            "help": lambda: say(HELP),
            "quit": self._quit,
        }
        if command not in known:
            raise Refusal(f"there is no command /{command}; /help lists those there are")
        if argument and not takes_argument:
            raise Refusal(f"/{command} takes nothing, got {argument!r}")
        known[command](*([argument.strip()] if takes_argument else []))

    def _quit(self) -> None:
        self._left = True

    def _reset(self) -> None:
        self._history.reset()
        say("The conversation is forgotten.")

    def _show_or_set_policy(self, text: str) -> None:
        if text:
            try:
                (policy,) = options.policy(text)
            except (argparse.ArgumentTypeError, ValueError):  # ValueError: it was "all"
                raise Refusal(
                    f"/policy takes exact, bonus[:B], mass[:M] or quality[:Q], got {text!r}"
                ) from None
            self._set_policy(policy)
        say(f"policy {measure.label(self._policy)}")

    def _set_policy(self, policy: tuple[str, float]) -> None:
        self._policy = policy
        self._moe.set_policy(measure.make_policy(*policy))

    def _show_stats(self) -> None:
        metrics = self._moe.metrics()
        counted = f"{metrics.tokens:,} tokens, " if metrics.tokens else ""  # else the line says so
        say(counted + status_line(metrics))
        if metrics.layers:
            out.print(layers_table(metrics))

    def _answer(self, question: str) -> None:
        """Let the model write, and keep what it wrote."""
        new_tokens, history = self._args.max_new_tokens, self._history
        prompt, dropped = history.prompt(question, new_tokens)
        if dropped:
            turns = "turn is" if dropped == 1 else f"{dropped} turns are"
            say(f"The oldest {turns} forgotten: {history.limit:,} tokens is the limit.")
        cache = history.take_cache(prompt)
        try:
            with interrupt.deferred() as is_pressed, Answer(self._tokenizer, self._moe) as answer:
                ids = session.generate(
                    self._model,
                    self._tokenizer,
                    torch.tensor([prompt]),
                    new_tokens,
                    self._args.seed + len(history.turns),
                    answer,
                    past_key_values=cache,
                    stopping_criteria=[StopIf(is_pressed)],
                )
                stopped = is_pressed()
        except KeyboardInterrupt:  # pressed again, where a token takes long
            interrupt.forget()
            say("Stopped at once; this turn is forgotten.")
            return
        except BrokenPipeError:
            raise
        except (RuntimeError, ValueError, OSError) as error:  # a weight that could not be loaded
            raise Refusal(f"{one_line(error)}; this turn is forgotten") from None
        history.add(question, prompt, ids[0].tolist(), cache)
        say(answer.summary(stopped))


class StopIf(StoppingCriteria):
    """Ends ``generate`` after the token during which a condition came true."""

    def __init__(self, is_true):
        self._is_true = is_true

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), self._is_true(), device=input_ids.device)


class Answer(Writing):
    """An answer, above a line that says how fast and out of which memory it comes."""

    def __init__(self, tokenizer: Tokenizer, moe: "moe_gpu.AttachedMoE"):
        super().__init__(tokenizer)
        self._meter, self._status = Meter(moe), "reading"
        self._begun = self._first = self._shown = time.perf_counter()

    def put(self, value):
        """Take the next ids, and look at the metrics now and then."""
        super().put(value)
        now = time.perf_counter()
        if self.tokens == 1:
            self._meter()  # leaves the prompt out
            self._first = self._shown = now
            self._status = "writing"
        elif out.is_terminal and now - self._shown > REFRESH:
            self._status = self._line(self._meter.peek().metrics)
            self._shown = now

    def footer(self) -> Text:
        """Return the status, never more than one line of it."""
        return Text(self._status, style="dim", no_wrap=True, overflow="ellipsis")

    def summary(self, stopped: bool) -> str:
        """Return what remains to be said when it is written."""
        line = self._line(self._meter().metrics, f"first after {self._first - self._begun:.2f} s")
        return f"stopped, {line}" if stopped else line

    def _line(self, metrics: Metrics, *more: str) -> str:
        parts = [f"{self.tokens} token{'s' * (self.tokens != 1)}"]
        seconds = time.perf_counter() - self._first
        if metrics.tokens and seconds:
            parts.append(f"{metrics.tokens / seconds:.1f}/s")
        parts += more
        return ", ".join(parts + ([status_line(metrics)] if metrics.tokens else []))


def layers_table(metrics: Metrics) -> Table:
    """Return one line per layer."""
    table = Table(box=None, pad_edge=False, header_style="bold", style="dim")
    for head in ("layer", "hit rate", "loads", "MB", "evictions", "resident"):
        table.add_column(head, justify="right")
    for x in metrics.layers:
        moved = f"{x.bytes_loaded / 1e6:,.1f}"
        counts = (f"{count:,}" for count in (x.evictions, x.resident))
        table.add_row(str(x.layer), f"{x.hit_rate:.1%}", f"{x.loads:,}", moved, *counts)
    return table


def say(text: str) -> None:
    """Print what the program says, as opposed to the model."""
    out.print(Text(text, style="dim"), soft_wrap=not out.is_terminal)
