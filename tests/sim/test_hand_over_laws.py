"""Prefill and decode on separate instances: what holds whatever the load, plan and policy."""

from collections import Counter
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hand_over_cases import COARSE, TOKEN_BYTES, link, run
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_cases import POLICIES, Case, Grid, PromptSeconds, assert_equal_traces, cases, recorded

from hardware_models.parts import load_cluster, load_node
from sim import metrics
from sim.api import check
from sim.api import run as run_scenario
from sim.costs.base import IterationCost
from sim.decision_rows import canonical, expand
from sim.engine import ReplicaLimits
from sim.models.architecture import load_architecture
from sim.models.work import IterationShape
from sim.placement import Placement
from sim.plot_data import counts
from sim.policies.instance_plan.base import InstancePlan, phases
from sim.policies.instance_plan.colocated import Colocated
from sim.policies.instance_plan.prefill_decode import PrefillDecode
from sim.processes.exact_time import ExactEnvironment
from sim.processes.kv_moves import HandOverLog, NetworkTransport
from sim.processes.network import Network
from sim.processes.pace import Costed, Pace, Replayed
from sim.scenario import Policies, Scenario
from sim.state.links import Routes
from sim.trace import State, Trace
from sim.trace_merge import of_replica
from sim.work_done import work_done
from sim.workload.poisson import Poisson

NEVER_TIES = link(0.123456789, 31.4159 * TOKEN_BYTES)
"""KV arrives at no instant of a decision: a log of instants could not tell which was first."""


class Slower:
    """A cost that is slightly higher on every instance: no two of them end an iteration at once.

    Which of two is heard of first at one instant is nobody's to say.
    """

    def __init__(self, cost: IterationCost, instance: int) -> None:
        self._cost, self._factor = cost, 1.0 + 0.0137193 * instance

    def iteration_s(self, shape: IterationShape) -> float:
        return self._cost.iteration_s(shape) * self._factor

    def decode_run_s(self, num_decodes: int, decode_context: int, iterations: int) -> list[float]:
        run_s = self._cost.decode_run_s(num_decodes, decode_context, iterations)
        return [seconds * self._factor for seconds in run_s]


EVERY_POLICY = pytest.mark.parametrize("name", POLICIES)
ROOMY = ReplicaLimits(max_num_seqs=8, max_num_batched_tokens=256, block_size=16, num_blocks=64)


@EVERY_POLICY
@settings(max_examples=25)
@given(case=cases(prefixes=None), count=st.integers(2, 4))
def test_every_request_is_answered_once_in_full_and_in_order(
    name: str, case: Case, count: int
) -> None:
    trace = run(case, POLICIES[name], count)
    done = trace.events["request"][trace.events["state"] == State.finished]
    assert sorted(done.tolist()) == list(range(len(case.workload.arrival_s)))
    for request, tokens in zip(
        trace.requests["request"].tolist(), trace.requests["output_tokens"].tolist(), strict=True
    ):
        instants = metrics.token_times(trace, request)
        assert len(instants) == tokens
        assert (np.diff(instants) >= 0).all()


@EVERY_POLICY
@settings(max_examples=25)
@given(case=cases(prefixes=None), count=st.integers(2, 4), ahead=st.booleans())
def test_decode_stretches_give_what_single_iterations_give(
    name: str, case: Case, count: int, ahead: bool
) -> None:
    paces: list[Pace] = [Costed(Slower(case.cost, at)) for at in range(count)]
    traces = [
        run(
            case, POLICIES[name], count, transport=NEVER_TIES, paces=paces, one_by_one=one,
            schedules_ahead=ahead,
        )
        for one in (True, False)
    ]  # fmt: skip
    for table in ("requests", "events", "runs", "iterations", "routes", "hand_overs"):
        for column in getattr(traces[0], table):
            ours, theirs = (getattr(trace, table)[column] for trace in traces)
            np.testing.assert_array_equal(ours, theirs, f"{table}.{column}")
    for at in range(count):
        ours, theirs = (expand(canonical(of_replica(trace, at))) for trace in traces)
        assert ours == theirs


@EVERY_POLICY
@settings(max_examples=20)
@given(case=cases(closed=False, prefixes=None), count=st.integers(2, 4))
def test_replay_gives_every_decision_again(name: str, case: Case, count: int) -> None:
    costed: list[Pace] = [Costed(Slower(case.cost, at)) for at in range(count)]
    trace = run(case, POLICIES[name], count, transport=NEVER_TIES, paces=costed, one_by_one=True)
    paces: list[Pace] = [Replayed.of(of_replica(trace, at)) for at in range(count)]
    again = run(
        case, POLICIES[name], count, paces=paces, log=HandOverLog.of(trace), one_by_one=True
    )
    for at in range(count):
        assert expand(of_replica(again, at)) == expand(of_replica(trace, at))
    for column in trace.hand_overs:
        np.testing.assert_array_equal(again.hand_overs[column], trace.hand_overs[column], column)


