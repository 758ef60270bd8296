"""Elastic instances on ranks: one rank's tokens and logits, exact bytes, and losses survived."""

from collections import Counter
from functools import cache

import numpy as np
import pytest
from elastic_scripts import SCALING, Case, OneByOne, Steps, Together

from backends.corruption import Corruption
from backends.elastic_orders import RankLoss
from backends.elastic_serving import ElasticRun, serve_elastic
from backends.reference import KeepLogits, OneRank
from backends.serving import open_model, use_one_thread
from backends.tokenizer import prompt_token_ids
from backends.weights import TINY_CONFIG
from sim.decision_rows import expand
from sim.engine import ReplicaLimits
from sim.metrics import request_times, token_times
from sim.steps import DecodeGroup, Migration, Prefill, Step
from sim.trace import State
from sim.trace_merge import of_replica
from sim.workload.recorded import Recorded

TOLERANCE = 1e-4
CONFIG = TINY_CONFIG | {"num_hidden_layers": 3}
LAYERS, KV_HEADS, HEADS, DIM, WORD = 3, 4, 8, 8, 4
KV_BYTES = LAYERS * 2 * KV_HEADS * DIM * WORD
"""Of one token."""
QUERY_BYTES = LAYERS * HEADS * DIM * WORD
PARTIAL_BYTES = LAYERS * HEADS * (DIM + 1) * WORD
"""An output and a logarithm a head, in float32."""
LIMITS = ReplicaLimits(8, 64, 1, 96)


def workload(*requests):
    """Requests (prompt, answer) in tokens that all come at once."""
    prompts, answers = zip(*requests, strict=True)
    return Recorded(
        arrival_s=[0.0] * len(requests), prompt_tokens=list(prompts), output_tokens=list(answers)
    )


def run_of(num_instances, plan, requests, **changed):
    fields = {
        "config": CONFIG, "num_instances": num_instances, "plan": plan, "limits": LIMITS,
        "scaling": SCALING, "workload": workload(*requests), "sampler": KeepLogits(),
    }  # fmt: skip
    return ElasticRun(**(fields | changed))


@cache
def reference():
    use_one_thread()
    return OneRank(open_model("random", "cpu", config=CONFIG)[1])


@cache
def alone(request_id, prompt, answer):
    """Tokens of one request on one rank, and the logits before each."""
    tokens = prompt_token_ids(0, request_id, prompt, CONFIG["vocab_size"])
    (found,) = reference().generate([tokens], answer)
    return found, reference().logits(tokens, found)


def require_same_numbers(served, requests, requests_lost=False):
    """Greedy tokens are those of one rank, and logits are close to its own."""
    logits = {place: row for one in served.samplers for place, row in one.logits.items()}
    seen = 0
    for request_id, (prompt, answer) in enumerate(requests):
        tokens, rows = alone(request_id, prompt, answer)
        assert served.answers[request_id] == tokens
        for step, row in enumerate(rows):
            found = logits.get((request_id, prompt + step))
            if found is not None or not requests_lost:
                np.testing.assert_allclose(found, row, atol=TOLERANCE)
                seen += 1
    assert seen > 0


def payload(served, name):
    """Bytes under one name by (sender, receiver)."""
    found = Counter()
    for one in served.sent:
        if one.name == name:
            found[one.rank, one.peer] += one.payload_bytes
    return found


SPLITS = [
    Case(1, (0,), ((0, 0),), ((0,),)),
    Case(2, (1,), ((1, 0),), ((1,), (3,))),
    Case(1, (0, 1), ((0, 0),), ((0,), (1,), (0,))),
    Case(2, (2, 1), ((1, 5), (2, 0)), ((1, 2), (2, 1), (0, 3))),
    Case(1, (0, 1, 2), ((2, 0),), ((2,), (0,))),
    Case(3, (3, 0, 2), ((0, 4), (3, 7), (2, 0)), ((3, 0), (3, 0, 2), (1,))),
    Case(2, (1, 2, 3), ((1, 1), (2, 1), (3, 0)), ((2,), (1, 3))),
    Case(1, (0, 1, 2, 3), ((1, 0),), ((1,),)),
    Case(2, (3, 2, 1, 0), ((3, 6), (1, 6), (3, 3), (0, 0)), ((0, 1), (2,), (3,))),
    Case(2, (0, 1, 2, 3), ((0, 5), (1, 5), (2, 5), (3, 0)), ((0, 3), (1, 2))),
]
"""Rings of 1 to 4 members, in several orders, that keep KV on any of them; masters that change."""
LENGTHS = [
    (7, 3), (9, 4), (6, 3), (13, 4), (12, 3), (8, 5), (17, 4), (11, 5), (2, 4), (1, 3), (10, 3),
    (5, 4), (3, 2), (16, 4), (15, 1), (9, 6), (14, 4),
]  # fmt: skip


