"""Parts of a mixture of experts, together and apart: each computes what the whole does."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model_cases import reference_model, run, save_and_load
from torch.nn.functional import linear, silu

from backends.experts import MIN_PACKED, Experts, Gate, Mixture
from backends.forward_batch import Chunk, ForwardBatch
from backends.mlp import Mlp
from backends.reference import OneRank
from backends.sampling import Sampler
from backends.serving import open_model, serve
from backends.shards import Share, share_of
from backends.tokenizer import prompt_token_ids, request_token_ids
from backends.transformer import Transformer
from backends.weights import random_model, shipped_config
from sim.engine import ReplicaLimits
from sim.models.architecture import load_architecture
from sim.policies.registry import policies
from sim.workload.recorded import Recorded
from sim.workload.source import Source

TINY = random_model(shipped_config("tiny_mixtral"))
TINY_TRANSFORMER = Transformer(TINY.config, TINY.weights)
CLOSE = {"rtol": 0.0, "atol": 1e-5}
STEPS = [
    [Chunk(0, prompt_token_ids(7, 0, 23, 512), 0), Chunk(1, prompt_token_ids(7, 1, 6, 512), 0)],
    [Chunk(0, [9], 23), Chunk(1, prompt_token_ids(7, 2, 5, 512), 6), Chunk(2, [1], 0)],
    [Chunk(1, [8], 11), Chunk(0, [7], 24)],
]


def random_experts(num_experts, hidden=32, inner=24, seed=0):
    rng = torch.Generator().manual_seed(seed)
    gate_up = torch.randn((num_experts, 2 * inner, hidden), generator=rng) * hidden**-0.5
    return gate_up, torch.randn((num_experts, hidden, inner), generator=rng) * inner**-0.5


def one_by_one(hidden, gate_weight, top_k, renormalise, weights):
    """The sum over each token's experts, token by token, in float64."""
    gate_up, down = (weight.double() for weight in weights)
    output = torch.zeros(hidden.shape, dtype=torch.float64)
    for token, row in enumerate(hidden.double()):
        probabilities = (gate_weight.double() @ row).softmax(0)
        chosen = probabilities.topk(top_k)
        total = chosen.values.sum() if renormalise else 1.0
        for share, expert in zip(chosen.values, chosen.indices, strict=True):
            gate, up = linear(row, gate_up[expert]).chunk(2)
            output[token] += share / total * linear(silu(gate) * up, down[expert])
    return output.float()


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize(
    ("tokens", "top_k", "num_experts"), [(1, 1, 1), (7, 2, 8), (40, 3, 5), (3, 6, 6)]
)
def test_a_mixture_is_the_weighted_sum_of_each_tokens_experts(
    tokens, top_k, num_experts, renormalise
):
    weights = random_experts(num_experts)
    hidden, gate_weight = torch.randn(tokens, 32), torch.randn(num_experts, 32) * 0.3
    mixture = Mixture(Gate(gate_weight, top_k, renormalise), Experts(*weights))
    expected = one_by_one(hidden, gate_weight, top_k, renormalise, weights)
    torch.testing.assert_close(mixture(hidden), expected, **CLOSE)


@given(
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=7),
    chosen=st.lists(st.integers(0, 6), min_size=1, max_size=7),
)
def test_a_subset_of_experts_computes_the_rows_of_the_whole(counts, chosen):
    """In any order, and an expert may be there twice, as copies of one that is asked for much."""
    weights = random_experts(len(counts))
    chosen = [expert % len(counts) for expert in chosen]
    rows = torch.randn(sum(counts), 32, generator=torch.Generator().manual_seed(sum(counts)))
    expected = Experts(*weights)(rows, torch.tensor(counts, dtype=torch.int32)).split(counts)
    parts = rows.split(counts)
    subset = Experts(*weights, chosen)
    assert subset.expert_ids == tuple(chosen)
    computed = subset(
        torch.cat([parts[expert] for expert in chosen]),
        torch.tensor([counts[expert] for expert in chosen], dtype=torch.int32),
    )
    assert torch.equal(computed, torch.cat([expected[expert] for expert in chosen]))


