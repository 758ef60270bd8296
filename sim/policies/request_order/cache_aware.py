"""Requests that find much of their prompt cached go first (RAGCache section 5.2)."""

from collections.abc import Sequence
from dataclasses import dataclass

from sim.policies.request_order.base import RequestOrder, Waiting


@dataclass(kw_only=True)
class CacheAware(RequestOrder):
    """Largest ratio of cached to computed tokens first, but nobody is overtaken for ever."""

    window: int = 32
    """Overtakes after which a request goes first, whatever is cached."""

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"window={self.window} must be at least 1 overtake; try 32")

    def init(self) -> dict[int, int]:
        """How often each waiting request was overtaken."""
        return {}

    def order(self, memory: dict[int, int], waiting: Sequence[Waiting]) -> Sequence[int]:
        """Who was overtaken too often as they came, then the others by their ratio."""

        def rank(position: int) -> tuple[bool, float]:
            one = waiting[position]
            if memory.get(one.request.request_id, 0) >= self.window:
                return False, 0.0
            return True, -one.cached_tokens / one.compute_tokens

        return sorted(range(len(waiting)), key=rank)  # stable: ties as they came

    def admitted(
        self, memory: dict[int, int], admitted: Sequence[int], waiting: Sequence[int]
    ) -> None:
        """Those who came before an admitted request and still wait were overtaken by it."""
        for request_id in admitted:
            memory.pop(request_id, None)
        if not admitted or not waiting:
            return
        last = max(admitted)
        for request_id in waiting:
            if request_id > last:
                break
            count = sum(one > request_id for one in admitted)
            memory[request_id] = memory.get(request_id, 0) + count
