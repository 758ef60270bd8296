"""The two executors of `knowledge_cache`: real tiers decide, copy and answer as simulated ones."""

from functools import lru_cache

import numpy as np
import pytest

from backends.corruption import Corruption
from backends.knowledge_cache import serve_knowledge
from backends.serving import open_model, use_one_thread
from scenarios.validation import knowledge, knowledge_cases
from scenarios.validation.ask import KnowledgePlan, Plan
from scenarios.validation.options import Fault, Options, Question
from scenarios.validation.verdict import Verdict
from sim.generations import GIVEN_UP, LOST
from sim.knowledge_mishaps import Mishaps
from sim.knowledge_rules import Rules
from sim.policies.registry import policies
from sim.state.knowledge_tree import MoveKind
from sim.trace import State

COUNT = 120


def tiny():
    return knowledge_cases.tiny(COUNT, 0)


@pytest.fixture(autouse=True)
def _one_thread():
    use_one_thread()


def rules(eviction="pgdsf", order="fcfs", overlap="none", batching="continuous"):
    return Rules(
        policies("batching")[batching](), policies("cache_eviction")[eviction](),
        policies("request_order")[order](), policies("retrieval_overlap")[overlap](),
    )  # fmt: skip


def assert_equal(panels, decided):
    lines = [knowledge.decision_line("case", panels)]
    lines += [knowledge.table_line("case", what, table, panels)
              for what, table in knowledge.TABLES.items()]  # fmt: skip
    lines += knowledge.byte_lines("case", panels, open_model("random", "cpu")[1].config)
    assert [line.metric for line in lines if line.verdict is not Verdict.passed] == []
    kinds = set(panels.real.trace.moves["kind"].tolist())
    assert decided <= kinds, "the case is too small to say anything"


OVERFLOWS = {MoveKind.insert, MoveKind.load, MoveKind.swap_out, MoveKind.drop, MoveKind.forget}


@pytest.mark.parametrize("eviction", ["lru", "lfu", "gdsf", "pgdsf"])
@pytest.mark.parametrize(
    ("order", "overlap", "batching"),
    [("fcfs", "none", "continuous"), ("cache_aware", "speculative", "chunked_prefill")],
)
def test_hits_evictions_swaps_and_bytes_are_equal_under_replay(eviction, order, overlap, batching):
    panels = knowledge.run_both(rules(eviction, order, overlap, batching), tiny(), 0, "cpu")
    assert_equal(panels, OVERFLOWS)
    # Whether one is stopped for other documents depends on how fast the machine is.
    assert overlap == "speculative" or (panels.real.trace.stages["stopped"] < 0).all()


@lru_cache
def _answers(reuse, overlap="none"):
    case = knowledge_cases.tiny(COUNT, 1)
    model = open_model("random", "cpu")[1]
    return serve_knowledge(
        model, case.questions, case.searcher(), case.texts(model.config.vocab_size, 1),
        rules("lru", overlap=overlap), case.limits, case.tiers._replace(reuse=reuse),
    )  # fmt: skip


@pytest.mark.parametrize("overlap", ["none", "speculative"])
def test_cached_documents_change_no_token(overlap):
    plain, cached = _answers(False), _answers(True, overlap)
    assert cached.answers == plain.answers
    assert cached.bytes_loaded > 0
    assert plain.bytes_loaded == plain.bytes_swapped_out == 0
    assert cached.kv_bytes_written < plain.kv_bytes_written or overlap == "speculative"


def test_searches_of_both_panels_find_the_same_documents():
    case = knowledge_cases.tiny(COUNT, 1)
    found = _answers(True).found
    assert [tuple(found[one.request.request_id]) for one in case.questions] == [
        one.stages for one in case.questions
    ]


def test_every_question_is_answered_once_and_no_answer_is_there_before_its_documents():
    trace = _answers(True, "speculative").trace
    searches = trace.searches
    assert sorted(searches["request"].tolist()) == list(range(COUNT))
    finished = trace.events["request"][trace.events["state"] == State.finished]
    assert np.isin(searches["generation"], finished).all()
    cancelled = trace.events["request"][trace.events["state"] == State.cancelled]
    assert not np.isin(searches["generation"], cancelled).any()


@pytest.mark.parametrize("fault", [Fault.skip_free, Fault.drop_copy])
def test_a_seeded_fault_is_caught(fault):
    options = Options(decision_requests=20, corrupt=fault, only=[Question.decisions])
    plan = Plan("test", options, {}, {}, None, knowledge=KnowledgePlan(rules(), {}))
    lines = knowledge.exact_lines("pgdsf", rules(), plan)
    assert any(line.verdict is Verdict.missed for line in lines)


def test_a_copy_that_is_dropped_shows_in_the_bytes():
    whole = knowledge.run_both(rules(), tiny(), 0, "cpu")
    case = Corruption(kind="drop_copy", index=0)
    broken = knowledge.run_both(rules(), tiny(), 0, "cpu", case)
    config = open_model("random", "cpu")[1].config

    def missed(panels):
        return [line.metric for line in knowledge.byte_lines("", panels, config)
                if line.verdict is Verdict.missed]  # fmt: skip

    assert missed(whole) == []
    assert missed(broken) != []


def test_without_a_host_tier_nothing_is_copied():
    case = tiny()
    case = case._replace(tiers=case.tiers._replace(host_blocks=0))
    panels = knowledge.run_both(rules(), case, 0, "cpu")
    assert_equal(panels, {MoveKind.insert, MoveKind.drop})
    assert panels.real.bytes_loaded == panels.real.bytes_swapped_out == 0


def replicating():
    case = tiny()
    return case._replace(tiers=case.tiers._replace(replicate_from=3))


def test_hot_documents_are_replicated_alike():
    assert_equal(knowledge.run_both(rules(), replicating(), 0, "cpu"), {MoveKind.replicate})


@pytest.mark.parametrize("overlap", ["none", "speculative"])
def test_a_lost_gpu_tier_and_clients_that_leave_are_decided_alike(overlap):
    mishaps = Mishaps(lost_s=(0.05, 0.25), restart_s=0.02, timeout_s=0.04)
    panels = knowledge.run_both(rules(overlap=overlap), replicating(), 0, "cpu", mishaps=mishaps)
    assert_equal(panels, {MoveKind.replicate})
    trace = panels.real.trace
    assert (trace.stages["stage"] == GIVEN_UP).any()
    assert (trace.stages["stage"] == LOST).sum() == 2


def test_no_token_is_wrong_after_the_gpu_tier_is_lost():
    mishaps = Mishaps(lost_s=(0.05, 0.25, 0.4))
    panels = knowledge.run_both(rules("lru"), replicating(), 1, "cpu", mishaps=mishaps)
    plain = knowledge.run_both(rules("lru"), replicating()._replace(), 1, "cpu")
    assert panels.real.answers == plain.real.answers


def test_what_a_client_left_behind_holds_nothing():
    case = tiny()
    mishaps = Mishaps(timeout_s=0.02)
    panels = knowledge.run_both(rules(overlap="speculative"), case, 0, "cpu", mishaps=mishaps)
    trace = panels.real.trace
    left = trace.stages["request"][trace.stages["stage"] == GIVEN_UP]
    assert len(left)
    assert not np.isin(left, list(panels.real.answers)).any()
    assert len(panels.real.answers) + len(left) == COUNT
