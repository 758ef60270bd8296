"""One trace of several replicas, and the part of one replica in it.

Rows of iterations, decisions and runs lie replica by replica, each in order of time; requests and
events lie in order of time over all.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from sim.trace import Array, Ragged, Table, Trace

STACKED = ("iterations", "requests", "events", "runs", "decisions", "spans")


def merge(
    traces: list[Trace],
    routes: Mapping[str, Array],
    answers: Mapping[str, Array],
    hand_overs: Mapping[str, Array],
) -> Trace:
    """The trace of a deployment.

    Args:
        traces: of its replicas, in order of their numbers. Emptied: long columns are taken over one
            by one, so that they are never held twice.
        routes: where the router sent each request.
        answers: in the order in which it learnt of them.
        hand_overs: requests that went from one replica to another.
    """
    firsts = np.cumsum([0, *(trace.num_iterations for trace in traces)])
    parts = [{name: dict(getattr(one, name)) for name in STACKED} for one in traces]
    lists = [dict(one.decision_lists) for one in traces]
    names = [one.span_names for one in traces]
    traces.clear()
    for part, first in zip(parts, firsts, strict=False):
        part["runs"]["first_iteration"] = part["runs"]["first_iteration"] + first
    whole = {name: _stack([part[name] for part in parts]) for name in STACKED}
    whole["requests"] = _sorted(whole["requests"], "arrival_s", "request")
    whole["events"] = _sorted(whole["events"], "instant_s")
    return Trace(
        **whole,
        decision_lists={name: _join([one.pop(name) for one in lists]) for name in list(lists[0])},
        routes=routes,
        answers=answers,
        hand_overs=hand_overs,
        span_names={name: [text for one in names for text in one[name]] for name in names[0]},
    )


def num_replicas(trace: Trace) -> int:
    """Replicas that did something, or were sent something."""
    tables = (trace.iterations, trace.routes, trace.hand_overs)
    numbers = [table["replica"] for table in tables]
    return max((int(column.max()) + 1 for column in numbers if len(column)), default=1)


def of_replica(trace: Trace, replica: int) -> Trace:
    """What one replica did; its requests are those that were sent or handed over to it."""
    mine = trace.iterations["replica"] == replica
    first = int(np.argmax(mine)) if mine.any() else 0
    rows = np.flatnonzero(trace.decisions["replica"] == replica)
    start, stop = (int(rows[0]), int(rows[-1]) + 1) if len(rows) else (0, 0)
    sent = [
        table["request"][table["replica"] == replica] for table in (trace.routes, trace.hand_overs)
    ]
    requests = np.concatenate(sent)
    runs = trace.runs["first_iteration"] - first
    ran = (runs >= 0) & (runs < mine.sum())
    part = _chosen(trace.runs, ran)
    return replace(
        trace,
        iterations=_chosen(trace.iterations, mine),
        requests=_chosen(trace.requests, np.isin(trace.requests["request"], requests)),
        events=_chosen(trace.events, trace.events["replica"] == replica),
        runs={**part, "first_iteration": part["first_iteration"] - first},
        decisions={name: column[start:stop] for name, column in trace.decisions.items()},
        decision_lists={
            name: _slice(ragged, start, stop) for name, ragged in trace.decision_lists.items()
        },
        routes=_chosen(trace.routes, trace.routes["replica"] == replica),
        answers=_chosen(trace.answers, trace.answers["replica"] == replica),
        hand_overs=_chosen(trace.hand_overs, trace.hand_overs["replica"] == replica),
    )


def _stack(tables: Sequence[Table]) -> Table:
    """Tables below each other; theirs are emptied."""
    return {name: np.concatenate([one.pop(name) for one in tables]) for name in list(tables[0])}


def _sorted(table: Table, *keys: str) -> Table:
    order = np.lexsort([table[key] for key in reversed(keys)])
    return {name: column[order] for name, column in table.items()}


def _chosen(table: Mapping[str, Array], rows: Array) -> Table:
    return {name: column[rows] for name, column in table.items()}


def _join(parts: Sequence[Ragged]) -> Ragged:
    shifts = np.cumsum([0, *(len(part.values) for part in parts)])
    offsets = [part.offsets[:-1] + shift for part, shift in zip(parts, shifts, strict=False)]
    return Ragged(
        np.append(np.concatenate(offsets), shifts[-1]).astype(np.int64),
        np.concatenate([part.values for part in parts]),
    )


def _slice(ragged: Ragged, start: int, stop: int) -> Ragged:
    offsets = ragged.offsets[start : stop + 1]
    low, high = (int(offsets[0]), int(offsets[-1])) if stop > start else (0, 0)
    return Ragged(offsets - low if stop > start else np.zeros(1, np.int64), ragged.values[low:high])