@pytest.fixture(scope="module")
def splits():
    plan = OneByOne(cases=SPLITS)
    return plan, serve_elastic(run_of(4, plan, LENGTHS))


def test_every_split_gives_the_tokens_and_logits_of_one_rank(splits):
    assert sum(case.requests for case in SPLITS) == len(LENGTHS)
    assert {len(case.ring) for case in SPLITS} == {1, 2, 3, 4}
    require_same_numbers(splits[1], LENGTHS)


def test_a_ring_sends_the_prompts_one_time_less_than_it_has_members(splits):
    """Whoever keeps the KV: proactive scale-down sends nothing of its own."""
    plan, served = splits
    tokens = sum(plan.expected.ring_tokens.values())
    prompts, first = Counter(), 0
    for case in SPLITS:
        chosen = LENGTHS[first : first + case.requests]
        prompts[len(case.ring)] += sum(prompt for prompt, _ in chosen)
        first += case.requests
    assert tokens == sum((size - 1) * count for size, count in prompts.items())
    assert sum(payload(served, "ring").values()) == tokens * KV_BYTES
    assert {one.name for one in served.sent} == {"ring", "query", "partial"}


def test_queries_go_to_those_that_hold_kv_and_partial_outputs_come_back(splits):
    plan, served = splits
    exchanged = +plan.expected.exchanged
    assert payload(served, "query") == {
        pair: count * QUERY_BYTES for pair, count in exchanged.items()
    }
    assert payload(served, "partial") == {
        (holder, master): count * PARTIAL_BYTES for (master, holder), count in exchanged.items()
    }


def test_every_token_is_stored_once_and_given_up_once(splits):
    stored = sum(prompt + answer - 1 for prompt, answer in LENGTHS)
    written, read, freed = splits[1].kv_bytes
    assert written == freed == stored * KV_BYTES
    contexts = (prompt + step for prompt, answer in LENGTHS for step in range(1, answer))
    assert read == sum(contexts) * KV_BYTES
    assert splits[1].tables.steps["free_slots"][-1] == 4 * LIMITS.num_blocks


def test_the_trace_has_every_token_and_the_work_has_every_prefill(splits):
    served = splits[1].trace, splits[1].tables
    times = request_times(served[0])
    assert times.output_tokens.tolist() == [answer for _, answer in LENGTHS]
    for request_id, (_, answer) in enumerate(LENGTHS):
        at = token_times(served[0], request_id)
        assert len(at) == answer
        assert (np.diff(at) > 0).all()
    lanes = [expand(of_replica(served[0], lane)) for lane in range(5)]
    computed = Counter()
    for decision in (one for lane in lanes for one in lane):
        computed.update(decision.tokens)
    assert computed == {at: prompt + answer - 1 for at, (prompt, answer) in enumerate(LENGTHS)}
    prefills = [one for one in splits[1].work if one.kind == "prefill"]
    assert len(prefills) == sum(len(case.ring) for case in SPLITS)
    assert sum(one.tokens for one in prefills) == sum(prompt for prompt, _ in LENGTHS)
    assert all(0 <= one.keep_s < one.end_s - one.begin_s for one in prefills)
    ends = served[1].members["end_s"]
    assert not np.isnan(ends).any()


# A run of several batches at once -------------------------------------------------------------

MIXED = [(9, 9), (12, 8), (7, 7), (5, 6)]


def idle(view):
    return not (view.in_round or view.prefilling)


def first(view):
    """Two groups prefill at once."""
    one, two = Prefill((0,), (0, 1), ((0, 9),)), Prefill((1,), (2,), ((2, 12),))
    return Step(prefill=(one, two)) if len(view.waiting) == len(MIXED) else None


