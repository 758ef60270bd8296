"""A SimPy environment whose events fire at exact instants.

`timeout(b - now)` fires at `now + (b - now)`, which may miss b by one rounding. Boundaries of
iterations are compared with arrivals for equality of order, so they must be hit exactly.
"""

from heapq import heappush

import simpy
from simpy.events import NORMAL, URGENT, Event, EventPriority


class ExactEnvironment(simpy.Environment):
    """`simpy.Environment` with absolute instants; arrivals fire before boundaries at a tie."""

    def boundary(self, instant_s: float) -> Event:
        """An event at `instant_s`, after every arrival of that instant."""
        return self._at(instant_s, NORMAL)

    def arrival(self, instant_s: float) -> Event:
        """An event at `instant_s`, before every boundary of that instant."""
        return self._at(instant_s, URGENT)

    def decision(self, instant_s: float) -> Event:
        """An event at `instant_s`, after every arrival and boundary of that instant."""
        return self._at(instant_s, EventPriority(NORMAL + 1))

    def advance(self, boundary: Event, instant_s: float) -> Event:
        """Let whoever waits for `boundary` go on at the earlier `instant_s`."""
        earlier = self._at(instant_s, NORMAL)
        earlier.callbacks, boundary.callbacks = boundary.callbacks, []  # pyright: ignore[reportUnknownMemberType]
        return earlier

    def fire(self, event: Event, instant_s: float) -> None:
        """Let an event that somebody may already wait for fire at `instant_s`, as an arrival."""
        if instant_s < self._now:
            raise ValueError(f"instant_s={instant_s} lies before now={self._now}")
        event._ok = True  # pyright: ignore[reportPrivateUsage]
        event._value = None  # pyright: ignore[reportPrivateUsage]
        heappush(self._queue, (instant_s, URGENT, next(self._eid), event))

    def _at(self, instant_s: float, priority: EventPriority) -> Event:
        if instant_s < self._now:
            raise ValueError(f"instant_s={instant_s} lies before now={self._now}")
        event: Event = Instant(self)
        heappush(self._queue, (instant_s, priority, next(self._eid), event))
        return event


class Instant(Event):
    """An event whose instant is set when it is made, like a timeout's."""

    def __init__(self, environment: simpy.Environment) -> None:
        super().__init__(environment)
        self._ok = True
        self._value = None
