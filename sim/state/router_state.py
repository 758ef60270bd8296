"""What a router knows: the requests that it sent to each replica and has no answer to."""

from sim.requests import RequestView


class RouterState:
    """A `RouterView` for policies, verbs for the process. Each panel owns one."""

    def __init__(self, num_replicas: int, pool_tokens: int) -> None:
        self.num_replicas = num_replicas
        self.pool_tokens = pool_tokens
        self.outstanding_requests = [0] * num_replicas
        self.outstanding_tokens = [0] * num_replicas
        self._sent: dict[int, tuple[int, int]] = {}

    def is_outstanding(self, request_id: int) -> bool:
        """Whether a request was sent and not answered."""
        return request_id in self._sent

    def sent(self, request: RequestView, replica: int) -> None:
        """A request goes to a replica."""
        self._sent[request.request_id] = replica, request.prompt_tokens
        self.outstanding_requests[replica] += 1
        self.outstanding_tokens[replica] += request.prompt_tokens

    def answered(self, request_id: int) -> None:
        """The answer to a request is complete."""
        replica, tokens = self._sent.pop(request_id)
        self.outstanding_requests[replica] -= 1
        self.outstanding_tokens[replica] -= tokens
