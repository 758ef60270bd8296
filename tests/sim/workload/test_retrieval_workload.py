"""Generated retrieval: popularity, lengths, lists and stages are what the parameters say."""

import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.workload.candidates import Companions, distinct
from sim.workload.knowledge import check_retrieved
from sim.workload.lengths import LengthDistribution
from sim.workload.poisson import Poisson
from sim.workload.retrieval import Retrieval
from sim.workload.source import check
from sim.workload.zipf import Zipf

SMALL = {"rate_per_s": 2.0, "num_requests": 400, "num_documents": 500}


def _lists(workload: Retrieval, seed: int = 1) -> np.ndarray:
    """All that is retrieved, shape (requests, stages, top_k)."""
    return np.array([one for chunk in workload.columns(seed) for one in chunk.retrieved or ()])


def _all(workload: Retrieval, seed: int, **chunking: int) -> tuple[list, ...]:
    chunks = list(workload.columns(seed, **chunking))
    numbers = (
        np.concatenate([getattr(chunk, name) for chunk in chunks]).tolist()
        for name in ("arrival_s", "prompt_tokens", "output_tokens")
    )
    return (*numbers, [one for chunk in chunks for one in chunk.retrieved or ()])


def test_three_percent_of_the_documents_get_sixty_percent_of_the_requests() -> None:
    found = _lists(Retrieval(rate_per_s=1.0, num_requests=60_000, num_stages=1, top_k=3))[:, -1]
    popular = found < 9_000
    assert popular[:, 0].mean() == pytest.approx(0.6, abs=4 * 0.49 / 60_000**0.5)
    # Companions are drawn once for each topic: a few popular topics leave their mark.
    np.testing.assert_allclose(popular.mean(axis=0), 0.6, atol=0.03)


def test_the_whole_law_of_topics_is_zipf() -> None:
    load = Retrieval(rate_per_s=1.0, num_requests=100_000, num_documents=1_000, num_stages=1)
    counts = np.bincount(_lists(load)[:, -1, 0], minlength=1_000)
    weights = np.arange(1, 1_001) ** -1.0725601618972362
    expected = 100_000 * weights / weights.sum()
    # Chi-square of 999 degrees of freedom has this mean and deviation.
    assert ((counts - expected) ** 2 / expected).sum() == pytest.approx(999, abs=4 * 1998**0.5)


def test_equal_shares_make_all_documents_as_popular() -> None:
    load = Retrieval(**{**SMALL, "num_requests": 50_000}, popular_share=0.2, popular_requests=0.2)
    found = _lists(load)[:, -1]
    np.testing.assert_allclose((found < 100).mean(axis=0), 0.2, atol=0.02)
    assert np.bincount(found[:, 0], minlength=500).max() < 100 + 6 * 10


