"""Laws of every run of attention nodes around experts, and of the pace of their iterations."""

from collections import Counter
from collections.abc import Sequence
from copy import deepcopy
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pytest
from bad_policies import BAD, LIMITS, LOAD, Rogue
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_cases import CONTEXT, POLICIES, TABLES, Case, Grid, cases, run_case

from sim.costs.base import IterationCost
from sim.decision_rows import Decision, expand
from sim.expert_rows import NodeBatch
from sim.metrics import request_times, token_times
from sim.models.work import IterationShape
from sim.policies.batching.base import Batching
from sim.policies.micro_batching.none import WholeBatch
from sim.policies.micro_batching.ping_pong import PingPong
from sim.policies.routing.least_loaded import LeastLoaded
from sim.policies.routing.round_robin import RoundRobin
from sim.processes.expert_pipeline import PipelineRules, simulate_expert_pipeline
from sim.processes.pace import AtOnce
from sim.trace import State, Trace
from sim.trace_merge import of_replica
from sim.workload.source import Source

EVERY_POLICY = pytest.mark.parametrize("name", POLICIES)
MICRO_BATCHINGS = [WholeBatch(), PingPong(num_micro_batches=3)]


class Slowest(AtOnce):
    """An iteration takes as long as the cost says of the slowest node's work; notes all batches."""

    def __init__(self, cost: IterationCost) -> None:
        self.cost = cost
        self.seen: list[tuple[float, list[NodeBatch]]] = []

    def all_nodes_s(self, now_s: float, batches: Sequence[NodeBatch]) -> float:
        self.seen.append((now_s, list(batches)))
        works = [
            IterationShape(*map(sum, zip(*batch.shapes(), strict=True)))
            for batch in batches if batch.rows
        ]  # fmt: skip
        return now_s + max(map(self.cost.iteration_s, works))


class Load(NamedTuple):
    """A deployment and what it is asked."""

    case: Case
    num_nodes: int
    rules: PipelineRules

    @property
    def micro_batches(self) -> int:
        return self.rules.micro_batching.count(2)


class Run(NamedTuple):
    """A trace, and the batches of each iteration."""

    trace: Trace
    seen: list[tuple[float, list[NodeBatch]]]


def serve(load: Load) -> Run:
    pace = Slowest(load.case.cost)
    trace = simulate_expert_pipeline(
        Source(load.case.workload, 0, CONTEXT), load.rules, load.case.limits,
        (load.num_nodes, load.micro_batches), pace,
    )  # fmt: skip
    return Run(trace, pace.seen)


@st.composite
def loads(draw: st.DrawFn, batching: Batching, *, closed: bool | None = None) -> Load:
    routing = draw(st.sampled_from([RoundRobin(), LeastLoaded()]))
    rules = PipelineRules(batching, draw(st.sampled_from(MICRO_BATCHINGS)), routing)
    return Load(draw(cases(max_requests=14, closed=closed)), draw(st.integers(1, 3)), rules)


def law(check):
    """Run a check of (load, run) on random loads under every batching policy."""

    @EVERY_POLICY
    @settings(max_examples=12)
    @given(data=st.data())
    def test(name: str, data: st.DataObject) -> None:
        load = data.draw(loads(POLICIES[name]))
        check(load, serve(load))

    return test


def nodes_of(load: Load, run: Run) -> list[list[Decision]]:
    return [expand(of_replica(run.trace, number)) for number in range(load.num_nodes)]


@law
def test_every_request_is_answered_once_with_all_its_tokens(load: Load, run: Run) -> None:
    outputs = load.case.workload.output_tokens
    trace, everyone = run.trace, list(range(len(outputs)))
    ended = trace.events["request"][trace.events["state"] == State.finished]
    for found in (ended, trace.requests["request"], trace.routes["request"],
                  trace.answers["request"]):  # fmt: skip
        assert sorted(found.tolist()) == everyone
    assert [len(token_times(trace, one)) for one in everyone] == outputs
    assert run.trace.decisions["sampled_tokens"].sum() == sum(outputs)


@law
def test_nodes_begin_iterations_together_and_one_after_another(load: Load, run: Run) -> None:
    iterations = run.trace.iterations
    spans = sorted(zip(iterations["start_s"].tolist(), iterations["end_s"].tolist(), strict=True))
    together = sorted(set(spans))
    assert all(end_s > start_s for start_s, end_s in together)
    assert all(a[1] <= b[0] for a, b in pairwise(together))
    assert [start_s for start_s, _ in together] == [now_s for now_s, _ in run.seen]
    # A node takes part where it has rows, and only there.
    working = [sum(bool(batch.rows) for batch in batches) for _, batches in run.seen]
    assert [Counter(spans)[one] for one in together] == working
    assert min(working) >= 1


