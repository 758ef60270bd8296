"""A replica against queueing theory and closed forms: no tuning, no fitted constant."""

import numpy as np
import pytest
from serving_cases import POLICIES, Grid, PromptSeconds, recorded, serve, tiny_fit, tiny_roofline

from sim.costs.base import IterationCost, decode_shape
from sim.engine import ReplicaLimits
from sim.metrics import request_times
from sim.models.work import IterationShape
from sim.policies.batching.chunked_prefill import ChunkedPrefill
from sim.policies.batching.continuous import Continuous
from sim.policies.batching.static import Static
from sim.workload.lengths import LengthDistribution
from sim.workload.poisson import Poisson

ONE_SEAT = ReplicaLimits(1, 1 << 20, 16, 1 << 20)
NUM_REQUESTS = 20_000
RULES = [Static(), Continuous(), ChunkedPrefill()]


def queue(rate_per_s: float, input_tokens: int, lengths: LengthDistribution) -> Poisson:
    """Requests whose only token comes from their prefill: the replica is a single server."""
    return Poisson(
        rate_per_s=rate_per_s,
        num_requests=NUM_REQUESTS,
        input_tokens=input_tokens,
        output_tokens=1,
        lengths=lengths,
        max_output_tokens=1,
    )


def mean_and_error(values: np.ndarray, num_batches: int = 20) -> tuple[float, float]:
    """Mean of a correlated series, and its standard error from the means of long batches."""
    means = np.array([batch.mean() for batch in np.array_split(values, num_batches)])
    return float(means.mean()), float(means.std(ddof=1) / np.sqrt(num_batches))


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
@pytest.mark.parametrize("policy", RULES, ids=lambda policy: type(policy).__name__)
def test_constant_service_is_m_d_1(policy: Continuous, load: float) -> None:
    workload = queue(load, 8, LengthDistribution.fixed)
    trace = serve(workload, policy, ONE_SEAT, PromptSeconds(0.0, prefill_s=1.0))
    wait_s, error_s = mean_and_error(request_times(trace).queue_s)
    assert error_s < 0.1 * wait_s
    assert wait_s == pytest.approx(load / (2 * (1 - load)), abs=3 * error_s)


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_exponential_service_is_m_m_1_with_the_rounding_of_lengths_by_pollaczek_khinchine(
    load: float,
) -> None:
    # Service of one second on average: exponential lengths of mean 1000 tokens, 1 ms each.
    workload = queue(load, 1000, LengthDistribution.exponential)
    trace = serve(workload, Continuous(), ONE_SEAT, PromptSeconds(1e-3))
    wait_s, error_s = mean_and_error(request_times(trace).queue_s)
    service_s = trace.requests["prompt_tokens"] * 1e-3
    assert service_s.mean() == pytest.approx(1, rel=0.03)
    exact_s = load * (service_s**2).mean() / (2 * (1 - load * service_s.mean()))
    assert exact_s == pytest.approx(load / (1 - load), rel=0.25)
    assert wait_s == pytest.approx(exact_s, abs=3 * error_s)


@pytest.mark.parametrize(
    "cost", [Grid(0.5), tiny_roofline(), tiny_fit()], ids=["grid", "roofline", "fitted"]
)
@pytest.mark.parametrize("name", POLICIES)
def test_a_single_request_takes_its_prefill_and_its_decodes(name: str, cost: IterationCost) -> None:
    trace = serve(recorded([(0.0, 5, 30)]), POLICIES[name], cost=cost)
    times = request_times(trace)
    decodes_s = cost.decode_run_s(1, 6, 29)
    assert decodes_s == [cost.iteration_s(decode_shape(1, 6 + step)) for step in range(29)]
    chunk = 1 if "chunk_tokens': 1" in name else 5
    chunks = [IterationShape.of([(chunk, at)], (), at + chunk == 5) for at in range(0, 5, chunk)]
    prefill_s = np.add.accumulate([0.0, *map(cost.iteration_s, chunks)])[-1]
    assert times.ttft_s.tolist() == [prefill_s]
    assert times.last_token_s.tolist() == [np.add.accumulate([prefill_s, *decodes_s])[-1]]
    assert times.tpot_s[0] == pytest.approx(np.mean(decodes_s), rel=1e-12)


def test_a_static_batch_takes_its_prefill_and_its_longest_answer() -> None:
    answers = [3, 9, 5, 2, 7]
    load = recorded([(0.0, 4, answer) for answer in answers])
    cost = PromptSeconds(token_s=0.25, decode_s=0.5)
    trace = serve(load, Static(), ReplicaLimits(2, 64, 16, 999), cost)
    # Waves of two seats: each prefills its prompts, then decodes until its longest answer ends.
    waves = [answers[at : at + 2] for at in range(0, 5, 2)]
    makespan_s = sum(len(wave) * 4 * 0.25 + (max(wave) - 1) * 0.5 for wave in waves)
    assert trace.iterations["end_s"][-1] == makespan_s


def test_continuous_batching_refills_a_seat_at_the_boundary_at_which_it_falls_free() -> None:
    load = recorded([(0.0, 4, 3), (0.0, 4, 9), (0.0, 4, 2)])
    cost = PromptSeconds(token_s=0.25, decode_s=0.5)
    trace = serve(load, Continuous(), ReplicaLimits(2, 64, 16, 999), cost)
    times = request_times(trace)
    assert times.scheduled_s.tolist() == [0.0, 0.0, 3.0]
    assert times.first_token_s.tolist() == [2.0, 2.0, 4.0]
    assert times.last_token_s.tolist() == [3.0, 7.0, 4.5]


def test_chunked_prefill_lets_decodes_go_on_beside_a_long_prompt() -> None:
    load = recorded([(0.0, 4, 6), (0.5, 12, 1)])
    cost = PromptSeconds(token_s=0.25, decode_s=0.5)
    trace = serve(load, ChunkedPrefill(), ReplicaLimits(2, 5, 16, 999), cost)
    # From 1 s on: 1 decode and 4 of 12 prompt tokens an iteration of 1.5 s, three times.
    times = request_times(trace)
    assert times.first_token_s.tolist() == [1.0, 5.5]
    assert times.last_token_s.tolist() == [6.5, 5.5]
