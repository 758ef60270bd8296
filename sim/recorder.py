"""Append-only columns that an executor writes its trace into, and hands over at the end."""

from array import array
from collections.abc import Mapping, Sequence

import numpy as np

from sim import trace as schema
from sim.models.work import IterationShape
from sim.policies.batching.base import Batch
from sim.requests import Request
from sim.trace import Ragged, State, Table, Trace


class Recorder:
    """Collects what happens on one replica. One `extend` a column: the hot path of both panels."""

    def __init__(self, replica: int = 0) -> None:
        self.replica = replica
        self.num_iterations = 0
        self._start, self._end, self._kind = array("d"), array("d"), array("b")
        self._requests = _columns(schema.REQUESTS)
        self._events = _columns(schema.EVENTS)
        self._runs = _columns(schema.RUNS)
        self._decisions: array[float] = array("d")
        """Rows of `DECISIONS` after `replica`, one after another: one `extend` a decision."""
        self._num_decisions = 0
        self._values = {name: array("q") for name in schema.RAGGED}
        self._rows = {name: array("q") for name in schema.RAGGED}
        self._spans = _columns(schema.SPANS)
        self._span_names: dict[str, list[str]] = {name: [] for name in schema.SPAN_NAMES}

    def arrived(self, request: Request) -> None:
        """A request reached the replica."""
        columns = self._requests
        columns["request"].append(request.request_id)
        columns["arrival_s"].append(request.arrival_s)
        columns["prompt_tokens"].append(request.prompt_tokens)
        columns["output_tokens"].append(request.output_tokens)
        columns["max_output_tokens"].append(request.max_output_tokens)

    def event(self, request_id: int, instant_s: float, state: State) -> None:
        """A request changed its state."""
        columns = self._events
        columns["request"].append(request_id)
        columns["instant_s"].append(instant_s)
        columns["state"].append(state)

    def run(self, request_id: int, first_iteration: int, count: int) -> None:
        """A stay ended: a token at the end of `first_iteration`, then one in `count` decodes."""
        columns = self._runs
        columns["request"].append(request_id)
        columns["first_iteration"].append(first_iteration)
        columns["count"].append(count)

    def iterations(self, boundaries: Sequence[float], kind: int) -> None:
        """Consecutive iterations of one kind between `boundaries` (one more than iterations)."""
        count = len(boundaries) - 1
        self._start.extend(boundaries[:-1])
        self._end.extend(boundaries[1:])
        self._kind.extend([kind] * count)
        self.num_iterations += count

    def decision(  # noqa: PLR0913  the row of a table, written on the hot path
        self,
        instant_s: float,
        repeat: int,
        before: tuple[int, int, int],
        shape: IterationShape,
        batch: Batch,
        joined: Sequence[int],
        left: Sequence[int],
    ) -> None:
        """A decision and what was observed before it.

        Args:
            instant_s: when it was taken.
            repeat: iterations that it stands for.
            before: free blocks, waiting requests and stored tokens that the panel observed.
            shape: the work of its (first) iteration.
            batch: what the policy answered.
            joined: requests that decode since the decision before.
            left: requests that no longer do.
        """
        self._decisions.extend((instant_s, repeat, *before, *shape))
        if batch.admit:
            self._append("admitted", batch.admit)
        if batch.preempt:
            self._append("preempted", batch.preempt)
        if batch.prefill:
            self._append("prefilled", [request_id for request_id, _ in batch.prefill])
            self._append("prefilled_tokens", [tokens for _, tokens in batch.prefill])
        if joined:
            self._append("joined", joined)
        if left:
            self._append("left", left)
        self._num_decisions += 1

    def repeat(self, count: int) -> None:
        """The last decision stood for `count` iterations only."""
        self._decisions[1 - _WIDTH] = count

    def span(self, resource: str, operation: str, row: Mapping[str, float]) -> None:
        """A resource was busy with an operation; `row` has the columns of `SPANS`."""
        self._span_names["resource"].append(resource)
        self._span_names["operation"].append(operation)
        for name, column in self._spans.items():
            column.append(row[name])

    def trace(self) -> Trace:
        """The trace so far. Columns are copied: the recorder may go on."""
        iterations: Table = {
            "replica": np.full(self.num_iterations, self.replica, np.int64),
            "start_s": np.array(self._start),
            "end_s": np.array(self._end),
            "kind": np.array(self._kind, np.int64),
        }
        rows = np.array(self._decisions).reshape(-1, _WIDTH)
        decisions: Table = {"replica": np.full(len(rows), self.replica, np.int64)}
        for index, (name, kind) in enumerate(list(schema.DECISIONS.items())[1:]):
            column = rows[:, index]
            decisions[name] = column.copy() if kind == "f" else column.astype(np.int64)
        return Trace(
            iterations=iterations,
            requests=_arrays(self._requests),
            events=_arrays(self._events),
            runs=_arrays(self._runs),
            decisions=decisions,
            decision_lists={name: self._ragged(name) for name in schema.RAGGED},
            spans=_arrays(self._spans),
            span_names=self._span_names,
        )

    def _append(self, name: str, values: Sequence[int]) -> None:
        self._values[name].extend(values)
        self._rows[name].extend([self._num_decisions] * len(values))

    def _ragged(self, name: str) -> Ragged:
        counts = np.bincount(np.array(self._rows[name]), minlength=self._num_decisions)
        return Ragged(
            np.append(0, np.cumsum(counts)).astype(np.int64), np.array(self._values[name])
        )


_WIDTH = len(schema.DECISIONS) - 1
_TYPES = {"f": "d", "i": "q"}


def _columns(kinds: Mapping[str, str]) -> dict[str, "array[float] | array[int]"]:
    return {name: array(_TYPES[kind]) for name, kind in kinds.items()}


def _arrays(columns: Mapping[str, "array[float] | array[int]"]) -> Table:
    return {name: np.array(column) for name, column in columns.items()}
