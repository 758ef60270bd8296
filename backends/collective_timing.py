"""Times collectives on this machine: how long a call takes, by operation and payload."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from backends.collectives import Collectives, Tally
from backends.ranks import run_ranks

OPERATIONS = (
    "all_reduce", "reduce_scatter", "all_gather", "all_to_all", "broadcast", "send_receive",
)  # fmt: skip
BARE = "bare_all_reduce"
"""torch's own call, without counting: what the wrapper is compared with."""
ELEMENT_BYTES = 4


class Timing(NamedTuple):
    """One operation with one payload."""

    operation: str
    payload_bytes: int
    """Of the tensor that a rank hands in."""
    seconds: list[float]
    """Of each call, at the rank that ended last; send_receive: half of there and back."""


def time_collectives(
    size: int,
    payloads: Sequence[int],
    calls: int,
    operations: Sequence[str] = OPERATIONS,
    device: str = "cpu",
) -> list[Timing]:
    """Time every operation with every payload on `size` ranks, `calls` times.

    Each round goes through all of them in an order of its own: neither a slow minute of a shared
    machine nor the payload before it then touches one more than another.

    Args:
        size: ranks.
        payloads: in bytes; rounded up to whole float32 that divide among the ranks.
        calls: rounds.
        operations: of `OPERATIONS`, or `BARE`.
        device: cpu (gloo) or cuda (NCCL).

    Raises:
        ValueError: one rank, which sends nothing.
    """
    if size < 2:
        raise ValueError(f"ranks={size} must be at least 2: one rank sends nothing")
    unit = ELEMENT_BYTES * size
    rounded = sorted({-(-payload // unit) * unit for payload in payloads})
    plan = [(operation, payload) for operation in operations for payload in rounded]
    per_rank = run_ranks(_time, size, (plan, calls, device), device)
    return [
        Timing(operation, payload, [max(ends) for ends in zip(*rows, strict=True)])
        for (operation, payload), *rows in zip(plan, *per_rank, strict=True)
    ]


def _time(
    rank: int, size: int, plan: Sequence[tuple[str, int]], calls: int, device: str
) -> list[list[float]]:
    """Seconds of each call of each line of the plan, on this rank."""
    place = torch.device(device, rank) if device == "cuda" else torch.device(device)
    group = Collectives(range(size), Tally(rank), place)
    bodies = [
        _body(group, operation, torch.zeros(payload // ELEMENT_BYTES, device=place))
        for operation, payload in plan
    ]
    seconds: list[list[float]] = [[] for _ in plan]
    order = torch.Generator().manual_seed(0)  # the same on every rank
    for turn in range(calls + 1):
        for index in torch.randperm(len(bodies), generator=order).tolist():
            group.all_reduce(torch.zeros(1), "barrier")
            start = time.perf_counter()
            bodies[index]()
            if place.type == "cuda":
                torch.cuda.synchronize(place)
            took = time.perf_counter() - start
            if turn:  # the first touches its pages
                halves = 2 if plan[index][0] == "send_receive" else 1
                seconds[index].append(took / halves)
    return seconds


def _body(group: Collectives, operation: str, payload: Tensor) -> Callable[[], object]:
    if operation == BARE:
        return lambda: dist.all_reduce(payload)
    if operation == "send_receive":
        return lambda: _there_and_back(group, payload)
    return lambda: getattr(group, operation)(payload, operation)


def _there_and_back(group: Collectives, payload: Tensor) -> None:
    """Between the first two ranks; one-way times would need clocks that agree."""
    if group.place == 0:
        group.send(payload, "there", 1)
        group.receive(payload, 1)
        group.flush()
    elif group.place == 1:
        group.receive(payload, 0)
        group.send(payload, "back", 0)
        group.flush()
