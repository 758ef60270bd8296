"""Replicas take turns: even in number, blind to length, load and prefix."""

from dataclasses import dataclass
from typing import Any

from sim.policies.routing.base import RouterView, Routing
from sim.requests import RequestView


@dataclass
class Turn:
    """Whose turn it is."""

    replica: int = 0


@dataclass(kw_only=True)
class RoundRobin(Routing):
    """The next replica in a circle; a dead one is passed over."""

    def init(self) -> Any:
        """The first request goes to replica 0."""
        return Turn()

    def choose(self, memory: Any, request: RequestView, view: RouterView) -> int:
        """Whose turn it is, whatever the request."""
        del request
        chosen = memory.replica
        while chosen not in view.live:
            chosen = (chosen + 1) % view.num_replicas
        memory.replica = (chosen + 1) % view.num_replicas
        return chosen
