"""Azure's LLM inference traces: CSV with TIMESTAMP, ContextTokens, GeneratedTokens.

Published with Splitwise (ISCA 2024); timestamps carry seven digits of a second.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache

from sim.workload.trace_lines import broken, csv_rows, token_count
from sim.workload.trace_replay import TraceReplay, TraceRow

_TIMESTAMP = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(?:\+00:00)?", re.ASCII)


@dataclass(kw_only=True)
class AzureTrace(TraceReplay):
    """Replay of an Azure LLM inference trace."""

    @property
    def ticks_per_s(self) -> int:
        """Nanoseconds: finer than any of the files."""
        return 1_000_000_000

    def rows(self, seed: int) -> Iterator[TraceRow]:
        """The lines of the file in order."""
        for line, fields in csv_rows(self.path, ("arrival", "prompt_tokens", "output_tokens")):
            yield TraceRow(
                line,
                self._nanoseconds(line, fields[0]),
                token_count(self.path, line, "prompt_tokens", fields[1]),
                token_count(self.path, line, "output_tokens", fields[2]),
            )

    def _nanoseconds(self, line: int, text: str) -> int:
        # A float, or datetime's microseconds, would lose the seventh digit.
        match = _TIMESTAMP.fullmatch(text)
        try:
            if match is None:
                raise ValueError(text)
            whole_s = _whole_seconds(match[1])
        except ValueError as error:
            problem = f"arrival={text!r} must read like 2023-11-16 18:17:03.9799600"
            raise broken(self.path, line, problem, "correct or remove the line") from error
        return whole_s * self.ticks_per_s + int((match[2] or "0").ljust(9, "0"))


@lru_cache(maxsize=16)
def _whole_seconds(text: str) -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp())
