"""Requests given one by one: what a real run served, simulated again, or a few written by hand."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sim.requests import HASH_BLOCK_TOKENS
from sim.workload.base import CHUNK_ROWS, RequestColumns, Workload
from sim.workload.checks import require_count

Numbers = Sequence[float] | NDArray[np.float64] | NDArray[np.int64]


@dataclass(kw_only=True)
class Recorded(Workload):
    """A workload held in memory, one entry a request."""

    arrival_s: list[float]
    """Seconds since the start, not decreasing; with `num_clients`: think times (seconds)."""
    prompt_tokens: list[int]
    """Length of each prompt (tokens)."""
    output_tokens: list[int]
    """Length of each answer (tokens)."""
    prefix_hashes: list[list[int]] | None = None
    """Chain hashes of the leading prompt blocks of each request, where they are known."""
    hash_block_tokens: int = HASH_BLOCK_TOKENS
    """Prompt tokens that one of them stands for."""
    num_clients: int | None = None
    """Clients of a closed loop (request i belongs to client i modulo it); null in an open loop."""

    def __post_init__(self) -> None:
        """Refuses columns of unequal length and entries out of range."""
        super().__post_init__()
        require_count("num_clients", self.num_clients, 8)
        require_count("hash_block_tokens", self.hash_block_tokens, HASH_BLOCK_TOKENS)
        num_requests = len(self.arrival_s)
        hashes = self.prefix_hashes if self.prefix_hashes is not None else self.arrival_s
        lengths = {num_requests, len(self.prompt_tokens), len(self.output_tokens), len(hashes)}
        if lengths != {num_requests} or num_requests == 0:
            raise ValueError(
                f"columns of {sorted(lengths)} entries must be equally long and not empty; "
                "give every request an arrival, a prompt and an output length"
            )
        for name, values in (("prompt", self.prompt_tokens), ("output", self.output_tokens)):
            if min(values) < 1:
                at = values.index(min(values))
                raise ValueError(
                    f"{name}_tokens[{at}]={values[at]} must be at least 1; leave the request out"
                )
        if self.max_output_tokens is not None and max(self.output_tokens) > self.max_output_tokens:
            raise ValueError(
                f"max_output_tokens={self.max_output_tokens} must not be below the recorded "
                f"answers; set it to {max(self.output_tokens)} or null"
            )
        self._check_times()

    def _check_times(self) -> None:
        times = np.array(self.arrival_s)
        if self.num_clients is None:
            times = np.diff(times, prepend=0.0)
        wrong = np.flatnonzero(~(np.isfinite(times) & (times >= 0)))
        if len(wrong):
            at = int(wrong[0])
            raise ValueError(
                f"arrival_s[{at}]={self.arrival_s[at]} must be finite, not negative and not before "
                "the request ahead of it; sort the requests by arrival"
            )

    @property
    def clients(self) -> int | None:
        """Clients of the loop, if it is closed."""
        return self.num_clients

    def columns(self, seed: int, chunk_rows: int = CHUNK_ROWS) -> Iterator[RequestColumns]:
        """The requests as given, in chunks; the seed changes nothing."""
        for start in range(0, len(self.arrival_s), chunk_rows):
            rows = slice(start, start + chunk_rows)
            hashes = self.prefix_hashes
            yield RequestColumns(
                np.array(self.arrival_s[rows], dtype=np.float64),
                np.array(self.prompt_tokens[rows], dtype=np.int64),
                np.array(self.output_tokens[rows], dtype=np.int64),
                None if hashes is None else [tuple(ids) for ids in hashes[rows]],
                hash_block_tokens=self.hash_block_tokens,
            )


def replayed(  # noqa: PLR0913  the columns of a workload
    arrival_s: Numbers,
    prompt_tokens: Numbers,
    output_tokens: Numbers,
    *,
    prefix_hashes: Sequence[Sequence[int]] | None = None,
    hash_block_tokens: int = HASH_BLOCK_TOKENS,
    num_clients: int | None = None,
    max_output_tokens: int | None = None,
) -> Recorded:
    """The workload of given columns (arrays or sequences), as when a real run is simulated again.

    Raises:
        ValueError: the columns differ in length, or an entry is out of range.
    """
    return Recorded(
        arrival_s=np.asarray(arrival_s, dtype=np.float64).tolist(),
        prompt_tokens=np.asarray(prompt_tokens, dtype=np.int64).tolist(),
        output_tokens=np.asarray(output_tokens, dtype=np.int64).tolist(),
        prefix_hashes=None if prefix_hashes is None else [list(ids) for ids in prefix_hashes],
        hash_block_tokens=hash_block_tokens,
        num_clients=num_clients,
        max_output_tokens=max_output_tokens,
    )
