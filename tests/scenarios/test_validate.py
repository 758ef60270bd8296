"""`diptych validate` on the tiny model: what it prints, writes and exits with."""

import json

import numpy as np
import pytest

from scenarios.cli import main
from scenarios.validation.intervals import two_stage
from scenarios.validation.reproduced import median_error
from scenarios.validation.verdict import Verdict, judge_error, judge_exact


def validate(tmp_path, *arguments):
    out = tmp_path / "validation"
    code = main(["validate", "-cn", "replica", f"out={out}", *arguments])
    return code, json.loads((out / "validation.json").read_text()), out


def test_decisions_and_bytes_pass_and_are_written(tmp_path, capsys):
    code, content, _ = validate(tmp_path, "only=[decisions,bytes]", "decision_requests=24")
    assert code == 0
    lines = content["lines"]
    exact = [line for line in lines if line["question"] in ("decisions", "bytes")]
    assert len(exact) == 3 * 4
    assert {line["verdict"] for line in exact} == {"passed"}
    assert {line["verdict"] for line in lines if line not in exact} == {"not_run"}
    assert "chunked_prefill" in capsys.readouterr().out
    assert content["provenance"]["commit"]


@pytest.mark.parametrize("fault", ["skip_free", "drop_copy"])
def test_a_seeded_corruption_makes_validate_fail(tmp_path, fault):
    arguments = ["only=[decisions,bytes]", "decision_requests=60", f"corrupt={fault}"]
    arguments += ["policy/batching=static,chunked_prefill"]
    code, content, _ = validate(tmp_path, *arguments)
    assert code == 1
    assert "missed" in {line["verdict"] for line in content["lines"]}


def test_prefix_caching_is_taken_from_the_study(tmp_path):
    arguments = ["only=[decisions,bytes]", "decision_requests=40", "engine.prefix_caching=true"]
    code, content, _ = validate(tmp_path, *arguments)
    assert code == 0
    exact = [line for line in content["lines"] if line["question"] in ("decisions", "bytes")]
    assert {line["verdict"] for line in exact} == {"passed"}
    assert sum("prompt tokens reused" in line["note"] for line in exact) == 3


def test_replicas_behind_a_router_are_asked_too(tmp_path):
    arguments = ["only=[decisions,bytes]", "decision_requests=40", "policy/batching=continuous"]
    routed = ["num_replicas=2", "policy/routing=least_loaded", "engine.prefix_caching=true"]
    code, content, _ = validate(tmp_path, *arguments, *routed)
    assert code == 0
    lines = [line for line in content["lines"] if line["metric"].startswith("least_loaded")]
    assert len(lines) == 2 + 3
    assert {line["verdict"] for line in lines} == {"passed"}


def test_a_stale_block_makes_validate_fail_and_needs_a_cache(tmp_path, capsys):
    arguments = ["only=[decisions]", "decision_requests=80", "corrupt=stale_block"]
    arguments += ["policy/batching=continuous"]
    assert main(["validate", "-cn", "replica", f"out={tmp_path / 'none'}", *arguments]) == 2
    assert "add engine.prefix_caching=true" in capsys.readouterr().err
    code, content, _ = validate(tmp_path, *arguments, "engine.prefix_caching=true")
    assert code == 1
    assert "missed" in {line["verdict"] for line in content["lines"]}


@pytest.mark.parametrize("question", ["decisions", "bytes"])
def test_a_panel_that_stops_is_a_miss_of_each_question(tmp_path, question):
    arguments = [f"only=[{question}]", "corrupt=drop_copy", "policy/batching=chunked_prefill"]
    arguments += ["decision_requests=60"]
    code, content, _ = validate(tmp_path, *arguments)
    assert code == 1
    mine = [line["verdict"] for line in content["lines"] if line["question"] == question]
    assert "missed" in mine


@pytest.mark.filterwarnings("default:the calibration was not kept")
def test_answers_outlive_a_calibration_that_cannot_be_kept(tmp_path, monkeypatch, capsys):
    (tmp_path / ".config" / "diptych" / "node").mkdir(parents=True)
    (tmp_path / ".config" / "diptych" / "node" / "this_machine.yaml").write_text("name: [")
    monkeypatch.setenv("HOME", str(tmp_path))
    arguments = ["only=[time]", "weights=random", "time_requests=3", "repeats=1"]
    arguments += ["policy/batching=continuous"]
    _, content, _ = validate(tmp_path, *arguments)
    assert content["lines"]
    assert "warning: the calibration was not kept" in capsys.readouterr().err


