"""A SimPy environment whose events fire at exact instants.

`timeout(b - now)` fires at `now + (b - now)`, which may miss b by one rounding. Boundaries of
iterations are compared with arrivals for equality of order, so they must be hit exactly.
"""

from heapq import heappush

import simpy
from simpy.events import NORMAL, URGENT, Event


class ExactEnvironment(simpy.Environment):
    """`simpy.Environment` with absolute instants; arrivals fire before boundaries at a tie."""

    def boundary(self, instant_s: float) -> Event:
        """An event at `instant_s`, after every arrival of that instant."""
        return self._at(instant_s, NORMAL)

    def arrival(self, instant_s: float) -> Event:
        """An event at `instant_s`, before every boundary of that instant."""
        return self._at(instant_s, URGENT)

    def _at(self, instant_s: float, priority: int) -> Event:
        if instant_s < self._now:
            raise ValueError(f"instant_s={instant_s} lies before now={self._now}")
        event = Event(self)
        event._ok = True
        event._value = None
        heappush(self._queue, (instant_s, priority, next(self._eid), event))
        return event
