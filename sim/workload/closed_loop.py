"""A fixed number of clients, each of which waits for its answer and thinks before it asks again."""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from sim.seeding import generator
from sim.workload.base import CHUNK_ROWS, RequestColumns
from sim.workload.checks import require_count, require_not_negative
from sim.workload.lengths import LengthWorkload


class ThinkTimes(Enum):
    """How think times spread around their mean. Member names are what the command line takes."""

    fixed = "fixed"
    exponential = "exponential"


@dataclass(kw_only=True)
class ClosedLoop(LengthWorkload):
    """Never more than `num_clients` requests at once.

    Every client draws from streams of its own: neither the order of completions nor the number of
    other clients changes what it asks.
    """

    num_clients: int
    """Clients, each with at most one request in the system."""
    num_requests: int
    """Requests of all clients together."""
    think_time_s: float = 0.0
    """Mean time between an answer and the client's next request (seconds)."""
    think_times: ThinkTimes = ThinkTimes.fixed
    """Distribution of the think times: fixed or exponential."""

    def __post_init__(self) -> None:
        """Refuses clients without requests and negative think times."""
        super().__post_init__()
        require_count("num_clients", self.num_clients, 8)
        require_count("num_requests", self.num_requests)
        require_not_negative("think_time_s", self.think_time_s)
        if self.num_clients > self.num_requests:
            raise ValueError(
                f"num_clients={self.num_clients} must not exceed num_requests="
                f"{self.num_requests}, or some never ask; try num_clients={self.num_requests}"
            )
        if self.think_times is ThinkTimes.exponential and self.think_time_s == 0:
            warnings.warn(
                "think_times=exponential has no effect with think_time_s=0; "
                "give a think time, or leave it out",
                stacklevel=3,
            )

    @property
    def clients(self) -> int | None:
        """Clients of the loop."""
        return self.num_clients

    def columns(self, seed: int, chunk_rows: int = CHUNK_ROWS) -> Iterator[RequestColumns]:
        """All requests in order of their ids, in chunks (see `Workload.columns`)."""
        think, inputs, outputs = (
            generator(seed, source).spawn(self.num_clients)
            for source in ("think_times", "input_lengths", "output_lengths")
        )
        num_left = self.num_requests
        while num_left > 0:
            rounds = max(1, min(chunk_rows, num_left) // self.num_clients)
            count = min(num_left, rounds * self.num_clients)
            arrival_s = _by_id(self._draw_think, think, rounds)
            prompts = _by_id(
                lambda r, n: self.draw_lengths(r, self.input_tokens, n), inputs, rounds
            )
            replies = _by_id(
                lambda r, n: self.draw_lengths(r, self.output_tokens, n), outputs, rounds
            )
            for start in range(0, count, chunk_rows):
                rows = slice(start, min(start + chunk_rows, count))
                yield RequestColumns(
                    arrival_s[rows], self.whole_tokens(prompts[rows]), self.answers(replies[rows])
                )
            num_left -= count

    def _draw_think(self, rng: np.random.Generator, count: int) -> NDArray[np.float64]:
        if self.think_times is ThinkTimes.fixed:
            return np.full(count, float(self.think_time_s))
        return self.think_time_s * rng.standard_exponential(count)


def _by_id(
    draw: Callable[[np.random.Generator, int], NDArray[np.float64]],
    streams: list[np.random.Generator],
    rounds: int,
) -> NDArray[np.float64]:
    """The next `rounds` draws of every client, in order of request id (client fastest)."""
    return np.stack([draw(stream, rounds) for stream in streams], axis=1).ravel()