def beside(view):
    """One decodes, and is not alone: a prefill begins with its round, the other batch pauses."""
    if not idle(view):
        return None
    (number,) = (one.number for one in view.batches if one.request_ids[0] == 0)
    prefill = Prefill((2, 3), (1, 2), ((2, 4), (1, 8)))
    return Step(prefill=(prefill,), decode=(DecodeGroup((number,), (0,), ((0, 1),)),))


def two_groups(view):
    """Both batches in one round, each in its group; the first scales up to instance 1."""
    if not idle(view) or len(view.batches) < 3:
        return None
    numbers = {int(one.request_ids[0]): one.number for one in view.batches}
    up = DecodeGroup((numbers[0],), (0, 1), ((1, 1),))
    alone_ = DecodeGroup((numbers[1],), (2,), ((2, 1),))
    return Step(decode=(up, alone_)) if view.rounds else None


def migrate_and_join(view):
    """KV of the middle of a request moves, then all decode together with two masters."""
    numbers = {int(one.request_ids[0]): one.number for one in view.batches}
    moves = Migration(numbers[0], 0, 2, 6), Migration(numbers[2], 2, 0, 3)
    everyone = DecodeGroup(tuple(numbers.values()), (0, 1, 2), ((2, 3), (0, 1)))
    return Step(migrate=moves, decode=(everyone,))


def preempt(view):
    """One loses its KV and begins anew, over all instances."""
    (batch,) = view.batches
    going = DecodeGroup((batch.number,), (0, 1, 2), ((1, batch.num_requests - 1),))
    return Step(preempt=(0,), decode=(going,))


def again(view):
    tokens = view.waiting[0].prefill_tokens
    return Step(prefill=(Prefill((0,), (2, 0, 1), ((1, 3), (0, tokens - 3))),))


@pytest.fixture(scope="module")
def mixed():
    plan = Steps(steps=[first, beside, two_groups, migrate_and_join, preempt, again])
    return serve_elastic(run_of(3, plan, MIXED))


def test_pauses_scale_ups_migrations_and_preemptions_leave_the_numbers_alone(mixed):
    require_same_numbers(mixed, MIXED)
    assert (mixed.trace.events["state"] == State.preempted).sum() == 1
    assert mixed.tables.steps["migrations"].sum() == 2


def test_a_migration_sends_its_tokens_and_their_positions_and_nothing_else(mixed):
    assert payload(mixed, "migration") == {(0, 2): 6 * KV_BYTES, (2, 0): 3 * KV_BYTES}
    assert payload(mixed, "migration_positions") == {(0, 2): 6 * 8, (2, 0): 3 * 8}
    moved = mixed.tables.kv_moves
    assert moved["tokens"].tolist() == [6, 3]
    assert (moved["end_s"] > moved["begin_s"]).all()
    written, _, freed = mixed.kv_bytes
    assert written == freed


# Losses ---------------------------------------------------------------------------------------

FEW = [(7, 6), (20, 5), (3, 7)]


@pytest.mark.parametrize(
    ("losses", "found"),
    [
        ((RankLoss(2, 0, 1), RankLoss(0, 3, 2)), [2, 0]),
        ((RankLoss(1, 2, 0, stops=True),), [1]),
    ],
    ids=["killed in a prefill and in a round", "stopped in a round"],
)
def test_the_others_go_on_without_a_lost_instance_and_answer_the_same(losses, found):
    run = run_of(3, Together(), FEW, losses=losses, silent_s=2.5)
    served = serve_elastic(run)
    require_same_numbers(served, FEW, requests_lost=True)
    steps = served.tables.steps["lost"]
    assert steps[steps >= 0].tolist() == found
    events = served.trace.events
    finished = events["request"][events["state"] == State.finished]
    assert sorted(finished.tolist()) == [0, 1, 2]
    assert {one: len(token_times(served.trace, one)) for one in range(3)} == {0: 6, 1: 5, 2: 7}
    assert len(served.samplers) == 3 - len(losses)


