"""BurstGPT's traces: CSV with Timestamp (s), Model, Request tokens, Response tokens, ...

BurstGPT (arXiv 2401.17644); a response of zero tokens is a failed request.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from sim.workload.trace_lines import MAX_TICKS, broken, csv_rows, token_count
from sim.workload.trace_replay import TraceReplay, TraceRow


@dataclass(kw_only=True)
class BurstgptTrace(TraceReplay):
    """Replay of a BurstGPT trace. Failed requests are passed over and counted."""

    @property
    def ticks_per_s(self) -> int:
        """Seconds."""
        return 1

    def rows(self, seed: int) -> Iterator[TraceRow]:
        """The lines of the file in order."""
        for line, fields in csv_rows(self.path, ("arrival", "prompt_tokens", "output_tokens")):
            output_tokens = token_count(self.path, line, "output_tokens", fields[2], least=0)
            failed = output_tokens == 0
            prompt_tokens = token_count(
                self.path, line, "prompt_tokens", fields[1], least=0 if failed else 1
            )
            arrival_s = self._seconds(line, fields[0])
            yield TraceRow(line, arrival_s, prompt_tokens, output_tokens, failed=failed)

    def _seconds(self, line: int, text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        # Written so that not-a-number fails it too.
        if not abs(value) <= MAX_TICKS:
            problem = f"arrival={text!r} must be a number of seconds up to {MAX_TICKS}"
            raise broken(self.path, line, problem, "correct or remove the line")
        return value
