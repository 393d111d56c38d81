"""Numbers that a user gave, checked where they come in: kind, sign, range, NaN."""

import math
import operator
from typing import Any


def check_integer(name: str, value: Any, *, least: int = 1, most: int | None = None) -> int:
    """`value` as a plain integer between `least` and `most`.

    Raises:
      ValueError: it is no integer (a bool, 2.0 and "2" are none), or out of range.
    """
    try:
        number = None if _is_no_number(value) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise ValueError(f"{name} must be an integer, not {value!r}")
    if number < least or (most is not None and number > most):
        limits = f"at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} must be {limits}, not {value!r}")
    return number


def _is_no_number(value: Any) -> bool:
    """What Python would convert all the same: a bool, text, an array of one number."""
    if isinstance(value, bool | str | bytes) or str(getattr(value, "dtype", "")) == "bool":
        return True
    return getattr(value, "ndim", 0) > 0


def check_number(
    name: str,
    value: Any,
    *,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
) -> float:
    """`value` as a finite float, `above < value`, `least <= value < below`, `value <= most`.

    Raises:
      ValueError: it is no number (a bool and "2" are none), NaN, infinite, or out of range.
    """
    try:
        number = math.nan if _is_no_number(value) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    limits = {
        "above": (above, lambda limit: number > limit),
        "at least": (least, lambda limit: number >= limit),
        "below": (below, lambda limit: number < limit),
        "at most": (most, lambda limit: number <= limit),
    }
    asked = {word: (limit, fits) for word, (limit, fits) in limits.items() if limit is not None}
    if not math.isfinite(number) or not all(fits(limit) for limit, fits in asked.values()):
        words = "".join(f", {word} {limit:g}" for word, (limit, _) in asked.items())
        raise ValueError(f"{name} must be a finite number{words}, not {value!r}")
    return number
