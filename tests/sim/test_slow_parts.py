"""Slow parts of a replica: by the factor, from the instant on, and whatever waits for them."""

import warnings
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_cases import (
    CONTEXT,
    POLICIES,
    Case,
    Grid,
    PromptSeconds,
    assert_equal_traces,
    cases,
    recorded,
)

from hardware_models.parts import load_gpu, load_node
from sim.api import run
from sim.decision_rows import canonical
from sim.engine import Engine, ReplicaLimits
from sim.faults import Fault, Kind, Part
from sim.policies.routing.least_loaded import LeastLoaded
from sim.policies.routing.round_robin import RoundRobin
from sim.processes.alone import simulate
from sim.processes.pace import Costed
from sim.processes.router import Engines, simulate_replicas
from sim.processes.slowed import Slowed, slowed_paces, split_of
from sim.result import Result
from sim.scenario import Model, Policies, Scenario
from sim.setup import prepare
from sim.slowness import Apart, SlowTimes
from sim.trace import Trace
from sim.workload.poisson import Poisson
from sim.workload.source import Source

LIMITS = ReplicaLimits(4, 64, 16, 99)


def slow(factor: float, at_s: float = 0.0, until_s: float | None = None, **given: object) -> Fault:
    fields = {"part": Part.node, "kind": Kind.slow, **given}
    return Fault(factor=factor, at_s=at_s, until_s=until_s, **fields)  # pyright: ignore[reportArgumentType]


def stopped(at_s: float, until_s: float) -> Fault:
    return Fault(part=Part.link, kind=Kind.dead, at_s=at_s, until_s=until_s)


def serve(case: Case, faults: list[Fault], policy: str, *, one_by_one: bool = False) -> Trace:
    pace = Slowed(case.cost, SlowTimes(faults, [1]), split_of(case.cost))
    source = Source(case.workload, 0, CONTEXT)
    return simulate(source, POLICIES[policy], case.limits, pace, one_by_one=one_by_one)


@st.composite
def slow_times(draw: st.DrawFn) -> list[Fault]:
    """Faults that begin and end on a grid, and so on boundaries, and overlap."""
    found: list[Fault] = []
    for _ in range(draw(st.integers(0, 4))):
        at_s = 0.25 * draw(st.integers(0, 60))
        until_s = draw(st.sampled_from([None, at_s + 0.25, at_s + 2.0, at_s + 9.5]))
        part = draw(st.sampled_from([Part.gpu, Part.node]))
        found.append(slow(draw(st.sampled_from([1.5, 2.0, 3.7])), at_s, until_s, part=part))
    return found


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=40)
@given(case=cases(prefixes=None), faults=slow_times())
def test_macro_steps_of_a_slow_replica_equal_single_steps_bit_for_bit(
    name: str, case: Case, faults: list[Fault]
) -> None:
    fast, single = (serve(case, faults, name, one_by_one=one) for one in (False, True))
    assert_equal_traces(canonical(fast), canonical(single))


@pytest.mark.parametrize("factor", [1.3, 2.0, 7.1])
@settings(max_examples=25)
@given(case=cases(closed=False))
def test_slow_for_ever_is_the_cost_times_the_factor_exactly(factor: float, case: Case) -> None:
    class Times:
        """The cost, times the factor."""

        iteration_s = staticmethod(lambda shape: factor * case.cost.iteration_s(shape))

        @staticmethod
        def decode_run_s(*run: int) -> list[float]:
            return [factor * seconds for seconds in case.cost.decode_run_s(*run)]

    expected = simulate(
        Source(case.workload, 0, CONTEXT), POLICIES["continuous"], case.limits, Costed(Times())
    )
    # Nothing of these costs is told apart from computing, so a slow GPU slows all of it.
    times = SlowTimes([slow(factor, part=Part.gpu)], [1])
    pace = Slowed(case.cost, times, lambda tokens, sampled: Apart())
    found = simulate(Source(case.workload, 0, CONTEXT), POLICIES["continuous"], case.limits, pace)
    assert_equal_traces(expected, found)


def test_an_iteration_goes_on_at_the_rate_of_each_instant() -> None:
    # A prompt of 4 s: 1 s at full speed, 2 s at half, 1 s at a sixth, the rest at full speed.
    faults = [slow(2.0, 1.0, 4.0), slow(3.0, 3.0, 4.0, part=Part.gpu)]
    case = Case(recorded([(0, 4, 3)]), LIMITS, PromptSeconds(1.0, 0.0, 0.5))
    trace = serve(case, faults, "continuous")
    done_by_4 = 1 + 2 / 2 + 1 / 6
    ends_s = 4 + (4 - done_by_4) + 0.5 * np.arange(3)
    assert trace.iterations["end_s"] == pytest.approx(ends_s, rel=1e-12)


def test_a_fault_that_begins_or_ends_on_a_boundary_changes_the_next_iteration_only() -> None:
    case = Case(recorded([(0, 1, 6)]), LIMITS, PromptSeconds(1.0, 0.0, 1.0))
    trace = serve(case, [slow(2.0, 2.0, 4.0)], "continuous")
    assert trace.iterations["end_s"].tolist() == [1.0, 2.0, 4.0, 5.0, 6.0, 7.0]


