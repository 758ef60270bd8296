"""Batching: which tokens one replica computes in its next iteration."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar, NamedTuple, Protocol

from sim.engine import ReplicaLimits
from sim.policies.base import Policy
from sim.requests import RequestView, RunningView
from sim.state.prefix_cache import CachedPrefix


class ReplicaView(Protocol):
    """What a replica shows of itself at a decision. Read only."""

    @property
    def limits(self) -> ReplicaLimits:
        """Limits of the engine."""
        ...

    @property
    def waiting(self) -> Sequence[RequestView]:
        """Requests without KV, pre-empted ones first, then in order of arrival."""
        ...

    @property
    def num_running(self) -> int:
        """Requests that hold KV."""
        ...

    @property
    def num_decoding(self) -> int:
        """Running requests past their prefill."""
        ...

    @property
    def prefilling(self) -> Sequence[RunningView]:
        """Running requests in mid-prefill, in order of admission."""
        ...

    @property
    def free_blocks(self) -> int:
        """KV blocks that nobody holds. Those with a cached prefix are among them."""
        ...

    @property
    def decode_blocks(self) -> int:
        """New blocks that one more token for every decoding request takes."""
        ...

    def running(self) -> Sequence[RunningView]:
        """All running requests in order of admission. Costs time in proportion to their number."""
        ...

    def cached_prefix(self, request: RequestView) -> CachedPrefix:
        """What of a waiting request's prompt is cached; nothing without prefix caching.

        Admitted, the request holds these blocks and computes the tokens after them only. Two that
        are admitted at once and find the same free blocks take them once: adding both up is safe.
        """
        ...

    def given_up(self, request_ids: tuple[int, ...]) -> int:
        """Blocks that become free when these running requests are pre-empted together."""
        ...


class Batch(NamedTuple):
    """One iteration's work. Applied in this order: pre-empt, admit, prefill, decode."""

    admit: tuple[int, ...] = ()
    """Waiting requests that get a seat. In order of admission."""
    preempt: tuple[int, ...] = ()
    """Running requests that lose their KV and go back to the head of the queue in this order."""
    prefill: tuple[tuple[int, int], ...] = ()
    """(request, tokens): the next tokens of its prefill."""
    decode: bool = False
    """Whether every running request past its prefill takes one token."""


DECODE = Batch(decode=True)


class Wake(Enum):
    """What ends a decision that stands."""

    arrival = "arrival"
    completion = "completion"
    memory = "memory"


class Standing(NamedTuple):
    """How long a decode-only decision stands."""

    iterations: int
    """At most so many iterations."""
    wake_on: frozenset[Wake]
    """Ask again at the first boundary after one of these."""


EVERY_WAKE = frozenset(Wake)
FOREVER = 1 << 62
ONE_BY_ONE = Standing(1, EVERY_WAKE)
UNTIL_ANY_WAKE = Standing(FOREVER, EVERY_WAKE)
UNTIL_FREED = Standing(FOREVER, frozenset({Wake.completion, Wake.memory}))
"""Arrivals change nothing: the decision stands until a request or a block makes room."""


@dataclass(kw_only=True)
class Batching(Policy):
    """Decides the next iteration of one replica."""

    first_come_first_served: ClassVar[bool] = False
    """Whether it promises seats in order of arrival, which a law then tests."""

    @abstractmethod
    def next_batch(self, memory: Any, view: ReplicaView) -> Batch:
        """The work of the next iteration.

        An empty batch means: nothing until the next arrival. Asked only while something waits or
        runs.

        Args:
            memory: what `init` made; the only argument that may change.
            view: the replica now. Not changed.
        """

    def steady(self, memory: Any, view: ReplicaView) -> Standing:
        """How long the batch just returned stands; asked only when it decodes and nothing else.

        The default asks at every iteration: right for any policy, and slow. A policy that says more
        promises that `next_batch` would return the same until then.
        """
        del memory, view
        return ONE_BY_ONE

    def without_effect(self, limits: ReplicaLimits) -> list[str]:
        """Settings that these limits rob of their effect, in words; the user is warned of them."""
        del limits
        return []


def whole_prompts(view: ReplicaView, reserved_blocks: int = 0) -> Batch:
    """Admit from the head of the queue what seats, token budget and blocks allow, uncut.

    A first prompt above the token budget runs alone. First come, first served: a head that does not
    fit holds the others back.
    """
    limits = view.limits
    seats = limits.max_num_seqs - view.num_running
    blocks = view.free_blocks - (reserved_blocks if view.num_running else 0)
    budget = limits.max_num_batched_tokens
    chosen: list[tuple[int, int]] = []
    for request in view.waiting:
        cached = view.cached_prefix(request)
        tokens = request.prefill_tokens - cached.tokens
        blocks -= limits.blocks_for(tokens) + cached.free_blocks
        if len(chosen) == seats or blocks < 0 or (tokens > budget and chosen):
            break
        chosen.append((request.request_id, tokens))
        budget -= tokens
        if budget <= 0:
            break
    return Batch(admit=tuple([request_id for request_id, _ in chosen]), prefill=tuple(chosen))


def decode_all(view: ReplicaView) -> Batch:
    """One token for everyone; who gets no block for it is pre-empted.

    Nothing where that would be everyone: then blocks are taken for KV that is on its way here, and
    the first to come makes the next decision.
    """
    victims = preempt_last(view)
    if not victims:
        return DECODE
    return Batch(preempt=victims, decode=True) if len(victims) < view.num_running else Batch()


def preempt_last(view: ReplicaView) -> tuple[int, ...]:
    """Requests to recompute later so that all others get their next token: last admitted first.

    vLLM's rule. The result is in order of admission, as the queue takes it back.
    """
    short = view.decode_blocks - view.free_blocks
    if short <= 0:
        return ()
    block_size = view.limits.block_size
    victims: tuple[int, ...] = ()
    for request in reversed(view.running()):
        victims = (request.request_id, *victims)
        if not request.prefill_left and request.context_tokens % block_size == 0:
            short -= 1
        if view.given_up(victims) >= short:
            break
    return victims
