"""`diptych validate` of a study whose instances form groups anew, on tiny models."""

import json
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from backends.elastic_orders import Work
from hardware_models.scaling import DecodeScaling, PrefillScaling, ScalingBase
from scenarios.elastic_plot import lively, stays, two_timelines
from scenarios.validation import elastic_both, elastic_time
from scenarios.validation.elastic import cases, suited_to_tiny
from scenarios.validation.elastic_script import Job
from scenarios.validation.elastic_time import CALIBRATED, JUDGED, JUDGED_BATCH, ROUNDS, Timing
from scenarios.validation.elastic_traffic import Traffic
from scenarios.validation.verdict import Verdict
from sim.costs.elastic import Scaled
from sim.elastic_trace import DECODE, PREFILL
from sim.models.architecture import load_architecture
from sim.policies.instance_plan.elastic_sp import ElasticSp
from sim.policies.instance_plan.static_sp import StaticSp
from sim.steps import DecodeGroup, Migration, Prefill, Step

ACCEPT = {
    "prefill_error": 0.15, "prefill_ratio_error": 0.1, "round_error": 0.2, "keep_share": 0.02,
    "keep_error": 0.05,
}  # fmt: skip
PLAIN = ("policy.instance_plan.scale_up=false", "policy.instance_plan.scale_down_decode=false")
"""One rule: nothing of it is left to be switched off."""
ONE = ("policy/instance_plan=elastic_sp", *PLAIN)


def validate(diptych, workplace, *arguments):
    code, said, errors = diptych(
        "validate", "-cn", "loongserve", f"out={workplace / 'found'}", *arguments
    )
    return code, json.loads((workplace / "found" / "validation.json").read_text()), said + errors


def test_decisions_bytes_and_numbers_agree(diptych, workplace):
    code, content, _ = validate(
        diptych, workplace, "only=[decisions,bytes,numbers]", "decision_requests=16", "prompts=6",
        "new_tokens=6", "weights=random", *ONE,
    )  # fmt: skip
    lines = {line["metric"]: line for line in content["lines"] if line["metric"]}
    assert code == 0, lines
    assert {line["verdict"] for line in lines.values()} == {"passed"}
    for name in ("steps", "members"):
        assert lines[f"elastic_sp: rows of {name} that differ"]["measured"] != "0"
    for name in ("ring", "query", "partial"):
        assert f"elastic_sp: bytes sent, {name}" in lines
    assert lines["every kind of group: largest logit difference"]["accepted"] == 1e-4


def test_a_corrupted_pool_is_a_miss(diptych, workplace):
    code, content, _ = validate(
        diptych, workplace, "only=[decisions]", "decision_requests=20", "corrupt=skip_free", *ONE
    )
    assert code == 1
    assert "missed" in {line["verdict"] for line in content["lines"]}


def test_time_is_asked_of_every_degree_and_drawn(diptych, workplace, monkeypatch):
    for name, value in (
        ("PASSES", 2), ("CALIBRATED", (64, 128, 256)), ("JUDGED", (192,)), ("PAIRED", 160),
        ("ROUNDS", 2), ("CALIBRATED_BATCHES", ((1, 128), (2, 64), (4, 32))),
        ("JUDGED_BATCH", (3, 64)),
    ):  # fmt: skip
        monkeypatch.setattr(elastic_time, name, value)
    monkeypatch.setattr(elastic_both, "SHOWN", 5)
    _, content, said = validate(
        diptych, workplace, "only=[time]", "repeats=1", "accept.prefill_error=0.4", *ONE
    )
    lines = {line["metric"]: line for line in content["lines"] if line["question"] == "time"}
    for degree in (1, 2):
        assert lines[f"prefill of 192 tokens, d = {degree}"]["accepted"] == 0.4
    assert lines["copies that keep KV: share of the prefill"]["error"] > 0
    assert "of 4 pairs" in lines["prefill of 160 tokens: with scale-down over without"]["measured"]
    assert (workplace / "found" / "timeline.png").read_bytes()[:4] == b"\x89PNG"
    assert "timeline.png" in said


@pytest.mark.parametrize(
    ("argument", "part"),
    [
        ("+accept.ttft_median_error=0.1", "accept names ['ttft_median_error'], which nothing"),
        ("corrupt=stale_block", "corrupt=stale_block needs blocks that stay cached"),
        ("policy/instance_plan=elastic_sp,colocated", "policy/instance_plan=colocated forms no"),
    ],
)
def test_what_elastic_instances_do_not_have_is_refused(diptych, workplace, argument, part):
    code, _, errors = diptych("validate", "-cn", "loongserve", f"out={workplace / 'x'}", argument)
    assert code == 2
    assert part in errors


