"""Routing: what every rule keeps to, what each one does, and several replicas in one trace."""

from collections import Counter
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_cases import CONTEXT, POLICIES, Case, Grid, assert_equal_traces, cases, recorded

from sim import metrics
from sim.decision_rows import canonical, expand
from sim.engine import ReplicaLimits
from sim.plot_data import counts
from sim.policies.registry import policies
from sim.policies.routing.base import RouterView, Routing
from sim.policies.routing.least_loaded import LeastLoaded, Load
from sim.policies.routing.prefix_aware import PrefixAware
from sim.policies.routing.round_robin import RoundRobin
from sim.processes.alone import simulate
from sim.processes.pace import Costed, Replayed
from sim.processes.router import Engines, RouterLog, simulate_replicas
from sim.requests import RequestView
from sim.state.router_state import RouterState
from sim.trace import State, Trace
from sim.trace_merge import num_replicas, of_replica
from sim.workload.recorded import Recorded
from sim.workload.source import Source

OTHER_SETTINGS = {
    "least_loaded": [{"by": Load.tokens}],
    "prefix_aware": [{"match_share": 0.0, "imbalance_requests": 1, "imbalance_ratio": 1.0}],
}
RULES: dict[str, Routing] = {}
for rule_name, rule in policies("routing").items():
    RULES[rule_name] = rule()
    for fields in OTHER_SETTINGS.get(rule_name, []):
        RULES[f"{rule_name}-{fields}"] = rule(**fields)
EVERY_RULE = pytest.mark.parametrize("name", RULES)
BATCHING = POLICIES["chunked_prefill-{'chunk_tokens': 7}"]


def run(case: Case, routing: Routing, count: int, *, one_by_one: bool = False) -> Trace:
    source = Source(case.workload, 0, CONTEXT)
    return simulate_replicas(
        source, routing,
        Engines(
            batching=BATCHING, limits=case.limits, paces=[Costed(case.cost)] * count,
            one_by_one=one_by_one,
        ),
    )  # fmt: skip


def look(view: RouterView) -> tuple[Any, ...]:
    loads = (tuple(view.outstanding_requests), tuple(view.outstanding_tokens))
    return (view.num_replicas, view.pool_tokens, *loads)


@dataclass(kw_only=True)
class Watched(Routing):
    """Asks a rule twice and fails when anything but its memory differs."""

    inner: Routing
    seen: list[tuple[Any, ...]] = field(default_factory=list)

    def init(self) -> Any:
        return self.inner.init()

    def choose(self, memory: Any, request: RequestView, view: RouterView) -> int:
        before, settings_before = look(view), deepcopy(self.inner)
        first = self.inner.choose(deepcopy(memory), request, view)
        answer = self.inner.choose(memory, request, view)
        assert answer == first, "the same view and memory gave another replica"
        assert look(view) == before, "the view was changed"
        assert self.inner == settings_before, "hyper-parameters were changed"
        self.seen.append((request, *before))
        return answer


@EVERY_RULE
@settings(max_examples=25)
@given(case=cases(prefixes=None), count=st.integers(1, 4))
def test_rules_are_deterministic_and_change_nothing_they_see(
    name: str, case: Case, count: int
) -> None:
    workload = deepcopy(case.workload)
    watched = Watched(inner=RULES[name])
    trace = run(case, watched, count)
    assert_equal_traces(trace, run(case, RULES[name], count))
    assert case.workload == workload
    # What the router counts is what was sent and has not come back.
    times = metrics.request_times(trace)
    last_s = dict(zip(times.request.tolist(), times.last_token_s.tolist(), strict=True))
    for at, (request, _, _, requests, tokens) in enumerate(watched.seen):
        now = trace.routes["instant_s"][at]
        sent = trace.routes["request"][:at].tolist()
        known = trace.answers["request"][: trace.routes["answers"][at]].tolist()
        out = [one for one in sent if one not in known]
        assert all(last_s[one] <= now for one in known)
        assert all(last_s[one] >= now for one in out)
        assert sum(requests) == len(out)
        assert sum(tokens) == sum(case.workload.prompt_tokens[one] for one in out)
        assert request.arrival_s == now


