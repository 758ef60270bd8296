"""Laws of a simulated replica with a knowledge cache, under every rule and random loads."""

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_cases import POLICIES, Grid, PromptSeconds, assert_equal_traces

from sim.decision_rows import canonical, expand
from sim.engine import ReplicaLimits
from sim.generations import GIVEN_UP, LOST, Question, prompt_tokens
from sim.knowledge_mishaps import NO_MISHAPS, Mishaps
from sim.knowledge_rules import Rules, Tiers
from sim.metrics import request_times
from sim.policies.registry import policies
from sim.policies.request_order.cache_aware import CacheAware
from sim.policies.request_order.fcfs import Fcfs
from sim.policies.retrieval_overlap.none import NoOverlap
from sim.policies.retrieval_overlap.speculative import Speculative
from sim.processes.knowledge_cache import Search, StageLog, simulate_knowledge
from sim.processes.pace import Costed, Replayed
from sim.requests import Request
from sim.state.knowledge_tree import MoveKind
from sim.trace import State
from sim.workload.knowledge import Documents

BLOCK = 4
LATE_S = 1e6
TABLES = ("searches", "stages", "lookups", "moves")
BATCHING = ["continuous", "chunked_prefill"]


class _Case(NamedTuple):
    questions: list[Question]
    rules: Rules
    limits: ReplicaLimits
    tiers: Tiers
    search: Search
    step_s: float
    mishaps: Mishaps = NO_MISHAPS


def _make_rules(eviction="pgdsf", order=None, overlap=None, batching="continuous"):
    return Rules(
        POLICIES[batching], policies("cache_eviction")[eviction](), order or Fcfs(),
        overlap or NoOverlap(),
    )  # fmt: skip


def _make_questions(rows, documents):
    """Questions of (arrival, own tokens, output tokens, lists of documents)."""
    questions = []
    for number, (arrival_s, tokens, output, stages) in enumerate(rows):
        own = tokens + documents.system_tokens
        prompt = own + sum(int(documents.tokens[one]) for one in stages[-1])
        request = Request(number, float(arrival_s), prompt, output, output)
        questions.append(Question(request, tuple(stages), own))
    return questions


