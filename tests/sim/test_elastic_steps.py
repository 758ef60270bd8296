"""Single steps of elastic plans, in situations whose best answer is known."""

from copy import deepcopy

import numpy as np
import pytest
from elastic_cases import Deployment, Job, paper_base
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.engine import ReplicaLimits
from sim.policies.instance_plan._elastic_cluster import Cluster, Gang
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
