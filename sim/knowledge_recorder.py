"""Append-only columns of what a knowledge cache does: searches, stages, lookups and moves."""

from array import array
from collections.abc import Iterable
from dataclasses import replace

from sim import trace as schema
from sim.recorder import rows_table
from sim.state.knowledge_prefixes import Lookup
from sim.state.knowledge_tree import Move
from sim.trace import Trace


class KnowledgeRecorder:
    """Collects rows beside a replica's recorder, on both panels."""

    def __init__(self) -> None:
        self._searches, self._stages = array("d"), array("d")
        self._lookups, self._moves = array("d"), array("d")

    def search(
        self, request_id: int, generation: int, arrival_s: float, begin_s: float, end_s: float
    ) -> None:
        """A search has ended, and this generation answers the request."""
        self._searches.extend((request_id, generation, arrival_s, begin_s, end_s))

    def stage(
        self, request_id: int, stage: int, instant_s: float, pool_size: int,
        stopped: int, started: int,
    ) -> None:  # fmt: skip
        """The engine took note of a stage; -1 where nothing was stopped or started."""
        self._stages.extend((request_id, stage, instant_s, pool_size, stopped, started))

    def looked_up(self, lookups: Iterable[Lookup], instant_s: float) -> None:
        """Generations were admitted and found this."""
        for request_id, *found in lookups:
            self._lookups.extend((request_id, instant_s, *found))

    def moved(self, moves: Iterable[Move], took_s: Iterable[float], instant_s: float) -> None:
        """The cache took these steps, each in so many seconds."""
        rows = zip(moves, took_s, strict=True)
        self._moves.extend([each for move, one_s in rows for each in (instant_s, *move, one_s)])

    def into(self, trace: Trace) -> Trace:
        """A replica's trace with these tables."""
        return replace(
            trace,
            searches=rows_table(schema.SEARCHES, self._searches),
            stages=rows_table(schema.STAGES, self._stages),
            lookups=rows_table(schema.LOOKUPS, self._lookups),
            moves=rows_table(schema.MOVES, self._moves),
        )
