"""Hit rate, traffic and perplexity of one policy, with decode semantics.

Every token is its own forward call of the attached model with a KV cache, as in generation, so
the expert cache steps token by token. One wide batch over the same text would hide both the
misses and the cost of swapping.
"""

import math
import time
from collections.abc import Callable, Iterator

import torch
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel

import moe_gpu

WARM_UP = 32  # tokens before counting starts, so that no policy pays for filling the slots

Rows = list[tuple[str, torch.Tensor]]


POLICIES = {
    "bonus": moe_gpu.CacheBonus,
    "mass": moe_gpu.MassBudget,
    "quality": moe_gpu.QualityBudget,
}


def make_policy(name: str, strength: float) -> moe_gpu.policies.Policy:
    """Build the policy behind a name of the command line."""
    if name == "exact":
        return moe_gpu.Exact()
    return POLICIES[name](strength)


def label(policy: tuple[str, float]) -> str:
    """Return a policy as the command line spells it."""
    name, strength = policy
    return name if name == "exact" else f"{name}:{strength:g}"


def decode(model: PreTrainedModel, row: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the logits after each id of ``row`` but the last, one forward call each."""
    cache = DynamicCache(config=model.config)
    for token in row[:-1].to(model.device).unbind(0):  # none for a single id
        with torch.no_grad():
            yield model(input_ids=token.view(1, 1), past_key_values=cache, use_cache=True).logits[
                0, -1
            ]


def measure(
    model: PreTrainedModel,
    moe: "moe_gpu.AttachedMoE",
    rows: Rows,
    policy: tuple[str, float],
    on_token: Callable[[], None],
) -> dict:
    """Decode ``rows`` under one policy and return its line of the table.

    Args:
        model: With ``moe`` attached.
        moe: The attachment.
        rows: ``(domain, ids)``; the KV cache starts afresh at each, the expert cache does not.
        policy: Name and strength, see :func:`make_policy`.
        on_token: Called after each counted token.
    """
    moe.set_policy(make_policy(*policy))
    for _ in decode(model, rows[-1][1][: WARM_UP + 1]):
        pass
    moe.reset_metrics()

    nlls: dict[str, list[float]] = {}
    start = time.perf_counter()
    for domain, row in rows:
        for logits, wanted in zip(decode(model, row), row[1:].tolist(), strict=True):
            nll = -F.log_softmax(logits.float(), dim=-1)[wanted]
            nlls.setdefault(domain, []).append(nll.item())
            on_token()
    seconds = time.perf_counter() - start

    counts = moe.metrics()
    every_nll = sum(nlls.values(), [])
    if counts.tokens != len(every_nll):
        raise AssertionError(f"decoded {len(every_nll)} tokens, but the gates saw {counts.tokens}")
    return {
        "policy": label(policy),
        "tokens": counts.tokens,
        "hit_rate": counts.hit_rate,
        "swaps_per_token": counts.swaps / counts.tokens,
        "loads_per_token": counts.loads / counts.tokens,
        "mb_per_token": counts.bytes_loaded / 1e6 / counts.tokens,
        "loads_by_tier": counts.loads_by_tier,
        "tokens_per_second": counts.tokens / seconds,
        "perplexity": perplexity(every_nll),
        "perplexity_by_domain": {domain: perplexity(nll) for domain, nll in nlls.items()},
        "route_path": counts.route_path,
    }


def perplexity(nlls: list[float]) -> float:
    """Return ``exp`` of the mean negative log likelihood."""
    return math.exp(math.fsum(nlls) / len(nlls))


def compare(rows: list[dict]) -> list[dict]:
    """Add each row's perplexity against the first one's, in percent."""
    exact = rows[0]["perplexity"]
    return [
        row | {"perplexity_change_percent": 100 * (row["perplexity"] / exact - 1)} for row in rows
    ]
