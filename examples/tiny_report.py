"""What is said about the tiny model: measured on its held-out rows, written beside it.

Perplexity, the load of every expert, and how far routing repeats itself from one token to
the next, which is what an expert cache lives from. All of it with the saved weights in
float32, so a later change in this library can be compared with the committed record.

Shape suffixes: B rows, T tokens of a row, V vocabulary, K experts per token.
"""

import json
import math
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F
from transformers import MixtralForCausalLM, PreTrainedTokenizerBase

PROMPTS = {
    "code": "def read_file(path):",
    "prose": "Return a new",
    "structured": '{"name": "',
}
ROWS_PER_CALL = 16
TEMPERATURE = 0.6


def measure(
    model: MixtralForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    held_out: dict[str, torch.Tensor],
) -> dict:
    """Measure ``model`` on rows of token ids, domain by domain.

    Args:
        model: In evaluation mode, float32.
        tokenizer: For the samples of text only.
        held_out: Per domain, ids of shape ``(B, T + 1)``.

    Returns:
        A record for ``training.json``: ``perplexity``, ``expert_load``, ``repeats``,
        ``lru_hit_rate`` (each layer by itself) and ``samples``.
    """
    config = model.config
    slots = config.num_local_experts // 2
    perplexity, load, repeats, hits = {}, {}, {}, {}
    for domain, rows in held_out.items():
        loss, ids_LBTK = evaluate(model, rows.long())
        perplexity[domain] = round(math.exp(loss), 3)
        load[domain] = [
            [round(x, 4) for x in expert_load(ids, config.num_local_experts)] for ids in ids_LBTK
        ]
        repeats[domain] = [repeat_rates(ids) for ids in ids_LBTK]
        hits[domain] = [round(lru_hit_rate(ids, slots), 4) for ids in ids_LBTK]
    return {
        "held_out_rows": {domain: list(rows.shape) for domain, rows in held_out.items()},
        "perplexity": perplexity,
        "expert_load": load,
        "repeats": repeats,
        "lru_slots": slots,
        "lru_hit_rate": hits,
        "lru_hit_rate_mean": round(fmean(fmean(rates) for rates in hits.values()), 4),
        "samples": {d: sample(model, tokenizer, prompt) for d, prompt in PROMPTS.items()},
    }


