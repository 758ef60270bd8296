"""The log of elastic instances, on runs by hand whose every token's instant is known."""

import numpy as np
import pytest

from hardware_models.scaling import DecodeScaling, PrefillScaling, ScalingBase
from sim.decision_rows import expand
from sim.elastic_log import ElasticLog
from sim.engine import ReplicaLimits
from sim.metrics import inter_token_gaps, request_times, token_times
from sim.requests import Request
from sim.state.elastic_state import ElasticState
from sim.steps import DecodeGroup, Migration, Prefill, Step
from sim.trace_merge import of_replica

SCALING = ScalingBase(
    name="by_hand", model="none", device="none", source="by hand",
    prefill=[PrefillScaling(base_s=1.0, token_s=0.0, square_s=0.0)],
    decode=DecodeScaling(base_s=1.0, request_s=0.0, master_request_s=0.0, context_token_s=0.0),
)  # fmt: skip
A, B, C = 0, 1, 2


class ByHand:
    """Does to a state what an executor does, at instants that are given."""

    def __init__(self, num_instances=3):
        self.state = ElasticState(ReplicaLimits(8, 64, 1, 64), num_instances, SCALING)
        self.log = ElasticLog(self.state)

    def arrive(self, request_id, arrival_s, prompt, output):
        request = Request(request_id, arrival_s, prompt, output, output)
        self.log.arrived(request)
        self.state.submit(request)

    def begin(self, instant_s, step, lost=-1):
        state, log = self.state, self.log
        log.asked(instant_s, step, lost)
        log.preempted(state.preempt(step.preempt), instant_s)
        for plan in step.migrate:
            for one in state.migrate(plan):
                log.moved(one, instant_s, instant_s + 0.25)
        for place, plan in enumerate(step.prefill):
            log.prefill_begun(state.begin_prefill(plan), place, instant_s)
        if step.decode:
            log.round_begun(state.begin_round(step.decode), instant_s)

    def end_prefill(self, lane, instant_s):
        _, done = self.state.end_prefill(lane)
        self.log.prefill_ended(lane, instant_s)
        self.log.finished(done, instant_s)

    def end_rounds(self, *ends_s):
        self.state.pass_rounds(len(ends_s))
        done = self.state.end_round()
        self.log.rounds_ended(ends_s)
        self.log.finished(done, ends_s[-1])

    def lose(self, instance, instant_s):
        self.log.lost(instance, self.state.lose(instance), instant_s)


@pytest.fixture
def run():
    """A is paused while C prefills, then pre-empted; B goes on with both and takes four tokens."""
    hand = ByHand()
    hand.arrive(A, 0.0, 4, 6)
    hand.arrive(B, 0.5, 3, 4)
    hand.begin(1.0, Step(prefill=(Prefill((A,), (0, 1), ((1, 4),)),)))
    hand.end_prefill(0, 2.0)
    both = (Prefill((B,), (0,), ((0, 3),)),), (DecodeGroup((0,), (1, 2), ((2, 1),)),)
    hand.begin(2.0, Step((), (), *both))
    hand.end_rounds(2.5, 3.5)
    hand.end_prefill(0, 4.0)
    hand.arrive(C, 4.25, 5, 1)
    pause = (Prefill((C,), (1, 2), ((2, 5),)),), (DecodeGroup((1,), (0,), ((0, 1),)),)
    hand.begin(4.5, Step((), (), *pause))
    hand.end_rounds(5.0)
    hand.end_prefill(1, 6.0)
    moves = (Migration(0, 1, 2, 3),)
    hand.begin(6.0, Step((), moves, (), (DecodeGroup((0, 1), (0, 1, 2), ((2, 1), (0, 1))),)))
    hand.end_rounds(7.0)
    hand.begin(8.0, Step((A,), (), (), (DecodeGroup((0,), (0,), ((0, 1),)),)))
    hand.end_rounds(9.0)
    hand.begin(9.0, Step(prefill=(Prefill((A,), (0, 1, 2), ((0, 8),)),)))
    hand.end_prefill(0, 10.0)
    hand.begin(10.0, Step(decode=(DecodeGroup((2,), (0,), ((0, 1),)),)))
    hand.end_rounds(12.0)
    return hand


TIMES_S = {
    A: [2.0, 2.5, 3.5, 7.0, 10.0, 12.0],
    B: [4.0, 5.0, 7.0, 9.0],
    C: [6.0],
}


def test_every_token_has_its_instant(run):
    trace = run.log.trace()
    assert {one: token_times(trace, one).tolist() for one in TIMES_S} == TIMES_S


def test_times_of_requests_are_those_of_their_tokens(run):
    times = request_times(run.log.trace())
    assert times.request.tolist() == [A, B, C]
    assert times.scheduled_s.tolist() == [1.0, 2.0, 4.5]
    assert times.first_token_s.tolist() == [each[0] for each in TIMES_S.values()]
    assert times.last_token_s.tolist() == [each[-1] for each in TIMES_S.values()]
    assert times.output_tokens.tolist() == [6, 4, 1]
    assert times.num_preemptions.tolist() == [1, 0, 0]


