"""A knowledge cache under simulated time: searches in stages, then generation behind cached KV.

RAGCache (sections 4 and 5). Searches take cores first come, first served. What their stages find
reaches the engine at its next boundary, which starts and stops generations. A batch begins with the
copies between host and GPU that it needs; nothing is computed meanwhile.
"""

from collections import deque
from collections.abc import Generator, Iterator
from functools import partial
from heapq import heappop, heappush, heapreplace
from math import nan
from typing import Any, NamedTuple

from simpy.events import Event

from sim.engine import ReplicaLimits
from sim.generations import GIVEN_UP, LOST, NONE, Generations, Question
from sim.knowledge_mishaps import NO_MISHAPS, Mishaps
from sim.knowledge_recorder import KnowledgeRecorder
from sim.knowledge_rules import COPIED, Rules, Tiers, loses, tree_of
from sim.processes.exact_time import ExactEnvironment
from sim.processes.pace import Pace
from sim.processes.replica import Replica
from sim.queue_order import QueueOrder
from sim.state.knowledge_prefixes import KnowledgePrefixes
from sim.state.knowledge_tree import Move
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
    """(request, stage or `GIVEN_UP` or `LOST`, instant) in order."""
    spans_s: dict[int, tuple[float, float]]
    """Begin and end of the search of each request whose client waited for it."""

    @classmethod
    def of(cls, trace: Trace) -> "StageLog":
        """The log of a trace."""
        stages = (trace.stages[name].tolist() for name in ("request", "stage", "instant_s"))
        searches = (trace.searches[name].tolist() for name in ("request", "begin_s", "end_s"))
        spans = {request: (begin, end) for request, begin, end in zip(*searches, strict=True)}
        return cls(list(zip(*stages, strict=True)), spans)


class Found(NamedTuple):
    """A stage of a search has ended, or its client has left (`GIVEN_UP`)."""

    question: Question
    stage: int
    begin_s: float
    end_s: float
    """Of the search up to this stage."""


class Lost(NamedTuple):
    """KV on the GPU is gone."""


class KnowledgeCache:
    """Stands between the searches and the replica: its inlet, and its copier."""

    def __init__(
        self, rules: Rules, tiers: Tiers, prefixes: KnowledgePrefixes | None, mishaps: Mishaps, *,
        replays: bool = False,
    ) -> None:  # fmt: skip
        self.recorder = KnowledgeRecorder()
        self.news: deque[Found | Lost] = deque()
        """What happened since the last boundary, in order."""
        self._prefixes, self._tiers, self._replays = prefixes, tiers, replays
        self._restart_s = 0.0 if replays else mishaps.restart_s
        self._ready_s = 0.0
        """When the GPU computes again after a loss."""
        self.generations = Generations(
            rules.retrieval_overlap, tiers.documents, may_give_up=replays or mishaps.gives_up
        )
        self._order = QueueOrder(rules.request_order)

    def take(self, replica: Replica) -> None:
        """At a boundary: start and stop generations as the stages of searches ask for it."""
        gone: set[int] = set()
        while self.news:
            found = self.news.popleft()
            if isinstance(found, Lost):
                self._lose(replica)
            elif found.stage == GIVEN_UP:
                self._give_up(replica, found.question, gone)
            elif self.generations.wants(found.question):
                self._decide(replica, found, gone)
        queue = self._order.arrange(replica.state, gone)
        if queue is not None:
            replica.state.waiting = queue

    def copy(self, now_s: float) -> float:
        """Note what the cache decided with a batch; seconds until its blocks are as they must be.

        What leaves goes first, as what comes takes its blocks.
        """
        return max(self._ready_s - now_s, 0.0) + self._note(now_s)

    def _decide(self, replica: Replica, found: Found, gone: set[int]) -> None:
        """A stage has ended: stop and start what it asks for."""
        question, now = found.question, replica.environment.now
        pool_size = _pool_size(replica)
        stopped, started = self.generations.staged(question, found.stage, pool_size)
        self._stop(replica, stopped, gone)
        number = NONE
        if started is not None:
            number = started.request.request_id
            if self._prefixes is not None:
                self._prefixes.register(number, started.documents)
            replica.queue(started.request)
        request = question.request
        self.recorder.stage(request.request_id, found.stage, now, pool_size, stopped, number)
        if found.stage == question.last_stage:
            answer = self.generations.answers(question)
            self.recorder.search(
                request.request_id, answer, request.arrival_s, found.begin_s, found.end_s
            )  # fmt: skip

    def _give_up(self, replica: Replica, question: Question, gone: set[int]) -> None:
        """A client leaves, if it has no full answer."""
        stopped = self.generations.gives_up(question, replica.state.knows)
        if stopped is None:
            return
        now, pool_size = replica.environment.now, _pool_size(replica)
        self._stop(replica, stopped, gone)
        self.recorder.stage(
            question.request.request_id, GIVEN_UP, now, pool_size, stopped, NONE
        )  # fmt: skip

    def _stop(self, replica: Replica, generation: int, gone: set[int]) -> None:
        if generation != NONE:
            gone.add(generation)
            replica.cancel(generation)

    def _lose(self, replica: Replica) -> None:
        """All KV on the GPU is gone: who ran is computed again."""
        running = tuple([seat.request.request_id for seat in replica.state.seats()])
        if not loses(len(running), self._prefixes):
            return
        now, pool_size = replica.environment.now, _pool_size(replica)
        self.recorder.stage(NONE, LOST, now, pool_size, NONE, NONE)
        replica.preempt(running)
        if self._prefixes is not None:
            self._prefixes.lose_gpu()
        self._ready_s = max(self._ready_s, now) + self._restart_s + self._note(now)

    def _note(self, now_s: float) -> float:
        """Record what was looked up and moved since the last time; seconds of the copies."""
        if self._prefixes is None:
            return 0.0
        self.recorder.looked_up(self._prefixes.take_lookups(), now_s)
        moves = self._prefixes.tree.take_moves()
        if not moves:
            return 0.0
        took_s = [self._took_s(move) for move in moves]
        self.recorder.moved(moves, took_s, now_s)
        return sum(took_s)

    def _took_s(self, move: Move) -> float:
        """Seconds of one step; under replay the log of the iterations has them."""
        copies = move.kind in COPIED and move.blocks and not self._replays
        return self._tiers.copy_s(move.blocks) if copies else 0.0


