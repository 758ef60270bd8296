"""What the first rank tells the others to do: a header of whole numbers, then a body of them.

One rank decides and the others follow, as vLLM's driver and workers do. Clocks differ from rank to
rank, so that ranks that each decided for themselves would see a request arrive at different
iterations, and wait for each other for ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import torch

from backends.collectives import Collectives
from backends.forward_batch import Chunk

NAME = "orders"
"""Under which they are counted: control, not payload of the model."""


class Kind(IntEnum):
    """What is to be done."""

    stop = 0
    new_cache = 1
    warm_up = 2
    step = 3
    free = 4


class Order(NamedTuple):
    """One message."""

    kind: Kind
    first: Sequence[int] = ()
    """new_cache: blocks, their size and the number of caches. warm_up: numbers of tokens. step and
    free: requests to free."""
    second: Sequence[int] = ()
    """warm_up: numbers of sampled positions. step: request, start, tokens, sample of each chunk."""
    third: Sequence[int] = ()
    """step: the tokens of all chunks."""
    lane: int = 0
    """step and free: whose cache; each batch in flight has one."""


def tell(group: Collectives, order: Order) -> None:
    """Send an order from the first rank of a group to the others, and go on.

    A broadcast would wait until all have heard it, and a rank that computes another batch hears
    nothing.
    """
    parts = (order.first, order.second, order.third)
    header = torch.tensor([order.kind, order.lane, *map(len, parts)])
    body = torch.tensor([number for part in parts for number in part])
    for place in range(1, group.size):
        group.send(header, NAME, place)
        if len(body):
            group.send(body, NAME, place)


def hear(group: Collectives) -> Order:
    """Wait for the next order."""
    header = torch.empty(5, dtype=torch.int64)
    kind, lane, *lengths = group.receive(header, 0).tolist()
    body: list[int] = []
    if total := sum(lengths):
        body = group.receive(torch.empty(total, dtype=torch.int64), 0).tolist()
    ends = [sum(lengths[:count]) for count in range(4)]
    return Order(Kind(kind), *(body[ends[at] : ends[at + 1]] for at in range(3)), lane=lane)


def step(chunks: Sequence[Chunk], freed: Sequence[int], lane: int = 0) -> Order:
    """The order to compute chunks, after requests gave their blocks back."""
    rows = [(c.request_id, c.start, len(c.token_ids), int(c.sample)) for c in chunks]
    tokens = [token for chunk in chunks for token in chunk.token_ids]
    return Order(Kind.step, freed, [number for row in rows for number in row], tokens, lane)


def chunks_of(order: Order) -> list[Chunk]:
    """The chunks that `step` packed."""
    chunks: list[Chunk] = []
    numbers, tokens = iter(order.second), iter(order.third)
    for request_id, start, count, wanted in zip(*[numbers] * 4, strict=True):
        ids = [next(tokens) for _ in range(count)]
        chunks.append(Chunk(request_id, ids, start, bool(wanted)))
    return chunks
