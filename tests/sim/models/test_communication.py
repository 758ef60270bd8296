"""What the ranks of a replica send: closed forms, and what does not divide is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.models.architecture import known_architectures, load_architecture
from sim.models.communication import iteration_collectives
from sim.models.split import require_parallel, stage_layers
from sim.models.work import IterationShape
from sim.scenario import Model, Scenario
from sim.setup import prepare

TINY = load_architecture("tiny_llama")
SHAPE = IterationShape.of([(30, 0), (7, 16)], [5, 9, 40], sampled_tokens=4)


def rows(tp_size, pp_size, shape=SHAPE):
    return [tuple(one) for one in iteration_collectives(TINY, shape, tp_size, pp_size, 4)]


def test_one_rank_sends_nothing():
    assert rows(1, 1) == []


def test_tensor_parallel_by_hand():
    hidden = 40 * 64 * 4
    assert rows(2, 1) == [
        ("embedding", "all_reduce", hidden, 1, 2),
        ("attention_output", "all_reduce", hidden, 2, 2),
        ("mlp_output", "all_reduce", hidden, 2, 2),
        ("logits", "all_gather", 4 * 256 * 4, 1, 2),
    ]


def test_pipeline_by_hand():
    assert rows(1, 2) == [
        ("hidden_states", "send_receive", 40 * 64 * 4, 1, 2),
        ("tokens", "send_receive", 4 * 8, 1, 2),
    ]


def test_both_by_hand():
    hidden = 40 * 64 * 4
    assert rows(4, 2) == [
        ("embedding", "all_reduce", hidden, 1, 4),
        ("attention_output", "all_reduce", hidden, 2, 4),
        ("mlp_output", "all_reduce", hidden, 2, 4),
        ("hidden_states", "send_receive", hidden, 4, 2),
        ("logits", "all_gather", 4 * 128 * 4, 1, 4),
        ("tokens", "send_receive", 4 * 8, 1, 2),
    ]
    totals = {one.name: one.total_bytes for one in iteration_collectives(TINY, SHAPE, 4, 2, 4)}
    assert totals["attention_output"] == hidden * 2 * 4
    assert totals["hidden_states"] == hidden * 4
    assert totals["tokens"] == 4 * 8


def test_an_iteration_that_samples_nothing_moves_no_logits():
    chunk = IterationShape.of([(30, 0)], [], sampled_tokens=0)
    assert {one[0] for one in rows(2, 2, chunk)} == {
        "embedding", "attention_output", "mlp_output", "hidden_states",
    }  # fmt: skip


def test_a_vocabulary_that_does_not_divide_is_padded():
    llama = load_architecture("llama_2_7b")
    logits = next(
        one for one in iteration_collectives(llama, SHAPE, 3, 1, 2) if one.name == "logits"
    )
    assert logits.payload_bytes == 4 * 10_667 * 2


@given(st.integers(1, 100), st.integers(1, 100))
def test_stages_cover_every_layer_once_and_differ_by_at_most_one(num_layers, pp_size):
    if pp_size > num_layers:
        with pytest.raises(ValueError, match=f"pp_size={pp_size} must lie in 1 to"):
            stage_layers(num_layers, pp_size)
        return
    stages = stage_layers(num_layers, pp_size)
    assert [layer for stage in stages for layer in stage] == list(range(num_layers))
    sizes = [len(stage) for stage in stages]
    assert len(sizes) == pp_size
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("name", known_architectures())
def test_sizes_that_a_refusal_names_are_accepted_and_others_are_not(name):
    architecture = load_architecture(name)
    with pytest.raises(ValueError, match=r"sizes that do: [\d, ]+$") as refused:
        require_parallel(architecture, 2 * architecture.num_heads, 1)
    named = {int(size) for size in str(refused.value).rpartition(": ")[2].split(",")}
    assert 1 in named
    for size in range(1, 2 * architecture.num_heads):
        if size in named:
            require_parallel(architecture, size, 1)
        else:
            with pytest.raises(ValueError, match="must divide"):
                require_parallel(architecture, size, 1)


def test_a_scenario_refuses_what_does_not_divide():
    with pytest.raises(ValueError, match="tp_size=0 must be at least 1"):
        Scenario(tp_size=0)
    smollm2 = Scenario(model=Model(name="smollm2_135m"), tp_size=2)
    with pytest.raises(ValueError, match=r"num_heads=9, num_kv_heads=3.*sizes that do: 1, 3"):
        prepare(smollm2)
    with pytest.raises(ValueError, match="pp_size=31 must lie in 1 to the 30 layers"):
        prepare(Scenario(model=Model(name="smollm2_135m"), pp_size=31))
