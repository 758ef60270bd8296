"""One replica under simulated time: decide, apply, let the iterations pass, hand out the tokens."""

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Generator
from functools import partial
from typing import Any

from simpy.events import Event

from sim.costs.base import decode_shape
from sim.engine import ReplicaLimits
from sim.models.work import IterationShape
from sim.policies.batching.base import DECODE, ONE_BY_ONE, Batch, Batching, Wake
from sim.processes.exact_time import ExactEnvironment
from sim.processes.hooks import Copier, Finished, Inlet, News, PassOn
from sim.processes.pace import Pace
from sim.recorder import Recorder
from sim.requests import Request, RequestView
from sim.state.prefixes import Prefixes
from sim.state.replica_state import ReplicaState, Seat
from sim.trace import State


class Replica:
    """A serving engine's main loop. Decode stretches in which nothing can change are one event."""

    def __init__(  # noqa: PLR0913  what a replica is made of, and how it is driven
        self,
        environment: ExactEnvironment,
        batching: Batching,
        limits: ReplicaLimits,
        pace: Pace,
        *,
        one_by_one: bool = False,
        schedules_ahead: bool = False,
        finished: Finished | None = None,
        number: int = 0,
        pass_on: PassOn | None = None,
        inlet: Inlet | None = None,
        prefixes: Prefixes | None = None,
        copier: Copier | None = None,
        driven: bool = False,
    ) -> None:
        self.environment = environment
        self.number = number
        self.batching = batching
        self.pace = pace
        self.one_by_one = one_by_one
        self.finished = finished
        self.state = ReplicaState(limits, prefixes)
        self.recorder = Recorder(number)
        self._memory = batching.init()
        self._pass_on, self._inlet, self._copier = pass_on, inlet, copier
        self._idle: Event | None = None
        self._timer: Event | None = None
        """The end of the decode stretch under way, if it may be cut short."""
        self._arrival_cuts = False
        """Whether an arrival is enough for that."""
        self._boundaries: list[float] = []
        """The boundaries of that stretch, its start first."""
        self._settled = 0
        """Iterations of that stretch that `state` already counts."""
        self._joined: list[int] = []
        self._left: list[int] = []
        self._newcomers: list[Seat] = []
        """Requests from elsewhere that have not decoded here yet."""
        self._unseen: deque[News] | None = deque() if schedules_ahead else None
        self._decided_s = 0.0
        """Start of the last iteration: when the decision at its end was taken, if ahead."""
        self._begun: Batch | None = None
        self._serving = self.serve()
        if not driven:  # else somebody calls `begin` and `end`, for several replicas at once
            environment.process(self._serving)

    def submit(self, request: Request, generated_tokens: int = 0) -> None:
        """Take a request at its arrival. One that comes in mid-run ends the run at a boundary.

        Args:
            request: what has arrived.
            generated_tokens: of its answer, which a replica that died had handed out.
        """
        self.recorder.arrived(request)
        self.notice(
            partial(self.state.submit, request, generated_tokens), always=False,
            arrival=(request.request_id, generated_tokens),
        )  # fmt: skip

    def queue(self, request: Request) -> None:
        """At a boundary: take a request that the coming decision sees."""
        self.recorder.arrived(request)
        self.state.submit(request)

    def notice(
        self, apply: Callable[[], object], *, always: bool = True,
        arrival: tuple[int, int] | None = None,
    ) -> None:  # fmt: skip
        """Take something that comes from outside: the next decision sees it.

        Args:
            apply: makes it part of the state.
            always: whether it ends every decode stretch, or as an arrival only some.
            arrival: of which request, and the tokens that it has; None: of none.
        """
        later = 0
        if self._unseen is None or self._idle is not None:
            apply()
        else:
            self._unseen.append(News(self.environment.now, apply, always, arrival))
            later = 1
        if self._idle is not None:
            self._idle.succeed()
            self._idle = None
        elif self._timer is not None and (always or self._arrival_cuts):
            boundaries = self._boundaries
            count = bisect_left(boundaries, self.environment.now, 1) + later
            if count < len(boundaries) - 1:
                self.environment.advance(self._timer, boundaries[count])
                del boundaries[count + 1 :]
                self.recorder.repeat(count)
            self._timer = None

    def _see(self, *, idle: bool = False) -> None:
        """Let the policy see what had come in when it decided; `idle`: it decides only now."""
        unseen = self._unseen
        while unseen and (idle or unseen[0].instant_s <= self._decided_s):
            unseen.popleft().apply()
        if self._inlet is not None:
            self._inlet.take(self)

    def look(self) -> ReplicaState:
        """The state at the last boundary before now, for whoever looks in from outside.

        In the middle of a decode stretch, `state` alone is still as the stretch began. A boundary
        of this very instant is yet to come, as it is for an arrival.
        """
        if self._boundaries:
            self._settle(bisect_left(self._boundaries, self.environment.now) - 1)
        return self.state

    def _settle(self, count: int) -> None:
        """Let `state` count the first `count` iterations of the stretch."""
        if count > self._settled:
            self.state.decode(count - self._settled)
            self._settled = count

    def serve(self) -> Generator[Event, Any, None]:
        """The main loop, from one decision to the next."""
        state, environment = self.state, self.environment
        if self.pace.start_s is not None:
            yield environment.decision(max(self.pace.start_s, environment.now))
        elif environment.now > 0:
            # One that begins in mid-run sees who arrives at this very instant, as at any boundary.
            yield environment.boundary(environment.now)
        while True:
            if self.pace.takes_turns:
                yield environment.decision(environment.now)  # after those who waited for it
            # Asked again: another may have taken what this one waited for.
            while (instant_s := self.pace.decides_s(environment.now)) > environment.now:
                yield environment.decision(instant_s)
            self._see()
            if not state.waiting and not state.num_running:
                self._see(idle=True)
                if not state.waiting and not state.num_running:
                    yield self._sleep()
                    continue
            batch = self.batching.next_batch(self._memory, state)
            if batch.prefill or batch.preempt or batch.admit:
                yield environment.boundary(self._iterate(batch))
                self._complete(batch.prefill)
            elif batch.decode and state.num_decoding and self._evicts_next():
                yield environment.boundary(self._iterate(batch))
                self._complete(())
            elif batch.decode and state.num_decoding:
                yield self._stretch()
                self._timer = None
                self._decided_s = self._boundaries[-2]
                self.recorder.passed(self._boundaries)
                self._settle(len(self._boundaries) - 1)
                self._boundaries, self._settled = [], 0
                self._complete(())
            elif self._unseen:
                self._see(idle=True)
            else:
                yield self._sleep()

    def _evicts_next(self) -> bool:
        """Whether the next decode takes blocks that must be copied elsewhere first."""
        return self._copier is not None and self.state.decode_blocks > self.state.empty_blocks

    def cancel(self, request_id: int) -> None:
        """Let a request go at a boundary; nothing happens to one that has its last token."""
        if not self.state.knows(request_id):
            return
        ran = self.state.cancel(request_id)
        if ran is not None:
            self._ended(*ran, State.cancelled)
        else:
            self.recorder.event(request_id, self.environment.now, State.cancelled)

    def preempt(self, request_ids: tuple[int, ...]) -> None:
        """At a boundary: drop the KV of running requests and queue them first."""
        for seat, count in self.state.preempt(request_ids):
            self._ended(seat, count, State.preempted)

    def die(self) -> dict[int, int]:
        """End for ever, now, before any boundary of this instant: what is under way is lost.

        Returns:
            The requests that were here, each with the tokens of its answer that were handed out.
        """
        self._serving.close()
        now, state, recorder = self.environment.now, self.state, self.recorder
        ahead = 0  # decode iterations that `state` counts and that are lost
        if self._boundaries:
            passed = max(bisect_left(self._boundaries, now) - 1, 0)
            self._settle(passed)
            if passed:
                recorder.repeat(passed)
                recorder.passed(self._boundaries[: passed + 1])
            else:
                recorder.undo(passed=False)
        elif recorder.ends_after(now):
            ahead = int(recorder.undo(passed=True))
        had = {view.request_id: view.generated_tokens for view in state.waiting}
        had |= dict(news.arrival for news in self._unseen or () if news.arrival is not None)
        for seat in state.seats():
            request_id = seat.request.request_id
            had[request_id] = seat.request.output_tokens - seat.tokens_left
            if seat.joined >= 0:
                count = state.steps - seat.joined - ahead
                recorder.run(request_id, seat.first_iteration, count)
                had[request_id] += 1 + count
        for request_id in had:
            recorder.event(request_id, now, State.lost)
        return had

    def _sleep(self) -> Event:
        instant_s = self.pace.wakes_s(self.environment.now)
        if instant_s is not None:
            return self.environment.decision(instant_s)
        self._idle = Event(self.environment)
        return self._idle

    def seat(self, request: RequestView, tokens: int) -> None:
        """Let a request decode from now on; the KV of so many tokens has come from elsewhere."""
        self._newcomers.append(self.state.seat(request, tokens))
        self._joined.append(request.request_id)
        self.recorder.event(request.request_id, self.environment.now, State.decoding)

    def begin(self) -> Batch | None:
        """Decide on an iteration and apply it; None: there is nothing to do."""
        state = self.state
        if not state.waiting and not state.num_running:
            return None
        batch = self.batching.next_batch(self._memory, state)
        if not (batch.prefill or batch.preempt or batch.admit):
            if not (batch.decode and state.num_decoding):
                return None
            self._require_room(state.steps_in_memory(1))
        self._enter(batch)
        self._begun = batch
        return batch

    def end(self) -> None:
        """The iteration that was begun is over, now."""
        batch = self._begun
        assert batch is not None
        self._begun = None
        self.recorder.passed((self._decided_s, self.environment.now))
        self._complete(batch.prefill)

    def _iterate(self, batch: Batch) -> float:
        """Apply and record a batch that is one iteration; returns its end."""
        shape = self._enter(batch)
        # Copies come first, as the batch takes the blocks that they free and reads what they bring.
        copy_s = 0.0 if self._copier is None else self._copier.copy(self._decided_s)
        boundaries = self.pace.iteration(self._decided_s + copy_s, shape)
        self.recorder.passed(boundaries)
        return boundaries[1]

    def _enter(self, batch: Batch) -> IterationShape:
        """Apply and record a batch; the work of its iteration."""
        state = self.state
        before = state.observed()
        try:
            shape = self._apply(batch)
        except ValueError as error:
            raise ValueError(self._complaint(f"{batch}: {error}")) from error
        if shape.num_decodes:
            state.decode(1)
        self._decided_s = self.environment.now
        self._log(1, before, shape, batch)
        if state.free_blocks < 0 or state.num_running > state.limits.max_num_seqs:
            raise ValueError(self._complaint(f"{batch} takes more blocks or seats than there are"))
        return shape

    def _apply(self, batch: Batch) -> IterationShape:
        """Move requests as the batch says; returns the work of the iteration."""
        state, now = self.state, self.environment.now
        self.preempt(batch.preempt)
        for request_id in batch.admit:
            self.recorder.reused(request_id, state.admit(request_id))
            self.recorder.event(request_id, now, State.admitted)
        shape = state.prefill(batch.prefill, state.num_decoding if batch.decode else 0)
        if not shape.tokens:
            raise ValueError("it moves requests but computes nothing")
        return shape

    def _stretch(self) -> Event:
        """Begin as many decode iterations as may pass before the next decision; their end."""
        state = self.state
        if self.one_by_one:
            standing, count = ONE_BY_ONE, state.steps_in_memory(1)
        else:
            standing = self.batching.steady(self._memory, state)
            empty = None if self._copier is None else state.empty_blocks
            count = min(standing.iterations, state.steps_to_finish())
            count = state.steps_in_memory(count, empty)
            self._arrival_cuts = Wake.arrival in standing.wake_on
            if self._unseen and (self._arrival_cuts or any(news.always for news in self._unseen)):
                count = min(count, 1)
        self._require_room(count)
        decodes = state.num_decoding
        before = state.observed()
        read = state.decode_context + decodes
        self._boundaries = self.pace.decode_run(self.environment.now, decodes, read, count)
        count = len(self._boundaries) - 1
        self._log(count, before, decode_shape(decodes, read), DECODE)
        timer = self.environment.boundary(self._boundaries[-1])
        self._timer = timer if count > 1 else None
        return timer

    def _require_room(self, decode_iterations: int) -> None:
        if decode_iterations < 1:
            raise ValueError(self._complaint("a decode takes more blocks than are free"))

    def _complete(self, chunks: tuple[tuple[int, int], ...]) -> None:
        """An iteration has passed: completed prompts begin to decode, finished requests leave."""
        now = self.environment.now
        joined: list[Seat] = []
        if chunks:
            for seat in self.state.join(chunks, self.recorder.num_iterations - 1):
                request_id = seat.request.request_id
                self._joined.append(request_id)
                self.recorder.event(request_id, now, State.decoding)
                joined.append(seat)
        for seat, count in self.state.finish():
            self._ended(seat, count, State.finished)
            if self.finished is not None:
                self.finished(seat.request.request_id, now)
        if self._pass_on is not None:
            for seat in joined:
                if seat.joined >= 0:  # its first token was not its last
                    self.state.hold(seat)
                    self._ended(seat, 0, State.handed_over)
                    self._pass_on(seat.request, now)

    def _ended(self, seat: Seat, count: int, state: State) -> None:
        request_id = seat.request.request_id
        if seat.first_iteration >= 0:
            self.recorder.run(request_id, seat.first_iteration, count - seat.fetched)
        if seat.first_iteration >= 0 or seat.fetched:
            if request_id in self._joined:
                self._joined.remove(request_id)
            else:
                self._left.append(request_id)
        self.recorder.event(request_id, self.environment.now, state)

    def _log(
        self, repeat: int, before: tuple[int, int, int, int], shape: IterationShape, batch: Batch
    ) -> None:
        now = self.environment.now
        if self._newcomers and shape.num_decodes:
            for seat in self._newcomers:
                seat.first_iteration = self.recorder.num_iterations
            self._newcomers = []
        self.recorder.decision(now, repeat, before, shape, batch, self._joined, self._left)
        if self._joined or self._left:
            self._joined, self._left = [], []

    def _complaint(self, problem: str) -> str:
        name = type(self.batching).__name__
        state = self.state
        return (
            f"policy {name} at {self.environment.now} s: {problem} (free blocks "
            f"{state.free_blocks}, running {state.num_running}, {state.limits}); mend the policy"
        )
