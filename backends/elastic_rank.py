"""One elastic instance: a rank with all weights, which does what the manager orders, in order."""

from __future__ import annotations

import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection

import numpy as np
import torch
from torch import Tensor

from backends.collectives import Collectives, Tally
from backends.corruption import Corruption
from backends.elastic_orders import (
    DecodeOrder,
    DropOrder,
    Farewell,
    MoveOrder,
    Order,
    PrefillOrder,
    RankLoss,
    Report,
    Work,
)
from backends.heartbeat import TCPStore
from backends.inbox import Inbox
from backends.part_decode import PartDecode
from backends.ranks import join
from backends.ring_attention import RingPrefill
from backends.sampling import Sampler
from backends.serving import without_collections
from backends.slot_pool import SlotPool
from backends.transformer import Transformer
from backends.turning import Turning
from backends.weights import Model
from backends.wires import Wires
from sim.engine import ReplicaLimits


@dataclass(frozen=True, kw_only=True)
class RankSpec:
    """What a rank is made of; it is sent there."""

    open_model: Callable[[], Model]
    """Gives the weights there."""
    size: int
    """Ranks."""
    port: int
    """Of the store where they meet."""
    device: str
    limits: ReplicaLimits
    sampler: Sampler | None = None
    corruption: Corruption | None = None
    """A fault to put into the pool of the first rank."""
    losses: tuple[RankLoss, ...] = ()


class OrderInbox(Inbox):
    """Orders in the order in which they came; drops may be taken out ahead."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection)
        self._orders: deque[Order] = deque()

    def next_order(self) -> Order:
        """Wait for the next order."""
        return self._orders.popleft() if self._orders else self._connection.recv()[1]

    def take_drops(self, busy: Iterable[int]) -> list[DropOrder]:
        """Those that have come and are about none of these requests, nor behind one that is."""
        while self._connection.poll():
            self._orders.append(self._connection.recv()[1])
        taken: list[DropOrder] = []
        working = set(busy)
        while self._orders:
            first = self._orders[0]
            if not isinstance(first, DropOrder) or working.intersection(first.request_ids):
                break
            taken.append(first)
            self._orders.popleft()
        return taken


class ElasticRank:
    """Computes, keeps KV and answers. Orders are done one after the other."""

    def __init__(
        self, model: Transformer, pool: SlotPool, wires: Wires, sampler: Sampler, inbox: OrderInbox,
        losses: Iterable[RankLoss] = (),
    ) -> None:  # fmt: skip
        """Put the rank together; `losses`: of all ranks."""
        self._model, self._pool, self._wires = model, pool, wires
        self._sampler, self._inbox = sampler, inbox
        self._losses = [one for one in losses if one.instance == wires.place]
        self._orders = 0
        """Prefills, rounds and moves so far."""
        self._start = 0.0

    @torch.inference_mode()
    def serve(self, start: float) -> None:
        """Do what is ordered until the end is; t = 0 is where the clock reads `start`."""
        self._start = start
        while True:
            order = self._inbox.next_order()
            if isinstance(order, PrefillOrder):
                self._prefill(order)
            elif isinstance(order, DecodeOrder):
                self._decode(order)
            elif isinstance(order, MoveOrder):
                self._move(order)
            elif isinstance(order, DropOrder):
                self._drop(order)
            else:
                break
        tally = self._wires.tally.sent()
        self._inbox.send("farewell", Farewell(tally, self._pool.counts(), self._sampler))

    def _prefill(self, order: PrefillOrder) -> None:
        begin_s, model = self._begin(), self._model
        ring = RingPrefill(model, self._pool, self._wires, order)
        self._say("begun", order.number)
        batch, owned = ring.batch(order)
        x = model.embed(batch) if len(batch.token_ids) else None
        residual = None if x is None else torch.zeros_like(x)
        for number, (layer, cache) in enumerate(zip(model.layers, self._pool.layers, strict=True)):
            self._between(number, order.request_ids)
            if x is None or residual is None:
                ring.pass_on(cache)
            else:
                x, residual = layer(x, residual, cache, ring)
        ids = [order.request_ids[at] for at in owned]
        positions = [len(order.tokens[at]) for at in owned]
        tokens: dict[int, int] = {}
        if x is not None and residual is not None and owned:
            logits = model.logits(x, residual, batch, ring)
            tokens = self._sample(logits, ids, positions)
        self._end(order.number, "prefill", begin_s, ring, tokens, len(batch.token_ids))

    def _decode(self, order: DecodeOrder) -> None:
        begin_s, model = self._begin(), self._model
        part = PartDecode(model, self._pool, self._wires, order)
        busy = [one for each in order.mini_batches for one in each.request_ids]
        mine, batch = part.mine, part.batch()
        x = model.embed(batch) if mine.request_ids else None
        residual = None if x is None else torch.zeros_like(x)
        for number, (layer, cache) in enumerate(zip(model.layers, self._pool.layers, strict=True)):
            self._between(number, busy)
            if x is None or residual is None:
                part.serve(cache)
            else:
                x, residual = layer(x, residual, cache, part)
        tokens: dict[int, int] = {}
        if x is not None and residual is not None:
            logits = model.logits(x, residual, batch, part)
            tokens = self._sample(logits, mine.request_ids, [at + 1 for at in mine.positions])
        self._end(order.number, "decode", begin_s, part, tokens, len(mine.tokens))

    def _sample(
        self, logits: Tensor, ids: Sequence[int], positions: Sequence[int]
    ) -> dict[int, int]:
        """The next tokens; none from what a lost rank left undone, which is not a number."""
        self._wires.flush()
        if self._wires.lost or not bool(logits.isfinite().all()):
            return {}
        return dict(zip(ids, self._sampler(logits, ids, positions), strict=True))

    def _move(self, order: MoveOrder) -> None:
        begin_s = self._begin()
        self._between(0, [request_id for request_id, _ in order.moves])
        give = order.source == self._wires.place
        for request_id, tokens in order.moves:
            if give:
                self._give(request_id, tokens, order.target)
            else:
                self._take(request_id, tokens, order.source)
        self._wires.flush()
        if give:
            for request_id, tokens in order.moves:
                self._pool.give_up(request_id, tokens)
        self._end(order.number, "move", begin_s, None, {}, sum(count for _, count in order.moves))

    def _give(self, request_id: int, tokens: int, target: int) -> None:
        slots, positions = self._pool.first(request_id, tokens)
        self._wires.send(torch.from_numpy(positions), "migration_positions", target)
        places = slots.to(self._model.device)
        for layer in self._pool.layers:
            rows = torch.stack([part.index_select(0, places) for part in layer])
            self._wires.send(rows, "migration", target)

    def _take(self, request_id: int, tokens: int, source: int) -> None:
        pool, wires = self._pool, self._wires
        found = wires.receive(wires.post(torch.empty(tokens, dtype=torch.int64), source))
        (taken,) = pool.allocate([(request_id, found.numpy().astype(np.int64))])
        slots = torch.from_numpy(taken)
        kept = pool.begin_write(slots)
        places = (slots if kept is None else slots[kept]).to(self._model.device)
        for layer in pool.layers:
            rows = layer.key.new_empty((2, tokens, *layer.key.shape[1:]))
            rows = wires.receive(wires.post(rows, source))
            for part, each in zip(layer, rows, strict=True):
                part.index_copy_(0, places, each if kept is None else each[kept])

    def _drop(self, order: DropOrder) -> None:
        for request_id in order.request_ids:
            self._pool.free(request_id)
        self._say("done", order.number)

    def _begin(self) -> float:
        self._wires.lost.clear()
        self._wires.wait_s = 0.0
        return time.perf_counter() - self._start

    def _between(self, layer: int, busy: Iterable[int]) -> None:
        """Before a layer: others' requests may be dropped; a test may lose this rank here."""
        for order in self._inbox.take_drops(busy):
            self._drop(order)
        for one in self._losses:
            if (one.after_orders, one.layer) == (self._orders, layer):
                os.kill(os.getpid(), signal.SIGSTOP if one.stops else signal.SIGKILL)

    def _end(
        self, number: int, kind: str, begin_s: float, operators: Turning | None,
        tokens: dict[int, int], computed: int,
    ) -> None:  # fmt: skip
        """Report an order that computed or moved something."""
        wires, keep_s = self._wires, 0.0
        wires.flush()
        if self._model.device.type == "cuda":
            torch.cuda.synchronize(self._model.device)
        if isinstance(operators, RingPrefill):
            operators.finish()
            keep_s = operators.keep_s
        self._orders += 1
        end_s = time.perf_counter() - self._start
        work = Work(wires.place, kind, computed, begin_s, end_s, keep_s, wires.wait_s)
        self._say("done", number, tokens, work)

    def _say(
        self, kind: str, number: int, tokens: dict[int, int] | None = None, work: Work | None = None
    ) -> None:
        lost = tuple(sorted(self._wires.lost))
        self._inbox.send(kind, Report(number, self._pool.counts(), tokens or {}, lost, work))


