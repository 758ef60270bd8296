"""Several batches in flight: what stages allow, what lanes share, and what one lane is."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_cases import (
    CONTEXT,
    POLICIES,
    assert_equal_traces,
    recorded,
    tight_limits,
    tiny_fit,
    tiny_roofline,
)

from hardware_models.parts import load_node
from sim.api import check, run
from sim.costs.base import StagedCost, decode_shape
from sim.decision_rows import canonical, expand
from sim.engine import Engine, ReplicaLimits
from sim.faults import Fault, Kind, Part
from sim.lanes import covered_s, lane_limits, num_lanes
from sim.metrics import request_times
from sim.models.work import IterationShape
from sim.policies.instance_plan.prefill_decode import PrefillDecode
from sim.policies.routing.least_loaded import LeastLoaded
from sim.policies.routing.round_robin import RoundRobin
from sim.processes.alone import simulate
from sim.processes.pace import Costed, Replayed
from sim.processes.pipeline import Pipeline, lanes_of
from sim.processes.router import Engines, RouterLog, simulate_replicas
from sim.scenario import Model, Policies, Scenario
from sim.trace import State, Trace
from sim.trace_merge import of_replica
from sim.workload.poisson import Poisson
from sim.workload.recorded import Recorded
from sim.workload.source import Source


class Fixed:
    """An iteration takes so long, of which the last stage has so much to itself."""

    def __init__(self, seconds: float = 1.0, sampled: float = 0.0, slow_down: float = 1.0) -> None:
        self.seconds, self.sampled, self.slow_down = seconds, sampled, slow_down

    def iteration_s(self, shape: IterationShape) -> float:
        del shape
        return self.seconds

    def decode_run_s(self, num_decodes: int, decode_context: int, iterations: int) -> list[float]:
        del num_decodes, decode_context
        return [self.seconds] * iterations

    def sampled_s(self, positions: int) -> float:
        return self.sampled if positions else 0.0


class Watched(Pipeline):
    """Notes when each stage has each batch, from what comes out of `enter`."""

    def __init__(self, cost: StagedCost, layers: list[int]) -> None:
        super().__init__(cost, layers)
        self.held: list[list[tuple[float, float]]] = [[] for _ in layers]

    def enter(self, now_s: float, shape: IterationShape) -> float:
        seconds = self.stage_seconds(shape)
        end_s = super().enter(now_s, shape)
        for stage, free_s in enumerate(self.free_s):
            self.held[stage].append((free_s - seconds[stage], free_s))
        return end_s


def saturated(count: int, output_tokens: int = 3) -> Recorded:
    return recorded([(0.0, 1, output_tokens)] * count)


def serve_lanes(
    workload: Recorded, limits: ReplicaLimits, pipeline: Pipeline, lanes: int,
    rule: str = "continuous", **how: bool,
) -> Trace:  # fmt: skip
    """One replica; `limits` are those of a lane."""
    engines = Engines(
        batching=POLICIES[rule], limits=limits, paces=lanes_of([pipeline], lanes), **how
    )
    return simulate_replicas(Source(workload, 0, CONTEXT), LeastLoaded(), engines)


@pytest.mark.parametrize("lanes", [1, 2, 3, 4])
def test_full_lanes_of_equal_stages_give_as_many_times_the_throughput_of_one(lanes: int) -> None:
    rounds, seat = 50, ReplicaLimits(1, 64, 16, 100)
    trace = serve_lanes(saturated(lanes * rounds), seat, Pipeline(Fixed(1.0), [2] * 4), lanes)
    assert trace.num_iterations == 3 * lanes * rounds
    # Each lane iterates once a second; the last one begins one stage later than the one before.
    span_s = trace.iterations["end_s"].max()
    assert span_s == pytest.approx(3 * rounds + (lanes - 1) / 4)


@pytest.mark.parametrize("lanes", [1, 2, 3])
@pytest.mark.parametrize("sampled", [0.0, 0.4])
def test_throughput_never_exceeds_what_the_slowest_stage_allows(lanes: int, sampled: float) -> None:
    rounds, seat = 40, ReplicaLimits(1, 64, 16, 100)
    pipeline = Pipeline(Fixed(1.0, sampled), [3, 2, 1])
    trace = serve_lanes(saturated(lanes * rounds), seat, pipeline, lanes)
    slowest_s = max(pipeline.stage_seconds(decode_shape(1, 1)))
    span_s = trace.iterations["end_s"].max()
    assert trace.num_iterations * slowest_s <= span_s * (1 + 1e-9)
    if lanes == 3:  # and with a batch a stage the slowest one is never idle but at the ends
        assert span_s == pytest.approx(trace.num_iterations * slowest_s, abs=1.0)


def test_stages_that_slow_each_other_down_do_so_only_beside_another_batch() -> None:
    pipeline, shape = Pipeline(Fixed(1.0, slow_down=1.5), [1, 1]), decode_shape(1, 1)
    assert pipeline.enter(0.0, shape) == 1.0  # alone
    assert pipeline.enter(0.5, shape) == 0.5 + 2 * 0.75
    assert pipeline.enter(2.0, shape) == 3.0


@st.composite
def loads(draw: st.DrawFn) -> tuple[Recorded, ReplicaLimits, StagedCost]:
    rows = draw(
        st.lists(st.tuples(st.integers(0, 4), st.integers(1, 20), st.integers(1, 25)),
                 min_size=1, max_size=20)
    )  # fmt: skip
    steps, prompts, outputs = (list(column) for column in zip(*rows, strict=True))
    arrivals = (0.02 * np.cumsum(steps)).tolist()
    workload = Recorded(arrival_s=arrivals, prompt_tokens=prompts, output_tokens=outputs)
    cost = draw(st.sampled_from([tiny_roofline(), tiny_fit(), Fixed(0.02, 0.005)]))
    return workload, draw(tight_limits(prompts, outputs)), cost


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=25)
@given(load=loads(), layers=st.lists(st.integers(1, 4), min_size=2, max_size=4))
def test_a_stage_never_holds_two_batches_and_nothing_is_lost(
    name: str, load: tuple[Recorded, ReplicaLimits, StagedCost], layers: list[int]
) -> None:
    workload, limits, cost = load
    pipeline, lanes = Watched(cost, layers), len(layers)
    trace = serve_lanes(workload, limits, pipeline, lanes, name)
    for held in pipeline.held:
        for (_, end_s), (start_s, _) in pairwise(held):
            assert start_s >= end_s - 1e-9
    passed = list(zip(*pipeline.held, strict=True))
    assert len(passed) == trace.num_iterations
    for stages in passed:  # in order, and the next one not before this one is done
        assert all(a[1] <= b[0] + 1e-9 for a, b in pairwise(stages))
    times = request_times(trace)
    assert sorted(times.request.tolist()) == list(range(len(workload.prompt_tokens)))
    assert (trace.events["state"] == State.finished).sum() == len(workload.prompt_tokens)
    for lane in range(lanes):  # one batch a lane at a time
        mine = of_replica(trace, lane).iterations
        assert (mine["start_s"][1:] >= mine["end_s"][:-1]).all()


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=25)
@given(load=loads())
def test_macro_steps_of_lanes_equal_single_steps(
    name: str, load: tuple[Recorded, ReplicaLimits, StagedCost]
) -> None:
    workload, limits, cost = load
    fast, slow = (
        serve_lanes(workload, limits, Pipeline(cost, [2, 1, 2]), 3, name, one_by_one=single)
        for single in (False, True)
    )
    for lane in range(3):
        one, other = (canonical(of_replica(trace, lane)) for trace in (fast, slow))
        assert expand(one) == expand(other)
    np.testing.assert_array_equal(fast.iterations["end_s"], slow.iterations["end_s"])


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=25)
@given(load=loads())
def test_replay_of_all_lanes_decides_the_same(
    name: str, load: tuple[Recorded, ReplicaLimits, StagedCost]
) -> None:
    workload, limits, cost = load
    first = serve_lanes(workload, limits, Pipeline(cost, [1, 1]), 2, name, one_by_one=True)
    paces = [Replayed.of(of_replica(first, lane)) for lane in range(2)]
    engines = Engines(batching=POLICIES[name], limits=limits, paces=paces, one_by_one=True)
    again = simulate_replicas(
        Source(workload, 0, CONTEXT), LeastLoaded(), engines, RouterLog.of(first)
    )
    for column in ("request", "replica", "outstanding_requests", "outstanding_tokens"):
        assert again.routes[column].tolist() == first.routes[column].tolist()
    for lane in range(2):
        one, other = (of_replica(trace, lane) for trace in (first, again))
        assert expand(one) == expand(other)
        np.testing.assert_array_equal(one.iterations["end_s"], other.iterations["end_s"])


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=25)
@given(load=loads())
def test_one_lane_is_one_batch_after_another(
    name: str, load: tuple[Recorded, ReplicaLimits, StagedCost]
) -> None:
    workload, limits, cost = load
    if isinstance(cost, Fixed):
        return  # arrivals lie on its boundaries, which differ in their last bits
    lane = serve_lanes(workload, limits, Pipeline(cost, [2, 1]), 1, name)
    whole = simulate(Source(workload, 0, CONTEXT), POLICIES[name], limits, Costed(cost))
    ours, theirs = request_times(lane), request_times(whole)
    np.testing.assert_allclose(ours.last_token_s, theirs.last_token_s)
    np.testing.assert_allclose(ours.first_token_s, theirs.first_token_s)


@pytest.mark.parametrize("cost", [tiny_roofline(), tiny_fit()])
@pytest.mark.parametrize("layers", [[1], [2, 1], [3, 3, 2]])
def test_stages_add_up_to_the_iteration(cost: StagedCost, layers: list[int]) -> None:
    pipeline = Pipeline(cost, layers)
    shape = IterationShape.of([(20, 0), (7, 30)], [40, 50], 3)
    for one in (shape, decode_shape(4, 100), shape._replace(sampled_tokens=0)):
        seconds = pipeline.stage_seconds(one)
        assert sum(seconds) == pytest.approx(cost.iteration_s(one), rel=1e-12)
        body = np.array(seconds)
        body[-1] -= cost.sampled_s(one.sampled_tokens)
        np.testing.assert_allclose(body / body.sum(), np.array(layers) / sum(layers))
        assert (cost.sampled_s(one.sampled_tokens) > 0) == (one.sampled_tokens > 0)


def test_lanes_share_seats_and_blocks_and_keep_the_token_budget() -> None:
    whole = ReplicaLimits(9, 64, 16, 21, prefix_caching=True)
    assert lane_limits(whole, 2) == ReplicaLimits(4, 64, 16, 10, prefix_caching=True)
    assert lane_limits(whole, 10).max_num_seqs == 1
    assert lane_limits(whole, 1) == whole
    with pytest.raises(ValueError, match="num_blocks=21 KV blocks do not give one to each of 22"):
        lane_limits(whole, 22)


def test_how_many_batches_are_in_flight() -> None:
    assert num_lanes(None, 4) == 4
    assert num_lanes(1, 4) == 1
    assert num_lanes(None, 4, one_for="faults") == 1
    with pytest.raises(ValueError, match="batches_in_flight=3 must not exceed pp_size=2"):
        num_lanes(3, 2)
    with pytest.raises(ValueError, match="batches_in_flight=2 must be 1 or null with faults"):
        num_lanes(2, 2, one_for="faults")


def test_a_replica_is_busy_while_any_of_its_lanes_is() -> None:
    # Replica 0 has lanes 0 and 2, replica 1 has lanes 1 and 3.
    iterations = {
        "replica": np.array([0, 0, 1, 2, 3]),
        "start_s": np.array([0.0, 5.0, 0.0, 1.0, 3.0]),
        "end_s": np.array([2.0, 6.0, 1.0, 4.0, 4.0]),
    }
    assert covered_s(iterations, 2) == 4 + 1 + 1 + 1


def pipelined(**fields: object) -> Scenario:
    base = {
        "model": Model(name="llama_3_8b"), "node": load_node("a100_80g_x2"), "pp_size": 2,
        "workload": Poisson(rate_per_s=40.0, num_requests=200, input_tokens=200, output_tokens=60),
    }  # fmt: skip
    return Scenario(**(base | fields))


def test_two_batches_in_flight_raise_the_throughput_of_two_stages_and_keep_shares_within_one() -> (
    None
):
    # Few seats: every batch is full, and reads all weights however many requests it has.
    one, two = (
        run(pipelined(engine=Engine(max_num_seqs=8 * lanes, batches_in_flight=lanes)))
        for lanes in (1, 2)
    )
    ratio = two["throughput_tokens_per_s"] / one["throughput_tokens_per_s"]
    assert 1.6 < ratio < 2.0
    assert 0.9 < two["busy_share"] <= 1
    assert two["num_gpus"] == one["num_gpus"] == 2


def test_one_stage_has_one_batch_in_flight() -> None:
    plain, asked = (
        run(pipelined(pp_size=1, tp_size=2, engine=Engine(batches_in_flight=lanes)))
        for lanes in (None, 1)
    )
    assert_equal_traces(plain.traces[0], asked.traces[0])


def test_replicas_of_several_lanes_are_filled_evenly() -> None:
    policy = Policies(routing=LeastLoaded())
    found = run(pipelined(num_replicas=2, policy=policy))
    replica = found.traces[0].routes["replica"]
    assert replica[:4].tolist() == [0, 1, 2, 3]
    assert found["busy_share"] <= 1
    assert found["num_gpus"] == 4


def test_what_lanes_cannot_do_is_refused_or_said() -> None:
    with pytest.raises(ValueError, match="batches_in_flight=0 must be at least 1"):
        Engine(batches_in_flight=0)
    with pytest.raises(ValueError, match="batches_in_flight=3 must not exceed pp_size=2"):
        check(pipelined(engine=Engine(batches_in_flight=3)))
    long = Poisson(rate_per_s=1.0, num_requests=5, input_tokens=150, output_tokens=60)
    few = Engine(num_blocks=20)
    with pytest.raises(ValueError, match="160"):
        check(pipelined(workload=long, engine=few))
    check(pipelined(workload=long, engine=Engine(num_blocks=20, batches_in_flight=1)))
    check(pipelined(policy=Policies(routing=LeastLoaded())))
    alone = Engine(batches_in_flight=1)
    with pytest.warns(UserWarning, match="LeastLoaded has no effect"):
        check(pipelined(policy=Policies(routing=LeastLoaded()), engine=alone))


def test_replicas_with_faults_keep_one_batch_and_say_so() -> None:
    slow = [Fault(part=Part.gpu, kind=Kind.slow, factor=2.0, at_s=1.0)]
    with pytest.warns(UserWarning, match="with faults a replica keeps one batch in flight"):
        assert check(pipelined(faults=slow)).lanes == 1
    with pytest.raises(ValueError, match="batches_in_flight=2 must be 1 or null with faults"):
        check(pipelined(faults=slow, engine=Engine(batches_in_flight=2)))


def test_instances_that_move_kv_keep_one_batch_and_say_so() -> None:
    apart = Policies(instance_plan=PrefillDecode(), routing=RoundRobin())
    four = {"node": load_node("a100_80g_x4"), "num_replicas": 2, "policy": apart}
    with pytest.warns(UserWarning, match="keeps one batch in flight"):
        assert check(pipelined(**four)).lanes == 1
    check(pipelined(**four, engine=Engine(batches_in_flight=1)))
    with pytest.raises(ValueError, match="batches_in_flight=2 must be 1 or null"):
        check(pipelined(**four, engine=Engine(batches_in_flight=2)))
