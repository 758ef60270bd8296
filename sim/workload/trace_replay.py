"""What all replays of published traces share: order, scaling, limits, chunks."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sim.workload.base import CHUNK_ROWS, RequestColumns, Workload
from sim.workload.checks import require_count, require_positive
from sim.workload.trace_lines import broken


class TraceRow(NamedTuple):
    """One line of a trace."""

    line: int
    ticks: float
    """Arrival in the trace's own unit; an int where the file is finer than a float."""
    prompt_tokens: int
    output_tokens: int
    prefix_hashes: tuple[int, ...] = ()
    failed: bool = False
    """The request got no answer: it is passed over and counted."""
    retrieved: tuple[tuple[int, ...], ...] = ()
    """Documents after each stage of its search, where the trace has them."""


@dataclass(kw_only=True)
class TraceReplay(Workload, ABC):
    """Requests of a file, read as a stream. Arrivals count from the first request."""

    path: str
    """The trace: a text file in its published format, plain or `.gz`."""
    scale: float = 1.0
    """Factor on the rate: 2.0 makes requests arrive twice as fast (ratio)."""
    limit: int | None = None
    """Stop after so many requests; null reads all."""
    max_input_tokens: int | None = None
    """Longer prompts are cut to it; null cuts none (tokens)."""

    def __post_init__(self) -> None:
        """Refuses factors and limits out of range; the file is opened only when it is read."""
        super().__post_init__()
        require_positive("scale", self.scale)
        require_count("limit", self.limit)
        require_count("max_input_tokens", self.max_input_tokens, 4096)

    @abstractmethod
    def rows(self, seed: int) -> Iterator[TraceRow]:
        """The lines of the file in order.

        Raises:
            ValueError: a line is broken (file and line named).
        """

    @property
    @abstractmethod
    def ticks_per_s(self) -> int:
        """How many units of the trace's time make a second."""

    def columns(self, seed: int, chunk_rows: int = CHUNK_ROWS) -> Iterator[RequestColumns]:
        """All requests in order of arrival, in chunks (see `Workload.columns`)."""
        rows = self._in_order(seed)
        first: float | None = None
        while chunk := list(islice(rows, chunk_rows)):
            served = [row for row in chunk if not row.failed]
            if first is None and served:
                first = served[0].ticks
            hashes = [row.prefix_hashes for row in served]
            retrieved = [row.retrieved for row in served]
            # Ticks are subtracted before they become floats: nothing is lost to rounding.
            since = [(row.ticks - (first or 0)) / self.ticks_per_s for row in served]
            yield RequestColumns(
                np.array(since, dtype=np.float64) / self.scale,
                _cut([row.prompt_tokens for row in served], self.max_input_tokens),
                _cut([row.output_tokens for row in served], self.max_output_tokens),
                hashes if any(hashes) else None,
                num_skipped=len(chunk) - len(served),
                retrieved=retrieved if any(retrieved) else None,
            )
        if first is None:
            raise broken(self.path, 1, "no request follows and one must", "fetch the file again")

    def _in_order(self, seed: int) -> Iterator[TraceRow]:
        """Lines until the limit, none of them earlier than the one before."""
        last: float | None = None
        num_served = 0
        for row in self.rows(seed):
            if last is not None and row.ticks < last:
                problem = f"arrival {row.ticks} is before {last} and must not go backwards"
                raise broken(self.path, row.line, problem, "sort the file by arrival")
            last = row.ticks
            yield row
            num_served += not row.failed
            if num_served == self.limit:
                return


def _cut(lengths: list[int], limit: int | None) -> NDArray[np.int64]:
    values = np.array(lengths, dtype=np.int64)
    return values if limit is None else np.minimum(values, limit)
