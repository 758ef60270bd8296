"""What elastic instances do next: the answer of a plan, and the batches that it is about."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
FOREVER = 1 << 62


class DecodeBatch(NamedTuple):
    """Requests that decode together and are between two rounds, or paused."""

    number: int
    """By which a step names it."""
    instances: tuple[int, ...]
    """Members of its last group that hold its KV, or were masters of it."""
    request_ids: Ints
    """In order: mini-batches are taken from the front."""
    generated: Ints
    """[requests] tokens of their answers so far, at least one."""
    left: Ints
    """[requests] tokens that their answers may still get: up to the stated limit."""
    context: Ints
    """[requests] tokens whose KV is stored."""
    tokens: Ints
    """[instances of the deployment] its KV on each."""

    @property
    def num_requests(self) -> int:
        """Requests of the batch."""
        return len(self.request_ids)


class Prefill(NamedTuple):
    """A batch that is prefilled by a group."""

    request_ids: tuple[int, ...]
    """Waiting requests, whole. In this order their tokens are one sequence."""
    instances: tuple[int, ...]
    """The group; in this order they form the ring."""
    targets: tuple[tuple[int, int], ...]
    """(instance, tokens): who keeps the KV, each the next so many tokens of that sequence. Members
    without any are free when the prefill ends: proactive scale-down. The tokens add up to
    `prefill_tokens` of all requests."""


class Migration(NamedTuple):
    """KV that moves from one instance to another before anything else of a step begins."""

    batch: int
    source: int
    target: int
    tokens: int
    """The first so many that the source has, in the batch's order of requests."""


class DecodeGroup(NamedTuple):
    """A group of a round."""

    batches: tuple[int, ...]
    """Numbers; several become one batch with the first's number."""
    instances: tuple[int, ...]
    """Members: all that hold KV of it, and others, which may be masters: scale-up."""
    masters: tuple[tuple[int, int], ...]
    """(instance, requests): mini-batches from the front of the batch, at least one request each.
    Every request's new KV goes to its master."""


class Step(NamedTuple):
    """What begins now. A batch that is named nowhere is paused; there may be nothing to begin."""

    preempt: tuple[int, ...] = ()
    """Requests of batches that lose their KV and go back to the head of the queue in this order."""
    migrate: tuple[Migration, ...] = ()
    prefill: tuple[Prefill, ...] = ()
    decode: tuple[DecodeGroup, ...] = ()
    """The groups of one round; only between rounds."""


class Standing(NamedTuple):
    """How long the round of a step is repeated, without asking.

    Completions and the end of a prefill always end that, at the next boundary.
    """

    rounds: int = 1
    """At most so many. A master must have room for all of them."""
    arrivals_after: int = 1
    """An arrival ends it at a boundary after at least so many rounds."""
