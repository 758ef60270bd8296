import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.sampling import Sampler, Sampling, uniforms
from backends.tokenizer import prompt_token_ids

LOGITS = 3.0 * torch.randn(64, 50, generator=torch.Generator().manual_seed(0))
KINDS = [
    Sampling(),
    Sampling(temperature=1.0, seed=3),
    Sampling(temperature=0.7, top_k=5, seed=4),
    Sampling(temperature=1.3, top_p=0.8, seed=5),
    Sampling(temperature=0.9, top_k=20, top_p=0.5, seed=6),
]


@pytest.mark.parametrize("sampling", KINDS)
@settings(max_examples=20)
@given(order=st.permutations(range(64)), size=st.integers(1, 64))
def test_a_token_does_not_depend_on_its_batch(sampling, order, size):
    sampler = Sampler(sampling)
    ids, positions = [row // 3 for row in range(64)], [100 + row for row in range(64)]
    alone = [sampler(LOGITS[row : row + 1], [ids[row]], [positions[row]])[0] for row in range(64)]
    rows = order[:size]
    batch = sampler(LOGITS[rows], [ids[row] for row in rows], [positions[row] for row in rows])
    assert batch == [alone[row] for row in rows]


def test_greedy_takes_the_likeliest():
    assert Sampler()(LOGITS, range(64), range(64)) == LOGITS.argmax(-1).tolist()


@pytest.mark.parametrize("sampling", KINDS[1:])
def test_draws_follow_the_distribution(sampling):
    draws, row = 8_000, LOGITS[0]
    tokens = Sampler(sampling)(row.expand(draws, -1), [1] * draws, range(draws))
    expected = kept_probabilities(row.double(), sampling)
    observed = np.bincount(tokens, minlength=len(row)) / draws
    assert not observed[expected == 0].any()
    error = np.sqrt(expected * (1 - expected) / draws)
    assert (np.abs(observed - expected) <= 5 * error + 4 / draws).all()


def kept_probabilities(logits, sampling):
    """The distribution by its definition: cut to top_k, then to the fewest that reach top_p."""
    chances = (logits / sampling.temperature).softmax(-1).numpy()
    order = np.argsort(-chances, kind="stable")
    keep = order[: sampling.top_k or len(order)]
    chances_kept = chances[keep] / chances[keep].sum()
    reach = int(np.searchsorted(np.cumsum(chances_kept), sampling.top_p)) + 1
    kept = np.zeros_like(chances)
    kept[keep[:reach]] = chances[keep[:reach]]
    return kept / kept.sum()


def test_a_token_of_probability_zero_is_never_drawn():
    logits = torch.full((1, 9), float("-inf"))
    logits[0, 4] = 0.0
    sampler = Sampler(Sampling(temperature=1.0))
    assert {sampler(logits, [0], [at])[0] for at in range(200)} == {4}


def test_uniforms_are_uniform_and_independent_of_order():
    grid = [(request, position) for request in range(100) for position in range(200)]
    values = uniforms(1, *zip(*grid, strict=True))
    assert 0.0 <= values.min() < 0.001
    assert 0.999 < values.max() < 1.0
    assert abs(values.mean() - 0.5) < 5 / math.sqrt(12 * len(grid))
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 5 / math.sqrt(len(grid))
    assert len(set(values.tolist())) == len(grid)
    assert uniforms(1, [42], [7])[0] == values[42 * 200 + 7]
    assert uniforms(2, [42], [7])[0] != values[42 * 200 + 7]


def test_prompts_are_fixed_by_seed_and_request_and_prefixes_of_each_other():
    assert prompt_token_ids(0, 5, 40, 512)[:10] == prompt_token_ids(0, 5, 10, 512)
    assert prompt_token_ids(0, 5, 40, 512) != prompt_token_ids(0, 6, 40, 512)
    assert prompt_token_ids(0, 5, 40, 512) != prompt_token_ids(1, 5, 40, 512)
    assert set(prompt_token_ids(0, 0, 5000, 16)) == set(range(16))


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", -1.0), ("top_k", -2), ("top_p", 0.0), ("top_p", 1.5), ("seed", -1)],
)
def test_an_impossible_setting_is_refused(field, value):
    with pytest.raises(ValueError, match=f"{field}={value}"):
        Sampling(**{field: value})


def test_rows_and_requests_must_be_equally_many():
    with pytest.raises(ValueError, match="equally many"):
        Sampler()(LOGITS, [0], [0])
