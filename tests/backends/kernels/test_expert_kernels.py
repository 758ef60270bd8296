"""The kernels of a mixture of experts against their references, on CUDA or interpreted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import DTYPES, assert_near, few_examples
from mixture_cases import expert_weights, gate_case, in_wider_rows

from backends.kernels.expert_combine import expert_combine, expert_combine_reference
from backends.kernels.expert_ffn import expert_ffn, expert_ffn_reference
from backends.kernels.expert_gate import (
    expert_gate,
    expert_gate_reference,
    scatter_rows,
    scatter_rows_reference,
)


def check_gate(device, tokens, experts, top_k, hidden=24, renormalise=True, **options):
    rows, gate_weight = gate_case(tokens, experts, hidden, device=device, **options)
    routed = expert_gate(rows, gate_weight, top_k, renormalise)
    expected = expert_gate_reference(rows, gate_weight, top_k, renormalise)
    for name in ("expert_ids", "counts", "slots"):
        assert torch.equal(getattr(routed, name), getattr(expected, name)), name
    assert_near(routed.weights, expected.weights)
    assert torch.equal(scatter_rows(rows, routed), scatter_rows_reference(rows, expected))
    return routed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("hidden", [1, 33, 200])
def test_gate(device, dtype, renormalise, hidden):
    check_gate(device, 37, 6, 2, hidden, renormalise, dtype=dtype)


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k"),
    [
        (0, 3, 2), (1, 1, 1), (1, 20, 3), (5, 8, 8), (16, 5, 2), (17, 17, 17), (100, 300, 4),
        (2053, 3, 2),
    ],
)  # fmt: skip
def test_gate_of_few_and_of_many(device, tokens, experts, top_k):
    check_gate(device, tokens, experts, top_k, hidden=8)


@pytest.mark.parametrize("tokens", [7, 50])
def test_gate_counts_who_gets_all_and_who_gets_none(device, tokens):
    counts = check_gate(device, tokens, 6, 2, skewed=True).counts.tolist()
    assert (counts[0], counts[-1], sum(counts)) == (0, tokens, 2 * tokens)


@few_examples
@given(data=st.data(), tokens=st.integers(1, 50), experts=st.integers(1, 20))
def test_gate_of_any_shape(device, data, tokens, experts):
    top_k, hidden = data.draw(st.integers(1, experts)), data.draw(st.integers(1, 40))
    check_gate(device, tokens, experts, top_k, hidden)


def test_experts_without_any_probability_are_still_chosen_by_their_ids(device):
    gate_weight = torch.zeros(5, 8, device=device)
    gate_weight[2] = 25.0
    routed = expert_gate(torch.ones(3, 8, device=device), gate_weight, 5)
    assert routed.expert_ids.tolist() == [[2, 0, 1, 3, 4]] * 3
    assert routed.weights.tolist() == [[1.0, 0.0, 0.0, 0.0, 0.0]] * 3
    assert routed.counts.tolist() == [3] * 5


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # of numpy, which interprets
def test_a_token_of_nan_goes_somewhere_and_harms_no_other(device):
    rows, gate_weight = gate_case(20, 6, 24, device=device)
    sound = expert_gate(rows, gate_weight, 2)
    rows[3] = torch.nan
    routed, expected = (run(rows, gate_weight, 2) for run in (expert_gate, expert_gate_reference))
    others = torch.arange(20, device=device) != 3
    assert torch.equal(routed.expert_ids[others], sound.expert_ids[others])
    assert torch.equal(routed.weights[others], sound.weights[others])
    assert routed.weights[3].isnan().all()
    for name in ("expert_ids", "counts", "slots"):
        assert torch.equal(getattr(routed, name), getattr(expected, name)), name


def check_ffn(device, counts, hidden, inner, dtype=torch.float32):
    gate_up, down = expert_weights(len(counts), hidden, inner, dtype=dtype, device=device)
    rows = in_wider_rows(torch.randn(sum(counts), hidden).to(device, dtype))
    arguments = (rows, torch.tensor(counts, dtype=torch.int32, device=device), gate_up, down)
    assert_near(expert_ffn(*arguments), expert_ffn_reference(*arguments))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("hidden", "inner"), [(72, 40), (33, 130), (1, 1)])
def test_ffn(device, dtype, hidden, inner):
    check_ffn(device, [1, 0, 40, 2, 17], hidden, inner, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "counts",
    [[1], [0, 0, 0], [0, 1, 0], [16, 16], [33, 0, 65], [0, 129], [200, 3], [1] * 20, [0] * 9 + [5]],
)
def test_ffn_of_even_and_uneven_routing(device, counts, dtype):
    check_ffn(device, counts, 24, 40, dtype)


@few_examples
@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    hidden=st.integers(1, 70),
    inner=st.integers(1, 70),
)
def test_ffn_of_any_shape(device, counts, hidden, inner):
    check_ffn(device, counts, hidden, inner)


def check_combine(device, tokens, top_k, hidden, dtype=torch.float32):
    num_rows = 2 * tokens * top_k + 1
    slots = torch.randint(num_rows // 2 + 1, (tokens, top_k), device=device).int() * 2
    rows = torch.full((num_rows, hidden), torch.nan)
    rows[::2] = torch.randn(len(rows[::2]), hidden)
    rows = in_wider_rows(rows.to(device, dtype))
    weights = in_wider_rows(torch.rand(tokens, top_k, device=device))
    arguments = (rows, in_wider_slots(slots), weights)
    assert_near(expert_combine(*arguments), expert_combine_reference(*arguments))


def in_wider_slots(slots):
    return torch.cat((slots, torch.full_like(slots, 2**30)), dim=1)[:, : slots.shape[1]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "top_k", "hidden"), [(1, 1, 1), (5, 2, 72), (3, 8, 1030), (0, 2, 8), (17, 3, 33)]
)
def test_combine(device, dtype, tokens, top_k, hidden):
    check_combine(device, tokens, top_k, hidden, dtype)


@pytest.mark.parametrize("combine", [expert_combine, expert_combine_reference])
def test_combine_adds_in_float32_in_the_order_of_the_choices(device, combine):
    slots = torch.tensor([[0, 1, 2], [0, 2, 1]], device=device).int()
    weights = torch.ones(2, 3, device=device)
    rows = torch.tensor([[2.0**24], [1.0], [-(2.0**24)]], device=device)
    assert combine(rows, slots, weights).tolist() == [[0.0], [1.0]]
    halves = torch.tensor([[2048.0], [1.0], [1.0]], device=device).half()
    assert combine(halves, slots, weights).tolist() == [[2050.0], [2050.0]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_operators_together_are_their_references_together(device, dtype):
    rows, gate_weight = gate_case(45, 7, 40, dtype=dtype, device=device)
    weights = expert_weights(7, 40, 24, dtype=dtype, device=device)
    routed = expert_gate(rows, gate_weight, 3)
    output = expert_ffn(scatter_rows(rows, routed), routed.counts, *weights)
    actual = expert_combine(output, routed.slots, routed.weights)
    plain = expert_gate_reference(rows, gate_weight, 3)
    output = expert_ffn_reference(scatter_rows_reference(rows, plain), plain.counts, *weights)
    assert_near(actual, expert_combine_reference(output, plain.slots, plain.weights))
