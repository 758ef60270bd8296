"""`diptych validate` of a study whose plan places experts, on the tiny mixture."""

import json

import numpy as np
import pytest

from backends.expert_timing import Busy, Timed
from scenarios.pipeline_plot import two_pipelines
from scenarios.validation import experts_time
from scenarios.validation.experts_time import COUNTS, LAYERS, NATIVE, SHARES, Repeat, Stages
from scenarios.validation.verdict import Verdict
from sim.state.ping_pong import StageSeconds

ACCEPT = {"speed_up_error": 0.10, "iteration_error": 0.15}
STAGES = Stages(2e-3, 1.5e-3, 1e-3, 1e-4, 5e-5, Busy(1.0, 1.0))


def validate(diptych, workplace, *arguments):
    code, said, errors = diptych(
        "validate", "-cn", "megascale_infer", f"out={workplace / 'found'}", *arguments
    )
    return code, json.loads((workplace / "found" / "validation.json").read_text()), said + errors


@pytest.mark.slow
def test_decisions_bytes_and_numbers_are_asked_of_every_rule(diptych, workplace):
    code, content, _ = validate(
        diptych, workplace, "only=[decisions,bytes,numbers]", "decision_requests=8", "prompts=2",
        "new_tokens=3", "policy/expert_balance=static,replicate_hot",
    )  # fmt: skip
    lines = content["lines"]
    assert code == 0, lines
    exact = [line for line in lines if line["question"] in ("decisions", "bytes")]
    assert {line["verdict"] for line in exact} == {"passed"}
    lists = [line for line in exact if "dispatch lists" in line["metric"]]
    assert {line["metric"].partition(":")[0] for line in lists} == {
        "batching chunked_prefill", "none", "replicate_hot",
    }  # fmt: skip
    assert all(line["measured"] != "0" for line in lists)
    numbers = [line for line in lines if "logit" in line["metric"]]
    assert len(numbers) == 3
    assert all(line["accepted"] == 1e-4 and line["verdict"] == "passed" for line in numbers)


@pytest.mark.slow
def test_a_corrupted_cache_is_a_miss(diptych, workplace):
    code, content, _ = validate(
        diptych, workplace, "only=[decisions,bytes]", "decision_requests=40", "corrupt=skip_free",
        "policy/micro_batching=ping_pong",
    )  # fmt: skip
    assert code == 1
    assert "missed" in {line["verdict"] for line in content["lines"]}


@pytest.mark.slow
def test_time_is_asked_of_every_link_and_number_of_micro_batches(diptych, workplace, monkeypatch):
    monkeypatch.setattr(experts_time, "ITERATIONS", 3)
    monkeypatch.setattr(experts_time, "TOGETHER_ROUNDS", 1)
    monkeypatch.setattr(experts_time, "COUNTS", (1, 3))
    monkeypatch.setattr(experts_time, "SHARES", (0.38,))
    _, content, said = validate(
        diptych, workplace, "only=[time]", "repeats=1", "accept.speed_up_error=0.2"
    )
    lines = {line["metric"]: line for line in content["lines"] if line["question"] == "time"}
    names = ["native link", "emulated link, T_c/T_f 0.38"]
    for name in names:
        assert f"{name}: iteration, m = 3" in lines
        assert lines[f"{name}: speed-up of m = 3 over 1"]["accepted"] == 0.2
    assert "a layer takes" in lines["two busy ranks slow each other down"]["note"]
    assert (workplace / "found" / "timeline.png").read_bytes()[:4] == b"\x89PNG"
    assert "timeline.png" in said


def test_an_accepted_error_of_another_kind_of_study_is_refused(diptych, workplace):
    code, _, errors = diptych(
        "validate", "-cn", "megascale_infer", "+accept.ttft_median_error=0.1",
        f"out={workplace / 'x'}",
    )  # fmt: skip
    assert code == 2
    assert "accept names ['ttft_median_error'], which nothing judges" in errors
    assert "speed_up_error" in errors


