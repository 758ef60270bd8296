"""A knowledge cache for real: documents searched in stages while others are prefilled.

The twin of `sim/processes/knowledge_cache.py`. Searches run in threads of their own; what their
stages find is taken in at the boundaries of the engine.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from math import inf
from typing import NamedTuple, Protocol

from backends.corruption import Corruption
from backends.executor import Executor
from backends.knowledge_store import HostArena, KnowledgeStore
from backends.kv_cache import PagedKVCache
from backends.replica import Replica
from backends.sampling import Sampler
from backends.serving import warm_up, without_collections
from sim.engine import ReplicaLimits
from sim.generations import GIVEN_UP, LOST, NONE, Generations, Question
from sim.knowledge_mishaps import NO_MISHAPS, Mishaps
from sim.knowledge_recorder import KnowledgeRecorder
from sim.knowledge_rules import Rules, Tiers, loses, tree_of
from sim.queue_order import QueueOrder
from sim.requests import Request
from sim.trace import Trace


class Found(Protocol):
    """What a stage of a real search found."""

    @property
    def request_id(self) -> int: ...  # noqa: D102
    @property
    def stage(self) -> int: ...  # noqa: D102
    @property
    def documents(self) -> tuple[int, ...]: ...  # noqa: D102
    @property
    def begin_s(self) -> float:
        """When the search of this request began."""
        ...

    @property
    def instant_s(self) -> float:
        """When the stage ended."""
        ...


class Searcher(Protocol):
    """Searches in the background, at the arrival of each request."""

    def start(self, start: float) -> None:
        """Begin; t = 0 is when the clock reads `start`."""
        ...

    def due(self) -> Sequence[Found]:
        """What has been found and was not handed out, in order."""
        ...

    @property
    def done(self) -> bool:
        """Whether all has been handed out."""
        ...

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until something is found; False when the time is up or nothing more will be."""
        ...

    def close(self) -> None:
        """End its threads."""
        ...


class Texts(NamedTuple):
    """Token ids of all that prompts are made of."""

    documents: Sequence[Sequence[int]]
    questions: Sequence[Sequence[int]]
    """By request."""
    system: Sequence[int] = ()

    def prompt(self, request_id: int, documents: tuple[int, ...]) -> list[int]:
        """System prompt, documents by rank, question."""
        behind = [token for one in documents for token in self.documents[one]]
        return [*self.system, *behind, *self.questions[request_id]]


class Answered(NamedTuple):
    """What a real run gives back; bytes as its own tensors counted them."""

    trace: Trace
    answers: dict[int, list[int]]
    """Token ids of every full answer, by request."""
    found: dict[int, list[tuple[int, ...]]]
    """Documents after each stage, by request."""
    kv_bytes_written: int
    kv_bytes_read: int
    bytes_swapped_out: int
    bytes_loaded: int