def test_the_time_question_draws_the_two_panels(tmp_path):
    arguments = ["only=[time]", "weights=random", "time_requests=12", "repeats=2"]
    arguments += ["policy/batching=continuous,chunked_prefill"]
    # On a busy machine a line may miss: that is a finding about the machine, not about the code.
    code, content, out = validate(tmp_path, *arguments)
    timed = [line for line in content["lines"] if line["question"] == "time"]
    assert code == any(line["verdict"] == "missed" for line in timed)
    assert (out / "timeline.png").stat().st_size > 10_000
    metrics = " ".join(line["metric"] for line in timed)
    for piece in ("TTFT", "latency", "p99 ITL", "share of token gaps"):
        assert piece in metrics
    assert all(line["low"] <= line["high"] for line in timed if line["low"] is not None)


def test_one_policy_can_be_validated_alone(tmp_path):
    arguments = ["only=[decisions]", "decision_requests=20", "policy/batching=static"]
    _, content, _ = validate(tmp_path, *arguments)
    found = [line["metric"] for line in content["lines"] if line["question"] == "decisions"]
    assert found == ["static: decisions that differ"]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("profile=huge", "profile"),
        ("load=1.5", "load=1.5 must be in"),
        ("decision_requests=0", "decision_requests=0 must be at least 1"),
        ("policy/batching=nonesuch", "nonesuch"),
        ("workload.rate=3", "rate"),
        ("device=cuda", "device=cuda needs a CUDA device"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_written(tmp_path, capsys, argument, message):
    import torch

    if argument == "device=cuda" and torch.cuda.is_available():
        pytest.skip("this machine has what the test wants to miss")
    out = tmp_path / "validation"
    arguments = ["only=[decisions]", "decision_requests=5", argument]
    assert main(["validate", "-cn", "replica", f"out={out}", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_no_study_lists_the_studies(capsys):
    assert main(["validate"]) == 2
    assert "replica" in capsys.readouterr().out


def test_verdicts_follow_the_stated_rule():
    assert judge_exact(0) is Verdict.passed
    assert judge_exact(1) is Verdict.missed
    assert judge_error(0.05, 0.04, 0.06, 0.15) is Verdict.passed
    assert judge_error(0.20, 0.16, 0.24, 0.15) is Verdict.missed
    assert judge_error(0.20, 0.14, 0.22, 0.15) is Verdict.too_noisy
    assert judge_error(0.10, 0.01, 0.20, 0.15) is Verdict.too_noisy
    assert judge_error(0.60, 0.30, 0.90, 0.15) is Verdict.missed
    assert judge_error(0.50, 0.20, 0.90, None) is Verdict.reported


def test_no_simulator_is_asked_to_be_closer_to_a_run_than_the_machine_is_to_its_own_repeat():
    assert judge_error(0.30, 0.25, 0.35, 0.20, 0.10) is Verdict.missed
    assert judge_error(0.30, 0.25, 0.35, 0.20, 0.28) is Verdict.too_noisy
    assert judge_error(0.90, 0.80, 0.95, 0.20, 0.28) is Verdict.missed
    assert judge_error(0.10, 0.08, 0.14, 0.20, 0.28) is Verdict.passed


def test_one_real_run_as_the_prediction_of_another():
    runs = [np.array([1.0, 2.0]), np.array([1.0, 2.2]), np.array([1.0, 2.0])]
    assert median_error(runs) == 0.0
    assert median_error([np.array([1.0]), np.array([1.25])]) == pytest.approx((0.2 + 0.25) / 2)
    assert median_error(runs[:1]) is None


def test_interval_of_repeats_that_differ_is_wider_than_their_requests_say():
    rng = np.random.default_rng(0)
    apart = [[np.array([level + 0.01 * rng.normal()]) for _ in range(50)] for level in (0, 1, 2)]
    low, high = two_stage(apart, lambda drawn: float(np.mean(drawn)), 0)
    assert low < 0.5
    assert high > 1.5


def test_interval_covers_a_known_mean():
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(40):
        rows = [rng.normal(size=5) + rng.normal() for _ in range(40)]
        low, high = two_stage([rows, rows], lambda drawn: float(np.mean(drawn)), seed)
        covered += low <= 0 <= high
    assert covered >= 32
