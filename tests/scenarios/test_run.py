"""`diptych run`: every shipped study runs, and what it writes is whole and repeatable."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from scenarios.compose import compose_study, studies
from scenarios.folders import CONF
from sim import files
from sim.api import run
from sim.files import whole_folder
from sim.scenario import Scenario

FEW = ("workload.num_requests=24", "seeds=[0]")
SHORT = {"serving": ("workload.duration_s=5", "seeds=[0]")}
"""Studies whose load ends after a time."""
COSTS = {"serving": "interpolated"} | {
    study: "fitted to measurements" for study in studies() if study.startswith("loongserve")
}
"""What costs other than the datasheet rest on."""


@pytest.mark.parametrize("study", sorted(studies()))
def test_every_study_runs(diptych, study):
    code, out, errors = diptych("run", "-cn", study, *SHORT.get(study, FEW), "out=here")
    assert (code, errors) == (0, "")
    assert "TTFT" in out
    assert COSTS.get(study, "costs: 100% datasheet roofline") in out
    assert sorted(os.listdir("here")) == ["requests.parquet", "summary.json", "trace"]


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_study_begins_with_its_question_and_is_short(path):
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# ")
    assert lines[0].endswith("?")
    assert len(lines) < 40
    assert compose_study(path.stem).name == path.stem


def test_a_composed_study_is_a_scenario_that_runs():
    scenario = compose_study("replica", [*FEW, "policy/batching=static"]).scenario
    assert type(scenario) is Scenario
    assert type(scenario.policy.batching).__name__ == "Static"
    assert run(scenario)["num_requests"] == 24


def test_a_run_leaves_its_scenario_unchanged():
    study = compose_study("replica", FEW)
    run(study.scenario)
    assert study == compose_study("replica", FEW)


def test_results_go_to_a_folder_named_after_the_configuration(diptych):
    diptych("run", "-cn", "replica", *FEW)
    diptych("run", "-cn", "replica", *FEW)
    first = list(Path("runs/replica").iterdir())
    diptych("run", "-cn", "replica", *FEW, "policy.batching.watermark=0.02")
    assert (len(first), len(list(Path("runs/replica").iterdir()))) == (1, 2)


@pytest.mark.parametrize(
    ("level", "files"),
    [
        ("summary", ["summary.json"]),
        ("requests", ["requests.parquet", "summary.json"]),
        ("trace", ["requests.parquet", "summary.json", "trace"]),
    ],
)
def test_save_says_how_much_is_written(diptych, level, files):
    assert diptych("run", "-cn", "replica", *FEW, "out=here", f"save={level}")[0] == 0
    assert sorted(os.listdir("here")) == files


def test_several_seeds_give_the_intervals_of_the_result(diptych):
    overrides = ("workload.num_requests=40", "seeds=[0,1,2]")
    _, out, _ = diptych("run", "-cn", "replica", *overrides, "out=here", "save=summary")
    assert " ± " in out
    summary = json.loads(Path("here/summary.json").read_text())
    expected = run(compose_study("replica", overrides).scenario).as_json()
    assert summary["figures"] == pytest.approx(expected["figures"], nan_ok=True)
    low, high = summary["intervals_95"]["e2e_mean_s"]
    assert [low, high] == pytest.approx(expected["intervals_95"]["e2e_mean_s"], rel=1e-12)


def test_an_overloaded_run_shows_no_latencies(diptych):
    arguments = ("policy/batching=static", "workload.rate_per_s=50", "seeds=[0]", "out=here")
    code, out, _ = diptych("run", "-cn", "replica", *arguments, "save=summary")
    assert code == 0
    assert "overloaded" in out
    assert "TTFT" not in out


def test_node_null_makes_room_for_a_gpu(diptych):
    code, out, _ = diptych("run", "-cn", "replica", *FEW, "node=null", "gpu=h100_sxm")
    assert code == 0
    assert "on h100_sxm" in out


def interrupted(folder):
    with whole_folder(folder) as building:
        (building / "summary.json").write_text("{")
        raise KeyboardInterrupt


def test_a_folder_is_whole_or_absent(workplace):
    with pytest.raises(KeyboardInterrupt):
        interrupted(workplace / "result")
    assert list(workplace.iterdir()) == []


def test_a_broken_write_leaves_the_result_before_it(diptych, monkeypatch):
    diptych("run", "-cn", "replica", *FEW, "out=here")
    before = {path: path.read_bytes() for path in Path("here").rglob("*.*")}

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(files, "write_json", full)
    code, _, errors = diptych("run", "-cn", "replica", *FEW, "out=here")
    assert code == 2
    assert errors == "error: no space left; nothing incomplete was left behind\n"
    assert {path: path.read_bytes() for path in Path("here").rglob("*.*")} == before
    assert [path.name for path in Path().iterdir()] == ["here"]


def test_a_killed_run_leaves_no_result(workplace):
    script = (
        "import os, sim.files as s\n"
        "s.write_json = lambda *_: os.kill(os.getpid(), 9)\n"
        "from scenarios.cli import main\n"
        f"main(['run', '-cn', 'replica', *{FEW!r}, 'out=here'])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert done.returncode == -9
    assert not (workplace / "here").exists()


def test_two_processes_write_the_same_bytes_and_import_no_torch(workplace):
    script = (
        "import sys\nfrom scenarios.cli import main\n"
        f"code = main(['run', '-cn', 'replica', *{FEW!r}, 'out=' + sys.argv[1]])\n"
        "heavy = {'torch', 'matplotlib', 'triton', 'transformers'} & set(sys.modules)\n"
        "sys.exit(code or str(heavy) if heavy else code)\n"
    )
    for name in ("one", "two"):
        subprocess.run([sys.executable, "-c", script, name], check=True, capture_output=True)
    files = sorted(path.relative_to("one") for path in Path("one").rglob("*.parquet"))
    assert len(files) == 17
    for file in files:
        assert (Path("one") / file).read_bytes() == (Path("two") / file).read_bytes(), file


def test_a_warning_is_one_line(diptych):
    warnings.simplefilter("default")
    code, _, errors = diptych("run", "-cn", "bursty", *FEW, "workload.length_cv=0.5", "out=here")
    assert code == 0
    assert errors.startswith("warning: length_cv=0.5 has no effect")
    assert all(line.startswith("warning: ") for line in errors.splitlines())
