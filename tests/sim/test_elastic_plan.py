"""Plans of elastic instances against the contract, over whole runs of small deployments."""

from copy import deepcopy

import numpy as np
import pytest
from elastic_cases import Deployment, Job, paper_base
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.engine import ReplicaLimits
from sim.policies.instance_plan._elastic_batching import Objective, Search
from sim.policies.instance_plan._elastic_cluster import Cluster, FutureNeed, Gang
from sim.policies.instance_plan._elastic_dispatch import ever_fits
from sim.policies.instance_plan._elastic_scaling import ScaleRules, plan_decode
from sim.policies.instance_plan.elastic_sp import ElasticSp
from sim.policies.instance_plan.static_sp import StaticSp
from sim.requests import RequestView
from sim.steps import DecodeGroup, Migration, Prefill, Step

SLOTS = 60


def request(number, prompt, longest, generated=0):
    return RequestView(number, float(number), prompt, longest, generated)


def deployment(size=4, slots=SLOTS, seats=64, tokens=500, degrees=None):
    limits = ReplicaLimits(seats, tokens, 1, slots)
    return Deployment(limits, paper_base(degrees or size), size)


class Run:
    """A plan on a deployment: every decision is checked, and so is what it promised."""

    def __init__(self, plan, place, arrivals, draws):
        self.plan, self.place, self.draws = plan, place, draws
        self.memory = plan.init()
        self.arrivals = arrivals
        self.steps = []
        self.promise = None
        self.passed = 0
        self.preempted = 0

    def decide(self):
        before = deepcopy(self.memory)
        step = self.plan.step(self.memory, self.place)
        assert self.plan.step(before, self.place) == step, "another answer to the same question"
        self.check_order(step)
        was_in_round = self.place.in_round
        self.place.apply(step)
        self.steps.append(step)
        self.preempted += len(step.preempt)
        if step.decode:
            self.check_promise(step)
        elif not was_in_round:
            assert self.promise is None, "it promised a round"

    def check_order(self, step):
        """Admissions that pass over a request that could run are limited in a row."""
        if step.prefill:
            ids = [one for prefill in step.prefill for one in prefill.request_ids]
            queue = [one.request_id for one in self.place.waiting if ever_fits(one, self.place)]
            ahead = sorted(ids) == sorted(queue[: len(ids)])
            self.passed = 0 if ahead else self.passed + 1
            assert self.passed <= getattr(self.plan, "max_out_of_order", 0)

    def check_promise(self, step):
        shown = [(one.batches[0], one.instances, one.masters) for one in step.decode]
        if self.promise is not None:
            kept, groups = self.promise
            assert shown == groups, f"it promised {kept} rounds more of another round"
            assert step == Step(decode=step.decode)
        standing = self.plan.steady(self.memory, self.place)
        assert standing.rounds >= 1
        assert standing.arrivals_after >= 1
        if self.promise is None or self.promise[0] == 0:
            self.promise = (standing.rounds, shown)
            self.arrivals_after = standing.arrivals_after

    def one_event(self):
        """Something happens, and the plan is asked if it must be."""
        place = self.place
        if self.arrivals and self.draws.random() < 0.4:
            place.arrive(*self.arrivals.pop(0))
            if not place.in_round:
                self.promise = None
                self.decide()
        elif place.running and (not place.in_round or self.draws.random() < 0.2):
            place.end_prefill(int(self.draws.integers(len(place.running))))
            self.promise = None
            self.decide()
        elif place.in_round:
            self.end_round()

    def end_round(self):
        finished = self.place.end_round()
        if self.promise is not None:
            rounds, shown = self.promise
            self.arrivals_after -= 1
            broken = finished or rounds == 1
            broken |= bool(self.place.waiting) and self.arrivals_after <= 0
            self.promise = None if broken else (rounds - 1, shown)
        self.decide()

    def to_the_end(self, most=4000):
        """All requests are answered, however long that is."""
        count = len(self.arrivals) + len(self.place.queue)
        for _ in range(most):
            if len(self.place.served) == count:
                assert self.place.num_running == 0
                return self
            self.one_event()
        raise AssertionError(f"{len(self.place.served)} of {count} requests are served")


