# pyright: reportMissingTypeStubs=false
"""What happened: tables of one schema, written by both panels.

`spans` (resource, operation, start_s, end_s, flops, bytes, request), `requests`, `iterations` and
`decisions`. Token times are never stored: a request keeps runs (iteration of its first token,
tokens that followed), and the times are looked up in the iterations.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pandas as pd

SCHEMA_VERSION = 6

PREFILL, DECODE = 1, 2
"""Bits of an iteration's kind; both: a mixed iteration."""


class State(IntEnum):
    """Changes of a request's state that its events record."""

    admitted = 1
    decoding = 2
    preempted = 3
    finished = 4
    handed_over = 5
    """It has its first token here and goes on elsewhere; its KV stays until it is fetched."""
    lost = 6
    """Its replica died: what it held there is gone. The tokens of its answer are not."""
    cancelled = 7
    """Nobody wants its answer any more."""


Array = NDArray[Any]
"""float64 for seconds, FLOPs and bytes; int64 for everything else."""
Table = dict[str, Array]

ITERATIONS = {"replica": "i", "start_s": "f", "end_s": "f", "kind": "i"}
REQUESTS = {
    "request": "i", "arrival_s": "f", "prompt_tokens": "i", "output_tokens": "i",
    "max_output_tokens": "i",
}  # fmt: skip
EVENTS = {"replica": "i", "request": "i", "instant_s": "f", "state": "i"}
ROUTES = {
    "request": "i", "instant_s": "f", "replica": "i", "delivered_s": "f",
    "outstanding_requests": "i", "outstanding_tokens": "i", "chosen_requests": "i", "answers": "i",
    "generated_tokens": "i",
}  # fmt: skip
"""Decisions of a router. `outstanding_...` and `chosen_requests` (those of the chosen replica) were
observed before, when it knew of so many `answers`; the replica had the request at `delivered_s`. A
request whose replica died is routed again, with the tokens of its answer that were handed out."""
ANSWERS = {"request": "i", "instant_s": "f", "replica": "i"}
"""What replicas reported done, in the order in which the router learnt of it: answers, and by one
that only prefills, first tokens."""
HAND_OVERS = {
    "request": "i", "instant_s": "f", "replica": "i", "announced_s": "f",
    "outstanding_requests": "i", "outstanding_tokens": "i", "chosen_requests": "i", "answers": "i",
    "source": "i", "kv_tokens": "i", "fetched_s": "f", "delivered_s": "f", "released_s": "f",
}  # fmt: skip
"""Prefilled requests that go from replica `source` to another, and what was observed before, as in
`ROUTES`. The other knew of it at `announced_s`, gave it blocks at `fetched_s` and had the KV of
`kv_tokens` tokens at `delivered_s`; the source had its blocks back at `released_s`."""
SEARCHES = {
    "request": "i", "generation": "i", "arrival_s": "f", "begin_s": "f", "end_s": "f",
}  # fmt: skip
"""Searches for documents that have ended. `generation` is the request of the replica that answers:
each attempt to generate with documents found is a request there, of the same arrival."""
STAGES = {
    "request": "i", "stage": "i", "instant_s": "f", "pool_size": "i", "stopped": "i",
    "started": "i",
}  # fmt: skip
"""What stages of searches led to: the generation that was stopped and the one that was started, or
-1. The engine took note at `instant_s`, with so many prefills pending. Stage -1: the client of the
request has left; -2, of no request (-1): all KV on the GPU was lost."""
LOOKUPS = {
    "request": "i", "instant_s": "f", "gpu_documents": "i", "host_documents": "i",
    "missed_documents": "i", "gpu_tokens": "i", "host_tokens": "i",
}  # fmt: skip
"""What a generation found cached when it was admitted for the first time."""
MOVES = {
    "instant_s": "f", "kind": "i", "node": "i", "document": "i", "blocks": "i", "took_s": "f",
}  # fmt: skip
"""Steps of the knowledge cache in order: see `MoveKind`. They were noted at `instant_s`, with the
batch that they were decided with; a step that copied took `took_s`."""
STEPS = {
    "instant_s": "f", "waiting": "i", "running": "i", "free_slots": "i", "in_round": "i",
    "lost": "i", "migrations": "i", "prefills": "i", "decodes": "i", "rounds": "i",
}  # fmt: skip
"""Every time that a plan was asked, and what it had seen: requests waiting and running, and slots
free on all instances before. `lost`: the instance whose loss was the reason, or -1. `rounds`: how
many rounds its groups decoded."""
MEMBERS = {
    "step": "i", "kind": "i", "group": "i", "instance": "i", "requests": "i", "tokens": "i",
    "digest": "i", "start_s": "f", "end_s": "f", "lost": "i",
}  # fmt: skip
"""One row a member of a group. `kind`: `PREFILL` or `DECODE`. `group`: its place in the step.
`requests`: of a member that prefills, those of the batch; of one that decodes, its mini-batch (0:
it is no master). `tokens`: KV that it keeps of a prefill, or has of a batch before the first round.
`digest`: of the batch's request ids, in order. `lost`: 1 where the loss of a member cut the group
short at `end_s`."""
KV_MOVES = {
    "step": "i", "request": "i", "source": "i", "target": "i", "tokens": "i",
    "begin_s": "f", "end_s": "f",
}  # fmt: skip
"""KV of one request that migrated."""
RUNS = {"request": "i", "first_iteration": "i", "count": "i"}
SPANS = {"start_s": "f", "end_s": "f", "flops": "f", "bytes": "f", "request": "i"}
SPAN_NAMES = ("resource", "operation")
DECISIONS = {
    "replica": "i", "instant_s": "f", "repeat": "i", "free_blocks": "i", "waiting": "i",
    "context_tokens": "i", "cached_blocks": "i", "prefill_tokens": "i", "prefill_pairs": "i",
    "prefill_context": "i", "num_prefills": "i", "num_decodes": "i", "decode_context": "i",
    "sampled_tokens": "i",
}  # fmt: skip
"""`free_blocks`, `waiting`, `context_tokens` (KV that running requests see) and `cached_blocks`
(free blocks that hold a cached prefix) were observed before the decision; the columns after them
are the shape of its first iteration: see `IterationShape`."""
RAGGED = (
    "admitted", "preempted", "reused", "reused_tokens", "prefilled", "prefilled_tokens", "joined",
    "left",
)  # fmt: skip
"""Lists of a decision. `reused`: admitted requests of whose prompt so many tokens were cached; the
others had none. `joined` and `left`: changes of the set of decoding requests since the
decision before, from which the tokens of every request at every decision follow."""


