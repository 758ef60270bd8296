"""Where the TTFT of lone requests went, in closed form; and which of them pictures show."""

import numpy as np
import pytest
from serving_cases import POLICIES, PromptSeconds

from sim.engine import ReplicaLimits
from sim.generations import Question
from sim.knowledge_rules import Rules, Tiers
from sim.knowledge_timeline import Found, clearest, paths
from sim.policies.cache_eviction.lru import Lru
from sim.policies.request_order.fcfs import Fcfs
from sim.policies.retrieval_overlap.none import NoOverlap
from sim.policies.retrieval_overlap.speculative import Speculative
from sim.processes.knowledge_cache import Search, simulate_knowledge
from sim.processes.pace import Costed
from sim.requests import Request
from sim.workload.knowledge import Documents

DOCUMENTS = Documents(np.array([8, 8]))
OWN_TOKENS = 3


def _make_trace(asked, *, gap_s=100.0, overlap=None, token_s=1.0):
    """Documents of requests that come so far apart; room for one document on the GPU."""
    questions = [
        Question(Request(number, number * gap_s, 8 + OWN_TOKENS, 1, 1), ((one,), (one,)),
                 OWN_TOKENS)
        for number, one in enumerate(asked)
    ]  # fmt: skip
    rules = Rules(POLICIES["continuous"], Lru(), Fcfs(), overlap or NoOverlap())
    tiers = Tiers(DOCUMENTS, 99, lambda cached, new: 1.0, lambda blocks: 0.1 + 0.2 * blocks)
    return simulate_knowledge(
        iter(questions), rules, ReplicaLimits(4, 999, 4, 4), Costed(PromptSeconds(token_s)), tiers,
        Search(1.0, 0.5, 4),
    )  # fmt: skip


def test_parts_of_a_miss_a_gpu_hit_and_a_host_hit():
    found = paths(_make_trace([0, 0, 1, 0]))
    assert {kind: list(ways) for kind, ways in found.items()} == {
        Found.miss: [0, 2], Found.host_hit: [3], Found.gpu_hit: [1],
    }  # fmt: skip
    search_s, copy_s = 2.0, 0.5
    expected = {
        (Found.miss, 0): (0.0, 11.0), (Found.gpu_hit, 1): (0.0, 3.0),
        (Found.miss, 2): (copy_s, 11.0), (Found.host_hit, 3): (2 * copy_s, 3.0),
    }  # fmt: skip
    for (kind, number), (copies_s, prefill_s) in expected.items():
        way = found[kind][number]
        assert way.searched_s == pytest.approx(search_s)
        assert way.queue_s == pytest.approx(0.0)
        assert way.copied_s - way.admitted_s == pytest.approx(copies_s)
        assert way.first_token_s - way.copied_s == pytest.approx(prefill_s)


def test_a_prefill_ahead_of_the_end_of_its_search_begins_before_it():
    way = paths(_make_trace([0], overlap=Speculative()))[Found.miss][0]
    assert way.admitted_s == pytest.approx(1.0)
    assert way.searched_s == pytest.approx(2.0)
    assert way.queue_s == 0.0


def test_the_request_that_waited_least_is_shown_and_only_one_that_both_panels_found_alike():
    crowded, sparse = _make_trace([0, 0, 1, 0], gap_s=4.0), _make_trace([0, 0, 0, 0])
    chosen = clearest((crowded, sparse))
    assert set(chosen) == {Found.miss, Found.gpu_hit}
    for kind, (ours, theirs) in chosen.items():
        assert ours.request == theirs.request
        both = paths(crowded)[kind].keys() & paths(sparse)[kind].keys()
        assert ours.queue_s == min(paths(crowded)[kind][one].queue_s for one in both)
