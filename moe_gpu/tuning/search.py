"""Which budgets to measure: a coarse geometric grid, then finer ones around the target."""

from collections.abc import Mapping
from itertools import takewhile

COARSE = (1 / 256, 1 / 64, 1 / 16, 1 / 4, 1.0)  # at 1 no swap is refused
BETWEEN = 3  # budgets measured within a step of the coarser grid
FINEST = 1.15  # ratio of neighbours at which the search ends


def largest_within(is_within: Mapping[float, bool]) -> float | None:
    """Return the largest budget that meets the target, as every smaller one measured does.

    A curve that comes back within the target owes that to noise.
    """
    return max(takewhile(is_within.__getitem__, sorted(is_within)), default=None)


def next_budgets(is_within: Mapping[float, bool]) -> list[float]:
    """Return the budgets to measure next, ascending; none when the search is over.

    Args:
        is_within: Whether each budget measured so far meets the target.
    """
    if not is_within:
        return list(COARSE)
    low = largest_within(is_within)
    high = min((budget for budget in is_within if low is not None and budget > low), default=None)
    if high is None or high / low < FINEST:
        return []
    ratio = (high / low) ** (1 / (BETWEEN + 1))
    # three digits: what is printed is what was measured
    finer = [float(f"{low * ratio**step:.3g}") for step in range(1, BETWEEN + 1)]
    return [budget for budget in finer if low < budget < high]
