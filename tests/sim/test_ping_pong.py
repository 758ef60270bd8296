"""The event simulation of a ping-pong pipeline against the paper's closed form and brute force."""

from fractions import Fraction
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.processes.exact_time import ExactEnvironment
from sim.processes.stations import Iteration, StageTimes, Visit, iteration_s
from sim.state.ping_pong import (
    StageSeconds,
    hidden_total_s,
    hides_transfers,
    least_micro_batches,
    total_s,
)

EXACT = st.integers(1, 400).map(lambda ticks: ticks / 64)
"""Sums of these are exact in floating point."""
SIZES = st.tuples(st.integers(1, 9), st.integers(1, 6))


def simulated_s(stages: StageSeconds, sizes: tuple[int, int]) -> float:
    attention_s, expert_s, transfer_s = stages
    return iteration_s(StageTimes.alike(attention_s, expert_s, transfer_s, sizes))


def by_hand(times: StageTimes) -> Fraction:
    """Each station begins a job when it has done the one before and the job has come."""
    layers, count = times.attention_s.shape
    free = [Fraction(0)] * 4
    came = [Fraction(0)] * count
    for layer in range(layers):
        for micro_batch in range(count):
            at = came[micro_batch]
            for station in range(4):
                seconds = Fraction(float(times[station][layer, micro_batch]))
                at = max(at, free[station]) + seconds
                free[station] = at
            came[micro_batch] = at
    for micro_batch in range(count):
        free[0] = max(free[0], came[micro_batch]) + Fraction(float(times.outside_s[micro_batch]))
    return free[0]


@given(st.tuples(EXACT, EXACT, EXACT), SIZES)
def test_one_iteration_takes_the_closed_form_exactly(
    seconds: tuple[float, float, float], sizes: tuple[int, int]
) -> None:
    stages = StageSeconds(*seconds)
    assert simulated_s(stages, sizes) == total_s(stages, sizes[1], sizes[0])


@given(st.tuples(EXACT, EXACT, EXACT), SIZES)
def test_equation_5_is_exact_where_its_conditions_hold_and_too_short_elsewhere(
    seconds: tuple[float, float, float], sizes: tuple[int, int]
) -> None:
    stages, (layers, count) = StageSeconds(*seconds), sizes
    simulated, closed_s = simulated_s(stages, sizes), hidden_total_s(stages, count, layers)
    if hides_transfers(stages, count):
        assert simulated == closed_s
    elif layers > 1 and (count > 1 or stages.round_trip_s > stages.compute_s):
        assert simulated > closed_s
    else:
        assert simulated >= closed_s


@given(st.data(), SIZES)
def test_stations_of_any_times_serve_in_order_and_one_at_a_time(
    data: st.DataObject, sizes: tuple[int, int]
) -> None:
    layers, count = sizes
    draw = lambda shape: np.array(  # noqa: E731
        data.draw(st.lists(EXACT, min_size=int(np.prod(shape)), max_size=int(np.prod(shape))))
    ).reshape(shape)
    times = StageTimes(draw(sizes), draw(sizes), draw(sizes), draw(sizes), draw((count,)))
    environment, visits = ExactEnvironment(), list[Visit]()
    environment.run(until=Iteration(environment, times, visited=visits.append).done)
    assert Fraction(environment.now) == by_hand(times)
    for station in range(4):
        mine = [visit for visit in visits if visit.station == station]
        order = [(visit.layer, visit.micro_batch) for visit in mine]
        rounds = layers + (station == 0)
        assert order == list(product(range(rounds), range(count)))
        assert all(a.end_s <= b.start_s for a, b in pairwise(mine))


@pytest.mark.parametrize("expert_s", [0.25, 0.75, 1.0])
@pytest.mark.parametrize("transfer_s", [1 / 64, 0.25, 0.5, 33 / 64, 0.75, 1.0])
def test_the_least_number_of_micro_batches_is_3_up_to_half_and_4_above(
    expert_s: float, transfer_s: float
) -> None:
    """Found by simulating, for equal stages; unequal ones may do with fewer."""
    layers, wanted = 48, 3 if transfer_s <= 0.5 else 4
    assert least_micro_batches(transfer_s) == wanted
    stages = StageSeconds(1.0, expert_s, transfer_s)
    hidden = [
        count
        for count in range(1, 7)
        if simulated_s(stages, (layers, count)) == hidden_total_s(stages, count, layers)
    ]
    assert hidden == [*range(min(hidden), 7)]
    assert min(hidden) == wanted if expert_s == 1.0 else min(hidden) <= wanted


def test_without_transfers_two_micro_batches_are_enough() -> None:
    assert least_micro_batches(0.0) == 2


@pytest.mark.parametrize("share", [-0.1, 1.01, float("nan")])
def test_a_transfer_longer_than_computing_is_hidden_by_no_number(share: float) -> None:
    with pytest.raises(ValueError, match="must be in 0 to 1"):
        least_micro_batches(share)


@pytest.mark.parametrize(
    ("share", "gain"), [(0.10, 1.10), (0.28, 1.28), (0.38, 1.38)], ids=["mixtral", "dbrx", "scaled"]
)
def test_gains_of_figure_14_follow_from_the_shares_derived_from_them(
    share: float, gain: float
) -> None:
    """A consistency check of the pipeline, not of a prediction: fixed micro-batches, 48 layers."""
    stages = StageSeconds(1.0, 1.0, share)
    rate = {count: count / simulated_s(stages, (48, count)) for count in (1, 2, 3, 4)}
    assert rate[2] / rate[1] == pytest.approx(1.9, rel=0.05)
    assert rate[3] / rate[2] == pytest.approx(gain, rel=0.05)
    assert rate[4] / rate[3] == pytest.approx(1.0, rel=0.05)


def test_transfers_may_be_events_of_a_network_that_takes_as_long() -> None:
    environment, times = ExactEnvironment(), StageTimes.alike(1.0, 1.0, 0.25, (4, 3))

    def way(station: int, layer: int, micro_batch: int):
        return environment.boundary(environment.now + float(times[station][layer, micro_batch]))

    environment.run(until=Iteration(environment, times, way).done)
    assert environment.now == iteration_s(times)
