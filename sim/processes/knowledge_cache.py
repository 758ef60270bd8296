"""A knowledge cache under simulated time: searches in stages, then generation behind cached KV.

RAGCache (sections 4 and 5). Searches take cores first come, first served. What their stages find
reaches the engine at its next boundary, which starts and stops generations. A batch begins with the
copies between host and GPU that it needs; nothing is computed meanwhile.
"""

from collections import deque
from collections.abc import Generator, Iterator
from functools import partial
from heapq import heapify, heapreplace
from typing import Any, NamedTuple

from simpy.events import Event

from sim.engine import ReplicaLimits
from sim.generations import NONE, Generations, Question
from sim.knowledge_recorder import KnowledgeRecorder
from sim.knowledge_rules import Rules, Tiers, copied_blocks, tree_of
from sim.processes.exact_time import ExactEnvironment
from sim.processes.pace import Pace
from sim.processes.replica import Replica
from sim.queue_order import QueueOrder
from sim.state.knowledge_prefixes import KnowledgePrefixes
from sim.trace import Trace


class Search(NamedTuple):
    """How long searches take, and how many run at once."""

    scan_s: float
    """Of all vectors that a search compares."""
    stage_overhead_s: float
    cores: int

    def stage_s(self, num_stages: int) -> float:
        """Seconds of each stage of a search of so many."""
        return self.stage_overhead_s + self.scan_s / num_stages


class StageLog(NamedTuple):
    """When another run took note of what its searches found, for replay."""

    rows: list[tuple[int, int, float]]
    """(request, stage, instant) in order."""
    spans_s: dict[int, tuple[float, float]]
    """Begin and end of the search of each request."""

    @classmethod
    def of(cls, trace: Trace) -> "StageLog":
        """The log of a trace."""
        stages = (trace.stages[name].tolist() for name in ("request", "stage", "instant_s"))
        searches = (trace.searches[name].tolist() for name in ("request", "begin_s", "end_s"))
        spans = {request: (begin, end) for request, begin, end in zip(*searches, strict=True)}
        return cls(list(zip(*stages, strict=True)), spans)


class Found(NamedTuple):
    """A stage of a search has ended."""

    question: Question
    stage: int
    begin_s: float
    end_s: float
    """Of the search up to this stage."""


class KnowledgeCache:
    """Stands between the searches and the replica: its inlet, and its copier."""

    def __init__(
        self, rules: Rules, tiers: Tiers, prefixes: KnowledgePrefixes | None, *,
        replays: bool = False,
    ) -> None:  # fmt: skip
        self.recorder = KnowledgeRecorder()
        self.news: deque[Found] = deque()
        self._prefixes, self._tiers, self._replays = prefixes, tiers, replays
        self._generations = Generations(rules.retrieval_overlap, tiers.documents)
        self._order = QueueOrder(rules.request_order)

    def take(self, replica: Replica) -> None:
        """At a boundary: start and stop generations as the stages of searches ask for it."""
        state, now = replica.state, replica.environment.now
        gone: set[int] = set()
        while self.news:
            found = self.news.popleft()
            pool_size = len(state.waiting) + state.num_prefilling
            stopped, started = self._generations.staged(found.question, found.stage, pool_size)
            if stopped != NONE:
                gone.add(stopped)
                replica.cancel(stopped)
            if started is not None:
                if self._prefixes is not None:
                    self._prefixes.register(started.request.request_id, started.documents)
                replica.submit(started.request)
            number = NONE if started is None else started.request.request_id
            request = found.question.request
            self.recorder.stage(
                request.request_id, found.stage, now, pool_size, stopped, number
            )  # fmt: skip
            if found.stage == found.question.last_stage:
                answer = self._generations.answers(found.question)
                self.recorder.search(
                    request.request_id, answer, request.arrival_s, found.begin_s, found.end_s
                )  # fmt: skip
        queue = self._order.arrange(state, gone)
        if queue is not None:
            state.waiting = queue

    def copy(self, now_s: float) -> float:
        """Note what the cache decided with a batch; seconds until its blocks are as they must be.

        What leaves goes first, as what comes takes its blocks.
        """
        if self._prefixes is None:
            return 0.0
        self.recorder.looked_up(self._prefixes.take_lookups(), now_s)
        moves = self._prefixes.tree.take_moves()
        self.recorder.moved(moves, now_s)
        if self._replays or not moves:
            return 0.0
        return sum([self._tiers.copy_s(blocks) for blocks in copied_blocks(moves) if blocks])