def test_each_rule_is_asked_whole_and_without_what_can_be_switched_off():
    found = list(cases({"elastic_sp": ElasticSp(attempt_every=7), "static_sp": StaticSp()}))
    assert [(case.name, case.must_change) for case in found] == [
        ("elastic_sp", True), ("elastic_sp, scale_up=false", False),
        ("elastic_sp, scale_down_decode=false", False), ("static_sp", False),
    ]  # fmt: skip
    assert found[0].plan.attempt_every == 7, "what a study says stays"
    assert found[0].plan.compute_bound_requests < ElasticSp().compute_bound_requests
    assert not found[1].plan.scale_up
    assert not found[2].plan.scale_down_decode
    assert suited_to_tiny(found[0].plan) == found[0].plan


def view_of(waiting=(), batches=(), free=(50, 50, 50)):
    """What a plan sees: waiting (request, tokens), batches (number, request ids)."""
    return SimpleNamespace(
        waiting=[SimpleNamespace(request_id=one, prefill_tokens=n) for one, n in waiting],
        batches=[SimpleNamespace(number=n, request_ids=np.array(ids)) for n, ids in batches],
        free_slots=np.array(free),
    )  # fmt: skip


def test_traffic_of_steps_by_hand():
    """Two prompts of 5 and 4 tokens on a ring of three, two rounds, a migration, a pre-emption."""
    traffic = Traffic()
    plan = Prefill((7, 3), (2, 0, 1), ((2, 6), (0, 3)))
    traffic.take(Step(prefill=(plan,)), view_of(waiting=[(3, 4), (7, 5)]))
    assert traffic.ring_tokens == 2 * 9
    assert traffic.where == {7: Counter({2: 5}), 3: Counter({2: 1, 0: 3})}
    one = DecodeGroup((0,), (0, 1, 2), ((1, 1), (2, 1)))
    traffic.take(Step(decode=(one,)), view_of(batches=[(0, [7, 3])]))
    # Request 7 has its master on 1 and asks 2; request 3 has it on 2 and asks 0.
    assert traffic.queries == 2
    move = Step(migrate=(Migration(0, 2, 1, 6),), decode=(one._replace(masters=((0, 2),)),))
    traffic.take(move, view_of(batches=[(0, [7, 3])]))
    # All of request 7 is on 1 then, and one token of request 3, whose other is on 2 still.
    assert traffic.moved_tokens == 6
    assert traffic.where == {7: Counter({1: 6, 0: 1, 2: 0}), 3: Counter({0: 4, 1: 1, 2: 1})}
    assert traffic.queries == 2 + 1 + 2
    again = Step(preempt=(3,), prefill=(Prefill((3,), (0, 1), ((0, 7),)),))
    traffic.take(again, view_of(batches=[(0, [7, 3])]))
    assert traffic.ring_tokens == 2 * 9 + 7, "4 prompt tokens, 2 rounds, and the last token"
    assert traffic.changes == Counter(
        {"scale-downs": 2, "scale-ups for compute": 1, "migrations": 1, "pre-emptions": 1,
         "scale-ups for memory": 0}
    )  # fmt: skip


def test_bytes_of_traffic_by_hand():
    config = replace(
        load_architecture("tiny_llama"), num_layers=3, num_heads=4, num_kv_heads=2, head_dim=6
    )
    found = Traffic(ring_tokens=10, queries=7, moved_tokens=2).payload_bytes(config)
    assert found == {
        "ring": 10 * 3 * 2 * 2 * 6 * 4, "query": 7 * 3 * 4 * 6 * 4, "partial": 7 * 3 * 4 * 7 * 4,
        "migration": 2 * 3 * 2 * 2 * 6 * 4, "migration_positions": 2 * 8,
    }  # fmt: skip


def test_a_master_without_kv_is_for_memory_where_those_with_kv_are_full():
    for free, name in (((0, 50, 50), "memory"), ((9, 50, 50), "compute")):
        traffic = Traffic(where={1: Counter({0: 3})})
        group = DecodeGroup((0,), (0, 1), ((1, 1),))
        traffic.take(Step(decode=(group,)), view_of(batches=[(0, [1])], free=free))
        assert traffic.changes[f"scale-ups for {name}"] == 1
        assert traffic.changes.total() == 1


BASE = ScalingBase(
    name="by hand", model="none", device="none", source="by hand",
    prefill=[PrefillScaling(base_s=4e-3, token_s=1e-4 / d, square_s=5e-8 / d) for d in (1, 2)],
    decode=DecodeScaling(
        base_s=4e-3, request_s=0.0, master_request_s=1e-4, context_token_s=1e-6, exchange_s=2e-3
    ),
)  # fmt: skip


