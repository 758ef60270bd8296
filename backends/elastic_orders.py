"""What the manager of elastic instances tells its ranks, and what they report."""

from __future__ import annotations

from typing import NamedTuple

from backends.collectives import Sent
from backends.sampling import Sampler
from backends.slot_pool import PoolCounts


class PrefillOrder(NamedTuple):
    """A group prefills whole requests; every member of the group gets the same order."""

    number: int
    """Of the order; reports name it."""
    request_ids: tuple[int, ...]
    tokens: tuple[list[int], ...]
    """All of each request so far."""
    instances: tuple[int, ...]
    """The ring: token i of a request is computed by member i mod its size."""
    kept: tuple[tuple[tuple[int, int], ...], ...]
    """Of each request (instance, tokens): who keeps the KV, each the next so many tokens."""


class MiniBatch(NamedTuple):
    """Requests of one master."""

    master: int
    request_ids: tuple[int, ...]
    tokens: tuple[int, ...]
    """The last token of each."""
    positions: tuple[int, ...]
    """Of that token."""
    holders: tuple[tuple[int, tuple[int, ...]], ...]
    """(instance, rows of the mini-batch): others that have KV of those requests."""


class DecodeOrder(NamedTuple):
    """A group decodes one token a request; every member of the group gets the same order."""

    number: int
    mini_batches: tuple[MiniBatch, ...]


class MoveOrder(NamedTuple):
    """KV goes from one instance to another; both get the same order."""

    number: int
    source: int
    target: int
    moves: tuple[tuple[int, int], ...]
    """(request, tokens): the first so many that the source has of it."""


class DropOrder(NamedTuple):
    """Free all that these requests have."""

    number: int
    request_ids: tuple[int, ...]


class EndOrder(NamedTuple):
    """Report all and leave."""


Order = PrefillOrder | DecodeOrder | MoveOrder | DropOrder | EndOrder


class Work(NamedTuple):
    """How one order kept one rank busy; instants of its clock."""

    instance: int
    kind: str
    """prefill, decode or move."""
    tokens: int
    """That were computed here, or moved."""
    begin_s: float
    end_s: float
    keep_s: float
    """Of these seconds, those of the copies that put KV of the ring into the pool."""
    wait_s: float
    """And those that it waited for others."""


class Report(NamedTuple):
    """What a rank says of an order."""

    number: int
    counts: PoolCounts
    """Of its pool, after all that was done there."""
    tokens: dict[int, int]
    """Sampled here, by request."""
    lost: tuple[int, ...]
    """Ranks that it could not hear or reach: what it computed is worth nothing."""
    work: Work | None


class Farewell(NamedTuple):
    """What a rank leaves behind."""

    sent: list[Sent]
    counts: PoolCounts
    sampler: Sampler


class RankLoss(NamedTuple):
    """A rank that a test loses in mid-work."""

    instance: int
    after_orders: int
    """Prefills, rounds and moves that it did before."""
    layer: int = 0
    """Of the model, before which it happens; 0 of a move: before it."""
    stops: bool = False
    """Whether it is stopped, as by SIGSTOP, and not killed."""