class Searches:
    """Searches of all questions, on cores that they take in order of arrival."""

    def __init__(self, replica: Replica, cache: KnowledgeCache, search: Search) -> None:
        self._replica, self._cache, self._search = replica, cache, search

    def run(self, questions: Iterator[Question]) -> Generator[Event, Any, None]:
        """Let questions arrive and be searched."""
        environment = self._replica.environment
        free_s = [0.0] * self._search.cores
        heapify(free_s)
        for question in questions:
            arrival_s = question.request.arrival_s
            if arrival_s > environment.now:
                yield environment.arrival(arrival_s)
            begin_s = end_s = max(arrival_s, free_s[0])
            stage_s = self._search.stage_s(len(question.stages))
            for stage in range(len(question.stages)):
                end_s += stage_s
                if question.matters(stage):
                    self._ends(Found(question, stage, begin_s, end_s), end_s)
            heapreplace(free_s, end_s)

    def replay(self, questions: Iterator[Question], log: StageLog) -> None:
        """Let stages end when another run took note of them."""
        by_id = {one.request.request_id: one for one in questions}
        for request_id, stage, instant_s in log.rows:
            self._ends(Found(by_id[request_id], stage, *log.spans_s[request_id]), instant_s)

    def _ends(self, found: Found, instant_s: float) -> None:
        event = self._replica.environment.arrival(instant_s)
        event.callbacks = [partial(self._tell, found)]

    def _tell(self, found: Found, event: Event) -> None:
        del event
        self._cache.news.append(found)
        self._replica.notice(_nothing)


def _nothing() -> None:
    """The inlet takes what there is at the next boundary by itself."""


def simulate_knowledge(  # noqa: PLR0913, PLR0917  what a knowledge cache is made of
    questions: Iterator[Question],
    rules: Rules,
    limits: ReplicaLimits,
    pace: Pace,
    tiers: Tiers,
    search: Search,
    log: StageLog | None = None,
    *,
    one_by_one: bool = False,
) -> Trace:
    """Search and answer all questions on one replica.

    Args:
        questions: in order of arrival.
        rules: every decision.
        limits: of the engine.
        pace: how long iterations last, copies apart.
        tiers: where KV of documents is kept.
        search: how long searches take.
        log: when another run took note of its searches, for replay; None: as `search` says.
        one_by_one: ask the batching rule at every iteration, also where its decision stands.

    Raises:
        ValueError: a policy overbooks, or leaves requests unserved.
    """
    environment = ExactEnvironment()
    prefixes = tree_of(rules, tiers, limits.block_size)
    cache = KnowledgeCache(rules, tiers, prefixes, replays=log is not None)
    replica = Replica(
        environment, rules.batching, limits, pace,
        one_by_one=one_by_one, inlet=cache, prefixes=prefixes, copier=cache,
    )  # fmt: skip
    searches = Searches(replica, cache, search)
    if log is None:
        environment.process(searches.run(questions))
    else:
        searches.replay(questions, log)
    environment.run()
    cache.copy(environment.now)  # what the last requests left in the cache
    if unserved := replica.state.num_unfinished + len(cache.news):
        raise ValueError(
            f"policy {type(rules.batching).__name__} left {unserved} requests unserved and waits "
            "for arrivals that never come; mend the policy"
        )
    return cache.recorder.into(replica.recorder.trace())
