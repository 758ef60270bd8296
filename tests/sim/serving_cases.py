"""What the tests of the simulated replica share: policies, costs, random loads and runs."""

from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from hardware_models.calibration import FittedIteration
from sim.costs.base import IterationCost, decode_shape
from sim.costs.fitted import Fitted
from sim.costs.kernel_cost import KernelCost
from sim.costs.kernel_model import KernelModel
from sim.costs.roofline import RooflineKernels
from sim.engine import ReplicaLimits
from sim.models.architecture import load_architecture
from sim.models.work import IterationShape
from sim.policies.batching.base import Batching
from sim.policies.registry import policies
from sim.processes.alone import simulate
from sim.processes.pace import Costed
from sim.trace import Trace
from sim.workload.base import Workload
from sim.workload.recorded import Recorded
from sim.workload.source import Source

CONTEXT = 1 << 20
TABLES = (
    "iterations", "requests", "events", "runs", "decisions", "spans", "routes", "answers",
    "hand_overs",
)  # fmt: skip
OTHER_SETTINGS = {
    "continuous": [{"watermark": 0.0}, {"watermark": 0.2}],
    "chunked_prefill": [{"chunk_tokens": 1}, {"chunk_tokens": 7}],
}
"""Hyper-parameters at which a rule takes other paths than at its defaults."""


def batching_policies() -> dict[str, Batching]:
    """Every rule in the batching folder at its defaults, and at some other settings."""
    found: dict[str, Batching] = {}
    for name, policy in policies("batching").items():
        found[name] = policy()
        for fields in OTHER_SETTINGS.get(name, []):
            found[f"{name}-{fields}"] = policy(**fields)
    return found


POLICIES = batching_policies()