def test_a_dead_link_delays_what_crosses_it_by_the_outage_and_stops_nothing_else() -> None:
    times = SlowTimes([stopped(3.0, 10.0)], [1])
    assert times.end_s(2.0, 4.0, Apart(communication_s=1.0)) == pytest.approx(13.0, rel=1e-12)
    assert times.end_s(2.0, 4.0, Apart()) == 6.0
    assert times.end_s(3.0, 4.0, Apart(communication_s=1.0)) == pytest.approx(14.0, rel=1e-12)
    assert times.end_s(10.0, 4.0, Apart(communication_s=1.0)) == 14.0


def test_the_slowest_rank_decides_for_its_stage_and_a_stage_for_its_layers_only() -> None:
    apart = Apart(communication_s=1.0, overhead_s=0.5, head_s=2.0)
    total_s = 1.0 + 0.5 + 2.0 + 8.0

    def taken(*faults: Fault, layers: tuple[int, ...], tp_size: int) -> float:
        return SlowTimes(faults, layers, tp_size).end_s(0.0, total_s, apart)

    def gpu(at: int, factor: float) -> Fault:
        return slow(factor, part=Part.gpu, gpu=at)

    computing_s = 2.0 + 8.0
    assert taken(gpu(0, 2.0), gpu(1, 3.0), layers=(8,), tp_size=2) == computing_s * 3 + 1.5
    # Two stages of 3 and 5 layers: the first has 3 of 8 seconds, the last the head as well.
    assert taken(gpu(1, 3.0), layers=(3, 5), tp_size=2) == 3 * 3 + 5 + 2 + 1.5
    assert taken(gpu(2, 3.0), layers=(3, 5), tp_size=2) == 3 + 5 * 3 + 2 * 3 + 1.5
    assert taken(slow(2.0, part=Part.link), layers=(8,), tp_size=2) == computing_s + 2.0 + 0.5
    assert taken(slow(2.0), layers=(8,), tp_size=2) == total_s * 2


def test_a_slow_link_costs_what_the_collectives_cost() -> None:
    scenario = Scenario(model=Model(name="llama_3_8b"), node=load_node("h100_sxm_x8"), tp_size=4)
    cost = prepare(scenario).cost
    pace = slowed_paces([slow(3.0, part=Part.link)], cost, 1, 32, (4, 1))[0]
    apart = split_of(cost)(8, 8)
    plain_s, slow_s = (one.decode_run(0.0, 8, 4000, 1)[1] for one in (Costed(cost), pace))
    assert apart.communication_s > 0
    assert slow_s == pytest.approx(plain_s + 2 * apart.communication_s, rel=1e-12)


def test_a_straggler_gets_less_by_load_and_as_much_by_turns() -> None:
    load = Poisson(rate_per_s=8.0, num_requests=400, input_tokens=8, output_tokens=8)
    cost = PromptSeconds(0.01, 0.05, 0.05)
    faults = [slow(4.0, replica=1)]
    paces = slowed_paces(faults, cost, 3, 1, (1, 1))
    sent = {}
    for rule in (RoundRobin(), LeastLoaded()):
        engines = Engines(batching=POLICIES["continuous"], limits=LIMITS, paces=paces)
        trace = simulate_replicas(Source(load, 0, CONTEXT), rule, engines)
        sent[type(rule)] = Counter(trace.routes["replica"].tolist())
    assert set(sent[RoundRobin].values()) == {133, 134}
    assert sent[LeastLoaded][1] < 0.6 * min(sent[LeastLoaded][0], sent[LeastLoaded][2])


def test_a_fault_after_the_last_answer_warns_that_nothing_came_of_it() -> None:
    scenario = Scenario(
        model=Model(name="llama_3_8b"), gpu=load_gpu("h100_sxm"), policy=Policies(),
        workload=Poisson(rate_per_s=5.0, num_requests=5, input_tokens=64, output_tokens=8),
        faults=[slow(2.0, 1e6)],
    )  # fmt: skip
    with pytest.warns(UserWarning, match=r"at_s=1000000.0 has no effect: the last answer ends"):
        run(scenario)


def test_grid_costs_are_not_told_apart() -> None:
    assert split_of(Grid(0.5))(3, 1) == Apart()


def test_several_ranks_with_slow_parts_a_stopped_link_and_a_death_answer_all() -> None:
    def outcome(*faults: Fault) -> Result:
        scenario = Scenario(
            model=Model(name="llama_3_8b"), node=load_node("h100_sxm_x8"), tp_size=2, pp_size=2,
            num_replicas=2, faults=list(faults), detection_s=0.5,
            engine=Engine(batches_in_flight=1),
            workload=Poisson(rate_per_s=8.0, num_requests=60, input_tokens=256, output_tokens=64),
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the node's GPUs that one replica does not use
            return run(scenario)

    dead = Fault(part=Part.gpu, kind=Kind.dead, gpu=3, at_s=4.0, until_s=5.0)
    faults = (slow(2.0, 1.0, 3.0, part=Part.gpu, gpu=2), stopped(2.0, 2.5), dead)
    sound, faulty = outcome(), outcome(*faults)
    assert faulty["num_requests"] == sound["num_requests"] == 60
    assert faulty["num_rerouted"] > 0 == sound["num_rerouted"]
    assert faulty["e2e_p99_s"] > sound["e2e_p99_s"]
    # Nothing that must cross the link ends while it stands still.
    rows = faulty.trace.iterations
    ends_s = rows["end_s"][rows["replica"] == 0]
    assert not ((ends_s > 2.0) & (ends_s < 2.5)).any()
    assert ((ends_s > 1.5) & (ends_s < 2.0)).any()
