"""Source and check: what executors receive, and what is refused before a run."""

import random
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from sim.requests import Request
from sim.workload.base import CHUNK_ROWS, Workload
from sim.workload.closed_loop import ClosedLoop, ThinkTimes
from sim.workload.default import Default
from sim.workload.lengths import LengthDistribution
from sim.workload.poisson import Poisson
from sim.workload.recorded import Recorded, replayed
from sim.workload.source import Source

TOKENS = {"input_tokens": 100, "output_tokens": 20}


def _serve(workload: Workload, order_seed: int) -> tuple[list[Request], int]:
    """All requests of a run whose server answers in random order; most at a time."""
    chance = random.Random(order_seed)
    source = Source(workload, 3, 4096)
    running = list(source.initial())
    served, most, now_s = list(running), len(running), 0.0
    while running:
        now_s += chance.random()
        done = running.pop(chance.randrange(len(running)))
        following = source.after(done.request_id, now_s)
        if following is not None:
            assert following.arrival_s >= now_s
            running.append(following)
            served.append(following)
        most = max(most, len(running))
    return served, most


def _loop(num_clients: int, num_requests: int) -> ClosedLoop:
    return ClosedLoop(
        num_clients=num_clients,
        num_requests=num_requests,
        think_time_s=0.5,
        think_times=ThinkTimes.exponential,
        lengths=LengthDistribution.exponential,
        **TOKENS,
    )


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(0, 60), st.integers(0, 99))
def test_a_closed_loop_never_has_more_requests_out_than_clients(
    num_clients: int, more: int, order_seed: int
) -> None:
    served, most = _serve(_loop(num_clients, num_clients + more), order_seed)
    assert most == num_clients
    assert sorted(r.request_id for r in served) == list(range(num_clients + more))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 99), st.integers(0, 99))
def test_what_a_client_asks_does_not_depend_on_completion_order(left: int, right: int) -> None:
    def lengths(order_seed: int) -> dict[int, tuple[int, int]]:
        served, _ = _serve(_loop(5, 60), order_seed)
        return {r.request_id: (r.prompt_tokens, r.output_tokens) for r in served}

    assert lengths(left) == lengths(right)


def test_another_client_leaves_the_requests_of_the_others_alone() -> None:
    five = next(_loop(5, 50).columns(1)).prompt_tokens.reshape(-1, 5)
    six = next(_loop(6, 60).columns(1)).prompt_tokens.reshape(-1, 6)
    np.testing.assert_array_equal(five, six[:, :5])


def test_first_requests_of_clients_come_in_order_of_arrival() -> None:
    first = list(Source(_loop(9, 90), 1, 4096).initial())
    assert [r.arrival_s for r in first] == sorted(r.arrival_s for r in first)
    assert {r.request_id for r in first} == set(range(9))


def test_a_fixed_think_time_is_added_to_the_end_of_the_answer() -> None:
    loop = ClosedLoop(num_clients=2, num_requests=5, think_time_s=1.5, **TOKENS)
    source = Source(loop, 0, 4096)
    assert [(r.request_id, r.arrival_s) for r in source.initial()] == [(0, 1.5), (1, 1.5)]
    following = source.after(1, 10.0)
    assert following is not None
    assert (following.request_id, following.arrival_s) == (3, 11.5)
    assert source.after(3, 12.0) is None
    with pytest.raises(AssertionError, match="request 3 was issued before"):
        source.after(1, 13.0)
    assert [r.request_id for r in source.initial()] == [0, 1]


def test_an_open_loop_has_all_requests_at_once_and_none_after() -> None:
    source = Source(Default(), 1, 4096)
    requests = list(source.initial())
    assert [r.request_id for r in requests] == list(range(64))
    assert source.after(3, 1.0) is None
    assert list(source.initial()) == requests
    assert all(type(value) in (int, float, tuple) for r in requests for value in r)


def test_the_visible_limit_is_the_stated_one_or_what_the_context_leaves() -> None:
    entries = ([0.0, 1.0], [100, 990], [5, 6])
    free = Source(replayed(*entries), 0, 1000).initial()
    assert [r.max_output_tokens for r in free] == [900, 10]
    stated = Source(replayed(*entries, max_output_tokens=64), 0, 1000).initial()
    assert [r.max_output_tokens for r in stated] == [64, 10]


def test_requests_are_made_lazily_and_cheaply() -> None:
    source = Source(Poisson(rate_per_s=1.0, num_requests=3 * CHUNK_ROWS, **TOKENS), 1, 4096)
    next(source.initial())
    start_s = time.process_time()
    count = sum(1 for _ in source.initial())
    assert (time.process_time() - start_s) / count < 3e-6


def test_recorded_requests_come_back_as_they_were() -> None:
    first = list(Source(_loop(4, 40), 1, 4096).initial())
    columns = [np.array(column) for column in list(zip(*first, strict=True))[1:4]]
    again = list(Source(replayed(*columns, prefix_hashes=[[1, 2]] * 4), 99, 4096).initial())
    assert [r[1:5] for r in again] == [r[1:5] for r in first]
    assert again[0].prefix_hashes == (1, 2)
    loop = replayed([0.5] * 6, [7] * 6, [8] * 6, num_clients=2)
    served, most = _serve(loop, 1)
    assert (len(served), most) == (6, 2)


def test_workloads_compose_from_plain_values() -> None:
    given_values = {
        "stages": [{"rate_per_s": 1, "duration_s": 2}],
        "input_tokens": 5,
        "output_tokens": 6,
        "lengths": "exponential",
    }
    made = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Poisson), given_values))
    assert isinstance(made, Poisson)
    assert made.lengths is LengthDistribution.exponential
    entries = {"arrival_s": [0], "prompt_tokens": [1], "output_tokens": [1], "prefix_hashes": [[1]]}
    recorded = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Recorded), entries))
    assert recorded == replayed([0], [1], [1], prefix_hashes=[[1]])


def test_workloads_import_nothing_heavy() -> None:
    heavy = "{'torch', 'simpy', 'pandas', 'hydra', 'omegaconf', 'scipy'}"
    code = "import sys, sim.workload.source, sim.workload.poisson, sim.workload.azure_trace as a\n"
    code += f"assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