def as_predicted(stages, off=1.0):
    """A repeat whose iterations take what is predicted, but for several micro-batches."""
    empty = Repeat(stages, {}, {f"{share:.2f}": share * stages.compute_s for share in SHARES})
    measured = {}
    for name in (NATIVE, *empty.nominal):
        for count in COUNTS:
            seconds = experts_time.predicted_s(empty, name, count) * (off if count > 1 else 1.0)
            measured[name, count] = Timed([seconds] * 4, [0.0], [0.0], [0.0], [])
    return empty._replace(measured=measured)


def test_what_is_as_predicted_passes_and_what_is_a_fifth_slower_misses():
    lines = experts_time.time_lines([as_predicted(STAGES)] * 2, ACCEPT, 0)
    assert len(lines) == (1 + len(SHARES)) * (len(COUNTS) + len(COUNTS) - 1)
    assert {line.verdict for line in lines} == {Verdict.passed}
    assert max(line.error for line in lines) < 1e-9
    slow = experts_time.time_lines([as_predicted(STAGES, 1.2)] * 2, ACCEPT, 0)
    missed = [line for line in slow if line.verdict is Verdict.missed]
    assert len(missed) == (1 + len(SHARES)) * 2 * (len(COUNTS) - 1)
    assert all(line.error == pytest.approx(1 / 6, rel=1e-6) for line in missed
               if "iteration" in line.metric)  # fmt: skip


def test_stages_are_interpolated_to_a_size_that_was_not_timed():
    assert experts_time.TOKENS not in experts_time.CALIBRATED
    timings = [
        Timed(
            [LAYERS * (3e-4 * size + 2e-4) + 1e-3] * 3,
            [1e-4 * size] * 2,
            [1e-4 * size, 3e-4 * size],
            [1e-3],
            [],
        )
        for size in experts_time.CALIBRATED
    ]
    found = experts_time.calibrate(timings, None, Busy(1.0, 1.0))
    assert found.attention_s == pytest.approx(1e-4 * experts_time.TOKENS)
    assert found.expert_s == pytest.approx(2e-4 * experts_time.TOKENS)
    assert found.native_s == pytest.approx(1e-4)
    assert found.attention_ratios == pytest.approx(1.0)
    assert found.expert_ratios.reshape(-1, 2) == pytest.approx(np.array([[0.5, 1.5]] * 4))


def test_what_varies_makes_iterations_longer_only_where_sides_wait_for_each_other():
    varied = STAGES._replace(attention_ratios=np.array([0.5, 1.5]))
    plain, other = (as_predicted(one) for one in (STAGES, varied))
    for count, longer in ((1, 1.0), (2, 1.05)):
        ratio = experts_time.predicted_s(other, NATIVE, count) / experts_time.predicted_s(
            plain, NATIVE, count
        )
        assert ratio == pytest.approx(1.0, abs=0.05) if longer == 1.0 else ratio > longer


def test_ranks_slow_each_other_only_while_both_work():
    stages = StageSeconds(2e-3, 1e-3, 1e-4)
    slow = Busy(1.4, 1.2)
    assert experts_time.side_by_side(stages, slow, 1) == stages
    assert experts_time.side_by_side(stages, Busy(1.0, 1.0), 3) == stages
    found = experts_time.side_by_side(stages, slow, 3)
    assert 1.0 < found.attention_s / stages.attention_s < 1.4
    assert found.expert_s / stages.expert_s == pytest.approx(1.2, rel=1e-3)


def test_the_picture_is_the_same_again(tmp_path):
    spans = [
        (name, f"layer {layer}", layer + at / 4, layer + at / 4 + 0.2, at)
        for layer in range(6) for at in range(3) for name in ("attention 0", "experts 0")
    ]  # fmt: skip
    drawn = [two_pipelines(spans, spans, "title", tmp_path / f"{at}.png") for at in range(2)]
    assert drawn[0].read_bytes() == drawn[1].read_bytes()
    assert np.all([path.read_bytes()[:4] == b"\x89PNG" for path in drawn])
