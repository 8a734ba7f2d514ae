"""Does exact routing through the offloader depend on what happened to be resident? It must not."""

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

import moe_gpu

from .measure import Rows, decode

MAX_TEXTS = 4
PREFILL = 12  # ids of a text that go in as one call
STEPS = 8  # then this many of them go in one by one
HISTORIES = 7
HISTORY = 32  # tokens decoded backwards to bring the cache into another state
POLICIES = (moe_gpu.Exact(), moe_gpu.MassBudget(1.0), moe_gpu.CacheBonus(1.0))


def logits_of(model: PreTrainedModel, row: torch.Tensor) -> list[torch.Tensor]:
    """Return the logits of a prefill of ``row`` and of decoding it token by token."""
    with torch.no_grad():
        prefill = model(input_ids=row[None, :PREFILL].to(model.device)).logits[0]
    return [prefill, *decode(model, row[: STEPS + 1])]


def verify(
    model: PreTrainedModel,
    moe: "moe_gpu.AttachedMoE",
    twin: PreTrainedModel,
    texts: Rows,
    on_history: Callable[[], None],
) -> dict:
    """Compare exact routing with part of the experts resident against all of them, bit by bit.

    Args:
        model: With ``moe`` attached, part of the experts resident.
        moe: The attachment.
        twin: A second copy of the model, attached with every expert resident.
        texts: ``(name, ids)`` to run: one of each name, :data:`MAX_TEXTS` at most.
        on_history: Called after each of the :data:`HISTORIES` states of the cache.

    Returns:
        ``passed``, a ``sentence`` for the user, and the counts behind it.
    """
    texts = list(dict(texts).items())[:MAX_TEXTS]
    wanted = [logits_of(twin, row) for _, row in texts]
    counts = {"texts": len(texts), "histories": 0, "logits": 0, "loads": -moe.metrics().loads}

    def difference(history: str) -> str | None:
        moe.set_policy(moe_gpu.Exact())
        for (name, row), want in zip(texts, wanted, strict=True):
            for call, (a, b) in enumerate(zip(logits_of(model, row), want, strict=True)):
                if not torch.equal(a, b):
                    place = "prefill" if call == 0 else f"token {call}"
                    worst = (a.float() - b.float()).abs().max().item()
                    return f"{name}, {place}, cache {history}, by up to {worst:.3g}"
                counts["logits"] += a.numel()
        counts["histories"] += 1
        on_history()
        return None

    found = difference("as the measurements left it")
    for i in range(HISTORIES - 1):
        policy, (name, row) = POLICIES[i % len(POLICIES)], texts[i % len(texts)]
        if found is None:
            moe.set_policy(policy)
            for _ in decode(model, row.flip(0)[:HISTORY]):
                pass
            found = difference(f"after {name} backwards under {policy}")
    counts["loads"] += moe.metrics().loads

    sentence = (
        f"exact routing gives bitwise the logits of the model with every expert resident: "
        f"{counts['logits']:,} logits, {counts['texts']} texts, {counts['histories']} cache "
        f"histories, {counts['loads']:,} experts loaded on the way"
    )
    if not counts["loads"]:
        sentence += " (so nothing ever moved, and this shows little)"
    if found is not None:
        sentence = f"exact routing differs from the model with every expert resident: {found}"
    return {"passed": found is None, "sentence": sentence} | counts