@torch.inference_mode()
def evaluate(model: MixtralForCausalLM, rows: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Mean loss in nats a token over ``rows``, and every layer's choice of experts.

    Returns:
        loss: Mean cross-entropy of all predicted tokens.
        ids_LBTK: Chosen experts, ``(L, B, T, K)``, best first, L layers.
    """
    total, chosen = 0.0, []
    hooks, calls = [], []
    for layer in model.model.layers:
        hooks.append(layer.mlp.gate.register_forward_hook(lambda _, __, out: calls.append(out[2])))
    for part in rows.to(model.device).split(ROWS_PER_CALL):
        calls.clear()
        logits_BTV = model(part[:, :-1], use_cache=False).logits
        total += F.cross_entropy(
            logits_BTV.flatten(0, 1).float(), part[:, 1:].flatten(), reduction="sum"
        ).item()
        chosen.append(torch.stack(calls).unflatten(1, (part.shape[0], -1)).cpu())
    for hook in hooks:
        hook.remove()
    return total / rows[:, 1:].numel(), torch.cat(chosen, dim=1)


def expert_load(ids_BTK: torch.Tensor, num_experts: int) -> list[float]:
    """Share of the routed pairs that each expert of one layer receives."""
    counts = torch.bincount(ids_BTK.reshape(-1), minlength=num_experts)
    return (counts / counts.sum()).tolist()


def repeat_rates(ids_BTK: torch.Tensor) -> dict[str, float]:
    """How often a token's experts are those of the token before it, in one layer."""
    now, before = ids_BTK[:, 1:], ids_BTK[:, :-1]
    shared = (now.unsqueeze(-1) == before.unsqueeze(-2)).any(-1).float().mean().item()
    first = (now[..., 0] == before[..., 0]).float().mean().item()
    return {"same_first_choice": round(first, 4), "expert_kept": round(shared, 4)}


def lru_hit_rate(ids_BTK: torch.Tensor, slots: int) -> float:
    """Hit rate of one layer's LRU cache, token by token; every row starts with it empty.

    Counted as this library does: a pair hits if its expert is resident when its token is
    routed, and no expert that the token needs is evicted; ties go to the lower id.
    """
    hits = 0
    for row in ids_BTK.tolist():
        last_use: dict[int, int] = {}
        for step, experts in enumerate(row):
            needed = set(experts)
            hits += len(needed & last_use.keys())
            surplus = len(needed | last_use.keys()) - slots
            idle = sorted(last_use.keys() - needed, key=lambda expert: (last_use[expert], expert))
            for expert in idle[: max(0, surplus)]:
                del last_use[expert]
            last_use |= dict.fromkeys(needed, step)
    return hits / ids_BTK.numel()


def sample(model: MixtralForCausalLM, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """Text that the model continues ``prompt`` with: drawn, from a fixed seed."""
    torch.manual_seed(0)
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    ids = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=96,
        do_sample=True,
        temperature=TEMPERATURE,
        top_p=0.9,
    )
    return tokenizer.decode(ids[0], skip_special_tokens=True)


def write_report(folder: Path, record: dict) -> None:
    """Write ``training.json`` and ``README.md``, and print what they say."""
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    config = json.loads((folder / "config.json").read_text())
    text = readme(record, config, (folder / "model.safetensors").stat().st_size)
    (folder / "README.md").write_text(text)
    print(text)


def readme(record: dict, config: dict, size_bytes: int) -> str:
    """The model's card, every number taken from ``record`` and ``config``."""
    recipe, domains = record["recipe"], list(record["perplexity"])
    experts, top_k = config["num_local_experts"], config["num_experts_per_tok"]
    peak_loads = [
        max(record["expert_load"][domain][layer][expert] for domain in domains)
        for layer in range(config["num_hidden_layers"])
        for expert in range(experts)
    ]
    table = "\n".join(
        f"| {domain} | {record['perplexity'][domain]:.2f} "
        f"| {fmean(x['same_first_choice'] for x in record['repeats'][domain]):.2f} "
        f"| {fmean(x['expert_kept'] for x in record['repeats'][domain]):.2f} "
        f"| {fmean(record['lru_hit_rate'][domain]):.2f} |"
        for domain in domains
    )
    rows, row_tokens = record["held_out_rows"][domains[0]]
    return README.format(
        **{**recipe, **record},
        size=size_bytes / 2**20,
        rows=rows,
        row_tokens=row_tokens,
        table=table,
        slots=record["lru_slots"],
        chance_first=1 / experts,
        chance_kept=top_k / experts,
        chance_hit=record["lru_slots"] / experts,
        least_load=100 * min(peak_loads),
        even_load=100 / experts,
        wall_min=record["wall_s"] / 60,
        cpu_min=record["cpu_s"] / 60,
        training_text=", ".join(f"{d} {n:,}" for d, n in record["training_text_tokens"].items()),
        temperature=TEMPERATURE,
    ).replace("@samples@", quoted_samples(record["samples"]))


def quoted_samples(samples: dict[str, str]) -> str:
    """Each sample in a code block."""
    return "\n\n".join(f"```text\n{text.rstrip()}\n```" for text in samples.values())


README = """\
# A tiny Mixtral

A `MixtralForCausalLM` small enough to commit, really trained, for examples, tests and
benchmarks of expert offloading. `examples/train_tiny.py` wrote every file here; this page is
made from `training.json`.

{parameters:,} parameters in {weights_dtype} ({size:.1f} MiB): {layers} layers, {experts} experts
of which {top_k} per token, width {width}, expert width {expert_width}, vocabulary {vocab:,}
(byte-level BPE).

## Held-out figures

The weights as saved, computed in float32, on the {rows} rows of {row_tokens} tokens per domain in
`held_out.safetensors`. The last three columns are means over layers and tell how far routing
repeats itself from one token to the next; every layer and expert is in `training.json`.

| domain | perplexity per token | same first expert as the token before | experts kept from the token before | LRU hit rate, {slots} of {experts} resident |
| --- | --- | --- | --- | --- |
{table}
| *even, random routing* | | {chance_first:.3g} | {chance_kept:.3g} | {chance_hit:.3g} |

The LRU cache is one per layer, stepped token by token, empty at the start of each row; over all
domains and layers it hits {lru_hit_rate_mean:.3f} of the time. Training rewards no such
repetition: its only term about routing is load balancing over whole batches (coefficient
{aux_coef}), which leaves experts free to specialise. In the domain that uses it most, every
expert serves at least {least_load:.1f} % of the pairs of its layer; an even load is
{even_load:.1f} %.

## Training

{steps:,} steps of {batch} x {sequence} tokens, {tokens_seen:,} in all, seed {seed}. The steps took
{wall_min:.1f} minutes of wall time and {cpu_min:.1f} minutes of processor time ({device}, {threads}
thread(s), {compute_dtype} products, sessions: {sessions}) with Python {python}, torch {torch},
transformers {transformers}. Training text: {training_text} tokens.

## Text

Training and held-out text come from Python's standard library (PSF licence): `code` is its
source; `prose` its docstrings, longer comments, built-in docstrings and `help()` topics.
`structured` is generated: JSON, tables, arithmetic. The split is by file: no file gives text to
both sides. `held_out.safetensors` holds token ids, int32, one tensor a domain, so that figures
can be compared across Python versions.

## Samples

Drawn at temperature {temperature} from a fixed seed, prompt included.

@samples@
"""