@law
def test_the_pace_is_asked_about_the_work_that_the_decisions_say(load: Load, run: Run) -> None:
    decided = [iter(rows) for rows in nodes_of(load, run)]
    columns = [of_replica(run.trace, number).decisions for number in range(load.num_nodes)]
    shapes = [
        iter(list(zip(*(table[name].tolist() for name in IterationShape._fields), strict=True)))
        for table in columns
    ]
    for now_s, batches in run.seen:
        assert len(batches) == load.num_nodes
        for number, batch in enumerate(batches):
            places = [place for part in batch.parts for place in part]
            assert sorted(places) == list(range(len(batch.rows)))
            assert len(batch.parts) == load.micro_batches
            if not batch.rows:
                continue
            decision = next(decided[number])
            assert decision.instant_s == now_s
            assert {row.request_id: row.tokens for row in batch.rows} == dict(decision.tokens)
            whole = [sum(column) for column in zip(*batch.shapes(), strict=True)]
            assert tuple(whole) == next(shapes[number])
    assert not any(list(rest) for rest in (*decided, *shapes))


@law
def test_no_node_overbooks_blocks_or_seats_and_contexts_grow_by_what_is_computed(
    load: Load, run: Run
) -> None:
    limits, workload = load.case.limits, load.case.workload
    sizes = list(map(sum, zip(workload.prompt_tokens, workload.output_tokens, strict=True)))
    batches = [[batch for _, all_of in run.seen if (batch := all_of[number]).rows]
               for number in range(load.num_nodes)]  # fmt: skip
    for decisions, mine in zip(nodes_of(load, run), batches, strict=True):
        stored: Counter[int] = Counter()
        for decision, batch in zip(decisions, mine, strict=True):
            held = sum(map(limits.blocks_for, stored.values()))
            assert decision.observed is not None
            assert decision.observed.free_blocks == limits.num_blocks - held >= 0
            for request_id in decision.preempted:
                del stored[request_id]
            stored.update(decision.tokens)
            assert len(stored) <= limits.max_num_seqs
            assert sum(map(limits.blocks_for, stored.values())) <= limits.num_blocks
            for row in batch.rows:
                assert row.context_tokens == stored[row.request_id] >= row.tokens
                assert row.start == stored[row.request_id] - row.tokens
            for request_id in [one for one in stored if stored[one] == sizes[one] - 1]:
                del stored[request_id]
        assert not stored


@law
def test_nothing_idles_while_something_waits_or_runs(load: Load, run: Run) -> None:
    del load
    times = request_times(run.trace)
    ends = np.array([-np.inf, *sorted(set(run.trace.iterations["end_s"].tolist()))])
    starts = np.array([*sorted(set(run.trace.iterations["start_s"].tolist())), np.inf])
    for before_s, start_s in zip(ends, starts, strict=True):
        if start_s > before_s:
            inside = (times.arrival_s < start_s) & (times.last_token_s > before_s)
            assert not inside.any()


@law
def test_no_effect_comes_before_its_cause(load: Load, run: Run) -> None:
    times, trace = request_times(run.trace), run.trace
    assert (times.scheduled_s >= times.arrival_s).all()
    assert (times.first_token_s > times.scheduled_s).all()
    assert (times.last_token_s >= times.first_token_s).all()
    arrival_s = dict(zip(times.request.tolist(), times.arrival_s.tolist(), strict=True))
    routed = zip(trace.routes["request"].tolist(), trace.routes["instant_s"].tolist(), strict=True)
    assert all(instant_s >= arrival_s[request_id] for request_id, instant_s in routed)
    clients = load.case.workload.num_clients
    if clients:
        ended_s = dict(zip(times.request.tolist(), times.last_token_s.tolist(), strict=True))
        for request_id, think_s in enumerate(load.case.workload.arrival_s[clients:], clients):
            assert arrival_s[request_id] == ended_s[request_id - clients] + think_s