@EVERY_RULE
@settings(max_examples=20)
@given(case=cases(closed=False, prefixes=None), chance=st.randoms(use_true_random=False))
def test_neither_hidden_lengths_nor_later_arrivals_change_a_choice(
    name: str, case: Case, chance: Any
) -> None:
    first = run(case, RULES[name], 3)
    keep = chance.randint(0, len(case.workload.arrival_s) - 1)
    workload = deepcopy(case.workload)
    for row in range(len(workload.arrival_s)):
        if row >= keep:
            workload.prompt_tokens[row] = chance.randint(1, workload.prompt_tokens[row])
        elif chance.random() < 0.5:
            workload.output_tokens[row] = chance.randint(1, workload.output_tokens[row])
    second = run(case._replace(workload=workload), RULES[name], 3)
    changed = [
        row for row in range(keep)
        if workload.output_tokens[row] != case.workload.output_tokens[row]
    ]  # fmt: skip
    times = metrics.request_times(second)
    until_s = min([times.last_token_s[row] for row in changed], default=np.inf)
    same = first.routes["instant_s"][:keep] < until_s
    chosen = [trace.routes["replica"][:keep][same].tolist() for trace in (first, second)]
    assert chosen[0] == chosen[1]


@EVERY_RULE
@settings(max_examples=20)
@given(case=cases(prefixes=None), count=st.integers(1, 4))
def test_macro_steps_behind_a_router_equal_single_steps(name: str, case: Case, count: int) -> None:
    fast, slow = (run(case, RULES[name], count, one_by_one=single) for single in (False, True))
    for table in ("routes", "answers", "requests", "events", "runs", "iterations"):
        ours, theirs = getattr(fast, table), getattr(slow, table)
        for column in ours:
            np.testing.assert_array_equal(ours[column], theirs[column], f"{table}.{column}")
    for at in range(count):
        one, other = (canonical(of_replica(trace, at)) for trace in (fast, slow))
        assert expand(one) == expand(other)


@EVERY_RULE
@settings(max_examples=15)
@given(case=cases(prefixes=None))
def test_one_replica_behind_a_router_is_a_replica(name: str, case: Case) -> None:
    routed = run(case, RULES[name], 1)
    alone = simulate(Source(case.workload, 0, CONTEXT), BATCHING, case.limits, Costed(case.cost))
    for table in ("requests", "events", "runs", "iterations", "decisions"):
        ours, theirs = getattr(routed, table), getattr(alone, table)
        order = np.lexsort((ours["request"],)) if table in ("requests", "events") else None
        again = np.lexsort((theirs["request"],)) if table in ("requests", "events") else None
        for column in ours:
            one = ours[column] if order is None else ours[column][order]
            other = theirs[column] if again is None else theirs[column][again]
            np.testing.assert_array_equal(one, other, f"{table}.{column}")


@EVERY_RULE
@settings(max_examples=20)
@given(case=cases(prefixes=None), count=st.integers(2, 4))
def test_every_request_is_sent_once_and_answered_once_where_it_was_sent(
    name: str, case: Case, count: int
) -> None:
    trace = run(case, RULES[name], count)
    everyone = list(range(len(case.workload.arrival_s)))
    assert sorted(trace.routes["request"].tolist()) == everyone
    assert sorted(trace.answers["request"].tolist()) == everyone
    assert sorted(trace.requests["request"].tolist()) == everyone
    sent = dict(zip(trace.routes["request"].tolist(), trace.routes["replica"].tolist(),
                    strict=True))  # fmt: skip
    for request, replica in zip(trace.events["request"].tolist(),
                                trace.events["replica"].tolist(), strict=True):  # fmt: skip
        assert replica == sent[request]
    done = trace.events["request"][trace.events["state"] == State.finished]
    assert sorted(done.tolist()) == everyone


