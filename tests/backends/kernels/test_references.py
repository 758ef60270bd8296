"""The references against plain unpaged attention and against Hugging Face's llama."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DTYPES, assert_near, offsets, paged_case, plain_attention, random_query

from backends.kernels.paged import KvCache
from backends.kernels.paged_decode_attention import paged_decode_attention_reference
from backends.kernels.paged_prefill_attention import paged_prefill_attention_reference
from backends.kernels.rms_norm import rms_norm_reference
from backends.kernels.rotary_kv_write import Rotation, rotary_kv_write_reference, rotary_tables

shapes = st.fixed_dictionaries(
    {
        "num_kv_heads": st.integers(1, 4),
        "head_dim": st.sampled_from([2, 16, 48, 80]),
        "block_size": st.integers(1, 17),
        "dtype": st.sampled_from(DTYPES),
    }
)


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=5), shape=shapes, data=st.data())
def test_decode_reference_is_plain_attention(lengths, shape, data):
    case = paged_case(lengths, **shape)
    num_heads = shape["num_kv_heads"] * data.draw(st.integers(1, 4))
    query = random_query(case, len(lengths), num_heads)
    attended = paged_decode_attention_reference(
        query, case.cache, case.block_tables, case.context_lengths, case.scale
    )
    for row, key, value, got in zip(query, case.keys, case.values, attended, strict=True):
        assert_near(got[None], plain_attention(row[None], key, value, case.scale))


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=5), shape=shapes, data=st.data())
def test_prefill_reference_is_plain_causal_attention(lengths, shape, data):
    case = paged_case(lengths, **shape)
    chunks = [data.draw(st.integers(0, length)) for length in lengths]
    query = random_query(case, sum(chunks), 2 * shape["num_kv_heads"])
    attended = paged_prefill_attention_reference(
        *(query, case.cache, case.block_tables, case.context_lengths),
        *(offsets(chunks), case.scale),
    )
    rows = zip(query.split(chunks), case.keys, case.values, attended.split(chunks), strict=True)
    for chunk, key, value, got in rows:
        assert_near(got, plain_attention(chunk, key, value, case.scale))


def test_an_empty_context_attends_to_nothing():
    case = paged_case([0, 5])
    query = random_query(case, 2, 9)
    arguments = (case.cache, case.block_tables, case.context_lengths, case.scale)
    attended = paged_decode_attention_reference(query, *arguments)
    assert (attended[0] == 0).all()
    assert attended.isfinite().all()


def test_norm_reference_is_the_norm_of_llama():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    for dtype in DTYPES:
        norm = llama.LlamaRMSNorm(72, eps=1e-5).to(dtype)
        torch.nn.init.normal_(norm.weight)
        x, residual = torch.randn(2, 7, 72).to(dtype)
        weight = norm.weight.detach()
        assert torch.equal(rms_norm_reference(x, weight, 1e-5), norm(x))
        normed, summed = rms_norm_reference(x, weight, 1e-5, residual)
        assert torch.equal(summed, x + residual)
        assert torch.equal(normed, norm(x + residual))


def test_rotary_reference_is_the_rotation_of_llama():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = pytest.importorskip("transformers").LlamaConfig(
        hidden_size=9 * 48, num_attention_heads=9, num_key_value_heads=3, head_dim=48
    )
    embedding = llama.LlamaRotaryEmbedding(config)
    query, key, value = torch.randn(5, 9, 48), torch.randn(5, 3, 48), torch.randn(5, 3, 48)
    positions = torch.tensor([0, 7, 2000, 1, 7])
    cos, sin = embedding(query, positions[None])
    expected_query, expected_key = llama.apply_rotary_pos_emb(
        query.transpose(0, 1)[None], key.transpose(0, 1)[None], cos, sin
    )
    cache = KvCache(torch.zeros(2, 4, 3, 48), torch.zeros(2, 4, 3, 48))
    rotation = Rotation(*rotary_tables(embedding.inv_freq, 2048), positions)
    slots = torch.tensor([6, -1, 0, 3, 7])
    rotary_kv_write_reference(query, key, value, rotation, cache, slots)
    assert_near(query, expected_query[0].transpose(0, 1))
    assert_near(key, expected_key[0].transpose(0, 1))
    for part, rows in zip(cache, (key, value), strict=True):
        stored = part.flatten(0, 1)
        assert torch.equal(stored[[6, 0, 3, 7]], rows[[0, 2, 3, 4]])
        assert (stored[[1, 2, 4, 5]] == 0).all()
