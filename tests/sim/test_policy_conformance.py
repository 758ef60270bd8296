"""What every batching policy keeps to, whatever it decides."""

from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_cases import POLICIES, Case, assert_equal_traces, cases, run_case

from sim.decision_rows import Decision, expand
from sim.metrics import token_times
from sim.policies.batching.base import Batch, Batching, ReplicaView, Standing

EVERY_POLICY = pytest.mark.parametrize("name", POLICIES)


def look(view: ReplicaView) -> tuple[Any, ...]:
    """All that a view shows, copied."""
    counts = (view.num_running, view.num_decoding, view.free_blocks, view.decode_blocks)
    found = map(view.cached_prefix, view.waiting)
    freed = [view.given_up((request.request_id,)) for request in view.running()]
    lists = (view.waiting, view.prefilling, view.running(), found, freed)
    return (view.limits, *counts, *map(tuple, lists))


@dataclass(kw_only=True)
class Watched(Batching):
    """Asks a policy twice and fails when anything but its memory differs, or the queue is wrong."""

    inner: Batching
    lost: list[int] = field(default_factory=list)
    """Requests that were pre-empted so far."""
    head: list[int] = field(default_factory=list)
    """Of these, the ones that the last batch pre-empted."""

    def init(self) -> Any:
        return self.inner.init()

    def next_batch(self, memory: Any, view: ReplicaView) -> Batch:
        before, settings_before = look(view), deepcopy(self.inner)
        first = self.inner.next_batch(deepcopy(memory), view)
        answer = self.inner.next_batch(memory, view)
        assert answer == first, "the same view and memory gave another batch"
        assert look(view) == before, "the view was changed"
        assert self.inner == settings_before, "hyper-parameters were changed"
        self._check_queue(view)
        self.head = [one for one in answer.preempt if one not in answer.admit]
        self.lost += self.head
        return answer

    def _check_queue(self, view: ReplicaView) -> None:
        """Pre-empted requests first, the latest ones before all, then in order of arrival."""
        queue = [request.request_id for request in view.waiting]
        assert queue[: len(self.head)] == self.head
        fresh = [request for request in view.waiting if request.request_id not in self.lost]
        assert [request.request_id for request in fresh] == queue[len(queue) - len(fresh) :]
        assert fresh == sorted(fresh, key=lambda request: request.arrival_s)

    def steady(self, memory: Any, view: ReplicaView) -> Standing:
        before = look(view)
        first = self.inner.steady(deepcopy(memory), view)
        answer = self.inner.steady(memory, view)
        assert answer == first, "the same view and memory gave another standing"
        assert look(view) == before, "the view was changed"
        return answer


@EVERY_POLICY
@settings(max_examples=30)
@given(case=cases(prefixes=None))
def test_policies_are_deterministic_change_nothing_they_see_and_see_the_queue_in_order(
    name: str, case: Case
) -> None:
    workload = deepcopy(case.workload)
    watched = run_case(case, Watched(inner=POLICIES[name]))
    assert_equal_traces(watched, run_case(case, POLICIES[name]))
    assert case.workload == workload


@EVERY_POLICY
@settings(max_examples=25)
@given(case=cases(prefixes=None), chance=st.randoms(use_true_random=False))
def test_hidden_output_lengths_change_no_decision_before_an_answer_ends(
    name: str, case: Case, chance: Any
) -> None:
    outputs = case.workload.output_tokens
    others = [chance.randint(1, most) if chance.random() < 0.5 else most for most in outputs]
    runs = [run_case(case, POLICIES[name], one_by_one=True)]
    workload = deepcopy(case.workload)
    workload.output_tokens = others
    runs.append(run_case(case._replace(workload=workload), POLICIES[name], one_by_one=True))
    # The shorter answer of request i ends at its token `others[i]`: from then on they may differ.
    ends = [
        token_times(runs[1], request_id)[other - 1]
        for request_id, (most, other) in enumerate(zip(outputs, others, strict=True))
        if most != other
    ]
    assert_same_until(min(ends, default=np.inf), *map(expand, runs))


@EVERY_POLICY
@settings(max_examples=25)
@given(case=cases(closed=False, prefixes=None), chance=st.randoms(use_true_random=False))
def test_future_arrivals_change_no_decision_before_they_happen(
    name: str, case: Case, chance: Any
) -> None:
    keep = chance.randint(0, len(case.workload.arrival_s) - 1)
    workload = deepcopy(case.workload)
    visible_s = workload.arrival_s[keep]
    for row in range(keep, len(workload.arrival_s)):
        workload.arrival_s[row] += chance.choice([0.0, 0.5, 10.0])
        workload.prompt_tokens[row] = chance.randint(1, workload.prompt_tokens[row])
    workload.arrival_s.sort()
    other = case._replace(workload=workload)
    runs = [run_case(one, POLICIES[name], one_by_one=True) for one in (case, other)]
    assert_same_until(visible_s, *map(expand, runs))


@EVERY_POLICY
@settings(max_examples=25)
@given(case=cases(prefixes=None))
def test_an_iteration_keeps_to_the_token_budget_unless_one_whole_prompt_exceeds_it(
    name: str, case: Case
) -> None:
    decisions = run_case(case, POLICIES[name]).decisions
    tokens = decisions["prefill_tokens"] + decisions["num_decodes"]
    over = tokens > case.limits.max_num_batched_tokens
    alone = (decisions["num_prefills"] == 1) & (decisions["num_decodes"] == 0)
    assert (~over | alone).all()


def assert_same_until(instant_s: float, one: list[Decision], other: list[Decision]) -> None:
    """The decisions of two runs before an instant are equal, and equally many."""
    before = [[row for row in rows if row.instant_s < instant_s] for rows in (one, other)]
    assert before[0] == before[1]
