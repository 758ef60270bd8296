"""Instance plans: which instances form a group, which phases it serves, and where KV moves."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from sim.engine import ReplicaLimits
from sim.policies.base import Policy
from sim.policies.routing.base import RouterView, require_one_of
from sim.requests import RequestView


class InstanceGroup(NamedTuple):
    """Instances that compute one batch together."""

    instances: tuple[int, ...]
    prefills: bool
    """Whether requests may begin here."""
    decodes: bool
    """Whether requests may go on here after their prefill."""


class FetchView(Protocol):
    """What an instance that decodes shows of itself when it may fetch KV. Read only."""

    @property
    def limits(self) -> ReplicaLimits:
        """Limits of its engine."""
        ...

    @property
    def num_running(self) -> int:
        """Requests that run here."""
        ...

    @property
    def num_fetching(self) -> int:
        """Requests whose KV has blocks here and that do not run yet."""
        ...

    @property
    def free_blocks(self) -> int:
        """KV blocks that nobody holds."""
        ...


@dataclass(kw_only=True)
class InstancePlan(Policy):
    """Groups the instances of a deployment, and moves KV between groups of different phases.

    A request that is prefilled where it may not go on is handed over: `hand_over` chooses who
    decodes it, as soon as it has its first token. Its KV stays where it is until the chosen
    instance, asked by `fetch` at each of its decisions, gives it blocks and copies it.
    """

    @abstractmethod
    def groups(self, memory: Any, num_instances: int) -> tuple[InstanceGroup, ...]:
        """The groups from now on; every instance is in exactly one.

        Args:
            memory: what `init` made; the only argument that may change.
            num_instances: instances of the deployment, at least one.

        Raises:
            ValueError: so many instances cannot be grouped like this.
        """

    def hand_over(self, memory: Any, request: RequestView, view: RouterView) -> int:
        """Who decodes a request that has been prefilled.

        Args:
            memory: of the deployment; the only argument that may change.
            request: what is handed over, with the tokens that it has.
            view: what was handed to the decoding groups and is not answered yet, as a router sees
                its replicas.

        Returns:
            A place among the groups that decode and do not prefill, from 0.
        """
        del memory, request, view
        raise ValueError(
            f"policy {type(self).__name__} makes groups that only prefill and does not say who "
            "decodes; give it a method hand_over"
        )

    def fetch(self, memory: Any, handed: Sequence[RequestView], view: FetchView) -> int:
        """How many of the requests handed to an instance begin to move here now, the first first.

        Fewer free blocks never make it more: it is not asked while the instance decodes and nothing
        comes, goes or is handed over.

        Args:
            memory: of this instance; the only argument that may change.
            handed: requests whose KV is elsewhere, in the order in which they were handed over.
            view: the instance now. Not changed.
        """
        del memory, handed, view
        raise ValueError(
            f"policy {type(self).__name__} hands requests over and does not say when their KV "
            "moves; give it a method fetch"
        )


def checked_hand_over(
    plan: InstancePlan, memory: Any, request: RequestView, view: RouterView, now_s: float
) -> int:
    """Who decodes a request, for both panels.

    Raises:
        ValueError: there is no such group.
    """
    place = plan.hand_over(memory, request, view)
    require_one_of(view, place, plan, request, now_s)
    return place


def phases(plan: InstancePlan, num_instances: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Instances that prefill, and those that only decode; none where every one does both.

    Raises:
        ValueError: the plan groups several instances, or one neither prefills nor decodes.
    """
    groups = plan.groups(plan.init(), num_instances)
    if any(len(group.instances) != 1 for group in groups) or len(groups) != num_instances:
        raise ValueError(
            f"instance plan {type(plan).__name__} makes {groups} of {num_instances} instances; "
            "each instance must be in one group, of its own"
        )
    both = [group for group in groups if group.prefills and group.decodes]
    first = tuple(group.instances[0] for group in groups if group.prefills)
    second = tuple(group.instances[0] for group in groups if not group.prefills)
    if len(both) == num_instances:
        return first, ()
    if both or not first or not second:
        raise ValueError(
            f"instance plan {type(plan).__name__} makes {groups}: either every instance prefills "
            "and decodes, or some only prefill and the others only decode"
        )
    return first, second


def unfetched_text(plan: InstancePlan, count: int) -> str:
    """What to say, on both panels, of a plan that lets requests wait for ever."""
    return (
        f"policy {type(plan).__name__} left the KV of {count} requests where it was prefilled, and "
        "nothing more will come; mend its fetch"
    )


def kv_tokens(request: RequestView) -> int:
    """Tokens of a prefilled request whose KV is stored: all but the last, which is only known."""
    return request.prefill_tokens - 1
