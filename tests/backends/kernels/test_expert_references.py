"""The references of a mixture of experts against its formulas and Hugging Face's Mixtral."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DTYPES, assert_near
from mixture_cases import expert_weights, gate_case, plain_expert, plain_routing

from backends.kernels.expert_combine import expert_combine_reference
from backends.kernels.expert_ffn import expert_ffn_reference
from backends.kernels.expert_gate import expert_gate_reference, scatter_rows_reference

some_examples = settings(max_examples=60, deadline=None)
mixtures = st.fixed_dictionaries(
    {
        "tokens": st.integers(0, 20),
        "experts": st.integers(1, 9),
        "hidden": st.integers(1, 6),
        "dtype": st.sampled_from(DTYPES),
    }
)


@some_examples
@given(mixture=mixtures, renormalise=st.booleans(), data=st.data())
def test_gate_reference_follows_the_rule_word_by_word(mixture, renormalise, data):
    hidden, gate_weight = gate_case(**mixture)
    top_k = data.draw(st.integers(1, mixture["experts"]))
    routed = expert_gate_reference(hidden, gate_weight, top_k, renormalise)
    expected = plain_routing(hidden, gate_weight, top_k, renormalise)
    assert_near(routed.weights, expected.weights)
    for name in ("expert_ids", "counts", "slots"):
        assert torch.equal(getattr(routed, name), getattr(expected, name)), name
        assert getattr(routed, name).dtype == torch.int32


def test_equal_experts_are_taken_in_the_order_of_their_ids():
    hidden = torch.randn(3, 8)
    routed = expert_gate_reference(hidden, torch.ones(40, 8), 4)
    assert routed.expert_ids.tolist() == [[0, 1, 2, 3]] * 3
    assert (routed.weights == 0.25).all()
    assert routed.counts.tolist() == [3] * 4 + [0] * 36
    assert routed.slots.tolist() == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]


@some_examples
@given(mixture=mixtures, data=st.data())
def test_scattered_rows_stand_in_groups_by_expert_and_in_order_of_tokens(mixture, data):
    hidden, gate_weight = gate_case(**mixture)
    hidden = torch.arange(mixture["tokens"])[:, None].expand(hidden.shape).to(hidden.dtype)
    routed = expert_gate_reference(
        hidden, gate_weight, data.draw(st.integers(1, mixture["experts"]))
    )
    rows = scatter_rows_reference(hidden, routed)
    assert rows.shape == (routed.slots.numel(), mixture["hidden"])
    for expert, group in enumerate(rows.split(routed.counts.tolist())):
        tokens = (routed.expert_ids == expert).any(dim=1).nonzero().flatten()
        assert torch.equal(group, hidden[tokens])


@some_examples
@given(counts=st.lists(st.integers(0, 4), min_size=1, max_size=5), dtype=st.sampled_from(DTYPES))
def test_ffn_reference_is_the_network_of_each_rows_expert(counts, dtype):
    gate_up, down = expert_weights(len(counts), 6, 10, dtype=dtype)
    rows = torch.randn(sum(counts), 6).to(dtype)
    owners = [expert for expert, count in enumerate(counts) for _ in range(count)]
    output = expert_ffn_reference(rows, torch.tensor(counts).int(), gate_up, down)
    for row, expert, got in zip(rows, owners, output, strict=True):
        assert_near(got, plain_expert(row, gate_up[expert], down[expert]))


@some_examples
@given(
    mixture=mixtures,
    top_k=st.integers(1, 4),
    num_rows=st.integers(1, 30),
)
def test_combine_reference_is_the_weighted_sum(mixture, top_k, num_rows):
    rows = torch.randn(num_rows, mixture["hidden"]).to(mixture["dtype"])
    slots = torch.randint(num_rows, (mixture["tokens"], top_k)).int()
    weights = torch.rand(slots.shape)
    expected = torch.einsum("tk,tkh->th", weights.double(), rows[slots.long()].double())
    assert_near(expert_combine_reference(rows, slots, weights), expected)


@pytest.mark.parametrize("renormalise", [True, False])
def test_references_together_are_the_mixture(renormalise):
    hidden, gate_weight = gate_case(12, 5, 6)
    gate_up, down = expert_weights(5, 6, 10)
    routed = expert_gate_reference(hidden, gate_weight, 3, renormalise)
    rows = scatter_rows_reference(hidden, routed)
    output = expert_ffn_reference(rows, routed.counts, gate_up, down)
    combined = expert_combine_reference(output, routed.slots, routed.weights)
    plain = plain_routing(hidden, gate_weight, 3, renormalise)
    for token, got in enumerate(combined):
        choices = zip(plain.expert_ids[token], plain.weights[token], strict=True)
        outputs = [w * plain_expert(hidden[token], gate_up[e], down[e]) for e, w in choices]
        assert_near(got, sum(outputs))


@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (6, 6), (5, 1)])
def test_references_together_are_the_sparse_block_of_mixtral(experts, top_k):
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    if not hasattr(mixtral, "MixtralExperts"):
        pytest.skip("this transformers keeps the weights of each expert apart")
    config = pytest.importorskip("transformers").MixtralConfig(
        hidden_size=24,
        intermediate_size=40,
        num_local_experts=experts,
        num_experts_per_tok=top_k,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    block = mixtral.MixtralSparseMoeBlock(config).eval().requires_grad_(False)
    for weight in block.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    hidden = torch.randn(1, 33, 24)
    routed = expert_gate_reference(hidden[0], block.gate.weight, top_k)
    rows = scatter_rows_reference(hidden[0], routed)
    weights = (block.experts.gate_up_proj, block.experts.down_proj)
    output = expert_ffn_reference(rows, routed.counts, *weights)
    combined = expert_combine_reference(output, routed.slots, routed.weights)
    assert_near(combined, block(hidden)[0])
