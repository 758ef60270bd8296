"""Mooncake's traces: JSON Lines with timestamp (ms), input_length, output_length, hash_ids.

Mooncake (FAST 2025), section 4; requests that share leading hash ids share that much prompt.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

from sim.requests import HASH_BLOCK_TOKENS
from sim.workload.trace_lines import broken, json_rows, json_time, token_count
from sim.workload.trace_replay import TraceReplay, TraceRow


@dataclass(kw_only=True)
class MooncakeTrace(TraceReplay):
    """Replay of a Mooncake trace."""

    @property
    def ticks_per_s(self) -> int:
        """Milliseconds."""
        return 1000

    def rows(self, seed: int) -> Iterator[TraceRow]:
        """The lines of the file in order."""
        columns = ("arrival", "prompt_tokens", "output_tokens", "prefix_hashes")
        for line, fields in json_rows(self.path, columns):
            prompt_tokens = token_count(self.path, line, "prompt_tokens", fields[1])
            yield TraceRow(
                line,
                json_time(self.path, line, "arrival", fields[0], "milliseconds"),
                prompt_tokens,
                token_count(self.path, line, "output_tokens", fields[2]),
                self._hashes(line, fields[3], prompt_tokens),
            )

    def _hashes(self, line: int, value: object, prompt_tokens: int) -> tuple[int, ...]:
        ids = cast(list[int], value)
        if not isinstance(value, list) or not all(type(one) is int for one in ids):
            problem = f"prefix_hashes={value!r} must be a list of whole numbers"
            raise broken(self.path, line, problem, "write [] where nothing is shared")
        if self.max_input_tokens is not None and prompt_tokens > self.max_input_tokens:
            # A block cut in two is not the block that its id names.
            ids = ids[: self.max_input_tokens // HASH_BLOCK_TOKENS]
        return tuple(ids)
