"""One replica for real: the same policy, a real model, a paged KV cache, and a real clock.

The twin of `sim/processes/replica.py`. What it shows to the policy and writes into the trace comes
from its own tensors: free blocks from the owners of blocks, contexts from the slots written.
"""

import time
from collections import deque
from collections.abc import Callable

import torch

from backends.arrivals import Arrivals, Feed
from backends.batch_checks import (
    blocks_needed,
    check_prefill,
    check_room,
    require_running,
    waiting_view,
)
from backends.exchange import Exchange
from backends.executor import Executor
from backends.forward_batch import Begun, Chunk
from backends.kv_cache import PagedKVCache
from backends.observed import ObservedView, Sequence
from backends.prompt_store import HashedPrompts, PromptStore
from backends.sampling import Sampler
from sim.engine import ReplicaLimits
from sim.models.work import IterationShape
from sim.policies.batching.base import Batch, Batching
from sim.recorder import Recorder
from sim.requests import Request, RequestView, RunningView
from sim.state.prefix_cache import NOTHING_CACHED, CachedPrefix
from sim.trace import State, Trace
from sim.workload.source import Source

Prompts = Callable[[Request], list[int]]
"""The token ids of a request's prompt."""


class Replica:
    """A serving engine on one device or several: one batched forward an iteration."""

    def __init__(  # noqa: PLR0913  what an engine is made of
        self,
        *,
        model: Executor,
        cache: PagedKVCache,
        batching: Batching,
        limits: ReplicaLimits,
        prompts: Prompts,
        sampler: Sampler,
        stop_token: int | None = None,
        number: int = 0,
        exchange: Exchange | None = None,
        store: PromptStore | None = None,
    ) -> None:
        """Put an engine together.

        Args:
            model: computes tokens, on one rank or several.
            cache: holds the KV in the blocks of `limits`.
            batching: decides every iteration.
            limits: of the engine.
            prompts: gives the token ids of a request's prompt.
            sampler: turns logits into tokens; draws depend on seed, request and position only.
            stop_token: ends an answer before its forced length; None forces the length.
            number: of the replica, among several.
            exchange: hands requests over to other instances, or takes them; None: there are none.
            store: keeps KV of prompts for later requests; None: by the hashes of blocks, where
                `limits` say so.
        """
        self.model = model
        self.cache = cache
        self.batching = batching
        self.limits = limits
        self.prompts = prompts
        self.sampler = sampler
        self.stop_token = stop_token
        self.recorder = Recorder(number)
        self.waiting: deque[RequestView] = deque()
        self.answers: dict[int, list[int]] = {}
        """Token ids of every finished answer."""
        self._memory = batching.init()
        self._exchange = exchange
        if store is None and limits.prefix_caching:
            store = HashedPrompts(cache)
        self._store = store
        self._resumed: dict[int, list[int]] = {}
        self._known: dict[int, Sequence] = {}
        self._seated: dict[int, Sequence] = {}
        self._decoding: list[int] = []
        """Requests that decode, as the last decision was told."""

    def serve(self, source: Source) -> Trace:
        """Serve all requests of a source at their arrival times; t = 0 is the call.

        Raises:
            ValueError: the policy overbooks blocks or seats, moves requests that are elsewhere, or
                schedules nothing although no request will come any more.
        """
        return self.run(Arrivals(source), time.perf_counter())

    def run(self, feed: Feed, start: float) -> Trace:
        """Serve what a feed brings until it says that nothing more will come.

        Args:
            feed: hands out requests and is told of answers.
            start: the clock's reading at t = 0.

        Raises:
            ValueError: as `serve`.
        """
        while True:
            now_s, requests = feed.due(start)
            for request in requests:
                self.submit(request)
            if self._exchange is not None:
                self._exchange.settle(self, now_s)
            busy = (self.waiting or self._seated) and self.step(now_s, start, feed)
            if busy or feed.wait(start):
                continue
            if self._exchange is not None:
                self._exchange.require_served()
            if unserved := len(self.waiting) + len(self._seated):
                name = type(self.batching).__name__
                raise ValueError(
                    f"policy {name} left {unserved} requests unserved and waits for arrivals that "
                    "never come; mend the policy"
                )
            return self.recorder.trace()

    def submit(self, request: Request) -> None:
        """Queue a request that has arrived."""
        self.recorder.arrived(request)
        sequence = Sequence(request, list(self.prompts(request)))
        if self._store is not None:
            self._store.submitted(sequence)
        sequence.tokens += self._resumed.pop(request.request_id, ())
        self._known[request.request_id] = sequence
        self.waiting.append(request.view(sequence.generated))

    def cancel(self, request_id: int, now_s: float) -> None:
        """Let a request go at a boundary; nothing happens to one that has its last token."""
        sequence = self._known.pop(request_id, None)
        if sequence is None:
            return
        if self._seated.pop(request_id, None) is not None:
            self._end_stay(sequence, State.cancelled, now_s)
        else:
            self.waiting.remove(waiting_view(request_id, self.waiting))
            self.recorder.event(request_id, now_s, State.cancelled)
        if self._store is not None:
            self._store.forget(sequence)

    def knows(self, request_id: int) -> bool:
        """Whether a request waits or runs."""
        return request_id in self._known

    def resume(self, request_id: int, tokens: list[int]) -> None:
        """Let a request that is to come go on after tokens that a replica that died handed out."""
        self._resumed[request_id] = tokens

    def answers_so_far(self) -> dict[int, list[int]]:
        """Token ids of the answers of all running requests."""
        return {
            request_id: sequence.tokens[sequence.request.prompt_tokens :]
            for request_id, sequence in self._seated.items()
        }

    @property
    def num_pending(self) -> int:
        """Requests whose prefill is not complete."""
        return len(self.waiting) + sum(one.prefill_left > 0 for one in self._seated.values())

    @property
    def num_running(self) -> int:
        """Requests that have a seat."""
        return len(self._seated)

    def seat(self, sequence: Sequence) -> None:
        """Take over a request whose first `computed` tokens have their KV here already."""
        request_id = sequence.request.request_id
        self._known[request_id] = self._seated[request_id] = sequence
        self.cache.allocate(request_id, sequence.computed)
        if sequence.computed:
            slots = self.cache.slots(request_id, 0, sequence.computed)
            self.cache.begin_write(torch.tensor(slots))

    def step(self, now_s: float, start: float, feed: Feed) -> bool:
        """One decision and its iteration; False when the policy schedules nothing.

        Args:
            now_s: instant of the decision; every request that arrived by then is queued.
            start: the clock's reading at t = 0.
            feed: told of finished requests, whose clients may issue the next.
        """
        begun = self.begin(now_s)
        if begun is None:
            return False
        tokens = self._compute(begun.chunks)
        end_s = time.perf_counter() - start
        for request_id in self.complete(begun, tokens, end_s):
            feed.answered(request_id, end_s)
        return True

    def begin(self, now_s: float) -> Begun | None:
        """Decide, and make room for the batch; None when the policy schedules nothing.

        Raises:
            ValueError: the policy overbooks blocks or seats, or moves requests that are elsewhere.
        """
        view = self.observe()
        context_tokens = sum(seat.context_tokens for seat in view.seats)
        before = (view.free_blocks, len(self.waiting), context_tokens, self.cache.cached_blocks)
        batch = self.batching.next_batch(self._memory, view)
        if not (batch.prefill or batch.preempt or batch.admit) and not (
            batch.decode and view.num_decoding
        ):
            return None
        try:
            self._seat(batch, now_s)
            chunks, shape = self._chunks(batch, now_s)
        except ValueError as error:
            raise ValueError(self._complaint(now_s, f"{batch}: {error}")) from error
        self._log(now_s, before, shape, batch)
        return Begun(now_s, chunks)

    def complete(self, begun: Begun, tokens: list[int], end_s: float) -> list[int]:
        """Take the tokens of the batch that was begun last; the requests that have their last one.

        Args:
            begun: the batch.
            tokens: of every chunk that wants one, in order.
            end_s: when they were there.
        """
        self.recorder.passed((begun.instant_s, end_s))
        return self._append(begun.chunks, tokens, end_s)

    def observe(self) -> ObservedView:
        """What the tensors show now."""
        cache = self.cache
        seats = [
            RunningView(
                request_id,
                cache.stored_tokens(request_id) if sequence.computed else 0,
                sequence.prefill_left,
            )
            for request_id, sequence in self._seated.items()
        ]
        return ObservedView(
            self.limits, self.waiting, cache.free_blocks, seats, self.cached_prefix, cache.given_up
        )

    def cached_prefix(self, request: RequestView) -> CachedPrefix:
        """What of a waiting request's prompt is cached."""
        if self._store is None:
            return NOTHING_CACHED
        return self._store.cached(self._known[request.request_id])

    def preempt(self, request_ids: tuple[int, ...], now_s: float) -> None:
        """Drop the KV of running requests and queue them first."""
        for request_id in reversed(request_ids):
            require_running(request_id, self._seated)
            sequence = self._seated.pop(request_id)
            self._end_stay(sequence, State.preempted, now_s)
            self.waiting.appendleft(sequence.request.view(sequence.generated))

    def _seat(self, batch: Batch, now_s: float) -> None:
        """Pre-empt, then admit."""
        self.preempt(batch.preempt, now_s)
        for request_id in batch.admit:
            self.waiting.remove(waiting_view(request_id, self.waiting))
            sequence = self._known[request_id]
            reused = 0 if self._store is None else self._store.hold(sequence)
            self.recorder.reused(request_id, reused)
            sequence.begin_stay(reused)
            self._seated[request_id] = sequence
            self.recorder.event(request_id, now_s, State.admitted)

    def _chunks(self, batch: Batch, now_s: float) -> tuple[list[Chunk], IterationShape]:
        """The tokens to compute, with room made for their KV; decodes first."""
        chunks: list[Chunk] = []
        if batch.decode:
            for request_id, sequence in self._seated.items():
                if not sequence.prefill_left:
                    last = len(sequence.tokens) - 1
                    chunks.append(Chunk(request_id, sequence.tokens[last:], last))
        contexts = [chunk.start + 1 for chunk in chunks]
        check_prefill(batch.prefill, self._seated)
        prefills: list[tuple[int, int]] = []
        for request_id, count in batch.prefill:
            sequence = self._seated[request_id]
            start = sequence.computed
            ids = sequence.tokens[start : start + count]
            chunks.append(Chunk(request_id, ids, start, count == sequence.prefill_left))
            prefills.append((count, start))
        if self._store is not None:
            self._store.load()
        check_room(batch, chunks, len(self._seated), self.cache, self.limits)
        if self._store is not None:
            self._store.make_room(blocks_needed(chunks, self.cache), now_s)
        for chunk in chunks:
            self.cache.allocate(chunk.request_id, chunk.start + len(chunk.token_ids))
        sampled = sum(chunk.sample for chunk in chunks)
        return chunks, IterationShape.of(prefills, contexts, sampled)

    def _compute(self, chunks: list[Chunk]) -> list[int]:
        """One forward pass; the next token of every chunk that wants one, in order."""
        return self.model.next_tokens(chunks, self.cache, self.sampler)

    def _append(self, chunks: list[Chunk], tokens: list[int], end_s: float) -> list[int]:
        """Hand out the tokens; returns the requests that have their last one."""
        iteration = self.recorder.num_iterations - 1
        following = iter(tokens)
        finished: list[int] = []
        for chunk in chunks:
            sequence = self._seated[chunk.request_id]
            decoded = not sequence.prefill_left
            sequence.computed += len(chunk.token_ids)
            if self._store is not None and not decoded:
                self._store.store(sequence)
            if not chunk.sample:
                continue
            token = next(following)
            sequence.tokens.append(token)
            if decoded and sequence.first_iteration < 0:
                sequence.first_iteration = iteration  # it was prefilled elsewhere
            elif decoded:
                sequence.decodes += 1
            else:
                sequence.first_iteration = iteration
                self.recorder.event(chunk.request_id, end_s, State.decoding)
            ends = sequence.generated == sequence.request.output_tokens
            if ends or token == self.stop_token:
                finished.append(chunk.request_id)
        finished = [request_id for request_id in self._seated if request_id in finished]
        for request_id in finished:
            self._finish(request_id, end_s)
        if self._exchange is not None and self._exchange.passes_on:
            prefilled = [one for one in self._seated.values() if not one.prefill_left]
            for sequence in prefilled:
                self._pass_on(self._exchange, sequence, end_s)
        return finished

    def _pass_on(self, exchange: Exchange, sequence: Sequence, end_s: float) -> None:
        """A request goes on elsewhere; its blocks stay until its KV has been fetched."""
        request_id = sequence.request.request_id
        del self._seated[request_id], self._known[request_id]
        self.recorder.run(request_id, sequence.first_iteration, 0)
        self.recorder.event(request_id, end_s, State.handed_over)
        exchange.pass_on(self, sequence, end_s)

    def _finish(self, request_id: int, end_s: float) -> None:
        sequence = self._seated.pop(request_id)
        del self._known[request_id]
        self._end_stay(sequence, State.finished, end_s)
        if self._store is not None:
            self._store.forget(sequence)
        self.answers[request_id] = sequence.tokens[sequence.request.prompt_tokens :]
        self.recorder.answered(request_id, sequence.generated)

    def _end_stay(self, sequence: Sequence, state: State, now_s: float) -> None:
        request_id = sequence.request.request_id
        if self._store is not None:
            self._store.leave(sequence)
        if sequence.computed:
            self.cache.free(request_id)
        if sequence.first_iteration >= 0:
            self.recorder.run(request_id, sequence.first_iteration, sequence.decodes)
        self.recorder.event(request_id, now_s, state)

    def _log(
        self, now_s: float, before: tuple[int, int, int, int], shape: IterationShape, batch: Batch
    ) -> None:
        known = set(self._decoding)
        decoding = [
            request_id for request_id, sequence in self._seated.items() if not sequence.prefill_left
        ]
        joined = [request_id for request_id in decoding if request_id not in known]
        left = [request_id for request_id in self._decoding if request_id not in set(decoding)]
        self._decoding = decoding
        self.recorder.decision(now_s, 1, before, shape, batch, joined, left)

    def _complaint(self, now_s: float, problem: str) -> str:
        return (
            f"policy {type(self.batching).__name__} at {now_s} s: {problem} (free blocks "
            f"{self.cache.free_blocks}, running {len(self._seated)}, {self.limits}); "
            "mend the policy"
        )
