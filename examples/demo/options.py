"""Command line of mixtral_inference.py. Imports nothing heavy, so that --help is instant."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

TINY_MODEL = Path(__file__).parent.parent / "tiny_mixtral"

PROMPTS = (  # one for each domain of the tiny model's text
    "def read_lines(path):\n",
    "Return the number of",
    '{"id": 17, "name": "',
)
BONUS = 0.15  # the original memory-aware router
BUDGET = 0.05
DTYPES = ("auto", "float32", "bfloat16", "float16")

LENGTHS = {"max_new_tokens": 64, "eval_tokens": 1536}
QUICK_LENGTHS = {"max_new_tokens": 12, "eval_tokens": 96}
CHAT_LENGTHS = {"max_new_tokens": 256}
NOT_IN_CHAT = ("prompt", "eval_tokens", "profile", "json", "verify", "quick")


class Parser(argparse.ArgumentParser):
    """Refuses with one sentence instead of the whole usage."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


# fmt: off
def parse(prog: str, description: str, argv: list[str] | None) -> argparse.Namespace:
    """Read the command line; exits with status 2 and a sentence where it makes no sense."""
    parser = Parser(prog=prog, description=description, allow_abbrev=False)
    add = parser.add_argument
    add("--model", default=str(TINY_MODEL), metavar="PATH|HUB_ID",
        help="checkpoint with MoE layers (default: the tiny model in this folder)")
    add("--prompt", action="append", metavar="TEXT", help="repeatable (default: three of our own)")
    add("--max-new-tokens", type=whole(1), metavar="N",
        help=f"tokens per prompt or answer, at most (default: {LENGTHS['max_new_tokens']}, in a chat "
             f"{CHAT_LENGTHS['max_new_tokens']})")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--slots", type=whole(1), metavar="N", help="resident experts of each layer")
    where.add_argument("--resident", type=fraction, metavar="F",
        help="resident share of all experts, in (0, 1] (default: 0.5)")
    where.add_argument("--gpu-memory", metavar="SIZE", help='device memory in all, as in "20GiB"')
    add("--host-memory", metavar="SIZE",
        help="host memory for experts; the rest stays on disk (default: what there is)")
    add("--policy", action="append", type=policy, metavar="P",
        help=f"exact, bonus[:B], mass[:M], quality[:Q] or all; repeatable; exact is always measured, the "
             f"others against it; text is written under the last (default: all, which is "
             f"bonus:{BONUS} and quality:{BUDGET})")
    add("--device", metavar="D", help="cuda, cuda:1 or cpu (default: cuda where there is one)")
    add("--dtype", choices=DTYPES, default="auto", help="default: the checkpoint's own")
    add("--threads", type=whole(1, 1024), metavar="N",
        help="of the CPU (default: 1 for a model under 100 million parameters, else torch's choice)")
    add("--eval-tokens", type=whole(1), metavar="N",
        help=f"held-out tokens per policy (default: {LENGTHS['eval_tokens']})")
    add("--seed", type=whole(0, 2**63 - 1), default=0, metavar="N", help="for sampling (default: 0)")
    add("--profile", type=Path, metavar="DIR", help="write a torch.profiler trace for TensorBoard")
    add("--json", type=Path, metavar="FILE", help="write everything measured")
    add("--verify", action="store_true",
        help="check that exact routing gives bitwise the logits of the model with every expert "
             "resident, whatever was in the cache")
    add("--quick", action="store_true", help="a short form of everything")
    add("--chat", action="store_true", help="talk to the model instead; /help says how")
    return complete(parser, parser.parse_args(argv))
# fmt: on


def complete(parser: Parser, args: argparse.Namespace) -> argparse.Namespace:
    """Fill in what depends on other options, and check what does."""
    given = [f"--{name.replace('_', '-')}" for name in NOT_IN_CHAT if getattr(args, name)]
    if args.chat and given:
        parser.error(f"--chat only talks, so it does not go with {', '.join(given)}")
    args.bar = not args.quick
    lengths = CHAT_LENGTHS if args.chat else QUICK_LENGTHS if args.quick else LENGTHS
    for name, length in lengths.items():
        if getattr(args, name) is None:
            setattr(args, name, length)
    if args.prompt is None:
        args.prompt = list(PROMPTS[:1] if args.quick else PROMPTS)
    asked = args.policy or [policy("all")]
    args.text_policy = asked[-1][-1]
    args.policy = unique(sum(asked, [("exact", 0.0)]))
    if not any((args.slots, args.resident, args.gpu_memory)):
        args.resident = 0.5
    if args.json is not None:
        check_target(parser, "--json", args.json, is_file=True)
    if args.profile is not None:
        check_target(parser, "--profile", args.profile, is_file=False)
    return args


def whole(low: int, high: float = float("inf")) -> Callable[[str], int]:
    """Return a converter for integers in ``[low, high]``."""

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            bound = f">= {low}" if high == float("inf") else f"in [{low}, {high}]"
            raise argparse.ArgumentTypeError(f"must be a whole number {bound}, got {text!r}")
        return value

    return convert


def fraction(text: str) -> float:
    """Convert a share of the experts."""
    value = number(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must lie in (0, 1], got {text!r}")
    return value


def number(text: str) -> float:
    """Convert a float, refusing what is none."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from None


def policy(text: str) -> list[tuple[str, float]]:
    """Convert ``name[:strength]`` to pairs of name and strength."""
    name, _, strength = text.partition(":")
    defaults = {"exact": 0.0, "bonus": BONUS, "quality": BUDGET}
    if text == "all":
        return list(defaults.items())
    defaults["mass"] = BUDGET
    if name not in defaults or text.endswith(":") or (name == "exact" and strength):
        raise argparse.ArgumentTypeError(
            f"must be exact, bonus[:B], mass[:M], quality[:Q] or all, got {text!r}"
        )
    value = number(strength) if strength else defaults[name]
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"needs a finite strength >= 0, got {text!r}")
    return [(name, value)]


def unique(pairs: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """Drop repetitions, keeping the order."""
    return list(dict.fromkeys(pairs))


def check_target(parser: Parser, option: str, path: Path, *, is_file: bool) -> None:
    """Refuse a place that cannot be written, before a minute of work and not after it."""
    if is_file and path.is_dir():
        parser.error(f"{option} {path}: is a folder")
    if not is_file and path.exists() and not path.is_dir():
        parser.error(f"{option} {path}: is not a folder")
    folder = path.parent if is_file else path
    while not is_file and not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        parser.error(f"{option} {path}: there is no folder {folder}")
    if not os.access(folder, os.W_OK | os.X_OK):
        parser.error(f"{option} {path}: {folder} cannot be written to")
