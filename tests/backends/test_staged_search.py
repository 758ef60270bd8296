import re
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.corpus import generated, python_topics, questions
from backends.embeddings import HashedFeatures
from backends.staged_search import StagedSearch

faiss = pytest.importorskip("faiss")


def unit(vectors):
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def documents(seed, count, dimension=16):
    return unit(np.random.default_rng(seed).normal(size=(count, dimension)))


def by_number(vectors, query, among):
    """Of these documents all, nearest first, equally near by number; products by faiss' sums."""
    flat = faiss.IndexFlatIP(vectors.shape[1])
    flat.add(vectors)
    products, numbers = flat.search(query[None], len(vectors))
    ranked = sorted(zip((-products[0]).tolist(), numbers[0].tolist(), strict=True))
    return [number for _, number in ranked if number in among]


@st.composite
def searches(draw):
    count = draw(st.integers(1, 60))
    num_clusters = draw(st.integers(1, count))
    num_probed = draw(st.integers(1, num_clusters))
    # Few components of few values: many documents are equally near.
    coarse = draw(st.booleans())
    vectors = documents(draw(st.integers(0, 9)), count + 1, 4)
    if coarse:
        vectors = unit(np.sign(vectors))
    search = StagedSearch(
        vectors[1:],
        num_clusters=num_clusters,
        num_probed=num_probed,
        num_stages=draw(st.integers(1, num_probed)),
        top_k=draw(st.integers(1, min(count, 8))),
    )
    return search, vectors[1:], vectors[0], num_probed


@given(searches())
def test_each_stage_gives_the_nearest_of_the_clusters_searched_so_far(case):
    search, vectors, query, num_probed = case
    order = search.index.quantizer.search(query[None], num_probed)[1][0]
    groups = np.array_split(order, search.num_stages)
    seen, sizes, expected = set(), [], []
    for group in groups:
        lists = [
            faiss.rev_swig_ptr(search.index.invlists.get_ids(int(c)), size).tolist()
            for c in group
            if (size := search.index.invlists.list_size(int(c)))
        ]
        seen.update(number for members in lists for number in members)
        sizes.append(sum(map(len, lists)))
        expected.append(tuple(by_number(vectors, query, seen)[: search.top_k]))
    assert list(search.stages(query)) == expected
    assert search.scanned(query) == sizes


@given(searches())
def test_the_last_stage_is_the_search_of_the_library(case):
    search, vectors, query, num_probed = case
    parameters = faiss.SearchParametersIVF(nprobe=num_probed)
    products, numbers = search.index.search(query[None], search.top_k, params=parameters)
    found = search.search(query)
    assert len(found) == (numbers[0] >= 0).sum()
    np.testing.assert_allclose(vectors[list(found)] @ query, products[0, : len(found)], atol=1e-6)
    last = products[0, len(found) - 1] if found else 0.0
    nearer = {n for n, product in zip(numbers[0], products[0], strict=True) if product > last}
    assert nearer <= set(found)


def test_a_search_of_all_clusters_is_brute_force():
    vectors, queries = documents(0, 400), documents(1, 40)
    search = StagedSearch(vectors, num_clusters=12, num_probed=12, num_stages=5, top_k=3)
    for query in queries:
        assert search.search(query) == tuple(np.argsort(-(vectors @ query))[:3])
        assert len(search.scanned(query)) == 5
        assert sum(search.scanned(query)) == 400


def test_a_document_once_found_leaves_only_for_nearer_ones():
    vectors = documents(2, 300)
    search = StagedSearch(vectors, num_clusters=20, num_probed=15, num_stages=15, top_k=4)
    changes = 0
    for query in documents(3, 20):
        stages = list(search.stages(query))
        assert len(stages) == 15
        worst = [min(vectors[list(found)] @ query) for found in stages if len(found) == 4]
        assert worst == sorted(worst)
        changes += len(set(stages)) - 1
    assert changes > 20  # the stages mean something: early answers are provisional


def test_the_same_vectors_and_seed_give_the_same_answers():
    vectors, queries = documents(4, 500), documents(5, 50)

    def answers(seed):
        search = StagedSearch(
            vectors, num_clusters=30, num_probed=6, num_stages=3, top_k=5, seed=seed
        )
        return [list(search.stages(query)) for query in queries]

    assert answers(0) == answers(0)
    assert answers(0) != answers(1)


def test_threads_that_search_at_once_do_not_disturb_each_other():
    vectors, queries = documents(6, 2000), documents(7, 60)
    search = StagedSearch(vectors, num_clusters=40, num_probed=20, num_stages=4, top_k=5)
    alone = [list(search.stages(query)) for query in queries]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda query: list(search.stages(query)), queries)) == alone


def test_the_number_of_threads_that_the_library_had_stays():
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(2)
    try:
        StagedSearch(documents(0, 20), num_clusters=2, num_probed=1, num_stages=1, top_k=1)
        assert faiss.omp_get_max_threads() == 2
    finally:
        faiss.omp_set_num_threads(before)


@pytest.mark.parametrize(
    ("corpus", "share"),
    [(python_topics(), 0.7), (generated(0, 600, 100), 0.9)],
    ids=["python_topics", "generated"],
)
def test_a_question_mostly_finds_its_document(corpus, share):
    embedder = HashedFeatures()
    search = StagedSearch(
        embedder.embed(corpus.texts), num_clusters=16, num_probed=12, num_stages=4, top_k=2
    )
    asked = np.random.default_rng(1).integers(len(corpus), size=100).tolist()
    queries = embedder.embed(questions(corpus, 2, asked))
    found = [search.search(query)[0] for query in queries]
    assert np.mean(np.equal(found, asked)) > share


FITS = {"num_clusters": 4, "num_probed": 3, "num_stages": 2, "top_k": 2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_clusters": 11}, "num_clusters=11 must be at least 1 and at most num_documents=10"),
        ({"num_probed": 5}, "num_probed=5 must be at least 1 and at most num_clusters=4; try 4"),
        ({"num_stages": 4}, "num_stages=4 must be at least 1 and at most num_probed=3; try 3"),
        ({"num_stages": 0}, "num_stages=0 must be at least 1"),
        ({"top_k": 11}, "top_k=11 must be at least 1 and at most num_documents=10; try 10"),
        ({"seed": -1}, "seed=-1 must lie from 0"),
        ({"vectors": np.zeros((0, 16))}, "vectors of shape (0, 16) must be [documents, dimension]"),
        ({"vectors": 2 * documents(0, 10)}, "the vector of document 0 has length 2, and it must"),
        ({"vectors": np.full((10, 16), np.nan)}, "the vector of document 0 has length nan"),
    ],
)
def test_what_cannot_be_searched_is_refused(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        StagedSearch(**({"vectors": documents(0, 10)} | FITS | changes))


@pytest.mark.parametrize("query", [np.ones(15), np.ones((1, 16)), np.full(16, np.nan)])
def test_a_query_of_another_shape_is_refused(query):
    search = StagedSearch(documents(0, 10), **FITS)
    with pytest.raises(ValueError, match=r"query of shape \(.*\) must be finite and of shape"):
        search.search(query)


def test_a_missing_library_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ValueError, match=r"faiss-cpu, which is not installed; pip install 'diptyc"):
        StagedSearch(documents(0, 10), **FITS)
