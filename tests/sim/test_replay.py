"""Replaying a run's own decision instants gives the run's own decisions."""

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from serving_cases import POLICIES, Case, Grid, cases, recorded, run_case

from sim.decision_rows import canonical, expand
from sim.engine import ReplicaLimits
from sim.processes.alone import simulate
from sim.processes.pace import Replayed
from sim.requests import Request
from sim.trace import Trace
from sim.workload.recorded import Recorded


class Seen:
    """The requests of a trace with their own ids and the arrivals that they had."""

    def __init__(self, trace: Trace, workload: Recorded) -> None:
        columns = [column.tolist() for column in trace.requests.values()]
        size, hashes = workload.hash_block_tokens, workload.prefix_hashes
        rows = (Request(*row, hash_block_tokens=size) for row in zip(*columns, strict=True))
        self.requests = [
            row._replace(prefix_hashes=tuple(hashes[row.request_id]) if hashes else ())
            for row in rows
        ]

    def initial(self) -> Iterator[Request]:
        return iter(self.requests)

    def after(self, request_id: int, finish_s: float) -> None:
        del request_id, finish_s


def replay(case: Case, name: str, *, one_by_one: bool) -> tuple[Trace, Trace]:
    """A run that went one by one, and its replay."""
    trace = run_case(case, POLICIES[name], one_by_one=True)
    pace = Replayed.of(trace)
    source = Seen(trace, case.workload)
    again = simulate(source, POLICIES[name], case.limits, pace, one_by_one=one_by_one)  # pyright: ignore
    return trace, again


@pytest.mark.parametrize("one_by_one", [True, False])
@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=25)
@given(case=cases(prefixes=None))
def test_replay_gives_equal_decisions(name: str, one_by_one: bool, case: Case) -> None:
    trace, again = replay(case, name, one_by_one=one_by_one)
    assert expand(again) == expand(trace)
    assert expand(canonical(again)) == expand(canonical(trace))


def test_iterations_end_and_decisions_are_taken_when_they_were_logged() -> None:
    case = Case(recorded([(0.5, 4, 2), (9.0, 4, 2)]), ReplicaLimits(4, 64, 16, 99), Grid(0.5))
    trace = run_case(case, POLICIES["continuous"], one_by_one=True)
    late = [0.75, 1.5, 9.25, 10.0]  # a real panel decides a little after what it decides about
    ends = [1.25, 1.75, 9.75, 10.5]
    pace = Replayed(late, ends)
    again = simulate(Seen(trace, case.workload), POLICIES["continuous"], case.limits, pace)  # pyright: ignore
    assert again.iterations["start_s"].tolist() == late
    assert again.iterations["end_s"].tolist() == ends


def test_a_replay_that_goes_past_its_log_ends_all_the_same() -> None:
    case = Case(recorded([(0.0, 4, 6)]), ReplicaLimits(4, 64, 16, 99), Grid(0.5))
    trace = run_case(case, POLICIES["continuous"])
    pace = Replayed([0.0, 0.5], [0.5, 1.0])
    again = simulate(Seen(trace, case.workload), POLICIES["continuous"], case.limits, pace)  # pyright: ignore
    assert again.num_decisions == 6
