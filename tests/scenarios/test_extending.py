"""A policy, a model, a study or a GPU of the user's own needs one new file and no edit."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import sim
from scenarios.compose import compose_config, compose_study
from scenarios.saving import identity
from sim.workload.token_routing.skewed import Skewed
from sim.workload.token_routing.uniform import Uniform

ROOT = Path(sim.__file__).parents[1]
RULE = '''
"""Start a batch when the replica is empty."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sim.policies.batching.base import DECODE, Batch, Batching, ReplicaView, whole_prompts


@dataclass(kw_only=True)
class Patient(Batching):
    """Waits until the replica is empty."""

    patience: int = 3

    def next_batch(self, memory: Any, view: ReplicaView) -> Batch:
        """Decode while anything runs."""
        return DECODE if view.num_running else whole_prompts(view)
'''
ROUTING = '''
"""Two hot experts."""

from dataclasses import dataclass

from sim.workload.token_routing.uniform import Uniform


@dataclass(kw_only=True)
class Sharp(Uniform):
    """Mine and no other."""

    sharpness: float = 2.0
'''
FEW = ("workload.num_requests=24", "seeds=[0]", "save=summary")


@pytest.fixture
def own(workplace):
    folder = workplace / "own"
    (folder / "policies" / "batching").mkdir(parents=True)
    (folder / "policies" / "batching" / "patient.py").write_text(RULE)
    (folder / "token_routing").mkdir()
    (folder / "token_routing" / "sharp.py").write_text(ROUTING)
    (folder / "token_routing" / "hot.yaml").write_text("# Hot?\ndefaults: [skewed]\nskew: 2.0\n")
    (folder / "model").mkdir()
    (folder / "model" / "mine.yaml").write_text("# Small.\nname: smollm2_135m\ndtype: fp16\n")
    (folder / "gpu").mkdir()
    shutil.copy(ROOT / "hardware_models" / "gpu" / "h20.yaml", folder / "gpu" / "own_gpu.yaml")
    (folder / "own_study.yaml").write_text(
        "# Does a study of one's own run?\ndefaults:\n  - schema\n  - override model: mine\n"
        "  - override gpu: own_gpu\n  - override workload: chat\n"
        "  - override policy/batching: patient\n  - _self_\nname: own_study\n"
    )
    return folder


def test_a_rule_dropped_into_a_copy_of_the_packages(workplace):
    for package in ("sim", "hardware_models", "scenarios"):
        skip = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, workplace / "copy" / package, ignore=skip)
    rule = workplace / "copy" / "sim" / "policies" / "batching" / "patient.py"
    rule.write_text(RULE)
    done = subprocess.run(
        [sys.executable, "-m", "scenarios.cli", "run", "-cn", "replica", *FEW,
         "policy/batching=patient", "policy.batching.patience=4"],
        env={**os.environ, "PYTHONPATH": str(workplace / "copy")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "patient, colocated" in done.stdout


def test_a_folder_of_the_path_variable(diptych, own, monkeypatch):
    monkeypatch.setenv("DIPTYCH_PATH", str(own))
    code, out, errors = diptych("run", "-cn", "replica", *FEW, "policy/batching=patient")
    assert (code, errors) == (0, "")
    assert "patient, colocated" in out


def test_a_file_that_is_edited_or_removed_is_seen_at_once(own):
    path = own / "workload" / "steady.py"
    path.parent.mkdir(exist_ok=True)
    text = """
from dataclasses import dataclass

from sim.workload.poisson import Poisson


@dataclass(kw_only=True)
class Steady(Poisson):
    at_least: int = 1
"""
    for number in (1, 23):
        path.write_text(text.replace("= 1", f"= {number}"))
        os.utime(path, ns=(number, number))
        found = compose_config("replica", ["workload=steady"], str(own)).workload
        assert found.at_least == number
    path.unlink()
    with pytest.raises(ValueError, match="steady"):
        compose_config("replica", ["workload=steady"], str(own))


def test_token_routings_of_ones_own_are_listed_and_composed(diptych, own):
    _, out, _ = diptych("list", "--config-dir", own, "token_routing")
    assert all(part in out for part in ("sharp", "Mine and no other.", "hot", "Hot?", "uniform"))
    sharp = compose_study("replica", ["token_routing=sharp"], str(own)).token_routing
    assert (type(sharp).__name__, sharp.sharpness) == ("Sharp", 2.0)
    assert compose_study("replica", ["token_routing=hot"], str(own)).token_routing == Skewed(
        skew=2.0
    )
    assert compose_study("replica").token_routing == Uniform()


def test_a_result_is_of_its_token_routing_and_of_the_file_that_this_reads(own):
    def named(*overrides):
        return identity(compose_study("replica", overrides, str(own)).scenario)

    recorded = ("token_routing=recorded", "token_routing.path=gate.parquet")
    names = [named(), named("token_routing=sharp"), named("token_routing=balanced")]
    names.append(named(*recorded))
    Path("gate.parquet").write_text("one")
    names.append(named(*recorded))
    Path("gate.parquet").write_text("two")
    names.append(named(*recorded))
    assert len(set(names)) == len(names)
    assert named(*recorded) == names[-1]


def test_a_study_model_and_gpu_in_a_folder_of_the_command_line(diptych, own):
    code, out, errors = diptych("run", "--config-dir", own, "-cn", "own_study", *FEW)
    assert (code, errors) == (0, "")
    assert "smollm2_135m on h20" in out
    _, out, _ = diptych("run", "--config-dir", own)
    assert "Does a study of one's own run?" in out


@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_a_sweep_over_a_rule_of_ones_own(diptych, own, launcher):
    code, out, _ = diptych(
        "run", "-m", "--config-dir", own, "-cn", "replica", *FEW,
        "policy/batching=patient,static", f"hydra/launcher={launcher}",
    )  # fmt: skip
    assert code == 0
    assert "patient" in out


def test_what_one_command_found_the_next_does_not_see(diptych, own):
    diptych("run", "--config-dir", own, "-cn", "replica", *FEW, "policy/batching=patient")
    code, _, errors = diptych("run", "-cn", "replica", *FEW, "policy/batching=patient")
    assert code == 2
    assert "policy/batching=patient is not known" in errors


def test_a_study_of_ones_own_may_be_called_study(diptych, own):
    (own / "study.yaml").write_text("# Mine?\ndefaults: [replica, _self_]\nname: study\n")
    code, _, errors = diptych("run", "--config-dir", own, "-cn", "study", *FEW, "out=mine")
    assert (code, errors) == (0, "")


def test_a_broken_file_is_named(diptych, own):
    (own / "policies" / "batching" / "empty.py").write_text("x = 1\n")
    code, _, errors = diptych("run", "--config-dir", own, "-cn", "replica")
    assert code == 2
    assert "empty.py: defines 0 classes" in errors