def move_away(view):
    """All KV of the first request goes from 0 to 1, where the second is."""
    if not idle(view) or len(view.batches) < 2:
        return None
    one, two = sorted(view.batches, key=lambda batch: batch.request_ids[0])
    plan = Migration(one.number, 0, 1, int(one.tokens[0]))
    return Step(migrate=(plan,), decode=(DecodeGroup((one.number, two.number), (1,), ((1, 2),)),))


def each_alone(view):
    one, two = (Prefill((at,), (at,), ((at, FEW[at][0]),)) for at in range(2))
    return Step(prefill=(one, two))


def test_a_request_whose_kv_was_lost_on_its_way_begins_anew():
    """The source dies before it sends; the target holds garbage, which nobody decodes."""
    plan = Steps(steps=[each_alone, move_away])
    served = serve_elastic(run_of(2, plan, FEW[:2], losses=(RankLoss(0, 1),)))
    require_same_numbers(served, FEW[:2], requests_lost=True)
    assert served.tables.steps["lost"].max() == 0


def apart(view):
    """The first request on instance 0, the second on 1 and 2."""
    one = Prefill((0,), (0,), ((0, FEW[0][0]),))
    return Step(prefill=(one, Prefill((1,), (1, 2), ((1, 5), (2, FEW[1][0] - 5)))))


def each_in_its_group(view):
    if not idle(view) or len(view.batches) < 2:
        return None
    numbers = {int(one.request_ids[0]): one.number for one in view.batches}
    one, two = DecodeGroup((numbers[0],), (0,), ((0, 1),)), (1, 2)
    return Step(decode=(one, DecodeGroup((numbers[1],), two, ((1, 1),))))


def test_a_round_goes_on_for_the_groups_that_lost_nobody():
    plan = Steps(steps=[apart, each_in_its_group])
    served = serve_elastic(run_of(3, plan, FEW[:2], losses=(RankLoss(2, 1, 1),)))
    require_same_numbers(served, FEW[:2], requests_lost=True)
    events = served.trace.events
    assert events["request"][events["state"] == State.lost].tolist() == [1]
    admitted = events["request"][events["state"] == State.admitted]
    assert sorted(admitted.tolist()) == [0, 1, 1]


def test_the_last_instance_that_is_lost_ends_the_run():
    with pytest.raises(RuntimeError, match="instance 0, the last of 1, is lost"):
        serve_elastic(run_of(1, Together(), FEW, losses=(RankLoss(0, 1),)))


# Faults that validation must see --------------------------------------------------------------


def test_a_pool_that_frees_too_little_shows_in_what_the_plan_sees():
    corrupt = Corruption(kind="skip_free", index=0)
    found = serve_elastic(run_of(1, Together(), FEW, corruption=corrupt))
    steps = found.tables.steps
    short = LIMITS.num_blocks - steps["free_slots"][-1]
    stored = sum(prompt + answer - 1 for prompt, answer in FEW)
    written, _, freed = found.kv_bytes
    assert short > 0
    assert written == stored * KV_BYTES
    assert freed < written


def test_a_token_that_is_not_stored_changes_the_logits():
    corrupt = Corruption(kind="drop_copy", index=3)
    served = serve_elastic(run_of(1, Together(), FEW, corruption=corrupt))
    with pytest.raises(AssertionError):
        require_same_numbers(served, FEW)
    stored = sum(prompt + answer - 1 for prompt, answer in FEW)
    assert served.kv_bytes[0] == (stored - 1) * KV_BYTES


# What is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"limits": ReplicaLimits(8, 64, 1, 0)}, "num_blocks=0 at least 1"),
        ({"limits": ReplicaLimits(8, 64, 16, 8)}, "block_size=16 must be 1"),
        ({"limits": ReplicaLimits(8, 64, 1, 12)}, "request 1 needs 20 prompt . 6 output = 26"),
        ({"num_instances": 0}, "ranks=0 must be at least 1"),
        ({"weights": "nowhere"}, "model 'nowhere' is neither a folder"),
    ],
)
def test_sizes_that_cannot_be_are_refused_before_anything_starts(changed, message):
    requests = [(7, 6), (20, 6)]
    with pytest.raises(ValueError, match=message):
        serve_elastic(
            run_of(**({"num_instances": 2} | changed), plan=Together(), requests=requests)
        )