@st.composite
def arrivals(draw, most=14, whole=4 * SLOTS):
    """Requests that fit, with their hidden lengths."""
    found = []
    for number in range(draw(st.integers(1, most))):
        prompt = draw(st.one_of(st.integers(1, 30), st.integers(1, whole - 1)))
        longest = draw(st.integers(1, min(40, whole - prompt)))
        found.append((request(number, prompt, longest), draw(st.integers(1, longest))))
    return found


PLANS = st.one_of(
    st.builds(
        ElasticSp,
        attempt_every=st.sampled_from([1, 3, 10]),
        compute_bound_requests=st.sampled_from([1, 2, 128]),
        decode_round_s=st.sampled_from([0.0, 0.022, 1.0]),
        max_prefill_s=st.sampled_from([0.0, 0.05, 5.0]),
        max_out_of_order=st.integers(0, 3),
        batching=st.sampled_from(Search),
        objective=st.sampled_from(Objective),
        scale_up=st.booleans(),
        scale_down_decode=st.booleans(),
        migration_s_per_token=st.sampled_from([0.0, 1e-6, 1.0]),
    ),
    st.builds(
        StaticSp,
        attempt_every=st.sampled_from([1, 3, 10]),
        master_rounds=st.sampled_from([1, 10]),
    ),
)


@given(PLANS, arrivals(), st.integers(2, 64), st.integers(0, 2**32 - 1))
@settings(max_examples=120)
def test_every_request_is_served_and_no_rule_is_broken(plan, requests, seats, seed):
    Run(plan, deployment(seats=seats), requests, np.random.default_rng(seed)).to_the_end()


@given(PLANS, arrivals(whole=3 * SLOTS), st.integers(0, 3), st.integers(0, 2**32 - 1))
@settings(max_examples=60)
def test_the_others_serve_all_when_an_instance_is_lost(plan, requests, lost, seed):
    run = Run(plan, deployment(), [*requests], np.random.default_rng(seed))
    count = len(requests)
    for _ in range(30):
        if len(run.place.served) < count:
            run.one_event()
    while run.place.in_round:
        run.place.end_round()
    run.place.lose(lost)
    run.promise = None
    run.decide()
    run.arrivals, left = [], run.arrivals
    for one in left:
        run.place.arrive(*one)
    if not run.place.in_round:
        run.decide()
    for _ in range(4000):
        if len(run.place.served) < count:
            run.one_event()
    assert sorted(run.place.served) == [one.request_id for one, _ in requests]


@given(PLANS, arrivals(most=8), st.integers(0, 2**32 - 1))
@settings(max_examples=40)
def test_what_is_hidden_changes_no_decision_before_it_shows(plan, requests, seed):
    """Until the first answer ends in either of two runs, they are one."""
    longest = [(one, one.max_output_tokens) for one, _ in requests]
    runs = [
        Run(deepcopy(plan), deployment(), [*chosen], np.random.default_rng(seed))
        for chosen in (requests, longest)
    ]
    for _ in range(60):
        if any(run.place.served for run in runs):
            break
        for run in runs:
            run.one_event()
        if not any(run.place.served for run in runs):
            assert runs[0].steps == runs[1].steps


@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20)), max_size=8),
    st.lists(st.tuples(st.integers(1, 50), st.integers(0, 20)), min_size=1, max_size=4),
    st.integers(1, 300),
)
def test_the_need_of_the_future_is_the_highest_of_all_rounds(running, coming, capacity):
    """Against a count, round by round, of those that are still there."""
    parts = np.array(running, np.int64).reshape(-1, 2)
    need = FutureNeed(capacity, [parts[:3, 0], parts[3:, 0]], [parts[:3, 1], parts[3:, 1]])
    together = list(running)
    for one in coming:
        rows = [*together, one]
        if max_held(together) <= capacity:
            assert need.fits(*one) == (max_held(rows) <= capacity)
        together = rows
        need.add(*one)


def max_held(rows):
    rounds = range(1 + max([left for _, left in rows], default=0))
    return max(sum(stored + n for stored, left in rows if left >= n) for n in rounds)