@EVERY_POLICY
@settings(max_examples=20)
@given(case=cases(prefixes=None), count=st.integers(2, 3))
def test_all_blocks_are_free_at_the_end_and_never_fewer_than_none(
    name: str, case: Case, count: int
) -> None:
    trace = run(case, POLICIES[name], count)
    assert (trace.decisions["free_blocks"] >= 0).all()
    blocks = Counter[int]()
    for request, tokens in zip(
        trace.hand_overs["request"].tolist(), trace.hand_overs["kv_tokens"].tolist(), strict=True
    ):
        blocks[request] += case.limits.blocks_for(tokens)
    moves = [trace.hand_overs[name] for name in ("instant_s", "fetched_s", "delivered_s")]
    assert all((later >= earlier).all() for earlier, later in pairwise(moves))
    several = trace.requests["output_tokens"] > 1
    assert set(blocks) == set(trace.requests["request"][several].tolist())


@settings(max_examples=20)
@given(case=cases(), count=st.integers(2, 3))
def test_prefill_instances_never_decode_and_the_others_prefill_only_what_was_pre_empted(
    case: Case, count: int
) -> None:
    trace = run(case, POLICIES["chunked_prefill"], count)
    first, *others = (of_replica(trace, at) for at in range(count))
    assert not first.decisions["num_decodes"].any()
    for other in others:
        lost = other.events["request"][other.events["state"] == State.preempted]
        assert set(other.decision_lists["prefilled"].values.tolist()) <= set(lost.tolist())


@settings(max_examples=20)
@given(case=cases(), count=st.integers(2, 3))
def test_kv_is_written_where_it_is_computed_and_again_where_it_moves(
    case: Case, count: int
) -> None:
    trace = run(case, POLICIES["continuous"], count)
    done = work_done(trace, load_architecture("tiny_llama"), TOKEN_BYTES)
    computed = int((trace.decisions["prefill_tokens"] * trace.decisions["repeat"]).sum())
    computed += int((trace.decisions["num_decodes"] * trace.decisions["repeat"]).sum())
    moved = int(trace.hand_overs["kv_tokens"].sum())
    assert done.kv_bytes_written == (computed + moved) * TOKEN_BYTES


@settings(max_examples=20)
@given(case=cases(), count=st.integers(2, 3))
def test_who_runs_and_who_waits_is_never_negative_and_nobody_in_the_end(
    case: Case, count: int
) -> None:
    trace = run(case, POLICIES["continuous"], count)
    for part in (trace, *(of_replica(trace, at) for at in range(count))):
        found = counts(part)
        assert found.running.value.min() >= 0
        assert found.waiting.value.min() >= 0
        assert found.running.value[-1] == found.waiting.value[-1] == 0


def test_one_request_is_prefilled_moved_and_decoded_one_after_the_other() -> None:
    case = Case(recorded([(1.0, 32, 4)]), ROOMY, PromptSeconds(0.25, decode_s=2.0))
    trace = run(case, POLICIES["continuous"], 2, transport=link(0.5, 64 * TOKEN_BYTES))
    prefilled_s = 1.0 + 32 * 0.25
    there_s = prefilled_s + 0.5 + 32 / 64
    expected = [prefilled_s, there_s + 2.0, there_s + 4.0, there_s + 6.0]
    assert metrics.token_times(trace, 0).tolist() == expected
    assert metrics.hand_over_s(trace).tolist() == [1.0]
    assert metrics.request_times(trace).ttft_s.tolist() == [8.0]


def test_kv_waits_where_it_is_until_there_is_room_and_holds_back_the_next_prompt() -> None:
    # Two blocks an instance: the second prompt finds none before the first was fetched, the third
    # none before the second was, which waits for the first answer to end.
    limits = ReplicaLimits(max_num_seqs=4, max_num_batched_tokens=64, block_size=16, num_blocks=2)
    case = Case(recorded([(0.0, 20, 8)] * 3), limits, PromptSeconds(0.0, 1.0, 1.0))
    trace = run(case, POLICIES["continuous"], 2, transport=link(1.0, float("inf")))
    moved = {name: column.tolist() for name, column in trace.hand_overs.items()}
    assert moved["instant_s"] == [1.0, 3.0, 11.0]
    assert moved["fetched_s"] == [1.0, 9.0, 17.0]
    assert moved["delivered_s"] == moved["released_s"] == [2.0, 10.0, 18.0]


