"""Conversations share what they should and nothing else."""

import numpy as np
import pytest

from sim.requests import Request
from sim.workload.conversations import Conversations
from sim.workload.lengths import LengthDistribution
from sim.workload.source import Source, check

LOAD = Conversations(
    rate_per_s=4.0, num_requests=3000, input_tokens=60, output_tokens=40,
    lengths=LengthDistribution.exponential, system_tokens=100, num_system_prompts=3,
    max_prompt_tokens=1000,
)  # fmt: skip


def requests(load: Conversations, seed: int = 0) -> list[Request]:
    return list(Source(load, seed, 1 << 20).initial())


def test_as_many_requests_come_as_were_asked_for_at_the_rate_asked_for() -> None:
    found = requests(LOAD)
    assert len(found) == 3000
    arrival_s = np.array([request.arrival_s for request in found])
    assert (np.diff(arrival_s) >= 0).all()
    # Conversations under way fill up at first: in the second half the rate is the stated one.
    later = arrival_s[1500:]
    assert 1500 / (later[-1] - later[0]) == pytest.approx(4.0, rel=0.15)


def test_a_prompt_begins_with_a_system_prompt_and_all_turns_before() -> None:
    found = requests(LOAD)
    shared = 100 // 16
    systems = {request.prefix_hashes[:shared] for request in found}
    assert len(systems) == 3
    last: dict[int, Request] = {}
    turns = 0
    for request in found:
        assert len(request.prefix_hashes) == -(-request.prompt_tokens // 16)
        mine = request.prefix_hashes[shared]
        if mine in last:
            turns += 1
            before = last[mine]
            count = len(before.prefix_hashes)
            assert request.prefix_hashes[:count] == before.prefix_hashes
            assert request.prompt_tokens > before.prompt_tokens + before.output_tokens
        last[mine] = request
    assert turns > 1000


def test_its_hashes_are_chained_and_a_seed_repeats_it() -> None:
    assert check(LOAD, 1, 1 << 20, prefixes=True).num_hashed == 3000
    assert requests(LOAD, 1) == requests(LOAD, 1) != requests(LOAD, 2)


def test_where_a_chunk_ends_changes_nothing() -> None:
    parts = list(LOAD.columns(5, chunk_rows=700))
    whole = next(LOAD.columns(5))
    assert sum(map(len, parts)) == len(whole) == 3000
    assert np.concatenate([part.arrival_s for part in parts]).tolist() == whole.arrival_s.tolist()
    assert [one for part in parts for one in part.prefix_hashes or ()] == whole.prefix_hashes


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"turns": 0.5}, "turns=0.5 is a mean and must be at least 1"),
        ({"rate_per_s": 0.0}, "rate_per_s=0.0 must be positive"),
        ({"think_time_s": -1.0}, "think_time_s=-1.0 must be"),
        ({"system_tokens": -1}, "system_tokens=-1 must be"),
        ({"system_tokens": 5000}, "max_prompt_tokens=4096 must hold system_tokens=5000"),
        ({"hash_block_tokens": 0}, "hash_block_tokens=0 must be at least 1"),
    ],
)
def test_parameters_out_of_range_are_refused(changed: dict[str, float], message: str) -> None:
    given = {"rate_per_s": 1.0, "num_requests": 9, "input_tokens": 50, "output_tokens": 50}
    with pytest.raises(ValueError, match=message):
        Conversations(**{**given, **changed})  # pyright: ignore[reportArgumentType]


def test_a_hash_that_stands_for_two_prefixes_is_refused() -> None:
    from sim.workload.recorded import Recorded

    load = Recorded(
        arrival_s=[0.0, 1.0], prompt_tokens=[40, 40], output_tokens=[1, 1],
        prefix_hashes=[[1, 2], [3, 2]],
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"request 1 has prefix hash 2 after 3, and another .*1"):
        check(load, 0, 4096, prefixes=True)
    assert check(load, 0, 4096).num_hashed == 2
