"""Which rows went from which attention node to which expert node: written by both panels.

Beside the number of rows stands a digest of the list itself, so that lists are compared whole and
millions of rows need not be kept.
"""

from hashlib import blake2b
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sim.expert_rows import BatchRow, NodeBatch
from sim.policies.expert_balance.base import Placement
from sim.state.expert_dispatch import Dispatch, dispatch
from sim.workload.token_routing.base import TokenRouting, Tokens, checked_expert_ids


class Dispatched(NamedTuple):
    """What one attention node sent to one expert node of one micro-batch in one layer."""

    instant_s: float
    """Of the decision."""
    layer: int
    micro_batch: int
    source: int
    """Attention node."""
    target: int
    """Expert node."""
    rows: int
    digest: str
    """Of (request, position, physical expert) of every row, in the order in which they go."""


def tokens_of(rows: "list[BatchRow]") -> Tokens:
    """The tokens of a micro-batch, in the order of a forward pass: single ones first."""
    rows = sorted(rows, key=lambda row: row.tokens > 1)
    request_ids = np.repeat([row.request_id for row in rows], [row.tokens for row in rows])
    positions = [np.arange(row.start, row.context_tokens) for row in rows]
    return Tokens(
        request_ids.astype(np.int64),
        np.concatenate(positions).astype(np.int64) if positions else np.zeros(0, np.int64),
    )


def first_turn(source: int, micro_batch: int) -> int:
    """Whose turn it is among the replicas of an expert, at the first token of a micro-batch."""
    return source + micro_batch


def digest_of(request_ids: NDArray[np.int64], positions: NDArray[np.int64],
              slots: NDArray[np.int64]) -> str:  # fmt: skip
    """Of a list of rows."""
    return blake2b(np.stack([request_ids, positions, slots]).tobytes(), digest_size=8).hexdigest()


def noted(place: tuple[float, int, int, int], tokens: Tokens, sent: Dispatch) -> "list[Dispatched]":
    """What a dispatch sends to each node; nodes that get nothing are left out.

    Args:
        place: instant, layer, micro-batch and attention node.
        tokens: of the micro-batch on that node.
        sent: where their choices go.
    """
    owners, slots = sent.order // sent.slots.shape[1], sent.slots.ravel()[sent.order]
    return listed(place, tokens, owners, slots, sent.node_rows.tolist())


def listed(
    place: tuple[float, int, int, int], tokens: Tokens, owners: NDArray[np.int64],
    slots: NDArray[np.int64], counts: "list[int]",
) -> "list[Dispatched]":  # fmt: skip
    """The same of rows in the order in which they go.

    Args:
        place: as of `noted`.
        tokens: of the micro-batch.
        owners: whose row each one is, by its place in `tokens`.
        slots: physical expert of each row.
        counts: rows of each node, one node's after another's.
    """
    found: list[Dispatched] = []
    ends = np.cumsum(counts).tolist()
    for target, (count, end) in enumerate(zip(counts, ends, strict=True)):
        if count:
            mine = slice(end - count, end)
            own = owners[mine]
            digest = digest_of(tokens.request_ids[own], tokens.positions[own], slots[mine])
            found.append(Dispatched(*place, target, count, digest))
    return found


class SimulatedDispatch:
    """Writes the log of the simulated panel, from a routing."""

    def __init__(
        self, routing: TokenRouting, seed: int, placement: Placement, sizes: tuple[int, int]
    ) -> None:
        """Take over what decides where tokens go.

        Args:
            routing: chooses the experts of every token.
            seed: of the routing.
            placement: of the experts.
            sizes: experts of a layer, and how many a token chooses.
        """
        self._routing, self._seed, self._placement = routing, seed, placement
        self._sizes = sizes
        self.log: list[Dispatched] = []

    def __call__(self, instant_s: float, batches: "list[NodeBatch]") -> None:
        """Note an iteration of all attention nodes."""
        held = self._placement.physical_to_logical
        for source, batch in enumerate(batches):
            parts = [tokens_of(batch.part(at)) for at in range(len(batch.parts))]
            for layer, placed in enumerate(held):
                for micro_batch, tokens in enumerate(parts):
                    if tokens.num_tokens:
                        place = (instant_s, layer, micro_batch, source)
                        self.log += noted(place, tokens, self._sent(tokens, place, placed))

    def _sent(
        self, tokens: Tokens, place: tuple[float, int, int, int], placed: NDArray[np.int64]
    ) -> Dispatch:
        _, layer, micro_batch, source = place
        chosen = checked_expert_ids(self._routing, self._seed, layer, tokens, *self._sizes)
        turn = first_turn(source, micro_batch)
        return dispatch(chosen, placed, self._placement.slots_per_node, turn)
