"""What a router knows: the requests that it sent to each replica and has no answer to."""

from sim.requests import RequestView


class RouterState:
    """A `RouterView` for policies, verbs for the process. Each panel owns one."""

    def __init__(self, num_replicas: int, pool_tokens: int) -> None:
        self.num_replicas = num_replicas
        self.pool_tokens = pool_tokens
        self.live = list(range(num_replicas))
        self.deaths = [0] * num_replicas
        self.outstanding_requests = [0] * num_replicas
        self.outstanding_tokens = [0] * num_replicas
        self._sent: dict[int, tuple[int, int]] = {}

    def is_outstanding(self, request_id: int) -> bool:
        """Whether a request was sent and not answered."""
        return request_id in self._sent

    def sent(self, request: RequestView, replica: int) -> None:
        """A request goes to a replica."""
        self._sent[request.request_id] = replica, request.prefill_tokens
        self.outstanding_requests[replica] += 1
        self.outstanding_tokens[replica] += request.prefill_tokens

    def answered(self, request_id: int) -> None:
        """The answer to a request is complete."""
        replica, tokens = self._sent.pop(request_id)
        self.outstanding_requests[replica] -= 1
        self.outstanding_tokens[replica] -= tokens

    def lost(self, replica: int) -> list[int]:
        """A replica has died: nothing may be sent there. Returns what was, in order of sending."""
        self.live.remove(replica)
        self.deaths[replica] += 1
        self.outstanding_requests[replica] = self.outstanding_tokens[replica] = 0
        left = [request_id for request_id, (where, _) in self._sent.items() if where == replica]
        for request_id in left:
            del self._sent[request_id]
        return left

    def back(self, replica: int) -> None:
        """A replica that had died serves again."""
        self.live = sorted([*self.live, replica])