def jobs(place, number, prompt, at, generated=1, longest=1000):
    """One that decodes, with KV on these instances in equal parts."""
    kv = np.zeros(place.size, np.int64)
    for one in at:
        kv[one] = (prompt + generated - 1) // len(at)
    return Job(request(number, prompt, longest), longest, generated, kv)


def with_batch(place, count, at, prompt, generated=1):
    first = place.num_running
    found = [jobs(place, first + n, prompt, at, generated) for n in range(count)]
    place.add_batch(found, tuple(at))
    return place


def first_step(plan, place, memory=None):
    step = plan.step(plan.init() if memory is None else memory, place)
    place.apply(step)
    return step


def big(slots=210_000, **rest):
    return deployment(slots=slots, seats=1024, tokens=500_000, **rest)


def test_a_long_prompt_runs_on_all_and_stays_on_one():
    place = big()
    place.arrive(request(0, 100_000, 100), 10)
    assert first_step(ElasticSp(), place).prefill == (Prefill((0,), (0, 1, 2, 3), ((0, 100_000),)),)


def test_two_long_prompts_of_equal_length_share_the_instances():
    place = big()
    for number in range(2):
        place.arrive(request(number, 1_000, 100), 10)
    groups = first_step(ElasticSp(), place).prefill
    assert sorted(at for one in groups for at in one.instances) == [0, 1, 2, 3]
    assert len(groups) == 2


def test_a_large_batch_gets_another_master_and_its_kv_stays():
    place = with_batch(big(), 300, [0], 100)
    (group,) = first_step(ElasticSp(), place).decode
    assert group.masters == ((0, 128), (1, 128), (2, 44))
    assert group.instances == (0, 1, 2)


def test_without_scale_up_it_stays_alone():
    place = with_batch(big(), 300, [0], 100)
    (group,) = first_step(ElasticSp(scale_up=False), place).decode
    assert group.masters == ((0, 300),)


def test_a_batch_short_of_slots_gets_an_empty_instance():
    place = with_batch(deployment(slots=100), 10, [0], 9)
    (group,) = first_step(ElasticSp(), place).decode
    assert group.masters == ((0, 10),)
    place.end_round()
    (group,) = first_step(ElasticSp(), place).decode
    assert group == DecodeGroup((0,), (0, 1), ((1, 10),))


def test_a_batch_short_of_slots_joins_the_one_with_most_to_spare():
    place = with_batch(with_batch(deployment(size=3, slots=100), 10, [0], 10), 5, [1], 10)
    with_batch(place, 5, [2], 5)
    groups = first_step(ElasticSp(), place).decode
    assert groups[0] == DecodeGroup((0, 2), (0, 2), ((2, 15),))
    assert groups[1] == DecodeGroup((1,), (1,), ((1, 5),))


def test_the_latest_request_is_pre_empted_when_no_slot_is_left():
    place = with_batch(with_batch(deployment(size=2, slots=100), 10, [0], 10), 10, [1], 10)
    plan, memory = ElasticSp(), ElasticSp().init()
    step = first_step(plan, place, memory)
    assert step.preempt == (18, 19), "the KV of one is 10 slots, and 19 requests would be left"
    assert sum(count for group in step.decode for _, count in group.masters) == 18
    assert [one.request_id for one in place.waiting] == [18, 19]


def test_packing_frees_an_instance_when_the_move_pays():
    place = with_batch(with_batch(big(), 1, [0], 1_000), 1, [1], 500)
    place.arrive(request(9, 200_000, 100), 10)
    free = deepcopy(place)
    step = first_step(ElasticSp(), place)
    assert step.migrate == (Migration(1, 1, 0, 500),)
    assert step.prefill[0].instances == (1, 2, 3)
    assert step.decode == (DecodeGroup((0, 1), (0,), ((0, 2),)),)
    step = first_step(ElasticSp(migration_s_per_token=1.0, decode_round_s=1e3), free)
    assert step.migrate == ()


