"""A router whose replicas are killed and come back, for real. The twin of the simulated one.

It learns of a death by itself: from the end of the connection, or from silence.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from math import inf, nextafter
from typing import NamedTuple

import numpy as np

from backends.arrivals import Arrivals
from backends.lives import Lives
from backends.replica_processes import ReplicaSpec
from backends.router import LEAD_S
from backends.streaming import Step
from sim.engine import ReplicaLimits
from sim.policies.routing.base import Routing, checked_choice
from sim.recorder import Choice, Recorder, RouteRecorder
from sim.requests import Request
from sim.state.router_state import RouterState
from sim.trace import RUNS, State, Trace
from sim.trace_lives import joined_lives
from sim.trace_merge import merge
from sim.workload.source import Source


class Death(NamedTuple):
    """What became of a replica; instants are seconds since t = 0."""

    replica: int
    at_s: float
    """Between its last iteration and `noticed_s`."""
    noticed_s: float
    known: int
    """Answers that the router knew of then."""
    back_s: float
    """When the next life joined; infinite: none did."""


class FailoverRun(NamedTuple):
    """What a real run with deaths gives back."""

    trace: Trace
    lives: list[list[Trace]]
    """Of every replica, in order of time."""
    answers: dict[int, list[int]]
    """Tokens as the router got them, life after life."""
    finished: list[int]
    """Requests in the order in which the router learnt that their answers were complete."""
    deaths: list[Death]
    """In the order in which they were noticed."""
    kv_bytes: tuple[int, int]
    """Written and read, as far as the router was told."""


class Life:
    """What the router holds of one process: its part of the trace, and who is in mid-answer."""

    def __init__(self, number: int) -> None:
        self.recorder = Recorder(number)
        self.died_s = inf
        self.kv_bytes = (0, 0)
        self._delivered_s: dict[int, float] = {}
        self._last_s = 0.0
        self._stays: dict[int, tuple[int, int]] = {}
        """Of running requests the iteration of the first token, and the tokens that followed."""

    def step(self, step: Step) -> None:
        """Take over what an iteration has brought."""
        self.recorder.take(step.news)
        self._last_s = max([self._last_s, *np.frombuffer(step.news.get("end", b""))])
        done = {request_id for request_id, _ in step.finished}
        ended = np.frombuffer(step.news.get("runs", b""))[:: len(RUNS)]
        for request_id in set(map(int, ended)) - done:  # pre-empted
            self._stays.pop(request_id, None)
        iteration = self.recorder.num_iterations - 1
        for request_id in step.tokens:
            first, count = self._stays.get(request_id, (iteration, -1))
            self._stays[request_id] = first, count + 1
        for request_id in done:
            self._stays.pop(request_id, None)
        self._delivered_s |= step.delivered_s
        self.kv_bytes = step.kv_bytes

    def end(self, lost: Iterable[int], killed_s: float) -> None:
        """The process is dead: close what it left open, after its last iteration."""
        self.died_s = max(killed_s, nextafter(self._last_s, inf))
        for request_id, stay in self._stays.items():
            self.recorder.run(request_id, *stay)
        for request_id in lost:
            self.recorder.event(request_id, self.died_s, State.lost)

    def delivered_s(self, request_id: int, sent_s: float) -> float:
        """When a request was there; one that no iteration came to see, when it was lost."""
        return self._delivered_s.get(request_id, max(sent_s, self.died_s))


class FailoverRouter:
    """Sends requests to replicas that it believes to live, and again when it learns otherwise."""

    def __init__(self, processes: Lives, routing: Routing, limits: ReplicaLimits) -> None:
        self.processes = processes
        self.routing = routing
        self.state = RouterState(processes.count, limits.num_blocks * limits.block_size)
        self.recorder = RouteRecorder()
        self.lives = [[Life(number)] for number in range(processes.count)]
        self.tokens: dict[int, list[int]] = {}
        """Of every answer, as they came in."""
        self.finished: list[int] = []
        """Requests whose answer is complete, in the order of learning it."""
        self.deaths: list[Death] = []
        self._memory = routing.init()
        self._requests: dict[int, Request] = {}
        self._waiting: deque[int] = deque()
        self._sent: list[tuple[int, float, Life]] = []
        self._start = 0.0

    def run(self, source: Source) -> None:
        """Route until every request has its answer.

        Raises:
            ValueError: a policy breaks its rules, in a replica or here.
            RuntimeError: no replica is left, or one failed otherwise than by dying.
        """
        arrivals = Arrivals(source)
        self._start = time.perf_counter() + LEAD_S
        self.processes.begin(self._start)
        while True:
            for request in arrivals.until(self._now_s()):
                self._requests[request.request_id] = request
                self._waiting.append(request.request_id)
            for number in self.processes.due_back(self._now_s()):
                self._come_back(number)
            self._send_waiting()
            # A policy that leaves requests unserved is refused by their replica at the end.
            stuck = self.processes.all_idle and not self._waiting
            if arrivals.next_s is None and (not self._requests or stuck):
                break
            for number, kind, content in self.processes.hear(self._patience_s(arrivals)):
                if kind == "step":
                    self._stepped(number, content, arrivals)
                elif kind == "died":
                    self._died(number)
        self.processes.finish()

    def _now_s(self) -> float:
        return time.perf_counter() - self._start

    def _patience_s(self, arrivals: Arrivals) -> float:
        """How long nothing happens of itself."""
        following = min(self.processes.next_back_s, arrivals.next_s or inf)
        return min(max(following - self._now_s(), 0.0), 1.0)

    def _send_waiting(self) -> None:
        while self._waiting and self.state.live:
            request = self._requests[self._waiting.popleft()]
            tokens = self.tokens.get(request.request_id, [])
            view, now_s = request.view(len(tokens)), self._now_s()
            number = checked_choice(self.routing, self._memory, view, self.state, now_s)
            choice = Choice.of(number, self.state, range(self.state.num_replicas))
            self.recorder.route(request.request_id, now_s, choice, now_s, view.generated_tokens)
            self.state.sent(view, number)
            self._sent.append((request.request_id, now_s, self.lives[number][-1]))
            self.processes.send(number, "request", (tuple(request), tokens))

    def _stepped(self, number: int, step: Step, arrivals: Arrivals) -> None:
        self.lives[number][-1].step(step)
        for request_id, tokens in step.tokens.items():
            self.tokens.setdefault(request_id, []).extend(tokens)
        for request_id, finish_s in step.finished:
            del self._requests[request_id]
            self.state.answered(request_id)
            self.recorder.answer(request_id, self._now_s(), number)
            self.finished.append(request_id)
            arrivals.answered(request_id, finish_s)

    def _died(self, number: int) -> None:
        """What was sent there is to be sent again, after the tokens that came."""
        noticed_s = self._now_s()
        lost = self.state.lost(number)
        killed = self.processes.killed.get(number)
        life = self.lives[number][-1]
        life.end(lost, noticed_s if killed is None else killed - self._start)
        self.deaths.append(Death(number, life.died_s, noticed_s, len(self.finished), inf))
        self._waiting.extend(lost)

    def _come_back(self, number: int) -> None:
        self.processes.come_back(number)
        self.lives[number].append(Life(number))
        self.state.back(number)
        at = max(at for at, death in enumerate(self.deaths) if death.replica == number)
        self.deaths[at] = self.deaths[at]._replace(back_s=self._now_s())

    def outcome(self) -> FailoverRun:
        """What has happened; call it after `run`."""
        lives = [[life.recorder.trace() for life in those] for those in self.lives]
        routes, answers, hand_overs = self.recorder.tables()
        routes["delivered_s"][:] = [
            life.delivered_s(request_id, sent_s) for request_id, sent_s, life in self._sent
        ]
        totals = zip(*(life.kv_bytes for those in self.lives for life in those), strict=True)
        written, read = (sum(column) for column in totals)
        return FailoverRun(
            merge([joined_lives(those) for those in lives], routes, answers, hand_overs), lives,
            self.tokens, self.finished, self.deaths, (written, read),
        )  # fmt: skip


def serve_failover(
    spec: ReplicaSpec, source: Source, routing: Routing, num_replicas: int
) -> FailoverRun:
    """As `router.serve_routed`, with the faults of `spec`; t = 0 is after all are warm.

    Raises:
        ValueError: a policy breaks its rules.
        RuntimeError: no replica is left, or one failed otherwise than by dying.
    """
    with Lives(spec, num_replicas) as processes:
        processes.await_ready()
        router = FailoverRouter(processes, routing, spec.limits)
        router.run(source)
    return router.outcome()
