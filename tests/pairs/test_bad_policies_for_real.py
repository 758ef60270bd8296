"""The real panel refuses a policy that breaks the rules, in the words of the simulated one."""

import pytest
from bad_policies import BAD, LIMITS, LOAD, Rogue, everyone

from backends.serving import open_model, serve, use_one_thread
from sim.workload.source import Source


@pytest.fixture(scope="module")
def tiny():
    use_one_thread()
    return open_model("random", "cpu")[1]


@pytest.mark.parametrize("deed", BAD)
def test_a_policy_that(deed, tiny):
    batch, problem = BAD[deed]
    with pytest.raises(ValueError, match=rf"policy Rogue .*{problem}"):
        serve(tiny, Source(LOAD, 0, 64), Rogue(batch=batch), LIMITS)


def test_a_refusal_says_when_and_what_the_replica_had(tiny):
    with pytest.raises(ValueError, match=r"at \S+ s: .*free blocks .*running 3.*; mend the policy"):
        serve(tiny, Source(LOAD, 0, 64), Rogue(batch=everyone), LIMITS)
