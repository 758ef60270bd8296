"""Plans of elastic instances that do what a test says, and count what that must send."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from hardware_models.scaling import DecodeScaling, PrefillScaling, ScalingBase
from sim.policies.elastic import ElasticPlan
from sim.steps import DecodeGroup, Prefill, Step

SCALING = ScalingBase(
    name="by_hand", model="none", device="none", source="by hand",
    prefill=[PrefillScaling(base_s=1.0, token_s=0.0, square_s=0.0)],
    decode=DecodeScaling(base_s=1.0, request_s=0.0, master_request_s=0.0, context_token_s=0.0),
)  # fmt: skip


class Expected(NamedTuple):
    """What a run must have sent, by a map of KV that knows nothing of the panel's."""

    where: dict[int, Counter]
    """Tokens of each request by instance."""
    ring_tokens: Counter
    """Tokens of all stripes that were passed on: (d - 1) times those of a prefill with d members.
    By the number of members."""
    exchanged: Counter
    """Queries that went to another instance in one layer, by (master, holder)."""

    def prefill(self, plan: Prefill, lengths: Sequence[int]) -> None:
        """Note who keeps what: token by token."""
        size = len(plan.instances)
        self.ring_tokens[size] += (size - 1) * sum(lengths)
        owners = [request for request, n in zip(plan.request_ids, lengths, strict=True)
                  for _ in range(n)]  # fmt: skip
        homes = [at for at, tokens in plan.targets for _ in range(tokens)]
        for request, home in zip(owners, homes, strict=True):
            self.where.setdefault(request, Counter())[home] += 1

    def round(self, group: DecodeGroup, request_ids: Sequence[int]) -> None:
        """Note who stores and who asks whom."""
        masters = [at for at, count in group.masters for _ in range(count)]
        for request, master in zip(request_ids, masters, strict=True):
            for holder, tokens in self.where[request].items():
                self.exchanged[master, holder] += bool(tokens) and holder != master
            self.where[request][master] += 1


def nothing() -> Expected:
    return Expected({}, Counter(), Counter())


class Case(NamedTuple):
    """One batch from its prefill to its last token."""

    requests: int
    """The next so many that wait."""
    ring: tuple[int, ...]
    shares: tuple[tuple[int, int], ...]
    """(instance, tokens); the last one is made to fit."""
    masters: tuple[tuple[int, ...], ...]
    """Of the first round, the second and so on; the last stands. Requests are dealt evenly."""


@dataclass(kw_only=True)
class OneByOne(ElasticPlan):
    """Case after case; all instances are a group in every round."""

    cases: Sequence[Case]
    expected: Expected = field(default_factory=nothing)

    def init(self):
        return [-1, 0]  # the case, and its round

    def step(self, memory, view):
        np.testing.assert_array_equal(view.free_slots, view.kv.free)
        if view.in_round or view.prefilling:
            return Step()
        if not view.batches:
            memory[:] = memory[0] + 1, 0
            return Step(prefill=(self._prefill(view, memory[0]),)) if view.waiting else Step()
        masters = self.cases[memory[0]].masters
        named = masters[min(memory[1], len(masters) - 1)]
        memory[1] += 1
        (batch,) = view.batches
        dealt = np.array_split(np.arange(batch.num_requests), len(named))
        pairs = tuple((at, len(part)) for at, part in zip(named, dealt, strict=True) if len(part))
        group = DecodeGroup((batch.number,), tuple(view.live), pairs)
        self.expected.round(group, batch.request_ids.tolist())
        return Step(decode=(group,))

    def _prefill(self, view, at):
        case = self.cases[at]
        chosen = list(view.waiting)[: case.requests]
        lengths = [one.prefill_tokens for one in chosen]
        *before, (last, _) = case.shares
        left = sum(lengths) - sum(tokens for _, tokens in before)
        ids = tuple(one.request_id for one in chosen)
        plan = Prefill(ids, case.ring, (*before, (last, left)))
        self.expected.prefill(plan, lengths)
        return plan


@dataclass(kw_only=True)
class Steps(ElasticPlan):
    """Steps in order, each where `ready` says so; then everybody decodes alone, where it lies."""

    steps: Sequence
    """Functions of the view; None: not yet."""

    def init(self):
        return [0]

    def step(self, memory, view):
        np.testing.assert_array_equal(view.free_slots, view.kv.free)
        if memory[0] < len(self.steps):
            step = self.steps[memory[0]](view)
            memory[0] += step is not None
            return step or Step()
        return together(view)


@dataclass(kw_only=True)
class Together(ElasticPlan):
    """All live instances are one group for everything, whoever is lost."""

    def init(self):
        return None

    def step(self, memory, view):
        return together(view)


def together(view):
    """One prefill of all that wait, over all live instances; else a round of all that decode."""
    live = tuple(view.live)
    if view.in_round or view.prefilling:
        return Step()
    if view.waiting:
        ids = tuple(one.request_id for one in view.waiting)
        tokens = sum(one.prefill_tokens for one in view.waiting)
        targets = (live[0], tokens // 3), (live[-1], tokens - tokens // 3)
        return Step(prefill=(Prefill(ids, live, targets),))
    if not view.batches:
        return Step()
    numbers = tuple(one.number for one in view.batches)
    count = sum(one.num_requests for one in view.batches)
    masters = ((live[0], 1), (live[-1], count - 1)) if min(count, len(live)) > 1 else None
    return Step(decode=(DecodeGroup(numbers, live, masters or ((live[0], count),)),))
