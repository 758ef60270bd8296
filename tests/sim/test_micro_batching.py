"""How a batch is split into micro-batches: laws of every rule, and the balance of ping-pong."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.expert_rows import BatchRow, NodeBatch, shape_of
from sim.policies.micro_batching.base import MicroBatching, Row, checked_split
from sim.policies.micro_batching.none import WholeBatch
from sim.policies.micro_batching.ping_pong import PingPong
from sim.policies.registry import policies

RULES = {
    **{name: rule() for name, rule in policies("micro_batching").items()},
    "ping_pong-of_five": PingPong(num_micro_batches=5),
}
EVERY_RULE = pytest.mark.parametrize("name", RULES)


def decode(request_id: int, context: int) -> BatchRow:
    return BatchRow(request_id, 1, context, True, True)


@st.composite
def batches(draw: st.DrawFn, *, chunks: bool = True) -> list[BatchRow]:
    """Decodes first, then chunks, as in an attention node's batch; few sizes, so that some tie."""
    contexts = draw(st.lists(st.integers(1, 12), max_size=20))
    rows = [decode(at, context) for at, context in enumerate(contexts)]
    sizes = st.tuples(st.integers(1, 9), st.integers(0, 5), st.booleans())
    for tokens, before, samples in draw(st.lists(sizes, max_size=6)) if chunks else []:
        rows.append(BatchRow(len(rows), tokens, tokens + before, samples, False))
    return rows


def sums(rows: Sequence[BatchRow], parts: list[list[int]]) -> list[int]:
    return [sum(rows[at].tokens for at in part) for part in parts]


@EVERY_RULE
@given(rows=batches(), planned=st.integers(1, 6))
def test_every_row_is_in_one_micro_batch_and_rules_repeat_themselves(
    name: str, rows: list[BatchRow], planned: int
) -> None:
    rule, before, settings = RULES[name], deepcopy(rows), deepcopy(RULES[name])
    count = rule.count(planned)
    assert count == rule.count(planned) >= 1
    parts = checked_split(rule, rows, count)
    assert parts == rule.split(tuple(rows), count)
    assert (rows, rule) == (before, settings)
    assert all(part == sorted(part) for part in parts)
    work = [shape_of([rows[at] for at in part]) for part in parts]
    assert NodeBatch(rows, parts).shapes() == work
    whole = shape_of(rows)
    assert [sum(column) for column in zip(*work, strict=True)] == list(whole)


@given(rows=batches(), planned=st.integers(1, 6))
def test_none_is_the_whole_batch_in_order(rows: list[BatchRow], planned: int) -> None:
    rule = WholeBatch()
    assert rule.count(planned) == 1
    assert rule.split(rows, 1) == [list(range(len(rows)))]


def test_ping_pong_takes_the_plans_number_unless_it_has_its_own() -> None:
    assert [PingPong().count(planned) for planned in (1, 3, 7)] == [1, 3, 7]
    assert [PingPong(num_micro_batches=4).count(planned) for planned in (1, 3, 7)] == [4, 4, 4]


@given(rows=batches(chunks=False), count=st.integers(1, 6))
def test_numbers_of_decodes_differ_by_one_at_most_and_contexts_by_one_request(
    rows: list[BatchRow], count: int
) -> None:
    parts = checked_split(PingPong(), rows, count)
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    full = [
        sum(rows[at].context_tokens for at in part) for part in parts if len(part) == max(sizes)
    ]
    longest = max((row.context_tokens for row in rows), default=0)
    assert max(full) - min(full) <= longest


@given(rows=batches(), count=st.integers(1, 6))
def test_tokens_differ_by_the_largest_row_at_most(rows: list[BatchRow], count: int) -> None:
    tokens = sums(rows, checked_split(PingPong(), rows, count))
    assert max(tokens) - min(tokens) <= max((row.tokens for row in rows), default=0)


@given(rows=batches().filter(lambda rows: len(rows) <= 6), count=st.integers(1, 3))
def test_the_fullest_micro_batch_is_near_the_best_of_all_splits(
    rows: list[BatchRow], count: int
) -> None:
    """Largest first is never worse than 4/3 - 1/(3 m) of the best (Graham, 1969)."""
    best = min(
        max(sum(row.tokens for row, at in zip(rows, places, strict=True) if at == part)
            for part in range(count))
        for places in product(range(count), repeat=len(rows))
    )  # fmt: skip
    fullest = max(sums(rows, checked_split(PingPong(), rows, count)))
    assert 3 * count * fullest <= (4 * count - 1) * best


@EVERY_RULE
def test_fewer_rows_than_micro_batches_leave_some_empty(name: str) -> None:
    rule = RULES[name]
    count = rule.count(4)
    for rows in ([], [decode(7, 30)], [decode(7, 30), decode(2, 30)]):
        parts = checked_split(rule, rows, count)
        assert len(parts) == count
        assert sum(map(bool, parts)) == min(len(rows), count)


def test_the_largest_rows_go_first_and_of_equals_the_one_with_most_context() -> None:
    rows = [decode(0, 9), decode(1, 5), decode(2, 5), decode(3, 1), BatchRow(4, 4, 4, True, False)]
    # The chunk of 4 tokens, then decodes by context: 9 and 5 and 5 and 1 to the emptier part.
    assert PingPong().split(rows, 2) == [[4], [0, 1, 2, 3]]
    assert PingPong().split(rows[:4], 2) == [[0, 3], [1, 2]]
    assert PingPong().split(rows[:3], 3) == [[0], [1], [2]]


@dataclass(kw_only=True)
class Given(MicroBatching):
    """Always the same."""

    parts: list[list[int]]

    def count(self, planned: int) -> int:
        return planned

    def split(self, rows: Sequence[Row], count: int) -> list[list[int]]:
        del rows, count
        return self.parts


@pytest.mark.parametrize(
    "parts",
    [[[0, 1]], [[0], [1], [2]], [[0], [1]], [[0, 1], [1, 2]], [[0, 1], [3]], [[0, 1, 2]] * 2],
    ids=["lost_part", "one_part_more", "lost_row", "row_twice", "unknown_row", "all_twice"],
)
def test_a_rule_that_loses_or_doubles_something_is_refused(parts: list[list[int]]) -> None:
    rows = [decode(at, 5) for at in range(3)]
    with pytest.raises(ValueError, match=r"Given: .* must be 2 lists that hold each of the 3 rows"):
        checked_split(Given(parts=parts), rows, 2)
    assert checked_split(Given(parts=[[2], [0, 1]]), rows, 2) == [[2], [0, 1]]


def test_no_micro_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="num_micro_batches=0 must be at least 1"):
        PingPong(num_micro_batches=0)