@dataclass(frozen=True, slots=True)
class Ragged:
    """Lists of whole numbers, one a row: row i is `values[offsets[i]:offsets[i + 1]]`."""

    offsets: NDArray[np.int64]
    values: NDArray[np.int64]

    def row(self, index: int) -> list[int]:
        """The list at one row."""
        return self.values[self.offsets[index] : self.offsets[index + 1]].tolist()

    def counts(self) -> NDArray[np.int64]:
        """Length of each row's list."""
        return np.diff(self.offsets)


@dataclass(frozen=True)
class Trace:
    """The four tables of one run as columns; `requests` with its events and runs beside it."""

    iterations: Mapping[str, Array]
    requests: Mapping[str, Array]
    events: Mapping[str, Array]
    """State changes in order of time."""
    runs: Mapping[str, Array]
    """Tokens of a stay on the replica: one at the end of `first_iteration`, then `count` more at
    the ends of the next `count` iterations that decode. Of a request that was handed over with its
    first token, `first_iteration` is the first that it decodes in."""
    decisions: Mapping[str, Array]
    decision_lists: Mapping[str, Ragged]
    routes: Mapping[str, Array] = field(default_factory=lambda: empty(ROUTES))
    """Without rows where there is one replica and no router."""
    answers: Mapping[str, Array] = field(default_factory=lambda: empty(ANSWERS))
    hand_overs: Mapping[str, Array] = field(default_factory=lambda: empty(HAND_OVERS))
    """Without rows where every replica prefills and decodes."""
    searches: Mapping[str, Array] = field(default_factory=lambda: empty(SEARCHES))
    """Without rows, as the three tables below, where no documents are retrieved."""
    stages: Mapping[str, Array] = field(default_factory=lambda: empty(STAGES))
    lookups: Mapping[str, Array] = field(default_factory=lambda: empty(LOOKUPS))
    moves: Mapping[str, Array] = field(default_factory=lambda: empty(MOVES))
    steps: Mapping[str, Array] = field(default_factory=lambda: empty(STEPS))
    """Without rows, as the two tables below, where no instances form groups anew."""
    members: Mapping[str, Array] = field(default_factory=lambda: empty(MEMBERS))
    kv_moves: Mapping[str, Array] = field(default_factory=lambda: empty(KV_MOVES))
    spans: Mapping[str, Array] = field(default_factory=lambda: empty(SPANS))
    span_names: Mapping[str, list[str]] = field(
        default_factory=lambda: {name: [] for name in SPAN_NAMES}
    )

    @property
    def num_iterations(self) -> int:
        """Iterations in the trace."""
        return len(self.iterations["start_s"])

    @property
    def num_decisions(self) -> int:
        """Decisions, repeats counted."""
        return int(self.decisions["repeat"].sum())

    def frame(self, table: str) -> "pd.DataFrame":
        """One table as a pandas frame; see `trace_files.trace_frame`."""
        from sim.trace_files import trace_frame

        return trace_frame(self, table)

    def save(self, folder: Path) -> None:
        """Write every table as Parquet into a folder, which is made; `load_trace` reads it."""
        from sim.trace_files import save_trace

        save_trace(self, folder)


def empty(columns: Mapping[str, str]) -> Table:
    """A table without rows."""
    return {name: np.zeros(0, np.float64 if kind == "f" else np.int64)
            for name, kind in columns.items()}  # fmt: skip
