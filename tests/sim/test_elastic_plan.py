"""Plans of elastic instances against the contract, over whole runs of small deployments."""

from copy import deepcopy

import numpy as np
from elastic_cases import Deployment, paper_base
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.engine import ReplicaLimits
from sim.policies.instance_plan._elastic_batching import Objective, Search
from sim.policies.instance_plan._elastic_cluster import FutureNeed
from sim.policies.instance_plan._elastic_dispatch import ever_fits
from sim.policies.instance_plan.elastic_sp import ElasticSp
from sim.policies.instance_plan.static_sp import StaticSp
from sim.requests import RequestView
from sim.steps import Step

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
