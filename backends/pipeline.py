"""Several batches in flight on the stages of a real replica. The twin of the simulated stages.

The first rank decides for all of them. It sends a batch on and begins the next one while the other
stages compute; a thread waits for tokens, so that the instant at which they are there is known
also while the first stage computes.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from threading import Thread
from typing import NamedTuple

from backends.arrivals import Arrivals
from backends.forward_batch import Begun
from backends.kv_cache import Corruption
from backends.parallel import Driver
from backends.replica import Prompts, Replica
from backends.sampling import Sampler
from backends.serving import Served, warm_up, without_collections
from backends.tokenizer import request_token_ids
from sim.engine import ReplicaLimits
from sim.policies.batching.base import Batching
from sim.policies.routing.base import Routing, checked_choice
from sim.recorder import Choice, RouteRecorder
from sim.requests import Request
from sim.state.router_state import RouterState
from sim.trace import Trace
from sim.trace_merge import merge
from sim.workload.source import Source


def serve_lanes(  # noqa: PLR0913  the parts of an engine
    driver: Driver,
    source: Source,
    batching: Batching,
    limits: ReplicaLimits,
    routing: Routing,
    lanes: int,
    *,
    seed: int = 0,
    prompts: Prompts | None = None,
    corruption: Corruption | None = None,
) -> Served:
    """As `serving.serve`, with several batches in flight. The last stage's sampler draws.

    Args:
        driver: of at least two stages.
        source: requests; their arrival times are kept.
        batching: decides every batch.
        limits: of each lane.
        routing: chooses the lane that serves a request.
        lanes: batches in flight.
        seed: of the prompts' tokens.
        prompts: token ids of each prompt; None draws them from the seed.
        corruption: a fault to put into the first rank's KV cache of lane 0.

    Raises:
        ValueError: a policy breaks its rules, or leaves requests unserved.
    """
    warm_up(driver, limits)
    vocabulary = driver.config.vocab_size
    caches = driver.new_caches(limits.num_blocks, limits.block_size, lanes)
    caches[0].corrupt = caches[0].prefixes.corrupt = corruption
    replicas = [
        Replica(
            model=driver, cache=cache, batching=batching, limits=limits, sampler=Sampler(),
            prompts=prompts or (lambda request: request_token_ids(seed, request, vocabulary)),
            number=number,
        )
        for number, cache in enumerate(caches)
    ]  # fmt: skip
    with without_collections():
        trace = Lanes(driver, replicas, routing).serve(source)
    for cache in caches:
        cache.flush()
    answers = {request: ids for one in replicas for request, ids in one.answers.items()}
    written, read, freed = (
        sum(getattr(cache, f"{what}_bytes") for cache in caches)
        for what in ("written", "read", "freed")
    )
    return Served(trace, answers, written, read, freed)


class Lanes:
    """The first rank's loop over the batches in flight."""

    def __init__(self, driver: Driver, replicas: Sequence[Replica], routing: Routing) -> None:
        """Take over warm replicas, one a lane, whose caches are the driver's."""
        assert not driver.samples, "one stage has one batch in flight"
        self._driver, self._replicas, self._routing = driver, replicas, routing
        limits = replicas[0].limits
        self._state = RouterState(len(replicas), limits.num_blocks * limits.block_size)
        self._memory = routing.init()
        self._recorder = RouteRecorder()
        self._idle = deque(range(len(replicas)))
        """Lanes without a batch in flight; who has been so longest is asked first."""
        self._flying: deque[tuple[int, Begun]] = deque()

    def serve(self, source: Source) -> Trace:
        """Serve all requests at their arrival times; t = 0 is the call.

        Raises:
            ValueError: a policy breaks its rules, or leaves requests unserved.
        """
        arrivals, start = Arrivals(source), time.perf_counter()
        with Collector(self._driver.collect) as collector:
            while True:
                for found in collector.ready():
                    self._complete(found, arrivals, start)
                now_s, requests = arrivals.due(start)
                for request in requests:
                    self._route(request, now_s)
                if self._begin(now_s, collector):
                    continue
                if self._flying:
                    until_s = arrivals.next_s
                    collector.wait(None if until_s is None else start + until_s)
                elif not arrivals.wait(start):
                    break
        self._require_served()
        return merge([one.recorder.trace() for one in self._replicas], *self._recorder.tables())

    def _route(self, request: Request, now_s: float) -> None:
        """Choose the lane of a request that has arrived; it has it at once."""
        view, state = request.view(), self._state
        lane = checked_choice(self._routing, self._memory, view, state, now_s)
        choice = Choice.of(lane, state, range(len(self._replicas)))
        self._recorder.route(request.request_id, now_s, choice, now_s)
        state.sent(view, lane)
        self._replicas[lane].submit(request)

    def _begin(self, now_s: float, collector: Collector) -> bool:
        """Decide for one lane and compute its batch's first stage; False: none has anything to do.

        One at a time: when the stage is computed, others may have come to their turn.
        """
        for lane in self._idle:
            replica = self._replicas[lane]
            if not (replica.waiting or replica.num_running):
                continue
            begun = replica.begin(now_s)
            if begun is not None:
                self._idle.remove(lane)
                self._flying.append((lane, begun))
                self._driver.begin(lane, begun.chunks)
                collector.expect(begun.num_sampled)
                return True
        return False

    def _complete(self, found: Found, arrivals: Arrivals, start: float) -> None:
        """Hand out the tokens of the oldest batch."""
        lane, begun = self._flying.popleft()
        self._idle.append(lane)
        end_s = found.instant - start
        for request_id in self._replicas[lane].complete(begun, found.tokens, end_s):
            self._state.answered(request_id)
            self._recorder.answer(request_id, time.perf_counter() - start, lane)
            arrivals.answered(request_id, end_s)

    def _require_served(self) -> None:
        unserved = sum(len(one.waiting) + one.num_running for one in self._replicas)
        if unserved:
            raise ValueError(
                f"policy {type(self._replicas[0].batching).__name__} left {unserved} requests "
                "unserved and waits for arrivals that never come; mend the policy"
            )


