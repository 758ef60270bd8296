"""A request goes where least is outstanding: join the shortest queue, as the router can see it."""

from dataclasses import dataclass
from enum import Enum
from typing import Any

from sim.policies.routing.base import RouterView, Routing, lightest
from sim.requests import RequestView


class Load(Enum):
    """What counts as load. Member names are what the command line takes."""

    requests = "requests"
    """Requests sent and not answered, as nginx's least_conn counts them."""
    tokens = "tokens"
    """Prompt tokens of these requests: right where prompts differ much in length."""


@dataclass(kw_only=True)
class LeastLoaded(Routing):
    """The replica with the least outstanding; of several, the first."""

    by: Load = Load.requests
    """What is counted: requests or tokens (of prompts; answers have no known length)."""

    def choose(self, memory: Any, request: RequestView, view: RouterView) -> int:
        """Where the load is smallest now."""
        del memory, request
        tokens = self.by is Load.tokens
        loads = view.outstanding_tokens if tokens else view.outstanding_requests
        return lightest(loads, view.live)