def repeat_of(slower=1.0, keeps=0.005, spread=1.0):
    """Timings as a base says; judged ones of two instances are slower."""
    timings = []
    for length in (*CALIBRATED, *JUDGED):
        for degree in (1, 2):
            off = slower if degree == 2 and length in JUDGED else 1.0
            seconds = BASE.prefill_s(degree, length, length**2) * off
            timings += [Timing(Job(1, degree, spread=False), length, seconds, [])] * 6
    paired_s = BASE.prefill_s(2, elastic_time.PAIRED, elastic_time.PAIRED**2)
    for kept in (False, True):
        seconds = paired_s * (1.0 if kept else spread)
        timings += [Timing(Job(1, 2, spread=kept), elastic_time.PAIRED, seconds, [])] * 12
    for requests, length in (*elastic_time.CALIBRATED_BATCHES, JUDGED_BATCH):
        for masters in (1, 2)[:requests]:
            job = Job(requests, 1, spread=False, masters=masters, rounds=ROUNDS)
            one = Timing(job, length, 0.0, [])
            works = [elastic_time.work_of(one, number) for number in range(ROUNDS)]
            rounds = [Scaled(BASE).round_run_s([work], 1)[0] for work in works]
            timings += [one._replace(round_s=rounds)] * 6
    work = [Work(0, "prefill", 100, 0.0, 0.1, keeps * 0.1, 0.0)] * 10
    return elastic_time.repeat_of(timings, work)


def test_a_base_is_found_again_and_what_it_says_passes():
    found = repeat_of()
    for mine, theirs in zip(found.base.prefill, BASE.prefill, strict=True):
        assert vars(mine) == pytest.approx(vars(theirs), rel=1e-6)
    assert found.base.decode.exchange_s == pytest.approx(2e-3, rel=1e-6)
    assert found.base.decode.master_request_s == pytest.approx(1e-4, rel=1e-6)
    lines = elastic_time.time_lines([found] * 2, ACCEPT, 0)
    assert {line.verdict for line in lines} == {Verdict.passed}
    assert len(lines) == 3 * len(JUDGED) + 4


def test_what_is_a_third_slower_misses_and_so_do_dear_copies_and_slow_scale_down():
    def missed(repeat):
        lines = elastic_time.time_lines([repeat] * 2, ACCEPT, 0)
        return [line.metric for line in lines if line.verdict is Verdict.missed]

    assert len(missed(repeat_of(slower=1.33))) == 2 * len(JUDGED)
    assert missed(repeat_of(keeps=0.03)) == ["copies that keep KV: share of the prefill"]
    (one,) = missed(repeat_of(spread=1.06))
    assert "with scale-down over without" in one


def trace_of(*rows):
    """A trace of members (step, kind, group, instance, requests, start, end)."""
    names = ("step", "kind", "group", "instance", "requests", "start_s", "end_s")
    columns = {name: np.array(column) for name, column in zip(names, zip(*rows, strict=True),
                                                              strict=True)}  # fmt: skip
    ends = columns["end_s"][~np.isnan(columns["end_s"])]
    return SimpleNamespace(
        members=columns, iterations={"end_s": ends}, num_iterations=len(ends)
    )  # fmt: skip


ROWS = (
    (0, PREFILL, 0, 0, 1, 0.0, 1.0), (0, PREFILL, 0, 1, 1, 0.0, 1.0),
    (1, DECODE, 0, 1, 1, 1.0, 1.1), (2, DECODE, 0, 1, 1, 1.1, 1.2),
    (3, DECODE, 0, 0, 1, 1.2, 1.3), (3, DECODE, 0, 1, 0, 1.2, 1.3),
    (4, PREFILL, 0, 2, 1, 1.25, float("nan")),
)  # fmt: skip


def test_rounds_of_the_same_group_are_one_bar_and_another_group_is_another():
    found = stays(trace_of(*ROWS))
    assert [(one.prefills, one.degree, one.start_s, one.end_s) for one in found] == [
        (True, 2, 0.0, 1.0), (False, 1, 1.0, 1.2), (False, 2, 1.2, 1.3), (True, 1, 1.25, 1.25),
    ]  # fmt: skip
    assert found[2].masters == (0,)


def test_a_long_run_shows_a_part_and_the_picture_is_the_same_again(tmp_path):
    many = [(at, PREFILL, 0, at % 3, 1, float(at), at + 0.9) for at in range(300)]
    many += [(300, PREFILL, 0, at, 1, 300.0, 301.0) for at in range(3)]
    start, stop = lively(trace_of(*many))
    assert start > 200, "where degrees differ"
    assert stop == 301.0
    short = trace_of(*ROWS[:-1])
    drawn = [two_timelines(short, short, "title", tmp_path / f"{at}.png") for at in range(2)]
    assert drawn[0].read_bytes() == drawn[1].read_bytes()
