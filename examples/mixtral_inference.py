"""Text from a Mixtral-style model with only part of its experts on the device.

    python examples/mixtral_inference.py                      # the tiny model that comes along
    python examples/mixtral_inference.py --slots 2 --policy quality:0.03 --policy quality:0.1
    python examples/mixtral_inference.py --model PATH --gpu-memory 20GiB
    python examples/mixtral_inference.py --chat               # talk to it

Generates from a few prompts, then decodes held-out text token by token under each policy and
prints hits, traffic and perplexity side by side. Exit status: 0, 1 where --verify found a
difference, 2 where the request makes no sense, 130 after Ctrl-C.

This file is the shell around it; what happens, in order, is in demo/run.py and demo/chat.py.
"""

import sys
from pathlib import Path

from demo import interrupt
from demo.errors import Refusal
from demo.options import parse

NAME = Path(__file__).name
NEEDED = ("torch", "transformers", "rich", "safetensors", "tokenizers", "moe_gpu")


def main(argv: list[str] | None = None) -> int:
    args = parse(NAME, __doc__.splitlines()[0], argv)
    try:
        with interrupt.noted():
            # not at the top: importing torch takes seconds, in which --help and Ctrl-C should work
            if args.chat:
                from demo.chat import run
            else:
                from demo.run import run
            return run(args)
    except Refusal as refusal:
        return say(f"error: {refusal}", 2)
    except ModuleNotFoundError as error:
        if error.name not in NEEDED:
            raise
        return say(
            f"error: {error.name} is not installed for this Python: activate .venv "
            f"(`. .venv/bin/activate`), or pip install '.[hf]'",
            2,
        )
    except KeyboardInterrupt:
        return say("interrupted, no partial file is left", 130)


def say(sentence: str, status: int) -> int:
    print(f"{NAME}: {sentence}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
