"""Faults from the command line: composed, refused, swept, and shown."""

import csv
import json

import pytest

from scenarios.compose import compose_study
from sim.faults import Kind, Part

FEW = ("workload.num_requests=60", "seeds=[0]")
DEATH = "faults=[{part: node, replica: 1, kind: dead, at_s: 1.0, until_s: 3.0}]"


def test_faults_compose_into_typed_records():
    study = compose_study("failures")
    assert [(one.part, one.kind, one.replica) for one in study.faults] == [
        (Part.gpu, Kind.slow, 0), (Part.node, Kind.dead, 1),
    ]  # fmt: skip
    assert study.scenario.faults == study.faults
    changed = compose_study("failures", ["faults.1.until_s=null", "faults.0.factor=1.5"])
    assert (changed.faults[1].until_s, changed.faults[0].factor) == (None, 1.5)


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        ("[{part: gpu, replica: 9, kind: dead, at_s: 3}]", "replica=9 of fault gpu dead"),
        ("[{part: gpu, replicas: 1, kind: dead, at_s: 3}]", "did you mean 'replica'?"),
        ("[{part: gpus, kind: dead, at_s: 3}]", "expected one of [gpu, link, node]"),
        ("[{part: gpu, kind: dead}]", "faults[0].at_s has no value"),
        ("[{part: gpu, kind: slow, factor: 0.5, at_s: 3}]", "factor=0.5 of fault gpu slow"),
        ("[{part: link, kind: slow, factor: 2, at_s: 3}]", "nothing crosses a link"),
    ],
)
def test_bad_faults_are_refused_and_nothing_is_written(diptych, workplace, faults, message):
    code, _, errors = diptych("run", "-cn", "failures", f"faults={faults}", "out=o")
    assert code == 2
    assert message in errors
    assert not (workplace / "o").exists()


def test_a_calibration_does_not_know_what_a_link_takes(diptych):
    faults = "faults=[{part: link, kind: slow, factor: 2, at_s: 3}]"
    code, _, errors = diptych("run", "-cn", "parallel", faults, "cost=fitted", "num_replicas=1")
    assert code == 2
    assert "calibration" in errors or "measures iterations as a whole" in errors


def test_a_run_with_a_death_is_saved_read_and_drawn(diptych, workplace):
    code, out, _ = diptych("run", "-cn", "failures", *FEW, DEATH, "out=o")
    assert code == 0
    assert "requests sent again after a death" in out
    figures = json.loads((workplace / "o" / "summary.json").read_text())["figures"]
    assert figures["num_rerouted"] > 0
    assert figures["rerouted_tokens"] > figures["num_rerouted"]
    assert diptych("report", "o")[0] == 0
    assert (workplace / "o" / "timeline.png").stat().st_size > 10_000


def test_a_sweep_over_faults_has_a_row_each(diptych, workplace):
    swept = "faults=[],[{part: node, replica: 1, kind: dead, at_s: 1.0, until_s: 3.0}]"
    rules = "policy/routing=round_robin,least_loaded"
    assert diptych("run", "-m", "-cn", "failures", *FEW, swept, rules, "out=o")[0] == 0
    with (workplace / "o" / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    sent_again = {row["faults"] == "[]": float(row["num_rerouted"]) for row in rows}
    assert len(rows) == 4
    assert sent_again[True] == 0 < sent_again[False]


def test_validation_takes_the_faults_of_the_study(diptych, workplace):
    arguments = ("only=[decisions,bytes]", "decision_requests=60", "policy/batching=continuous")
    code, out, errors = diptych(
        "validate", "-cn", "failures", *arguments, "policy/routing=round_robin", "num_replicas=2",
        "faults=[{part: node, replica: 1, kind: dead, at_s: 1, until_s: 2}]", "out=v",
    )  # fmt: skip
    assert code == 0, out
    assert "faults" not in errors
    content = json.loads((workplace / "v" / "validation.json").read_text())
    lines = [line for line in content["lines"] if "with faults" in line["metric"]]
    assert len(lines) == 2 + 3 + 2
    assert {line["verdict"] for line in lines} == {"passed"}
