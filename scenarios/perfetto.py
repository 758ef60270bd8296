"""A trace for ui.perfetto.dev and chrome://tracing: the JSON trace event format.

Iterations are slices of their replica, requests are asynchronous slices with their phases inside,
running and waiting requests and free KV blocks are counters. Times are microseconds there.
"""

import json
from collections.abc import Iterator
from math import isnan
from pathlib import Path
from typing import Any

from sim.files import whole_file
from sim.metrics import request_times
from sim.plot_data import KIND_NAMES, batch_sizes, counts
from sim.trace import Trace
from sim.trace_merge import num_replicas

Event = dict[str, Any]

REPLICAS, REQUESTS = 1, 2
"""Process ids: groups of tracks."""


def write(trace: Trace, path: Path) -> Path:
    """Write a trace as one JSON file, which is replaced when all is written."""
    with whole_file(path) as building, building.open("w", encoding="utf-8") as file:
        file.write('{"displayTimeUnit": "ms", "traceEvents": [\n')
        separator = ""
        for event in events(trace):
            file.write(separator + json.dumps(event, separators=(",", ":")))
            separator = ",\n"
        file.write("\n]}\n")
    return path


def events(trace: Trace) -> Iterator[Event]:
    """All events: names of tracks, iterations, requests, counters."""
    yield from _members(trace) if len(trace.members["step"]) else _replicas(trace)
    yield _name(REQUESTS, 0, "process_name", "requests")
    yield from _spans(trace)
    yield from _requests(trace)
    yield from _counters(trace)


def _replicas(trace: Trace) -> Iterator[Event]:
    """A track a replica."""
    count = num_replicas(trace)
    yield _name(REPLICAS, 0, "process_name", "replica" if count == 1 else f"{count} replicas")
    for number in range(count):
        name = "iterations" if count == 1 else f"replica {number}: iterations"
        yield _name(REPLICAS, 1 + number, "thread_name", name)
    yield from _iterations(trace)


def _members(trace: Trace) -> Iterator[Event]:
    """A track an elastic instance: what it computes as a member of each group."""
    columns = {name: column.tolist() for name, column in trace.members.items()}
    instances = sorted(set(columns["instance"]))
    yield _name(REPLICAS, 0, "process_name", f"{len(instances)} instances")
    for instance in instances:
        yield _name(REPLICAS, 1 + instance, "thread_name", f"instance {instance}")
    names = ("kind", "instance", "start_s", "end_s", "requests", "tokens", "step", "group")
    for kind, instance, start_s, end_s, *rest in zip(*(columns[one] for one in names), strict=True):
        if not isnan(end_s):  # else the run ended before it did
            bar = _slice(REPLICAS, 1 + instance, KIND_NAMES[kind], start_s, end_s)
            yield bar | {"args": dict(zip(names[4:], rest, strict=True))}


def _name(process: int, thread: int, what: str, name: str) -> Event:
    return {"ph": "M", "pid": process, "tid": thread, "name": what, "args": {"name": name}}


def _iterations(trace: Trace) -> Iterator[Event]:
    columns = trace.iterations
    rows = zip(
        columns["start_s"].tolist(), columns["end_s"].tolist(), columns["kind"].tolist(),
        batch_sizes(trace).tolist(), columns["replica"].tolist(), strict=True,
    )  # fmt: skip
    for start_s, end_s, kind, size, number in rows:
        bar = _slice(REPLICAS, 1 + number, KIND_NAMES[kind], start_s, end_s)
        yield bar | {"args": {"requests": size}}


def _spans(trace: Trace) -> Iterator[Event]:
    """Each resource of the spans is a track of its own."""
    columns, first = trace.spans, 1 + num_replicas(trace)
    tracks: dict[str, int] = {}
    names = zip(trace.span_names["resource"], trace.span_names["operation"], strict=True)
    for row, (resource, operation) in enumerate(names):
        if resource not in tracks:
            tracks[resource] = len(tracks) + first
            yield _name(REPLICAS, tracks[resource], "thread_name", resource)
        start_s, end_s = float(columns["start_s"][row]), float(columns["end_s"][row])
        args = {"bytes": float(columns["bytes"][row]), "flops": float(columns["flops"][row])}
        yield _slice(REPLICAS, tracks[resource], operation, start_s, end_s) | {"args": args}


def _requests(trace: Trace) -> Iterator[Event]:
    times = request_times(trace)
    rows = zip(*(column.tolist() for column in times), strict=True)
    for request, arrival_s, scheduled_s, first_s, last_s, tokens, preempted in rows:
        args = {"output_tokens": tokens, "preemptions": preempted}
        yield from _async(request, f"request {request}", arrival_s, last_s, args)
        yield from _async(request, "queue", arrival_s, scheduled_s)
        yield from _async(request, "prefill", scheduled_s, first_s)
        yield from _async(request, "decode", first_s, last_s)


def _async(
    request: int, name: str, start_s: float, end_s: float, args: Event | None = None
) -> Iterator[Event]:
    common = {"pid": REQUESTS, "tid": 0, "cat": "request", "id": request, "name": name}
    yield {"ph": "b", "ts": _us(start_s), **common, "args": args or {}}
    yield {"ph": "e", "ts": _us(end_s), **common}


def _counters(trace: Trace) -> Iterator[Event]:
    for name, steps in counts(trace)._asdict().items():
        rows = zip(steps.instant_s.tolist(), steps.value.tolist(), strict=True)
        last: int | None = None
        for instant_s, value in rows:
            if value != last:
                label = name.replace("_", " ")
                yield {"ph": "C", "pid": REPLICAS, "tid": 0, "ts": _us(instant_s), "name": label,
                       "args": {label: value}}  # fmt: skip
            last = value


def _slice(process: int, thread: int, name: str, start_s: float, end_s: float) -> Event:
    start, end = _us(start_s), _us(end_s)
    return {"ph": "X", "pid": process, "tid": thread, "name": name, "ts": start,
            "dur": round(end - start, 3)}  # fmt: skip


def _us(time_s: float) -> float:
    """Microseconds to the nanosecond, which is what Perfetto keeps."""
    return round(time_s * 1e6, 3)
