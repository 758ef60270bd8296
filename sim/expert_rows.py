"""The batch of one attention node as rows, in the order in which both panels know them."""

from collections.abc import Sequence
from typing import NamedTuple

from sim.models.work import IterationShape
from sim.policies.batching.base import Batch
from sim.policies.micro_batching.base import Row
from sim.state.replica_state import ReplicaState


class BatchRow(NamedTuple):
    """What a request brings to an iteration."""

    request_id: int
    start: int
    """Position of its first token to compute."""
    tokens: int
    samples: bool
    """Whether its next token comes of it."""
    decodes: bool

    @property
    def size(self) -> Row:
        """As a micro-batching rule sees it."""
        return Row(self.tokens, self.start + self.tokens)


class NodeBatch(NamedTuple):
    """The batch of a node, and which rows each micro-batch has."""

    rows: list[BatchRow]
    parts: list[list[int]]

    def part(self, micro_batch: int) -> list[BatchRow]:
        """The rows of a micro-batch."""
        return [self.rows[at] for at in self.parts[micro_batch]]

    def shapes(self) -> list[IterationShape]:
        """The work of every micro-batch."""
        return [shape_of(self.part(at)) for at in range(len(self.parts))]


def batch_of(batch: Batch, state: ReplicaState) -> list[BatchRow]:
    """The rows of a batch that was just applied: decodes in order of admission, then chunks."""
    chunks = dict(batch.prefill)
    rows: list[BatchRow] = []
    left: dict[int, tuple[int, int]] = {}
    for request_id, context, prefill_left in state.running():
        if request_id in chunks:
            left[request_id] = context, prefill_left
        elif batch.decode and not prefill_left:
            rows.append(BatchRow(request_id, context - 1, 1, True, True))
    for request_id, tokens in batch.prefill:
        context, prefill_left = left[request_id]
        rows.append(BatchRow(request_id, context - tokens, tokens, not prefill_left, False))
    return rows


def shape_of(rows: Sequence[BatchRow]) -> IterationShape:
    """The work of some rows."""
    chunks = [(row.tokens, row.start) for row in rows if not row.decodes]
    contexts = [row.start + 1 for row in rows if row.decodes]
    return IterationShape.of(chunks, contexts, sum(row.samples for row in rows))


def as_decodes(rows: Sequence[BatchRow]) -> IterationShape:
    """The work of rows whose prompts were computed elsewhere: each is one more token."""
    contexts = [row.start + row.tokens for row in rows]
    return IterationShape.of((), contexts, len(contexts))