class Found(NamedTuple):
    """The tokens of a batch."""

    tokens: list[int]
    instant: float
    """The clock's reading when they were there."""


class Collector:
    """Waits for tokens in a thread, batch after batch in the order in which they were begun."""

    def __init__(self, collect: Callable[[int], list[int]]) -> None:
        """Take over what waits for so many tokens."""
        self._collect = collect
        self._asked: SimpleQueue[int | None] = SimpleQueue()
        self._found: SimpleQueue[Found | Exception] = SimpleQueue()
        self._next: Found | None = None
        self._thread = Thread(target=self._work, daemon=True)

    def __enter__(self) -> Collector:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """End the thread, unless it waits for tokens that no longer matter."""
        self._asked.put(None)
        if kind is None:
            self._thread.join()

    def expect(self, count: int) -> None:
        """Another batch has been begun, of which so many tokens will come."""
        self._asked.put(count)

    def ready(self) -> list[Found]:
        """Those that are there, the oldest first."""
        found = [] if self._next is None else [self._next]
        self._next = None
        while (one := self._take(0.0)) is not None:
            found.append(one)
        return found

    def wait(self, instant: float | None) -> None:
        """Wait for the next one, until the clock reads `instant` at most; None: for ever."""
        left_s = None if instant is None else max(instant - time.perf_counter(), 0.0)
        self._next = self._take(left_s)

    def _take(self, timeout_s: float | None) -> Found | None:
        try:
            found = self._found.get(timeout=timeout_s)
        except Empty:
            return None
        if isinstance(found, Exception):
            raise found
        return found

    def _work(self) -> None:
        while (count := self._asked.get()) is not None:
            try:
                tokens = self._collect(count)
            except Exception as error:
                self._found.put(error)  # raised where somebody can end the run
                return
            self._found.put(Found(tokens, time.perf_counter()))