def test_what_is_decoded_elsewhere_never_waits_for_a_prompt() -> None:
    load = recorded([(0.0, 16, 20), (3.5, 160, 2), (5.5, 160, 2)])
    case = Case(load, ROOMY, PromptSeconds(0.1, decode_s=1.0))
    apart = run(case, POLICIES["continuous"], 2, transport=link(0.0, float("inf")))
    assert np.diff(metrics.token_times(apart, 0)).max() == pytest.approx(1.0)


@pytest.mark.parametrize("node", ["h100_sxm_x2", "l40s_x2", "a100_80g_x8"])
def test_kv_takes_latency_and_bytes_over_bandwidth_of_an_idle_way(node: str) -> None:
    ranks = load_node(node).num_gpus // 2
    placement = Placement(load_node(node), ranks)
    network = Network(ExactEnvironment(), Routes(load_node(node)))
    rows = network.wiring.gpu_paths([0], [ranks])
    slowest = network.wiring.links.capacity_bytes_per_s[rows[0][rows[0] >= 0]].min()
    expected = 1e9 / slowest + network.latency_s(rows)[0]
    assert _seconds_to(placement, 1, ranks * 10**9) == pytest.approx(expected, rel=1e-9)


def test_instances_fill_the_nodes_of_a_cluster_in_order() -> None:
    cluster = load_cluster("a100_80g_x8_by_8")
    placement = Placement(cluster, 4)
    assert [list(placement.ranks(at)) for at in (0, 1, 2)] == [
        [0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11],
    ]  # fmt: skip
    assert placement.room == 16
    assert Placement(cluster, 3).room == 16
    assert list(Placement(cluster, 3).ranks(2)) == [8, 9, 10]


@dataclass(kw_only=True)
class WatchedPlan(InstancePlan):
    """Asks a plan twice and fails when anything but its memory differs."""

    inner: InstancePlan

    def init(self) -> Any:
        return self.inner.init()

    def groups(self, memory: Any, num_instances: int) -> Any:
        return self.inner.groups(memory, num_instances)

    def hand_over(self, memory: Any, request: Any, view: Any) -> int:
        seen = (tuple(view.outstanding_requests), tuple(view.outstanding_tokens))
        first = self.inner.hand_over(deepcopy(memory), request, view)
        assert self.inner.hand_over(memory, request, view) == first
        assert seen == (tuple(view.outstanding_requests), tuple(view.outstanding_tokens))
        return first

    def fetch(self, memory: Any, handed: Any, view: Any) -> int:
        seen = (list(handed), view.num_running, view.num_fetching, view.free_blocks)
        count = self.inner.fetch(deepcopy(memory), handed, view)
        assert self.inner.fetch(memory, handed, view) == count
        assert seen == (list(handed), view.num_running, view.num_fetching, view.free_blocks)
        assert 0 <= count <= len(handed)
        return count


@settings(max_examples=20)
@given(case=cases(), count=st.integers(2, 4))
def test_plans_are_deterministic_and_change_nothing_they_see(case: Case, count: int) -> None:
    watched = run(case, POLICIES["continuous"], count, plan=WatchedPlan(inner=PrefillDecode()))
    assert_equal_traces(watched, run(case, POLICIES["continuous"], count))


@settings(max_examples=20)
@given(case=cases(closed=False), count=st.integers(2, 3), later=st.integers(1, 5))
def test_hand_overs_know_nothing_of_hidden_lengths(case: Case, count: int, later: int) -> None:
    """Longer answers change no hand-over before the first one that ends earlier or later."""
    longer = deepcopy(case)
    several = [tokens + later if tokens > 1 else 1 for tokens in case.workload.output_tokens]
    longer.workload.output_tokens[:] = several
    limits = ReplicaLimits(64, 4096, 16, 4096)
    traces: list[Trace] = [
        run(one._replace(limits=limits), POLICIES["continuous"], count) for one in (case, longer)
    ]
    ends = [trace.answers["instant_s"][trace.answers["replica"] > 0] for trace in traces]
    first_s = min((float(one.min()) for one in ends if len(one)), default=np.inf)
    chosen = [
        list(zip(*(trace.hand_overs[name][trace.hand_overs["instant_s"] < first_s].tolist()
                   for name in ("request", "replica", "instant_s")), strict=True))
        for trace in traces
    ]  # fmt: skip
    assert chosen[0] == chosen[1]