def test_a_round_decides_on_idle_instances_alone():
    place = with_batch(big(), 1, [0], 1_000)
    plan, memory = ElasticSp(), ElasticSp().init()
    first_step(plan, place, memory)
    place.arrive(request(9, 1_000, 100), 10)
    step = first_step(plan, place, memory)
    assert step == Step(prefill=step.prefill)
    assert 0 not in step.prefill[0].instances


def test_between_attempts_nothing_is_admitted_and_rounds_stand_until_the_next():
    place = with_batch(big(), 1, [0], 1_000)
    plan, memory = ElasticSp(attempt_every=7), ElasticSp().init()
    memory.attempt = -2
    place.arrive(request(9, 1_000, 100), 10)
    assert not first_step(plan, place, memory).prefill
    assert plan.steady(memory, place) == (5, 5)
    place.rounds, place.round = 5, []
    assert first_step(plan, place, memory).prefill


def test_a_request_that_never_fits_holds_up_nobody():
    place = deployment()
    place.arrive(request(0, 4 * SLOTS, 10), 1)
    place.arrive(request(1, 10, 10), 1)
    for plan in (ElasticSp(max_out_of_order=0), StaticSp()):
        copied = deepcopy(place)
        assert [one.request_ids for one in first_step(plan, copied).prefill] == [(1,)]


def test_the_static_group_is_everybody_and_shares_kv_equally():
    place = big()
    place.arrive(request(0, 10, 100), 10)
    place.arrive(request(1, 1, 100), 10)
    (prefill,) = first_step(StaticSp(), place).prefill
    assert prefill == Prefill((0, 1), (0, 1, 2, 3), ((0, 3), (1, 3), (2, 3), (3, 2)))
    place.end_prefill(0)
    plan, memory = StaticSp(), StaticSp().init()
    step = first_step(plan, place, memory)
    assert step.decode == (DecodeGroup((0,), (0, 1, 2, 3), ((3, 2),)),)
    assert plan.steady(memory, place).rounds == 10


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"attempt_every": 0}, "attempt_every=0 must be at least 1"),
        ({"max_out_of_order": -1}, "0 keeps the order of arrival"),
        ({"max_prefill_s": -1.0}, "max_prefill_s=-1.0 must not be negative"),
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        ElasticSp(**wrong)


@given(
    st.integers(1, 700),
    st.lists(st.integers(0, 3000), min_size=1, max_size=4),
    st.sampled_from([1, 50, 128]),
)
@settings(max_examples=100)
def test_masters_stay_for_as_many_rounds_as_a_plan_says(count, used, bound):
    """Told round by round on one batch whose members fill as it decodes."""
    now = Cluster(4000, [4000 - one for one in used] + [4000] * (4 - len(used)), [], {}, {})
    now.open = list(range(4))
    members = frozenset(range(len(used)))
    spare = list(range(len(used), 4))
    first = plan_decode([Gang((0,), count, members)], now, spare, ScaleRules(bound, True))
    for _ in range(min(first.rounds, 25) if first.groups else 0):
        held = members | {at for at, _ in first.groups[0].masters}
        spare = [at for at in spare if at not in held]
        again = plan_decode([Gang((0,), count, held)], now, spare, ScaleRules(bound, True))
        assert again.groups[0].masters == first.groups[0].masters
        for at, size in first.groups[0].masters:
            now.free[at] -= size
            assert now.free[at] >= 0
        members = held


def test_a_prefill_keeps_off_the_instances_of_a_batch_that_is_paused_for_another():
    """Otherwise prefills that overlap could keep it from decoding for ever."""
    place = with_batch(with_batch(big(), 2, [0, 1], 1_000), 1, [0], 1_000, generated=900)
    place.arrive(request(9, 450_000, 100), 10)
    free = deepcopy(place)
    running = Job(request(8, 1_000, 9), 9, 0, np.array([0, 1_000, 0, 0]))
    place.running.append((Prefill((8,), (1,), ((1, 1_000),)), [running]))
    plan = ElasticSp(decode_round_s=1e3)
    step = first_step(plan, place)
    assert not step.prefill, "450,000 tokens do not fit two instances"
    assert [group.batches for group in step.decode] == [(1,)]
    assert first_step(plan, free).prefill, "and do when nothing is paused for another"
