"""Command line: ``moe-gpu plan MODEL --gpu-memory 24GiB``, or ``python -m moe_gpu plan ...``.

Exit status: 0, or 2 with one sentence on stderr where the request makes no sense, or 141 (as the
shell reports SIGPIPE) where nobody reads the output to its end.
"""

import argparse
import json
import os
import sys
from typing import NoReturn

from .tuning.command import add_tune
from .tuning.replay_command import add_replay


class Parser(argparse.ArgumentParser):
    """Refuses with one sentence instead of the whole usage."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand and return its exit status."""
    parser = Parser(prog="moe-gpu", description="Mixture-of-experts models larger than the GPU.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_plan(commands)
    add_tune(commands)
    add_replay(commands)
    args = parser.parse_args(argv)
    try:
        status = args.run(args)
        sys.stdout.flush()  # here, where a reader who has gone can be noticed
        return status
    except BrokenPipeError:
        # what is still buffered would be written at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        args.parser.error("this needs transformers: pip install 'transformers>=5.17'")
    except (TypeError, ValueError) as error:
        args.parser.error(str(error))


# fmt: off
def _add_plan(commands) -> None:
    parser = commands.add_parser(
        "plan", help="what fits where, from a model's config alone; no weights are read",
        description="Print what fits where, from a model's config alone; no weights are read. "
                    'Sizes are like "24GiB" or "512MB".')
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder with config.json, path of a config.json, or hub id")
    add("--gpu-memory", metavar="SIZE",
        help="for all of: dense weights, KV cache, workspace, staging slots, slots "
             "(default: print sizes only)")
    add("--host-memory", metavar="SIZE",
        help="host memory for experts (default: all experts, at most 80 %% of what is free here)")
    add("--pinned-memory", metavar="SIZE",
        help="page-locked part of it (default: all of it, at most half of what is free here)")
    add("--context", type=int, default=4096, metavar="N",
        help="tokens of the one sequence to make room for (default: %(default)s)")
    add("--dtype", default="auto", choices=("auto", "bfloat16", "float16", "float32"),
        help="of the weights (default: the config's own, else bfloat16)")
    add("--hit-rate", type=float, default=0.8, metavar="H",
        help="assumed share of routed pairs whose expert is resident (default: %(default)s)")
    add("--link-gbps", type=float, default=25.0, metavar="GBPS",
        help="host to device, 10^9 bytes/s (default: %(default)s)")
    add("--disk-gbps", type=float, default=3.0, metavar="GBPS",
        help="disk to host, 10^9 bytes/s (default: %(default)s)")
    add("--json", action="store_true", help="print the same as JSON")
    parser.set_defaults(run=_plan, parser=parser)
# fmt: on


def _plan(args: argparse.Namespace) -> int:
    # not at the top: importing transformers takes seconds
    import transformers

    from .huggingface.plan import plan_memory
    from .huggingface.plan_text import plan_text

    transformers.logging.set_verbosity_error()
    plan = plan_memory(
        args.model,
        gpu_memory=args.gpu_memory,
        host_memory=args.host_memory,
        pinned_memory=args.pinned_memory,
        context_tokens=args.context,
        dtype=args.dtype,
        hit_rate=args.hit_rate,
        link_gbps=args.link_gbps,
        disk_gbps=args.disk_gbps,
    )
    print(json.dumps(plan.as_dict(), indent=2) if args.json else plan_text(plan))
    return 0


if __name__ == "__main__":
    sys.exit(main())