def scenario(**changes: Any) -> Scenario:
    defaults: dict[str, Any] = {
        "node": load_node("a100_80g_x2"), "num_replicas": 2,
        "workload": Poisson(rate_per_s=4.0, num_requests=40, input_tokens=300, output_tokens=20),
        "policy": Policies(instance_plan=PrefillDecode()),
    }  # fmt: skip
    return Scenario(**(defaults | changes))


def test_a_scenario_says_how_long_hand_overs_take_and_what_moves() -> None:
    figures = run_scenario(scenario()).figures[0]
    assert 0 < figures["hand_over_mean_s"] < figures["hand_over_p99_s"] < 0.1
    assert figures["kv_bytes_moved"] == 40 * 304 * 131072
    together = run_scenario(scenario(policy=Policies(), node=load_node("a100_80g_x1"))).figures[0]
    assert np.isnan(together["hand_over_mean_s"])
    assert np.isnan(together["kv_bytes_moved"])


@pytest.mark.parametrize("target", [1, 2])
def test_across_nodes_kv_goes_through_the_network_ports_and_takes_longer(target: int) -> None:
    placement = Placement(load_cluster("a100_80g_x8_by_8"), 4)
    times = [_seconds_to(placement, at, 4 * 10**9) for at in (1, target)]
    link = placement.hardware.node.nic_link  # pyright: ignore[reportAttributeAccessIssue]
    if target == 2:
        assert times[1] > 5 * times[0]
        assert times[1] >= 1e9 / link.peak.bandwidth_bytes_per_s
    else:
        assert times[0] == times[1]


def _seconds_to(placement: Placement, target: int, num_bytes: int) -> float:
    environment = ExactEnvironment()
    environment.run(NetworkTransport(environment, placement).send(0, target, num_bytes))
    return environment.now


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_replicas": 1}, "num_prefill=1 of num_replicas=1 leaves no instance that decodes; "
                              "take num_replicas=2"),
        ({"num_replicas": 3}, "num_replicas=3 instances of 1 GPUs each do not fit on a100_80g_x2, "
                              "which has room for 2"),
        ({"node": None, "cluster": load_cluster("a100_80g_x8_by_8"), "num_replicas": 65},
         "do not fit on a100_80g_x8_by_8, which has room for 64"),
        ({"cluster": load_cluster("a100_80g_x8_by_8")},
         "node=a100_80g_x2 and cluster=a100_80g_x8_by_8 are given together"),
    ],
)  # fmt: skip
def test_what_cannot_be_placed_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(scenario(**changes))


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"num_prefill": 0}, "num_prefill=0 must be at least 1"),
     ({"watermark": 1.0}, r"watermark=1.0 must be in \[0, 1\)")],
)  # fmt: skip
def test_settings_out_of_range_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrefillDecode(**fields)


@dataclass(kw_only=True)
class Greedy(PrefillDecode):
    """Fetches whatever there is, room or not."""

    def fetch(self, memory: Any, handed: Any, view: Any) -> int:
        return len(handed)


@dataclass(kw_only=True)
class Nowhere(PrefillDecode):
    """Hands over to an instance that is not there."""

    def hand_over(self, memory: Any, request: Any, view: Any) -> int:
        return view.num_replicas


@dataclass(kw_only=True)
class Never(PrefillDecode):
    """Fetches nothing."""

    def fetch(self, memory: Any, handed: Any, view: Any) -> int:
        return 0


@pytest.mark.parametrize(
    ("plan", "message"),
    [(Greedy(), "policy Greedy .* is fetched into blocks that are not free"),
     (Nowhere(), "policy Nowhere .*replica=1 is chosen and there are replicas 0 to 0"),
     (Never(), "policy Never left the KV of 3 requests where it was prefilled")],
)  # fmt: skip
def test_a_plan_that_breaks_its_rules_is_named(plan: InstancePlan, message: str) -> None:
    limits = ReplicaLimits(max_num_seqs=8, max_num_batched_tokens=256, block_size=16, num_blocks=12)
    case = Case(recorded([(0.0, 60, 30)] * 9), limits, Grid(0.5))
    with pytest.raises(ValueError, match=message):
        run(case, POLICIES["continuous"], 2, plan=plan, transport=COARSE)


@dataclass(kw_only=True)
class Mixed(InstancePlan):
    """One instance does both, the other decodes."""

    def groups(self, memory: Any, num_instances: int) -> Any:
        groups = Colocated().groups(None, num_instances)
        return (groups[0], groups[1]._replace(prefills=False))


def test_a_plan_of_mixed_phases_is_refused() -> None:
    with pytest.raises(ValueError, match="either every instance prefills and decodes, or some"):
        phases(Mixed(), 2)
