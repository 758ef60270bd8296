"""The two ends of a hand-over in an instance's process: one prefills, the other decodes.

Each is the `Exchange` of its replica. What other threads and processes do becomes visible at
decisions only, and is noted with the instant at which it did.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from backends.inbox import Inbox
from backends.kv_link import Fetch, Receiver, Sender
from backends.observed import Sequence
from backends.replica import Replica
from sim.engine import ReplicaLimits
from sim.policies.instance_plan.base import InstancePlan, kv_tokens, unfetched_text
from sim.requests import Request, RequestView
from sim.trace import State


class Observed(NamedTuple):
    """A `FetchView` of counts that were read from tensors."""

    limits: ReplicaLimits
    num_running: int
    num_fetching: int
    free_blocks: int


class PrefillSide:
    """Lets requests go once they are prefilled, and frees their blocks when they were fetched."""

    passes_on = True

    def __init__(self, inbox: Inbox, sender: Sender, plan: InstancePlan) -> None:
        self._inbox, self._sender, self._plan = inbox, sender, plan
        self._held: set[int] = set()
        self.moves: dict[str, dict[int, float]] = {"released_s": {}}
        """When what was seen, by column of `HAND_OVERS` and request."""
        inbox.expects_more = lambda: inbox.has_ended and bool(self._held)

    def require_served(self) -> None:
        """Refuse a plan that left here what others should have fetched."""
        if self._held:
            raise ValueError(unfetched_text(self._plan, len(self._held)))

    def settle(self, replica: Replica, now_s: float) -> None:
        """Free the blocks of requests that were fetched."""
        del now_s
        for event in self._inbox.events():
            replica.cache.free(event.content)
            self._held.discard(event.content)
            self.moves["released_s"][event.content] = event.seen_s

    def pass_on(self, replica: Replica, sequence: Sequence, end_s: float) -> None:
        """Keep a request's blocks ready, and tell the router."""
        request = sequence.request
        self._held.add(request.request_id)
        blocks = replica.cache.block_table(request.request_id).tolist()
        self._sender.hold(request.request_id, replica.cache, blocks)
        answer = sequence.tokens[request.prompt_tokens :]
        self._inbox.send("prefilled", (request.request_id, end_s, answer))


class DecodeSide:
    """Fetches the KV of requests that were handed over, and lets them decode."""

    passes_on = False

    def __init__(self, inbox: Inbox, receiver: Receiver, plan: InstancePlan) -> None:
        self._inbox, self._receiver = inbox, receiver
        self._plan, self._memory = plan, plan.init()
        self._handed: deque[tuple[Sequence, RequestView, int]] = deque()
        self._moving: dict[int, Sequence] = {}
        self._arrived: deque[Sequence] = deque()
        self.moves: dict[str, dict[int, float]] = {
            name: {} for name in ("announced_s", "fetched_s", "delivered_s")
        }
        """When what was seen, by column of `HAND_OVERS` and request."""
        inbox.expects_more = lambda: bool(self._moving)

    def require_served(self) -> None:
        """Refuse a plan that never fetched what was handed over."""
        if self._handed:
            raise ValueError(unfetched_text(self._plan, len(self._handed)))

    def settle(self, replica: Replica, now_s: float) -> None:
        """Take what came in, seat the requests whose KV is here, and decide whose is fetched."""
        for event in self._inbox.events():
            if event.kind == "arrived":
                self._arrived.append(self._moving.pop(event.content))
                self.moves["delivered_s"][event.content] = event.seen_s
            else:
                self._announce(replica, event.content, event.seen_s)
        while self._arrived and replica.num_running < replica.limits.max_num_seqs:
            sequence = self._arrived.popleft()
            replica.seat(sequence)
            replica.recorder.event(sequence.request.request_id, now_s, State.decoding)
        if not self._handed:
            return
        views = [view for _, view, _ in self._handed]
        fetching = len(self._moving) + len(self._arrived)
        seen = Observed(replica.limits, replica.num_running, fetching, replica.cache.free_blocks)
        for _ in range(self._plan.fetch(self._memory, views, seen)):
            self._fetch(replica, now_s)

    def pass_on(self, replica: Replica, sequence: Sequence, end_s: float) -> None:
        """Nothing is passed on from here."""
        raise AssertionError(f"{sequence.request.request_id} at {end_s} s on {replica}")

    def _announce(
        self, replica: Replica, content: tuple[Request, int, list[int]], seen_s: float
    ) -> None:
        request, source, answer = content
        view = request.view(len(answer))
        tokens = [*replica.prompts(request), *answer]
        computed = kv_tokens(view)
        sequence = Sequence(request, tokens, computed=computed, prefill_target=computed)
        self._handed.append((sequence, view, source))
        self.moves["announced_s"][request.request_id] = seen_s

    def _fetch(self, replica: Replica, now_s: float) -> None:
        """Give blocks to the first request in line and begin to fill them."""
        sequence, _, source = self._handed.popleft()
        request_id = sequence.request.request_id
        try:
            replica.cache.allocate(request_id, sequence.computed)
        except ValueError as error:
            name = type(self._plan).__name__
            raise ValueError(f"policy {name} at {now_s} s: {error}; mend the policy") from error
        replica.recorder.event(request_id, now_s, State.admitted)
        self.moves["fetched_s"][request_id] = now_s
        self._moving[request_id] = sequence
        blocks = replica.cache.block_table(request_id).tolist()
        self._receiver.fetch(Fetch(request_id, source, blocks), replica.cache)
