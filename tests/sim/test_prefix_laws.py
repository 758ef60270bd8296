"""Laws of a replica that caches prefixes: nothing is lost or overdrawn, and less is computed."""

from collections import Counter

import pytest
from hypothesis import given, settings
from serving_cases import POLICIES, Case, Grid, cases, recorded, run_case

from sim.decision_rows import expand
from sim.engine import ReplicaLimits
from sim.metrics import request_times, token_times
from sim.trace import State, Trace

EVERY_POLICY = pytest.mark.parametrize("name", POLICIES)
SIZE = 4


def conversation(num_turns: int, apart_s: float, limits: ReplicaLimits) -> Case:
    """Turns of one conversation, each 8 tokens longer than the one before, in blocks of 4."""
    workload = recorded([(apart_s * at, 9 + 8 * at, 2) for at in range(num_turns)])
    workload.prefix_hashes = [list(range(1, 3 + 2 * at)) for at in range(num_turns)]
    workload.hash_block_tokens = SIZE
    return Case(workload, limits, Grid(0.5))


def reused(trace: Trace) -> dict[int, int]:
    """Tokens that the cache spared each request, over all its admissions."""
    spared: Counter[int] = Counter()
    for decision in expand(trace):
        spared.update(dict(decision.reused))
    return dict(spared)


@EVERY_POLICY
@settings(max_examples=40)
@given(case=cases(prefixes=True))
def test_every_token_is_computed_or_reused_and_every_answer_is_whole(name: str, case: Case) -> None:
    trace = run_case(case, POLICIES[name], one_by_one=True)
    needed: Counter[int] = Counter()
    done: Counter[int] = Counter()
    held: dict[int, int] = {}
    for decision in expand(trace):
        for request_id in decision.preempted:
            needed[request_id] += held.pop(request_id)
        for request_id, tokens in decision.reused:
            assert tokens % case.limits.block_size == 0
            held[request_id] = tokens
            done[request_id] += tokens
        for request_id, tokens in decision.tokens.items():
            held[request_id] = held.get(request_id, 0) + tokens
            done[request_id] += tokens
        assert decision.observed is not None
        assert 0 <= decision.observed.cached_blocks <= decision.observed.free_blocks
        assert decision.observed.free_blocks <= case.limits.num_blocks
    rows = zip(case.workload.prompt_tokens, case.workload.output_tokens, strict=True)
    for request_id, (prompt, output) in enumerate(rows):
        # The last token of an answer is sampled and never stored.
        assert done[request_id] == prompt + output - 1 + needed[request_id]
        assert len(token_times(trace, request_id)) == output


@EVERY_POLICY
@settings(max_examples=40)
@given(case=cases(closed=False, prefixes=True))
def test_no_blocks_are_lost_once_everyone_has_left(name: str, case: Case) -> None:
    workload = case.workload
    assert workload.prefix_hashes is not None
    workload.arrival_s.append(workload.arrival_s[-1] + 1e6)
    for column, entry in ((workload.prompt_tokens, 1), (workload.output_tokens, 1)):
        column.append(entry)
    workload.prefix_hashes.append([])
    last = expand(run_case(case, POLICIES[name]))[-1]
    assert last.observed is not None
    assert last.observed.free_blocks == case.limits.num_blocks
    assert last.observed.context_tokens == 0


@EVERY_POLICY
def test_a_turn_of_a_conversation_computes_only_what_is_new(name: str) -> None:
    trace = run_case(conversation(5, 1e3, ReplicaLimits(4, 64, SIZE, 999, True)), POLICIES[name])
    # Of 9 + 8 i tokens, the 8 i of the turn before lie in whole blocks that it computed.
    assert reused(trace) == {at: 8 * at for at in range(1, 5)}
    assert trace.decisions["prefill_tokens"].sum() == 5 * 9


@EVERY_POLICY
def test_nothing_is_reused_unless_it_is_asked_for(name: str) -> None:
    case = conversation(5, 1e3, ReplicaLimits(4, 64, SIZE, 999))
    trace = run_case(case, POLICIES[name])
    assert not reused(trace)
    assert not trace.decisions["cached_blocks"].any()


