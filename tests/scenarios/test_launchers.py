"""The same table from every launcher; a dead worker costs its point; what is missing is named."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scenarios.compose import compose_config
from scenarios.launchers import choose

MORTAL = '''"""As continuous; the first worker that comes here is killed."""

import os
from dataclasses import dataclass
from pathlib import Path

from sim.policies.batching.base import Batching
from sim.policies.batching.continuous import Continuous


@dataclass(kw_only=True)
class Mortal(Batching):
    """As continuous, once the file `killed` is there."""

    def next_batch(self, memory, view):
        try:
            os.close(os.open("killed", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return Continuous().next_batch(memory, view)
        os.kill(os.getpid(), 9)
'''
SWEEP = ("run", "-m", "-cn", "replica", "--config-dir", "mine", "workload.num_requests=24",
         "seeds=[0]", "policy/batching=mortal,static,chunked_prefill",
         "workload.rate_per_s=1,2,3,4,5,6,7,8")  # fmt: skip
FEW = ("run", "-m", "-cn", "replica", "workload.num_requests=24", "seeds=[0]",
       "policy/batching=static,continuous")  # fmt: skip


@pytest.fixture
def mine(workplace):
    folder = workplace / "mine" / "policies" / "batching"
    folder.mkdir(parents=True)
    (folder / "mortal.py").write_text(MORTAL)


def tables(folder):
    return {name: (Path(folder) / name).read_bytes() for name in ("sweep.csv", "sweep.parquet")}


def errors_of(folder):
    found = csv.DictReader((Path(folder) / "sweep.csv").read_text().splitlines())
    return [row["error"] for row in found]


def lose_a_worker(diptych, out, *launcher):
    """A sweep of 24 points, one of whose workers is killed, and its resumption in one process."""
    Path("killed").unlink(missing_ok=True)
    code, _, said = diptych(*SWEEP, f"out={out}", *launcher)
    assert code == 1, said
    assert said.count("failed: ") == 1
    assert said.count("done: ") == 23
    assert "Traceback" not in said
    lost = [error for error in errors_of(out) if error]
    assert len(lost) == 1
    assert lost[0].startswith("the worker of this point died (")
    assert "resume=true" in lost[0]
    code, _, said = diptych(*SWEEP, f"out={out}", "resume=true")
    assert code == 0
    assert said.count("done: ") == 1
    assert errors_of(out) == [""] * 24
    return tables(out)


@pytest.mark.usefixtures("mine")
def test_a_killed_worker_costs_its_point_and_joblib_and_ray_write_the_bytes_of_one_process(diptych):
    pytest.importorskip("ray")
    joblib = lose_a_worker(diptych, "joblib", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    ray = lose_a_worker(diptych, "ray", "hydra/launcher=ray", "hydra.launcher.num_cpus=2")
    assert diptych(*SWEEP, "out=basic")[0] == 0
    assert joblib == ray == tables("basic")


@pytest.mark.usefixtures("mine")
def test_jobs_of_submitit_write_the_bytes_of_one_process_and_a_killed_one_costs_its_point(
    diptych, monkeypatch
):
    # It would wait 15 s for what a killed job left on another machine's disk.
    monkeypatch.setattr("submitit.core.core.Job._results_timeout_s", 1)
    one = [*SWEEP[:-2], "policy/batching=mortal,static"]
    code, _, said = diptych(*one, "out=jobs", "hydra/launcher=submitit_local")
    assert (code, said.count("done: "), said.count("failed: ")) == (1, 1, 1)
    assert [bool(error) for error in errors_of("jobs")] == [True, False]
    assert errors_of("jobs")[0].startswith("the job of this point ended without a result (")
    assert diptych(*one, "out=jobs", "resume=true")[0] == 0
    assert diptych(*one, "out=basic")[0] == 0
    assert tables("jobs") == tables("basic")
    assert sorted(os.listdir("jobs")) == ["points", "rows", "sweep.csv", "sweep.parquet"]


def test_what_slurm_is_asked_for_follows_from_the_settings(workplace, monkeypatch):
    srun = workplace / "srun"
    srun.write_text("#!/bin/sh\n")
    srun.chmod(0o755)
    monkeypatch.setenv("PATH", str(workplace))
    settings = ["partition=batch", "timeout_min=7", "cpus_per_task=3", "mem_gb=2", "qos=low",
                "array_parallelism=5", "setup=['module load python']"]  # fmt: skip
    overrides = ["hydra/launcher=submitit_slurm", *(f"hydra.launcher.{one}" for one in settings),
                 "+hydra.launcher.additional_parameters.mail-type=END"]  # fmt: skip
    config = compose_config("replica", overrides, with_hydra=True)
    executor = choose.launcher(config).executor(workplace / "jobs")
    text = executor._executor._make_submission_file_text("python work", "id")
    flags = {line.removeprefix("#SBATCH ") for line in text.splitlines() if "#SBATCH" in line}
    wanted = {"--partition=batch", "--time=7", "--cpus-per-task=3", "--mem=2GB", "--qos=low",
              "--mail-type=END", "--nodes=1", "--ntasks-per-node=1"}  # fmt: skip
    assert wanted <= flags
    assert "module load python" in text.splitlines()
    assert executor._executor.parameters["array_parallelism"] == 5


def test_without_slurm_its_launcher_is_refused_and_leaves_nothing(diptych, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    code, _, said = diptych(*FEW, "hydra/launcher=submitit_slurm", "out=o")
    assert code == 2
    assert "hydra/launcher=submitit_slurm cannot start" in said
    assert "hydra/launcher=joblib" in said
    assert not Path("o").exists()


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("hydra.launcher.n_jobs=0", "hydra.launcher.n_jobs=0 must be at least 1"),
        ("hydra.launcher.njobs=2", "hydra.launcher.njobs is not a field of JoblibWorkers"),
        ("hydra/launcher=jobli", "hydra/launcher=jobli is not known; did you mean 'joblib'?"),
    ],
)
def test_a_launcher_that_cannot_be_is_refused(diptych, override, expected):
    launcher = () if "/" in override else ("hydra/launcher=joblib",)
    code, _, said = diptych(*FEW, *launcher, override)
    assert code == 2
    assert expected in said
    assert os.listdir() == []


def test_a_package_that_is_missing_is_named_with_the_extra_that_installs_it(workplace):
    code = """
import sys
for name in ("ray", "joblib", "optuna", "hydra_plugins.hydra_submitit_launcher"):
    sys.modules[name] = None
from scenarios.cli import main
for name in ("ray", "joblib", "submitit_slurm"):
    assert main(["run", "-m", "-cn", "replica", f"hydra/launcher={name}"]) == 2
assert main(["search", "-cn", "cheapest"]) == 2
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=workplace, capture_output=True, text=True, check=False
    )
    for extra in ("ray", "sweeps", "slurm", "search"):
        assert f"pip install 'diptych[{extra}]'" in done.stderr
    assert done.returncode == 0, done.stderr
    assert os.listdir(workplace) == []
