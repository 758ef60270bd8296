"""Canonical rows and single decisions say what the trace says, no more and no less."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from serving_cases import POLICIES, Case, Grid, assert_equal_traces, cases, recorded, run_case

from sim.decision_rows import Observed, canonical, expand
from sim.engine import ReplicaLimits
from sim.metrics import token_times
from sim.policies.batching.chunked_prefill import ChunkedPrefill
from sim.policies.batching.continuous import Continuous

TWO = Case(recorded([(0, 4, 4), (0, 4, 3)]), ReplicaLimits(4, 64, 4, 99), Grid(0.5))


@settings(max_examples=20)
@given(case=cases())
def test_canonical_form_is_reached_in_one_step_and_loses_no_decision(case: Case) -> None:
    for policy in POLICIES.values():
        trace = run_case(case, policy, one_by_one=True)
        short = canonical(trace)
        assert_equal_traces(canonical(short), short)
        assert short.num_decisions == trace.num_decisions
        assert len(short.decisions["repeat"]) <= len(trace.decisions["repeat"])


@settings(max_examples=20)
@given(case=cases())
def test_single_decisions_are_the_rows_of_a_run_that_goes_one_by_one(case: Case) -> None:
    for policy in POLICIES.values():
        fast, slow = run_case(case, policy), run_case(case, policy, one_by_one=True)
        bare = [decision._replace(observed=None) for decision in expand(slow)]
        assert [decision._replace(observed=None) for decision in expand(fast)] == bare
        for few, many in zip(expand(fast), expand(slow), strict=True):
            assert few.observed in (None, many.observed)
        assert all(decision.observed is not None for decision in expand(slow))


@settings(max_examples=20)
@given(case=cases())
def test_decoded_tokens_of_single_decisions_are_those_of_the_requests(case: Case) -> None:
    for policy in POLICIES.values():
        trace = run_case(case, policy)
        computed: Counter[int] = Counter()
        for decision in expand(trace):
            computed.update(decision.tokens)
        for row, request_id in enumerate(trace.requests["request"].tolist()):
            prompt = int(trace.requests["prompt_tokens"][row])
            decoded = len(token_times(trace, request_id)) - 1
            preempted = np.isin(request_id, trace.decision_lists["preempted"].values)
            assert computed[request_id] >= prompt + decoded - (prompt if preempted else 0)
            if not preempted:
                assert computed[request_id] == prompt + decoded


def test_a_run_written_by_hand() -> None:
    decisions = expand(run_case(TWO, Continuous(watermark=0.0)))
    assert [tuple(decision[:5]) for decision in decisions] == [
        (0.0, (0, 1), (), {0: 4, 1: 4}, Observed(99, 2, 0)),
        (1.0, (), (), {0: 1, 1: 1}, Observed(97, 0, 8)),
        (1.5, (), (), {0: 1, 1: 1}, None),
        (2.0, (), (), {0: 1}, Observed(97, 0, 6)),
    ]


def test_a_row_that_prefills_is_never_merged_with_the_decodes_after_it() -> None:
    # Request 1's prompt is cut; while no block is free its chunk waits and request 0 decodes on.
    case = Case(recorded([(0, 3, 8), (0, 10, 1)]), ReplicaLimits(4, 6, 2, 8), Grid(0.5))
    short = canonical(run_case(case, ChunkedPrefill(), one_by_one=True))
    assert short.decisions["repeat"].max() > 1
    assert (short.decisions["prefill_tokens"][short.decisions["repeat"] > 1] == 0).all()


def test_a_log_that_contradicts_itself_is_refused() -> None:
    trace = run_case(TWO, Continuous(watermark=0.0))
    wrong = dict(trace.decisions, num_decodes=trace.decisions["num_decodes"] * 2)
    with pytest.raises(ValueError, match=r"row 1 decodes num_decodes=4 requests, and 2 have"):
        expand(replace(trace, decisions=wrong))
    wrong = dict(trace.decisions, repeat=trace.decisions["repeat"] + 1)
    with pytest.raises(ValueError, match=r"stand for 7 iterations and the trace has 4"):
        expand(replace(trace, decisions=wrong))
    lists = dict(trace.decision_lists, left=trace.decision_lists["admitted"])
    with pytest.raises(ValueError, match=r"request 0 leaves the decodes at decision row 0"):
        expand(replace(trace, decision_lists=lists))
