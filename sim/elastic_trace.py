"""What elastic instances did: tables beside the trace, written by both panels."""

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from sim.recorder import rows_table
from sim.trace import DECODE, KV_MOVES, MEMBERS, PREFILL, STEPS, Array

NEVER = float("nan")


@dataclass(frozen=True)
class ElasticTables:
    """The three tables of a run."""

    steps: Mapping[str, Array]
    members: Mapping[str, Array]
    kv_moves: Mapping[str, Array]


class ElasticRecorder:
    """Collects their rows."""

    def __init__(self) -> None:
        self._steps, self._members, self._moves = array("d"), array("d"), array("d")

    @property
    def step(self) -> int:
        """Number of the last step."""
        return len(self._steps) // len(STEPS) - 1

    def asked(
        self, instant_s: float, seen: tuple[int, int, int, bool], lost: int,
        counts: tuple[int, int, int],
    ) -> None:  # fmt: skip
        """A plan has answered.

        Args:
            instant_s: when.
            seen: requests waiting and running, free slots, whether a round was under way.
            lost: the instance that was lost, or -1.
            counts: migrations, prefills and decode groups of the step.
        """
        self._steps.extend((instant_s, *seen, lost, *counts, 0))

    def rounds(self, step: int, count: int) -> None:
        """The groups of a step decoded so many rounds."""
        self._steps[(step + 1) * len(STEPS) - 1] = count

    def member(  # noqa: PLR0913, PLR0917  the row of a table
        self, kind: int, group: int, instance: int, requests: int, tokens: int, digest: int,
        start_s: float,
    ) -> int:  # fmt: skip
        """An instance takes part in a group of the last step; see `MEMBERS`. Returns its row."""
        row = (self.step, kind, group, instance, requests, tokens, digest, start_s, NEVER, 0)
        self._members.extend(row)
        return len(self._members) // len(MEMBERS) - 1

    def ended(self, rows: Sequence[int], end_s: float, *, lost: bool = False) -> None:
        """Members are done, or `lost`: their group is."""
        for row in rows:
            self._members[(row + 1) * len(MEMBERS) - 2] = end_s
            self._members[(row + 1) * len(MEMBERS) - 1] = lost

    def moved(
        self, request_id: int, way: tuple[int, int], tokens: int, times_s: tuple[float, float]
    ) -> None:
        """KV of a request has gone from one instance to another, in the last step."""
        self._moves.extend((self.step, request_id, *way, tokens, *times_s))

    def tables(self) -> ElasticTables:
        """What was recorded so far."""
        return ElasticTables(
            rows_table(STEPS, self._steps), rows_table(MEMBERS, self._members),
            rows_table(KV_MOVES, self._moves),
        )  # fmt: skip


def digest_of(request_ids: Sequence[int]) -> int:
    """Of a batch, in order; fits a float64 exactly."""
    content = np.asarray(request_ids, np.int64).tobytes()
    return int.from_bytes(blake2b(content, digest_size=6).digest(), "little")


__all__ = [
    "DECODE", "KV_MOVES", "MEMBERS", "PREFILL", "STEPS", "ElasticRecorder", "ElasticTables",
    "digest_of",
]  # fmt: skip
