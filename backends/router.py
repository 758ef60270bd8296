"""A router before several real replicas, each a process of its own. The twin of the simulated one.

Processes of one machine read one monotonic clock, so their instants need no alignment.
"""

from __future__ import annotations

import multiprocessing
import pickle
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple, Self

from backends.arrivals import Arrivals
from backends.corruption import Corruption
from backends.inbox import Inbox
from sim.engine import ReplicaLimits
from sim.faults import Fault
from sim.policies.batching.base import Batching
from sim.policies.registry import USER_MODULES, load_file
from sim.policies.routing.base import Routing, checked_choice
from sim.recorder import RouteRecorder
from sim.requests import Request
from sim.state.router_state import RouterState
from sim.trace import Trace
from sim.trace_merge import merge
from sim.workload.source import Source

SILENCE_S = 10.0
"""A replica without a sign of life for so long is given up."""
LOADING_S = 600.0
"""A replica may take so long to load its model and warm up."""
LEAD_S = 0.05
"""From the last replica's being ready to t = 0."""


@dataclass(frozen=True, kw_only=True)
class ReplicaSpec:
    """What a replica process is made of; it is sent there."""

    weights: str
    """As of `serving.open_model`."""
    device: str
    batching: Batching
    limits: ReplicaLimits
    seed: int = 0
    """Of the prompts' tokens."""
    corruption: Corruption | None = None
    """A fault to put into the KV cache of replica 0."""
    faults: tuple[Fault, ...] = ()
    """What is slow, for `backends.failover`, whose router kills as well."""


class RoutedRun(NamedTuple):
    """What a real run of several replicas gives back; bytes are sums over their tensors."""

    trace: Trace
    answers: dict[int, list[int]]
    kv_bytes_written: int
    kv_bytes_read: int
    kv_bytes_freed: int


class Finished(NamedTuple):
    """What a replica sends at its end."""

    trace: Trace
    answers: dict[int, list[int]]
    delivered_s: dict[int, float]
    kv_bytes: tuple[int, int, int]


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
    with Processes(spec, num_replicas) as processes:
        processes.await_ready()
        router = Router(processes, routing, spec.limits)
        router.run(source)
        done = [processes.result(number) for number in range(num_replicas)]
    delivered_s = {request: at for one in done for request, at in one.delivered_s.items()}
    routes, answers = router.recorder.tables()
    routes["delivered_s"][:] = [delivered_s[request] for request in routes["request"].tolist()]
    written, read, freed = (sum(column) for column in zip(*(d.kv_bytes for d in done), strict=True))
    return RoutedRun(
        merge([one.trace for one in done], routes, answers),
        {request: tokens for one in done for request, tokens in one.answers.items()},
        written, read, freed,
    )  # fmt: skip


class Router:
    """Sends every request where the policy says, and keeps count of the answers."""

    def __init__(self, processes: Processes, routing: Routing, limits: ReplicaLimits) -> None:
        self.processes = processes
        self.routing = routing
        self.state = RouterState(processes.count, limits.num_blocks * limits.block_size)
        self.recorder = RouteRecorder()
        self._memory = routing.init()
        self._outstanding = 0

    def run(self, source: Source) -> None:
        """Route until every request has its answer."""
        arrivals = Arrivals(source)
        start = time.perf_counter() + LEAD_S
        self.processes.send_all("start", start)
        while True:
            for request in arrivals.until(time.perf_counter() - start):
                self._route(request, start)
            # A policy that leaves requests unserved is refused by their replica at the end.
            if arrivals.next_s is None and (not self._outstanding or self.processes.all_idle):
                break
            until_s = 1.0
            if arrivals.next_s is not None:
                until_s = min(max(start + arrivals.next_s - time.perf_counter(), 0.0), until_s)
            for request_id, finish_s in self.processes.receive(until_s):
                self._outstanding -= 1
                self.state.answered(request_id)
                self.recorder.answer(request_id, time.perf_counter() - start)
                arrivals.answered(request_id, finish_s)
        self.processes.send_all("end", None)

    def _route(self, request: Request, start: float) -> None:
        view, now_s = request.view(), time.perf_counter() - start
        replica = checked_choice(self.routing, self._memory, view, self.state, now_s)
        # The replica says at its end when it had the request.
        self.recorder.route(request.request_id, now_s, replica, now_s, self.state)
        self.state.sent(view, replica)
        self._outstanding += 1
        self.processes.send(replica, "request", tuple(request))


