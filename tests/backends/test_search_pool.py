import threading
import time
from itertools import pairwise

import numpy as np
import pytest

from backends.search_pool import SearchPool, Wanted
from backends.staged_search import StagedSearch

QUERY = np.ones(1, np.float32)


class Counting:
    """Finds document after document, and notes when each search began."""

    def __init__(self, num_stages=3):
        self.num_stages = num_stages
        self.began = []

    def stages(self, query):
        self.began.append(int(query[0]))
        for stage in range(self.num_stages):
            yield tuple(range(stage + 1))


class Failing:
    """Fails in the second stage of one query."""

    num_stages = 2

    def stages(self, query):
        yield (0,)
        if query[0] == 1:
            raise OSError("the index is gone")
        yield (0, 1)


def requests(arrivals):
    return [
        Wanted(request_id=number, arrival_s=arrival_s, query=QUERY * number)
        for number, arrival_s in enumerate(arrivals)
    ]


def run(pool, timeout_s=5.0):
    """All that a pool finds, read as an engine loop does."""
    found = []
    pool.start(time.perf_counter())
    while not pool.done:
        assert pool.wait(timeout_s)
        found += pool.due()
    return found


def workers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("search-")]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert workers() == []


@pytest.mark.parametrize("num_workers", [1, 3])
def test_each_request_has_its_stages_in_order_and_one_end(num_workers):
    with SearchPool(Counting(), requests([0.0] * 20), num_workers=num_workers) as pool:
        found = run(pool)
        assert pool.due() == []
        assert not pool.wait(5.0)
    assert len(found) == 60
    for number in range(20):
        stages = [one for one in found if one.request_id == number]
        assert [one.stage for one in stages] == [0, 1, 2]
        assert [one.final for one in stages] == [False, False, True]
        assert [one.documents for one in stages] == [(0,), (0, 1), (0, 1, 2)]
        assert all(first.instant_s <= then.instant_s for first, then in pairwise(stages))


def test_searches_begin_in_order_of_arrival_and_not_before_it():
    arrivals = [0.03, 0.0, 0.06, 0.03]
    search = Counting()
    with SearchPool(search, requests(arrivals)) as pool:
        found = run(pool)
    assert search.began == [1, 0, 3, 2]
    assert all(one.instant_s >= arrivals[one.request_id] for one in found)


@pytest.mark.parametrize("num_workers", [1, 4])
def test_as_many_searches_run_at_once_as_there_are_workers(num_workers):
    class Meeting:
        """No search of a round ends before all of them have begun."""

        num_stages = 1
        met = threading.Barrier(num_workers)

        def stages(self, query):
            self.met.wait(5.0)
            yield ()

    with SearchPool(Meeting(), requests([0.0] * 8), num_workers=num_workers) as pool:
        pool.start(time.perf_counter())
        assert len(workers()) <= num_workers
        while not pool.done:
            assert pool.wait(5.0)
            pool.due()


def test_an_emulated_stage_takes_no_less_than_its_time():
    with SearchPool(Counting(), requests([0.01]), stage_s=0.02) as pool:
        assert pool.is_emulated
        instants = [0.01] + [one.instant_s for one in run(pool)]
    assert all(then - before >= 0.0199 for before, then in pairwise(instants))
    assert not SearchPool(Counting(), []).is_emulated


def test_the_pool_finds_what_the_search_finds():
    vectors = np.random.default_rng(0).normal(size=(300, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    pytest.importorskip("faiss")
    search = StagedSearch(vectors, num_clusters=12, num_probed=8, num_stages=4, top_k=3)
    wanted = [
        Wanted(request_id=number, arrival_s=0.0, query=vectors[number]) for number in range(40)
    ]
    with SearchPool(search, wanted, num_workers=2) as pool:
        found = run(pool)
    for one in wanted:
        stages = [stage.documents for stage in found if stage.request_id == one.request_id]
        assert stages == list(search.stages(one.query))


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_search_that_fails_raises_in_the_reader(num_workers):
    with SearchPool(Failing(), requests([0.0, 0.0, 60.0]), num_workers=num_workers) as pool:
        with pytest.raises(RuntimeError, match=r"request 1 failed with OSError.*gone") as caught:
            run(pool)
        assert isinstance(caught.value.__cause__, OSError)
        assert pool.wait(5.0)
        with pytest.raises(RuntimeError, match="request 1 failed"):
            pool.due()
        assert not pool.done


def test_a_search_with_fewer_stages_than_it_says_is_no_hang():
    search = Counting(num_stages=2)
    search.stages = lambda _: iter([(0,)])
    with SearchPool(search, requests([0.0])) as pool, pytest.raises(RuntimeError, match="Stop"):
        run(pool)


def test_closing_ends_workers_that_sleep():
    pool = SearchPool(Counting(), requests([0.0, 60.0, 60.0]), num_workers=3, stage_s=30.0)
    before_s = time.perf_counter()
    pool.start(before_s)
    assert len(workers()) == 3
    assert not pool.wait(0.02)
    pool.close()
    assert time.perf_counter() - before_s < 5
    assert pool.due() == []  # a stage that was cut short is no stage
    assert not pool.wait()
    assert not pool.done
    pool.close()


def test_a_pool_without_requests_is_done():
    with SearchPool(Counting(), []) as pool:
        pool.start(time.perf_counter())
        assert pool.done
        assert not pool.wait()


def test_a_pool_that_was_not_started_waits_for_nothing():
    with SearchPool(Counting(), requests([0.0])) as pool:
        assert not pool.wait()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_workers": 0}, "num_workers=0 must be at least 1"),
        ({"stage_s": -1.0}, "stage_s=-1.0 must be finite and not negative"),
        ({"wanted": requests([0.0]) * 2}, "request 0 is there twice"),
        ({"wanted": requests([-1.0])}, "request 0: arrival_s=-1.0 must be finite and not negative"),
    ],
)
def test_what_cannot_be_run_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SearchPool(**({"search": Counting(), "wanted": []} | arguments))


def test_a_pool_starts_once():
    with SearchPool(Counting(), requests([0.0])) as pool:
        run(pool)
        with pytest.raises(ValueError, match="started or closed before"):
            pool.start(0.0)
    with pytest.raises(ValueError, match="started or closed before"):
        pool.start(0.0)
