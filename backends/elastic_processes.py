"""The rank processes of elastic instances: started, given orders, heard, and missed when lost."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from multiprocessing.connection import wait
from typing import Any

import numpy as np

from backends.elastic_orders import EndOrder, Farewell, Order, Report, Work
from backends.elastic_rank import OrderInbox, RankSpec, serve_rank
from backends.heartbeat import wants_processor
from backends.replica_processes import LOADING_S, Processes
from backends.slot_pool import PoolCounts
from sim.steps import Ints

STARVED_S = 60.0
"""A rank that was not heard of for so long is lost, even if it waits for a processor."""
CUT_OFF_S = 10.0
"""A rank that others cannot reach is found dead within this time."""


class InstanceProcesses(Processes):
    """A process a rank; one that dies or stops is told of, and the others go on."""

    inbox = OrderInbox
    noun = "instance"

    def __init__(self, spec: RankSpec, silent_s: float) -> None:
        """Start them; one that is not heard of for `silent_s` seconds is lost."""
        start: Any = super().__init__
        start(spec, spec.size, serve_rank)
        self._silent_s = silent_s
        self.dead: set[int] = set()

    def await_ready(self) -> None:
        """Wait until every rank has met the others, loaded and warmed up.

        Raises:
            RuntimeError: one was lost, or is not ready in time.
            ValueError: one refused its model or its sizes.
        """
        missing, deadline = set(range(self.count)), time.monotonic() + LOADING_S
        while missing:
            if time.monotonic() > deadline:
                raise RuntimeError(self._lost(min(missing), f"was not ready in {LOADING_S:.0f} s"))
            self._heard = [time.monotonic()] * self.count  # it does not beat before it is ready
            for number, kind, _ in self.hear(1.0):
                if kind == "died":
                    raise RuntimeError(self._lost(number, "has died"))
                if kind == "ready":
                    missing.discard(number)

    def hear(self, timeout_s: float) -> list[tuple[int, str, Any]]:
        """Messages of live ranks in order, and `died` for one that is gone.

        Raises:
            ValueError: a rank refused an order.
            RuntimeError: a rank failed otherwise than by being lost.
        """
        found: list[tuple[int, str, Any]] = []
        alive = {self._connections[n]: n for n in range(self.count) if n not in self.dead}
        ready: Any = wait(list(alive), timeout_s)
        for one in ready:
            number = alive[one]
            try:
                while self._connections[number].poll():
                    found.append((number, *self._next(number)))
            except (EOFError, OSError):
                self._bury(number, found)
        for number in set(alive.values()) - self.dead:
            if self._is_silent(number):
                self._processes[number].kill()  # its peers' connections close with it
                self._bury(number, found)
        return found

    def send(self, number: int, kind: str, content: Any) -> None:
        """Send a message; to one that has just died it is lost."""
        try:
            self._connections[number].send((kind, content))
        except (BrokenPipeError, ConnectionResetError):
            return  # `hear` will tell

    def _is_silent(self, number: int) -> bool:
        silent_s = time.monotonic() - self._heard[number]
        if silent_s <= self._silent_s:
            return False
        return silent_s > STARVED_S or not wants_processor(self._processes[number].pid)

    def _bury(self, number: int, found: list[tuple[int, str, Any]]) -> None:
        self.dead.add(number)
        found.append((number, "died", None))


class Desk:
    """Gives orders to ranks and collects their reports; nothing here changes who runs what."""

    def __init__(self, processes: InstanceProcesses, slots: int) -> None:
        self._processes = processes
        self.free: Ints = np.full(processes.count, slots, np.int64)
        """[instances] slots that are free by each rank's last report; 0 on one that is lost."""
        self.counts: dict[int, PoolCounts] = {}
        """The last that each rank said of its pool."""
        self.deaths: deque[int] = deque()
        """Ranks that were found lost and that nobody has taken note of."""
        self.work: list[Work] = []
        self.farewells: dict[int, Farewell] = {}
        self._members: dict[int, tuple[int, ...]] = {}
        self._begun: dict[int, set[int]] = {}
        self._done: dict[int, dict[int, Report]] = {}
        self._cut_off_s: dict[int, float] = {}
        """Since when an order waits for the news that a rank is dead."""
        self._numbers = 0

    def give(self, members: Iterable[int], order_of: Callable[[int], Order]) -> int:
        """Give all members the same order, made for its number, which is returned."""
        number, self._numbers = self._numbers, self._numbers + 1
        self._members[number] = tuple(members)
        self._begun[number], self._done[number] = set(), {}
        order = order_of(number)
        for at in self._members[number]:
            self._processes.send(at, "order", order)
        return number

    def is_done(self, number: int) -> bool:
        """Whether all members that live have reported, and all whom they could not reach are dead.

        Raises:
            RuntimeError: ranks that live cannot reach each other.
        """
        if self._missing(number, self._done[number]):
            return False
        cut_off = {at for one in self._done[number].values() for at in one.lost}
        if not cut_off - self._processes.dead:
            return True
        since_s = self._cut_off_s.setdefault(number, time.monotonic())
        if time.monotonic() - since_s > CUT_OFF_S:
            raise RuntimeError(
                f"connections to instances {sorted(cut_off)} are broken and they live; the run "
                "ends here, start it again"
            )
        return False

    def await_done(self, *numbers: int) -> list[Report]:
        """Wait for the reports of orders; those of all live members."""
        while not all(map(self.is_done, numbers)):
            self.hear(1.0)
        return [report for number in numbers for report in self.take(number)]

    def await_begun(self, number: int) -> None:
        """Wait until all members that live have taken slots for an order."""
        while self._missing(number, self._begun[number] | set(self._done[number])):
            self.hear(1.0)

    def take(self, number: int) -> list[Report]:
        """The reports of an order that is done."""
        del self._members[number], self._begun[number]
        return list(self._done.pop(number).values())

    def hear(self, timeout_s: float) -> None:
        """Take in what ranks say, waiting so long at most for it."""
        for at, kind, content in self._processes.hear(timeout_s):
            if kind == "died":
                self.free[at] = 0
                self.deaths.append(at)
            elif kind == "farewell":
                self.farewells[at] = content
                self.counts[at] = content.counts
            elif kind in {"begun", "done"}:
                self._reported(at, kind, content)

    def _reported(self, at: int, kind: str, report: Report) -> None:
        self.counts[at] = report.counts
        self.free[at] = report.counts.free_slots
        if kind == "begun":
            self._begun[report.number].add(at)
        else:
            self._done[report.number][at] = report
            if report.work is not None:
                self.work.append(report.work)

    def end(self) -> None:
        """Let all ranks that live report for the last time, and leave."""
        self._processes.send_all("order", EndOrder())
        while set(range(self._processes.count)) - self._processes.dead - set(self.farewells):
            self.hear(1.0)

    def _missing(self, number: int, heard: Iterable[int]) -> set[int]:
        return set(self._members[number]) - self._processes.dead - set(heard)
