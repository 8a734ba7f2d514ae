"""How sensitive each layer is: what a swap of the same price costs there.

The KL divergence from exact routing is about quadratic in the change of a layer's output. For a
layer l of sensitivity s_l, swaps of squared prices c cost about ``s_l * sum(c)``; to save most
loads at a total cost, the last swap accepted must cost the same everywhere, so the threshold on
the price of a swap is proportional to ``1 / sqrt(s_l)``.

Shape suffixes: L layers, N rows of text, T tokens.
"""

from dataclasses import dataclass

import torch
from torch import nn

from ..huggingface.attached import AttachedMoE
from ..policies import Exact, QualityBudget
from .quality import Evaluation, Job
from .simulate import CacheRule

LARGEST = 4.0  # factor; beyond it the estimate says more about its noise
FEWEST_SWAPS = 50


@dataclass(frozen=True)
class Sensitivity:
    """What a calibration found.

    Attributes:
        kl_per_price: KL divergence in nats per unit of squared price, by layer; None where too
            few swaps happened to tell.
        layer_scale: For :class:`~moe_gpu.policies.QualityBudget`: geometric mean 1 over the layers
            that could be told, each in [1/4, 4].
        swaps: Pairs swapped in each layer's own measurement.
    """

    kl_per_price: tuple[float | None, ...]
    layer_scale: tuple[float, ...]
    swaps: tuple[int, ...]


def layer_sensitivity(
    model: nn.Module | AttachedMoE,
    rows_NT: torch.Tensor,
    slots: int,
    budget: float = 0.1,
    cache: CacheRule | None = None,
    batch_rows: int = 256,
) -> Sensitivity:
    """Measure each layer's sensitivity by swapping in that layer alone.

    Args:
        model: As in :class:`~moe_gpu.tuning.quality.Evaluation`.
        rows_NT: Token ids, ``(N, T + 1)``; not the rows that quality is reported on afterwards.
        slots: Resident experts per layer.
        budget: Of the swaps.
        cache: Who leaves; the default of ``attach``.
        batch_rows: Rows in one forward pass.

    Raises:
        ValueError: As ``Evaluation``; or slots that leave nothing to swap.
    """
    evaluation = Evaluation(model, rows_NT, batch_rows=batch_rows)
    L, E = evaluation.num_layers, evaluation.num_experts
    if slots >= E:
        raise ValueError(f"slots must be under the {E} experts, got {slots}: nothing is swapped")
    cache = cache or CacheRule()
    alone = [tuple(float(other == layer) for other in range(L)) for layer in range(L)]
    jobs = [Job(QualityBudget(budget, scale), slots, cache) for scale in alone]
    found = dict(evaluation.run([Job(Exact(), slots, cache), *jobs]))
    swaps = [int(found[job].swaps_N.sum()) for job in jobs]
    costs = [
        (found[job].kl_N.sum() / found[job].price_N.sum()).item() if n >= FEWEST_SWAPS else None
        for job, n in zip(jobs, swaps, strict=True)
    ]
    return Sensitivity(tuple(costs), _scale(costs), tuple(swaps))


def _scale(costs: list[float | None]) -> tuple[float, ...]:
    known = [cost for cost in costs if cost is not None and cost > 0]
    if not known:
        return (1.0,) * len(costs)
    mean = torch.tensor(known, dtype=torch.float64).log().mean().exp().item()
    return tuple(
        min(LARGEST, max(1 / LARGEST, (mean / cost) ** 0.5)) if cost in known else 1.0
        for cost in costs
    )
