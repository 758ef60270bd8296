"""Imports go one way: hardware_models, sim, backends, scenarios; each sees those before it."""

import subprocess
import sys

import pytest
from source_tree import PACKAGES, ROOT, importers, imports, name_of, sources

INSIDE_SIM = {
    "sim/state": ["sim.policies", "sim.costs", "sim.processes"],
    "sim/policies": ["sim.costs", "sim.processes", "sim.recorder", "sim.trace", "sim.api"],
    "sim/costs": ["sim.policies", "sim.processes", "sim.state"],
    "sim/models": ["sim.policies", "sim.costs", "sim.processes", "sim.state"],
    "sim/workload": ["sim.policies", "sim.costs", "sim.processes", "sim.state"],
}
IMPURE = ["simpy", "torch", "triton", "hydra", "omegaconf", "time", "random", "datetime", "os"]


@pytest.mark.parametrize("position", range(len(PACKAGES)), ids=PACKAGES)
def test_no_package_imports_one_after_it(position: int) -> None:
    assert importers(PACKAGES[position], *PACKAGES[position + 1 :]) == []


def test_hardware_models_import_nothing_of_ours() -> None:
    assert importers("hardware_models", "sim", "backends", "scenarios") == []


@pytest.mark.parametrize("folder", INSIDE_SIM)
def test_inside_sim_imports_go_one_way_too(folder: str) -> None:
    assert importers(folder, *INSIDE_SIM[folder]) == []


def test_the_real_panel_counts_bytes_itself() -> None:
    """What it moved is compared with these formulas, so it must not know them."""
    formulas = [
        "sim.models.communication", "sim.models.work.iteration_operators", "sim.work_done",
        "sim.models.work.kv_bytes_per_token", "sim.models.parameters.kv_bytes_per_token",
    ]  # fmt: skip
    assert importers("backends", *formulas) == []


def test_policies_are_pure() -> None:
    """The registry, which looks for their files, is no policy."""
    impure = importers("sim/policies", *IMPURE)
    assert [line for line in impure if not line.startswith("sim/policies/registry.py ")] == []
    assert importers("sim/policies", "numpy.random") == []


@pytest.mark.parametrize(
    ("library", "homes"),
    [
        ("simpy", ("sim/processes/", "tests/sim/")),
        ("torch", ("backends/", "tests/", "benchmarks/")),
        ("triton", ("backends/", "tests/", "benchmarks/")),
        ("faiss", ("backends/staged_search.py",)),
    ],
)
def test_a_library_is_imported_only_where_it_lives(library: str, homes: tuple[str, ...]) -> None:
    found = [line for folder in PACKAGES for line in importers(folder, library)]
    assert [line for line in found if not line.startswith(homes)] == []


def test_tests_of_the_simulator_need_no_torch() -> None:
    """Except those that count a model's parameters against transformers."""
    found = importers("tests/sim", "backends", "scenarios", "torch", "triton")
    assert [line for line in found if not line.startswith("tests/sim/models/")] == []


def test_the_python_door_loads_neither_torch_nor_plots_nor_hydra() -> None:
    unwanted = ["torch", "triton", "matplotlib", "hydra", "backends", "scenarios", "transformers"]
    code = f"import sys, sim.api; print([name for name in {unwanted} if name in sys.modules])"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "[]"


def test_the_reader_sees_every_kind_of_import() -> None:
    door = next(path for path in sources("sim") if name_of(path) == "sim/api.py")
    assert {"sim.scenario", "sim.scenario.Scenario"} <= set(imports(door))
    assert importers("sim/processes", "simpy")
