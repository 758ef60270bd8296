"""Every kernel against its reference: on CUDA, or interpreted (test_interpreter.py starts that)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import (
    DTYPES,
    assert_near,
    few_examples,
    in_each_dtype,
    offsets,
    paged_case,
    random_query,
)

from backends.kernels.paged import KvCache
from backends.kernels.paged_decode_attention import (
    paged_decode_attention,
    paged_decode_attention_reference,
)
from backends.kernels.paged_prefill_attention import (
    paged_prefill_attention,
    paged_prefill_attention_reference,
)
from backends.kernels.rms_norm import rms_norm, rms_norm_reference
from backends.kernels.rotary_kv_write import (
    Rotation,
    rotary_kv_write,
    rotary_kv_write_reference,
    rotary_tables,
)

HEAD_DIMS = (64, 48, 80)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "hidden"), [(1, 576), (5, 72), (3, 1), (0, 8), (2, 5000)])
def test_norm(device, dtype, tokens, hidden):
    x, residual = (torch.randn(tokens, hidden + 3, device=device).to(dtype) for _ in range(2))
    x, residual = x[:, :hidden], residual[:, 3:]
    weight = torch.randn(hidden, device=device).to(dtype)
    assert_near(rms_norm(x, weight, 1e-5), rms_norm_reference(x, weight, 1e-5))
    got = rms_norm(x, weight, 1e-5, residual)
    for actual, expected in zip(got, rms_norm_reference(x, weight, 1e-5, residual), strict=True):
        assert_near(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(9, 3), (1, 1), (20, 10)])
def test_rotary_kv_write(device, dtype, head_dim, num_heads, num_kv_heads):
    sizes = (num_heads, num_kv_heads, num_kv_heads)
    slots = torch.tensor([5, -1, 47, 16], device=device)
    positions = torch.tensor([3, 99, 0, 3], device=device)
    tables = rotary_tables(torch.rand(head_dim // 2, device=device), 100)
    fused = torch.randn(4, sum(sizes), head_dim, device=device).to(dtype)
    cache = torch.randn(2, 3, 16, num_kv_heads, head_dim, device=device).to(dtype)
    outcomes = []
    for write in (rotary_kv_write, rotary_kv_write_reference):
        projected, pool = fused.clone(), cache.clone()
        write(*projected.split(sizes, 1), Rotation(*tables, positions), KvCache(*pool), slots)
        outcomes.append((projected, pool))
    for actual, expected in zip(*outcomes, strict=True):
        assert_near(actual, expected)


def check_decode(device, lengths, num_splits, group=3, **shape):
    case = paged_case(lengths, device=device, **shape)
    query = random_query(case, len(lengths), group * case.cache.key.shape[2])
    arguments = (query, case.cache, case.block_tables, case.context_lengths, case.scale)
    actual = paged_decode_attention(*arguments, num_splits)
    assert_near(actual, paged_decode_attention_reference(*arguments))


@pytest.mark.parametrize(("dtype", "head_dim"), in_each_dtype(HEAD_DIMS))
@pytest.mark.parametrize("num_splits", [None, 3])
def test_decode(device, dtype, head_dim, num_splits):
    check_decode(device, [1, 16, 70, 33], num_splits, dtype=dtype, head_dim=head_dim)


@pytest.mark.parametrize("lengths", [[1], [16], [257], [0, 3]])
@pytest.mark.parametrize("num_splits", [1, 2, 7])
def test_decode_of_few_sequences(device, lengths, num_splits):
    check_decode(device, lengths, num_splits)


@few_examples
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    num_splits=st.integers(1, 5),
    num_kv_heads=st.integers(1, 2),
    group=st.integers(1, 17),
    block_size=st.integers(1, 17),
)
def test_decode_of_any_shape(device, lengths, num_splits, num_kv_heads, group, block_size):
    shape = {"num_kv_heads": num_kv_heads, "block_size": block_size, "head_dim": 24}
    check_decode(device, lengths, num_splits, group, **shape)


def check_prefill(device, lengths, chunks, **shape):
    case = paged_case(lengths, device=device, **shape)
    query = random_query(case, sum(chunks), 3 * case.cache.key.shape[2])
    starts = offsets(chunks, device)
    arguments = (query, case.cache, case.block_tables, case.context_lengths, starts, case.scale)
    actual = paged_prefill_attention(*arguments)
    assert_near(actual, paged_prefill_attention_reference(*arguments))


@pytest.mark.parametrize(("dtype", "head_dim"), in_each_dtype(HEAD_DIMS))
def test_prefill(device, dtype, head_dim):
    lengths, chunks = [1, 16, 70, 33], [1, 16, 65, 5]
    check_prefill(device, lengths, chunks, dtype=dtype, head_dim=head_dim)


@pytest.mark.parametrize(
    ("lengths", "chunks"),
    [([1], [1]), ([16], [16]), ([64], [64]), ([65], [65]), ([200], [3]), ([5, 9, 40], [0, 9, 0])],
)
def test_prefill_of_few_sequences(device, lengths, chunks):
    check_prefill(device, lengths, chunks, num_kv_heads=1)


@few_examples
@given(data=st.data(), lengths=st.lists(st.integers(1, 70), min_size=1, max_size=4))
def test_prefill_of_any_chunks(device, data, lengths):
    chunks = [data.draw(st.integers(0, length)) for length in lengths]
    block_size = data.draw(st.integers(1, 17))
    check_prefill(device, lengths, chunks, num_kv_heads=1, head_dim=24, block_size=block_size)
