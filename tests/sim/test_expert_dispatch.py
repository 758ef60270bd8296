"""Every choice goes to one physical expert, and the replicas of an expert take turns."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.state.expert_dispatch import dispatch, replicas_of


@st.composite
def batches(draw):
    """Choices, a row of a placement, slots of a node, and whose turn it is."""
    num_experts, nodes = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    per_node = draw(st.integers(-(-num_experts // nodes), 5 + num_experts))
    row = list(range(num_experts))
    further = nodes * per_node - num_experts
    row += draw(st.lists(st.integers(0, num_experts - 1), min_size=further, max_size=further))
    row = draw(st.permutations(row))
    top_k = draw(st.integers(1, num_experts))
    choice = st.permutations(range(num_experts)).map(lambda order: order[:top_k])
    ids = draw(st.lists(choice, max_size=12))
    ids = np.array(ids, np.int32).reshape(-1, top_k)
    return ids, np.array(row, np.int64), per_node, draw(st.integers(0, 7))


def plain_slots(ids, row, first_turn):
    """Slot of each choice, token by token."""
    slots = {expert: [at for at, one in enumerate(row) if one == expert] for expert in set(row)}
    turns = dict.fromkeys(slots, first_turn)
    found = []
    for token in ids.tolist():
        found.append([])
        for expert in token:
            found[-1].append(slots[expert][turns[expert] % len(slots[expert])])
            turns[expert] += 1
    return found


@given(batch=batches())
def test_replicas_take_turns_in_the_order_of_the_tokens(batch):
    ids, row, per_node, first_turn = batch
    sent = dispatch(ids, row, per_node, first_turn)
    assert sent.slots.tolist() == plain_slots(ids, row.tolist(), first_turn)


@given(batch=batches())
def test_every_row_is_sent_once_to_a_slot_of_its_expert(batch):
    ids, row, per_node, first_turn = batch
    sent = dispatch(ids, row, per_node, first_turn)
    np.testing.assert_array_equal(row[sent.slots], ids)
    assert sorted(sent.order.tolist()) == list(range(ids.size))
    assert sent.slot_rows.tolist() == [(sent.slots == slot).sum() for slot in range(len(row))]
    assert sent.node_rows.tolist() == sent.slot_rows.reshape(-1, per_node).sum(axis=1).tolist()
    for expert in range(int(row.max()) + 1):
        assert np.ptp(sent.slot_rows[row == expert]) <= 1


@given(batch=batches())
def test_a_node_gets_its_rows_by_slot_and_then_by_token(batch):
    ids, row, per_node, first_turn = batch
    sent = dispatch(ids, row, per_node, first_turn)
    wanted = sorted(
        (int(slot), token, choice) for (token, choice), slot in np.ndenumerate(sent.slots)
    )
    for node in range(len(row) // per_node):
        mine = [one for one in wanted if one[0] // per_node == node]
        assert sent.tokens_of(node).tolist() == [token for _, token, _ in mine]
        flat = [token * ids.shape[1] + choice for _, token, choice in mine]
        assert sent.rows_of(node).tolist() == flat


def test_an_example_by_hand():
    # Expert 1 has the slots 1 and 2, of two nodes with two slots each.
    sent = dispatch(np.array([[1, 0], [1, 2], [1, 0]]), np.array([0, 1, 1, 2]), 2)
    assert sent.slots.tolist() == [[1, 0], [2, 3], [1, 0]]
    assert sent.slot_rows.tolist() == [2, 2, 1, 1]
    assert sent.node_rows.tolist() == [4, 2]
    assert [sent.tokens_of(node).tolist() for node in (0, 1)] == [[0, 2, 0, 2], [1, 1]]
    assert sent.rows_of(1).tolist() == [2, 3]


def test_many_single_rows_reach_all_replicas_when_turns_are_counted():
    row = np.array([0, 0, 0, 0])
    slots = [int(dispatch(np.array([[0]]), row, 2, turn).slots[0, 0]) for turn in range(8)]
    assert slots == [0, 1, 2, 3] * 2


def test_more_slots_than_short_numbers_hold_are_sorted_alike():
    row = np.arange(70_000)
    ids = np.random.default_rng(0).permutation(70_000).reshape(-1, 2)
    sent = dispatch(ids, row, 7)
    np.testing.assert_array_equal(sent.slots, ids)
    np.testing.assert_array_equal(sent.order, ids.ravel().argsort())


def test_replicas_are_the_slots_of_each_expert_in_order():
    found = replicas_of(np.array([2, 0, 2, 1]), 3)
    assert found.slots.tolist() == [1, 3, 0, 2]
    assert (found.first.tolist(), found.counts.tolist()) == ([0, 1, 2], [1, 1, 2])


@pytest.mark.parametrize("wrong", [-1, 3])
def test_an_expert_that_is_not_placed_is_refused(wrong):
    with pytest.raises(ValueError, match=rf"expert_ids\[1, 0\]={wrong} must be from 0 to 2"):
        dispatch(np.array([[0, 1], [wrong, 2]]), np.array([0, 1, 2, 2]), 2)
