"""A request goes where most of its prompt was sent before, unless the load there is out of balance.

SGLang's cache-aware router (SGLang, NeurIPS 2024; its router's documentation gives the rule and the
thresholds). Like that router it remembers what it sent where; it does not ask the replicas.
"""

from collections import OrderedDict
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from sim.policies.routing.base import RouterView, Routing, lightest
from sim.requests import RequestView

Seen = OrderedDict[int, None]
"""Hashes sent to a replica, the ones sent longest ago first."""


@dataclass
class Sent:
    """What went where."""

    replicas: list[Seen] = field(default_factory=list[Seen])
    deaths: list[int] = field(default_factory=list[int])
    """How often each replica had died then."""


@dataclass(kw_only=True)
class PrefixAware(Routing):
    """Longest known prefix first; balance first where replicas are loaded too unevenly."""

    match_share: float = 0.3
    """Least share of the prompt that must be known to follow it, 0 to 1; below it the request goes
    where least is outstanding."""
    imbalance_requests: int = 64
    """Balance goes first when the most and the least loaded replica differ by more requests than
    this ..."""
    imbalance_ratio: float = 1.5
    """... and by more than this factor."""
    pool_share: float = 1.0
    """How much of a replica's KV pool is taken to hold prefixes: older ones are forgotten."""

    def __post_init__(self) -> None:
        if not 0 <= self.match_share <= 1:
            raise ValueError(f"match_share={self.match_share} must be in [0, 1]; try 0.3")
        if self.imbalance_requests < 0:
            raise ValueError(
                f"imbalance_requests={self.imbalance_requests} must not be negative; try 64"
            )
        if not (isfinite(self.imbalance_ratio) and self.imbalance_ratio >= 1):
            raise ValueError(f"imbalance_ratio={self.imbalance_ratio} must be at least 1; try 1.5")
        if not (isfinite(self.pool_share) and self.pool_share > 0):
            raise ValueError(f"pool_share={self.pool_share} must be above 0 and finite; try 1.0")

    def init(self) -> Any:
        """Nothing was sent anywhere."""
        return Sent()

    def choose(self, memory: Any, request: RequestView, view: RouterView) -> int:
        """The replica with the longest prefix, or with the least outstanding."""
        replicas: list[Seen] = memory.replicas
        while len(replicas) < view.num_replicas:
            replicas.append(OrderedDict())
            memory.deaths.append(0)
        _forget_the_dead(memory, view)
        live, loads = view.live, view.outstanding_requests
        chosen = lightest(loads, live)
        if not self._out_of_balance(max(loads[at] for at in live), loads[chosen]):
            known = {at: _known(replicas[at], request.prefix_hashes) for at in live}
            longest = max(known.values())
            tokens = longest * request.hash_block_tokens
            if longest and tokens >= self.match_share * request.prompt_tokens:
                best = [at for at, count in known.items() if count == longest]
                chosen = lightest(loads, best)
        room = int(self.pool_share * view.pool_tokens / request.hash_block_tokens)
        _remember(replicas[chosen], request.prefix_hashes, room)
        return chosen

    def _out_of_balance(self, most: int, least: int) -> bool:
        apart = most - least > self.imbalance_requests
        return apart and most > self.imbalance_ratio * least


def _forget_the_dead(memory: Sent, view: RouterView) -> None:
    """What was sent to a replica went with it when it died."""
    for at, deaths in enumerate(view.deaths):
        if deaths != memory.deaths[at]:
            memory.replicas[at].clear()
            memory.deaths[at] = deaths


def _known(seen: Seen, hashes: tuple[int, ...]) -> int:
    """Leading hashes that were sent to a replica."""
    count = 0
    for one in hashes:
        if one not in seen:
            break
        count += 1
    return count


def _remember(seen: Seen, hashes: tuple[int, ...], room: int) -> None:
    """Note a prompt; what was sent longest ago is forgotten first, and of one prompt its end."""
    for one in reversed(hashes):
        seen[one] = None
        seen.move_to_end(one)
    while len(seen) > room:
        seen.popitem(last=False)
