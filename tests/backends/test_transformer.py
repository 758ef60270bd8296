from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_cases import CASES, reference_logits, reference_model, run, save_and_load

from backends.forward_batch import Chunk, ForwardBatch
from backends.kernels.paged import KvCache
from backends.kv_cache import PagedKVCache
from backends.linear import Linear
from backends.paged_attention import PADDING_TOKENS, group_by_length
from backends.tokenizer import Tokenizer, prompt_token_ids
from backends.transformer import Transformer
from backends.weights import load_model, random_model

TOLERANCE = {"rtol": 0.0, "atol": 1e-4}
TINY = random_model()
TINY_TRANSFORMER = Transformer(TINY.config, TINY.weights)


def prompt(request_id, length):
    return prompt_token_ids(7, request_id, length, 512)


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    model = reference_model(request.param)
    return model, save_and_load(model, tmp_path_factory.mktemp(request.param))


def test_a_whole_prompt_equals_transformers(pair):
    reference, model = pair
    tokens = prompt(0, 53)
    cache = PagedKVCache(model.config, 8, 16)
    logits = run(model, cache, [Chunk(0, tokens, 0)])
    torch.testing.assert_close(logits, reference_logits(reference, tokens)[-1:], **TOLERANCE)


def test_chunks_then_decodes_equal_transformers(pair):
    reference, model = pair
    tokens = prompt(1, 40)
    expected = reference_logits(reference, tokens)
    cache = PagedKVCache(model.config, 16, 4)
    cuts = [0, 7, 8, 20, 31, *range(32, 41)]
    logits = [run(model, cache, [Chunk(0, tokens[a:b], a)])[0] for a, b in pairwise(cuts)]
    ends = torch.tensor(cuts[1:]) - 1
    torch.testing.assert_close(torch.stack(logits), expected[ends], **TOLERANCE)


def test_a_mixed_batch_on_scattered_blocks_equals_transformers(pair):
    reference, model = pair
    cache = PagedKVCache(model.config, 64, 4)
    for dummy in range(100, 120):
        cache.allocate(dummy, 8)
    for dummy in (103, 101, 118, 110, 112, 105, 109, 107):
        cache.free(dummy)
    prompts = {index: prompt(index, length) for index, length in enumerate((30, 9, 21, 2))}
    run(model, cache, [Chunk(0, prompts[0][:-1], 0, False), Chunk(1, prompts[1][:-1], 0, False)])
    run(model, cache, [Chunk(2, prompts[2][:11], 0, sample=False)])
    batch = [
        Chunk(2, prompts[2][11:], 11),
        Chunk(0, prompts[0][-1:], 29),
        Chunk(3, prompts[3], 0),
        Chunk(1, prompts[1][-1:], 8),
    ]
    logits = run(model, cache, batch)
    for row, chunk in zip(logits, batch, strict=True):
        expected = reference_logits(reference, prompts[chunk.request_id])[-1]
        torch.testing.assert_close(row, expected, **TOLERANCE)


@settings(max_examples=40)
@given(st.data())
def test_no_split_into_chunks_changes_the_logits(data):
    length = data.draw(st.integers(1, 40))
    cuts = sorted(data.draw(st.sets(st.integers(1, length), max_size=8)) | {0, length})
    tokens = prompt(3, length)
    cache, whole = (PagedKVCache(TINY.config, 16, 4) for _ in range(2))
    for start, end in pairwise(cuts):
        logits = run(TINY_TRANSFORMER, cache, [Chunk(5, tokens[start:end], start)])
    expected = run(TINY_TRANSFORMER, whole, [Chunk(5, tokens, 0)])
    torch.testing.assert_close(logits, expected, **TOLERANCE)
    assert cache.written_tokens == whole.written_tokens == length
    assert cache.read_tokens == sum(cuts[1:])


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 12)), min_size=1, max_size=6))
def test_the_rest_of_the_batch_changes_no_row(shapes):
    cache = PagedKVCache(TINY.config, 200, 4)
    sequences = [prompt(index, before + new) for index, (before, new) in enumerate(shapes)]
    for index, (before, _) in enumerate(shapes):
        run(TINY_TRANSFORMER, cache, [Chunk(index, sequences[index][:before], 0)])
    chunks = [
        Chunk(index, sequences[index][before:], before) for index, (before, _) in enumerate(shapes)
    ]
    together = run(TINY_TRANSFORMER, cache, chunks)
    alone = torch.cat([run(TINY_TRANSFORMER, cache, [chunk]) for chunk in chunks])
    torch.testing.assert_close(together, alone, **TOLERANCE)