@given(
    top_k=st.integers(1, 5),
    num_documents=st.integers(10, 60),
    num_stages=st.integers(1, 6),
    neighbours=st.integers(4, 64),
    found_per_stage=st.floats(0.01, 1.0),
    system_tokens=st.integers(0, 50),
    document_cv=st.sampled_from([0.0, 0.8]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60)
def test_lists_are_distinct_and_move_towards_the_answer(seed: int, **chosen: float) -> None:
    share = 0.2
    load = Retrieval(
        rate_per_s=1.0, num_requests=50, popular_share=share, popular_requests=0.7, **chosen
    )  # fmt: skip
    (columns,) = load.columns(seed)
    corpus = load.documents(seed)
    check_retrieved(columns, corpus)
    assert columns.retrieved is not None
    for row, stages in enumerate(columns.retrieved):
        assert len(stages) == load.num_stages
        answer = stages[-1]
        held = corpus.tokens[list(answer)].sum()
        assert columns.prompt_tokens[row] == load.system_tokens + held + load.question_tokens
        found: list[int] = []
        for documents in stages:
            assert len(documents) == len(set(documents)) == load.top_k
            before, found = found, [one for one in answer if one in documents]
            # What is found stays, leads the list, and keeps the order of the answer.
            assert set(before) <= set(found)
            assert list(documents[: len(found)]) == found


def test_documents_are_found_at_the_stated_chance_a_stage() -> None:
    lists = _lists(Retrieval(rate_per_s=1.0, num_requests=20_000, found_per_stage=0.4, top_k=1))
    found = (lists == lists[:, -1:]).all(axis=2).mean(axis=0)
    np.testing.assert_allclose(found, [0.4, 0.64, 0.784, 1.0], atol=4 * 0.5 / 20_000**0.5)
    sure = _lists(Retrieval(**SMALL, found_per_stage=1.0))
    assert (sure == sure[:, -1:]).all()


def test_a_list_changes_only_when_a_document_of_the_answer_is_found() -> None:
    lists = _lists(Retrieval(**SMALL, top_k=3, found_per_stage=0.3))
    held = (lists[..., None] == lists[:, -1, None, None, :]).any(axis=2).sum(axis=2)
    same = (lists[:, 1:] == lists[:, :-1]).all(axis=2)
    np.testing.assert_array_equal(same, held[:, 1:] == held[:, :-1])


def test_a_topic_has_few_companions_and_they_stay() -> None:
    load = Retrieval(rate_per_s=1.0, num_requests=30_000, neighbours=5, top_k=3, num_stages=1)
    together: dict[int, set[int]] = {}
    for topic, *others in _lists(load)[:, -1].tolist():
        together.setdefault(topic, set()).update(others)
    assert max(map(len, together.values())) == 5 == len(together[0])


def test_companions_are_different_and_none_is_its_topic() -> None:
    companions = Companions(Zipf(9, 1.5), 9, 20, key=3)
    rows = companions.of(np.arange(9))
    assert rows.shape == (9, companions.count) == (9, 8)
    for topic, row in enumerate(rows.tolist()):
        assert sorted([topic, *row]) == list(range(9))


@given(
    drawn=st.lists(st.lists(st.integers(0, 8), min_size=6, max_size=6), min_size=1, max_size=9),
    kept=st.permutations(range(9)),
)
def test_only_numbers_that_a_row_has_already_give_way(
    drawn: list[list[int]], kept: list[int]
) -> None:
    first = np.array([kept[:3]] * len(drawn))
    rows = distinct(np.array(drawn), first, 9)
    for row, wanted in zip(rows.tolist(), drawn, strict=True):
        assert row[:3] == kept[:3]
        seen = list(row[:3])
        for number in wanted:
            while number in seen:
                number = (number + 1) % 9  # noqa: PLW2901
            seen.append(number)
        assert row == seen


def test_lengths_have_the_stated_means() -> None:
    load = Retrieval(
        rate_per_s=1.0, num_requests=50_000, max_document_tokens=None, output_tokens=6,
        lengths=LengthDistribution.exponential, max_output_tokens=32, num_stages=1,
    )  # fmt: skip
    tokens = load.documents(3).tokens
    assert tokens.mean() == pytest.approx(3718, rel=4 * 0.5 / 300_000**0.5)
    assert tokens.std() == pytest.approx(1859, rel=0.02)
    (chunk,) = load.columns(3)
    # Rounded, at least one, and cut: the sum of P(length > n) over n below 32.
    expected = 1 + np.exp(-(np.arange(1, 32) + 0.5) / 6).sum()
    assert chunk.output_tokens.mean() == pytest.approx(expected, abs=4 * 6 / 50_000**0.5)
    assert chunk.output_tokens.max() == 32
    assert (chunk.output_tokens < 32).mean() > 0.99


def test_documents_are_cut_and_may_be_as_long_as_each_other() -> None:
    cut = Retrieval(**SMALL, document_tokens=1000, document_cv=2.0, max_document_tokens=1500)
    assert cut.documents(0).tokens.max() == 1500
    even = Retrieval(**SMALL, document_tokens=1000, document_cv=0.0)
    assert set(even.documents(0).tokens.tolist()) == {1000}
    (chunk,) = even.columns(0)
    assert set(chunk.prompt_tokens.tolist()) == {2 * 1000 + 100}


def test_arrivals_are_those_of_poisson() -> None:
    load = Retrieval(rate_per_s=3.0, duration_s=40.0, num_documents=100, output_tokens=9)
    poisson = Poisson(rate_per_s=3.0, duration_s=40.0, input_tokens=5, output_tokens=9)
    (found,), (expected,) = load.columns(7), poisson.columns(7)
    np.testing.assert_array_equal(found.arrival_s, expected.arrival_s)
    assert check(load, 7, 10**6).num_requests == len(expected)


@pytest.mark.parametrize("end", [{"num_requests": 1000}, {"duration_s": 500.0}])
def test_where_a_chunk_ends_changes_nothing_and_a_seed_repeats_it(end: dict[str, float]) -> None:
    load = Retrieval(rate_per_s=2.0, num_documents=300, neighbours=3, top_k=3, **end)
    whole = _all(load, 5)
    assert _all(load, 5, chunk_rows=7) == _all(load, 5, chunk_rows=640) == whole
    assert _all(load, 6)[3] != whole[3]
    assert load.documents(5).tokens.tolist() == load.documents(5).tokens.tolist()


def test_a_document_sinks_a_rank_whenever_another_becomes_the_most_popular() -> None:
    still = _lists(Retrieval(**SMALL))
    drifting = Retrieval(**SMALL, requests_per_new_document=7)
    moved = np.arange(len(still)) // 7
    topics = (still[:, -1, 0] - moved) % drifting.num_documents
    np.testing.assert_array_equal(_lists(drifting)[:, -1, 0], topics)
    assert _all(drifting, 5, chunk_rows=7) == _all(drifting, 5)


def test_a_topic_keeps_its_companions_while_it_sinks() -> None:
    load = Retrieval(
        rate_per_s=1.0, num_requests=20_000, neighbours=4, num_stages=1, requests_per_new_document=9
    )  # fmt: skip
    found = _lists(load)[:, -1]
    for topic in np.unique(found[:, 0]):
        assert len(np.unique(found[found[:, 0] == topic, 1])) <= load.neighbours
    assert len(np.unique(found[:, 0])) > 1000


def test_the_search_does_not_depend_on_rate_lengths_or_stages() -> None:
    base = _lists(Retrieval(**SMALL))[:, -1]
    for changed in ({"rate_per_s": 9.0}, {"output_tokens": 7}, {"found_per_stage": 0.1},
                    {"document_cv": 0.0}, {"num_stages": 2}):  # fmt: skip
        np.testing.assert_array_equal(_lists(Retrieval(**{**SMALL, **changed}))[:, -1], base)


def test_many_requests_are_quick_and_use_flat_memory() -> None:
    load = Retrieval(rate_per_s=1.0, num_requests=200_000)
    began = time.process_time()
    assert sum(map(len, load.columns(0))) == 200_000
    # A million take five times as long, plus the corpus: well below 15 s.
    assert time.process_time() - began < 3.0
    peaks: list[int] = []
    for count in (4_000, 40_000):
        tracemalloc.start()
        few = Retrieval(rate_per_s=1.0, num_requests=count, num_documents=1000)
        assert sum(map(len, few.columns(0, 1000))) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


def test_the_smallest_corpus_serves() -> None:
    load = Retrieval(
        rate_per_s=1.0, num_requests=3, num_documents=1, top_k=1, num_stages=1,
        popular_share=0.5, popular_requests=0.5,
    )  # fmt: skip
    assert _lists(load).tolist() == [[[0]]] * 3


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rate_per_s": 0.0}, r"rate_per_s=0.0 must be positive"),
        ({"duration_s": 9.0}, r"exactly one must be given"),
        ({"num_documents": 0}, r"num_documents=0 must be at least 1; try num_documents=300000"),
        ({"num_documents": 3}, r"top_k=2 with num_stages=4 needs 4 documents and num_documents=3"
         r" .*; try top_k=1 or num_documents=4"),
        ({"num_documents": 5, "num_stages": 1, "top_k": 6}, r"needs 6 .*; try top_k=5"),
        ({"top_k": 0}, r"top_k=0 must be at least 1; try top_k=2"),
        ({"top_k": 65}, r"top_k=65 must be at most 64; try top_k=2"),
        ({"top_k": 5, "neighbours": 3}, r"neighbours=3 must be at least top_k - 1 = 4, .*=5"),
        ({"neighbours": 65}, r"neighbours=65 must be at most 64; try neighbours=8"),
        ({"num_stages": 0}, r"num_stages=0 must be at least 1; try num_stages=4"),
        ({"num_stages": 100}, r"num_stages=100 must be at most 64"),
        ({"requests_per_new_document": 0}, r"requests_per_new_document=0 must be at least 1; try"),
        ({"found_per_stage": 0.0}, r"found_per_stage=0.0 must be above 0"),
        ({"found_per_stage": 1.1}, r"found_per_stage=1.1 must be above 0 and at most 1"),
        ({"popular_requests": 0.01}, r"popular_requests=0.01 must be"),
        ({"popular_share": 0.001}, r"popular_share=0.001 of num_documents=500"),
        ({"document_cv": -1.0}, r"document_cv=-1.0 must be"),
        ({"document_tokens": 9000}, r"document_tokens=9000 is a mean .*; try max_doc.*=18000"),
        ({"system_tokens": -1}, r"system_tokens=-1 must be"),
        ({"question_tokens": 0}, r"question_tokens=0 must be at least 1; try question_tokens=100"),
        ({"output_tokens": 0}, r"output_tokens=0 is a mean"),
        ({"lengths": LengthDistribution.lognormal}, r"needs length_cv"),
    ],
)  # fmt: skip
def test_parameters_out_of_range_are_refused(changed: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Retrieval(**{**SMALL, **changed})  # pyright: ignore[reportArgumentType]
