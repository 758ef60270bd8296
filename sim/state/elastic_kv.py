"""Which tokens' KV lies on which instance, and who decodes with whom: the map of a deployment.

Rows of arrays are requests, columns are instances: rounds of decoding add to whole columns at once.
"""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sim.requests import Request, RequestView

Ints = NDArray[np.int64]
ROWS = 64
"""Rows to begin with; doubled when they run out."""


class Left(NamedTuple):
    """A request that leaves its place, whatever for."""

    request: Request
    generated_tokens: int
    """Of its answer so far."""


class KvMap:
    """Rows of requests that prefill or hold KV."""

    def __init__(self, num_instances: int, slots: int) -> None:
        self.tokens: Ints = np.zeros((ROWS, num_instances), np.int64)
        """[rows, instances] KV of each request on each instance."""
        self.generated: Ints = np.zeros(ROWS, np.int64)
        self.context: Ints = np.zeros(ROWS, np.int64)
        """[rows] tokens whose KV is stored."""
        self.free: Ints = np.full(num_instances, slots, np.int64)
        """[instances] slots that nobody holds."""
        self.requests: dict[int, Request] = {}
        self.rows: dict[int, int] = {}
        """Of each request with a row."""
        self.output: Ints = np.zeros(ROWS, np.int64)
        """[rows] tokens that each answer will have: hidden from plans."""
        self.limit: Ints = np.zeros(ROWS, np.int64)
        """[rows] tokens that each answer may have."""
        self._spare = list(range(ROWS - 1, -1, -1))

    def seat(self, view: RequestView, placed: Sequence[tuple[int, int]]) -> int:
        """Give a request a row, and slots on instances: (instance, tokens) of its prompt."""
        if not self._spare:
            self._grow()
        row = self._spare.pop()
        request = self.requests[view.request_id]
        self.rows[view.request_id] = row
        self.tokens[row] = 0
        for instance, tokens in placed:
            self.tokens[row, instance] += tokens
        self.free -= self.tokens[row]
        self.context[row], self.generated[row] = view.prefill_tokens, view.generated_tokens
        self.output[row], self.limit[row] = request.output_tokens, request.max_output_tokens
        return row

    def leave(self, request_id: int, *, ended: bool) -> Left:
        """Free the slots and the row of a request; `ended`: it will not come back."""
        row = self.rows.pop(request_id)
        self.free += self.tokens[row]
        self.tokens[row] = 0
        self._spare.append(row)
        request = self.requests.pop(request_id) if ended else self.requests[request_id]
        return Left(request, int(self.generated[row]))

    def store(self, rows: Ints, instance: int, rounds: int) -> None:
        """Requests get so many tokens each, all stored on one instance."""
        self.tokens[rows, instance] += rounds
        self.context[rows] += rounds
        self.generated[rows] += rounds
        self.free[instance] -= rounds * len(rows)

    def move(self, rows: Ints, source: int, target: int, tokens: int) -> list[tuple[int, int]]:
        """Move the first so many tokens that rows have on an instance to another one.

        Returns:
            (row, tokens) of every row that moves some.
        """
        held = self.tokens[rows, source]
        before = np.cumsum(held) - held
        moved = np.clip(tokens - before, 0, held)
        self.tokens[rows, source] -= moved
        self.tokens[rows, target] += moved
        self.free[source] += tokens
        self.free[target] -= tokens
        chosen = np.flatnonzero(moved)
        return list(zip(rows[chosen].tolist(), moved[chosen].tolist(), strict=True))

    def lose(self, instance: int) -> None:
        """An instance has no slots any more; who had KV there has left it before."""
        self.free[instance] = 0

    def _grow(self) -> None:
        count = len(self.generated)
        self.tokens = np.concatenate((self.tokens, np.zeros_like(self.tokens)))
        for name in ("generated", "context", "output", "limit"):
            column: Ints = getattr(self, name)
            setattr(self, name, np.concatenate((column, np.zeros_like(column))))
        self._spare = list(range(2 * count - 1, count - 1, -1))


class WaitingLine:
    """Requests without KV: pre-empted ones first, then in order of arrival."""

    def __init__(self) -> None:
        self.views: deque[RequestView] = deque()

    def take(self, request_ids: Sequence[int]) -> list[RequestView]:
        """Take requests out, in the order asked for.

        Raises:
            ValueError: one does not wait, or is asked for twice.
        """
        wanted = set(request_ids)
        found = {view.request_id: view for view in self.views if view.request_id in wanted}
        if len(found) < len(request_ids):
            missing = sorted(wanted - set(found)) or sorted(request_ids)
            raise ValueError(f"requests {missing} are prefilled and do not wait, or twice")
        if all(self.views[at].request_id in wanted for at in range(len(wanted))):
            for _ in wanted:
                self.views.popleft()
        else:
            self.views = deque([one for one in self.views if one.request_id not in wanted])
        return [found[request_id] for request_id in request_ids]

    def back(self, left: Sequence[Left]) -> None:
        """Put requests at the head of the queue, in this order."""
        for one in reversed(left):
            self.views.appendleft(one.request.view(one.generated_tokens))


def shares(
    lengths: Sequence[int], targets: Sequence[tuple[int, int]]
) -> list[list[tuple[int, int]]]:
    """Which tokens of each request go to which target.

    Args:
        lengths: tokens of each request; they are one sequence after another.
        targets: (instance, tokens), each the next so many of that sequence.

    Returns:
        (instance, tokens) of each request, in order.
    """
    found: list[list[tuple[int, int]]] = []
    left = [tokens for _, tokens in targets]
    at = 0
    for length in lengths:
        placed: list[tuple[int, int]] = []
        missing = length
        while missing:
            taken = min(missing, left[at])
            if taken:
                placed.append((targets[at][0], taken))
                left[at] -= taken
                missing -= taken
            else:
                at += 1
        found.append(placed)
    return found
