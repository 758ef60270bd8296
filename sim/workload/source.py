"""Hands a workload's requests to an executor, simulated or real, and checks them before a run."""

from collections.abc import Iterator
from itertools import islice, repeat
from typing import NamedTuple

import numpy as np

from sim.requests import Request
from sim.workload.base import RequestColumns, Workload

_READ_AHEAD = 256
"""Requests of a closed loop read at once: the cost of starting to read is spread over them."""


class Source:
    """The requests of one run. Both panels read theirs through it, so both see the same ones.

    Args:
        workload: where requests come from; call `check` on it first.
        seed: the scenario's seed.
        max_model_tokens: context of the model, prompt and answer together.
    """

    def __init__(self, workload: Workload, seed: int, max_model_tokens: int) -> None:
        self._workload = workload
        self._seed = seed
        self._max_model_tokens = max_model_tokens
        self._clients = workload.clients
        self._restart()

    def initial(self) -> Iterator[Request]:
        """Requests that wait for no answer, in order of arrival.

        Open loop: all of them, made lazily. Closed loop: the first of each client. Calling it
        again starts the workload anew.
        """
        self._restart()
        if self._clients is None:
            return self._stream
        first = [self._take(client) for client in range(self._clients)]
        return iter(sorted((r for r in first if r), key=lambda request: request.arrival_s))

    def after(self, request_id: int, finish_s: float) -> Request | None:
        """The request that the client of `request_id` issues next, given when its answer ended.

        None in an open loop, and when the workload is spent. Its arrival (`finish_s` plus think
        time) is in the future: the caller waits for it.
        """
        if self._clients is None:
            return None
        following = self._take(request_id + self._clients)
        if following is None:
            return None
        return following._replace(arrival_s=finish_s + following.arrival_s)

    def _restart(self) -> None:
        self._stream = self._requests()
        self._ahead: dict[int, Request] = {}
        self._num_read = 0

    def _requests(self) -> Iterator[Request]:
        start = 0
        for columns in self._workload.columns(self._seed):
            yield from self._rows(columns, start)
            start += len(columns)

    def _rows(self, columns: RequestColumns, start: int) -> Iterator[Request]:
        # What the context leaves bounds a stated limit too: no answer can outgrow it.
        most = self._max_model_tokens - columns.prompt_tokens
        if self._workload.max_output_tokens is not None:
            most = np.minimum(most, self._workload.max_output_tokens)
        rows = zip(
            range(start, start + len(columns)),
            columns.arrival_s.tolist(),
            columns.prompt_tokens.tolist(),
            columns.output_tokens.tolist(),
            most.tolist(),
            repeat((), len(columns)) if columns.prefix_hashes is None else columns.prefix_hashes,
            repeat(columns.hash_block_tokens, len(columns)),
            strict=True,
        )
        return map(Request._make, rows)

    def _take(self, request_id: int) -> Request | None:
        """One request of a closed loop; those of slower clients read on the way are kept."""
        ahead = self._ahead
        if request_id not in ahead:
            assert request_id >= self._num_read, f"request {request_id} was issued before"
            num_held = len(ahead)
            missing = islice(self._stream, request_id - self._num_read + _READ_AHEAD)
            ahead.update((request[0], request) for request in missing)
            self._num_read += len(ahead) - num_held
        return ahead.pop(request_id, None)


class WorkloadTotals(NamedTuple):
    """What a workload adds up to."""

    num_requests: int
    prompt_tokens: int
    output_tokens: int
    num_skipped: int
    """Failed requests of a trace that were passed over."""
    last_arrival_s: float
    """Arrival of the last request; not a number in a closed loop, where the run decides it."""
    num_hashed: int = 0
    """Requests with prefix hashes."""


def check(
    workload: Workload, seed: int, max_request_tokens: int, *, prefixes: bool = False
) -> WorkloadTotals:
    """Reads a workload once before a run, and says what it adds up to.

    Args:
        workload: what the run will serve.
        seed: the scenario's seed.
        max_request_tokens: prompt and answer together at most, from the model's context and memory.
        prefixes: whether its prefix hashes will be used, so that they must be chain hashes.

    Raises:
        ValueError: it is empty, a line of its trace is broken, a request can never fit, or a prefix
            hash follows two different ones.
    """
    num_requests = prompt_tokens = output_tokens = num_skipped = num_hashed = 0
    parents: dict[int, int | None] = {}
    last_s = 0.0
    for columns in workload.columns(seed):
        num_skipped += columns.num_skipped
        if not len(columns):
            continue
        _check_rows(columns, num_requests, max_request_tokens)
        _check_times(columns, num_requests, last_s if workload.clients is None else None)
        if columns.prefix_hashes is not None:
            num_hashed += sum(map(bool, columns.prefix_hashes))
            if prefixes:
                _check_chains(columns.prefix_hashes, num_requests, parents)
        last_s = float(columns.arrival_s[-1])
        num_requests += len(columns)
        prompt_tokens += int(columns.prompt_tokens.sum())
        output_tokens += int(columns.output_tokens.sum())
    if num_requests == 0:
        raise ValueError(
            f"{workload} brings 0 requests and must bring at least 1; raise its rate or duration"
        )
    last_s = float("nan") if workload.clients is not None else last_s
    return WorkloadTotals(
        num_requests, prompt_tokens, output_tokens, num_skipped, last_s, num_hashed
    )


def _check_chains(
    prompts: list[tuple[int, ...]], start: int, parents: dict[int, int | None]
) -> None:
    """Refuse a hash that stands for two prefixes: it would let requests share what differs."""
    for at, hashes in enumerate(prompts):
        parent: int | None = None
        for one in hashes:
            if parents.setdefault(one, parent) != parent:
                raise ValueError(
                    f"request {start + at} has prefix hash {one} after {parent}, and another has "
                    f"it after {parents[one]}; a hash must stand for all tokens up to the end of "
                    "its block: chain the hashes, or set engine.prefix_caching=false"
                )
            parent = one


def _check_rows(columns: RequestColumns, start: int, max_request_tokens: int) -> None:
    prompts, answers = columns.prompt_tokens, columns.output_tokens
    short = np.flatnonzero((prompts < 1) | (answers < 1))
    if len(short):
        at = int(short[0])
        raise ValueError(
            f"request {start + at} has prompt_tokens={prompts[at]}, output_tokens={answers[at]}; "
            "both must be at least 1; correct the workload's columns"
        )
    long = np.flatnonzero(prompts + answers > max_request_tokens)
    if len(long):
        at = int(long[0])
        raise ValueError(
            f"request {start + at} needs {prompts[at]} prompt + {answers[at]} output = "
            f"{prompts[at] + answers[at]} tokens; at most {max_request_tokens} fit; shorten it "
            "(max_output_tokens, and max_input_tokens of a trace or max_tokens of a generated "
            "workload) or choose a model or machine that holds more"
        )


def _check_times(columns: RequestColumns, start: int, last_s: float | None) -> None:
    """Refuses times out of order; think times (`last_s` is None) have none."""
    times = columns.arrival_s
    steps = times if last_s is None else np.diff(times, prepend=last_s)
    wrong = np.flatnonzero(~(np.isfinite(times) & (steps >= 0)))
    if len(wrong):
        at = int(wrong[0])
        raise ValueError(
            f"request {start + at} has arrival_s={times[at]}; arrivals must be finite, not "
            "negative and in order; sort the workload's columns"
        )
