"""Replicas that cache prefixes: both panels share, keep and drop the same blocks."""

import pytest

from backends.kv_cache import Corruption
from backends.serving import open_model, serve, use_one_thread
from scenarios.validation.decisions import (
    CACHING,
    CONTEXT,
    byte_lines,
    decision_line,
    exact_lines,
    run_both,
    shared_workload,
)
from scenarios.validation.options import with_short_chunks
from scenarios.validation.verdict import Verdict
from sim.engine import ReplicaLimits
from sim.policies.registry import policies
from sim.trace import State
from sim.workload.recorded import Recorded
from sim.workload.source import Source

RULES = sorted(policies("batching"))


@pytest.fixture(scope="module")
def tiny():
    use_one_thread()
    return open_model("random", "cpu")[1]


@pytest.mark.parametrize("rule", RULES)
def test_replayed_decisions_and_kv_bytes_are_equal(tiny, rule):
    batching = with_short_chunks(policies("batching")[rule]())
    panels = run_both(tiny, batching, 100, seed=0, prefix_caching=True)
    decisions = panels.simulated.decisions
    assert len(panels.simulated.decision_lists["reused"].values) > 50
    assert (decisions["free_blocks"] == decisions["cached_blocks"]).any(), "blocks must be dropped"
    if rule != "static":
        assert (panels.real.trace.events["state"] == State.preempted).any(), "the pool must run out"
    for line in (decision_line(rule, panels), *byte_lines(rule, panels, tiny.config)):
        assert line.verdict is Verdict.passed, line


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", ["skip_free", "drop_copy", "stale_block"])
def test_a_corrupted_cache_is_caught_by_the_decisions(tiny, kind, rule):
    fault = Corruption(kind=kind, index=5)
    batching = with_short_chunks(policies("batching")[rule]())
    line = exact_lines(rule, tiny, batching, 100, 1, fault, prefix_caching=True)[0]
    assert line.question == "decisions"
    assert line.verdict is Verdict.missed


@pytest.mark.parametrize("size", [16, 4, 24])
@pytest.mark.parametrize("rule", RULES)
def test_answers_are_those_without_the_cache(tiny, rule, size):
    """Hash blocks as long as the engine's, shorter, and ones that do not divide by them."""
    prompts = [40, 41, 56, 64, 65, 72, 48, 100, 64, 64]
    families = [[1], [1], [2], [1, 3], [1, 3], [1, 4], [1, 3, 5], [1, 3, 5, 6], [1, 3], [1, 3]]
    paths = [
        [100 * one + at for one in family for at in range(32 // size + 1)] for family in families
    ]
    load = Recorded(
        arrival_s=[0.01 * at for at in range(len(prompts))],
        prompt_tokens=prompts, output_tokens=[10] * len(prompts), prefix_hashes=paths,
        hash_block_tokens=size,
    )  # fmt: skip
    batching = with_short_chunks(policies("batching")[rule]())
    answers = []
    for caching, blocks in ((False, 64), (True, 64), (True, 12)):
        limits = ReplicaLimits(4, 512, 16, blocks, caching)
        served = serve(tiny, Source(load, 0, 256), batching, limits)
        answers.append(served.answers)
        assert bool(len(served.trace.decision_lists["reused"].values)) is caching
        assert served.kv_bytes_freed == served.kv_bytes_written
    assert answers[1] == answers[0]
    assert answers[2] == answers[0]


def test_a_stale_block_changes_answers_too(tiny):
    source = Source(shared_workload(100), 0, CONTEXT)
    batching = policies("batching")["static"]()
    fault = Corruption(kind="stale_block", index=0)
    whole, stale = (
        serve(tiny, source, batching, CACHING, corruption=corruption).answers
        for corruption in (None, fault)
    )
    assert whole != stale


@pytest.mark.parametrize("rule", RULES)
def test_panels_agree_where_hash_blocks_and_kv_blocks_do_not_divide(tiny, rule):
    from scenarios.validation.decisions import Panels, replay
    from sim.workload.recorded import replayed

    source = Source(shared_workload(60), 2, CONTEXT)
    rows = [list(column) for column in zip(*source.initial(), strict=True)]
    hashes = [list(one[:3]) for one in rows[5]]
    load = replayed(
        rows[1], rows[2], rows[3], prefix_hashes=hashes, hash_block_tokens=24
    )  # fmt: skip
    batching = with_short_chunks(policies("batching")[rule]())
    real = serve(tiny, Source(load, 0, CONTEXT), batching, CACHING)
    again = replay(real.trace, batching, CACHING, CONTEXT, hashes, hash_block_tokens=24)
    assert len(again.decision_lists["reused"].values) > 10
    line = decision_line(rule, Panels(real, again))
    assert line.verdict is Verdict.passed, line