def test_packed_experts_compute_what_small_ones_do():
    gate_up, down = random_experts(3, hidden=512, inner=512)
    assert down[0].numel() >= MIN_PACKED
    counts, rows = torch.tensor([1, 0, 6], dtype=torch.int32), torch.randn(7, 512)
    parts = []
    for expert, part in zip((0, 2), rows.split([1, 6]), strict=True):
        gate, up = linear(part.double(), gate_up[expert].double()).chunk(2, -1)
        parts.append(linear(silu(gate) * up, down[expert].double()).float())
    torch.testing.assert_close(Experts(gate_up, down)(rows, counts), torch.cat(parts), **CLOSE)


def test_half_precision_experts_compute_through_the_launcher():
    weights = random_experts(4)
    counts, rows = torch.tensor([5, 0, 2, 1], dtype=torch.int32), torch.randn(8, 32)
    halved = Experts(*weights, [3, 2, 1, 0], dtype=torch.bfloat16)
    backwards = halved(rows.flip(0).bfloat16(), counts.flip(0))
    assert halved.linears == ()
    assert backwards.dtype == torch.bfloat16
    expected = Experts(*weights)(rows, counts)
    torch.testing.assert_close(backwards.flip(0).float(), expected, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("expert_ids", [[], [4], [0, -1]])
def test_experts_that_a_layer_lacks_are_refused(expert_ids):
    with pytest.raises(ValueError, match=r"at least one expert, each of 0 to 3"):
        Experts(*random_experts(4), expert_ids)


@pytest.mark.parametrize("counts", [[1, 2], [3, 2], [1, 1, 1]])
def test_counts_of_other_rows_or_experts_are_refused(counts):
    experts = Experts(*random_experts(4), [0, 1])
    with pytest.raises(ValueError, match=r"counts=.* rows of 2 experts and sum to the 4 rows"):
        experts(torch.randn(4, 32), torch.tensor(counts, dtype=torch.int32))


def test_the_random_router_of_the_tiny_mixtral_is_uneven_and_uses_every_expert():
    cache = TINY_TRANSFORMER.new_cache(64, 16)
    cache.allocate(0, 512)
    batch = ForwardBatch.build(cache, [Chunk(0, prompt_token_ids(1, 0, 512, 512), 0)])
    with torch.inference_mode():
        operators, x = TINY_TRANSFORMER.begin(batch, cache), TINY_TRANSFORMER.embed(batch)
        residual = torch.zeros_like(x)
        for layer, kv in zip(TINY_TRANSFORMER.layers, cache.layers, strict=True):
            normed, residual = layer.attend(x, residual, kv, operators)
            assert isinstance(layer.mlp, Mixture)
            shares = layer.mlp.gate(normed).counts / (512 * 2)
            assert shares.min() > 0.01
            assert shares.max() > 1.3 / 8
            x = layer.feed_forward(normed)


def apart(model, weights):
    """A forward pass over attention without experts, and experts on three 'ranks'."""
    attention = Transformer(model.config, without_experts(weights), with_experts=False)
    names = [[f"model.layers.{n}.mlp.experts.{kind}_proj" for kind in ("gate_up", "down")]
             for n in range(model.config.num_layers)]  # fmt: skip
    ranks = [
        [Experts(*(weights[name] for name in pair), ids) for ids in ([0, 1, 2], [3], [4, 5, 6, 7])]
        for pair in names
    ]

    def forward(batch, cache):
        operators, x = attention.begin(batch, cache), attention.embed(batch)
        residual = torch.zeros_like(x)
        for layer, experts, kv in zip(attention.layers, ranks, cache.layers, strict=True):
            normed, residual = layer.attend(x, residual, kv, operators)
            routed, rows = layer.mlp.dispatch(normed)
            counts = [routed.counts[list(one.expert_ids)] for one in experts]
            parts = rows.split([int(one.sum()) for one in counts])
            computed = [one(*args) for one, *args in zip(experts, parts, counts, strict=True)]
            x = layer.mlp.combine(normed, routed, torch.cat(computed))
        return attention.logits(x, residual, batch, operators)

    return forward


def without_experts(weights):
    return {name: tensor for name, tensor in weights.items() if ".experts." not in name}


def test_halves_called_by_hand_with_experts_elsewhere_equal_the_forward_pass_exactly():
    caches = [TINY_TRANSFORMER.new_cache(16, 4) for _ in range(2)]
    forward = apart(TINY, TINY.weights)
    for chunks in STEPS:
        whole = run(TINY_TRANSFORMER, caches[0], chunks)
        for chunk in chunks:
            caches[1].allocate(chunk.request_id, chunk.start + len(chunk.token_ids))
        with torch.inference_mode():
            halves = forward(ForwardBatch.build(caches[1], chunks), caches[1])
        assert torch.equal(whole, halves)
    assert caches[0].read_tokens == caches[1].read_tokens
    for ours, theirs in zip(*(cache.layers for cache in caches), strict=True):
        assert torch.equal(ours.key, theirs.key)
        assert torch.equal(ours.value, theirs.value)


def test_two_batches_may_take_turns_in_the_layers():
    """Micro-batches: one is in the attention half while the other's experts compute."""
    model = TINY_TRANSFORMER
    tokens = [prompt_token_ids(5, index, 12, 512) for index in range(2)]
    alone = [run(model, model.new_cache(8, 4), [Chunk(i, ids, 0)]) for i, ids in enumerate(tokens)]
    cache = model.new_cache(8, 4)
    batches = []
    for index, ids in enumerate(tokens):
        cache.allocate(index, len(ids))
        batches.append(ForwardBatch.build(cache, [Chunk(index, ids, 0)]))
    with torch.inference_mode():
        passes = [model.begin(batch, cache) for batch in batches]
        states = [(x, torch.zeros_like(x)) for x in map(model.embed, batches)]
        for layer, kv in zip(model.layers, cache.layers, strict=True):
            for at, operators in enumerate(passes):
                states[at] = layer.attend(*states[at], kv, operators)
            states = [(layer.feed_forward(normed), residual) for normed, residual in states]
        ends = zip(states, batches, passes, strict=True)
        together = [model.logits(*state, batch, one) for state, batch, one in ends]
    assert all(torch.equal(*pair) for pair in zip(alone, together, strict=True))


def test_a_model_without_experts_refuses_to_compute_them():
    attention = Transformer(TINY.config, without_experts(TINY.weights), with_experts=False)
    attention.warm_up([1, 5], [1])
    with pytest.raises(AssertionError, match="experts of this layer are elsewhere"):
        run(attention, attention.new_cache(8, 4), STEPS[0])


def test_dense_layers_and_shared_experts_stay_with_the_attention(tmp_path):
    """Half of the layers of the one are dense, the other has an expert that every token takes."""
    mixed = save_and_load(reference_model("qwen3_moe_every_other"), tmp_path / "mixed")
    assert [type(layer.mlp) for layer in mixed.layers] == [Mlp, Mixture]
    shared = save_and_load(reference_model("qwen2_moe"), tmp_path / "shared").layers[0].mlp
    assert isinstance(shared, Mixture)
    assert shared.experts is not None
    hidden = torch.randn(5, 64)
    routed, rows = shared.dispatch(hidden)
    by_hand = shared.combine(hidden, routed, shared.experts(rows, routed.counts))
    assert torch.equal(by_hand, shared(hidden))
    nothing = shared.combine(hidden, routed, torch.zeros_like(rows))
    assert nothing.abs().max() > 0.01


@given(st.lists(st.integers(1, 40), min_size=2, max_size=6))
def test_the_rest_of_the_batch_changes_no_row_of_a_mixture(lengths):
    mixture = TINY_TRANSFORMER.layers[1].mlp
    rows = torch.randn(sum(lengths), 64, generator=torch.Generator().manual_seed(sum(lengths)))
    with torch.inference_mode():
        together = mixture(rows)
        alone = torch.cat([mixture(part) for part in rows.split(lengths)])
    torch.testing.assert_close(together, alone, **CLOSE)


def test_warm_up_meets_every_number_of_rows_that_an_expert_may_get(monkeypatch):
    model, met = Transformer(TINY.config, TINY.weights), set()
    first = model.layers[0].mlp.expert_linears[0]
    real = type(first).__call__

    def spy(self, x):
        if self is first:
            met.add(len(x))
        return real(self, x)

    monkeypatch.setattr(type(first), "__call__", spy)
    model.warm_up([3, 40], [1])
    assert met == set(range(1, 41))


def test_a_replica_serves_a_mixture_as_one_request_at_a_time_would():
    model, transformer = open_model("random", "cpu", config=shipped_config("tiny_mixtral"))
    assert model.config.num_experts == 8
    lengths = [5, 17, 33, 8, 21, 12]
    load = Recorded(arrival_s=[0.0] * 6, prompt_tokens=lengths, output_tokens=[9] * 6)
    source, limits = Source(load, 0, 96), ReplicaLimits(4, 64, 16, 8)
    batching = policies("batching")["chunked_prefill"](chunk_tokens=16)
    served = serve(transformer, source, batching, limits, sampler=Sampler())
    prompts = [request_token_ids(0, request, 512) for request in source.initial()]
    expected = OneRank(transformer).generate(prompts, 9)
    assert [served.answers[index] for index in range(6)] == expected
    assert served.kv_bytes_written == served.kv_bytes_freed > 0


def test_tensor_parallel_experts_are_refused_and_stages_of_them_are_not():
    with pytest.raises(ValueError, match=r"tp_size=2 must be 1 .* 8 experts a layer .*pp_size"):
        share_of(TINY, Share(rank=0, tp_size=2))
    hidden, cache = None, None
    whole = run(TINY_TRANSFORMER, TINY_TRANSFORMER.new_cache(16, 4), STEPS[0])
    for rank in range(2):
        config, weights = share_of(TINY, Share(rank=rank, pp_size=2))
        assert config.sparse_layers == (0,)
        stage = Transformer(config, weights)
        cache = stage.new_cache(16, 4)
        for chunk in STEPS[0]:
            cache.allocate(chunk.request_id, len(chunk.token_ids))
        batch = ForwardBatch.build(cache, STEPS[0])
        hidden = stage.forward(batch, cache, hidden)
    torch.testing.assert_close(hidden, whole, rtol=0, atol=1e-5)


def test_a_stage_of_dense_layers_alone_has_no_experts():
    values = shipped_config("qwen3_30b_a3b") | {
        "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "num_hidden_layers": 2, "vocab_size": 64, "intermediate_size": 48, "num_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 16, "mlp_only_layers": [0],
    }  # fmt: skip
    model = random_model(values)
    parts = [share_of(model, Share(rank=rank, pp_size=2)) for rank in range(2)]
    assert [config.sparse_layers for config, _ in parts] == [(), (0,)]
    assert not any("experts" in name for name in parts[0][1])


def test_experts_of_the_tiny_mixtral_differ():
    """Else no test here would notice a row that goes to the wrong one."""
    gate_up = TINY.weights["model.layers.0.mlp.experts.gate_up_proj"].numpy()
    correlations = np.corrcoef(gate_up.reshape(8, -1)) - np.eye(8)
    assert np.abs(correlations).max() < 0.1
    assert load_architecture("tiny_mixtral").renormalise_top_k