@st.composite
def _cases(draw):
    lengths = draw(st.lists(st.integers(1, 13), min_size=3, max_size=5))
    documents = Documents(np.array(lengths), draw(st.sampled_from([0, 3, 9])))
    some = st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=2, unique=True)
    stages = st.lists(some.map(tuple), min_size=1, max_size=3)
    row = st.tuples(st.integers(0, 3), st.integers(1, 6), st.integers(1, 12), stages)
    step_s, arrival_s, rows = draw(st.sampled_from([0.5, 0.1])), 0.0, []
    for wait, *rest in draw(st.lists(row, min_size=1, max_size=14)):
        arrival_s += wait * step_s
        rows.append((arrival_s, *rest))
    questions = _make_questions([*rows, (LATE_S, 1, 1, [(0,)])], documents)
    most = max(
        prompt_tokens(one, found, documents.tokens) + one.request.output_tokens
        for one in questions for found in one.stages
    )  # fmt: skip
    seats = draw(st.integers(1, 4))
    num_blocks = -(-most // BLOCK) + draw(st.integers(0, 4))
    limits = ReplicaLimits(seats, draw(st.sampled_from([8, 64])), BLOCK, num_blocks)
    copy_s = draw(st.sampled_from([0.0, 0.1]))
    tiers = Tiers(
        documents, draw(st.sampled_from([3, 5, 0, 8, 99])),
        lambda cached, new: 0.1 + new * (1.0 + cached / 64), lambda blocks: copy_s * blocks,
        draw(st.sampled_from([True, True, True, False])), draw(st.sampled_from([None, 1, 2])),
    )  # fmt: skip
    rules = _make_rules(
        draw(st.sampled_from(["gdsf", "lfu", "lru", "pgdsf"])),
        draw(st.sampled_from([Fcfs(), CacheAware(window=2)])),
        draw(st.sampled_from([NoOverlap(), Speculative(max_prefill_bs=2)])),
        draw(st.sampled_from(BATCHING)),
    )
    search = Search(step_s, draw(st.sampled_from([0.0, step_s])), draw(st.integers(1, 3)))
    lost_s = draw(st.lists(st.integers(0, 40), max_size=2).map(sorted))
    mishaps = Mishaps(
        tuple(0.25 * one for one in lost_s), draw(st.sampled_from([0.0, 0.3])),
        draw(st.sampled_from([None, None, 0.7, 2.5])),
    )  # fmt: skip
    return _Case(questions, rules, limits, tiers, search, step_s, mishaps)


def _run(case, *, pace=None, log=None, one_by_one=False):
    return simulate_knowledge(
        iter(case.questions), case.rules, case.limits, pace or Costed(Grid(case.step_s)),
        case.tiers, case.search, log, mishaps=case.mishaps, one_by_one=one_by_one,
    )  # fmt: skip


def _left(trace):
    """Requests whose clients left."""
    return set(trace.stages["request"][trace.stages["stage"] == GIVEN_UP].tolist())


def _rows(table, *, instants=True):
    return [column.tolist() for name, column in table.items() if instants or name != "instant_s"]


@settings(max_examples=100, deadline=None)
@given(case=_cases())
def test_every_question_is_answered_once_and_not_before_its_search_is_over(case):
    trace = _run(case)
    count = len(case.questions)
    left = _left(trace)
    assert case.mishaps.gives_up or not left
    searched = trace.searches["request"].tolist()
    assert len(searched) == len(set(searched))
    assert set(searched) | left == set(range(count))
    ended = {
        state: trace.events["request"][trace.events["state"] == state].tolist()
        for state in (State.finished, State.cancelled)
    }
    answers = trace.searches["generation"].tolist()
    wanted = {answer for request, answer in zip(searched, answers, strict=True)
              if request not in left}  # fmt: skip
    assert len(ended[State.finished]) == len(set(ended[State.finished]))
    assert wanted <= set(ended[State.finished])
    assert set(answers) - wanted <= set(ended[State.cancelled])
    assert not wanted & set(ended[State.cancelled])
    started = trace.stages["started"][trace.stages["started"] >= 0].tolist()
    assert sorted(started) == sorted(trace.requests["request"].tolist())
    times = request_times(trace)
    end_s = dict(zip(answers, trace.searches["end_s"].tolist(), strict=True))
    for generation, first_s in zip(
        times.request.tolist(), times.first_token_s.tolist(), strict=True
    ):
        assert first_s >= end_s[generation] - 1e-9


@settings(max_examples=100, deadline=None)
@given(case=_cases())
def test_blocks_are_conserved_and_all_are_free_or_cached_once_everyone_has_left(case):
    trace = _run(case)
    free, cached = trace.decisions["free_blocks"], trace.decisions["cached_blocks"]
    assert ((cached >= 0) & (cached <= free) & (free <= case.limits.num_blocks)).all()
    late = np.flatnonzero(trace.decisions["instant_s"] >= LATE_S)
    assert len(late) or case.questions[-1].request.request_id in _left(trace)
    assert (free[late[:1]] == case.limits.num_blocks).all()
    assert (trace.decisions["context_tokens"][late[:1]] == 0).all()
    on_gpu = on_host = 0
    arrives = (MoveKind.insert, MoveKind.load)
    for kind, blocks in zip(
        *(trace.moves[one].tolist() for one in ("kind", "blocks")), strict=True
    ):
        on_gpu += blocks * ((kind in arrives) - (kind in (MoveKind.swap_out, MoveKind.drop)))
        on_host += blocks * ((kind in (MoveKind.swap_out, MoveKind.replicate))
                             - (kind == MoveKind.forget))  # fmt: skip
        assert on_gpu >= 0
        assert 0 <= on_host <= case.tiers.host_blocks
    assert on_gpu <= case.limits.num_blocks
    if case.tiers.host_blocks == 0:
        copies = (MoveKind.swap_out, MoveKind.replicate, MoveKind.load)
        moved = np.isin(trace.moves["kind"], copies)
        assert trace.moves["blocks"][moved].sum() == 0


@settings(max_examples=150, deadline=None)
@given(case=_cases())
def test_decode_stretches_are_as_their_iterations_one_by_one(case):
    whole, single = canonical(_run(case)), canonical(_run(case, one_by_one=True))
    assert expand(whole) == expand(single)
    for table in TABLES:
        assert _rows(getattr(whole, table)) == _rows(getattr(single, table)), table


@settings(max_examples=60, deadline=None)
@given(case=_cases())
def test_the_same_run_gives_the_same_bytes(case):
    one, other = _run(case), _run(case)
    assert_equal_traces(one, other)
    for table in TABLES:
        for name, column in getattr(one, table).items():
            assert column.tobytes() == getattr(other, table)[name].tobytes()


@settings(max_examples=100, deadline=None)
@given(case=_cases())
def test_replay_at_its_own_instants_decides_the_same(case):
    case = case._replace(
        tiers=case.tiers._replace(copy_s=lambda blocks: 0.0),
        mishaps=case.mishaps._replace(restart_s=0.0),
    )
    trace = _run(case, one_by_one=True)
    again = _run(case, pace=Replayed.of(trace), log=StageLog.of(trace), one_by_one=True)
    assert expand(again) == expand(trace)
    for table in TABLES:
        rows = [_rows(getattr(one, table), instants=False) for one in (again, trace)]
        assert rows[0] == rows[1], table


def _lone_ttft_s(rows, lengths, **given):
    """TTFT of questions that never meet; see `_lone_times`."""
    return _lone_times(rows, lengths, **given).ttft_s.tolist()


def _lone_times(
    rows, lengths, *, num_blocks, host_blocks=99, overlap=None, search=None, mishaps=NO_MISHAPS,
    replicate_from=None,
):  # fmt: skip
    """Questions that never meet, at 1 s a prefilled token and 0.1 + 0.2 s a block copied."""
    documents = Documents(np.array(lengths))
    tiers = Tiers(documents, host_blocks, lambda cached, new: 1.0 * new,
                  lambda blocks: 0.1 + 0.2 * blocks, replicate_from=replicate_from)  # fmt: skip
    trace = simulate_knowledge(
        iter(_make_questions(rows, documents)), _make_rules(overlap=overlap),
        ReplicaLimits(4, 999, BLOCK, num_blocks), Costed(PromptSeconds(1.0)), tiers,
        search or Search(1.0, 0.5, 4), mishaps=mishaps,
    )  # fmt: skip
    return request_times(trace)


def test_ttft_of_lone_requests_in_closed_form():
    stages = [(0,), (0,)], [(0,), (0,)], [(1,), (1,)], [(0,), (0,)]
    rows = [(100 * at, 3, 1, found) for at, found in enumerate(stages)]
    search_s, copy_s = 1.0 + 2 * 0.5, 0.1 + 0.2 * 2
    miss_s, gpu_hit_s = search_s + 11, search_s + 3
    # The pool has room for one document of two blocks beside the block of a question.
    expected = [miss_s, gpu_hit_s, miss_s + copy_s, gpu_hit_s + 2 * copy_s]
    found = _lone_ttft_s(rows, [8, 8], num_blocks=4)
    assert found == pytest.approx(expected)
    assert found[1] < found[3] < found[0]
    # Without host memory nothing is copied, and what has left is computed again.
    found = _lone_ttft_s(rows, [8, 8], num_blocks=4, host_blocks=0)
    assert found == pytest.approx([miss_s, gpu_hit_s, miss_s, miss_s])


def test_ttft_after_a_loss_in_closed_form():
    rows = [(100 * at, 3, 1, [(0,), (0,)]) for at in range(3)]
    search_s, copy_s = 1.0 + 2 * 0.5, 0.1 + 0.2 * 2
    miss_s, gpu_hit_s = search_s + 11, search_s + 3
    lost = Mishaps(lost_s=(150.0,))
    found = _lone_ttft_s(rows, [8], num_blocks=4, mishaps=lost)
    assert found == pytest.approx([miss_s, gpu_hit_s, miss_s])
    # With a copy ahead of need, made before the second one's prefill, only a copy is needed.
    found = _lone_ttft_s(rows, [8], num_blocks=4, mishaps=lost, replicate_from=1)
    assert found == pytest.approx([miss_s, gpu_hit_s + copy_s, gpu_hit_s + copy_s])
    # A restart that nobody waits for costs nobody anything.
    lost = Mishaps(lost_s=(150.0,), restart_s=40.0)
    found = _lone_ttft_s(rows, [8], num_blocks=4, mishaps=lost)
    assert found == pytest.approx([miss_s, gpu_hit_s, miss_s])
    lost = Mishaps(lost_s=(150.0,), restart_s=60.0)
    found = _lone_ttft_s(rows, [8], num_blocks=4, mishaps=lost)
    assert found == pytest.approx([miss_s, gpu_hit_s, miss_s + 10.0 - search_s])
    # A loss takes effect after the iteration: its token is there, all else is computed again.
    times = _lone_times([(0, 3, 4, [(0,), (0,)])], [8], num_blocks=4,
                        mishaps=Mishaps(lost_s=(7.0,), restart_s=5.0))  # fmt: skip
    assert times.ttft_s == pytest.approx([miss_s])
    assert times.e2e_s == pytest.approx([miss_s + 5 + 12])


def test_a_search_waits_for_a_core():
    rows = [(0, 1, 1, [(0,)]), (0, 1, 1, [(1,)])]
    found = _lone_ttft_s(rows, [4, 4], num_blocks=9, search=Search(20.0, 0.0, 1))
    assert found == pytest.approx([25.0, 45.0])


@pytest.mark.parametrize("scan_s", [4.0, 12.0, 40.0])
@pytest.mark.parametrize("tokens", [4, 8, 36])
def test_a_right_guess_saves_the_rest_of_the_search_or_the_prefill(scan_s, tokens):
    rows = [(0, 1, 1, [(0,)] * 4)]
    saved = [
        _lone_ttft_s(rows, [tokens], num_blocks=20, overlap=rule, search=Search(scan_s, 0.0, 1))[0]
        for rule in (NoOverlap(), Speculative())
    ]
    assert saved[0] - saved[1] == pytest.approx(min(scan_s * 3 / 4, tokens + 1))


def test_the_random_loads_do_hit_swap_forget_stop_and_pre_empt():
    seen = dict.fromkeys([*MoveKind, "stopped", "preempted", "left", "lost"], 0)

    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(case=_cases())
    def count(case):
        trace = _run(case)
        for kind in MoveKind:
            seen[kind] += int((trace.moves["kind"] == kind).sum())
        seen["stopped"] += int((trace.stages["stopped"] >= 0).sum())
        seen["left"] += len(_left(trace))
        seen["lost"] += int((trace.stages["stage"] == LOST).sum())
        seen["preempted"] += int((trace.events["state"] == State.preempted).sum())

    count()
    assert min(seen.values()) > 0, seen
