"""Policies, workloads and token routings are found by scanning; a wrong file is named."""

import importlib.metadata
from pathlib import Path

import pytest

from sim.policies import registry
from sim.policies.batching.base import Batching
from sim.policies.registry import (
    contract,
    families,
    load_file,
    policies,
    token_routings,
    user_files,
    workloads,
)
from sim.workload.base import Workload
from sim.workload.token_routing.base import TokenRouting

EAGER = """
from dataclasses import dataclass
from sim.policies.batching.base import Batching, whole_prompts, DECODE

@dataclass(kw_only=True)
class {name}(Batching):
    \"\"\"Admit whenever something waits.\"\"\"
    patience: int = 3

    def next_batch(self, memory, view):
        return DECODE if view.num_running else whole_prompts(view)
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "policies" / "batching").mkdir(parents=True)
    (tmp_path / "workload").mkdir()
    (tmp_path / "token_routing").mkdir()
    return tmp_path


def add(folder, text, name="eager"):
    path = folder / "policies" / "batching" / f"{name}.py"
    path.write_text(text)
    return path


def test_every_family_has_its_shipped_rules():
    assert {"batching", "instance_plan"} <= set(families())
    assert {"static", "continuous", "chunked_prefill"} <= set(policies("batching"))
    for family in families():
        assert all(issubclass(rule, contract(family)) for rule in policies(family).values())


def test_file_name_is_the_name_and_base_is_no_rule():
    found = policies("batching")
    assert "base" not in found
    assert all(rule.__module__.endswith(f".{name}") for name, rule in found.items())


def test_a_users_file_is_a_rule(folder):
    add(folder, EAGER.format(name="Eager"))
    assert issubclass(policies("batching", [folder])["eager"], Batching)
    assert "eager" not in policies("batching")


def test_an_edited_file_is_read_again(folder):
    path = add(folder, EAGER.format(name="Eager"))
    assert policies("batching", [folder])["eager"]().patience == 3
    path.write_text(EAGER.format(name="Eager").replace("int = 3", "int = 44"))
    assert policies("batching", [folder])["eager"]().patience == 44


def test_the_first_folder_wins_over_the_second_and_over_the_shipped(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    (other / "policies" / "batching").mkdir(parents=True)
    add(folder, EAGER.format(name="First"), "static")
    add(other, EAGER.format(name="Second"), "static")
    assert policies("batching", [folder, other])["static"].__name__ == "First"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("x = 1\n", r"eager\.py: defines 0 classes"),
        (EAGER.format(name="A") + EAGER.format(name="B"), r"eager\.py: defines 2 .*A, B"),
        ("import nothing_of_that_name\n", r"eager\.py: cannot be imported .*nothing_of_that_name"),
        ("from sim.policies.batching.static import Static\n", r"eager\.py: defines 0"),
    ],
)
def test_a_file_without_exactly_one_rule_is_named(folder, text, complaint):
    add(folder, text)
    with pytest.raises(ValueError, match=complaint):
        policies("batching", [folder])


def test_files_that_begin_with_an_underscore_are_helpers(folder):
    add(folder, "x = 1\n", "_helper")
    assert policies("batching", [folder]) == policies("batching")


def test_an_unknown_family_says_what_is_near():
    with pytest.raises(ValueError, match=r"'baching' is not known; did you mean 'batching'"):
        policies("baching")


@pytest.mark.parametrize("target", ["sim.policies.batching.static", "...static:Static"])
def test_entry_points_name_a_module_or_a_class(monkeypatch, target):
    value = target.replace("...", "sim.policies.batching.")
    point = importlib.metadata.EntryPoint("mine", value, "diptych.policies.batching")
    registry._installed.cache_clear()
    monkeypatch.setattr(
        registry, "entry_points", lambda group: [point] if group.endswith(".batching") else []
    )
    assert policies("batching")["mine"].__name__ == "Static"
    registry._installed.cache_clear()


def test_an_entry_point_of_another_kind_is_refused(monkeypatch):
    point = importlib.metadata.EntryPoint("mine", "json:dumps", "diptych.policies.batching")
    registry._installed.cache_clear()
    monkeypatch.setattr(registry, "entry_points", lambda group: [point])
    with pytest.raises(ValueError, match=r"entry point mine .* must be a Batching"):
        policies("batching")
    registry._installed.cache_clear()


def test_workloads_are_found_and_helpers_are_not():
    found = workloads()
    assert {"poisson", "gamma", "closed_loop", "azure_trace", "default"} <= set(found)
    assert not {"arrivals", "base", "checks", "lengths", "source", "trace_lines"} & set(found)
    assert all(issubclass(kind, Workload) for kind in found.values())


def test_a_users_workload_must_define_one(folder):
    path = folder / "workload" / "mine.py"
    path.write_text("x = 1\n")
    with pytest.raises(ValueError, match=r"mine\.py: defines 0"):
        workloads([folder])
    path.write_text(
        "from dataclasses import dataclass\nfrom sim.workload.default import Default\n"
        "import sim.workload.poisson as p\n\n@dataclass(kw_only=True)\n"
        "class Mine(p.Poisson):\n    pass\n"
    )
    assert workloads([folder])["mine"].__name__ == "Mine"


ROUTING = """
from dataclasses import dataclass
from sim.workload.token_routing.base import TokenRouting
from sim.workload.token_routing.uniform import Uniform
import sim.workload.token_routing.skewed as s

@dataclass(kw_only=True)
class {name}(s.Skewed):
    skew: float = 2.0
"""


def test_token_routings_are_found_and_helpers_are_not():
    found = token_routings()
    assert {"uniform", "balanced", "skewed", "recorded"} <= set(found)
    assert not {"base", "draws", "inclusion", "choices_file"} & set(found)
    assert all(issubclass(kind, TokenRouting) for kind in found.values())
    assert not set(found) & set(workloads()) - {"recorded"}


def test_a_users_token_routing_must_define_one(folder):
    path = folder / "token_routing" / "mine.py"
    path.write_text("x = 1\n")
    with pytest.raises(ValueError, match=r"mine\.py: defines 0"):
        token_routings([folder])
    path.write_text(ROUTING.format(name="A") + ROUTING.format(name="B"))
    with pytest.raises(ValueError, match=r"mine\.py: defines 2 .*A, B"):
        token_routings([folder])
    path.write_text(ROUTING.format(name="Mine"))
    assert token_routings([folder])["mine"]().skew == 2.0
    assert "mine" not in token_routings()


def test_a_users_token_routing_takes_the_place_of_a_shipped_one(folder):
    (folder / "token_routing" / "uniform.py").write_text(ROUTING.format(name="Mine"))
    assert token_routings([folder])["uniform"].__name__ == "Mine"
    assert token_routings()["uniform"].__name__ == "Uniform"


def test_a_file_that_was_removed_is_not_read_by_other_processes(tmp_path: Path) -> None:
    kept, gone = tmp_path / "kept_here.py", tmp_path / "gone_later.py"
    for path in (kept, gone):
        path.write_text("VALUE = 1\n")
        load_file(path)
    gone.unlink()
    names = [path.name for path in user_files()]
    assert names.count("kept_here.py") == 1
    assert "gone_later.py" not in names
