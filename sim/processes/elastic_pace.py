"""How long prefills and rounds of elastic instances last: from a cost, or as another run logged."""

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from simpy.events import Event

from sim.costs.elastic import DecodeWork, ElasticCost
from sim.elastic_trace import DECODE, PREFILL, ElasticTables
from sim.processes.exact_time import ExactEnvironment

if TYPE_CHECKING:
    from sim.processes.elastic_instances import ElasticInstances


class ElasticPace(Protocol):
    """Turns work of groups into instants."""

    @property
    def asks_itself(self) -> bool:
        """Whether the plan is asked at instants of its own, and not when something happens."""
        ...

    @property
    def moves_fail(self) -> bool:
        """Whether an instance was lost while the KV of the step under way migrated."""
        ...

    def start(self, environment: ExactEnvironment, instances: "ElasticInstances") -> None:
        """Begin, before the first request arrives."""
        ...

    def prefill_end_s(
        self, now_s: float, degree: int, lengths: Sequence[int], place: int
    ) -> float | None:
        """When a prefill ends that begins now; None: never, its group is lost.

        Args:
            now_s: now.
            degree: instances.
            lengths: tokens of each request.
            place: of the prefill in its step.
        """
        ...

    def rounds(self, now_s: float, groups: Sequence[DecodeWork], count: int) -> list[float]:
        """Boundaries of up to so many rounds, `now_s` first."""
        ...


class CostedGroups:
    """From a cost, each round's seconds added to the boundary before it."""

    asks_itself = False
    moves_fail = False

    def __init__(self, cost: ElasticCost) -> None:
        self._cost = cost

    def start(self, environment: ExactEnvironment, instances: "ElasticInstances") -> None:
        """See `ElasticPace`: there is nothing to begin."""

    def prefill_end_s(
        self, now_s: float, degree: int, lengths: Sequence[int], place: int
    ) -> float | None:
        """See `ElasticPace`."""
        del place
        return now_s + self._cost.prefill_s(degree, lengths)

    def rounds(self, now_s: float, groups: Sequence[DecodeWork], count: int) -> list[float]:
        """See `ElasticPace`."""
        seconds = self._cost.round_run_s(groups, count)
        return np.add.accumulate(np.concatenate(([now_s], seconds))).tolist()


class LoggedGroups:
    """Asks when another run did, and ends what it began when that one noted its end: replay."""

    asks_itself = True

    def __init__(self, tables: ElasticTables) -> None:
        """Take over a log of rounds one by one."""
        steps, members = tables.steps, tables.members
        self._asks = list(zip(steps["instant_s"].tolist(), steps["lost"].tolist(), strict=True))
        self._end_s: dict[tuple[int, int, int], float] = {}
        """Of each group that was not lost: (step, kind, place)."""
        names = ("step", "kind", "group", "end_s", "lost")
        for *key, end_s, lost in zip(*[members[one].tolist() for one in names], strict=True):
            self._end_s[key[0], key[1], key[2]] = np.inf if lost or np.isnan(end_s) else end_s
        cut = members["lost"] == 1
        self._lost_s = dict(
            zip(members["instance"][cut].tolist(), members["end_s"][cut].tolist(), strict=True)
        )
        """When each instance was lost that computed then: before others of that instant ended."""
        moves = tables.kv_moves
        self._moved_s = dict(zip(moves["step"].tolist(), moves["end_s"].tolist(), strict=True))
        self._step = -1

    def start(self, environment: ExactEnvironment, instances: "ElasticInstances") -> None:
        """Ask at the logged instants."""
        environment.process(self._walk(environment, instances))

    def _walk(
        self, environment: ExactEnvironment, instances: "ElasticInstances"
    ) -> Generator[Event, Any, None]:
        following = [*self._asks[1:], (np.inf, -1)]
        rows = zip(self._asks, following, strict=True)
        for step, ((instant_s, lost), (next_s, next_lost)) in enumerate(rows):
            # An earlier instant is that of the loss of a peer, in another group.
            computed = environment.now < self._lost_s.get(lost, -np.inf) <= instant_s
            if computed:
                yield environment.arrival(self._lost_s[lost])
                instances.lose(lost)
            yield environment.decision(instant_s)
            self._step = step
            if lost >= 0 and not computed:
                instances.lose(lost)
            if not (lost >= 0 and next_lost >= 0 and next_s == instant_s):
                instances.ask()

    @property
    def moves_fail(self) -> bool:
        """See `ElasticPace`."""
        return bool(np.isnan(self._moved_s.get(self._step, 0.0)))

    def prefill_end_s(
        self, now_s: float, degree: int, lengths: Sequence[int], place: int
    ) -> float | None:
        """See `ElasticPace`. A group that the other run did not have ends at once."""
        del degree, lengths
        end_s = self._end_s.get((self._step, PREFILL, place), now_s)
        return None if end_s == np.inf else max(end_s, now_s)

    def rounds(self, now_s: float, groups: Sequence[DecodeWork], count: int) -> list[float]:
        """See `ElasticPace`: one round, which ends with the last group that was not lost."""
        ends_s = [
            end_s for place in range(len(groups))
            if (end_s := self._end_s.get((self._step, DECODE, place), now_s)) < np.inf
        ]  # fmt: skip
        return [now_s, max(*ends_s, now_s) if ends_s else np.inf]

    def moved_s(self, now_s: float) -> float:
        """When the KV has arrived that migrates in the step under way."""
        moved_s = self._moved_s.get(self._step, now_s)
        return now_s if np.isnan(moved_s) else max(moved_s, now_s)


class LoggedTransport:
    """Carries KV until the instant at which another run had all of a step's."""

    def __init__(self, environment: ExactEnvironment, pace: LoggedGroups) -> None:
        self._environment, self._pace = environment, pace

    def send(self, source: int, target: int, num_bytes: int) -> Event:
        """See `Transport`."""
        del source, target, num_bytes
        return self._environment.arrival(self._pace.moved_s(self._environment.now))
