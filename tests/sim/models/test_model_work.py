"""Closed forms and orders that parameters, FLOPs and serving operators obey."""

import itertools
import random

import pytest

from sim.models.architecture import known_architectures, load_architecture
from sim.models.flops import causal_flops, causal_pairs, matmul_flops
from sim.models.parameters import (
    active_parameters,
    kv_bytes_per_token,
    parameter_counts,
    total_parameters,
    weight_bytes,
)
from sim.models.work import IterationShape, expected_experts, iteration_operators

PUBLISHED_TOTALS = {
    "smollm2_135m": 134_515_008,
    "llama_2_7b": 6_738_415_616,
    "lwm_7b": 6_738_415_616,
    "llama_3_8b": 8_030_261_248,
    "llama_3_70b": 70_553_706_496,
    "mistral_7b": 7_241_732_096,
    "mixtral_8x7b": 46_702_792_704,
    "qwen1_5_1_8b": 1_836_828_672,
    "dbrx": 131_596_523_520,
}
WINDOWED = "mistral_7b"


def total_flops(architecture, shape):
    return sum(op.count * op.flops for op in iteration_operators(architecture, shape, 2, 2))


def by_name(architecture, shape):
    return {op.name: op for op in iteration_operators(architecture, shape, 2, 2)}


@pytest.mark.parametrize(("name", "total"), PUBLISHED_TOTALS.items())
def test_totals_are_the_published_ones(name, total):
    assert total_parameters(load_architecture(name)) == total


PUBLISHED_BILLIONS = {
    "llama_2_13b": 13.0, "llama_2_70b": 69.0, "llama_3_1_8b": 8.03, "llama_3_1_70b": 70.6,
    "llama_3_2_1b": 1.24, "llama_3_2_3b": 3.21, "qwen2_5_7b": 7.62, "qwen2_5_32b": 32.8,
    "qwen2_5_72b": 72.7, "qwen3_8b": 8.19, "qwen3_32b": 32.8, "qwen3_30b_a3b": 30.5,
}  # fmt: skip
"""As the models' cards round them."""


@pytest.mark.parametrize(("name", "billions"), PUBLISHED_BILLIONS.items())
def test_totals_round_to_the_published_ones(name, billions):
    assert total_parameters(load_architecture(name)) / 1e9 == pytest.approx(billions, rel=5e-3)


def test_active_parameters_are_the_published_ones_in_billions():
    for name, billions in (("mixtral_8x7b", 12.9), ("mixtral_8x22b", 39), ("dbrx", 36)):
        active = active_parameters(load_architecture(name)) / 1e9
        assert active == pytest.approx(billions, rel=0.02)


@pytest.mark.parametrize("name", known_architectures())
def test_active_never_exceeds_total_and_equals_it_without_experts(name):
    architecture = load_architecture(name)
    active, total = active_parameters(architecture), total_parameters(architecture)
    assert active < total if architecture.sparse_layers else active == total
    assert total == sum(parameter_counts(architecture).values())
    assert weight_bytes(architecture, 0.5) * 4 == weight_bytes(architecture, 2)


def test_kv_bytes_are_two_tensors_of_every_layer():
    assert kv_bytes_per_token(load_architecture("llama_3_8b"), 2) == 2 * 32 * 8 * 128 * 2
    assert kv_bytes_per_token(load_architecture("llama_2_7b"), 2) == 524_288
    assert kv_bytes_per_token(load_architecture("tiny_llama"), 4) == 512


@pytest.mark.parametrize("name", known_architectures())
def test_causal_flops_never_exceed_full_ones_and_equal_them_for_one_token(name):
    architecture = load_architecture(name)
    assert causal_flops(architecture, 1) == matmul_flops(architecture, 1, 1)
    for length in (2, 17, 5000):
        causal = causal_flops(architecture, length, sampled_tokens=length)
        assert causal < matmul_flops(architecture, 1, length)


@pytest.mark.parametrize("window", [None, 1, 3, 8, 100])
def test_causal_pairs_are_what_counting_them_gives(window):
    for tokens, before in itertools.product(range(1, 12), range(12)):
        keys = range(before + 1, before + tokens + 1)
        seen = sum(min(key, window or key) for key in keys)
        assert causal_pairs(tokens, before, window) == seen


@pytest.mark.parametrize("name", ["llama_3_8b", WINDOWED, "mixtral_8x7b"])
def test_chunks_add_up_to_the_whole_prompt(name):
    architecture = load_architecture(name)
    whole = causal_flops(architecture, 9000)
    parts = [(4000, 0), (4000, 4000), (999, 8000)]
    chunked = sum(causal_flops(architecture, c, before, sampled_tokens=0) for c, before in parts)
    assert chunked + causal_flops(architecture, 1, 8999) == whole