@law
def test_littles_law_is_an_identity(load: Load, run: Run) -> None:
    del load
    times = request_times(run.trace)
    changes = np.concatenate((times.arrival_s, times.last_token_s))
    steps = np.repeat([1, -1], len(times.request))
    order = np.argsort(changes, kind="stable")
    in_system, span_s = np.cumsum(steps[order]), np.diff(changes[order])
    horizon_s = changes.max() - changes.min()
    mean_number = (in_system[:-1] * span_s).sum() / horizon_s
    assert in_system[-1] == 0
    rate = len(times.request) / horizon_s
    assert mean_number == pytest.approx(rate * times.e2e_s.mean(), rel=1e-12)


@law
def test_the_same_load_gives_the_same_trace(load: Load, run: Run) -> None:
    assert_same(run.trace, serve(load).trace, TABLES)


@EVERY_POLICY
@settings(max_examples=15)
@given(data=st.data())
def test_later_arrivals_change_no_decision_before_them(name: str, data: st.DataObject) -> None:
    load = data.draw(loads(POLICIES[name], closed=False))
    workload = deepcopy(load.case.workload)
    keep = data.draw(st.integers(0, len(workload.arrival_s) - 1))
    visible_s = workload.arrival_s[keep]
    for row in range(keep, len(workload.arrival_s)):
        workload.arrival_s[row] += data.draw(st.sampled_from([0.0, 0.5, 10.0]))
        workload.prompt_tokens[row] = data.draw(st.integers(1, workload.prompt_tokens[row]))
    workload.arrival_s.sort()
    other = load._replace(case=load.case._replace(workload=workload))
    first, second = (nodes_of(one, serve(one)) for one in (load, other))
    for mine, theirs in zip(first, second, strict=True):
        early = [[row for row in rows if row.instant_s < visible_s] for rows in (mine, theirs)]
        assert early[0] == early[1]


def assert_same(one: Trace, other: Trace, tables: Sequence[str]) -> None:
    for table in tables:
        columns, others = getattr(one, table), getattr(other, table)
        for name, column in columns.items():
            np.testing.assert_array_equal(column, others[name], f"{table}.{name}", strict=True)
    for name, ragged in one.decision_lists.items():
        np.testing.assert_array_equal(ragged.offsets, other.decision_lists[name].offsets, name)
        np.testing.assert_array_equal(ragged.values, other.decision_lists[name].values, name)


@EVERY_POLICY
@settings(max_examples=20)
@given(case=cases())
def test_one_node_and_one_micro_batch_are_a_replica_bit_for_bit(name: str, case: Case) -> None:
    rules = PipelineRules(POLICIES[name], WholeBatch(), RoundRobin())
    ours = serve(Load(case, 1, rules)).trace
    alone = run_case(case, POLICIES[name], one_by_one=True)
    # A replica by itself has no router.
    assert_same(ours, alone, [one for one in TABLES if one not in ("routes", "answers")])


@pytest.mark.parametrize("what", BAD)
def test_a_policy_that_breaks_the_rules_is_refused_as_on_a_replica(what: str) -> None:
    answer, complaint = BAD[what]
    rules = PipelineRules(Rogue(batch=answer), PingPong(num_micro_batches=2), RoundRobin())
    with pytest.raises(ValueError, match="Rogue") as error:
        serve(Load(Case(LOAD, LIMITS, Grid(0.5)), 1, rules))
    assert complaint in str(error.value)
    assert "mend the policy" in str(error.value)


def test_ties_at_a_boundary_are_seen_by_the_decision_there() -> None:
    """Iterations of 1 s; requests come at 0, 1 and 1: the second decision sees both."""
    workload: Any = deepcopy(LOAD)
    workload.arrival_s, workload.prompt_tokens = [0.0, 1.0, 1.0], [1, 1, 1]
    workload.output_tokens = [2, 1, 1]

    class Second(Slowest):
        def all_nodes_s(self, now_s: float, batches: Sequence[NodeBatch]) -> float:
            super().all_nodes_s(now_s, batches)
            return now_s + 1.0

    pace = Second(Grid(1.0))
    rules = PipelineRules(POLICIES["continuous"], WholeBatch(), RoundRobin())
    trace = simulate_expert_pipeline(Source(workload, 0, CONTEXT), rules, LIMITS, (2, 1), pace)
    log = [(now_s, [[row.request_id for row in batch.rows] for batch in batches])
           for now_s, batches in pace.seen]  # fmt: skip
    # Node 0 has requests 0 and 2: with whole prompts, 2 is prefilled before 0 goes on.
    assert log[:2] == [(0.0, [[0], []]), (1.0, [[2], [1]])]
    assert trace.routes["instant_s"].tolist() == [0.0, 1.0, 1.0]
