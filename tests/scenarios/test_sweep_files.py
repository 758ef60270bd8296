"""What a sweep leaves: the full configuration, and nothing damaged is taken for a result."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from scenarios import progress, rows, tables
from scenarios.compose import compose_config, studies
from scenarios.point import Outcome
from scenarios.points import Composer

SWEEP = ("run", "-m", "-cn", "replica", "workload.num_requests=24", "seeds=[0]",
         "policy/batching=static,continuous", "out=o")  # fmt: skip


def bytes_of(folder):
    return {name: (Path(folder) / name).read_bytes() for name in ("sweep.csv", "sweep.parquet")}


def first(pattern):
    return sorted(Path("o").glob(pattern))[0]


def cut(path):
    path.write_bytes(path.read_bytes()[:-40])


def one_digit(path):
    text = path.read_text()
    name = '"throughput_tokens_per_s": '
    place = text.index(name) + len(name) + 1  # not the first, as no number begins with 0
    path.write_text(text[:place] + str(9 - int(text[place])) + text[place + 1 :])


DAMAGES = (
    (cut, "rows/*.json", "is damaged"),
    (one_digit, "rows/*.json", "its content was changed after it was written"),
    (lambda path: path.write_text("[]"), "rows/*.json", "is damaged"),
    (cut, "points/*/summary.json", "is missing or damaged"),
    (one_digit, "points/*/summary.json", "its figures are not those of its row"),
    (shutil.rmtree, "points/*", "is missing or damaged"),
)


def test_a_damaged_file_is_named_and_only_its_point_done_again(diptych):
    diptych(*SWEEP)
    before = bytes_of("o")
    for damage, pattern, said in DAMAGES:
        path = first(pattern)
        damage(path)
        code, _, errors = diptych(*SWEEP, "resume=true")
        assert code == 0
        assert f"{said}" in errors
        assert str(path) in errors
        assert "this point is done again" in errors
        assert errors.count("done: ") == 1
        assert bytes_of("o") == before
    assert diptych(*SWEEP, "resume=true")[2] == ""


def test_a_damaged_row_is_named_by_a_report_with_the_way_out(diptych):
    diptych(*SWEEP)
    cut(first("rows/*.json"))
    code, _, errors = diptych("report", "o")
    assert code == 2
    assert str(first("rows/*.json")) in errors
    assert "resume=true" in errors


def test_resume_with_traces_does_what_was_saved_without(diptych):
    diptych(*SWEEP)
    assert diptych(*SWEEP, "resume=true", "save=trace")[2].count("done: ") == 2
    assert diptych(*SWEEP, "resume=true", "save=trace")[2].count("done: ") == 0
    cut(first("points/*/trace/iterations.parquet"))
    assert diptych(*SWEEP, "resume=true", "save=trace")[2].count("done: ") == 1


def test_the_table_holds_the_full_configuration_in_typed_columns(diptych):
    diptych(*SWEEP, "model=llama_3_8b,llama_3_70b")
    table = pq.read_table("o/sweep.parquet").to_pylist()
    for row in table:
        name = row["model"]
        assert row["scenario.model.name"] == name
        assert row["scenario.policy_kinds.batching"] == row["policy/batching"]
        assert row["scenario.workload.num_requests"] == 24
        assert isinstance(row["scenario.workload.rate_per_s"], float)
        assert json.loads(row["scenario.seeds"]) == [0]
        assert (row["scenario.node.gpu.name"], row["scenario.node.num_gpus"]) == ("a100_80g", 1)
        assert bool(row["error"]) == (name == "llama_3_70b")
    summary = json.loads(first("points/*/summary.json").read_text())["scenario"]
    leaves = {key.removeprefix("scenario.") for key in table[0] if key.startswith("scenario.")}
    # A record without options has no leaf; its kind has one.
    assert {key.split(".")[0] for key in leaves} == {
        key for key, value in summary.items() if value != {}
    }


POINTS = (
    (),
    ("workload.rate_per_s=3",),
    ("policy/batching=static", "workload.rate_per_s=5", "seeds=[3,4]"),
    ("gpu=null", "node=l40s_x1", "engine.max_num_seqs=7"),
    ("policy/batching=static", "workload.rate_per_s=6", "+slo={ttft_s: 2}"),
)


def test_points_that_share_their_groups_compose_as_hydra_composes_them():
    composer = Composer("replica", [])
    for point in POINTS:
        assert composer.compose(point) == compose_config("replica", point)


@pytest.mark.parametrize("study", sorted(studies()))
def test_points_compose_as_hydra_composes_them(study):
    """All that a point may choose at once: groups, values in them, null and a new key."""
    point = tuple(dict.fromkeys(choice for one in POINTS for choice in one))
    assert Composer(study, []).compose(point) == compose_config(study, point)


def test_a_point_does_not_change_the_next_one():
    composer = Composer("replica", [])
    composer.compose(("seeds=[7]", "slo.ttft_s=9")).slo.tpot_s = 8
    assert composer.compose(()) == compose_config("replica")


def test_what_workers_say_is_told_once_with_its_number_of_points(capfd):
    point = ("gpu=h20",)
    with progress.Telling("sweep", 3) as telling:
        for _ in range(3):
            telling.tell(Outcome(point, "done", ("costs are old", "costs are old")))
    assert capfd.readouterr().err == "done: gpu=h20\n" * 3 + "warning: costs are old (3 points)\n"


def test_a_terminal_sees_a_bar(monkeypatch, capfd):
    def terminal(*, errors=False):
        del errors
        from rich.console import Console

        return Console(stderr=True, force_terminal=True, width=90)

    monkeypatch.setattr(tables, "console", terminal)
    with progress.Telling("capacity", 2) as telling:
        telling.tell(Outcome(("gpu=h20",), "failed"))
        telling.tell(Outcome(("gpu=l40s",), "kept"))
    said = capfd.readouterr().err
    assert all(part in said for part in ("capacity", "2/2", "1 failed"))
    assert "failed: " not in said


def test_an_interval_is_not_a_sweep(diptych):
    code, _, errors = diptych("run", "-m", "-cn", "replica", "workload.rate_per_s=interval(1,2)")
    assert code == 2
    assert "diptych search" in errors
    assert rows.read(Path()) == []
