"""Who waits, who runs and who holds which number of KV blocks on one simulated replica.

Every decoding request gains one token in every decode iteration, so a request's context is an
offset to one common counter. Advancing the whole batch by k iterations then costs the same as
advancing it by one, whatever its size.
"""

from collections import deque
from heapq import heappop, heappush

from sim.engine import ReplicaLimits
from sim.models.work import IterationShape
from sim.requests import Request, RequestView, RunningView
from sim.state.prefix_cache import NOTHING_CACHED, CachedPrefix, PrefixCache
from sim.state.prefixes import Prefixes


class Seat:
    """A running request. `context` holds while it prefills; decoding, it is `offset + steps`."""

    __slots__ = (
        "context",
        "fetched",
        "first_iteration",
        "joined",
        "offset",
        "order",
        "prefill_left",
        "request",
        "tokens_left",
    )

    def __init__(self, request: Request, prefill_left: int, tokens_left: int, order: int) -> None:
        self.request = request
        self.context = 0
        self.prefill_left = prefill_left
        self.tokens_left = tokens_left
        self.order = order
        self.offset = 0
        self.joined = -1
        self.first_iteration = -1
        self.fetched = False
        """Whether it was prefilled elsewhere; its first iteration here is then a decode."""


class ReplicaState:
    """The bookkeeping of one replica: a `ReplicaView` for policies, verbs for the process."""

    def __init__(self, limits: ReplicaLimits, prefixes: Prefixes | None = None) -> None:
        self.limits = limits
        self.waiting: deque[RequestView] = deque()
        self.free_blocks = limits.num_blocks
        self.steps = 0
        """Decode iterations so far."""
        self.num_decoding = 0
        self._requests: dict[int, Request] = {}
        self._seats: dict[int, Seat] = {}
        self._prefilling: dict[int, Seat] = {}
        self._finish: list[tuple[int, int, Seat]] = []
        self._offset_sum = 0
        self._edges = [0] * limits.block_size
        """Decoding requests by the step, modulo the block size, at which they take a new block."""
        self._order = 0
        self.num_fetching = 0
        """Requests from elsewhere whose KV has blocks here and that do not run yet."""
        self._held: dict[int, Seat] = {}
        """Requests that went on elsewhere and whose KV is not fetched yet."""
        if prefixes is None and limits.prefix_caching:
            prefixes = PrefixCache(limits.block_size)
        self._prefixes = prefixes

    @property
    def num_running(self) -> int:
        """Requests that have a seat."""
        return len(self._seats)

    @property
    def num_prefilling(self) -> int:
        """Running requests in mid-prefill."""
        return len(self._prefilling)

    @property
    def num_unfinished(self) -> int:
        """Requests that wait, run, or have KV here and no seat."""
        return len(self.waiting) + len(self._seats) + len(self._held) + self.num_fetching

    @property
    def prefilling(self) -> list[RunningView]:
        """Running requests in mid-prefill, in order of admission."""
        return [
            RunningView(request_id, seat.context, seat.prefill_left)
            for request_id, seat in self._prefilling.items()
        ]

    @property
    def decode_blocks(self) -> int:
        """New blocks that one more token for every decoding request takes."""
        return self._edges[self.steps % self.limits.block_size]

    @property
    def decode_context(self) -> int:
        """Tokens whose KV the decoding requests hold, in sum."""
        return self._offset_sum + self.num_decoding * self.steps

    @property
    def context_tokens(self) -> int:
        """Tokens whose KV is stored, in sum."""
        decoding = self._offset_sum + self.num_decoding * self.steps
        if not self._prefilling:
            return decoding
        return decoding + sum([seat.context for seat in self._prefilling.values()])

    def running(self) -> list[RunningView]:
        """All running requests in order of admission."""
        return [
            RunningView(request_id, self._context(seat), seat.prefill_left)
            for request_id, seat in self._seats.items()
        ]

    def observed(self) -> tuple[int, int, int, int]:
        """Free blocks, waiting requests, stored tokens, free blocks that hold a cached prefix."""
        cached = 0 if self._prefixes is None else self._prefixes.unheld
        return self.free_blocks, len(self.waiting), self.context_tokens, cached

    def cached_prefix(self, request: RequestView) -> CachedPrefix:
        """What of a waiting request's prompt is cached."""
        return NOTHING_CACHED if self._prefixes is None else self._prefixes.cached(request)

    def given_up(self, request_ids: tuple[int, ...]) -> int:
        """Blocks that become free when these running requests are pre-empted together."""
        contexts = [self._context(self._seats[request_id]) for request_id in request_ids]
        blocks = sum(map(self.limits.blocks_for, contexts))
        if self._prefixes is not None and request_ids:
            blocks -= self._prefixes.shared_blocks(request_ids)
        return blocks

    def submit(self, request: Request, generated_tokens: int = 0) -> None:
        """Queue a request that has arrived, or comes from a replica that died in mid-answer."""
        self._requests[request.request_id] = request
        self.waiting.append(request.view(generated_tokens))

    def knows(self, request_id: int) -> bool:
        """Whether a request waits or runs."""
        return request_id in self._requests

    def cancel(self, request_id: int) -> tuple[Seat, int] | None:
        """Let a request go that nobody wants any more; its seat and decode count, if it ran."""
        seat = self._seats.get(request_id)
        count = 0
        if seat is not None:
            count = self.steps - seat.joined if seat.joined >= 0 else 0
            self._leave(seat)
        elif request_id in self._requests:
            self._take(request_id)
        if self._requests.pop(request_id, None) is not None and self._prefixes is not None:
            self._prefixes.forget(request_id)
        return None if seat is None else (seat, count)

    def seats(self) -> list[Seat]:
        """Of all running requests, in order of admission."""
        return list(self._seats.values())

    def admit(self, request_id: int) -> int:
        """Seat a waiting request; returns the tokens of its prompt that the cache spares it."""
        waiting = self._take(request_id)
        request = self._requests[request_id]
        left = request.output_tokens - waiting.generated_tokens
        seat = Seat(request, waiting.prefill_tokens, left, self._order)
        self._order += 1
        self._seats[request_id] = self._prefilling[request_id] = seat
        if self._prefixes is None:
            return 0
        found = self._prefixes.hold(waiting)
        seat.context = found.tokens
        seat.prefill_left -= found.tokens
        self.free_blocks -= found.free_blocks
        return found.tokens

    def preempt(self, request_ids: tuple[int, ...]) -> list[tuple[Seat, int]]:
        """Drop the KV of running requests and queue them first; returns seats and decode counts."""
        dropped: list[tuple[Seat, int]] = []
        for request_id in reversed(request_ids):
            seat = self._seats.get(request_id)
            if seat is None:
                raise ValueError(f"request {request_id} is pre-empted and does not run")
            before = seat.request.output_tokens - seat.tokens_left
            count = self.steps - seat.joined if seat.joined >= 0 else 0
            generated = before + (1 + count if seat.joined >= 0 else 0)
            self._leave(seat)
            self.waiting.appendleft(seat.request.view(generated))
            dropped.append((seat, count))
        return dropped

    def prefill(self, chunks: tuple[tuple[int, int], ...], num_decodes: int) -> IterationShape:
        """Store the KV of prompt chunks; returns the shape of an iteration with so many decodes."""
        total = pairs = context = completed = 0
        if len(dict(chunks)) < len(chunks):
            raise ValueError("a request is to prefill two chunks at once")
        for request_id, tokens in chunks:
            seat = self._prefilling.get(request_id)
            left = seat.prefill_left if seat is not None else 0
            if seat is None or not 0 < tokens <= left:
                raise ValueError(
                    f"request {request_id} is to prefill {tokens} tokens and has {left} left"
                )
            before = seat.context
            after = before + tokens
            self.free_blocks -= self.limits.blocks_for(after) - self.limits.blocks_for(before)
            seat.context = after
            seat.prefill_left -= tokens
            completed += not seat.prefill_left
            total += tokens
            pairs += tokens * before + tokens * (tokens + 1) // 2
            context += after
        if self._prefixes is not None:
            self._prefixes.shrink(self.free_blocks)
        read = self.decode_context + num_decodes if num_decodes else 0
        sampled = num_decodes + completed
        return IterationShape(total, pairs, context, len(chunks), num_decodes, read, sampled)

    def join(self, chunks: tuple[tuple[int, int], ...], iteration: int) -> list[Seat]:
        """Let prompts that this iteration completed decode from the next one on."""
        joined: list[Seat] = []
        for request_id, _ in chunks:
            seat = self._seats[request_id]
            if self._prefixes is not None:
                copies, taken = self._prefixes.store(request_id, seat.context)
                self.free_blocks += copies - taken
            if seat.prefill_left:
                continue
            del self._prefilling[request_id]
            seat.first_iteration = iteration
            self._decode_from_now(seat)
            joined.append(seat)
        return joined

    def _decode_from_now(self, seat: Seat) -> None:
        seat.joined = self.steps
        seat.offset = seat.context - self.steps
        self._offset_sum += seat.offset
        self.num_decoding += 1
        self._edges[-seat.offset % self.limits.block_size] += 1
        heappush(self._finish, (self.steps + seat.tokens_left - 1, seat.order, seat))

    def hold(self, seat: Seat) -> None:
        """Give up the seat of a request that goes on elsewhere; its KV stays until `release`."""
        request_id = seat.request.request_id
        seat.context = self._context(seat)
        self._unseat(seat)
        self._held[request_id] = seat
        del self._requests[request_id]

    def release(self, request_id: int) -> None:
        """The KV of a request that is held has been fetched: its blocks are free."""
        self._free(self._held.pop(request_id))
        if self._prefixes is not None:
            self._prefixes.forget(request_id)

    def reserve(self, request: Request, tokens: int) -> None:
        """Give blocks to a request from elsewhere, for the KV of so many tokens that will come."""
        self._requests[request.request_id] = request
        self.free_blocks -= self.limits.blocks_for(tokens)
        self.num_fetching += 1

    def seat(self, request: RequestView, tokens: int) -> Seat:
        """Let a request decode that has blocks here, with the KV of so many tokens in them."""
        whole = self._requests[request.request_id]
        # A seat counts the token that it joins with as made here.
        seat = Seat(whole, 0, whole.output_tokens - request.generated_tokens + 1, self._order)
        self._order += 1
        self.num_fetching -= 1
        seat.context, seat.fetched = tokens, True
        self._seats[request.request_id] = seat
        self._decode_from_now(seat)
        return seat

    def steps_to_finish(self) -> int:
        """Decode iterations until the first decoding request has its last token."""
        finish = self._finish
        while finish[0][2].joined < 0:
            heappop(finish)
        return finish[0][0] - self.steps

    @property
    def empty_blocks(self) -> int:
        """Free blocks that hold no cached prefix: they can be taken without evicting anything."""
        return self.free_blocks - (0 if self._prefixes is None else self._prefixes.unheld)

    def steps_in_memory(self, wanted: int, free_blocks: int | None = None) -> int:
        """How many of `wanted` decode iterations the free blocks, or some of them, last for."""
        size = self.limits.block_size
        free = self.free_blocks if free_blocks is None else free_blocks
        if self.num_decoding * -(-wanted // size) <= free:
            return wanted
        rounds = free // self.num_decoding
        left = free - rounds * self.num_decoding
        count = rounds * size
        while count < wanted:
            left -= self._edges[(self.steps + count) % size]
            if left < 0:
                break
            count += 1
        return count

    def decode(self, iterations: int) -> None:
        """Give every decoding request so many tokens."""
        size = self.limits.block_size
        rounds, rest = divmod(iterations, size)
        taken = rounds * self.num_decoding
        for step in range(self.steps, self.steps + rest):
            taken += self._edges[step % size]
        self.free_blocks -= taken
        self.steps += iterations
        if self._prefixes is not None:
            self._prefixes.shrink(self.free_blocks)

    def finish(self) -> list[tuple[Seat, int]]:
        """Release the requests that have their last token; returns seats and decode counts."""
        done: list[tuple[Seat, int]] = []
        finish = self._finish
        while finish and (finish[0][2].joined < 0 or finish[0][0] <= self.steps):
            seat = heappop(finish)[2]
            if seat.joined >= 0:
                done.append((seat, self.steps - seat.joined))
                self._leave(seat)
                del self._requests[seat.request.request_id]
                if self._prefixes is not None:
                    self._prefixes.forget(seat.request.request_id)
        return done

    def _context(self, seat: Seat) -> int:
        return seat.offset + self.steps if seat.joined >= 0 else seat.context

    def _leave(self, seat: Seat) -> None:
        seat.context = self._context(seat)
        self._free(seat)
        self._unseat(seat)

    def _free(self, seat: Seat) -> None:
        """Give back the blocks of a request whose `context` holds."""
        request_id = seat.request.request_id
        self.free_blocks += self.limits.blocks_for(seat.context)
        if self._prefixes is not None:
            # Whole blocks of the answer so far stay cached as well. What is cached is free only
            # where no other request holds it.
            self._prefixes.store(request_id, seat.context)
            self.free_blocks -= self._prefixes.held_blocks(request_id)
            self.free_blocks += self._prefixes.release(request_id)

    def _unseat(self, seat: Seat) -> None:
        request_id = seat.request.request_id
        del self._seats[request_id]
        if seat.joined < 0:
            del self._prefilling[request_id]
            return
        self.num_decoding -= 1
        self._offset_sum -= seat.offset
        self._edges[-seat.offset % self.limits.block_size] -= 1
        seat.joined = -1  # its entry in the heap is void from now on

    def _take(self, request_id: int) -> RequestView:
        waiting = self.waiting
        if waiting and waiting[0].request_id == request_id:
            return waiting.popleft()
        for request in waiting:
            if request.request_id == request_id:
                waiting.remove(request)
                return request
        raise ValueError(f"request {request_id} is admitted and does not wait")
