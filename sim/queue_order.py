"""Keeps a replica's queue in the order that a rule gives: the same on both panels."""

from collections import deque
from collections.abc import Collection

from sim.policies.batching.base import ReplicaView
from sim.policies.request_order.base import RequestOrder, in_order
from sim.policies.request_order.fcfs import Fcfs
from sim.requests import RequestView


class QueueOrder:
    """A rule with its memory, and who waited when it was last asked."""

    def __init__(self, rule: RequestOrder) -> None:
        self._rule = rule
        self._memory = rule.init()
        self._waited: set[int] = set()

    def is_due(self, waiting: Collection[object]) -> bool:
        """Whether `arrange` has anything to do, with this queue."""
        return type(self._rule) is not Fcfs and bool(waiting or self._waited)

    def arrange(self, view: ReplicaView, gone: set[int]) -> deque[RequestView] | None:
        """The queue for the coming decision; None: as it is.

        Args:
            view: the replica now.
            gone: requests that left the queue since the last call and were not admitted.
        """
        if not self.is_due(view.waiting):
            return None
        ids = {request.request_id for request in view.waiting}
        admitted = sorted(self._waited - ids - gone)
        if admitted:
            self._rule.admitted(self._memory, admitted, sorted(ids))
        self._waited = ids
        if len(ids) < 2 or view.num_running >= view.limits.max_num_seqs:
            return None
        return deque(in_order(self._rule, self._memory, view.waiting, view.cached_prefix))
