"""Replicas that are processes of their own: started, spoken to over pipes, missed when they die."""

from __future__ import annotations

import os
import pickle
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple, Self

from backends.corruption import Corruption
from backends.inbox import Inbox
from backends.processes import in_environment, process_context
from backends.serving import use_one_thread
from sim.engine import ReplicaLimits
from sim.faults import Fault
from sim.policies.batching.base import Batching
from sim.policies.registry import load_file, user_files

SILENCE_S = 10.0
"""A replica without a sign of life for so long is given up."""
LOADING_S = 600.0
"""A replica may take so long to load its model and warm up."""


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


Work = Callable[[Inbox, int, ReplicaSpec], None]
"""What a replica process does."""


class Report(NamedTuple):
    """A replica has done its part of a request."""

    replica: int
    request_id: int
    finish_s: float
    tokens: list[int] | None = None
    """Of its answer so far, where it goes on elsewhere; None: the answer is complete."""


class Processes:
    """The replica processes, their connections, and when each was heard of last."""

    inbox: type[Inbox] = Inbox
    """What a process takes its requests from."""
    noun = "replica"
    """What messages call one."""

    def __init__(self, spec: ReplicaSpec, count: int, work: Work) -> None:
        """Start them.

        Args:
            spec: sent to each.
            count: how many.
            work: what each does, called as `work(inbox, number, spec)`.
        """
        self.count = count
        self._connections: list[Connection] = []
        self._processes: list[Any] = []
        self._heard = [time.monotonic()] * count
        self._results: dict[int, Any] = {}
        self._sent = [0] * count
        self._idle = [-1] * count
        """What a replica had been sent of requests when it last ran out of work."""
        self._work = work
        for number in range(count):
            near, process = self._start(spec, number)
            self._connections.append(near)
            self._processes.append(process)

    def _start(self, spec: ReplicaSpec, number: int) -> tuple[Connection, Any]:
        """Start a process that loads and warms up."""
        context = process_context()
        near, far = context.Pipe()
        files = [str(path) for path in user_files()]
        arguments = (far, number, files, pickle.dumps(spec), self._work, self.inbox)
        process = context.Process(
            target=in_environment, args=(dict(os.environ), _serve, *arguments), daemon=True
        )
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
        self._sent[number] += kind in {"request", "hand_over"}
        try:
            self._connections[number].send((kind, content))
        except (BrokenPipeError, ConnectionResetError) as error:
            raise RuntimeError(self._lost(number, "has died")) from error

    def begin(self, start: float) -> None:
        """Let all begin a run whose t = 0 is this reading of the clock."""
        self._results.clear()
        self._sent, self._idle = [0] * self.count, [-1] * self.count
        self.send_all("start", start)

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

    def receive(self, timeout_s: float) -> list[Report]:
        """Reports that came in; waits for a message so long at most.

        Raises:
            RuntimeError: a replica died or is silent.
            ValueError: a replica refused what a policy did.
        """
        found: list[Report] = []
        for ready in wait(self._connections, timeout_s):
            number = next(at for at, one in enumerate(self._connections) if one is ready)
            while self._connections[number].poll():
                kind, content = self._take(number)
                if kind in {"answer", "prefilled"}:
                    found.append(Report(number, *content))
        for number, heard in enumerate(self._heard):
            if time.monotonic() - heard > SILENCE_S:
                raise RuntimeError(self._lost(number, f"was silent for {SILENCE_S:.0f} s"))
        return found

    def result(self, number: int) -> Any:
        """What a replica sends when it is done, or as the answer to a command.

        Raises:
            RuntimeError: any replica died or is silent.
            ValueError: any replica refused what a policy did.
        """
        while number not in self._results:
            self.receive(1.0)
        return self._results.pop(number)

    def _take(self, number: int) -> tuple[str, Any]:
        """The next message of one replica."""
        try:
            return self._next(number)
        except (EOFError, ConnectionResetError) as error:
            raise RuntimeError(self._lost(number, "has died")) from error

    def _next(self, number: int) -> tuple[str, Any]:
        """As `_take`; the end of the connection is not explained."""
        kind, content = self._connections[number].recv()
        self._heard[number] = time.monotonic()
        if kind == "refused":
            raise ValueError(f"{self.noun} {number}: {content}")
        if kind == "failed":
            raise RuntimeError(self._lost(number, f"has failed:\n{content}"))
        if kind == "result":
            self._results[number] = content
        if kind == "idle":
            self._idle[number] = content
        return kind, content

    def _lost(self, number: int, what: str) -> str:
        process = self._processes[number]
        return (
            f"{self.noun} {number} of {self.count} (process {process.pid}, exit code "
            f"{process.exitcode}) {what}; the run ends here, start it again"
        )


def _serve(
    connection: Connection, number: int, files: Sequence[str], content: bytes, work: Work,
    kind: type[Inbox],
) -> None:  # fmt: skip
    """A replica process: load, warm up, serve what comes, send what happened."""
    inbox = kind(connection)
    try:
        for name in files:
            load_file(Path(name))
        spec: ReplicaSpec = pickle.loads(content)
        use_one_thread()
        work(inbox, number, spec)
        inbox.end()
    except ValueError as error:
        with suppress(BrokenPipeError):
            inbox.send("refused", str(error))
    except (BrokenPipeError, EOFError):
        return  # the router is gone, and with it whoever would read this
    except Exception:
        with suppress(BrokenPipeError):
            inbox.send("failed", traceback.format_exc())
