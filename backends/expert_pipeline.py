"""Attention ranks and expert ranks that serve requests together, for real.

The twin of `sim/processes/expert_pipeline.py`. Every attention rank decides on its own batch, with
its own KV. The attention ranks agree on the instant of an iteration, the first one's, and on its
end, when the last one has its tokens. Inside an iteration ranks wait for messages alone, never for
a barrier, and expert ranks never do.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import torch

from backends.arrivals import Arrivals
from backends.attention_rank import AttentionRank
from backends.collectives import Collectives
from backends.forward_batch import Begun, Chunk
from backends.replica import Replica
from backends.transformer import sample, synchronise
from sim.policies.micro_batching.base import MicroBatching, checked_split
from sim.policies.routing.base import Routing, checked_choice
from sim.recorder import Choice, RouteRecorder
from sim.state.router_state import RouterState
from sim.trace import Table, Trace
from sim.workload.source import Source

CONTROL = "control"
"""Name of what attention ranks tell each other about instants and answers."""


class NodeServed(NamedTuple):
    """What one attention rank gives back."""

    trace: Trace
    answers: dict[int, list[int]]
    routes: tuple[Table, Table, Table]
    """As every rank's copy of the router recorded them."""


class NodeRouter:
    """The router, of which every attention rank has a copy that sees and decides the same."""

    def __init__(self, routing: Routing, num_nodes: int, pool_tokens: int) -> None:
        self._routing, self._memory = routing, routing.init()
        self.state = RouterState(num_nodes, pool_tokens)
        self.recorder = RouteRecorder()
        self._numbers = list(range(num_nodes))
        self._sent: dict[int, int] = {}

    def node_of(self, request_id: int) -> int:
        """Where a request was sent."""
        return self._sent[request_id]

    def route(self, feed: Arrivals, replica: Replica, now_s: float) -> None:
        """Route what has arrived; this rank's replica takes what is its own."""
        for request in feed.until(now_s):
            view = request.view()
            node = checked_choice(self._routing, self._memory, view, self.state, now_s)
            choice = Choice.of(node, self.state, self._numbers)
            self.recorder.route(request.request_id, now_s, choice, now_s)
            self.state.sent(view, node)
            self._sent[request.request_id] = node
            if node == replica.recorder.replica:
                replica.submit(request)

    def answered(self, request_ids: Sequence[int], end_s: float) -> None:
        """Requests have their last tokens, on whichever rank."""
        for request_id in request_ids:
            self.state.answered(request_id)
            self.recorder.answer(request_id, end_s, self._sent[request_id])


class ExpertPipeline:
    """The serving loop of one attention rank; all of them run it, in step."""

    def __init__(
        self, attention: AttentionRank, replica: Replica, router: NodeRouter, rule: MicroBatching,
        count: int, control: Collectives,
    ) -> None:  # fmt: skip
        """Put the loop together.

        Args:
            attention: computes.
            replica: this rank's seats, KV and decisions.
            router: this rank's copy.
            rule: splits the batch.
            count: micro-batches.
            control: of the attention ranks.
        """
        self._attention, self._replica, self._router = attention, replica, router
        self._rule, self._count, self._control = rule, count, control

    def serve(self, source: Source, start: float) -> NodeServed:
        """Serve all requests of a source at their arrival times.

        Args:
            source: open-loop; every attention rank reads the same.
            start: the clock's reading at t = 0.

        Raises:
            ValueError: a policy breaks its rules, or leaves requests unserved.
        """
        feed = Arrivals(source)
        while True:
            now_s = self._agreed(time.perf_counter() - start)
            self._router.route(feed, self._replica, now_s)
            idle = not (self._replica.num_running or self._replica.waiting)
            begun = None if idle else self._replica.begin(now_s)
            if not self._any(begun is not None):
                if feed.wait(start):
                    continue
                self._require_served()
                self._attention.stop()
                return NodeServed(
                    self._replica.recorder.trace(), self._replica.answers,
                    self._router.recorder.tables(),
                )  # fmt: skip
            tokens = self._compute(begun, now_s)
            end_s = self._agreed(time.perf_counter() - start, after=True)
            finished = self._replica.complete(begun, tokens, end_s) if begun is not None else []
            self._router.answered(self._everywhere(finished), end_s)

    def _compute(self, begun: Begun | None, now_s: float) -> list[int]:
        """One iteration of this rank's batch, which may be empty; its tokens, in order."""
        chunks = [] if begun is None else begun.chunks
        rows = [size_of(chunk) for chunk in chunks]
        split = checked_split(self._rule, rows, self._count)
        parts = [[chunks[at] for at in part] for part in split]
        replica = self._replica
        logits = self._attention.forward(parts, replica.cache, now_s)
        drawn: dict[int, int] = {}
        for part, one in zip(parts, logits, strict=True):
            if one is not None:
                wanted = [chunk.request_id for chunk in part if chunk.sample]
                drawn |= zip(wanted, sample(part, one, replica.sampler), strict=True)
        synchronise(self._attention.model.device)
        return [drawn[chunk.request_id] for chunk in chunks if chunk.sample]

    def _agreed(self, clock_s: float, *, after: bool = False) -> float:
        """An instant on the first rank's clock, `after`: once all ranks are there."""
        if self._control.size == 1:
            return clock_s
        if after:
            # The latest of all clocks: those of one machine are one clock.
            latest = torch.tensor([clock_s], dtype=torch.float64)
            return float(self._control.all_gather(latest, CONTROL).max())
        return float(self._control.broadcast(torch.tensor([clock_s], dtype=torch.float64), CONTROL))

    def _any(self, mine: bool) -> bool:
        """Whether any attention rank has a batch."""
        if self._control.size == 1:
            return mine
        return bool(self._control.all_reduce(torch.tensor([int(mine)]), CONTROL))

    def _everywhere(self, finished: Sequence[int]) -> list[int]:
        """The requests that finished on any rank, by rank and then in order."""
        if self._control.size == 1:
            return list(finished)
        most = self._replica.limits.max_num_seqs
        told = torch.full((1 + most,), -1, dtype=torch.int64)
        told[0] = len(finished)
        told[1 : 1 + len(finished)] = torch.tensor(list(finished), dtype=torch.int64)
        everyone = self._control.all_gather(told, CONTROL).view(self._control.size, -1).tolist()
        return [one for row in everyone for one in row[1 : 1 + row[0]]]

    def _require_served(self) -> None:
        replica = self._replica
        if unserved := replica.num_running + len(replica.waiting):
            raise ValueError(
                f"policy {type(replica.batching).__name__} left {unserved} requests unserved and "
                "waits for arrivals that never come; mend the policy"
            )


class Size(NamedTuple):
    """The `Row` of a chunk: all that a micro-batching rule sees."""

    tokens: int
    context_tokens: int


def size_of(chunk: Chunk) -> Size:
    """What a chunk computes and reads."""
    tokens = len(chunk.token_ids)
    return Size(tokens, chunk.start + tokens)
