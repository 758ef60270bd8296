"""Attention over parts of the keys, merged, is attention over all of them."""

from __future__ import annotations

import pytest
import torch
from distributed_cases import part_case, pool_of, random_rows, ring_attention, stripe_of
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DTYPES, assert_near, offsets, plain_attention

from backends.kernels import part_decode_attention as decode
from backends.kernels import striped_prefill_attention as striped
from backends.kernels.merge_parts import merge_parts_reference
from backends.kernels.part_decode_attention import part_decode_attention_reference
from backends.kernels.striped_prefill_attention import (
    Stripe,
    new_state,
    striped_prefill_attention_reference,
)

heads = st.fixed_dictionaries(
    {
        "num_kv_heads": st.integers(1, 3),
        "group": st.integers(1, 4),
        "head_dim": st.sampled_from([2, 16, 48]),
        "dtype": st.sampled_from(DTYPES),
    }
)


def plain_lse(query, key, scale):
    """Of one query [num_heads, head_dim] over keys, with Python's own order of summation."""
    key = key.double().repeat_interleave(query.shape[0] // key.shape[1], dim=1)
    return torch.einsum("hd,khd->hk", query.double() * scale, key).exp().sum(1).log()


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(0, 150), min_size=1, max_size=5), heads=heads)
def test_a_part_is_attention_and_log_sum_exp_over_its_own_rows(lengths, heads):
    case = part_case(lengths, **heads)
    output, lse = part_decode_attention_reference(*case.arguments())
    assert (output.dtype, lse.dtype) == (torch.float32, torch.float32)
    for request, rows in enumerate(case.slots.long().split(lengths)):
        if len(rows) == 0:
            assert (output[request] == 0).all()
            assert (lse[request] == -torch.inf).all()
            continue
        key, value, query = case.key[rows], case.value[rows], case.query[request]
        plain = plain_attention(query[None], key, value, case.scale)
        assert_near(output[request].to(case.query.dtype), plain[0])
        torch.testing.assert_close(
            lse[request].double(), plain_lse(query, key, case.scale), rtol=1e-5, atol=1e-5
        )


