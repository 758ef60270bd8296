"""Which experts tokens choose: true shares, and choices that no batch changes."""

from dataclasses import dataclass, field
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import chisquare

from sim.policies.registry import token_routings
from sim.scenario import Scenario
from sim.workload.token_routing.balanced import Balanced
from sim.workload.token_routing.base import TokenRouting, Tokens, checked_expert_ids
from sim.workload.token_routing.draws import distinct, distinct_evenly, token_keys
from sim.workload.token_routing.inclusion import inclusion_probabilities
from sim.workload.token_routing.skewed import Skewed
from sim.workload.token_routing.uniform import Uniform

OF_A_TOKEN = {"uniform": Uniform(), "skewed": Skewed(), "very_skewed": Skewed(skew=6.0)}
"""Rules that look at nothing but the token."""
GENERATED = {**OF_A_TOKEN, "balanced": Balanced()}


def some(count: int, requests: int = 7) -> Tokens:
    """Tokens of several requests that take turns."""
    at = np.arange(count)
    return Tokens(at % requests, at // requests)


def probability_of(order: tuple[int, ...], weights: NDArray[np.float64]) -> float:
    """Of drawing these items in this order without replacement."""
    left, found = weights.sum(), 1.0
    for item in order:
        found *= weights[item] / left
        left -= weights[item]
    return found


@pytest.mark.parametrize("routing", GENERATED.values(), ids=GENERATED)
@given(
    num_experts=st.integers(1, 40),
    data=st.data(),
    count=st.integers(0, 60),
    seed=st.integers(0, 2**40),
    layer=st.integers(0, 100),
)
def test_every_token_chooses_distinct_experts_and_the_same_ones_when_asked_again(
    routing: TokenRouting, num_experts: int, data: Any, count: int, seed: int, layer: int
) -> None:
    top_k = data.draw(st.integers(1, num_experts))
    tokens = some(count)
    found = checked_expert_ids(routing, seed, layer, tokens, num_experts, top_k)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(
        routing.expert_ids(seed, layer, tokens, num_experts, top_k), found
    )
    np.testing.assert_array_equal(tokens, some(count))


@pytest.mark.parametrize("routing", OF_A_TOKEN.values(), ids=OF_A_TOKEN)
@given(chosen=st.lists(st.integers(0, 99), max_size=30))
def test_a_token_chooses_the_same_experts_in_any_batch(
    routing: TokenRouting, chosen: list[int]
) -> None:
    tokens, rows = some(100), np.array(chosen, np.int64)
    part = Tokens(tokens.request_ids[rows], tokens.positions[rows])
    whole = routing.expert_ids(3, 5, tokens, 16, 4)
    np.testing.assert_array_equal(routing.expert_ids(3, 5, part, 16, 4), whole[rows])


@pytest.mark.parametrize(
    "routing", [Uniform(), Skewed(skew=0.3)], ids=lambda one: type(one).__name__
)
def test_seed_layer_request_and_position_each_change_the_choice(routing: TokenRouting) -> None:
    """Sets of 4 of 64 experts meet in a quarter of an expert on average when independent."""
    at = np.arange(4000)
    base = Tokens(at, at // 3)
    others = {
        "seed": (1, 0, base),
        "layer": (0, 1, base),
        "request": (0, 0, Tokens(at + 4000, at // 3)),
        "position": (0, 0, Tokens(at, at // 3 + 4000)),
        "exchanged": (0, 0, Tokens(at // 3, at)),
    }
    first = routing.expert_ids(0, 0, base, 64, 4)
    for name, (seed, layer, tokens) in others.items():
        second = routing.expert_ids(seed, layer, tokens, 64, 4)
        common = (first[:, :, None] == second[:, None, :]).sum() / len(at)
        assert common == pytest.approx(0.25, abs=0.08), name


def test_uniform_draws_every_ordered_choice_as_often() -> None:
    found = Uniform().expert_ids(11, 0, some(60_000), 5, 3)
    counts = np.unique(found @ [25, 5, 1], return_counts=True)[1]
    assert len(counts) == 60
    assert chisquare(counts).pvalue > 0.001


@pytest.mark.parametrize("skew", [0.5, 1.5])
def test_skewed_draws_by_popularity_without_replacement(skew: float) -> None:
    tokens, orders = some(60_000), list(permutations(range(5), 3))
    weights = np.arange(1.0, 6.0) ** -skew
    keys = token_keys(4, 0, tokens)
    ranks = distinct(keys, np.rint(weights * 2**40).astype(np.int64), 3)
    wanted = np.array([probability_of(order, weights) for order in orders])
    codes = ranks @ [25, 5, 1]
    counts = [(codes == np.array(order) @ [25, 5, 1]).sum() for order in orders]
    assert chisquare(counts, wanted * len(codes)).pvalue > 0.001


@given(
    keys=st.lists(st.integers(0, 2**64 - 1), max_size=20), num_items=st.integers(1, 50),
    data=st.data(),
)  # fmt: skip
def test_even_draws_are_those_of_equal_weights(keys: list[int], num_items: int, data: Any) -> None:
    top_k = data.draw(st.integers(1, num_items))
    bits = np.array(keys, np.uint64)
    evenly = distinct_evenly(bits, num_items, top_k)
    np.testing.assert_array_equal(evenly, distinct(bits, np.ones(num_items, np.int64), top_k))


@given(
    weights=st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=6), data=st.data(),
)  # fmt: skip
def test_inclusion_is_the_sum_over_all_orders(weights: list[float], data: Any) -> None:
    top_k = data.draw(st.integers(1, len(weights)))
    wanted = np.zeros(len(weights))
    for order in permutations(range(len(weights)), top_k):
        wanted[list(order)] += probability_of(order, np.array(weights))
    # The reference takes differences of the weights, which costs it digits; ours does not.
    np.testing.assert_allclose(
        inclusion_probabilities(np.array(weights), top_k), wanted, rtol=1e-7, atol=1e-9
    )


@given(
    num_items=st.integers(1, 200), skew=st.floats(0, 12), data=st.data(),
)  # fmt: skip
def test_inclusion_adds_up_to_the_draws_and_falls_with_the_rank(
    num_items: int, skew: float, data: Any
) -> None:
    top_k = data.draw(st.integers(1, min(num_items, 12)))
    found = inclusion_probabilities(np.arange(1, num_items + 1) ** -skew, top_k)
    assert found.sum() == pytest.approx(top_k, rel=1e-10)
    assert (np.diff(found) <= 1e-12).all()
    assert found.max() <= 1 + 1e-12


@pytest.mark.parametrize(("skew", "top_k"), [(0.7, 2), (1.0, 8), (2.0, 6)])
def test_inclusion_is_how_often_gumbel_top_k_takes_an_item(skew: float, top_k: int) -> None:
    weights = np.arange(1, 65) ** -skew
    rng, count = np.random.default_rng(5), 40_000
    noisy = np.log(weights) + rng.gumbel(size=(count, 64))
    taken = np.argpartition(-noisy, top_k, axis=1)[:, :top_k]
    sampled = np.bincount(taken.ravel(), minlength=64) / count
    wanted = inclusion_probabilities(weights, top_k)
    assert (abs(sampled - wanted) < 5 * np.sqrt(wanted * (1 - wanted) / count) + 1e-9).all()


@pytest.mark.parametrize("routing", GENERATED.values(), ids=GENERATED)
@pytest.mark.parametrize(("num_experts", "top_k"), [(64, 6), (8, 2), (16, 1), (4, 4)])
def test_loads_are_the_shares_of_what_is_drawn(
    routing: TokenRouting, num_experts: int, top_k: int
) -> None:
    count = 40_000
    loads = routing.loads(9, 3, num_experts, top_k)
    assert loads.shape == (3, num_experts)
    assert loads.sum(axis=1) == pytest.approx(np.ones(3))
    for layer, wanted in enumerate(loads * top_k):
        found = routing.expert_ids(9, layer, some(count), num_experts, top_k)
        sampled = np.bincount(found.ravel(), minlength=num_experts) / count
        spread = 5 * np.sqrt(np.maximum(wanted * (1 - wanted), 0) / count)
        assert (abs(sampled - wanted) <= spread + 5 / count).all()


def test_skew_is_the_exponent_and_other_layers_have_other_hot_experts() -> None:
    loads = Skewed(skew=1.3).loads(0, 20, 16, 1)
    ranked = -np.sort(-loads, axis=1)
    np.testing.assert_allclose(ranked / ranked[:, :1], np.tile(np.arange(1, 17) ** -1.3, (20, 1)))
    assert len(set(loads.argmax(axis=1).tolist())) > 5
    np.testing.assert_allclose(Skewed(skew=0.0).loads(0, 2, 16, 3), Uniform().loads(0, 2, 16, 3))


@given(count=st.integers(0, 100), num_experts=st.integers(1, 20), data=st.data())
def test_balanced_gives_every_expert_as_many_rows_to_within_one(
    count: int, num_experts: int, data: Any
) -> None:
    top_k = data.draw(st.integers(1, num_experts))
    found = Balanced().expert_ids(0, 0, some(count), num_experts, top_k)
    assert np.ptp(np.bincount(found.ravel(), minlength=num_experts)) <= 1


@pytest.mark.parametrize("routing", GENERATED.values(), ids=GENERATED)
@pytest.mark.parametrize("top_k", [0, 9])
def test_more_experts_than_there_are_or_none_are_refused(routing: TokenRouting, top_k: int) -> None:
    rule = rf"top_k={top_k} must be from 1 to num_experts=8; take both from the model"
    with pytest.raises(ValueError, match=rule):
        routing.expert_ids(0, 0, some(3), 8, top_k)
    with pytest.raises(ValueError, match=rule):
        routing.loads(0, 2, 8, top_k)


def test_a_skew_or_a_seed_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"skew=-0.5 must be finite and not negative"):
        Skewed(skew=-0.5)
    for routing in (Uniform(), Skewed()):
        with pytest.raises(ValueError, match=r"seed=-1 must not be negative"):
            routing.expert_ids(-1, 0, some(3), 8, 2)


@dataclass(kw_only=True)
class Rogue(TokenRouting):
    """Answers with whatever it was given."""

    answer: Any = field(default=None)

    def expert_ids(
        self, seed: int, layer: int, tokens: Tokens, num_experts: int, top_k: int
    ) -> NDArray[np.int32]:
        return self.answer

    def loads(
        self, seed: int, num_layers: int, num_experts: int, top_k: int
    ) -> NDArray[np.float64]:
        return np.full((num_layers, num_experts), 1 / num_experts)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([[0, 1], [2, 2], [1, 0]], r"request 1, position 0 of layer 4 to experts \[2, 2\]"),
        ([[0, 1], [2, 0], [3, 0]], r"request 2, .* \[3, 0\]; they must be .* from 0 to 2"),
        ([[-1, 1], [2, 0], [1, 0]], r"request 0, .* \[-1, 1\]"),
        ([[0, 1], [2, 0]], r"\(2, 2\) and must give int32 \[tokens, top_k\] = \(3, 2\)"),
        ([[0.0, 1.0], [2.0, 0.0], [1.0, 0.0]], r"float64"),
    ],
)
def test_a_routing_that_breaks_the_contract_is_named(answer: Any, message: str) -> None:
    rogue = Rogue(answer=np.array(answer))
    with pytest.raises(ValueError, match=rf"token_routing Rogue .*{message}.*; mend the routing"):
        checked_expert_ids(rogue, 0, 4, some(3), 3, 2)


def test_uniform_is_what_a_scenario_begins_with_and_helpers_are_no_routings() -> None:
    found = token_routings()
    assert set(found) == {"uniform", "balanced", "skewed", "recorded"}
    assert Scenario().token_routing == found["uniform"]()