def test_gaps_are_those_between_the_tokens_of_each_request(run):
    gaps = inter_token_gaps(run.log.trace())
    found = np.repeat(gaps.gap_s, gaps.weight)
    expected = np.concatenate([np.diff(each) for each in TIMES_S.values()])
    np.testing.assert_array_equal(np.sort(found), np.sort(expected))


def test_the_lanes_are_the_first_instances_of_prefills_and_the_rounds(run):
    trace = run.log.trace()
    assert trace.iterations["replica"].tolist() == [0, 0, 0, 1, 3, 3, 3, 3, 3, 3]
    rounds = expand(of_replica(trace, 3))
    assert [sorted(one.tokens) for one in rounds] == [[A], [A], [B], [A, B], [B], [A]]
    assert [one.preempted for one in rounds] == [(), (), (), (), (A,), ()]
    prefills = [one.tokens for lane in (0, 1) for one in expand(of_replica(trace, lane))]
    assert prefills == [{A: 4}, {B: 3}, {A: 8}, {C: 5}]
    contexts = trace.decisions["decode_context"][trace.decisions["replica"] == 3]
    assert contexts.tolist() == [5, 4, 7 + 5, 6, 9]


def test_the_tables_have_every_step_and_every_member(run):
    tables = run.log.tables()
    assert tables.steps["rounds"].tolist() == [0, 2, 1, 1, 1, 0, 1]
    assert tables.steps["free_slots"].tolist() == [192, 188, 183, 182, 180, 192, 184]
    rounds = tables.members["kind"] == 2
    names = ("instance", "requests", "tokens", "end_s")
    rows = list(zip(*(tables.members[name][rounds].tolist() for name in names), strict=True))
    assert rows[:2] == [(1, 0, 4, 3.5), (2, 1, 0, 3.5)]
    assert rows[3:6] == [(0, 1, 4, 7.0), (1, 0, 1, 7.0), (2, 1, 5, 7.0)]
    kept = tables.members["tokens"][~rounds].tolist()
    assert kept == [0, 4, 3, 0, 5, 8, 0, 0]
    moved = {name: column.tolist() for name, column in tables.kv_moves.items()}
    assert moved["tokens"] == [3]
    assert (moved["source"], moved["target"], moved["end_s"]) == ([1], [2], [6.25])
    assert not np.isnan(tables.members["end_s"]).any()


def two_groups():
    """A on instance 0 and B on instance 1 decode in one round, from 2.0 on."""
    hand = ByHand(2)
    hand.arrive(A, 0.0, 4, 5)
    hand.arrive(B, 0.0, 3, 5)
    both = Prefill((A,), (0,), ((0, 4),)), Prefill((B,), (1,), ((1, 3),))
    hand.begin(1.0, Step(prefill=both))
    hand.end_prefill(0, 2.0)
    hand.end_prefill(1, 2.0)
    round_of = DecodeGroup((0,), (0,), ((0, 1),)), DecodeGroup((1,), (1,), ((1, 1),))
    hand.begin(2.0, Step(decode=round_of))
    return hand


def test_a_lost_group_gets_no_token_of_its_round_and_the_others_do():
    """The loss is at 3.5, in mid-stretch: one round had passed."""
    hand = two_groups()
    hand.state.pass_rounds(1)
    hand.log.rounds_ended([3.0], over=False)
    hand.lose(0, 3.5)
    hand.end_rounds(4.0, 5.0)
    hand.begin(5.0, Step(prefill=(Prefill((A,), (1,), ((1, 6),)),)), lost=0)
    hand.end_prefill(1, 6.0)
    hand.begin(6.0, Step(decode=(DecodeGroup((1, 2), (1,), ((1, 2),)),)))
    hand.end_rounds(7.0)
    hand.begin(7.0, Step(decode=(DecodeGroup((1,), (1,), ((1, 1),)),)))
    hand.end_rounds(8.0)
    trace = hand.log.trace()
    assert token_times(trace, A).tolist() == [2.0, 3.0, 6.0, 7.0, 8.0]
    assert token_times(trace, B).tolist() == [2.0, 3.0, 4.0, 5.0, 7.0]
    assert hand.log.tables().steps["rounds"].tolist() == [0, 3, 0, 1, 1]
    ends = hand.log.tables().members["end_s"]
    assert ends.tolist() == [2.0, 2.0, 3.5, 5.0, 6.0, 7.0, 8.0]


def test_a_round_and_a_prefill_that_are_lost_whole_end_then_and_bring_nothing():
    hand = two_groups()
    hand.end_rounds(3.0)
    hand.arrive(C, 3.0, 2, 1)
    prefill = (Prefill((C,), (1,), ((1, 2),)),)
    hand.begin(3.0, Step((), (), prefill, (DecodeGroup((0,), (0,), ((0, 1),)),)))
    hand.lose(0, 3.25)
    hand.lose(1, 3.5)
    trace = hand.log.trace()
    assert token_times(trace, A).tolist() == [2.0, 3.0]
    assert token_times(trace, B).tolist() == [2.0, 3.0]
    assert token_times(trace, C).tolist() == []
    assert trace.iterations["end_s"].tolist() == [2.0, 2.0, 3.5, 3.0, 3.25]
    assert trace.num_decisions == trace.num_iterations
    assert len(request_times(trace).request) == 0
