"""A router before several real replicas, each a process of its own. The twin of the simulated one.

Processes of one machine read one monotonic clock, so their instants need no alignment.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from backends.arrivals import Arrivals
from backends.collectives import Sent
from backends.inbox import Inbox
from backends.replica import Replica
from backends.replica_processes import Processes, ReplicaSpec, Report
from backends.sampling import Sampler
from backends.serving import make_replica, open_model, without_collections
from sim.engine import ReplicaLimits
from sim.policies.routing.base import Routing, checked_choice
from sim.recorder import Choice, RouteRecorder
from sim.requests import Request
from sim.state.router_state import RouterState
from sim.trace import Table, Trace
from sim.trace_merge import merge
from sim.workload.source import Source

LEAD_S = 0.05
"""From the last replica's being ready to t = 0."""
MOVES = ("announced_s", "fetched_s", "delivered_s", "released_s")
"""Columns of `HAND_OVERS` that the instances fill in."""


class RoutedRun(NamedTuple):
    """What a real run of several replicas gives back; bytes are sums over their tensors."""

    trace: Trace
    answers: dict[int, list[int]]
    kv_bytes_written: int
    kv_bytes_read: int
    kv_bytes_freed: int
    sent_bytes: int
    """Payload that replicas sent each other."""
    samplers: list[Sampler]
    """Of every replica, after the run."""


class Finished(NamedTuple):
    """What a replica sends at its end."""

    trace: Trace
    answers: dict[int, list[int]]
    delivered_s: dict[int, float]
    """When it had each request."""
    moves: dict[str, dict[int, float]]
    """When it saw the KV of requests move, by column of `HAND_OVERS`."""
    kv_bytes: tuple[int, int, int]
    sent: list[Sent]
    """What it sent to other instances."""
    sampler: Sampler


def serve_routed(
    spec: ReplicaSpec, source: Source, routing: Routing, num_replicas: int
) -> RoutedRun:
    """Serve a source on several replicas at its arrival times; t = 0 is after all are warm.

    Args:
        spec: of every replica.
        source: requests; their arrival times are kept.
        routing: chooses a replica for every request.
        num_replicas: processes that serve.

    Raises:
        ValueError: a policy breaks its rules, in a replica or in the router.
        RuntimeError: a replica died or was silent for `SILENCE_S`; its number is named.
    """
    with Processes(spec, num_replicas, serve_once) as processes:
        processes.await_ready()
        router = Router(processes, routing, spec.limits, range(num_replicas))
        router.run(source)
        done = [processes.result(number) for number in range(num_replicas)]
    return together(done, router.recorder)


def together(done: Sequence[Finished], recorder: RouteRecorder) -> RoutedRun:
    """One run of what its replicas and their router have recorded."""
    routes, answers, hand_overs = recorder.tables()
    _fill(routes, "delivered_s", [one.delivered_s for one in done])
    for column in MOVES:
        _fill(hand_overs, column, [one.moves[column] for one in done if column in one.moves])
    written, read, freed = (sum(column) for column in zip(*(d.kv_bytes for d in done), strict=True))
    return RoutedRun(
        merge([one.trace for one in done], routes, answers, hand_overs),
        {request: tokens for one in done for request, tokens in one.answers.items()},
        written, read, freed, sum(row.payload_bytes for one in done for row in one.sent),
        [one.sampler for one in done],
    )  # fmt: skip


def _fill(table: Table, column: str, told: Sequence[Mapping[int, float]]) -> None:
    """Write the instants that replicas saw, by request, into a column of the router's."""
    seen_s = {request: instant_s for one in told for request, instant_s in one.items()}
    table[column][:] = [seen_s[request] for request in table["request"].tolist()]