def test_the_same_pass_gives_the_same_bits():
    results = []
    for _ in range(2):
        cache = PagedKVCache(TINY.config, 32, 4)
        run(TINY_TRANSFORMER, cache, [Chunk(0, prompt(0, 33), 0), Chunk(1, prompt(1, 5), 0)])
        results.append(run(TINY_TRANSFORMER, cache, [Chunk(0, [3], 33), Chunk(1, [4], 5)]))
    assert torch.equal(*results)


def test_the_path_of_the_kernels_equals_plain_torch():
    from backends.operators import KernelOperators

    kernels = Transformer(TINY.config, TINY.weights)
    kernels._operators = KernelOperators
    caches = [PagedKVCache(TINY.config, 32, 4) for _ in range(2)]
    caches[1].layers = [KvCache(*(part.contiguous() for part in kv)) for kv in caches[1].layers]
    steps = [
        [Chunk(0, prompt(0, 21), 0), Chunk(1, prompt(1, 6), 0)],
        [Chunk(0, [9], 21), Chunk(1, prompt(2, 5), 6), Chunk(2, [1], 0)],
    ]
    for chunks in steps:
        ours, theirs = (
            run(*pair, chunks) for pair in zip((TINY_TRANSFORMER, kernels), caches, strict=True)
        )
        torch.testing.assert_close(ours, theirs, **TOLERANCE)
    for ours, theirs in zip(*(cache.layers for cache in caches), strict=True):
        torch.testing.assert_close(ours.key, theirs.key, **TOLERANCE)
        torch.testing.assert_close(ours.value, theirs.value, **TOLERANCE)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 17])
def test_a_linear_layer_computes_every_number_of_rows(rows):
    weight, bias, x = torch.randn(24, 16), torch.randn(24), torch.randn(rows, 16)
    expected = (x.double() @ weight.double().T + bias).float()
    torch.testing.assert_close(Linear(weight, bias)(x), expected, rtol=0, atol=1e-5)


@given(st.lists(st.integers(1, 400), max_size=12))
def test_groups_hold_every_decode_once_with_little_padding(lengths):
    groups = group_by_length(lengths)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        longest = max(lengths[index] for index in group)
        assert sum(longest - lengths[index] for index in group) <= PADDING_TOKENS


def test_a_context_beyond_the_window_is_refused():
    model = random_model(
        {
            "model_type": "mistral",
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 64,
            "max_position_embeddings": 64,
            "sliding_window": 16,
        }
    )
    cache = PagedKVCache(model.config, 8, 4)
    with pytest.raises(ValueError, match="context of 17 tokens must not exceed 16"):
        run(Transformer(model.config, model.weights), cache, [Chunk(0, [1] * 17, 0)])
    assert cache.written_tokens == 0


@pytest.mark.parametrize("chunks", [[], [Chunk(0, [], 0)]])
def test_a_batch_without_tokens_is_refused(chunks):
    with pytest.raises(ValueError, match="leave them out"):
        ForwardBatch.build(PagedKVCache(TINY.config, 4), chunks)


@pytest.mark.slow
def test_smollm2_answers_as_transformers_does():
    from transformers import AutoModelForCausalLM

    loaded = load_model("smollm2")
    assert loaded.folder is not None
    reference = AutoModelForCausalLM.from_pretrained(loaded.folder, dtype=torch.float32).eval()
    model, tokenizer = Transformer(loaded.config, loaded.weights), Tokenizer(loaded.folder)
    texts = ("The capital of France is", "def fibonacci(n):", "Once upon a time, 1984")
    for request_id, text in enumerate(texts):
        tokens = tokenizer.encode(text)
        assert tokenizer.decode(tokens) == text
        answer = greedy(model, request_id, tokens, 12)
        with torch.no_grad():
            options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
            expected = reference.generate(
                torch.tensor([tokens]),
                attention_mask=torch.ones(1, len(tokens), dtype=torch.int64),
                eos_token_id=None,
                **options,
            )[0, len(tokens) :]
        assert answer == expected.tolist()


def greedy(model, request_id, tokens, count):
    cache, answer, start = PagedKVCache(model.config, 16), [], 0
    new = tokens
    for _ in range(count):
        logits = run(model, cache, [Chunk(request_id, new, start)])
        start += len(new)
        new = [int(logits.argmax())]
        answer += new
    return answer
