"""What a replica asks of those around it, and what it is told in mid-run."""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, Protocol

from sim.requests import Request

if TYPE_CHECKING:
    from sim.processes.replica import Replica

Finished = Callable[[int, float], None]
"""Called with (request id, instant) when a request has its last token."""
PassOn = Callable[[Request, float], None]
"""Called with (request, instant) when a request has its first token and goes on elsewhere."""


class Inlet(Protocol):
    """Where requests come in that were prefilled elsewhere."""

    def take(self, replica: "Replica") -> None:
        """Seat the requests whose KV has come, and decide whose is fetched now."""
        ...


class Copier(Protocol):
    """Carries out what a knowledge cache decided with a batch, before the batch is computed."""

    def copy(self, now_s: float) -> float:
        """Note it, and return the seconds that its copies take."""
        ...


class News(NamedTuple):
    """What came in after the next decision was taken, one iteration ahead."""

    instant_s: float
    apply: Callable[[], object]
    always: bool
    """Whether it ends every decode stretch."""
    arrival: tuple[int, int] | None = None
    """Request that arrived, and the tokens that it has."""
