"""Seconds of collectives from a table of measurements, and how far each answer rests on them.

Between measured sizes: a monotone cubic through the logarithms (PCHIP; Fritsch and Butland 1984).
Outside: latency + bytes / bandwidth, fitted to the curve and scaled to meet its nearest point.
What `payload_bytes` means for each operation stands in `sim/costs/alpha_beta.py`.
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from math import exp, log
from typing import NamedTuple, Protocol

import numpy as np

from sim.costs.monotone import monotone_cubic

REMEMBERED = 1 << 16
"""Answers that a table keeps at hand."""


class Source(Enum):
    """What a number of seconds rests on."""

    measured = "measured"
    """This very point was measured."""
    interpolated = "interpolated"
    """Between two measured sizes."""
    extrapolated = "extrapolated"
    """Beyond the measured sizes, or from another GPU by a rule."""
    datasheet = "datasheet"
    """From links alone; nothing was measured."""


class Estimate(NamedTuple):
    """Seconds of a collective and what they rest on."""

    seconds: float
    source: Source


class CollectiveCost(Protocol):
    """Seconds of collectives among the GPUs of one machine or cluster. Pure."""

    def seconds(
        self, operation: str, num_ranks: int, payload_bytes: float, num_nodes: int = 1
    ) -> Estimate:
        """Seconds of one collective on an otherwise idle network.

        Args:
            operation: all_reduce, all_gather, reduce_scatter, all_to_all, broadcast or send_recv.
            num_ranks: GPUs that take part, on all nodes together; one alone takes no time.
            payload_bytes: the larger of one rank's input and output, as nccl-tests counts size.
            num_nodes: nodes that they are on.

        Raises:
            ValueError: there is nothing to answer from; the message lists what there is.
        """
        ...


class Measured(NamedTuple):
    """One row of a table of collectives."""

    operation: str
    dtype: str
    num_ranks: int
    num_nodes: int
    payload_bytes: float
    seconds: float


@dataclass(frozen=True, slots=True)
class AlphaBeta:
    """One collective among given ranks: a fixed time and a time for every byte of payload."""

    latency_s: float
    s_per_byte: float

    def seconds(self, payload_bytes: float) -> float:
        """Seconds of one collective."""
        return self.latency_s + self.s_per_byte * payload_bytes


def fit_alpha_beta(payload_bytes: Sequence[float], seconds: Sequence[float]) -> AlphaBeta:
    """The latency and bandwidth, both at least zero, with the least relative squared errors."""
    measured = np.asarray(seconds, np.float64)
    fixed, moved = 1 / measured, np.asarray(payload_bytes, np.float64) / measured
    # Normal equations of |fixed * latency + moved * s_per_byte - 1|, then the quadrant's edges.
    a, b, c = float(fixed @ fixed), float(fixed @ moved), float(moved @ moved)
    p, q = float(fixed.sum()), float(moved.sum())
    if p * c <= q * b:
        return AlphaBeta(0.0, q / c)
    if a * q <= b * p:
        return AlphaBeta(p / a, 0.0)
    return AlphaBeta((p * c - q * b) / (a * c - b * b), (a * q - b * p) / (a * c - b * b))


class Curve:
    """Seconds over payload of one operation among given ranks."""

    def __init__(self, points: Iterable[tuple[float, float]], bandwidth_ratio: float = 1.0) -> None:
        """Take measurements; several of one payload count as their median.

        Args:
            points: payload in bytes and seconds, all positive, of at least two payloads.
            bandwidth_ratio: bandwidth of the links asked about over that of the measured ones.
        """
        by_payload: defaultdict[float, list[float]] = defaultdict(list)
        for payload, seconds in points:
            by_payload[payload].append(seconds)
        self.payloads = sorted(by_payload)
        self.measured_s = [float(np.median(by_payload[payload])) for payload in self.payloads]
        self.fit = fit_alpha_beta(self.payloads, self.measured_s)
        self._here = AlphaBeta(self.fit.latency_s, self.fit.s_per_byte / bandwidth_ratio)
        self._logs: list[float] = np.log(self.payloads).tolist()
        self._cubic = monotone_cubic(self._logs, np.log(self.measured_s))
        self._ratio = bandwidth_ratio

    def at(self, payload_bytes: float) -> Estimate:
        """Seconds of a payload, zero or more."""
        i = bisect_left(self.payloads, payload_bytes)
        if i < len(self.payloads) and self.payloads[i] == payload_bytes:
            estimate = Estimate(self.measured_s[i], Source.measured)
        elif 0 < i < len(self.payloads):
            a, b, c, d = self._cubic[i - 1]
            x = log(payload_bytes) - self._logs[i - 1]
            estimate = Estimate(exp(((a * x + b) * x + c) * x + d), Source.interpolated)
        else:
            nearest = min(i, len(self.payloads) - 1)
            scale = self.fit.seconds(payload_bytes) / self.fit.seconds(self.payloads[nearest])
            estimate = Estimate(scale * self.measured_s[nearest], Source.extrapolated)
        if self._ratio == 1:
            return estimate
        slower = self._here.seconds(payload_bytes) / self.fit.seconds(payload_bytes)
        return Estimate(estimate.seconds * slower, Source.extrapolated)


class CollectiveTable:
    """The cost of collectives from one table of one GPU and data type."""

    def __init__(
        self,
        rows: Iterable[Measured],
        dtype: str,
        *,
        name: str,
        bandwidth_ratio: float | None = None,
    ) -> None:
        """Take the rows of a data type.

        Args:
            rows: measurements; those of other types are skipped.
            dtype: as the rows name it.
            name: of the table, for messages: GPU, library, version.
            bandwidth_ratio: where the table stands in for another GPU, that one's link bandwidth
                over the measured one's; every answer then counts as extrapolated.

        Raises:
            ValueError: no row is of that type.
        """
        kept: defaultdict[tuple[str, int, int], list[tuple[float, float]]] = defaultdict(list)
        types: set[str] = set()
        for row in rows:
            types.add(row.dtype)
            if row.dtype == dtype:
                key = (row.operation, row.num_ranks, row.num_nodes)
                kept[key].append((row.payload_bytes, row.seconds))
        if not kept:
            raise ValueError(
                f"{name} has no dtype {dtype!r}; there are: {', '.join(sorted(types)) or 'none'}"
            )
        self.name = name
        self.dtype = dtype
        self._proxy = bandwidth_ratio is not None
        # A curve needs two sizes; rows that strayed into a column of their own make none.
        self.curves = {
            key: Curve(points, bandwidth_ratio or 1.0)
            for key, points in sorted(kept.items())
            if len({payload for payload, _ in points}) > 1
        }
        """By operation, ranks, nodes."""
        self._answers: dict[tuple[str, int, float, int], Estimate] = {}

    def seconds(
        self, operation: str, num_ranks: int, payload_bytes: float, num_nodes: int = 1
    ) -> Estimate:
        """Seconds of one collective; see `CollectiveCost`."""
        key = (operation, num_ranks, payload_bytes, num_nodes)
        answer = self._answers.get(key)
        if answer is None:
            answer = self._answer(*key)
            if len(self._answers) >= REMEMBERED:
                self._answers.clear()
            self._answers[key] = answer
        return answer

    def _answer(
        self, operation: str, num_ranks: int, payload_bytes: float, num_nodes: int
    ) -> Estimate:
        if not 0 <= payload_bytes < np.inf:
            raise ValueError(
                f"payload_bytes={payload_bytes} must be zero or more and finite; give bytes"
            )
        operations = sorted({known for known, _, _ in self.curves})
        if operation not in operations:
            raise ValueError(
                f"{self.name} has no operation {operation!r} in {self.dtype}; "
                f"there are: {', '.join(operations)}"
            )
        if num_ranks == 1:
            return Estimate(0.0, Source.measured)
        curve = self.curves.get((operation, num_ranks, num_nodes))
        if curve is None:
            there = [(r, n) for known, r, n in self.curves if known == operation]
            listed = ", ".join(f"{r} on {n}" for r, n in there)
            raise ValueError(
                f"{self.name} has no {operation} among num_ranks={num_ranks} on "
                f"num_nodes={num_nodes}; there are (ranks on nodes): {listed}"
            )
        seconds, source = curve.at(payload_bytes)
        return Estimate(seconds, Source.extrapolated if self._proxy else source)
