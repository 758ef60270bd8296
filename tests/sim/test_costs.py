"""Costs: the vector form is the scalar form, and both follow their formula."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_cases import ideal_roofline, tiny_fit, tiny_roofline

from sim.costs.base import IterationCost, decode_shape
from sim.costs.fitted import Fitted, interpolate
from sim.costs.kernel_model import KernelModel
from sim.costs.roofline import RooflineKernels
from sim.models.architecture import known_architectures, load_architecture
from sim.models.work import IterationShape, iteration_operators
from sim.processes.pace import Costed

LLAMA = ideal_roofline("llama_3_8b", flops_per_s=312e12, bytes_per_s=2.039e12, kv_dtype_bytes=1)
COSTS = {"tiny": tiny_roofline(), "llama": LLAMA, "fitted": tiny_fit()}
EVERY_COST = pytest.mark.parametrize("name", COSTS)
BATCH = (st.integers(1, 64), st.integers(1, 4096))


@EVERY_COST
@settings(max_examples=150)
@given(
    num_decodes=BATCH[0],
    context=BATCH[1],
    iterations=st.one_of(st.integers(1, 60), st.sampled_from([11, 12, 13])),
)
def test_the_vector_form_equals_the_scalar_form_bit_for_bit(
    name: str, num_decodes: int, context: int, iterations: int
) -> None:
    cost, first = COSTS[name], num_decodes * context
    run_s = cost.decode_run_s(num_decodes, first, iterations)
    shapes = [decode_shape(num_decodes, first + num_decodes * step) for step in range(iterations)]
    assert run_s == [cost.iteration_s(shape) for shape in shapes]
    assert all(type(seconds) is float for seconds in run_s)


@EVERY_COST
@settings(max_examples=50)
@given(now_s=st.floats(0, 1e6), num_decodes=BATCH[0], iterations=st.integers(1, 60))
def test_boundaries_are_those_of_one_iteration_after_the_other(
    name: str, now_s: float, num_decodes: int, iterations: int
) -> None:
    pace, context = Costed(COSTS[name]), 7 * num_decodes
    boundaries = [now_s]
    for step in range(iterations):
        shape = decode_shape(num_decodes, context + num_decodes * step)
        boundaries.append(pace.iteration(boundaries[-1], shape)[1])
    assert pace.decode_run(now_s, num_decodes, context, iterations) == boundaries
    durations_s = COSTS[name].decode_run_s(num_decodes, context, iterations)
    assert np.add.accumulate([now_s, *durations_s]).tolist() == boundaries


@EVERY_COST
@given(context=st.integers(1, 10_000), more=st.integers(0, 10_000), num_decodes=BATCH[0])
def test_more_context_and_more_requests_never_cost_less(
    name: str, context: int, more: int, num_decodes: int
) -> None:
    cost = COSTS[name]
    assert seconds(cost, num_decodes, context) <= seconds(cost, num_decodes, context + more)
    assert seconds(cost, num_decodes, context) <= seconds(cost, num_decodes + 1, context)


def seconds(cost: IterationCost, num_decodes: int, context: int) -> float:
    return cost.iteration_s(decode_shape(num_decodes, context))


@EVERY_COST
@given(tokens=st.integers(1, 2000), before=st.integers(0, 2000))
def test_a_longer_chunk_never_costs_less(name: str, tokens: int, before: int) -> None:
    short = IterationShape.of([(tokens, before)], (), 1)
    long = IterationShape.of([(tokens + 1, before)], (), 1)
    assert 0 < COSTS[name].iteration_s(short) <= COSTS[name].iteration_s(long)


def test_one_matrix_product_takes_the_longer_of_computing_and_moving() -> None:
    architecture = load_architecture("tiny_llama")
    shape = IterationShape.of([(100, 0)], (), 1)
    down = next(one for one in iteration_operators(architecture, shape, 2, 2) if one.name == "down")
    rows, inner, hidden = 100, architecture.intermediate_size, architecture.hidden_size
    flops = 2 * rows * inner * hidden
    moved = 2 * (rows * inner + inner * hidden + rows * hidden)
    layers = architecture.num_layers
    slow_math = KernelModel.ideal(1e9, 1e15)
    assert kernels(slow_math).product_s(down, 100) == pytest.approx(layers * flops / 1e9, rel=1e-12)
    slow_memory = KernelModel.ideal(1e18, 1e9)
    moving_s = kernels(slow_memory).product_s(down, 100)
    assert moving_s == pytest.approx(layers * moved / 1e9, rel=1e-12)


def kernels(model: KernelModel) -> RooflineKernels:
    return RooflineKernels(load_architecture("tiny_llama"), model, dtype_bytes=2, kv_dtype_bytes=2)


@pytest.mark.parametrize("model", known_architectures())
@pytest.mark.parametrize(
    "shape",
    [IterationShape.of([(100, 28), (7, 0)], (), 1), IterationShape.of((), (9, 700), 2),
     IterationShape.of([(33, 5)], (80, 81, 900), 4)],
    ids=["prefill", "decode", "mixed"],
)  # fmt: skip
def test_an_iteration_takes_the_sum_of_its_operators_and_the_overhead(
    model: str, shape: IterationShape
) -> None:
    flops_per_s, bytes_per_s = 3e12, 2e11
    cost = ideal_roofline(model, flops_per_s=flops_per_s, bytes_per_s=bytes_per_s, overhead_s=0.125)
    total_s = 0.125
    for operator in iteration_operators(load_architecture(model), shape, 2, 2):
        moved = operator.bytes_read + operator.bytes_written
        longer_s = max(operator.flops / flops_per_s, moved / bytes_per_s)
        total_s += operator.count * longer_s
    assert cost.iteration_s(shape) == pytest.approx(total_s, rel=1e-9)


def test_a_fit_is_its_formula() -> None:
    cost = tiny_fit()
    shape = IterationShape.of([(10, 4), (6, 0)], (7, 9, 11), 4)
    body_s = 0.03 + (19 - 8) / (64 - 8) * (0.11 - 0.03)
    head_s = 0.002 + 3 / 31 * 0.003
    pairs = 10 * 4 + 55 + 21
    rest_s = pairs * 1.3e-6 + 2 * 2e-3 + 3 * 1e-3 + 27 * 3e-5
    assert cost.iteration_s(shape) == pytest.approx(body_s + head_s + rest_s, rel=1e-12)


@given(st.floats(0.5, 200))
def test_interpolation_meets_the_knots_and_is_numpys_between_them(at: float) -> None:
    knots, values = [1.0, 8.0, 64.0], [0.01, 0.03, 0.11]
    assert [interpolate(knots, values, knot) for knot in knots] == pytest.approx(values, rel=1e-12)
    if 1 <= at <= 64:
        expected = np.interp(at, knots, values)
        assert interpolate(knots, values, at) == pytest.approx(expected, rel=1e-12)
    elif at > 64:
        slope = (0.11 - 0.03) / (64 - 8)
        assert interpolate(knots, values, at) == pytest.approx(0.11 + slope * (at - 64), rel=1e-9)


def test_no_tokens_take_no_time() -> None:
    assert interpolate([1.0, 2.0], [3.0, 4.0], 0) == 0.0


def test_a_fit_that_lacks_a_coefficient_is_refused() -> None:
    fit = tiny_fit().fit
    with pytest.raises(ValueError, match=r"coefficients=.*must be.*context_token_s"):
        Fitted(dataclasses.replace(fit, coefficients={"prefill_s": 1.0}))