class KnowledgeFeed:
    """Turns what searches find into generations, at the boundaries of a replica."""

    def __init__(
        self, searcher: Searcher, rules: Rules, tiers: Tiers, questions: Mapping[int, Question],
        recorder: KnowledgeRecorder, mishaps: Mishaps,
    ) -> None:  # fmt: skip
        self.documents_of: dict[int, tuple[int, ...]] = {}
        """By generation."""
        self.question_of: dict[int, int] = {}
        """The request that a generation is of."""
        self.found: dict[int, list[tuple[int, ...]]] = {one: [] for one in questions}
        self.replica: Replica | None = None
        self.store: KnowledgeStore | None = None
        self._searcher, self._questions = searcher, questions
        self._generations = Generations(
            rules.retrieval_overlap, tiers.documents, may_give_up=mishaps.gives_up
        )
        self._lost_s, self._restart_s = deque(mishaps.lost_s), mishaps.restart_s
        self._ready_s = 0.0
        """When the device computes again after a loss."""
        self._leaves_s: deque[tuple[float, int]] = deque()
        """When clients leave, in order, and of which requests."""
        if mishaps.timeout_s is not None:
            self._leaves_s.extend(
                (one.request.arrival_s + mishaps.timeout_s, number)
                for number, one in questions.items()
            )
        self._order, self._recorder = QueueOrder(rules.request_order), recorder

    def due(self, start: float) -> tuple[float, Sequence[Request]]:
        """Take in what was found, and submit what it leads to; the replica gets nothing else."""
        replica = self.replica
        assert replica is not None
        found = self._searcher.due()
        now_s = time.perf_counter() - start
        gone: set[int] = set()
        for one in found:
            self._go_wrong(replica, one.instant_s, now_s, gone)
            question = self._seen(one)
            matters = self._generations.matters(question, one.stage)
            if matters and self._generations.wants(question):
                self._decide(replica, question, one, now_s, gone)
        self._go_wrong(replica, now_s, now_s, gone)
        if self._order.is_due(replica.waiting):
            queue = self._order.arrange(replica.observe(), gone)
            if queue is not None:
                replica.waiting = queue
        if replica.waiting or replica.num_running:
            time.sleep(max(self._ready_s - now_s, 0.0))
        return now_s, ()

    def wait(self, start: float) -> bool:
        """Wait for the next news; False when all searches are over."""
        next_s = min(self._next_s(), default=None)
        timeout_s = None if next_s is None else max(next_s - (time.perf_counter() - start), 0.0)
        return self._searcher.wait(timeout_s) or not self._searcher.done

    def answered(self, request_id: int, finish_s: float) -> None:
        """Nobody waits for it to ask again."""

    def _seen(self, one: Found) -> Question:
        """The question with what its search has found so far."""
        found = self.found[one.request_id]
        found.append(one.documents)
        question = self._questions[one.request_id]
        unknown = len(question.stages) - len(found)
        return question._replace(stages=(*found, *[()] * unknown))

    def _decide(
        self, replica: Replica, question: Question, one: Found, now_s: float, gone: set[int]
    ) -> None:
        pool_size = replica.num_pending
        stopped, started = self._generations.staged(question, one.stage, pool_size)
        self._stop(replica, stopped, now_s, gone)
        number = NONE
        if started is not None:
            number = started.request.request_id
            self.documents_of[number] = started.documents
            self.question_of[number] = one.request_id
            replica.submit(started.request)
        self._recorder.stage(one.request_id, one.stage, now_s, pool_size, stopped, number)
        if one.stage == question.last_stage:
            answer = self._generations.answers(question)
            self._recorder.search(
                one.request_id, answer, question.request.arrival_s, one.begin_s, one.instant_s
            )  # fmt: skip

    def _give_up(self, replica: Replica, question: Question, now_s: float, gone: set[int]) -> None:
        """A client leaves, if it has no full answer."""
        stopped = self._generations.gives_up(question, replica.knows)
        if stopped is None:
            return
        pool_size = replica.num_pending
        self._stop(replica, stopped, now_s, gone)
        request_id = question.request.request_id
        self._recorder.stage(request_id, GIVEN_UP, now_s, pool_size, stopped, NONE)

    def _stop(self, replica: Replica, generation: int, now_s: float, gone: set[int]) -> None:
        if generation != NONE:
            gone.add(generation)
            replica.cancel(generation, now_s)

    def _next_s(self) -> list[float]:
        """When the next loss comes and the next client leaves."""
        lost_s = [self._lost_s[0]] if self._lost_s else []
        return lost_s + ([self._leaves_s[0][0]] if self._leaves_s else [])

    def _go_wrong(self, replica: Replica, until_s: float, now_s: float, gone: set[int]) -> None:
        """Losses and clients that leave up to an instant, in order."""
        while (next_s := min(self._next_s(), default=inf)) <= until_s:
            if self._lost_s and self._lost_s[0] == next_s:
                self._lost_s.popleft()
                self._lose(replica, now_s)
            else:
                question = self._questions[self._leaves_s.popleft()[1]]
                self._give_up(replica, question, now_s, gone)

    def _lose(self, replica: Replica, now_s: float) -> None:
        """All KV on the device is gone: who ran is computed again."""
        running = tuple(seat.request_id for seat in replica.observe().seats)
        store = self.store
        if not loses(len(running), None if store is None else store.prefixes):
            return
        self._recorder.stage(NONE, LOST, now_s, replica.num_pending, NONE, NONE)
        replica.preempt(running, now_s)
        if store is not None:
            store.lose(now_s)
        self._ready_s = max(self._ready_s, now_s) + self._restart_s


