"""Rules that several hardware records obey; a refusal names value, rule and way out."""

import math
from collections.abc import Iterable, Mapping
from itertools import pairwise

DTYPES = ("fp64", "fp32", "tf32", "fp16", "bf16", "fp8", "fp4", "int8", "int4")
"""Names under which rates are filed; integer types count operations per second."""


def require_positive(record: object, *names: str) -> None:
    """Refuse a field that is not a positive finite number; None (not published) passes."""
    for name in names:
        value = getattr(record, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(
                f"{_title(record)}: {name}={value} must be positive and finite; "
                "give it in the SI unit that its name ends with"
            )


def require_not_negative(record: object, *names: str) -> None:
    """Refuse a field below zero or not finite; None passes."""
    for name in names:
        value = getattr(record, name)
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise ValueError(
                f"{_title(record)}: {name}={value} must be zero or more and finite; "
                "give it in the SI unit that its name ends with"
            )


def require_all_not_negative(
    record: object, name: str, values: Iterable[tuple[int | str, float]]
) -> None:
    """Refuse a list or mapping, given as items, with a number below zero or not finite."""
    for place, value in values:
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(
                f"{_title(record)}: {name}[{place}]={value} must be zero or more and finite; "
                "correct it, or run the calibration again"
            )


def require_text(record: object, *names: str) -> None:
    """Refuse an empty string, above all an empty source."""
    for name in names:
        value = getattr(record, name)
        if value is not None and not value.strip():
            raise ValueError(
                f"{_title(record)}: {name}={value!r} must not be empty; "
                "name the document, the measurement or the assumption"
            )


def require_rates(record: object, rates: Mapping[str, float]) -> None:
    """Refuse a rate filed under an unknown dtype or not positive."""
    for dtype, rate in rates.items():
        if dtype not in DTYPES:
            raise ValueError(
                f"{_title(record)}: flops_per_s has dtype {dtype!r}; use one of {', '.join(DTYPES)}"
            )
        if not (math.isfinite(rate) and rate > 0):
            raise ValueError(
                f"{_title(record)}: flops_per_s.{dtype}={rate} must be positive and finite; "
                "leave out a dtype that the chip does not compute"
            )


def require_increasing(record: object, name: str, values: Iterable[float]) -> None:
    """Refuse a list that does not grow strictly."""
    numbers = list(values)
    if any(not low < high for low, high in pairwise(numbers)):
        raise ValueError(
            f"{_title(record)}: {name}={numbers} must increase strictly; sort it and drop repeats"
        )


def _title(record: object) -> str:
    name = getattr(record, "name", "")
    return f"{type(record).__name__} {name}".strip()