def serve_rank(inbox: Inbox, number: int, spec: RankSpec) -> None:
    """What a rank process does: meet the others, warm up, serve."""
    assert isinstance(inbox, OrderInbox)
    join(number, spec.size, TCPStore("127.0.0.1", spec.port, is_master=False), spec.device)
    device = torch.device(spec.device, number) if spec.device == "cuda" else torch.device("cpu")
    world = Collectives(range(spec.size), Tally(number), device, two_ways=True)
    model = spec.open_model()
    transformer = Transformer(model.config, model.weights, device)
    pool = SlotPool(model.config, spec.limits.num_blocks, device, transformer.dtype)
    pool.corrupt = spec.corruption if number == 0 else None
    sampler = spec.sampler or Sampler()
    rank = ElasticRank(transformer, pool, Wires(world), sampler, inbox, spec.losses)
    warm_up(transformer, spec.limits)
    with without_collections():
        start = inbox.begin()
        if start is None:
            return
        rank.serve(start)
    inbox.await_close()  # nobody's sockets close while another still talks


def warm_up(model: Transformer, limits: ReplicaLimits) -> None:
    """Multiply by every shape of weight for small batches, and some larger ones."""
    most = min(limits.max_num_batched_tokens, model.max_context)
    sizes = [*range(1, min(most, 128) + 1), *range(160, most + 1, 32)]
    model.warm_up(sizes, range(1, limits.max_num_seqs + 1))
