"""Request order: which of the waiting requests are offered to the batching rule first."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sim.policies.base import Policy
from sim.requests import RequestView
from sim.state.prefix_cache import CachedPrefix


class Waiting(NamedTuple):
    """A request that waits, and what of its prompt is cached in any tier."""

    request: RequestView
    cached_tokens: int

    @property
    def compute_tokens(self) -> int:
        """Tokens that it has to compute; at least one."""
        return self.request.prefill_tokens - self.cached_tokens


@dataclass(kw_only=True)
class RequestOrder(Policy):
    """Puts the queue in order before a decision about the next batch."""

    @abstractmethod
    def order(self, memory: Any, waiting: Sequence[Waiting]) -> Sequence[int]:
        """Positions in `waiting`, each once, in the order in which they are offered.

        Args:
            memory: what `init` made. Not changed.
            waiting: in order of arrival; who was pre-empted is not among them and comes first.
        """

    def admitted(self, memory: Any, admitted: Sequence[int], waiting: Sequence[int]) -> None:
        """Requests have got their seats.

        Args:
            memory: what `init` made; the only argument that may change.
            admitted: their ids.
            waiting: ids of those that still wait, in order of arrival.
        """
        del memory, admitted, waiting


def in_order(
    rule: RequestOrder,
    memory: Any,
    queue: Sequence[RequestView],
    cached_prefix: Callable[[RequestView], CachedPrefix],
) -> list[RequestView]:
    """The queue as a rule orders it, for both panels; pre-empted requests stay in front.

    Raises:
        ValueError: the rule leaves a request out, or names one twice.
    """
    preempted = [request for request in queue if request.generated_tokens]
    # By id, which grows with the arrival: an earlier order leaves no trace.
    fresh = sorted(request for request in queue if not request.generated_tokens)
    waiting = [Waiting(request, cached_prefix(request).tokens) for request in fresh]
    order = rule.order(memory, waiting)
    if sorted(order) != list(range(len(fresh))):
        raise ValueError(
            f"policy {type(rule).__name__} orders {len(fresh)} requests as {list(order)}; every "
            "position must be there once; mend the policy"
        )
    return preempted + [fresh[position] for position in order]
