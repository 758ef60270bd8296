"""Lengths of real requests whose arrivals were not published, sent at a Poisson rate.

CSV with num_prefill_tokens and num_decode_tokens, as vidur ships them.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from sim.seeding import generator
from sim.workload.base import CHUNK_ROWS
from sim.workload.checks import require_positive
from sim.workload.trace_lines import csv_rows, token_count
from sim.workload.trace_replay import TraceReplay, TraceRow


@dataclass(kw_only=True)
class LengthsTrace(TraceReplay):
    """Real lengths in the order of the file; the first request arrives at zero."""

    rate_per_s: float
    """Mean requests per second, before `scale`."""

    def __post_init__(self) -> None:
        """Refuses a rate that is not positive."""
        super().__post_init__()
        require_positive("rate_per_s", self.rate_per_s)

    @property
    def ticks_per_s(self) -> int:
        """Seconds."""
        return 1

    def rows(self, seed: int) -> Iterator[TraceRow]:
        """The lines of the file in order, each with an arrival drawn for it."""
        gaps_s = self._gaps_s(seed)
        arrival_s = 0.0
        for line, (prompt, answer) in csv_rows(self.path, ("prompt_tokens", "output_tokens")):
            arrival_s += next(gaps_s)
            yield TraceRow(
                line,
                arrival_s,
                token_count(self.path, line, "prompt_tokens", prompt),
                token_count(self.path, line, "output_tokens", answer),
            )

    def _gaps_s(self, seed: int) -> Iterator[float]:
        rng = generator(seed, "arrivals")
        while True:
            yield from (rng.standard_exponential(CHUNK_ROWS) / self.rate_per_s).tolist()
