"""Time is extrapolated or not whatever number of iterations one event takes."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_cases import POLICIES, Case, cases, recorded, run_case, serve, tiny_fit, tiny_roofline

from sim.cost_shares import cost_shares
from sim.costs.fitted import Fitted
from sim.trace import Trace


def narrow_fit(context: int, batch: float = 64.0, sampled: float = 32.0) -> Fitted:
    """A fit of measurements up to so many tokens of context, of a batch and sampled."""
    knots = {"body_tokens": [0.5, 1.0, batch], "head_tokens": [1.0, sampled]}
    return Fitted(replace(tiny_fit().fit, max_context_tokens=context, **knots))


def extrapolated_one_by_one(trace: Trace, fit: Fitted) -> float:
    """The share from a trace in which every iteration is a decision."""
    assert (trace.decisions["repeat"] == 1).all()
    of = trace.decisions
    contexts = of["decode_context"] / np.maximum(of["num_decodes"], 1)
    prompts = of["prefill_context"] / np.maximum(of["num_prefills"], 1)
    most = fit.fit
    beyond = (
        (of["prefill_tokens"] + of["num_decodes"] > most.body_tokens[-1])
        | (of["sampled_tokens"] > most.head_tokens[-1])
        | (contexts > most.max_context_tokens)
        | (prompts > most.body_tokens[-1])
    )
    seconds = trace.iterations["end_s"] - trace.iterations["start_s"]
    return float(seconds[beyond].sum() / seconds.sum())


def test_a_stretch_is_extrapolated_from_the_step_that_crosses_the_largest_context() -> None:
    load, fit = recorded([(0, 60, 2000)]), tiny_fit()
    slow = serve(load, POLICIES["continuous"], cost=fit, one_by_one=True)
    expected = extrapolated_one_by_one(slow, fit)
    assert 0.9 < expected < 1.0
    for trace in (serve(load, POLICIES["continuous"], cost=fit), slow):
        shares = cost_shares(fit, [trace])
        assert shares["extrapolated"] == pytest.approx(expected)
        assert sum(shares.values()) == pytest.approx(1.0)


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=40)
@given(
    case=cases(),
    context=st.integers(1, 40),
    batch=st.integers(2, 30),
    sampled=st.integers(2, 6),
)
def test_shares_of_macro_steps_are_those_of_single_steps(
    name: str, case: Case, context: int, batch: int, sampled: int
) -> None:
    fit = narrow_fit(context, float(batch), float(sampled))
    case = case._replace(cost=fit)
    fast = run_case(case, POLICIES[name])
    slow = run_case(case, POLICIES[name], one_by_one=True)
    expected = extrapolated_one_by_one(slow, fit)
    for trace in (fast, slow):
        found = cost_shares(fit, [trace])["extrapolated"]
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_a_chunk_that_ends_a_longer_context_than_was_measured_is_extrapolated() -> None:
    load = recorded([(0, 65, 1)])
    policy = POLICIES["chunked_prefill-{'chunk_tokens': 7}"]
    trace = serve(load, policy, cost=tiny_fit())
    seconds = trace.iterations["end_s"] - trace.iterations["start_s"]
    assert trace.decisions["prefill_context"][-2:].tolist() == [63, 65]
    share = cost_shares(tiny_fit(), [trace])["extrapolated"]
    assert share == pytest.approx(seconds[-1] / seconds.sum())


def test_a_roofline_is_of_the_datasheet_alone() -> None:
    trace = serve(recorded([(0, 9, 9)]), POLICIES["static"], cost=tiny_roofline())
    assert cost_shares(tiny_roofline(), [trace]) == {"datasheet roofline": 1.0}
