"""What the steps of a plan of elastic instances must send, by an account of its own.

It keeps which tokens of which request are where by the contract of steps alone: neither the
simulated panel's map nor the real panel's pools are asked.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from sim.models.architecture import Architecture
from sim.models.parameters import kv_bytes_per_token
from sim.policies.elastic import ElasticPlan, ElasticView
from sim.steps import DecodeGroup, Migration, Prefill, Standing, Step

FLOAT32_BYTES, POSITION_BYTES = 4, 8
PAYLOADS = ("ring", "query", "partial", "migration", "migration_positions")
"""What ranks of elastic instances send, by the names of the real panel's count."""

Where = dict[int, Counter[int]]
"""Tokens of each request by instance."""


@dataclass
class Traffic:
    """Counts of what steps need, and of how groups change."""

    where: Where = field(default_factory=Where)
    ring_tokens: int = 0
    """Each of the d - 1 turns of a ring of d members passes all tokens of the prefill on once."""
    queries: int = 0
    """Of a request, in one layer, to another instance that has KV of it."""
    moved_tokens: int = 0
    changes: Counter[str] = field(default_factory=Counter[str])
    """By name: see `CHANGES`."""

    def payload_bytes(self, config: Architecture) -> dict[str, int]:
        """Bytes by payload in float32, as `PAYLOADS` names them."""
        token_bytes = kv_bytes_per_token(config, FLOAT32_BYTES)
        heads, dim = config.num_layers * config.num_heads, config.head_dim
        found = (
            self.ring_tokens * token_bytes,
            self.queries * heads * dim * FLOAT32_BYTES,
            # A partial result has the logarithm of its sum of exponentials beside it.
            self.queries * heads * (dim + 1) * FLOAT32_BYTES,
            self.moved_tokens * token_bytes,
            self.moved_tokens * POSITION_BYTES,
        )
        return dict(zip(PAYLOADS, found, strict=True))

    def take(self, step: Step, view: ElasticView) -> None:
        """Account for a step, in the order in which it is applied."""
        batches = {one.number: one.request_ids.tolist() for one in view.batches}
        lengths = {one.request_id: one.prefill_tokens for one in view.waiting}
        free = dict(enumerate(view.free_slots.tolist()))
        for request_id in step.preempt:
            held = self.where.pop(request_id)
            # The token that was sampled last has no KV yet, and is prefilled with the others.
            lengths[request_id] = held.total() + 1
            for at, tokens in held.items():
                free[at] += tokens
        batches = {
            number: [one for one in ids if one not in step.preempt]
            for number, ids in batches.items()
        }
        self.changes["pre-emptions"] += len(step.preempt)
        for move in step.migrate:
            self._migrate(move, batches[move.batch])
            free[move.source] += move.tokens
            free[move.target] -= move.tokens
        for prefill in step.prefill:
            self._prefill(prefill, [lengths[one] for one in prefill.request_ids])
        for group in step.decode:
            self._round(group, [one for number in group.batches for one in batches[number]], free)

    def _migrate(self, move: Migration, request_ids: Sequence[int]) -> None:
        left = move.tokens
        for request_id in request_ids:
            held = self.where[request_id]
            tokens = min(left, held[move.source])
            held[move.source] -= tokens
            held[move.target] += tokens
            left -= tokens
        self.moved_tokens += move.tokens
        self.changes["migrations"] += 1

    def _prefill(self, plan: Prefill, lengths: Sequence[int]) -> None:
        self.ring_tokens += (len(plan.instances) - 1) * sum(lengths)
        homes = _homes(plan)
        for request_id, length in zip(plan.request_ids, lengths, strict=True):
            self.where[request_id] = Counter(next(homes) for _ in range(length))
        keepers = {at for at, tokens in plan.targets if tokens}
        self.changes["scale-downs"] += len(keepers) < len(plan.instances)

    def _round(self, group: DecodeGroup, request_ids: Sequence[int], free: dict[int, int]) -> None:
        held: Counter[int] = Counter()
        for request_id in request_ids:
            held.update(self.where[request_id])
        holders = [at for at, tokens in held.items() if tokens]
        if any(not held[at] for at, _ in group.masters):
            short = sum(free[at] for at in holders) < len(request_ids)
            self.changes["scale-ups for memory" if short else "scale-ups for compute"] += 1
        masters = [at for at, count in group.masters for _ in range(count)]
        for request_id, master in zip(request_ids, masters, strict=True):
            where = self.where[request_id]
            self.queries += sum(1 for at, tokens in where.items() if tokens and at != master)
            where[master] += 1


CHANGES = (
    "scale-ups for memory", "scale-ups for compute", "scale-downs", "migrations", "pre-emptions",
)  # fmt: skip
"""How groups change, and what a run has to show to be worth comparing."""


def _homes(plan: Prefill) -> Iterator[int]:
    """Who keeps each token of a prefill, in order."""
    for at, tokens in plan.targets:
        for _ in range(tokens):
            yield at


class Watched(ElasticPlan):
    """A plan whose steps are accounted for; each round is asked for."""

    def __init__(self, plan: ElasticPlan) -> None:
        self._plan, self.traffic = plan, Traffic()

    def init(self) -> Any:
        """See `ElasticPlan`."""
        return self._plan.init()

    def step(self, memory: Any, view: ElasticView) -> Step:
        """See `ElasticPlan`."""
        step = self._plan.step(memory, view)
        self.traffic.take(step, view)
        return step

    def steady(self, memory: Any, view: ElasticView) -> Standing:
        """See `ElasticPlan`: an account of every round needs every round."""
        del memory, view
        return Standing()
