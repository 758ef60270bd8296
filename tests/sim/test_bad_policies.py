"""A policy that breaks the rules is refused by name, and not believed."""

import pytest
from bad_policies import BAD, LIMITS, LOAD, Rogue, everyone
from serving_cases import serve


@pytest.mark.parametrize("deed", BAD)
def test_a_policy_that(deed: str) -> None:
    batch, problem = BAD[deed]
    with pytest.raises(ValueError, match=rf"policy Rogue .*{problem}"):
        serve(LOAD, Rogue(batch=batch), LIMITS)


def test_a_refusal_says_when_and_what_the_replica_had() -> None:
    with pytest.raises(ValueError, match=r"at 0\.0 s: .*free blocks .*; mend the policy"):
        serve(LOAD, Rogue(batch=everyone), LIMITS)
