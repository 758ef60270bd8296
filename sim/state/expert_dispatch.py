"""To which physical expert every choice of a micro-batch goes, and which rows a node gets."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Whole = NDArray[np.int64]


class Replicas(NamedTuple):
    """The slots of a layer, sorted by the expert that they hold."""

    slots: Whole
    """Slots of expert 0 in order, then those of expert 1, and so on."""
    first: Whole
    """Where in `slots` those of each expert begin [experts]."""
    counts: Whole
    """How many each expert has [experts]."""


class Dispatch(NamedTuple):
    """Where the rows of one micro-batch go in one layer.

    A row is a choice: a token of top_k experts is top_k rows, and each is sent once.
    """

    slots: Whole
    """Physical expert of every choice [tokens, top_k]."""
    slot_rows: Whole
    """Rows of each physical expert [slots]."""
    node_rows: Whole
    """Rows of each node [nodes]."""
    order: Whole
    """Rows (token * top_k + choice) by slot and then by token [tokens * top_k]."""

    def rows_of(self, node: int) -> Whole:
        """Rows that go to a node, by slot and then by token."""
        end = int(self.node_rows[: node + 1].sum())
        return self.order[end - int(self.node_rows[node]) : end]

    def tokens_of(self, node: int) -> Whole:
        """Tokens of these rows: a token is there once for each of its choices that the node has."""
        return self.rows_of(node) // self.slots.shape[1]


def replicas_of(placement: Whole, num_experts: int) -> Replicas:
    """The slots of every expert.

    Args:
        placement: logical expert of each slot of one layer [slots].
        num_experts: of the model.
    """
    counts = np.bincount(placement, minlength=num_experts)
    return Replicas(_by_value(placement), counts.cumsum() - counts, counts)


def dispatch(
    expert_ids: NDArray[np.integer],
    placement: Whole,
    slots_per_node: int,
    first_turn: int = 0,
) -> Dispatch:
    """Send every choice of a micro-batch to a physical expert.

    The choices of an expert with several replicas go to these in turn, in the order of the tokens.
    The first one goes to replica `first_turn` modulo their number: whoever counts its micro-batches
    there keeps the first replica from getting the odd rows of all of them.

    Args:
        expert_ids: logical experts that each token chose, distinct [tokens, top_k].
        placement: logical expert of each slot of the layer [slots]; every expert has one.
        slots_per_node: slots that a node holds; slot s lies on node s // slots_per_node.
        first_turn: whose turn it is, not negative.

    Raises:
        ValueError: an id has no slot.
    """
    num_slots = len(placement)
    chosen = expert_ids.ravel()
    replicas = replicas_of(placement, int(placement.max()) + 1)
    if len(chosen):
        _require_known(expert_ids, len(replicas.counts))
    order = _by_value(chosen)
    sorted_ids = chosen[order]
    counts = np.bincount(sorted_ids, minlength=len(replicas.counts))
    # How many choices of the same expert came before each one.
    before = np.arange(len(chosen)) - (counts.cumsum() - counts)[sorted_ids]
    turn = (before + first_turn) % replicas.counts[sorted_ids]
    slots = np.empty(len(chosen), dtype=np.int64)
    slots[order] = replicas.slots[replicas.first[sorted_ids] + turn]
    slot_rows = np.bincount(slots, minlength=num_slots)
    node_rows = slot_rows.reshape(-1, slots_per_node).sum(axis=1)
    return Dispatch(slots.reshape(expert_ids.shape), slot_rows, node_rows, _by_value(slots))


def _by_value(values: NDArray[np.integer]) -> Whole:
    """Positions by value, and of equal values in order."""
    if len(values) and values.max() <= np.iinfo(np.uint16).max:
        values = values.astype(np.uint16)  # numpy sorts short numbers by radix: ten times as fast
    return np.argsort(values, kind="stable")


def _require_known(expert_ids: NDArray[np.integer], num_experts: int) -> None:
    wrong = (expert_ids < 0) | (expert_ids >= num_experts)
    if wrong.any():
        token, choice = np.argwhere(wrong)[0].tolist()
        raise ValueError(
            f"expert_ids[{token}, {choice}]={expert_ids[token, choice]} must be from 0 to "
            f"{num_experts - 1}, the experts that are placed; route to the model's experts"
        )
