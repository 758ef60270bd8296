"""Laws that hold for every run of a replica: conservation, causality, order, Little's law."""

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from serving_cases import POLICIES, Case, cases, run_case

from sim.decision_rows import expand
from sim.metrics import request_times, token_times
from sim.trace import State, Trace

EVERY_POLICY = pytest.mark.parametrize("name", POLICIES)


def law(check: Callable[[Case, Trace], None]) -> Callable[[str], None]:
    """Run a check of (case, trace) on random loads under every policy."""

    @EVERY_POLICY
    @settings(max_examples=15)
    @given(case=cases())
    def test(name: str, case: Case) -> None:
        check(case, run_case(case, POLICIES[name], one_by_one=True))

    return test


def requests_in(trace: Trace, state: State) -> list[int]:
    return trace.events["request"][trace.events["state"] == state].tolist()


@law
def test_every_request_finishes_once_with_all_its_tokens(case: Case, trace: Trace) -> None:
    everyone = list(range(len(case.workload.arrival_s)))
    assert sorted(requests_in(trace, State.finished)) == everyone
    assert sorted(trace.requests["request"].tolist()) == everyone
    tokens = [len(token_times(trace, request_id)) for request_id in everyone]
    assert tokens == case.workload.output_tokens


@law
def test_prefilled_tokens_are_prompts_and_what_was_recomputed(case: Case, trace: Trace) -> None:
    prompts = dict(enumerate(case.workload.prompt_tokens))
    prefilled: Counter[int] = Counter()
    stored: Counter[int] = Counter()
    recomputed = 0
    for decision in expand(trace):
        for request_id in decision.preempted:
            recomputed += stored.pop(request_id)
        stored.update(decision.tokens)
        prefilled.update(decision.tokens)
    decoded = sum(tokens - 1 for tokens in case.workload.output_tokens)
    # A re-admitted request samples a token from its prefill: that one is not decoded.
    again = sum(np.bincount(trace.runs["request"])) - len(prompts)
    computed = sum(prefilled.values())
    assert computed == sum(prompts.values()) + decoded + recomputed
    columns = trace.decisions
    assert (columns["prefill_tokens"] + columns["num_decodes"]).sum() == computed
    assert columns["num_decodes"].sum() == decoded - again
    assert columns["sampled_tokens"].sum() == sum(case.workload.output_tokens)


@law
def test_blocks_are_never_overdrawn_and_follow_from_the_contexts(case: Case, trace: Trace) -> None:
    stored: Counter[int] = Counter()
    sizes = zip(case.workload.prompt_tokens, case.workload.output_tokens, strict=True)
    left = dict(enumerate(map(sum, sizes)))
    for decision in expand(trace):
        held = sum(case.limits.blocks_for(tokens) for tokens in stored.values())
        assert decision.observed is not None
        assert decision.observed.free_blocks == case.limits.num_blocks - held >= 0
        assert decision.observed.context_tokens == stored.total()
        for request_id in decision.preempted:
            del stored[request_id]
        stored.update(decision.tokens)
        assert len(stored) <= case.limits.max_num_seqs
        # The last token of an answer is sampled and never stored.
        for request_id in [one for one in stored if stored[one] == left[one] - 1]:
            del stored[request_id]
    assert not stored


@law
def test_iterations_follow_each_other_and_decisions_are_their_starts(
    case: Case, trace: Trace
) -> None:
    start_s, end_s = trace.iterations["start_s"], trace.iterations["end_s"]
    assert (end_s > start_s).all()
    assert (start_s[1:] >= end_s[:-1]).all()
    assert trace.decisions["instant_s"].tolist() == start_s.tolist()
    assert (np.diff(trace.events["instant_s"]) >= 0).all()
    assert (np.diff(trace.requests["arrival_s"]) >= 0).all()


@law
def test_the_replica_never_idles_while_something_waits_or_runs(case: Case, trace: Trace) -> None:
    idle = np.flatnonzero(trace.iterations["start_s"][1:] > trace.iterations["end_s"][:-1]) + 1
    times = request_times(trace)
    for start_s, before_s in zip(
        trace.iterations["start_s"][idle], trace.iterations["end_s"][idle - 1], strict=True
    ):
        inside = (times.arrival_s < start_s) & (times.last_token_s > before_s)
        assert not inside.any()


@law
def test_no_effect_comes_before_its_cause(case: Case, trace: Trace) -> None:
    times = request_times(trace)
    assert (times.scheduled_s >= times.arrival_s).all()
    assert (times.first_token_s > times.scheduled_s).all()
    assert (times.last_token_s >= times.first_token_s).all()
    for request_id in times.request.tolist():
        assert (np.diff(token_times(trace, request_id)) > 0).all()
    clients = case.workload.num_clients
    if clients:
        think_s = np.array(case.workload.arrival_s)
        again_s = times.last_token_s[:-clients] + think_s[clients:]
        assert times.arrival_s[clients:].tolist() == again_s.tolist()


@law
def test_requests_are_waiting_running_or_gone(case: Case, trace: Trace) -> None:
    times = request_times(trace)
    running: set[int] = set()
    for decision in expand(trace):
        arrived = int((times.arrival_s <= decision.instant_s).sum())
        gone = set(times.request[times.last_token_s <= decision.instant_s].tolist())
        assert decision.observed is not None
        assert decision.observed.waiting == arrived - len(gone) - len(running - gone)
        assert running >= set(decision.preempted)
        running = (running - gone - set(decision.preempted)) | set(decision.admitted)
        assert running >= set(decision.tokens)


@law
def test_littles_law_is_an_identity(case: Case, trace: Trace) -> None:
    times = request_times(trace)
    changes = np.concatenate((times.arrival_s, times.last_token_s))
    steps = np.repeat([1, -1], len(times.request))
    order = np.argsort(changes, kind="stable")
    in_system, span_s = np.cumsum(steps[order]), np.diff(changes[order])
    horizon_s = changes.max() - changes.min()
    mean_number = (in_system[:-1] * span_s).sum() / horizon_s
    arrival_rate = len(times.request) / horizon_s
    assert in_system[-1] == 0
    assert mean_number == pytest.approx(arrival_rate * times.e2e_s.mean(), rel=1e-12)


@law
def test_a_pre_empted_request_keeps_its_tokens(case: Case, trace: Trace) -> None:
    tokens = np.zeros(len(case.workload.arrival_s), np.int64)
    np.add.at(tokens, trace.runs["request"], 1 + trace.runs["count"])
    assert tokens.tolist() == case.workload.output_tokens
    lost = Counter(requests_in(trace, State.preempted))
    admitted = Counter(requests_in(trace, State.admitted))
    assert all(admitted[one] == lost[one] + 1 for one in range(len(tokens)))


@EVERY_POLICY
@settings(max_examples=15)
@given(case=cases())
def test_seats_are_given_in_order_of_arrival_until_someone_is_pre_empted(
    name: str, case: Case
) -> None:
    trace = run_case(case, POLICIES[name], one_by_one=True)
    promised = POLICIES[name].first_come_first_served
    if not promised or requests_in(trace, State.preempted):
        return
    assert requests_in(trace, State.admitted) == trace.requests["request"].tolist()
    first_s = [token_times(trace, one)[0] for one in trace.requests["request"].tolist()]
    assert (np.diff(first_s) >= 0).all()
