"""Routing: which of several replicas serves a request."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from sim.policies.base import Policy
from sim.requests import RequestView


class RouterView(Protocol):
    """What a router knows of its replicas: what it sent there, and what came back. Read only.

    It sees no queue and no KV cache: those are in other processes.
    """

    @property
    def num_replicas(self) -> int:
        """Replicas to choose from."""
        ...

    @property
    def live(self) -> Sequence[int]:
        """Replicas that serve, as far as the router knows, in order; at least one."""
        ...

    @property
    def deaths(self) -> Sequence[int]:
        """How often each replica has died: one that came back began with empty caches."""
        ...

    @property
    def pool_tokens(self) -> int:
        """Tokens that the KV pool of one replica holds."""
        ...

    @property
    def outstanding_requests(self) -> Sequence[int]:
        """Requests sent to each replica whose answer is not complete."""
        ...

    @property
    def outstanding_tokens(self) -> Sequence[int]:
        """Prompt tokens of these requests."""
        ...


@dataclass(kw_only=True)
class Routing(Policy):
    """Decides where a request goes, once, when it arrives."""

    @abstractmethod
    def choose(self, memory: Any, request: RequestView, view: RouterView) -> int:
        """The replica that serves a request, from 0.

        Args:
            memory: what `init` made; the only argument that may change.
            request: what arrived. The length of its answer is not known.
            view: the router now. Not changed.
        """


def checked_choice(
    routing: Routing, memory: Any, request: RequestView, view: RouterView, now_s: float
) -> int:
    """What a rule chooses, for both panels.

    Raises:
        ValueError: there is no such replica, or it is dead.
    """
    replica = routing.choose(memory, request, view)
    require_one_of(view, replica, routing, request, now_s)
    return replica


def require_one_of(
    view: RouterView, replica: int, policy: Policy, request: RequestView, now_s: float
) -> None:
    """Refuse a choice that is none of the replicas to choose from.

    Raises:
        ValueError: there is no such replica.
    """
    if replica not in range(view.num_replicas):
        raise ValueError(
            f"policy {type(policy).__name__} at {now_s} s: request {request.request_id}: "
            f"replica={replica!r} is chosen and there are replicas 0 to {view.num_replicas - 1}; "
            "mend the policy"
        )
    if replica not in view.live:
        raise ValueError(
            f"policy {type(policy).__name__} at {now_s} s: request {request.request_id}: "
            f"replica={replica} is chosen and is dead; those in view.live={list(view.live)} "
            "serve; mend the policy"
        )


def lightest(loads: Sequence[int], among: Sequence[int] | None = None) -> int:
    """The replica with the smallest load; of several, the first."""
    return min(range(len(loads)) if among is None else among, key=loads.__getitem__)
