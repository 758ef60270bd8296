"""The contract of a workload: columns of requests, in order, drawn anew from a seed each time."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sim.requests import HASH_BLOCK_TOKENS
from sim.workload.checks import require_count

CHUNK_ROWS = 65_536
"""Rows of a chunk: large enough for numpy, small enough that memory stays flat."""


@dataclass(frozen=True, slots=True)
class RequestColumns:
    """Some consecutive requests of a workload, one entry a request."""

    arrival_s: NDArray[np.float64]
    """Seconds since the start, not decreasing. In a closed loop: think time before the request."""
    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    prefix_hashes: list[tuple[int, ...]] | None = None
    """Chain hashes of the leading prompt blocks where they are known; see `RequestView`."""
    num_skipped: int = 0
    """Rows of a trace that were passed over among these because their request had failed."""
    hash_block_tokens: int = HASH_BLOCK_TOKENS
    """Prompt tokens that one prefix hash stands for."""
    retrieved: list[tuple[tuple[int, ...], ...]] | None = None
    """What the search of each request had found after each of its stages: documents by rank; the
    last entry is the answer."""

    def __len__(self) -> int:
        return len(self.arrival_s)


@dataclass(kw_only=True)
class Workload(ABC):
    """Where requests come from. Fields are its parameters; it is its own Hydra schema.

    Iterating `columns` twice with the same seed gives the same requests: start-up checks read them
    once and the run reads them again, so that nothing has to be kept in memory.
    """

    max_output_tokens: int | None = None
    """Limit that every request states: longer answers end there, and policies see it (tokens)."""

    def __post_init__(self) -> None:
        """Refuses parameters out of range. Subclasses extend it; it never does I/O."""
        require_count("max_output_tokens", self.max_output_tokens)

    @abstractmethod
    def columns(self, seed: int, chunk_rows: int = CHUNK_ROWS) -> Iterator[RequestColumns]:
        """All requests in order of arrival (closed loop: of request id), in chunks.

        Args:
            seed: the scenario's seed.
            chunk_rows: rows of a chunk at most. It never changes the values.

        Raises:
            ValueError: a line of its trace is broken (file and line named).
        """

    @property
    def clients(self) -> int | None:
        """Clients of a closed loop; None when arrivals do not depend on answers.

        Client c issues the requests c, c + clients, c + 2 * clients, ..., each one its
        `arrival_s` (think time) after the answer to the one before is complete.
        """
        return None
