"""Range checks that every workload's parameters share: value, rule, way out."""

import math

MOST = 100_000_000
"""A million requests take a gigabyte or two of memory: a larger count is a slip of the keyboard."""


def require_count(name: str, value: int | None, example: int = 100) -> None:
    """Refuses a number of things below one or above `MOST`. None, for "not given", passes.

    Raises:
        ValueError: the value is out of range.
    """
    if value is not None and not 1 <= value <= MOST:
        rule = "at least 1" if value < 1 else f"at most {MOST:,}"
        raise ValueError(f"{name}={value} must be {rule}; try {name}={example}")


def require_positive(name: str, value: float | None, example: float = 1.0) -> None:
    """Refuses a rate, a duration or a factor that is not positive and finite. None passes.

    Raises:
        ValueError: the value is zero, negative, infinite or not a number.
    """
    if value is not None and not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}={value} must be positive and finite; try {name}={example}")


def require_not_negative(name: str, value: float) -> None:
    """Refuses a time or a rate below zero.

    Raises:
        ValueError: the value is negative, infinite or not a number.
    """
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name}={value} must be finite and not negative; try {name}=0")
