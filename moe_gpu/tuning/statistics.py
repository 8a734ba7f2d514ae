"""Curves of loads against quality, with paired bootstrap intervals over rows of text.

Shape suffixes: N rows, R resamples, P points of a curve.
"""

import torch

from .quality import Outcome


def resamples(rows: int, draws: int = 2000, seed: int = 0) -> torch.Tensor:
    """Return draws of row indices, ``(1 + draws, N)``; the first is every row once."""
    generator = torch.Generator().manual_seed(seed)
    drawn_RN = torch.randint(0, rows, (draws, rows), generator=generator)
    return torch.cat([torch.arange(rows)[None], drawn_RN])


def interval(values_R: torch.Tensor) -> tuple[float, float]:
    """Return the central 95 % of resampled values; the first, the estimate, is not one of them."""
    values_R = values_R[1:]
    low, high = values_R.double().quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return low.item(), high.item()


def perplexity_change(outcome: Outcome, exact: Outcome, index_RN: torch.Tensor) -> torch.Tensor:
    """Return the change of perplexity against exact routing in percent, ``(R,)``."""
    delta_N = (outcome.nll_N - exact.nll_N) / outcome.tokens
    return (delta_N[index_RN].mean(1).exp() - 1) * 100


def kl_per_token(outcome: Outcome, index_RN: torch.Tensor) -> torch.Tensor:
    """Return the KL divergence from exact routing in nats per token, ``(R,)``."""
    return outcome.kl_N[index_RN].mean(1) / outcome.tokens


def loads_per_token(outcome: Outcome, index_RN: torch.Tensor) -> torch.Tensor:
    """Return the loads per token, ``(R,)``."""
    return outcome.loads_N[index_RN].mean(1) / outcome.tokens


def loads_at(cost_RP: torch.Tensor, loads_RP: torch.Tensor, limit: float) -> torch.Tensor:
    """Interpolate the loads at which a curve first costs ``limit``, ``(R,)``.

    A curve that never costs as much gives its last loads: a bound, not an extrapolation.

    Args:
        cost_RP: Along the curve, from exact routing (0) on; made monotone from the left.
        loads_RP: At the same points.
        limit: In the unit of the cost.
    """
    cost_RP = cost_RP.cummax(1).values
    upper_R = (cost_RP < limit).sum(1).clamp(1, cost_RP.shape[1] - 1)
    take = lambda x_RP, i_R: x_RP.gather(1, i_R[:, None])[:, 0]  # noqa: E731
    x0, x1 = take(cost_RP, upper_R - 1), take(cost_RP, upper_R)
    share_R = ((limit - x0) / (x1 - x0).clamp(min=1e-12)).clamp(0, 1)
    return take(loads_RP, upper_R - 1) * (1 - share_R) + take(loads_RP, upper_R) * share_R


def cost_at(cost_RP: torch.Tensor, loads_RP: torch.Tensor, loads: float) -> torch.Tensor:
    """Interpolate what a curve costs at a number of loads, ``(R,)``; NaN beyond its ends.

    Linear in the logarithms of both, as such curves nearly are; points that cost nothing are
    left out by giving NaN between them and the next.

    Args:
        cost_RP: Along the curve, positive, without exact routing.
        loads_RP: At the same points, falling.
        loads: Where to read the curve.
    """
    x_RP, y_RP = loads_RP.clamp(min=1e-12).log(), cost_RP.clamp(min=1e-12).log()
    x = torch.tensor(loads, dtype=x_RP.dtype).log()
    found_R = torch.full((len(x_RP),), torch.nan, dtype=y_RP.dtype)
    for p in range(x_RP.shape[1] - 1):
        x0, x1 = x_RP[:, p], x_RP[:, p + 1]
        inside = (x1 <= x) & (x <= x0) & found_R.isnan()
        share = ((x0 - x) / (x0 - x1).clamp(min=1e-12)).clamp(0, 1)
        found_R = torch.where(inside, y_RP[:, p] * (1 - share) + y_RP[:, p + 1] * share, found_R)
    return found_R.exp()
