"""From the command line to a model that is ready to write."""

import argparse

import torch
from transformers import PreTrainedConfig, PreTrainedModel, TextStreamer
from transformers import PreTrainedTokenizerBase as Tokenizer

import moe_gpu
from moe_gpu.huggingface.budget import parse_bytes

from .errors import Refusal, one_line

# below, an operation takes about as long as waking a second thread, and on a busy machine far less
SMALL_MODEL = 200_000_000  # bytes of experts


def pick_device(name: str | None) -> torch.device:
    """Return the device asked for, or CUDA where there is one."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise Refusal(f"--device {name}: must be cuda, cuda:N or cpu") from None
    if device.type not in ("cuda", "cpu"):
        raise Refusal(f"--device {name}: must be cuda, cuda:N or cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise Refusal(f"--device {name}: this machine has {torch.cuda.device_count()} such devices")
    return device


def memory_budget(args: argparse.Namespace) -> dict[str, float | int]:
    """Return what :func:`moe_gpu.load` shall be told about memory, for the cache and the rest."""
    sizes = {"gpu_memory": args.gpu_memory, "host_memory": args.host_memory}
    budget = {"slots": args.slots, "resident": args.resident}
    try:
        for name, size in sizes.items():
            if size is not None:
                minimum = int(name == "gpu_memory")
                budget[name] = parse_bytes(f"--{name.replace('_', '-')}", size, minimum)
    except ValueError as error:
        raise Refusal(str(error)) from None
    return {name: value for name, value in budget.items() if value is not None}


def encode(prompts: list[str], tokenizer: Tokenizer) -> list[tuple[str, torch.Tensor]]:
    """Return each prompt with its ids, ``(1, T)``."""
    pairs = [(prompt, tokenizer(prompt, return_tensors="pt")["input_ids"]) for prompt in prompts]
    for prompt, ids in pairs:
        if ids.numel() == 0:
            raise Refusal(f"--prompt {prompt!r}: the tokenizer makes no token of it")
    return pairs


def check_length(config: PreTrainedConfig, prompts: list, new_tokens: int) -> None:
    """Refuse to write past the positions that the model knows."""
    limit = getattr(config, "max_position_embeddings", None)
    for prompt, ids in prompts:
        if limit is not None and ids.shape[1] + new_tokens > limit:
            raise Refusal(
                f"--max-new-tokens {new_tokens}: with the {ids.shape[1]} tokens of the prompt "
                f"{prompt[:40]!r} that is over the model's limit of {limit}"
            )


def load(
    args: argparse.Namespace, device: torch.device, **budget
) -> tuple[PreTrainedModel, "moe_gpu.AttachedMoE"]:
    """Load the model with the gate exact; the measurements set the policies.

    Sets the CPU threads, by the size of the model where nobody says how many.
    """
    try:
        model, moe = moe_gpu.load(
            args.model,
            device=device,
            dtype=args.dtype,
            policy=moe_gpu.Exact(),
            progress=None if args.bar else False,
            **budget,
        )
    except (TypeError, ValueError, MemoryError) as error:
        raise Refusal(one_line(error)) from None
    except Exception as error:  # a damaged file raises what its reader happens to raise
        raise Refusal(f"--model {args.model}: {one_line(error)}") from None
    threads = args.threads
    offloader, state = moe.offloader, moe.state
    expert_bytes = state.num_layers * state.num_experts * offloader.store.layout.expert_bytes
    if threads is None and device.type == "cpu" and expert_bytes < SMALL_MODEL:
        threads = 1
    if threads is not None:
        torch.set_num_threads(threads)
    return model, moe


def generate(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    ids: torch.Tensor,
    new_tokens: int,
    seed: int,
    streamer: TextStreamer | None = None,
    **options,
) -> torch.Tensor:
    """Sample a continuation of one prompt and return both, ``(1, T)``.

    Args:
        model: Writes.
        tokenizer: Knows the padding.
        ids: The prompt, ``(1, T)``.
        new_tokens: At most that many.
        seed: Of the sampling.
        streamer: Gets the ids as they come.
        options: More for ``generate``.
    """
    torch.manual_seed(seed)
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return model.generate(
        ids.to(model.device),
        attention_mask=torch.ones_like(ids, device=model.device),
        max_new_tokens=new_tokens,
        do_sample=True,
        temperature=0.7,
        top_k=50,
        pad_token_id=padding,
        streamer=streamer,
        **options,
    )