@pytest.mark.parametrize("name", known_architectures())
def test_operators_of_an_iteration_have_the_causal_flops_of_its_requests(name):
    architecture = load_architecture(name)
    generator = random.Random(5)
    chunks = [(generator.randint(1, 9000), generator.randint(0, 9000)) for _ in range(4)]
    contexts = [generator.randint(1, 9000) for _ in range(30)]
    shape = IterationShape.of(chunks, contexts, len(contexts) + 2, architecture.sliding_window)
    expected = sum(causal_flops(architecture, c, before, 0) for c, before in chunks[:2])
    expected += sum(causal_flops(architecture, c, before, 1) for c, before in chunks[2:])
    expected += sum(causal_flops(architecture, 1, context - 1) for context in contexts)
    assert total_flops(architecture, shape) == expected


def test_a_shape_is_counted_as_its_fields_say():
    shape = IterationShape.of([(3, 0), (2, 10)], [7, 1], sampled_tokens=3)
    assert shape == IterationShape(5, 3 * 4 // 2 + 2 * 10 + 3, 15, 2, 2, 8, 3)
    assert shape.tokens == 7


def test_a_window_cuts_contexts_and_pairs():
    shape = IterationShape.of([(2, 10)], [7, 1], sampled_tokens=2, sliding_window=4)
    assert (shape.prefill_pairs, shape.prefill_context, shape.decode_context) == (8, 5, 5)


def test_one_decode_step_reads_every_active_weight_and_its_context_once():
    architecture = load_architecture("mixtral_8x7b")
    shape = IterationShape.of([], [1000], 1)
    operators = iteration_operators(architecture, shape, 2, 1)
    read = sum(op.count * op.bytes_read for op in operators)
    weights = active_parameters(architecture) - parameter_counts(architecture)["norms"]
    weights -= 31_999 * architecture.hidden_size  # one row of the embedding is read
    cache = 1000 * kv_bytes_per_token(architecture, 1)
    assert read > weights * 2 + cache
    assert read == pytest.approx(weights * 2 + cache, rel=0.001)


def test_new_keys_and_values_are_written_to_the_cache_at_its_precision():
    architecture = load_architecture("llama_3_8b")
    shape = IterationShape.of([(100, 0)], [50, 60], 2)
    written = [
        sum(
            op.count * op.bytes_written
            for op in iteration_operators(architecture, shape, 2, kv_dtype_bytes)
        )
        for kv_dtype_bytes in (1, 2)
    ]
    assert written[1] - written[0] == 102 * kv_bytes_per_token(architecture, 1)


def test_operators_without_work_are_left_out():
    architecture = load_architecture("llama_3_8b")
    assert iteration_operators(architecture, IterationShape.of([], [], 0), 2, 2) == []
    chunk = by_name(architecture, IterationShape.of([(64, 0)], [], 0))
    assert list(chunk) == [
        "embedding",
        "qkv_projection",
        "attention_prefill",
        "output_projection",
        "gate_up",
        "down",
    ]
    decode = by_name(architecture, IterationShape.of([], [64], 1))
    assert "attention_decode" in decode
    assert "attention_prefill" not in decode
    assert decode["lm_head"].count == 1
    assert decode["down"].count == 32


def test_expected_experts_grow_from_those_of_one_token_to_all():
    assert expected_experts(8, 2, 0) == 0
    assert expected_experts(8, 2, 1) == pytest.approx(2)
    assert expected_experts(8, 8, 1) == 8
    hit = [expected_experts(60, 4, tokens) for tokens in range(200)]
    assert hit == sorted(hit)
    assert hit[-1] == pytest.approx(60, rel=1e-5)


def test_expected_experts_are_what_uniform_routing_hits_on_average():
    generator = random.Random(3)
    hits = [
        len({e for _ in range(10) for e in generator.sample(range(16), 4)}) for _ in range(2000)
    ]
    assert sum(hits) / len(hits) == pytest.approx(expected_experts(16, 4, 10), rel=0.01)


def test_impossible_shapes_are_refused():
    architecture = load_architecture("tiny_llama")
    with pytest.raises(ValueError, match="batch=0 and sequence=4"):
        matmul_flops(architecture, 0, 4)
    with pytest.raises(ValueError, match="chunk_tokens=0 must be at least 1"):
        causal_flops(architecture, 0, sampled_tokens=0)
    with pytest.raises(ValueError, match="context_before=-1 at least 0"):
        causal_flops(architecture, 1, -1)
    with pytest.raises(ValueError, match="sampled_tokens=2 must lie in 0 to chunk_tokens=1"):
        causal_flops(architecture, 1, sampled_tokens=2)