class Processes:
    """The replica processes, their connections, and when each was heard of last."""

    inbox: type[Inbox] = Inbox
    """What a process takes its requests from."""

    def __init__(self, spec: ReplicaSpec, count: int) -> None:
        self.count = count
        self._connections: list[Connection] = []
        self._processes: list[Any] = []
        self._heard = [time.monotonic()] * count
        self._results: dict[int, Finished] = {}
        self._sent = [0] * count
        self._idle = [-1] * count
        """Requests that a replica had received when it last ran out of work."""
        for number in range(count):
            near, process = self._start(spec, number)
            self._connections.append(near)
            self._processes.append(process)

    def _start(self, spec: ReplicaSpec, number: int) -> tuple[Connection, Any]:
        """Start a process that loads and warms up."""
        context = multiprocessing.get_context("spawn")
        near, far = context.Pipe()
        arguments = (far, number, _user_files(spec.batching), pickle.dumps(spec), self.inbox)
        process = context.Process(target=_serve, args=arguments, daemon=True)
        process.start()
        far.close()
        return near, process

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """End what still runs: after an error no replica is left behind."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join(timeout=0.0 if kind else 5.0)
            if process.is_alive():
                process.kill()
                process.join()

    def send(self, number: int, kind: str, content: Any) -> None:
        """Send a message to one replica."""
        self._sent[number] += kind == "request"
        try:
            self._connections[number].send((kind, content))
        except (BrokenPipeError, ConnectionResetError) as error:
            raise RuntimeError(self._lost(number, "has died")) from error

    def send_all(self, kind: str, content: Any) -> None:
        """Send a message to every replica."""
        for number in range(self.count):
            self.send(number, kind, content)

    @property
    def all_idle(self) -> bool:
        """Whether every replica has received all and does nothing until it is sent more."""
        return self._idle == self._sent

    def await_ready(self) -> None:
        """Wait until every replica has loaded its model and warmed up."""
        deadline = time.monotonic() + LOADING_S
        for number, connection in enumerate(self._connections):
            while not connection.poll(0.2):
                if time.monotonic() > deadline:
                    raise RuntimeError(self._lost(number, f"was not ready in {LOADING_S:.0f} s"))
            self._take(number)
        self._heard = [time.monotonic()] * self.count

    def receive(self, timeout_s: float) -> list[tuple[int, float]]:
        """Answers that came in; waits for a message so long at most.

        Raises:
            RuntimeError: a replica died or is silent.
            ValueError: a replica refused what a policy did.
        """
        found: list[tuple[int, float]] = []
        for ready in wait(self._connections, timeout_s):
            number = next(at for at, one in enumerate(self._connections) if one is ready)
            while self._connections[number].poll():
                kind, content = self._take(number)
                if kind == "answer":
                    found.append(content)
        for number, heard in enumerate(self._heard):
            if time.monotonic() - heard > SILENCE_S:
                raise RuntimeError(self._lost(number, f"was silent for {SILENCE_S:.0f} s"))
        return found

    def result(self, number: int) -> Finished:
        """What a replica sends at its end."""
        while number not in self._results:
            if not self._connections[number].poll(SILENCE_S):
                raise RuntimeError(self._lost(number, f"was silent for {SILENCE_S:.0f} s"))
            self._take(number)
        return self._results[number]

    def _take(self, number: int) -> tuple[str, Any]:
        """The next message of one replica."""
        try:
            kind, content = self._connections[number].recv()
        except (EOFError, ConnectionResetError) as error:
            raise RuntimeError(self._lost(number, "has died")) from error
        self._heard[number] = time.monotonic()
        if kind == "refused":
            raise ValueError(f"replica {number}: {content}")
        if kind == "failed":
            raise RuntimeError(self._lost(number, f"has failed:\n{content}"))
        if kind == "done":
            self._results[number] = content
        if kind == "idle":
            self._idle[number] = content
        return kind, content

    def _lost(self, number: int, what: str) -> str:
        process = self._processes[number]
        return (
            f"replica {number} of {self.count} (process {process.pid}, exit code "
            f"{process.exitcode}) {what}; the run ends here, start it again"
        )


def _user_files(rule: Batching) -> list[str]:
    """Files outside the package that a process must read before it knows a rule's class."""
    module = sys.modules[type(rule).__module__]
    return [str(module.__file__)] if module.__name__.startswith(USER_MODULES) else []


def _serve(
    connection: Connection, number: int, files: Sequence[str], content: bytes, kind: type[Inbox]
) -> None:
    """A replica process: load, warm up, serve what comes, send what happened."""
    inbox = kind(connection)
    try:
        for name in files:
            load_file(Path(name))
        spec: ReplicaSpec = pickle.loads(content)
        inbox.send("done", _finished(inbox, number, spec))
    except ValueError as error:
        inbox.send("refused", str(error))
    except (BrokenPipeError, EOFError):
        return  # the router is gone, and with it whoever would read this
    except Exception:
        inbox.send("failed", traceback.format_exc())


def _finished(inbox: Inbox, number: int, spec: ReplicaSpec) -> Finished:
    from backends.serving import make_replica, open_model, use_one_thread, without_collections

    use_one_thread()
    transformer = open_model(spec.weights, spec.device)[1]
    corruption = spec.corruption if number == 0 else None
    replica = make_replica(
        transformer, spec.batching, spec.limits, seed=spec.seed, corruption=corruption,
        number=number,
    )  # fmt: skip
    inbox.attach(replica, spec)
    with without_collections():
        trace = replica.run(inbox, inbox.begin())
    inbox.end()
    cache = replica.cache
    cache.flush()
    moved = (cache.written_bytes, cache.read_bytes, cache.freed_bytes)
    return Finished(trace, replica.answers, inbox.delivered_s, moved)
