"""When a prompt is prefilled before its documents are certain: algorithm 2, case by case."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.generations import MAX_STAGES, NONE, Generations, Question
from sim.policies.retrieval_overlap.base import (
    Action,
    RetrievalOverlap,
    SearchView,
    checked_action,
)
from sim.policies.retrieval_overlap.none import NoOverlap
from sim.policies.retrieval_overlap.speculative import Speculative
from sim.requests import Request
from sim.workload.knowledge import Documents

A, B = (1, 2), (2, 1)
DOCUMENTS = Documents(np.array([10, 20, 40, 80]), system_tokens=5)
WAIT, START, STOP = Action(), Action(start=True), Action(stop=True)
AGAIN = Action(stop=True, start=True)

CASES = [
    # documents, previous, generating, final, pool; none, speculative
    ("first stage, room", A, (), None, False, 0, WAIT, START),
    ("first stage, full", A, (), None, False, 2, WAIT, WAIT),
    ("unchanged, runs", A, A, A, False, 0, None, WAIT),
    ("unchanged, runs, full", A, A, A, False, 9, None, WAIT),
    ("unchanged, was never begun", A, A, None, False, 0, WAIT, WAIT),
    ("changed, room", B, A, A, False, 1, None, AGAIN),
    ("changed, full", B, A, A, False, 2, None, STOP),
    ("changed, nothing runs", B, A, None, False, 1, WAIT, START),
    ("changed back to what runs", A, B, A, False, 0, None, WAIT),
    ("final, what runs is right", A, A, A, True, 9, None, WAIT),
    ("final, what runs is wrong, full", B, A, A, True, 9, None, AGAIN),
    ("final, unchanged, what runs is wrong", B, B, A, True, 0, None, AGAIN),
    ("final, nothing runs, full", A, A, None, True, 9, START, START),
    ("final at once", A, (), None, True, 9, START, START),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_every_case_of_algorithm_2(case):
    _, documents, previous, generating, final, pool, none, speculative = case
    view = SearchView(documents, previous, generating, final, pool)
    assert checked_action(Speculative(max_prefill_bs=2), view) == speculative
    if none is not None:
        assert checked_action(NoOverlap(), view) == none


def test_a_pool_without_any_room_is_refused():
    with pytest.raises(ValueError, match=r"max_prefill_bs=0 must be at least 1; try 4"):
        Speculative(max_prefill_bs=0)


@dataclass(kw_only=True)
class _Broken(RetrievalOverlap):
    action: Action = WAIT

    def staged(self, view):
        return self.action


@pytest.mark.parametrize(
    ("action", "generating", "final"),
    [
        (STOP, None, False),  # there is nothing to stop
        (AGAIN, None, False),
        (START, A, False),  # two at once
        (START, A, True),
        (WAIT, None, True),  # an answer is never generated
        (STOP, A, True),
        (WAIT, B, True),  # or with other documents
    ],
)
def test_what_a_rule_may_not_do_is_refused(action, generating, final):
    view = SearchView(A, (), generating, final, 0)
    with pytest.raises(ValueError, match=r"policy _Broken: .* mend the policy"):
        checked_action(_Broken(action=action), view)


def _make_question(*stages, number=3, own=7):
    prompt = own + sum(int(DOCUMENTS.tokens[one]) for one in stages[-1])
    return Question(Request(number, 1.5, prompt, 6, 99), stages, own)


def test_generations_are_numbered_by_request_and_stage_and_have_the_prompt_of_their_documents():
    generations = Generations(Speculative(), DOCUMENTS)
    question = _make_question((0, 1), (0, 1), (3, 2), own=12)
    first = generations.staged(question, 0, 0)
    assert first.stopped == NONE
    assert first.started.documents == (0, 1)
    assert first.started.request == Request(3 * MAX_STAGES, 1.5, 12 + 10 + 20, 6, 99)
    assert generations.staged(question, 1, 0) == (NONE, None)
    last = generations.staged(question, 2, 9)
    assert last.stopped == 3 * MAX_STAGES
    assert last.started.request == question.request._replace(request_id=3 * MAX_STAGES + 2)
    assert generations.answers(question) == 3 * MAX_STAGES + 2


def test_a_client_that_leaves_ends_its_generation():
    question = _make_question(A, B)
    for staged, ends in ((0, NONE), (1, 3 * MAX_STAGES), (2, 3 * MAX_STAGES + 1)):
        generations = Generations(Speculative(), DOCUMENTS, may_give_up=True)
        for stage in range(staged):
            generations.staged(question, stage, 0)
        assert generations.gives_up(question, lambda _: True) == ends
        assert not generations.wants(question)


def test_a_client_with_its_answer_does_not_leave():
    question = _make_question(A)
    for pending, ends in ((True, 3 * MAX_STAGES), (False, None)):
        generations = Generations(Speculative(), DOCUMENTS, may_give_up=True)
        generations.staged(question, 0, 0)
        answer = generations.answers(question)
        assert generations.gives_up(question, {answer: pending}.__getitem__) == ends


LISTS = st.lists(st.sampled_from([A, B, (3,), (0, 3)]), min_size=1, max_size=9)


@given(
    stages=LISTS, pools=st.lists(st.integers(0, 3), min_size=9, max_size=9), most=st.integers(1, 3)
)
def test_one_generation_runs_at_most_and_the_last_one_has_the_answer(stages, pools, most):
    question = _make_question(*stages)
    for rule in (NoOverlap(), Speculative(max_prefill_bs=most)):
        generations, running, started = Generations(rule, DOCUMENTS), {}, 0
        for stage in range(len(stages)):
            if not generations.matters(question, stage):
                continue
            stopped, new = generations.staged(question, stage, pools[stage])
            if stopped != NONE:
                del running[stopped]
            if new is not None:
                running[new.request.request_id] = new.documents
                started += 1
            assert len(running) <= 1
        assert running == {generations.answers(question): stages[-1]}
        assert started == 1 or isinstance(rule, Speculative)


def test_only_stages_that_change_something_or_end_the_search_matter():
    question = _make_question(A, A, B, B, B)
    early, late = (Generations(rule, DOCUMENTS) for rule in (Speculative(), NoOverlap()))
    assert [stage for stage in range(5) if early.matters(question, stage)] == [0, 2, 4]
    assert [stage for stage in range(5) if late.matters(question, stage)] == [4]