def _pool_size(replica: Replica) -> int:
    """Prefills that are pending."""
    return len(replica.state.waiting) + replica.state.num_prefilling


class Searches:
    """Searches of all questions, on cores that they take in order of arrival."""

    def __init__(
        self, replica: Replica, cache: KnowledgeCache, search: Search, mishaps: Mishaps
    ) -> None:
        self._replica, self._cache = replica, cache
        self._search, self._timeout_s = search, mishaps.timeout_s
        for instant_s in mishaps.lost_s:
            self._at(instant_s, Lost())

    def run(self, questions: Iterator[Question]) -> Generator[Event, Any, None]:
        """Tell the replica of every stage that matters when it ends."""
        environment, notice = self._replica.environment, self._replica.notice
        news = self._cache.news
        for instant_s, found in _in_time(self._found(questions)):
            if instant_s > environment.now:
                yield environment.arrival(instant_s)
            news.append(found)
            notice(_nothing)

    def _found(self, questions: Iterator[Question]) -> Iterator[tuple[float, list[Found]]]:
        """The arrival of each question, and what comes of it later."""
        free_s = [0.0] * self._search.cores
        matters, timeout_s = self._cache.generations.matters, self._timeout_s
        for question in questions:
            arrival_s = question.request.arrival_s
            found: list[Found] = []
            if timeout_s is not None:
                found.append(Found(question, GIVEN_UP, arrival_s, arrival_s + timeout_s))
            begin_s = end_s = max(arrival_s, free_s[0])
            stage_s = self._search.stage_s(len(question.stages))
            for stage in range(len(question.stages)):
                end_s += stage_s
                if matters(question, stage):
                    found.append(Found(question, stage, begin_s, end_s))
            heapreplace(free_s, end_s)
            yield arrival_s, found

    def replay(self, questions: Iterator[Question], log: StageLog) -> None:
        """Let stages end when another run took note of them."""
        by_id = {one.request.request_id: one for one in questions}
        for request_id, stage, instant_s in log.rows:
            if stage == LOST:
                self._at(instant_s, Lost())
                continue
            span_s = log.spans_s.get(request_id, (nan, nan))
            self._at(instant_s, Found(by_id[request_id], stage, *span_s))

    def _at(self, instant_s: float, news: Found | Lost) -> None:
        event = self._replica.environment.arrival(instant_s)
        event.callbacks = [partial(self._tell, news)]

    def _tell(self, news: Found | Lost, event: Event) -> None:
        del event
        self._cache.news.append(news)
        self._replica.notice(_nothing)


def _in_time(found: Iterator[tuple[float, list[Found]]]) -> Iterator[tuple[float, Found]]:
    """What comes of all questions in order of time, of one instant in order of the questions."""
    count, ahead = 0, list[tuple[float, int, Found]]()
    for arrival_s, later in found:
        while ahead and ahead[0][0] < arrival_s:
            instant_s, _, one = heappop(ahead)
            yield instant_s, one
        for one in later:
            heappush(ahead, (one.end_s, count, one))
            count += 1
    for instant_s, _, one in sorted(ahead):
        yield instant_s, one


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
    mishaps: Mishaps = NO_MISHAPS,
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
        mishaps: what goes wrong in mid-run; with a log, its instants count instead.
        one_by_one: ask the batching rule at every iteration, also where its decision stands.

    Raises:
        ValueError: a policy overbooks, or leaves requests unserved.
    """
    environment = ExactEnvironment()
    prefixes = tree_of(rules, tiers, limits.block_size)
    if log is not None:
        mishaps = NO_MISHAPS
    cache = KnowledgeCache(rules, tiers, prefixes, mishaps, replays=log is not None)
    replica = Replica(
        environment, rules.batching, limits, pace,
        one_by_one=one_by_one, inlet=cache, prefixes=prefixes, copier=cache,
    )  # fmt: skip
    searches = Searches(replica, cache, search, mishaps)
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
