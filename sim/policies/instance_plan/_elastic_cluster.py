"""What a plan works on: the instances that it may use now, and what decodes on which."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from hardware_models.scaling import ScalingBase
from sim.policies.elastic import ElasticView
from sim.steps import DecodeBatch, Ints


class Load(NamedTuple):
    """Prompts that are computed together."""

    num_requests: int = 0
    tokens: int = 0
    squares: int = 0
    inverse: float = 0.0
    """Sum of 1 / length: what a second of the batch costs in normalised latency."""

    def plus(self, length: int) -> "Load":
        """With one more."""
        return Load(
            self.num_requests + 1, self.tokens + length, self.squares + length * length,
            self.inverse + 1 / length,
        )  # fmt: skip


class Gang(NamedTuple):
    """Batches that share instances: they decode together, as one batch from then on."""

    batches: tuple[int, ...]
    num_requests: int
    instances: frozenset[int]
    """That hold its KV."""


@dataclass
class Cluster:
    """A picture of a deployment that a plan changes while it thinks."""

    slots: int
    """Of each instance."""
    free: list[int]
    """[instances of the deployment]"""
    open: list[int]
    """Instances that a prefill may take: neither in a prefill nor, in a round, decoding, and
    without KV of a batch that is paused because a prefill has others of its instances."""
    held: dict[int, dict[int, int]]
    """KV of the batches that may decode, by number, then by instance."""
    counts: dict[int, int]
    """Their requests."""

    def copy(self) -> "Cluster":
        """One that can be changed apart from this."""
        held = {number: dict(tokens) for number, tokens in self.held.items()}
        return Cluster(self.slots, [*self.free], [*self.open], held, dict(self.counts))

    def is_empty(self, instance: int) -> bool:
        """Whether it holds nothing."""
        return self.free[instance] == self.slots

    def room(self, instances: Iterable[int]) -> int:
        """Free slots of several instances."""
        free = self.free
        return sum([free[at] for at in instances])

    def gangs(self, taken: Collection[int] = ()) -> list[Gang]:
        """Of batches without KV on the instances that are taken; by their first batch."""
        found: list[Gang] = []
        for number, tokens in self.held.items():
            if taken and not tokens.keys().isdisjoint(taken):
                continue
            gang = Gang((number,), self.counts[number], frozenset(tokens))
            if shared := [one for one in found if not one.instances.isdisjoint(tokens)]:
                found = [one for one in found if one.instances.isdisjoint(tokens)]
                gang = joined([*shared, gang])
            found.append(gang)
        return sorted(found, key=lambda gang: gang.batches[0])


def joined(gangs: Sequence[Gang]) -> Gang:
    """Several as one."""
    return Gang(
        tuple(sorted(number for gang in gangs for number in gang.batches)),
        sum(gang.num_requests for gang in gangs),
        frozenset[int]().union(*[gang.instances for gang in gangs]),
    )


def look(view: ElasticView) -> Cluster:
    """The deployment between two rounds."""
    slots, free = view.limits.num_blocks, view.free_slots.tolist()
    busy = view.prefilling
    held: dict[int, dict[int, int]] = {}
    counts: dict[int, int] = {}
    closed = set[int](busy)
    for batch in view.batches:
        tokens = {at: stored for at, stored in enumerate(batch.tokens.tolist()) if stored}
        if busy and not busy.isdisjoint(tokens):
            closed.update(tokens)
        else:
            held[batch.number], counts[batch.number] = tokens, batch.num_requests
    found = Cluster(slots, free, [], held, counts)
    if len(closed) > len(busy):
        for gang in found.gangs():
            if not gang.instances.isdisjoint(closed):
                closed |= gang.instances
    found.open = [at for at in view.live if at not in closed]
    return found


def look_beside(view: ElasticView) -> Cluster:
    """The deployment in a round: nothing but its idle instances."""
    slots, free = view.limits.num_blocks, view.free_slots.tolist()
    taken = view.prefilling | view.decoding
    idle = [at for at in view.live if at not in taken and free[at] == slots]
    return Cluster(slots, free, idle, {}, {})


def prefill_s(scaling: ScalingBase, degree: int, load: Load) -> float:
    """Seconds on so many instances, at least one; more than are known are as fast as those."""
    return scaling.prefill_s(min(degree, scaling.max_degree), load.tokens, load.squares)


class FutureNeed:
    """The most slots that requests will hold at once if every answer gets as long as it may.

    LightLLM's test. Requests decode together, one slot each a round; those that may get most are
    last to leave. When the i-th of them leaves, i requests have grown by what it had left.
    """

    def __init__(self, capacity: int, stored: Sequence[Ints], left: Sequence[Ints]) -> None:
        """Of requests that run.

        Args:
            capacity: slots.
            stored: tokens that they hold, in several arrays.
            left: tokens that they may still get, in arrays of the same lengths.
        """
        self.capacity = capacity
        self._stored, self._left = [*stored], [*left]
        self._most = int(sum([part.sum() for part in [*stored, *left]]))
        self._sorted: tuple[Ints, Ints, Ints] | None = None

    def fits(self, tokens: int, left: int) -> bool:
        """Whether there is room for one more, from its prefill to the end of all."""
        if self._most + tokens + left <= self.capacity:
            return True
        if self._sorted is None:
            self._sorted = self._in_order()
        shorter, before, after = self._sorted
        place = int(np.searchsorted(shorter, -left, side="right"))
        own = int(before[place]) + tokens + left * (place + 1)
        return max(own, int(after[place]) + tokens) <= self.capacity

    def add(self, tokens: int, left: int) -> None:
        """Count one more from now on."""
        self._most += tokens + left
        self._stored.append(np.array([tokens]))
        self._left.append(np.array([left]))
        self._sorted = None

    def _in_order(self) -> tuple[Ints, Ints, Ints]:
        """The longest first: minus what may come; stored before each; need from each on.

        That need is with another request that is still there, of no tokens.
        """
        stored, left = _whole(self._stored), _whole(self._left)
        self._stored, self._left = [stored], [left]
        order = np.argsort(-left, kind="stable")
        left = left[order]
        before = np.zeros(len(order) + 1, np.int64)
        np.cumsum(stored[order], out=before[1:])
        after = np.zeros(len(order) + 1, np.int64)
        need = before[1:] + left * np.arange(2, len(order) + 2)
        after[:-1] = np.maximum.accumulate(need[::-1])[::-1]
        return -left, before, after


def all_of(batches: Sequence[DecodeBatch]) -> tuple[list[Ints], list[Ints]]:
    """Tokens that are stored, and that may come, of all requests of these batches."""
    return [batch.context for batch in batches], [batch.left for batch in batches]


def _whole(parts: Sequence[Ints]) -> Ints:
    return np.concatenate([np.zeros(0, np.int64), *parts])
