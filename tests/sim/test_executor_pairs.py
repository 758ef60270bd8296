"""Whatever runs under simulated time also runs for real, and a test holds the two together."""

import pytest
from source_tree import ROOT, sources

HELPERS = {
    "alone",
    "stations",
    "elastic_pace",
    "exact_time",
    "expert_pace",
    "feed",
    "pace",
    "slowed",
    "network",
    "kv_moves",
    "hooks",
}
"""Modules beside the executors: the clock, how long things last, how long bytes are on the way."""
EXECUTORS = sorted(
    path.stem for path in sources("sim/processes") if path.stem not in HELPERS | {"__init__"}
)


def test_there_are_executors() -> None:
    assert "replica" in EXECUTORS
    assert not HELPERS - {path.stem for path in sources("sim/processes")}


@pytest.mark.parametrize("name", EXECUTORS)
@pytest.mark.parametrize("half", ["backends/{}.py", "tests/pairs/test_{}.py"])
def test_every_executor_has_its_twin_and_their_test(name: str, half: str) -> None:
    path = half.format(name)
    assert (ROOT / path).exists(), f"sim/processes/{name}.py has no other half; write {path}"
