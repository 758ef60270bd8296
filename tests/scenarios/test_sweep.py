"""`diptych run -m`: one table, whatever the launcher, and a failing point loses only itself."""

import csv
import json
import os
from pathlib import Path

import pytest

from scenarios import rows

FEW = ("workload.num_requests=24", "seeds=[0,1]")
# A model that does not fit is refused when the point runs, not when it is composed.
SWEEP = ("run", "-m", "-cn", "replica", *FEW, "model=llama_3_8b,llama_3_70b",
         "policy/batching=continuous,chunked_prefill")  # fmt: skip
JOBLIB = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")


def tables(folder):
    return {name: (Path(folder) / name).read_bytes() for name in ("sweep.csv", "sweep.parquet")}


def table(folder):
    return list(csv.DictReader((Path(folder) / "sweep.csv").read_text().splitlines()))


def test_launchers_write_the_same_bytes_and_a_failing_point_leaves_the_others(diptych):
    code, out, errors = diptych(*SWEEP, "out=basic")
    assert code == 1
    assert "2 of 4 points failed" in out
    assert "llama_3_70b in bf16 needs" in out
    assert errors.count("failed: ") == 2
    assert diptych(*SWEEP, "out=joblib folder", *JOBLIB)[0] == 1
    assert tables("basic") == tables("joblib folder")
    found = table("basic")
    chosen = [(row["model"], row["policy/batching"], bool(row["error"])) for row in found]
    assert chosen == [
        ("llama_3_70b", "chunked_prefill", True),
        ("llama_3_70b", "continuous", True),
        ("llama_3_8b", "chunked_prefill", False),
        ("llama_3_8b", "continuous", False),
    ]
    assert sorted(os.listdir("basic/points")) == sorted(os.listdir("joblib folder/points"))
    assert sorted(os.listdir()) == ["basic", "joblib folder"]


def test_the_sweep_of_the_study_is_the_default_and_the_command_line_wins(diptych):
    code, out, _ = diptych("run", "-m", "-cn", "replica", *FEW)
    assert code == 0
    assert all(rule in out for rule in ("static", "continuous", "chunked_prefill"))
    code, out, _ = diptych("run", "-m", "-cn", "replica", *FEW, "policy/batching=static", "out=o")
    assert code == 0
    assert len(list(Path("o/rows").iterdir())) == 1


def test_numbers_sort_by_size(workplace):
    for rate in ("10", "2", "1", "0.5"):
        row = {"choices": {"policy/batching": "static", "rate": rate}, "error": "", "figures": {}}
        rows.write(workplace / rows.FOLDER / f"{rate}.json", row)
    found = [row["choices"]["rate"] for row in rows.read(workplace)]
    assert found == ["0.5", "1", "2", "10"]


def test_resume_does_what_is_missing_or_changed_and_nothing_else(diptych):
    arguments = ("run", "-m", "-cn", "replica", *FEW, "out=o",
                 "policy/batching=static,continuous,chunked_prefill")  # fmt: skip
    diptych(*arguments)
    before = tables("o")
    lost, stale, kept = sorted(Path("o/rows").iterdir())
    lost.unlink()
    stale.write_text(json.dumps({**json.loads(stale.read_text()), "configuration": "another"}))
    stamp = kept.stat().st_mtime_ns
    code, _, errors = diptych(*arguments, "resume=true")
    assert code == 0
    assert errors.count("done: ") == 2
    assert tables("o") == before
    assert kept.stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ("policy/batching=static,greedy",),
            "error: policy/batching=greedy is not known; there are: chunked",
        ),
        (("workload.num_requests=3,few",), "few"),
        (("nod=1,2",), "nod"),
    ],
)
def test_what_cannot_be_composed_is_refused_before_any_point_runs(diptych, overrides, expected):
    code, _, errors = diptych("run", "-m", "-cn", "replica", *overrides)
    assert code == 2
    assert expected in errors
    assert "Traceback" not in errors
    assert os.listdir() == []


def test_nothing_is_left_when_every_point_fails(diptych):
    code, out, _ = diptych("run", "-m", "-cn", "replica", "model=llama_3_70b,dbrx",
                           "policy/batching=static")  # fmt: skip
    assert code == 1
    assert "2 of 2 points failed" in out
    assert not list(Path().rglob("*.json"))
    assert not list(Path().rglob("*.csv"))


def test_a_folder_with_something_else_is_refused(diptych, workplace):
    (workplace / "o").mkdir()
    (workplace / "o" / "thesis.txt").write_text("mine")
    code, _, errors = diptych("run", "-m", "-cn", "replica", "out=o")
    assert code == 2
    assert "holds no sweep" in errors
    assert os.listdir("o") == ["thesis.txt"]
