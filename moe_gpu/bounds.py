"""How policies refuse arguments: the message names argument, bound and value."""

import math

from .kernels.route_ref import FLOAT32_MAX


def check_strength(name: str, value: float) -> None:
    """Refuse what is no finite number ``>= 0`` within float32.

    Raises:
        TypeError: Not a number.
        ValueError: Outside the bounds.
    """
    check_number(name, value)
    if not (math.isfinite(value) and 0 <= value <= FLOAT32_MAX):
        raise ValueError(f"{name} must be finite and >= 0, within float32, got {value}")


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


def check_count(name: str, value: int) -> None:
    """Refuse what is no int ``>= 0``.

    Raises:
        TypeError: Not an int.
        ValueError: Below 0.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 0:
        raise ValueError(f"{name} must be >= 0, got {value}")
