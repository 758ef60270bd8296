"""How near do the scaling bases `lwm_7b_a800_*` come to what LoongServe's authors measured?

Their coefficients are not published. Those in `hardware_models/scaling/` are fitted to what is:
iteration times and ratios in the notebooks and figures of the artifact of arXiv 2404.09526, exact
unless marked as read off a figure. Relative least squares, no coefficient negative. Beside each
error is that of a fit without the row, where enough rows are left to fit to.

    python benchmarks/loongserve_fit.py
"""

import json
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy.optimize import least_squares

from hardware_models.parts import load_scaling
from hardware_models.scaling import ScalingBase
from sim.provenance import commit, machine

Floats = NDArray[np.float64]
NAME = "lwm_7b_a800_tp{}"
ANSWER_TOKENS = 16
"""Decoded in every measurement: half of them are there on average."""

MEASURED = {
    # batch, length: prefill and decode iteration in ms of SP1 TP8, SP2 TP4, SP4 TP2.
    (512, 1_000): ((7757.4, 38.87), (5775.6, 42.55), (5267.1, 42.25)),
    (128, 5_000): ((10157.0, 37.76), (7694.3, 40.34), (7071.8, 41.37)),
    (64, 10_000): ((10791.9, 36.38), (8306.2, 38.15), (7701.1, 40.14)),
    (16, 50_000): ((19506.5, 42.93), (16595.0, 44.92), (15744.4, 45.89)),
    (4, 100_000): ((13546.3, 26.36), (12147.0, 28.03), (11798.4, 28.91)),
    (1, 500_000): ((51135.5, 37.58), (51699.9, 41.61), (53605.9, 37.79)),
}
"""The artifact's notebook behind Figure 3."""
COLUMNS = {(8, 1): 0, (4, 2): 1, (2, 4): 2}
"""TP size and degree -> which of the three."""
MASTERS = {
    (4, 2): {(512, 1_000): 2},
    (2, 4): {(512, 1_000): 4, (128, 5_000): 2, (64, 10_000): 2},
}
"""Masters of those decode iterations, where there were several."""
SINGLE = {
    # TP size, degree, length: prefill and decode iteration in ms, one request.
    (1, 1, 10): (18.580, 11.377),
    (1, 1, 1_000): (68.888, 13.012),
    (2, 4, 100): (38.481, 9.755),
}
LONG_TP1_MS = (20_900.0, 45.0)
"""One request of 100,000 tokens on one GPU: TP8's by the ratios of Figure 2, 0.16 and 0.31."""
OVER_TP1 = {
    # TP size: prefill of one request of so many tokens over TP1's; Figure 2, read off.
    2: {1_000: 0.697, 10_000: 0.572, 100_000: 0.519},
    4: {1_000: 0.534, 10_000: 0.375, 100_000: 0.280},
}
DECODE_OVER_TP1 = {4: 0.86, 8: 0.78}
"""One request of 1,000 tokens; the same figure."""
MASTERS_OVER_ONE = {
    # batch, length: decode iteration with 2 and with 4 masters over that with one.
    (1024, 10): (0.629, 0.459),
    (256, 100): (0.835, 0.675),
    (64, 1_000): (1.098, 1.124),
    (16, 10_000): (1.026, 1.119),
    (4, 50_000): (1.119, 1.031),
    (2, 100_000): (1.113, 1.119),
}
"""SP4 TP2, Figure 14, read off. Its seventh column has one request, which has one master."""


class Row(NamedTuple):
    """One measurement beside the shipped coefficients."""

    base: str
    """Scaling base and degree."""
    label: str
    measured: float
    """Milliseconds, or a ratio."""
    predicted: float
    error: float
    """Relative, of the shipped coefficients."""
    left_out_error: float
    """Relative, of a fit to the other rows; not a number where too few are left."""
    ratio: bool = False