def serve_knowledge(  # noqa: PLR0913, PLR0917  what a knowledge cache is made of
    model: Executor,
    questions: Sequence[Question],
    searcher: Searcher,
    texts: Texts,
    rules: Rules,
    limits: ReplicaLimits,
    tiers: Tiers,
    *,
    sampler: Sampler | None = None,
    corruption: Corruption | None = None,
    mishaps: Mishaps = NO_MISHAPS,
) -> Answered:
    """Warm up, then search and answer all questions; t = 0 is after the warm-up.

    Args:
        model: what to run.
        questions: in order of arrival; of their stages only the number counts.
        searcher: searches them at their arrival.
        texts: token ids of documents and questions.
        rules: every decision.
        limits: of the engine.
        tiers: where KV of documents is kept.
        sampler: None is greedy.
        corruption: a fault to put into the KV cache.
        mishaps: what goes wrong in mid-run.

    Raises:
        ValueError: a policy overbooks, or leaves requests unserved.
    """
    warm_up(model, limits)
    recorder = KnowledgeRecorder()
    by_id = {one.request.request_id: one for one in questions}
    feed = KnowledgeFeed(searcher, rules, tiers, by_id, recorder, mishaps)
    cache = model.new_cache(limits.num_blocks, limits.block_size)
    cache.corrupt = corruption
    feed.store = store = _store(cache, rules, tiers, feed, recorder)

    def prompt(request: Request) -> list[int]:
        generation = request.request_id
        return texts.prompt(feed.question_of[generation], feed.documents_of[generation])

    feed.replica = replica = Replica(
        model=model, cache=cache, batching=rules.batching, limits=limits, prompts=prompt,
        sampler=sampler or Sampler(), store=store,
    )  # fmt: skip
    with without_collections():
        start = time.perf_counter()
        searcher.start(start)
        try:
            trace = replica.run(feed, start)
        finally:
            searcher.close()
    if store is not None:
        store.finish(time.perf_counter() - start)
    return _answered(recorder.into(trace), replica, feed, store)


def _store(
    cache: PagedKVCache, rules: Rules, tiers: Tiers, feed: KnowledgeFeed,
    recorder: KnowledgeRecorder,
) -> KnowledgeStore | None:  # fmt: skip
    """Both tiers, empty; None where nothing is kept."""
    prefixes = tree_of(rules, tiers, cache.block_size)
    if prefixes is None:
        return None
    host = HostArena(cache, tiers.host_blocks)
    host.corrupt = cache.corrupt
    return KnowledgeStore(cache, prefixes, host, feed.documents_of.__getitem__, recorder)


def _answered(
    trace: Trace, replica: Replica, feed: KnowledgeFeed, store: KnowledgeStore | None
) -> Answered:
    """What came of a run."""
    final = zip(trace.searches["request"].tolist(), trace.searches["generation"].tolist(),
                strict=True)  # fmt: skip
    cache = replica.cache
    return Answered(
        trace=trace,
        answers={
            request: replica.answers[generation]
            for request, generation in final
            if generation in replica.answers
        },
        found=feed.found,
        kv_bytes_written=cache.written_bytes,
        kv_bytes_read=cache.read_bytes,
        bytes_swapped_out=0 if store is None else store.host.bytes_out,
        bytes_loaded=0 if store is None else store.host.bytes_back,
    )
