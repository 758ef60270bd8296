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
    assert "llama_3_70b in bf16 does not fit" in out
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
        chosen = {"policy/batching": "static", "rate": rate}
        rows.write(workplace, {"choices": chosen, "error": "", "figures": {}})
    found = [row["choices"]["rate"] for row in rows.read(workplace)]
    assert found == ["0.5", "1", "2", "10"]


def test_resume_does_what_is_missing_or_changed_and_nothing_else(diptych):
    arguments = ("run", "-m", "-cn", "replica", *FEW, "out=o",
                 "policy/batching=static,continuous,chunked_prefill")  # fmt: skip
    diptych(*arguments)
    before = tables("o")
    lost, stale, kept = sorted(Path("o/rows").iterdir())
    lost.unlink()
    stale.write_text(json.dumps({**json.loads(stale.read_text()), "identity": "another"}))
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
    assert "holds thesis.txt, which is no part of a sweep" in errors
    assert os.listdir("o") == ["thesis.txt"]


def test_a_refused_or_failed_sweep_leaves_the_one_before_it(diptych):
    good = ("run", "-m", "-cn", "replica", *FEW, "policy/batching=static,continuous", "out=o")
    assert diptych(*good)[0] == 0
    before = {path: path.read_bytes() for path in Path("o").rglob("*") if path.is_file()}
    for bad in ("workload.bogus=1,2", "workload.num_requests=3,few", "model=dbrx,llama_3_70b"):
        code = diptych("run", "-m", "-cn", "replica", "policy/batching=static", "out=o", bad)[0]
        assert code in (1, 2)
        after = {path: path.read_bytes() for path in Path("o").rglob("*") if path.is_file()}
        assert after == before


def test_a_new_sweep_leaves_nothing_of_the_one_before_it(diptych):
    common = ("run", "-m", "-cn", "replica", *FEW, "out=o")
    diptych(*common, "policy/batching=static,continuous")
    assert diptych(*common, "policy/batching=static", "workload.rate_per_s=3,5")[0] == 0
    assert len(table("o")) == len(os.listdir("o/points")) == len(os.listdir("o/rows")) == 2
    assert sorted(os.listdir("o")) == ["points", "rows", "sweep.csv", "sweep.parquet"]


def test_resume_takes_only_rows_of_the_same_configuration_code_and_data(diptych, monkeypatch):
    header, line = "TIMESTAMP,ContextTokens,GeneratedTokens\n", "2023-11-16 18:17:0{}.0,9,5\n"
    Path("load.csv").write_text(header + line.format(1) + line.format(2))
    command = ("run", "-m", "-cn", "replica", "workload=azure_trace", "workload.path=load.csv",
               "policy/batching=static,continuous", "resume=true", "out=o")  # fmt: skip
    assert diptych(*command)[2].count("done: ") == 2
    assert diptych(*command)[2].count("done: ") == 0
    Path("load.csv").write_text(header + line.format(1) + line.format(2) + line.format(3))
    assert diptych(*command)[2].count("done: ") == 2
    assert {row["num_requests"] for row in table("o")} == {"3.0"}
    monkeypatch.setattr("scenarios.saving.commit", lambda: "another")
    assert diptych(*command)[2].count("done: ") == 2
    assert diptych(*command, "gpu=h20", "node=null")[2].count("done: ") == 2
    assert len(table("o")) == 2


def test_ctrl_c_keeps_what_is_done_and_says_how_to_go_on(diptych, monkeypatch):
    from scenarios import run

    simulate, calls = run.simulate, []

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return simulate(*arguments, **options)

    monkeypatch.setattr(run, "simulate", interrupted)
    command = ("run", "-m", "-cn", "replica", *FEW, "out=o")
    code, _, errors = diptych(*command)
    assert code == 130
    assert "broke off after 1 points" in errors
    assert "resume=true" in errors
    assert diptych("report", "o")[0] == 0
    assert diptych(*command, "resume=true")[2].count("done: ") == 2
    assert len(table("o")) == 3