@EVERY_POLICY
def test_a_pool_that_is_too_small_forgets_the_conversation(name: str) -> None:
    case = conversation(2, 1e3, ReplicaLimits(4, 64, SIZE, 12, True))
    other = recorded([(500.0, 40, 5)])
    case.workload.arrival_s.insert(1, other.arrival_s[0])
    case.workload.prompt_tokens.insert(1, 40)
    case.workload.output_tokens.insert(1, 5)
    assert case.workload.prefix_hashes is not None
    case.workload.prefix_hashes.insert(1, [])
    # 11 blocks for the request between: of the 12, one is left for the first turn's two.
    assert reused(run_case(case, POLICIES[name])) == {2: 4}


@EVERY_POLICY
def test_requests_that_come_together_share_what_the_first_of_them_stored(name: str) -> None:
    case = conversation(1, 0.0, ReplicaLimits(8, 4096, SIZE, 999, True))
    many = recorded([(0.0, 41, 3)] + [(0.1, 41, 3)] * 7)
    many.prefix_hashes, many.hash_block_tokens = [list(range(1, 11))] * 8, SIZE
    trace = run_case(case._replace(workload=many), POLICIES[name])
    if name.startswith("chunked_prefill-"):
        return  # its chunks of a few tokens let the others begin before the prompt is stored
    assert reused(trace) == dict.fromkeys(range(1, 8), 40)
    # 10 shared blocks, and one or two of each request's own.
    assert 999 - trace.decisions["free_blocks"].min() <= 10 + 8 * 2


@settings(max_examples=60)
@given(case=cases(prefixes=True))
def test_with_room_for_all_and_one_at_a_time_a_prefix_is_computed_once(case: Case) -> None:
    rows = zip(case.workload.prompt_tokens, case.workload.output_tokens, strict=True)
    case.workload.num_clients = None
    case.workload.arrival_s = [1e4 * at for at, _ in enumerate(rows)]
    case = case._replace(limits=case.limits._replace(num_blocks=9999))
    size, hashed = case.limits.block_size, case.workload.hash_block_tokens
    seen: set[tuple[int, ...]] = set()
    expected: dict[int, int] = {}
    assert case.workload.prefix_hashes is not None
    rows = zip(case.workload.prompt_tokens, case.workload.prefix_hashes, strict=True)
    for request_id, (prompt, hashes) in enumerate(rows):
        tokens = [one * 100 + at for one in hashes for at in range(hashed)][:prompt]
        tokens += [-1000 * request_id - at for at in range(1, prompt - len(tokens) + 1)]
        blocks = [tuple(tokens[: end * size]) for end in range(1, prompt // size + 1)]
        known = [block for block in blocks[: (prompt - 1) // size] if block in seen]
        if known:
            expected[request_id] = len(known) * size
        seen.update(blocks)
    assert reused(run_case(case, POLICIES["continuous"])) == expected


def test_the_first_token_comes_sooner_where_the_prompt_is_cached() -> None:
    case = conversation(6, 1e3, ReplicaLimits(4, 64, SIZE, 999, True))
    without = case._replace(limits=case.limits._replace(prefix_caching=False))
    fast, slow = (request_times(run_case(one, POLICIES["continuous"])) for one in (case, without))
    assert (fast.ttft_s <= slow.ttft_s).all()
    assert fast.ttft_s[-1] < slow.ttft_s[-1]
    assert fast.ttft_s[0] == slow.ttft_s[0]


def test_the_random_loads_do_reuse_pre_empt_and_run_out() -> None:
    seen: Counter[str] = Counter()

    @settings(max_examples=60)
    @given(case=cases(prefixes=True))
    def count(case: Case) -> None:
        for policy in POLICIES.values():
            trace = run_case(case, policy)
            seen["preempted"] += int((trace.events["state"] == State.preempted).sum())
            seen["reused"] += len(trace.decision_lists["reused"].values)
            free = trace.decisions["free_blocks"] == trace.decisions["cached_blocks"]
            seen["full"] += int((free & (trace.decisions["cached_blocks"] > 0)).sum())

    count()
    assert seen["preempted"] > 50
    assert seen["reused"] > 200
    assert seen["full"] > 200