@settings(max_examples=50, deadline=None)
@given(data=st.data(), parts=st.integers(1, 5), heads=heads)
def test_any_split_of_the_kv_merges_into_full_attention(data, parts, heads):
    heads |= {"dtype": torch.float32}
    lengths = data.draw(st.lists(st.integers(1, 60), min_size=1, max_size=4))
    whole = part_case(lengths, **heads)
    owners = [
        torch.tensor(data.draw(st.lists(st.integers(0, parts - 1), min_size=n, max_size=n)))
        for n in lengths
    ]
    rows = [rows.long() for rows in whole.slots.split(lengths)]
    attended = []
    for part in range(parts):
        mine = [row[owner == part] for row, owner in zip(rows, owners, strict=True)]
        key, slots = pool_of([whole.key[row] for row in mine])
        value = torch.full_like(key, torch.nan)
        value[slots] = torch.cat([whole.value[row] for row in mine])
        starts = offsets([*map(len, mine)])
        attended.append(
            part_decode_attention_reference(whole.query, key, value, slots, starts, whole.scale)
        )
    outputs, lses = (torch.stack(tensors) for tensors in zip(*attended, strict=True))
    merged = merge_parts_reference(outputs, lses, torch.float32)
    for query, row, got in zip(whole.query, rows, merged, strict=True):
        expected = plain_attention(query[None], whole.key[row], whole.value[row], whole.scale)
        torch.testing.assert_close(got, expected[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("allowed", [0, 10, 10**6])
def test_how_requests_are_put_together_changes_nothing(monkeypatch, allowed):
    case = part_case([3, 90, 0, 64, 3, 1])
    expected = part_decode_attention_reference(*case.arguments())
    monkeypatch.setattr(decode, "MAX_PADDING_TOKENS", allowed)
    for got, before in zip(
        part_decode_attention_reference(*case.arguments()), expected, strict=True
    ):
        torch.testing.assert_close(got, before, rtol=1e-6, atol=1e-6)


def test_what_an_ignored_part_holds_is_not_read():
    outputs, lses = torch.randn(3, 4, 2, 8), torch.randn(3, 4, 2)
    outputs[1, :2], lses[1, :2] = torch.nan, -torch.inf
    lses[:, 0] = -torch.inf
    merged = merge_parts_reference(outputs, lses, torch.float32)
    assert (merged[0] == 0).all()
    torch.testing.assert_close(
        merged[1], merge_parts_reference(outputs[[0, 2]], lses[[0, 2]], torch.float32)[1]
    )
    assert merged.isfinite().all()


def test_weights_of_a_merge_are_the_powers_of_their_log_sum_exps():
    outputs = torch.tensor([1.0, 5.0])[:, None, None, None]
    lses = torch.tensor([1000.0, 1000.0 + torch.tensor(3.0).log()])[:, None, None]
    torch.testing.assert_close(
        merge_parts_reference(outputs, lses, torch.float32), torch.full((1, 1, 1), 4.0), rtol=1e-4,
        atol=0.0,
    )  # fmt: skip


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=4),
    instances=st.integers(1, 5),
    num_kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    rows=st.sampled_from([1, 7, 256]),
)
def test_a_ring_of_stripes_is_full_causal_attention(lengths, instances, num_kv_heads, group, rows):
    torch.manual_seed(sum(lengths))
    query = random_rows(sum(lengths), num_kv_heads * group, 16)
    key, value = (random_rows(sum(lengths), num_kv_heads, 16) for _ in range(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(striped, "REFERENCE_ROWS", rows)
        output, _ = ring_attention(one_round(16), (query, key, value), lengths, instances)
    parts = (tensor.split(lengths) for tensor in (query, key, value, output))
    for prompt, keys, values, got in zip(*parts, strict=True):
        expected = plain_attention(prompt, keys, values, 16**-0.5)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def one_round(head_dim):
    def attend(query, kv, queries, keys, state):
        striped_prefill_attention_reference(query, kv, queries, keys, head_dim**-0.5, state)

    return attend


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_ring_ends_with_the_log_sum_exp_of_all_keys_up_to_each(dtype):
    lengths = [1, 33, 2]
    query = random_rows(36, 4, 16, dtype)
    key, value = (random_rows(36, 2, 16, dtype) for _ in range(2))
    _, lse = ring_attention(one_round(16), (query, key, value), lengths, 4)
    token = 0
    for first, length in zip((0, 1, 34), lengths, strict=True):
        for last in range(first, first + length):
            expected = plain_lse(query[last], key[first : last + 1], 16**-0.5)
            torch.testing.assert_close(lse[last].double(), expected, rtol=1e-5, atol=1e-5)
            token += 1
    assert token == 36


def test_a_query_that_sees_nothing_keeps_its_state_to_the_bit():
    lengths = [1, 40]
    queries, keys = stripe_of(lengths, 0, 4), stripe_of(lengths, 1, 4)
    state = new_state(len(queries.positions), 2, 8, "cpu")
    state.output.normal_()
    state.lse.normal_()
    before = [tensor.clone() for tensor in state]
    kv = (torch.randn(len(keys.positions), 1, 8), torch.randn(len(keys.positions), 1, 8))
    arguments = (torch.randn(len(queries.positions), 2, 8), kv, queries, keys, 1.0, state)
    striped_prefill_attention_reference(*arguments)
    is_blind = queries.positions == 0
    assert is_blind.tolist() == [True, True] + [False] * 9
    for tensor, old in zip(state, before, strict=True):
        assert torch.equal(tensor[is_blind], old[is_blind])
        assert (tensor[~is_blind] != old[~is_blind]).any(-1).all()


def test_keys_after_the_last_query_are_not_read():
    queries = Stripe(torch.tensor([0, 4, 8]).int(), offsets([3]))
    keys = Stripe(torch.tensor([2, 6, 10, 14]).int(), offsets([4]))
    kv = torch.randn(2, 4, 1, 8)
    kv[:, 2:] = torch.nan
    state = new_state(3, 1, 8, "cpu")
    striped_prefill_attention_reference(torch.randn(3, 1, 8), tuple(kv), queries, keys, 1.0, state)
    assert state.output.isfinite().all()
    assert state.lse.isfinite().tolist() == [[False], [True], [True]]
