"""Kernels over KV on several instances against their references, on CUDA or interpreted."""

from __future__ import annotations

import pytest
import torch
from distributed_cases import part_case, random_rows, ring_attention, stripe_of
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import DTYPES, TOLERANCE, assert_near, few_examples, offsets

from backends.kernels import part_decode_attention as decode
from backends.kernels.merge_parts import merge_parts, merge_parts_reference
from backends.kernels.part_decode_attention import (
    part_decode_attention,
    part_decode_attention_reference,
)
from backends.kernels.striped_prefill_attention import (
    Stripe,
    new_state,
    striped_prefill_attention,
    striped_prefill_attention_reference,
)


def assert_all_near(actual, expected, dtype):
    """Both are float32; what they were made from was rounded to `dtype`."""
    tolerance = TOLERANCE[dtype]
    for got, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


def check_part(device, lengths, split_tokens, dtype=torch.float32, **shape):
    case = part_case(lengths, device=device, dtype=dtype, **shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "split_tokens", lambda *_: split_tokens)
        actual = part_decode_attention(*case.arguments())
    assert_all_near(actual, part_decode_attention_reference(*case.arguments()), dtype)
    return actual


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [48, 64, 80])
def test_part(device, dtype, head_dim):
    check_part(device, [1, 0, 40, 17], 24, dtype, head_dim=head_dim)


@pytest.mark.parametrize("lengths", [[], [0, 0], [1], [16], [40, 0, 1]])
@pytest.mark.parametrize("split_tokens", [4, 256])
def test_part_of_few_requests(device, lengths, split_tokens):
    output, lse = check_part(device, lengths, split_tokens, num_kv_heads=1)
    for request, length in enumerate(lengths):
        assert (lse[request] == -torch.inf).all() == (length == 0)
        assert (output[request] == 0).all() == (length == 0)


@few_examples
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    split_tokens=st.integers(5, 50),
    num_kv_heads=st.integers(1, 2),
    group=st.integers(1, 17),
)
def test_part_of_any_shape(device, lengths, split_tokens, num_kv_heads, group):
    check_part(device, lengths, split_tokens, num_kv_heads=num_kv_heads, group=group)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("parts", "n", "num_heads", "head_dim"), [(1, 1, 1, 1), (5, 3, 2, 48)])
def test_merge(device, dtype, parts, n, num_heads, head_dim):
    outputs = torch.randn(parts, n, num_heads, head_dim, device=device)
    lses = torch.randn(parts, n, num_heads, device=device) * 4
    merged = merge_parts(outputs, lses, dtype)
    assert merged.dtype == dtype
    assert_near(merged, merge_parts_reference(outputs, lses, dtype))


@pytest.mark.parametrize("parts", [2, 8, 9, 20])
def test_merge_ignores_parts_without_keys(device, parts):
    wide = torch.randn(2 * parts, 4, 2, 24, device=device)
    outputs, lses = wide[::2], torch.randn(parts, 4, 2, device=device)
    outputs[0, 1:], lses[0, 1:] = torch.nan, -torch.inf
    lses[:, 3] = -torch.inf
    merged = merge_parts(outputs, lses)
    assert_near(merged, merge_parts_reference(outputs, lses, torch.float32))
    assert (merged[3] == 0).all()
    assert merge_parts(outputs[:, :0], lses[:, :0]).shape == (0, 2, 24)


def attend(of):
    def one_round(query, kv, queries, keys, state):
        of(query, kv, queries, keys, query.shape[2] ** -0.5, state)

    return one_round


def check_ring(device, lengths, instances, dtype=torch.float32, group=3, head_dim=24, heads=1):
    torch.manual_seed(sum(lengths))
    query = random_rows(sum(lengths), heads * group, head_dim, dtype, device)
    kv = (random_rows(sum(lengths), heads, head_dim, dtype, device) for _ in range(2))
    tokens = (query, *kv)
    actual = ring_attention(attend(striped_prefill_attention), tokens, lengths, instances)
    plain = attend(striped_prefill_attention_reference)
    assert_all_near(actual, ring_attention(plain, tokens, lengths, instances), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [48, 64])
def test_ring(device, dtype, head_dim):
    check_ring(device, [1, 71], 2, dtype, group=2, head_dim=head_dim)


@pytest.mark.parametrize(("lengths", "instances"), [([1], 3), ([2, 3, 1], 4), ([40], 1)])
def test_ring_of_short_prompts(device, lengths, instances):
    check_ring(device, lengths, instances)


@few_examples
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=2),
    instances=st.integers(1, 3),
    heads=st.integers(1, 2),
)
def test_ring_of_any_prompts(device, lengths, instances, heads):
    check_ring(device, lengths, instances, group=heads, heads=3 - heads)


def test_what_a_query_cannot_see_is_not_read(device):
    lengths = [1, 40]
    queries, keys = stripe_of(lengths, 0, 2, device), stripe_of(lengths, 1, 2, device)
    wide = torch.randn(2, len(keys.positions), 3, 24, device=device)
    state = new_state(len(queries.positions), 2, 24, device)
    state.lse[:1] = 0.5
    wide[:, -1] = torch.nan
    query = random_rows(len(queries.positions), 2, 24, device=device)
    kv = (wide[0, :, :1], wide[1, :, :1])
    striped_prefill_attention(query, kv, queries, keys, 1.0, state)
    assert state.output.isfinite().all()
    assert state.lse[0].tolist() == [0.5, 0.5]
    assert state.lse.isfinite().all(-1).tolist() == [True, False] + [True] * 19


def test_a_round_without_keys_changes_nothing(device):
    queries = stripe_of([5], 0, 1, device)
    keys = Stripe(torch.zeros(0, device=device).int(), offsets([0], device))
    state, query = new_state(5, 1, 16, device), torch.ones(5, 1, 16, device=device)
    striped_prefill_attention(query, (query[:0], query[:0]), queries, keys, 1.0, state)
    assert (state.lse == -torch.inf).all()
    assert (state.output == 0).all()