@EVERY_RULE
@settings(max_examples=20)
@given(case=cases(prefixes=None), count=st.integers(2, 4))
def test_metrics_of_a_deployment_are_those_of_its_replicas(
    name: str, case: Case, count: int
) -> None:
    trace = run(case, RULES[name], count)
    times = metrics.request_times(trace)
    parts = [of_replica(trace, at) for at in range(count)]
    assert sum(part.num_iterations for part in parts) == trace.num_iterations
    assert sum(part.num_decisions for part in parts) == trace.num_decisions
    for part in parts:
        mine = metrics.request_times(part)
        rows = np.isin(times.request, mine.request)
        for whole, single in zip(times, mine, strict=True):
            np.testing.assert_array_equal(whole[rows], single)
        for request in mine.request.tolist():
            np.testing.assert_array_equal(
                metrics.token_times(trace, request), metrics.token_times(part, request)
            )
        split = metrics.ttft_parts(part, mine)
        for whole, single in zip(metrics.ttft_parts(trace, times), split, strict=True):
            np.testing.assert_allclose(whole[rows], single, rtol=1e-12, atol=1e-12)
    tokens = [metrics.token_times(trace, one) for one in times.request.tolist()]
    gaps = np.concatenate([np.diff(one) for one in tokens])
    found = metrics.inter_token_gaps(trace)
    assert found.weight.sum() == len(gaps)
    if len(gaps):
        assert found.percentile(90) == pytest.approx(np.percentile(gaps, 90), rel=1e-9)
        assert found.mean() == pytest.approx(gaps.mean(), rel=1e-9)


@EVERY_RULE
@settings(max_examples=15)
@given(case=cases(closed=False, prefixes=None), count=st.integers(1, 3))
def test_replay_of_a_deployment_gives_its_own_decisions(name: str, case: Case, count: int) -> None:
    trace = run(case, RULES[name], count, one_by_one=True)
    routes = {column: values.tolist() for column, values in trace.routes.items()}
    engines = Engines(
        batching=BATCHING, limits=case.limits, one_by_one=True,
        paces=[Replayed.of(of_replica(trace, at)) for at in range(count)],
    )  # fmt: skip
    source = Source(case.workload, 0, CONTEXT)
    again = simulate_replicas(source, RULES[name], engines, RouterLog.of(trace))
    for column in ("request", "replica", "outstanding_requests", "outstanding_tokens"):
        assert again.routes[column].tolist() == routes[column]
    for at in range(num_replicas(trace)):
        assert expand(of_replica(again, at)) == expand(of_replica(trace, at))


def view(requests: list[int], tokens: list[int] | None = None, pool: int = 10_000) -> RouterState:
    """A router that has so many requests and prompt tokens outstanding."""
    state = RouterState(len(requests), pool)
    state.outstanding_requests = requests
    state.outstanding_tokens = tokens or [10 * one for one in requests]
    return state


def ask(request_id: int, *hashes: int, tokens: int | None = None) -> RequestView:
    length = tokens or max(len(hashes), 1) * 512
    return RequestView(request_id, 0.0, length, 9, prefix_hashes=hashes)


def test_round_robin_takes_turns() -> None:
    routing = RoundRobin()
    memory = routing.init()
    chosen = [routing.choose(memory, ask(at), view([9, 0, 0])) for at in range(7)]
    assert chosen == [0, 1, 2, 0, 1, 2, 0]


def test_least_loaded_counts_requests_or_prompt_tokens_and_the_first_of_equals_is_taken() -> None:
    state = view([3, 1, 1], [30, 900, 800])
    assert LeastLoaded().choose(None, ask(0), state) == 1
    assert LeastLoaded(by=Load.tokens).choose(None, ask(0), state) == 0


def test_prefix_aware_follows_the_longest_prefix_and_else_the_load() -> None:
    routing = PrefixAware()
    memory = routing.init()
    assert routing.choose(memory, ask(0, 1, 2, 3), view([0, 0])) == 0
    assert routing.choose(memory, ask(1, 1, 2, 4), view([1, 0])) == 0
    assert routing.choose(memory, ask(2, 7, 8), view([2, 0])) == 1
    assert routing.choose(memory, ask(3, 7, 8, 9), view([2, 5])) == 1
    # One hash of four is less than the share of 0.3 that must be known.
    assert routing.choose(memory, ask(4, 7, 5, 5, 6), view([2, 6])) == 0
    assert routing.choose(memory, ask(5), view([4, 3])) == 1


def test_prefix_aware_gives_way_to_balance() -> None:
    routing = PrefixAware(imbalance_requests=10, imbalance_ratio=1.5)
    memory = routing.init()
    assert routing.choose(memory, ask(0, 1, 2), view([0, 0])) == 0
    assert routing.choose(memory, ask(1, 1, 2), view([30, 20])) == 0  # 10 more and 1.5 times
    assert routing.choose(memory, ask(2, 1, 2), view([31, 20])) == 1
    assert routing.choose(memory, ask(3, 4, 5), view([0, 9])) == 0
    assert routing.choose(memory, ask(4, 4, 5), view([100, 80])) == 0  # only 1.25 times


