"""Replica processes that are killed on time, and the replacements that take their places.

Replacements are loaded and warm before t = 0, so that one joins at its instant.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from math import inf
from multiprocessing.connection import Connection, wait
from typing import Any

from backends.inbox import Inbox
from backends.replica_processes import LOADING_S, SILENCE_S, Processes, ReplicaSpec
from backends.router import serve_once
from backends.streaming import StreamingInbox
from sim.faults import Outage, outages


class Lives(Processes):
    """Replica processes that may die, and those that will take their places."""

    inbox: type[Inbox] = StreamingInbox

    def __init__(self, spec: ReplicaSpec, count: int) -> None:
        super().__init__(spec, count, serve_once)
        self.killed: dict[int, float] = {}
        """When the injector killed the present process of a replica, by the clock."""
        self.dead: set[int] = set()
        self._planned = outages(spec.faults)
        self._returns = sorted((one for one in self._planned if one.until_s < inf), key=_until_s)
        self._standby: dict[int, deque[tuple[Connection, Any]]] = {}
        for one in self._returns:
            made = self._start(spec, one.replica)
            self._standby.setdefault(one.replica, deque()).append(made)
        self._killing = threading.Lock()
        self._overdue: list[Outage] = []
        """Deaths whose time came before the life that they are to end."""
        self._timers: list[threading.Timer] = []
        self._start_at = 0.0

    def await_ready(self) -> None:
        """Wait until every replica and every replacement has loaded its model and warmed up."""
        super().await_ready()
        deadline = time.monotonic() + LOADING_S
        for number, those in self._standby.items():
            for connection, _ in those:
                if not connection.poll(max(deadline - time.monotonic(), 0.0)):
                    raise RuntimeError(f"a replacement of replica {number} was not ready in time")
                kind, content = connection.recv()
                if kind != "ready":
                    raise RuntimeError(f"a replacement of replica {number} has failed:\n{content}")
        self._heard = [time.monotonic()] * self.count

    def begin(self, start: float) -> None:
        """Start serving at a reading of the clock, and arm the injector."""
        self._start_at = start
        self.send_all("start", start)
        for one in self._planned:
            delay_s = max(start + one.at_s - time.perf_counter(), 0.0)
            timer = threading.Timer(delay_s, self._kill, [one])
            timer.daemon = True
            timer.start()
            self._timers.append(timer)

    def _kill(self, outage: Outage) -> None:
        with self._killing:
            if outage.replica in self.killed:  # a busy machine: its next life has yet to join
                self._overdue.append(outage)
                return
            self.killed[outage.replica] = time.perf_counter()
            self._processes[outage.replica].kill()

    @property
    def next_back_s(self) -> float:
        """When the next dead replica is to come back; infinite: none is."""
        return min((one.until_s for one in self._returns if one.replica in self.dead), default=inf)

    def due_back(self, now_s: float) -> list[int]:
        """Dead replicas that are to come back by now; one whose death is not noticed waits."""
        due = [one for one in self._returns if one.until_s <= now_s and one.replica in self.dead]
        self._returns = [one for one in self._returns if one not in due]
        return [one.replica for one in due]

    def come_back(self, number: int) -> None:
        """Put a replacement, which is loaded and warm, in the place of a dead replica."""
        self._connections[number].close()
        self._processes[number].join()
        with self._killing:
            self._connections[number], self._processes[number] = self._standby[number].popleft()
            self.killed.pop(number, None)
            overdue = [one for one in self._overdue if one.replica == number]
            self._overdue = [one for one in self._overdue if one.replica != number]
        self._heard[number] = time.monotonic()
        self._sent[number], self._idle[number] = 0, -1
        self.dead.discard(number)
        self.send(number, "start", self._start_at)
        for one in overdue:
            self._kill(one)

    def hear(self, timeout_s: float) -> list[tuple[int, str, Any]]:
        """Messages of live replicas, and `died` for one that is gone, in order.

        Raises:
            ValueError: a replica refused what a policy did.
            RuntimeError: a replica failed for another reason than being killed.
        """
        found: list[tuple[int, str, Any]] = []
        alive = {self._connections[n]: n for n in range(self.count) if n not in self.dead}
        if not alive:
            self._wait_for_a_return(timeout_s)
            return found
        for ready in wait(list(alive), timeout_s):
            number = next(n for one, n in alive.items() if one is ready)
            while number not in self.dead and self._connections[number].poll():
                try:
                    found.append((number, *self._next(number)))
                except (EOFError, OSError):
                    self._bury(number, found)
        for number in set(alive.values()) - self.dead:
            if time.monotonic() - self._heard[number] > SILENCE_S:
                self._processes[number].kill()  # it must not wake and answer after others did
                self._bury(number, found)
        return found

    def _wait_for_a_return(self, timeout_s: float) -> None:
        if not self._returns:
            raise RuntimeError(
                f"all {self.count} replicas have died and none comes back; the run ends here, "
                "start it again"
            )
        time.sleep(timeout_s)

    def result(self, number: int) -> Any:
        """What a live replica sends when it is done; see `Processes`."""
        while number not in self._results:
            self.hear(1.0)
            if number in self.dead:
                raise RuntimeError(self._lost(number, "has died"))
        return self._results[number]

    def _bury(self, number: int, found: list[tuple[int, str, Any]]) -> None:
        self.dead.add(number)
        found.append((number, "died", None))

    @property
    def all_idle(self) -> bool:
        """Whether every live replica has received all and does nothing until it is sent more."""
        live = set(range(self.count)) - self.dead
        return all(self._idle[number] == self._sent[number] for number in live)

    def send(self, number: int, kind: str, content: Any) -> None:
        """Send a message; to one that has just died it is lost."""
        self._sent[number] += kind == "request"
        try:
            self._connections[number].send((kind, content))
        except (BrokenPipeError, ConnectionResetError):
            return  # `hear` will tell

    def finish(self) -> None:
        """Let all that live end; nobody is killed any more.

        Raises:
            ValueError: a replica was left with requests that its policy does not serve.
        """
        self._disarm()
        self.send_all("end", True)
        for number in set(range(self.count)) - self.dead:
            self.result(number)

    def _disarm(self) -> None:
        for timer in self._timers:
            timer.cancel()
            timer.join()

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """End what still runs, replacements that nobody needed included."""
        self._disarm()
        for those in self._standby.values():
            for connection, process in those:
                process.kill()
                process.join()
                connection.close()
        super().__exit__(kind, *rest)


def _until_s(outage: Outage) -> float:
    return outage.until_s
