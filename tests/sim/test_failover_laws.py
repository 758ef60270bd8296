"""Replicas that die and come back: nothing is lost, nothing is answered twice."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_cases import CONTEXT, POLICIES, Case, Grid, assert_equal_traces, cases, recorded

from sim import metrics
from sim.decision_rows import canonical, expand
from sim.engine import ReplicaLimits
from sim.faults import Outage
from sim.plot_data import counts
from sim.policies.batching.base import Batching
from sim.policies.registry import policies
from sim.policies.routing.base import RouterView, Routing
from sim.processes.failover import FailoverLog, Failures, simulate_failures
from sim.processes.pace import Costed, Replayed
from sim.processes.router import Engines, RouterLog, simulate_replicas
from sim.requests import RequestView
from sim.state.router_state import RouterState
from sim.trace import State, Trace
from sim.trace_merge import of_replica
from sim.workload.source import Source

RULES: dict[str, Any] = {name: rule() for name, rule in policies("routing").items()}
EVERY_RULE = pytest.mark.parametrize("name", RULES)
BATCHING = POLICIES["chunked_prefill-{'chunk_tokens': 7}"]


class Plan(NamedTuple):
    """Replicas, and what becomes of them."""

    case: Case
    num_replicas: int
    failures: Failures


@st.composite
def plans(draw: st.DrawFn, *, closed: bool | None = None) -> Plan:
    """Deaths at random, on boundaries and arrivals often; one replica at least comes back."""
    case = draw(cases(closed=closed, prefixes=None))
    step_s = case.cost.step_s if isinstance(case.cost, Grid) else 0.05
    count = draw(st.integers(1, 3))
    found: list[Outage] = []
    for replica in range(count):
        at = 0
        for _ in range(draw(st.integers(0, 3))):
            at += draw(st.integers(1, 12))
            until = at + draw(st.integers(1, 12))
            found.append(Outage(replica, step_s * at, step_s * until))
            at = until
        if replica and draw(st.booleans()):
            found.append(Outage(replica, step_s * (at + draw(st.integers(1, 9))), float("inf")))
    found.sort(key=lambda one: (one.at_s, one.replica))
    detection_s = step_s * draw(st.sampled_from([0.25, 1.0, 3.0, 20.0]))
    return Plan(case, count, Failures.detected(found, detection_s))


def _in_order(table: Mapping[str, Any]) -> Mapping[str, Any]:
    """By time; replicas that finish something at one instant do so in no particular order."""
    if "instant_s" not in table:
        return table
    order = np.lexsort((table["request"], table["instant_s"]))
    return {name: column[order] for name, column in table.items()}


def run(
    plan: Plan, routing: Routing, batching: Batching = BATCHING, *,
    one_by_one: bool = False, schedules_ahead: bool = False,
) -> Trace:  # fmt: skip
    pace = Costed(plan.case.cost)
    return simulate_failures(
        Source(plan.case.workload, 0, CONTEXT), routing, batching, plan.case.limits,
        lambda number, life: pace, plan.failures, num_replicas=plan.num_replicas,
        one_by_one=one_by_one, schedules_ahead=schedules_ahead,
    )  # fmt: skip


def assert_answered_once(trace: Trace, case: Case) -> None:
    """Every request has exactly its tokens, each later than the one before."""
    everyone = list(range(len(case.workload.arrival_s)))
    assert sorted(trace.requests["request"].tolist()) == everyone
    assert sorted(trace.answers["request"].tolist()) == everyone
    done = trace.events["request"][trace.events["state"] == State.finished]
    assert sorted(done.tolist()) == everyone
    times = metrics.request_times(trace)
    for at in everyone:
        instants_s = metrics.token_times(trace, at)
        assert len(instants_s) == case.workload.output_tokens[at]
        assert (np.diff(instants_s) > 0).all()
        assert instants_s[0] == times.first_token_s[at]
        assert instants_s[-1] == times.last_token_s[at]


@pytest.mark.parametrize("ahead", [False, True])
@EVERY_RULE
@settings(max_examples=60)
@given(plan=plans())
def test_every_request_is_answered_once_with_exactly_its_tokens(
    name: str, ahead: bool, plan: Plan
) -> None:
    assert_answered_once(run(plan, RULES[name], schedules_ahead=ahead), plan.case)


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=40)
@given(plan=plans(closed=False))
def test_macro_steps_equal_single_steps_whoever_dies(policy: str, plan: Plan) -> None:
    fast, slow = (
        run(plan, RULES["least_loaded"], POLICIES[policy], one_by_one=single)
        for single in (False, True)
    )
    for table in ("routes", "answers", "requests", "events", "iterations"):
        ours, theirs = (_in_order(getattr(trace, table)) for trace in (fast, slow))
        for column in ours:
            np.testing.assert_array_equal(ours[column], theirs[column], f"{table}.{column}")
    for at in range(plan.num_replicas):
        one, other = (canonical(of_replica(trace, at)) for trace in (fast, slow))
        assert expand(one) == expand(other)


@EVERY_RULE
@settings(max_examples=40)
@given(plan=plans())
def test_a_dead_replica_runs_no_iteration(name: str, plan: Plan) -> None:
    trace = run(plan, RULES[name])
    rows = trace.iterations
    for one in plan.failures.outages:
        mine = rows["replica"] == one.replica
        inside = (rows["end_s"] >= one.at_s) & (rows["start_s"] < one.until_s)
        assert not (mine & inside).any()


@EVERY_RULE
@settings(max_examples=20)
@given(case=cases(prefixes=None), count=st.integers(1, 3))
def test_without_a_death_nothing_changes(name: str, case: Case, count: int) -> None:
    paces = [Costed(case.cost)] * count
    engines = Engines(batching=BATCHING, limits=case.limits, paces=paces)
    plain = simulate_replicas(Source(case.workload, 0, CONTEXT), RULES[name], engines)
    assert_equal_traces(plain, run(Plan(case, count, Failures([], [])), RULES[name]))


def test_the_random_deaths_do_hit_answers_in_the_middle() -> None:
    seen = {"lost": 0, "in mid-answer": 0, "sent again": 0, "on a boundary": 0}

    @settings(max_examples=60)
    @given(plan=plans())
    def count(plan: Plan) -> None:
        trace = run(plan, RULES["round_robin"])
        seen["lost"] += int((trace.events["state"] == State.lost).sum())
        seen["in mid-answer"] += int((trace.routes["generated_tokens"] > 0).sum())
        seen["sent again"] += len(trace.routes["request"]) - len(trace.requests["request"])
        ends = set(trace.iterations["end_s"].tolist())
        seen["on a boundary"] += len(ends.intersection(one.at_s for one in plan.failures.outages))

    count()
    # Boundaries of other replicas; an iteration that would end with its own replica is lost.
    assert min(seen.values()) >= 5, seen


@EVERY_RULE
@settings(max_examples=30)
@given(plan=plans())
def test_metrics_order_what_a_request_did_on_several_replicas_by_time(
    name: str, plan: Plan
) -> None:
    trace = run(plan, RULES[name])
    times = metrics.request_times(trace)
    tokens = [metrics.token_times(trace, one) for one in times.request.tolist()]
    gaps = np.concatenate([np.diff(one) for one in tokens])
    found = metrics.inter_token_gaps(trace)
    assert found.weight.sum() == len(gaps)
    if len(gaps):
        assert found.mean() == pytest.approx(gaps.mean(), rel=1e-9)
        assert found.percentile(90) == pytest.approx(np.percentile(gaps, 90), rel=1e-9)
    parts = metrics.ttft_parts(trace, times)
    assert sum(parts) == pytest.approx(times.ttft_s, rel=1e-9, abs=1e-9)
    seen = metrics.rerouted(trace)
    assert seen["num_rerouted"] == (trace.events["state"] == State.lost).sum()


@EVERY_RULE
@settings(max_examples=30)
@given(plan=plans())
def test_curves_of_running_and_waiting_come_back_to_nobody(name: str, plan: Plan) -> None:
    curves = counts(run(plan, RULES[name]))
    for steps in (curves.running, curves.waiting):
        assert steps.value.min() >= 0
        assert steps.value[-1] == 0


@EVERY_RULE
@settings(max_examples=30)
@given(plan=plans(closed=False))
def test_replay_of_deaths_gives_a_run_its_own_decisions(name: str, plan: Plan) -> None:
    trace = run(plan, RULES[name], one_by_one=True)
    routes = {column: values.tolist() for column, values in trace.routes.items()}
    answer_s = trace.answers["instant_s"]
    known = [int((answer_s < at).sum()) for at in plan.failures.noticed_s]
    log = FailoverLog(
        RouterLog.of(trace), routes["request"], _in_order_of_notice(plan.failures, known),
    )  # fmt: skip

    def pace(number: int, life: int) -> Replayed:
        """The instants of one life, which are those between two deaths."""
        mine = [one for one in plan.failures.outages if one.replica == number]
        began_s = mine[life - 1].until_s if life else 0.0
        died_s = mine[life].at_s if life < len(mine) else np.inf
        rows = trace.iterations
        part = (rows["replica"] == number) & (rows["start_s"] >= began_s)
        part &= rows["start_s"] < died_s
        instants_s, ends_s = rows["start_s"][part].tolist(), rows["end_s"][part].tolist()
        return Replayed(instants_s, ends_s, beyond_s=died_s + 1.0 if died_s < np.inf else 0.0)

    again = simulate_failures(
        Source(plan.case.workload, 0, CONTEXT), RULES[name], BATCHING, plan.case.limits, pace,
        plan.failures, num_replicas=plan.num_replicas, one_by_one=True, log=log,
    )  # fmt: skip
    for column in ("request", "replica", "outstanding_requests", "outstanding_tokens",
                   "generated_tokens"):  # fmt: skip
        assert again.routes[column].tolist() == routes[column]
    for at in range(plan.num_replicas):
        assert expand(of_replica(again, at)) == expand(of_replica(trace, at))


def _in_order_of_notice(failures: Failures, known: list[int]) -> list[int]:
    order = sorted(range(len(known)), key=lambda at: failures.noticed_s[at])
    return [known[at] for at in order]


CONTINUOUS = POLICIES["continuous"]


def planned(rows: list[tuple[float, int, int]], *found: Outage, count: int = 1) -> Plan:
    case = Case(recorded(rows), ReplicaLimits(4, 64, 16, 99), Grid(0.5))
    return Plan(case, count, Failures.detected(found, 1.0))


def test_a_death_at_exactly_a_boundary_takes_the_iteration_and_one_a_moment_later_does_not() -> (
    None
):
    rows = [(0.0, 1, 6)]
    for at_s, kept in ((1.5, 2), (1.5 + 1e-9, 3)):
        trace = run(planned(rows, Outage(0, at_s, 5.0)), RULES["round_robin"], CONTINUOUS)
        assert trace.routes["generated_tokens"].tolist() == [0, kept]
        before = trace.iterations["end_s"][trace.iterations["end_s"] < 5.0]
        assert before.tolist() == [0.5 * at for at in range(1, kept + 1)]
        # Back at 5 s: a prefill of the prompt and the answer so far, then the rest of the answer.
        assert len(metrics.token_times(trace, 0)) == 6
        assert trace.iterations["end_s"][-1] == 5.0 + 0.5 * (6 - kept)


def test_who_arrives_with_a_death_or_before_it_is_known_is_lost_with_it_and_sent_again() -> None:
    rows = [(1.0, 1, 2), (1.5, 1, 2), (2.0, 1, 2), (2.5, 1, 2)]
    plan = planned(rows, Outage(0, 1.0, 9.0), count=2)
    trace = run(plan, RULES["round_robin"], CONTINUOUS)
    columns = [trace.routes[name].tolist() for name in ("request", "instant_s", "replica")]
    rows_of = list(zip(*columns, strict=True))
    # Dead at 1 s, known at 2 s, before who arrives then.
    assert rows_of == [(0, 1.0, 0), (1, 1.5, 1), (0, 2.0, 1), (2, 2.0, 1), (3, 2.5, 1)]
    lost = trace.events["state"] == State.lost
    assert trace.events["request"][lost].tolist() == [0]
    assert trace.events["instant_s"][lost].tolist() == [1.0]


def test_requests_wait_at_the_router_in_order_while_nobody_lives() -> None:
    rows = [(0.0, 1, 9), (2.0, 1, 1), (3.0, 1, 1)]
    trace = run(planned(rows, Outage(0, 1.0, 6.0)), RULES["least_loaded"], CONTINUOUS)
    assert trace.routes["request"].tolist() == [0, 0, 1, 2]
    assert trace.routes["instant_s"].tolist() == [0.0, 6.0, 6.0, 6.0]


def test_prefix_aware_routing_forgets_what_a_dead_replica_had_cached() -> None:
    routing = RULES["prefix_aware"]
    memory, state = routing.init(), RouterState(2, 10_000)
    ask = RequestView(0, 0.0, 1024, 9, prefix_hashes=(1, 2))
    assert routing.choose(memory, ask, state) == 0
    state.outstanding_requests[0] = 5
    assert routing.choose(memory, ask, state) == 0, "the prefix is there"
    state.lost(0)
    state.back(0)
    state.outstanding_requests[0] = 5
    assert routing.choose(memory, ask, state) == 1, "it was"


@EVERY_RULE
def test_rules_choose_among_the_living(name: str) -> None:
    state, routing = RouterState(3, 10_000), RULES[name]
    memory = routing.init()
    state.lost(0)
    chosen = {routing.choose(memory, RequestView(at, 0.0, 512, 9), state) for at in range(6)}
    assert chosen <= {1, 2}


@dataclass(kw_only=True)
class Stubborn(Routing):
    """Sends everything to replica 0."""

    def choose(self, memory: Any, request: RequestView, view: RouterView) -> int:
        del memory, request, view
        return 0


def test_a_dead_choice_is_refused() -> None:
    plan = planned([(0.0, 1, 9), (4.0, 1, 1)], Outage(0, 1.0, 9.0), count=2)
    with pytest.raises(
        ValueError, match=r"Stubborn at 2.0 s: request 0: replica=0 .* is dead;.*1\]"
    ):
        run(plan, Stubborn(), CONTINUOUS)
