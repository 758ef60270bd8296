"""Step 1 of LoongServe: which waiting requests are prefilled now (section 5.1).

First come, first served, with a limited number of exceptions. A request is taken when the slots
will do until every answer is as long as it may get, and when its batch can run without those that
decode, packed as tightly as they can be, not much later than with their instances. One that would
stop them is taken when it gains more normalised latency than they lose (equations 1 and 2).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import numpy as np

from sim.policies.elastic import ElasticView
from sim.policies.instance_plan._elastic_cluster import (
    Cluster,
    FutureNeed,
    Load,
    all_of,
    prefill_s,
)
from sim.requests import RequestView
from sim.steps import DecodeBatch


class Rules(NamedTuple):
    """Settings of the plan that matter here."""

    decode_round_s: float
    max_prefill_s: float
    max_scanned: int
    prior_output_tokens: float
    packs: bool
    may_skip: bool
    """Whether a request may be taken before one that came earlier."""


class Chosen(NamedTuple):
    """What is admitted, in the queue's order."""

    requests: list[RequestView]
    in_order: bool
    """Whether none was passed over that could run."""


def room_for_one(view: ElasticView) -> int:
    """Tokens of one request that the largest group keeps."""
    return view.limits.num_blocks * min(len(view.live), view.scaling.max_degree)


def left_after_prefill(request: RequestView, view: ElasticView) -> int:
    """Tokens that its answer may get after the one that the prefill gives, while there is room."""
    left = request.max_output_tokens - request.generated_tokens - 1
    return max(0, min(left, room_for_one(view) - request.prefill_tokens))


def ever_fits(request: RequestView, view: ElasticView) -> bool:
    """Whether it could run alone: one that could not holds up nobody."""
    more = request.max_output_tokens > request.generated_tokens + 1
    return request.prefill_tokens + more <= room_for_one(view)


def seconds_until_end(
    batches: Sequence[DecodeBatch], finished: tuple[int, int], rules: Rules
) -> float:
    """How long until the last running request has its answer, as the released code estimates it."""
    mean = (rules.prior_output_tokens + finished[1]) / (1 + finished[0])
    rounds = 0.0
    for batch in batches:
        least, most = int(batch.generated.min()), int(batch.generated.max())
        rounds = max(rounds, 10.0, mean - least, 0.1 * most)
    return rounds * rules.decode_round_s


def future_need(
    view: ElasticView, prefilling: Sequence[tuple[np.ndarray, np.ndarray]]
) -> FutureNeed:
    """Of all that runs; `prefilling`: stored and left of requests in prefills under way."""
    stored, left = all_of(view.batches)
    stored += [one[0] for one in prefilling]
    left += [one[1] for one in prefilling]
    return FutureNeed(view.limits.num_blocks * len(view.live), stored, left)


@dataclass
class Scan:
    """One admission attempt over a deployment's open instances."""

    rules: Rules
    view: ElasticView
    now: Cluster
    need: FutureNeed
    chosen: Load = field(default_factory=Load)
    """Requests that run without stopping a batch."""
    both: Load = field(default_factory=Load)
    """With the doubtful."""
    taken: list[int] = field(default_factory=list[int])
    """Places in the queue of `chosen`."""
    doubts: Load = field(default_factory=Load)
    """Requests that would stop some."""
    doubtful: list[int] = field(default_factory=list[int])
    """Their places in the queue."""
    worth: int = 0
    """So many of the doubtful gain more than they cost."""

    def __post_init__(self) -> None:
        view, now = self.view, self.now
        self.limits = view.limits
        self.seats = self.limits.max_num_seqs - view.num_running
        running = [one for one in view.batches if view.in_round or one.number in now.counts]
        self.wait_s = seconds_until_end(running, view.finished, self.rules)
        self.inverse_generated = float(sum([(1 / one.generated).sum() for one in running]))
        self.idle_slots = now.room(now.open)
        self.most = len(now.open) + len(view.decoding)
        self.idle = self._reachable_idle()

    def _reachable_idle(self) -> int:
        """Open instances that are empty once all that decodes is packed, with room for a round."""
        now = self.now
        if not self.rules.packs or not now.held:
            return sum([now.is_empty(at) for at in now.open])
        used = len(now.open) * now.slots - self.idle_slots
        opened = set(now.open)
        used += sum(
            [now.counts[one] for one, tokens in now.held.items() if opened.issuperset(tokens)]
        )
        return max(0, len(now.open) + -used // now.slots)

    def run(self) -> Chosen:
        """Walk the queue."""
        passed: list[int] = []
        waiting = self.view.waiting
        for place, request in enumerate(islice(waiting, self.rules.max_scanned)):
            if self.both.num_requests >= self.seats:
                break
            if not ever_fits(request, self.view):
                continue
            if not self._take(place, request):
                passed.append(place)
                if not self.rules.may_skip:
                    break
        admitted = sorted([*self.taken, *self.doubtful[: self.worth]])
        passed += self.doubtful[self.worth :]
        in_order = not admitted or all([place > admitted[-1] for place in passed])
        return Chosen([waiting[place] for place in admitted], in_order)

    def _take(self, place: int, request: RequestView) -> bool:
        """Whether it is among the chosen or the doubtful now."""
        tokens, left = request.prefill_tokens, left_after_prefill(request, self.view)
        both = self.both.plus(tokens)
        whole = self.limits.max_num_batched_tokens
        if both.tokens > self.idle_slots or (both.num_requests > 1 and both.tokens > whole):
            return False
        if not self.need.fits(tokens, left):
            return False
        if (self.rules.may_skip or not self.doubtful) and self._runs_beside(tokens):
            self.chosen = self.chosen.plus(tokens)
            self.taken.append(place)
        elif self.view.in_round:
            return False
        else:
            self.doubts = self.doubts.plus(tokens)
            self.doubtful.append(place)
            if self._gains(both):
                self.worth = len(self.doubtful)
        self.both = both
        self.need.add(tokens, left)
        return True

    def _runs_beside(self, tokens: int) -> bool:
        """Whether the chosen and this one can do without the instances that decode."""
        load = self.chosen.plus(tokens)
        if not self.idle or load.tokens > self.idle * self.limits.num_blocks:
            return False
        took_s = prefill_s(self.view.scaling, self.idle, load)
        if load.num_requests > 1 and took_s > self.rules.max_prefill_s:
            return False
        return took_s - prefill_s(self.view.scaling, self.most, load) <= self.wait_s

    def _gains(self, both: Load) -> bool:
        """Equations 1 and 2: what all that decodes loses, if stopped, and the doubtful gain."""
        took_s = prefill_s(self.view.scaling, self.most, both)
        if both.num_requests > 1 and took_s > self.rules.max_prefill_s:
            return False
        return took_s * self.inverse_generated <= self.wait_s * self.doubts.inverse