class _Sample(NamedTuple):
    """A measurement as the fit sees it: over / under, or over alone, times coefficients."""

    label: str
    over: Floats
    measured: float
    under: Floats | None = None

    def predicted(self, coefficients: Floats) -> float:
        below = 1.0 if self.under is None else float(self.under @ coefficients)
        return float(self.over @ coefficients) / below


def prefill_rows() -> list[Row]:
    """Every prefill that a degree was fitted to, or the ratios that it was derived from."""
    rows: list[Row] = []
    for tp_size, degree in ((1, 1), (2, 1), (2, 4), (4, 1), (4, 2), (8, 1)):
        base = load_scaling(NAME.format(tp_size))
        one = base.prefill[degree - 1]
        shipped = np.array([one.base_s, one.token_s, one.square_s]) * 1e3
        samples = _prefill_samples(tp_size, degree)
        # Long prompts alone do not tell the constant part.
        fixed = {0: shipped[0]} if min(one.over[1] for one in samples) > 10_000 else {}
        rows += _rows(f"{base.name} x {degree}", samples, shipped, fixed)
    return rows


def decode_rows() -> list[Row]:
    """Every decode iteration, and every ratio between numbers of masters."""
    rows: list[Row] = []
    for tp_size in (1, 2, 4, 8):
        base = load_scaling(NAME.format(tp_size))
        fixed = _assumed(base) if tp_size != 2 else {}
        rows += _rows(base.name, _decode_samples(tp_size), _decode_coefficients(base), fixed)
    return rows


def fit_decode(tp_size: int) -> dict[str, float]:
    """Coefficients in seconds for the file of one TP size, what is assumed taken from it."""
    base = load_scaling(NAME.format(tp_size))
    found = _fit(_decode_samples(tp_size), 5, _assumed(base) if tp_size != 2 else {})
    names = ("base_s", "request_s", "master_request_s", "context_token_s", "exchange_s")
    return dict(zip(names, (found * 1e-3).tolist(), strict=True))


def _prefill_samples(tp_size: int, degree: int) -> list[_Sample]:
    def sample(batch: int, length: int, measured_ms: float) -> _Sample:
        features = np.array([1.0, batch * length, batch * length**2])
        return _Sample(f"{batch} x {length:,}", features, measured_ms)

    found = [
        sample(1, length, prefill_ms)
        for (size, members, length), (prefill_ms, _) in SINGLE.items()
        if (size, members) == (tp_size, degree)
    ]
    if (tp_size, degree) == (1, 1):
        found.append(sample(1, 100_000, LONG_TP1_MS[0]))
    if degree == 1 and tp_size in OVER_TP1:
        alone = load_scaling(NAME.format(1))
        for length, ratio in OVER_TP1[tp_size].items():
            found.append(sample(1, length, ratio * alone.prefill_s(1, length, length**2) * 1e3))
    column = COLUMNS.get((tp_size, degree))
    if column is not None:
        found += [sample(*shape, times[column][0]) for shape, times in MEASURED.items()]
    return found


def _decode_samples(tp_size: int) -> list[_Sample]:
    def features(batch: int, length: int, degree: int, masters: int) -> Floats:
        tokens = batch * (length + ANSWER_TOKENS / 2) / degree
        return np.array([1.0, batch, math.ceil(batch / masters), tokens, float(masters > 1)])

    found = [
        _Sample(f"1 x {length:,}", features(1, length, degree, 1), decode_ms)
        for (size, degree, length), (_, decode_ms) in SINGLE.items()
        if size == tp_size
    ]
    if tp_size == 1:
        found.append(_Sample("1 x 100,000", features(1, 100_000, 1, 1), LONG_TP1_MS[1]))
    if tp_size in DECODE_OVER_TP1:
        measured_ms = DECODE_OVER_TP1[tp_size] * SINGLE[1, 1, 1_000][1]
        found.append(_Sample("1 x 1,000", features(1, 1_000, 1, 1), measured_ms))
    for (size, degree), column in COLUMNS.items():
        for (batch, length), times in MEASURED.items():
            if size == tp_size:
                masters = MASTERS.get((size, degree), {}).get((batch, length), 1)
                over = features(batch, length, degree, masters)
                found.append(_Sample(f"{batch} x {length:,}", over, times[column][1]))
    if tp_size == 2:
        for (batch, length), ratios in MASTERS_OVER_ONE.items():
            for masters, ratio in zip((2, 4), ratios, strict=True):
                over, under = (features(batch, length, 4, some) for some in (masters, 1))
                label = f"{batch} x {length:,}, {masters} masters over one"
                found.append(_Sample(label, over, ratio, under))
    return found


