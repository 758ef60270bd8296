"""The batch of one attention node as rows, in the order in which both panels know them."""

from collections.abc import Sequence
from typing import NamedTuple

from sim.models.work import IterationShape
from sim.policies.batching.base import Batch
from sim.state.replica_state import ReplicaState

Span = tuple[str, str, float, float, int]
"""(resource, operation, start, end, micro-batch) of an iteration, seconds."""


class BatchRow(NamedTuple):
    """What a request brings to an iteration; the `Row` that micro-batching rules see."""

    request_id: int
    tokens: int
    context_tokens: int
    """Whose KV these tokens read, themselves included."""
    samples: bool
    """Whether its next token comes of it."""
    decodes: bool

    @property
    def start(self) -> int:
        """Position of its first token to compute."""
        return self.context_tokens - self.tokens


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
    running = state.running()
    rows: list[BatchRow] = []
    if batch.decode:
        rows = [
            BatchRow(request_id, 1, context, True, True)
            for request_id, context, left in running
            if not left and request_id not in chunks
        ]
    if chunks:
        after = {one.request_id: one for one in running if one.request_id in chunks}
        for request_id, tokens in batch.prefill:
            _, context, left = after[request_id]
            rows.append(BatchRow(request_id, tokens, context, not left, False))
    return rows


def shape_of(rows: Sequence[BatchRow]) -> IterationShape:
    """The work of some rows."""
    chunks = [(row.tokens, row.start) for row in rows if not row.decodes]
    if not chunks:
        return as_decodes(rows)
    contexts = [row.context_tokens for row in rows if row.decodes]
    return IterationShape.of(chunks, contexts, sum(row.samples for row in rows))


def as_decodes(rows: Sequence[BatchRow]) -> IterationShape:
    """The work of rows whose prompts were computed elsewhere: each is one more token."""
    count = len(rows)
    return IterationShape(0, 0, 0, 0, count, sum([row.context_tokens for row in rows]), count)
