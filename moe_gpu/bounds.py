"""How arguments are refused: the message names argument, bound and value."""

import math
from collections.abc import Collection

from .kernels.route_ref import FLOAT32_MAX


def check_share(name: str, value: float, above_zero: bool = False) -> None:
    """Refuse what is no share in [0, 1], or in (0, 1].

    Raises:
        TypeError: Not a number.
        ValueError: Outside the bounds.
    """
    check_number(name, value)
    if not (0 <= value <= 1) or (above_zero and value == 0):
        raise ValueError(f"{name} must lie in {'(' if above_zero else '['}0, 1], got {value}")


def check_number(name: str, value: float) -> None:
    """Refuse what is no int or float.

    Raises:
        TypeError: Not a number.
    """
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")


def check_int(name: str, value: int, low: int, high: int | None = None) -> None:
    """Refuse what is no int in [low, high], or ``>= low``.

    Raises:
        TypeError: Not an int.
        ValueError: Outside the bounds.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < low or (high is not None and value > high):
        bound = f">= {low}" if high is None else f"in [{low}, {high}]"
        raise ValueError(f"{name} must be {bound}, got {value}")


def check_real(name: str, value: float, low: float, high: float = math.inf) -> None:
    """Refuse what is no finite number in [low, high], within float32.

    Raises:
        TypeError: Not a number.
        ValueError: Outside the bounds.
    """
    check_number(name, value)
    if not (math.isfinite(value) and low <= value <= min(high, FLOAT32_MAX)):
        bound = f">= {low:g}, within float32" if high == math.inf else f"in [{low:g}, {high:g}]"
        raise ValueError(f"{name} must be finite and {bound}, got {value}")


def check_one_of(name: str, value: str, known: Collection[str]) -> None:
    """Refuse what is none of the known names.

    Raises:
        ValueError: Lists them.
    """
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")
