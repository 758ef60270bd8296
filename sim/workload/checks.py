"""Range checks that every workload's parameters share: value, rule, way out."""

import math


def require_count(name: str, value: int | None, example: int = 100) -> None:
    """Refuses a number of things below one. None, for "not given", passes.

    Raises:
        ValueError: the value is below one.
    """
    if value is not None and value < 1:
        raise ValueError(f"{name}={value} must be at least 1; try {name}={example}")


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