def _assumed(base: ScalingBase) -> dict[int, float]:
    """Coefficients that no row of this base tells: those of masters, and of TP1's batches."""
    shipped = _decode_coefficients(base)
    return {place: shipped[place] for place in ((1, 2, 4) if base.tp_size == 1 else (2, 4))}


def _decode_coefficients(base: ScalingBase) -> Floats:
    one = base.decode
    return 1e3 * np.array(
        [one.base_s, one.request_s, one.master_request_s, one.context_token_s, one.exchange_s]
    )


def _rows(
    base: str, samples: Sequence[_Sample], shipped: Floats, fixed: dict[int, float]
) -> list[Row]:
    rows: list[Row] = []
    for place, one in enumerate(samples):
        others = [*samples[:place], *samples[place + 1 :]]
        left_out = math.nan
        if len(others) >= len(shipped) - len(fixed):
            again = _fit(others, len(shipped), fixed)
            left_out = one.predicted(again) / one.measured - 1
        found = one.predicted(shipped)
        ratio = one.under is not None
        error = found / one.measured - 1
        rows.append(Row(base, one.label, one.measured, found, error, left_out, ratio))
    return rows


def _fit(samples: Sequence[_Sample], count: int, fixed: dict[int, float]) -> Floats:
    """Least squares of the relative errors over what is not fixed, none of it negative."""
    free = [place for place in range(count) if place not in fixed]
    # So that every coefficient is about one.
    scale = np.array([max(one.over[place] / one.measured for one in samples) for place in free])

    def whole(scaled: Floats) -> Floats:
        coefficients = np.zeros(count)
        coefficients[free] = scaled / scale
        coefficients[list(fixed)] = list(fixed.values())
        return coefficients

    def errors(scaled: Floats) -> list[float]:
        found = whole(scaled)
        return [one.predicted(found) / one.measured - 1 for one in samples]

    solve: Callable[..., object] = least_squares
    found = solve(errors, np.full(len(free), 0.3), bounds=(0, np.inf), xtol=1e-12, ftol=1e-12)
    return whole(found.x)  # pyright: ignore[reportAttributeAccessIssue]


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:+.1%}"


def main() -> None:
    """Print both tables, and what the decode coefficients would be if they were fitted again."""
    out = Console(width=120)
    worst: dict[str, float] = {}
    for kind, rows in (("prefill", prefill_rows()), ("decode", decode_rows())):
        table = Table("base", kind, "measured", "ours", "error", "left out")
        for row in rows:
            shown = [f"{row.measured:.4g}", f"{row.predicted:.4g}"]
            shown = shown if row.ratio else [f"{text} ms" for text in shown]
            errors = (_percent(row.error), _percent(row.left_out_error))
            table.add_row(row.base, row.label, *shown, *errors)
        out.print(table)
        worst[f"{kind}_worst_error"] = max(abs(row.error) for row in rows if not row.ratio)
    fitted = {NAME.format(size): fit_decode(size) for size in (1, 2, 4, 8)}
    for name, coefficients in fitted.items():
        out.print(name, ", ".join(f"{key} {value:.4g}" for key, value in coefficients.items()))
    print(json.dumps({**worst, "commit": commit(), "machine": machine()}))


if __name__ == "__main__":
    main()
