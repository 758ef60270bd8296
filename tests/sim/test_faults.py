"""Faults are checked at the door: the value, the rule and the way out."""

from typing import Any

import pytest

from sim.faults import Fault, Kind, Part, outages
from sim.scenario import Scenario

GOOD = {"part": Part.gpu, "kind": Kind.slow, "factor": 2.0, "at_s": 10.0, "until_s": 20.0}
DEAD = {"part": Part.node, "kind": Kind.dead, "factor": None}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"factor": 1.0}, r"factor=1.0 of fault gpu slow of replica 0 must be above 1.*try 2"),
        ({"factor": None}, r"factor=None of .* must be above 1"),
        ({"factor": float("inf")}, r"factor=inf of .* must be above 1 and finite"),
        ({"kind": Kind.dead}, r"factor=2.0 of fault gpu dead .* has no effect.*take kind=slow"),
        ({"at_s": -1.0}, r"at_s=-1.0 of .* must be finite and not negative"),
        ({"until_s": 10.0}, r"until_s=10.0 of .* must be after at_s=10.0 .*null for ever; try 20"),
        ({"part": Part.node, "gpu": 1}, r"gpu=1 of fault node slow .* has no effect; take part"),
        ({"part": Part.link, "kind": Kind.dead, "factor": None, "until_s": None},
         r"until_s=None of fault link dead .*: a link that never comes back.*take part=node"),
    ],
)  # fmt: skip
def test_a_fault_that_says_nothing_possible_is_refused(
    changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Fault(**{**GOOD, **changed})


@pytest.mark.parametrize(
    ("faults", "fields", "message"),
    [
        ([{"replica": 2}], {"num_replicas": 2},
         r"replica=2 of .* does not exist: num_replicas=2 makes replicas 0 to 1; name one"),
        ([{"gpu": 4}], {"tp_size": 2, "pp_size": 2},
         r"gpu=4 of .* does not exist: tp_size \* pp_size=4 ranks have GPUs 0 to 3"),
        ([{"part": Part.link}], {}, r"part=link of .* has no effect: nothing crosses a link"),
        ([{**DEAD}, {**DEAD, "at_s": 15.0, "until_s": None}], {"num_replicas": 2},
         r"at_s=15.0: replica 0 dies while it is dead from 10.0 s until 20.0 s"),
        ([{**DEAD}, {**DEAD, "part": Part.gpu, "at_s": 20.0, "until_s": 30.0}], {},
         r"at_s=20.0: replica 0 dies while it is dead .* must not overlap or touch"),
        ([{**DEAD, "until_s": None}, {**DEAD, "replica": 1, "until_s": None}],
         {"num_replicas": 2}, r"all of num_replicas=2 are dead for ever.*give one .* an until_s"),
        ([], {"detection_s": 0.0}, r"detection_s=0.0 must be above 0 seconds"),
    ],
)  # fmt: skip
def test_faults_that_the_replicas_cannot_have_are_refused(
    faults: list[dict[str, Any]], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Scenario(faults=[Fault(**{**GOOD, **one}) for one in faults], **fields)


def test_dead_gpus_and_nodes_kill_and_dead_links_do_not() -> None:
    link = {**DEAD, "part": Part.link}
    dead = [Fault(**{**GOOD, **one}) for one in (link, {**DEAD, "at_s": 12.0}, DEAD)]
    scenario = Scenario(
        faults=[dead[0], dead[1], Fault(**{**GOOD, **DEAD, "replica": 1, "until_s": None})],
        num_replicas=2, tp_size=2,
    )  # fmt: skip
    found = [(one.replica, one.at_s, one.until_s) for one in outages(scenario.faults)]
    assert found == [(1, 10.0, float("inf")), (0, 12.0, 20.0)]