class Grid:
    """Seconds in whole multiples of a step, so that boundaries and arrivals often coincide."""

    def __init__(self, step_s: float) -> None:
        self.step_s = step_s

    def iteration_s(self, shape: IterationShape) -> float:
        return self.step_s * (1 + shape.prefill_tokens // 7 + shape.decode_context // 16)

    def decode_run_s(self, num_decodes: int, decode_context: int, iterations: int) -> list[float]:
        return [
            self.iteration_s(decode_shape(num_decodes, decode_context + num_decodes * step))
            for step in range(iterations)
        ]

    def __repr__(self) -> str:
        return f"Grid({self.step_s})"


class PromptSeconds:
    """A prefill takes so many seconds a token and so many more; a decode takes a fixed time."""

    def __init__(self, token_s: float, prefill_s: float = 0.0, decode_s: float = 0.0) -> None:
        self.token_s, self.prefill_s, self.decode_s = token_s, prefill_s, decode_s

    def iteration_s(self, shape: IterationShape) -> float:
        prefill_s = shape.prefill_tokens * self.token_s + shape.num_prefills * self.prefill_s
        return prefill_s + (self.decode_s if shape.num_decodes else 0.0)

    def decode_run_s(self, num_decodes: int, decode_context: int, iterations: int) -> list[float]:
        del num_decodes, decode_context
        return [self.decode_s] * iterations


def ideal_roofline(
    model: str, *, flops_per_s: float, bytes_per_s: float, kv_dtype_bytes: int = 2,
    overhead_s: float = 0.0,
) -> KernelCost:  # fmt: skip
    """Peaks that every kernel reaches: what closed forms speak of."""
    kernels = RooflineKernels(
        load_architecture(model),
        KernelModel.ideal(flops_per_s, bytes_per_s),
        dtype_bytes=2,
        kv_dtype_bytes=kv_dtype_bytes,
    )
    return KernelCost(kernels, overhead_s)


def tiny_roofline(flops_per_s: float = 1e11, bytes_per_s: float = 3e9) -> KernelCost:
    return ideal_roofline(
        "tiny_llama", flops_per_s=flops_per_s, bytes_per_s=bytes_per_s, overhead_s=1e-4
    )


def tiny_fit() -> Fitted:
    coefficients = {
        "prefill_pair_s": 1.3e-6, "prefill_s": 2e-3, "decode_s": 1e-3, "context_token_s": 3e-5,
    }  # fmt: skip
    return Fitted(
        FittedIteration(
            body_tokens=[1.0, 8.0, 64.0],
            body_s=[0.01, 0.03, 0.11],
            head_tokens=[1.0, 32.0],
            head_s=[0.002, 0.005],
            coefficients=coefficients,
            heldout_median_error=0.0,
            heldout_p90_error=0.0,
            max_context_tokens=220,
            num_shapes=1,
            num_heldout=1,
            dtype="fp32",
        )
    )


COSTS: list[IterationCost] = [Grid(0.5), Grid(0.5), Grid(0.1), tiny_roofline(), tiny_fit()]


class Case(NamedTuple):
    """One replica and its load."""

    workload: Recorded
    limits: ReplicaLimits
    cost: IterationCost


@st.composite
def cases(
    draw: st.DrawFn,
    *,
    max_requests: int = 12,
    closed: bool | None = None,
    prefixes: bool | None = False,
) -> Case:
    """Small random loads on a KV pool that holds any one request and little more.

    Args:
        draw: Hypothesis's.
        max_requests: at most.
        closed: whether clients wait for their answers; None: either.
        prefixes: whether prompts share prefixes and the replica caches them; None: either.
    """
    cost = draw(st.sampled_from(COSTS))
    step_s = cost.step_s if isinstance(cost, Grid) else 0.05
    count = draw(st.integers(1, max_requests))
    row = st.tuples(st.integers(0, 4), st.integers(1, 20), st.integers(1, 25))
    rows = draw(st.lists(row, min_size=count, max_size=count))
    steps, prompts, outputs = (list(column) for column in zip(*rows, strict=True))
    loop = draw(st.booleans()) if closed is None else closed
    clients = draw(st.integers(1, 5)) if loop else None
    waits = steps if loop else np.cumsum(steps).tolist()
    shared = draw(st.booleans()) if prefixes is None else prefixes
    size = draw(st.sampled_from([4, 8, 3])) if shared else 512
    workload = Recorded(
        arrival_s=[step_s * wait for wait in waits],
        prompt_tokens=prompts,
        output_tokens=outputs,
        prefix_hashes=[draw(prefix(tokens, size)) for tokens in prompts] if shared else None,
        hash_block_tokens=size,
        num_clients=clients,
    )
    limits = draw(tight_limits(prompts, outputs))
    return Case(workload, limits._replace(prefix_caching=shared), cost)


@st.composite
def prefix(draw: st.DrawFn, prompt_tokens: int, size: int) -> list[int]:
    """Chain hashes of the blocks of a prompt, or of some: two families that part at random."""
    most = -(-prompt_tokens // size)
    path, one = [], 1
    for _ in range(draw(st.integers(0, most))):
        one = 2 * one + draw(st.sampled_from([0, 0, 0, 1]))
        path.append(one)
    return path


@st.composite
def tight_limits(draw: st.DrawFn, prompts: list[int], outputs: list[int]) -> ReplicaLimits:
    """Limits under which the longest request fits, and little beside it."""
    block_size = draw(st.sampled_from([1, 2, 4, 16]))
    seats = draw(st.sampled_from([6, 4, 3, 2, 1]))
    longest = max(map(sum, zip(prompts, outputs, strict=True)))
    num_blocks = -(-longest // block_size) + draw(st.integers(0, 4))
    return ReplicaLimits(seats, draw(st.integers(seats, 24)), block_size, num_blocks)


ROOMY = ReplicaLimits(8, 64, 16, 10_000)


def serve(
    workload: Workload,
    batching: Batching,
    limits: ReplicaLimits = ROOMY,
    cost: IterationCost | None = None,
    *,
    one_by_one: bool = False,
    schedules_ahead: bool = False,
    seed: int = 0,
) -> Trace:
    """One run of one replica."""
    source = Source(workload, seed, CONTEXT)
    pace = Costed(cost or Grid(0.5))
    return simulate(
        source, batching, limits, pace, one_by_one=one_by_one, schedules_ahead=schedules_ahead
    )


def run_case(
    case: Case, batching: Batching, *, one_by_one: bool = False, schedules_ahead: bool = False
) -> Trace:
    return serve(
        case.workload, batching, case.limits, case.cost,
        one_by_one=one_by_one, schedules_ahead=schedules_ahead,
    )  # fmt: skip


def assert_equal_traces(one: Trace, other: Trace) -> None:
    """Bit for bit, table by table, list by list."""
    for table in TABLES:
        columns, others = getattr(one, table), getattr(other, table)
        assert list(columns) == list(others)
        for name, column in columns.items():
            np.testing.assert_array_equal(column, others[name], f"{table}.{name}", strict=True)
    assert set(one.decision_lists) == set(other.decision_lists)
    for name, ragged in one.decision_lists.items():
        same = other.decision_lists[name]
        np.testing.assert_array_equal(ragged.offsets, same.offsets, name, strict=True)
        np.testing.assert_array_equal(ragged.values, same.values, name, strict=True)
    assert dict(one.span_names) == dict(other.span_names)


def recorded(rows: list[tuple[float, int, int]], num_clients: int | None = None) -> Recorded:
    """A workload of (arrival, prompt tokens, output tokens)."""
    arrivals, prompts, outputs = (list(column) for column in zip(*rows, strict=True))
    return Recorded(
        arrival_s=[float(arrival) for arrival in arrivals],
        prompt_tokens=prompts,
        output_tokens=outputs,
        num_clients=num_clients,
    )
