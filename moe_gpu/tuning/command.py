"""``python -m moe_gpu tune MODEL --text FILE``: arguments, loading, printing."""

import argparse
import json
import warnings
from pathlib import Path


# fmt: off
def add_tune(commands) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "tune", help="the routing budget for a stated loss of quality, measured on your text",
        description="Measure what routing budgets save and cost on your own text, and recommend "
                    "the one with the fewest loads whose perplexity stays within a target.")
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder of a model, or hub id")
    add("--text", metavar="FILE", nargs="+", required=True, help="UTF-8 text like that to be served")
    add("--max-perplexity", type=float, default=0.5, metavar="P",
        help="largest increase of perplexity, percent (default: %(default)s)")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--slots", type=int, nargs="+", metavar="N",
        help="experts per layer on the device, one or several numbers (default: as many as one "
             "token needs, and a quarter, half and three quarters of them)")
    where.add_argument("--resident", type=_share, metavar="SHARE",
        help="the same as a share, such as 0.5")
    where.add_argument("--gpu-memory", metavar="SIZE",
        help='for all that will be on the device, such as "20GiB"')
    add("--context", type=int, default=4096, metavar="N",
        help="tokens that --gpu-memory makes room for (default: %(default)s)")
    add("--out", metavar="FOLDER", help="write tune.json, tune.png and trace.safetensors there")
    add("--rows", type=int, metavar="N",
        help="use at most N rows, spread over the text (default: all)")
    add("--tokens", type=int, default=256, metavar="N", help="of a row (default: %(default)s)")
    add("--seed", type=int, default=0, help="of split and bootstrap (default: %(default)s)")
    add("--batch-rows", type=int, default=256, metavar="N",
        help="rows in one forward pass: memory for speed (default: %(default)s)")
    add("--dtype", default="auto", choices=("auto", "bfloat16", "float16", "float32"),
        help="of the weights (default: the checkpoint's own)")
    add("--device", metavar="DEVICE", help="where to compute (default: CUDA where there is one)")
    add("--offload", action="store_true",
        help="for a model larger than the device: keep its experts in host memory and on disk")
    add("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=_tune, parser=parser)
# fmt: on


def _share(text: str) -> float | int:
    return int(text) if text.isdecimal() else float(text)


def _tune(args: argparse.Namespace) -> int:
    # not at the top: importing transformers takes seconds
    import torch
    import transformers

    from ..huggingface import load
    from ..huggingface.checkpoint import check_quantization, config_dtype, meta_model, read_config
    from .plot import check_matplotlib
    from .sizes import slot_counts
    from .texts import rows_of, split_rows
    from .tune import check_ids, check_target, tune

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # whatever can be refused is refused before weights are read
    check_target(args.max_perplexity)
    if args.out is not None:
        try:
            check_matplotlib()
        except ModuleNotFoundError as error:
            args.parser.error(str(error))
    texts = [_read(path) for path in args.text]
    device = _device(args.device, torch)
    config = read_config(args.model)
    check_quantization(config)
    dtype = getattr(torch, args.dtype, None) or config_dtype(config) or torch.bfloat16
    empty = meta_model(config, dtype, attention="eager")
    sizes = {"slots": args.slots, "resident": args.resident, "gpu_memory": args.gpu_memory}
    counts = slot_counts(empty, **sizes, context_tokens=args.context)
    tokenizer = _loaded("tokenizer", transformers.AutoTokenizer, args.model)
    rows_NT = rows_of(texts, tokenizer, args.tokens, args.rows)
    check_ids(empty, rows_NT)
    split_rows(rows_NT)

    if args.offload:
        where = {"gpu_memory": args.gpu_memory} if args.gpu_memory else {"slots": max(counts)}
        _, model = load(
            args.model, **where, context_tokens=args.context, dtype=args.dtype, device=device,
            progress=False,
        )  # fmt: skip
    else:
        model = _loaded("model", transformers.AutoModelForCausalLM, args.model, dtype=args.dtype)
        model = model.to(device).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the result says so itself
        result = tune(
            model,
            rows_NT,
            max_perplexity_increase=args.max_perplexity,
            **sizes,
            context_tokens=args.context,
            seed=args.seed,
            batch_rows=args.batch_rows,
            out=args.out,
        )
    print(json.dumps(result.as_dict(), indent=2) if args.json else result)
    if args.offload:
        model.close()
    return 0


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"text {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"text {path}: not UTF-8, {error.reason} at byte {error.start}") from error


def _device(name: str | None, torch):
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name}: {str(error).splitlines()[0]}") from error
    return device


def _loaded(what: str, auto_class, model: str, **options):
    try:
        return auto_class.from_pretrained(model, trust_remote_code=False, **options)
    except (OSError, ValueError) as error:
        first = next((line for line in str(error).splitlines() if line.strip()), repr(error))
        raise ValueError(f"{what} of {model}: {first}") from error