class Router:
    """Sends every request where the policy says, and keeps count of the answers."""

    def __init__(
        self,
        processes: Processes,
        routing: Routing,
        limits: ReplicaLimits,
        numbers: Sequence[int],
        hand_overs: HandOvers | None = None,
    ) -> None:
        """Take over processes.

        Args:
            processes: of all replicas.
            routing: chooses among the replicas with `numbers`.
            limits: of each replica.
            numbers: of those that requests arrive at.
            hand_overs: decides who decodes what they prefill; None: they do.
        """
        self.processes = processes
        self.routing = routing
        self.numbers = numbers
        self.state = RouterState(len(numbers), limits.num_blocks * limits.block_size)
        self.recorder = RouteRecorder()
        self._memory = routing.init()
        self._hand_overs = hand_overs
        self._requests: dict[int, Request] = {}
        """Those that have no answer yet."""

    def run(self, source: Source) -> None:
        """Route until every request has its answer."""
        arrivals = Arrivals(source)
        start = time.perf_counter() + LEAD_S
        self.processes.begin(start)
        while True:
            for request in arrivals.until(time.perf_counter() - start):
                self._route(request, start)
            # A policy that leaves requests unserved is refused by their replica at the end.
            if arrivals.next_s is None and (not self._requests or self.processes.all_idle):
                break
            until_s = 1.0
            if arrivals.next_s is not None:
                until_s = min(max(start + arrivals.next_s - time.perf_counter(), 0.0), until_s)
            for report in self.processes.receive(until_s):
                self._learn(report, arrivals, start)
        self.processes.send_all("end", not self._requests)

    def _learn(self, report: Report, arrivals: Arrivals, start: float) -> None:
        """A replica has done its part of a request."""
        now_s = time.perf_counter() - start
        self.recorder.answer(report.request_id, now_s, report.replica)
        if report.replica in self.numbers:
            self.state.answered(report.request_id)
        else:
            assert self._hand_overs is not None
            self._hand_overs.state.answered(report.request_id)
        if report.tokens is None:
            del self._requests[report.request_id]
            arrivals.answered(report.request_id, report.finish_s)
        else:
            assert self._hand_overs is not None
            request = self._requests[report.request_id]
            self._hand_overs.prefilled(request, report, self.recorder, now_s)

    def _route(self, request: Request, start: float) -> None:
        view, now_s = request.view(), time.perf_counter() - start
        place = checked_choice(self.routing, self._memory, view, self.state, now_s)
        # The replica says at its end when it had the request.
        choice = Choice.of(place, self.state, self.numbers)
        self.recorder.route(request.request_id, now_s, choice, now_s)
        self.state.sent(view, place)
        self._requests[request.request_id] = request
        self.processes.send(self.numbers[place], "request", tuple(request))


class HandOvers(Protocol):
    """Decides who decodes what others have prefilled."""

    @property
    def state(self) -> RouterState:
        """What those that decode have outstanding."""
        ...

    def prefilled(
        self, request: Request, report: Report, recorder: RouteRecorder, now_s: float
    ) -> None:
        """A request has its first token; hand it over."""
        ...


def serve_once(inbox: Inbox, number: int, spec: ReplicaSpec) -> None:
    """What a replica process does: load, warm up, serve one run."""
    transformer = open_model(spec.weights, spec.device)[1]
    corruption = spec.corruption if number == 0 else None
    replica = make_replica(
        transformer, spec.batching, spec.limits, seed=spec.seed, corruption=corruption,
        number=number,
    )  # fmt: skip
    inbox.attach(replica, spec)
    start = inbox.begin()
    assert start is not None
    with without_collections():
        trace = replica.run(inbox, start)
    inbox.send("result", finished(replica, trace, inbox.delivered_s))
    inbox.end()
    inbox.await_close()  # whoever waits for another replica's result must not miss this one


def finished(
    replica: Replica,
    trace: Trace,
    delivered_s: dict[int, float],
    moves: dict[str, dict[int, float]] | None = None,
    sent: Sequence[Sent] = (),
) -> Finished:
    """What there is to say of a run; everything that is cached is given up."""
    cache = replica.cache
    cache.flush()
    kv_bytes = (cache.written_bytes, cache.read_bytes, cache.freed_bytes)
    return Finished(
        trace, replica.answers, delivered_s, moves or {}, kv_bytes, list(sent), replica.sampler
    )
