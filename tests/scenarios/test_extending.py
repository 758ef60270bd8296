"""A policy, a model, a study or a GPU of the user's own needs one new file and no edit."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import sim

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
FEW = ("workload.num_requests=24", "seeds=[0]", "save=summary")


@pytest.fixture
def own(workplace):
    folder = workplace / "own"
    (folder / "policies" / "batching").mkdir(parents=True)
    (folder / "policies" / "batching" / "patient.py").write_text(RULE)
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
