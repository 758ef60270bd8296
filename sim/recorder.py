"""Append-only columns that an executor writes its trace into, and hands over at the end."""

from array import array
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sim import trace as schema
from sim.models.work import IterationShape
from sim.policies.batching.base import Batch
from sim.policies.routing.base import RouterView
from sim.requests import Request
from sim.trace import Ragged, State, Table, Trace


class Recorder:
    """Collects what happens on one replica. One `extend` a column: the hot path of both panels."""

    def __init__(self, replica: int = 0) -> None:
        self.replica = replica
        self._end = array("d")
        self._requests = array("d")
        self._events = array("d")
        self._runs = array("d")
        self._answered: dict[int, int] = {}
        self._decisions: array[float] = array("d")
        """Rows of `DECISIONS` after `replica`, one after another: one `extend` a decision."""
        self._num_decisions = 0
        self._values = {name: array("q") for name in schema.RAGGED}
        self._rows = {name: array("q") for name in schema.RAGGED}
        self._spans = array("d")
        self._span_names: dict[str, list[str]] = {name: [] for name in schema.SPAN_NAMES}

    @property
    def num_iterations(self) -> int:
        """Iterations recorded so far."""
        return len(self._end)

    def arrived(self, request: Request) -> None:
        """A request reached the replica."""
        self._requests.extend(
            (request.request_id, request.arrival_s, request.prompt_tokens, request.output_tokens,
             request.max_output_tokens)
        )  # fmt: skip

    def answered(self, request_id: int, output_tokens: int) -> None:
        """An answer ended with so many tokens, whatever its forced length was."""
        self._answered[request_id] = output_tokens

    def event(self, request_id: int, instant_s: float, state: State) -> None:
        """A request changed its state."""
        self._events.extend((request_id, instant_s, state))

    def run(self, request_id: int, first_iteration: int, count: int) -> None:
        """A stay ended: a token at the end of `first_iteration`, then one in `count` decodes."""
        self._runs.extend((request_id, first_iteration, count))

    def reused(self, request_id: int, tokens: int) -> None:
        """The coming decision admits a request of whose prompt so many tokens are cached."""
        if tokens:
            self._append("reused", [request_id])
            self._append("reused_tokens", [tokens])

    def passed(self, boundaries: Sequence[float]) -> None:
        """The iterations of the last decision, between `boundaries`, its instant first."""
        self._end.extend(boundaries[1:])

    def decision(  # noqa: PLR0913, PLR0917  the row of a table, on the hot path
        self,
        instant_s: float,
        repeat: int,
        before: tuple[int, int, int, int],
        shape: IterationShape,
        batch: Batch,
        joined: Sequence[int],
        left: Sequence[int],
    ) -> None:
        """A decision and what was observed before it.

        Args:
            instant_s: when it was taken.
            repeat: iterations that it stands for.
            before: free blocks, waiting requests, stored tokens and cached free blocks that the
                panel observed.
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

    def undo(self, *, passed: bool) -> bool:
        """Take the last decision back: its iteration was lost. What was pre-empted keeps its runs.

        Args:
            passed: whether the end of its only iteration was noted already.

        Returns:
            Whether it decoded.
        """
        decoded = self._decisions[_DECODES] > 0
        del self._decisions[-_WIDTH:]
        self._num_decisions -= 1
        if passed:
            self._end.pop()
        moved = sum(self._rows[name].count(self._num_decisions) for name in _MOVES)
        if moved:  # what it admitted and pre-empted are the last events
            del self._events[-moved * (len(schema.EVENTS) - 1) :]
        for name, rows in self._rows.items():
            count = rows.count(self._num_decisions)
            if count:
                del rows[-count:], self._values[name][-count:]
        return decoded

    def ends_after(self, instant_s: float) -> bool:
        """Whether the last iteration that was noted ends at this instant or later."""
        return bool(self._end) and self._end[-1] >= instant_s

    def span(self, resource: str, operation: str, row: Mapping[str, float]) -> None:
        """A resource was busy with an operation; `row` has the columns of `SPANS`."""
        self._span_names["resource"].append(resource)
        self._span_names["operation"].append(operation)
        self._spans.extend(row[name] for name in schema.SPANS)

    def news(self, known: dict[str, int]) -> dict[str, bytes]:
        """What was appended since the last call, for a recorder elsewhere to `take`.

        Args:
            known: how much of each column was handed out; brought up to date.
        """
        found: dict[str, bytes] = {}
        for name, column in self._columns().items():
            if len(column) > known.get(name, 0):
                found[name] = column[known.get(name, 0) :].tobytes()
                known[name] = len(column)
        return found

    def take(self, news: Mapping[str, bytes]) -> None:
        """Append what another recorder handed out."""
        columns = self._columns()
        for name, content in news.items():
            columns[name].frombytes(content)
        self._num_decisions = len(self._decisions) // _WIDTH

    def _columns(self) -> "dict[str, array[Any]]":
        """All that is appended to but spans and `answered`, which only some executors write."""
        flat = {
            "end": self._end, "requests": self._requests, "events": self._events,
            "runs": self._runs, "decisions": self._decisions,
        }  # fmt: skip
        values = {f"values of {name}": column for name, column in self._values.items()}
        rows = {f"rows of {name}": column for name, column in self._rows.items()}
        return {**flat, **values, **rows}

    def trace(self) -> Trace:
        """The trace so far. Columns are copied: the recorder may go on."""
        decisions = _table(schema.DECISIONS, self._decisions, self.replica)
        return Trace(
            iterations=self._iterations(decisions),
            requests=self._request_table(),
            events=_table(schema.EVENTS, self._events, self.replica),
            runs=_table(schema.RUNS, self._runs),
            decisions=decisions,
            decision_lists={name: self._ragged(name) for name in schema.RAGGED},
            spans=_table(schema.SPANS, self._spans),
            span_names=self._span_names,
        )

    def _request_table(self) -> Table:
        table = _table(schema.REQUESTS, self._requests)
        forced = zip(table["request"].tolist(), table["output_tokens"].tolist(), strict=True)
        if self._answered:
            table["output_tokens"] = np.array(
                [self._answered.get(request, tokens) for request, tokens in forced], np.int64
            )
        return table

    def _iterations(self, decisions: Table) -> Table:
        """Start and kind of every iteration follow from the decision that it belongs to."""
        end_s = np.array(self._end)
        repeat = decisions["repeat"]
        first = np.cumsum(repeat) - repeat
        start_s = np.append(0.0, end_s)[:-1]
        start_s[first] = decisions["instant_s"]
        kind = schema.PREFILL * (decisions["prefill_tokens"] > 0)
        kind = kind + schema.DECODE * (decisions["num_decodes"] > 0)
        return {
            "replica": np.full(len(end_s), self.replica, np.int64),
            "start_s": start_s,
            "end_s": end_s,
            "kind": np.repeat(kind, repeat),
        }

    def _append(self, name: str, values: Sequence[int]) -> None:
        self._values[name].extend(values)
        self._rows[name].extend([self._num_decisions] * len(values))

    def _ragged(self, name: str) -> Ragged:
        counts = np.bincount(np.array(self._rows[name]), minlength=self._num_decisions)
        return Ragged(
            np.append(0, np.cumsum(counts)).astype(np.int64), np.array(self._values[name])
        )


class Choice(NamedTuple):
    """A replica that a router chose, and what it had observed before."""

    replica: int
    """Its number."""
    seen: tuple[int, int, int]
    """Requests and tokens outstanding at all that it chose from, and requests at the chosen one."""

    @classmethod
    def of(cls, place: int, view: RouterView, numbers: Sequence[int]) -> "Choice":
        """The choice of a place among replicas with these numbers."""
        requests = view.outstanding_requests
        return cls(numbers[place], (sum(requests), sum(view.outstanding_tokens), requests[place]))


class RouteRecorder:
    """Collects what a router decides and learns, and how KV moves."""

    def __init__(self) -> None:
        self._routes = array("d")
        self._answers = array("d")
        self._hand_overs = array("d")
        self._row: dict[int, int] = {}
        """Where the last hand-over of a request begins in `_hand_overs`."""

    @property
    def num_routes(self) -> int:
        """Requests routed so far."""
        return len(self._routes) // len(schema.ROUTES)

    @property
    def num_answers(self) -> int:
        """Reports known so far."""
        return len(self._answers) // len(schema.ANSWERS)

    def route(
        self, request_id: int, instant_s: float, choice: Choice, delivered_s: float,
        generated_tokens: int = 0,
    ) -> None:  # fmt: skip
        """A request is sent to a replica, which has it at `delivered_s`.

        So many tokens of its answer were handed out before.
        """
        row = self._decision(request_id, instant_s, choice, delivered_s)
        self._routes.extend((*row, generated_tokens))

    def answer(self, request_id: int, instant_s: float, replica: int) -> None:
        """The router learns that a replica has done its part of a request."""
        self._answers.extend((request_id, instant_s, replica))

    def hand_over(
        self, request_id: int, instant_s: float, choice: Choice, announced_s: float, source: int,
        kv_tokens: int,
    ) -> None:  # fmt: skip
        """A prefilled request goes from one replica to another, which knows it at `announced_s`."""
        self._row[request_id] = len(self._hand_overs)
        never = float("nan")
        self._hand_overs.extend(
            (*self._decision(request_id, instant_s, choice, announced_s), source, kv_tokens,
             never, never, never)
        )  # fmt: skip

    def moved(self, request_id: int, what: str, instant_s: float) -> None:
        """KV of a handed-over request moved: `fetched_s`, `delivered_s` or `released_s`."""
        self._hand_overs[self._row[request_id] + _HAND_OVER_COLUMNS.index(what)] = instant_s

    def tables(self) -> tuple[Table, Table, Table]:
        """Routes, answers and hand-overs so far."""
        return (
            rows_table(schema.ROUTES, self._routes),
            rows_table(schema.ANSWERS, self._answers),
            rows_table(schema.HAND_OVERS, self._hand_overs),
        )

    def _decision(
        self, request_id: int, instant_s: float, choice: Choice, delivered_s: float
    ) -> tuple[float, ...]:
        return request_id, instant_s, choice.replica, delivered_s, *choice.seen, self.num_answers


_HAND_OVER_COLUMNS = tuple(schema.HAND_OVERS)
_WIDTH = len(schema.DECISIONS) - 1
_DECODES = list(schema.DECISIONS).index("num_decodes") - len(schema.DECISIONS)
"""Of the last row, counted from the end."""
_MOVES = ("admitted", "preempted")
"""Lists whose entries have an event each."""


def _table(kinds: Mapping[str, str], flat: "array[float]", replica: int | None = None) -> Table:
    """Columns of rows that were appended one after another, all of one replica."""
    if replica is None:
        return rows_table(kinds, flat)
    table = rows_table({name: kind for name, kind in kinds.items() if name != "replica"}, flat)
    count = len(next(iter(table.values())))
    return {"replica": np.full(count, replica, np.int64), **table}


def rows_table(kinds: Mapping[str, str], flat: "array[float]") -> Table:
    """Columns of rows that were appended one after another."""
    # A view, not a copy: millions of rows are held once here and once in the columns.
    rows = (np.frombuffer(flat) if len(flat) else np.zeros(0)).reshape(-1, len(kinds))
    table: Table = {}
    for index, (name, kind) in enumerate(kinds.items()):
        column = rows[:, index]
        table[name] = column.copy() if kind == "f" else column.astype(np.int64)
    return table