def test_prefix_aware_forgets_what_no_longer_fits_a_pool() -> None:
    routing = PrefixAware()
    memory = routing.init()
    state = view([0, 1], pool=3 * 512)
    assert routing.choose(memory, ask(0, 1, 2), state) == 0
    assert routing.choose(memory, ask(1, 5, 6), state) == 0
    # Of 1, 2, 5, 6 the end of the older prompt had to go.
    assert [list(seen) for seen in memory.replicas] == [[1, 6, 5], []]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"match_share": 1.5}, r"match_share=1.5 must be in \[0, 1\]"),
        ({"imbalance_requests": -1}, "imbalance_requests=-1 must not be"),
        ({"imbalance_ratio": 0.5}, "imbalance_ratio=0.5 must be at least 1"),
        ({"pool_share": 0.0}, "pool_share=0.0 must be above 0"),
    ],
)
def test_settings_out_of_range_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrefixAware(**changed)


@dataclass(kw_only=True)
class Elsewhere(Routing):
    """Sends everything to a replica that is not there."""

    replica: int

    def choose(self, memory: Any, request: RequestView, view: RouterView) -> int:
        del memory, request, view
        return self.replica


@pytest.mark.parametrize("replica", [-1, 2])
def test_a_replica_that_is_not_there_is_refused_by_name(replica: int) -> None:
    case = Case(recorded([(0.5, 4, 2)]), ReplicaLimits(4, 64, 16, 99), Grid(0.5))
    with pytest.raises(ValueError, match=rf"Elsewhere at 0.5 s: .*={replica} .*0 to 1; mend"):
        run(case, Elsewhere(replica=replica), 2)


def turns() -> Recorded:
    """Six conversations of eight turns each, every prompt the one before and a block more."""
    arrivals, prompts, hashes = [], [], []
    for turn in range(8):
        for who in range(6):
            arrivals.append(100.0 * turn + who)
            prompts.append(8 * (turn + 1) + 1)
            hashes.append([100 * (who + 1) + at for at in range(turn + 1)])
    return Recorded(
        arrival_s=arrivals, prompt_tokens=prompts, output_tokens=[2] * len(prompts),
        prefix_hashes=hashes, hash_block_tokens=8,
    )  # fmt: skip


def test_prefix_aware_routing_raises_the_hit_rate_where_turns_would_be_scattered() -> None:
    case = Case(turns(), ReplicaLimits(4, 64, 4, 400, True), Grid(0.5))
    aware, scattered = (
        metrics.reused_share(run(case, routing, 4)) for routing in (PrefixAware(), RoundRobin())
    )
    # Every turn but the first finds all of the turn before: 8 t of 8 t + 9 tokens.
    needed = sum(8 * turn + 9 for turn in range(8))
    assert aware == sum(8 * turn for turn in range(8)) / needed
    # By turns, a conversation alternates between two replicas: it finds the turn before the last.
    assert scattered == sum(8 * (turn - 1) for turn in range(2, 8)) / needed


def test_requests_are_spread_evenly_by_turns() -> None:
    case = Case(turns(), ReplicaLimits(4, 64, 4, 400), Grid(0.5))
    assert set(Counter(run(case, RoundRobin(), 4).routes["replica"].tolist()).values()) == {12}


@settings(max_examples=20)
@given(case=cases(closed=False))
def test_curves_of_a_deployment_are_sums_over_its_replicas(case: Case) -> None:
    trace = run(case, RoundRobin(), 2)
    parts = [of_replica(trace, at) for at in range(2)]
    if not all(part.num_iterations for part in parts):
        return
    whole, each = counts(trace), [counts(part) for part in parts]
    for name in ("running", "free_blocks"):
        steps = getattr(whole, name)
        singles = [getattr(one, name) for one in each]
        for instant_s, value in zip(steps.instant_s, steps.value, strict=True):
            total = 0
            for one in singles:
                at = int(np.searchsorted(one.instant_s, instant_s, "right")) - 1
                before = 0 if name == "running" else one.value[0]
                total += one.value[at] if at >= 0 else before
            assert value == total
