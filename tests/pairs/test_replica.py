"""The two executors of `replica` decide alike, move the same bytes and give the same tokens."""

import numpy as np
import pytest

from backends.kv_cache import Corruption
from backends.sampling import Sampler, Sampling
from backends.serving import open_model, serve, use_one_thread
from backends.weights import shipped_config
from scenarios.validation.decisions import (
    CONTEXT,
    LIMITS,
    byte_lines,
    decision_line,
    exact_lines,
    replay,
    run_both,
)
from scenarios.validation.options import with_short_chunks
from scenarios.validation.verdict import Verdict
from sim.decision_rows import expand
from sim.engine import ReplicaLimits
from sim.metrics import request_times, token_times
from sim.policies.registry import policies
from sim.trace import State
from sim.workload.closed_loop import ClosedLoop
from sim.workload.recorded import Recorded
from sim.workload.source import Source

RULES = sorted(policies("batching"))


@pytest.fixture(scope="module")
def tiny():
    use_one_thread()
    return open_model("random", "cpu")[1]


@pytest.mark.parametrize("rule", RULES)
def test_replayed_decisions_and_kv_bytes_are_equal_with_preemption(tiny, rule):
    batching = with_short_chunks(policies("batching")[rule]())
    panels = run_both(tiny, batching, 100, seed=0)
    assert (panels.real.trace.events["state"] == State.preempted).any(), "the pool must run out"
    line = decision_line(rule, panels)
    assert line.verdict is Verdict.passed, line.note
    for line in byte_lines(rule, panels, tiny.config):
        assert line.verdict is Verdict.passed, line


def test_a_mixture_of_experts_replays_as_a_dense_model_does():
    use_one_thread()
    mixture = open_model("random", "cpu", config=shipped_config("tiny_mixtral"))[1]
    batching = with_short_chunks(policies("batching")["chunked_prefill"]())
    lines = exact_lines("chunked_prefill", mixture, batching, 80, seed=0)
    assert len(lines) == 4
    assert [line.verdict for line in lines] == [Verdict.passed] * 4, lines


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", ["skip_free", "drop_copy"])
def test_a_corrupted_cache_is_caught_by_the_decisions(tiny, kind, rule):
    """What the view reports comes from tensors, so the log itself gives a fault away."""
    fault = Corruption(kind=kind, index=20)
    batching = with_short_chunks(policies("batching")[rule]())
    line = exact_lines(rule, tiny, batching, 60, seed=1, corruption=fault)[0]
    assert line.question == "decisions"
    assert line.verdict is Verdict.missed


def test_closed_loop_on_the_real_panel_replays_as_well(tiny):
    loop = ClosedLoop(num_clients=5, num_requests=25, input_tokens=20, output_tokens=8)
    batching = policies("batching")["chunked_prefill"](chunk_tokens=16)
    real = serve(tiny, Source(loop, 3, CONTEXT), batching, LIMITS).trace
    order = np.argsort(real.requests["arrival_s"], kind="stable")
    assert len(order) == 25
    times = request_times(real)
    rank = np.empty(25, np.int64)
    rank[real.requests["request"][order]] = np.arange(25)
    simulated = replay(_renumbered(real, rank, order), batching, LIMITS, CONTEXT)
    ours = [dict(decision.tokens) for decision in expand(simulated)]
    theirs = [{int(rank[i]): n for i, n in d.tokens.items()} for d in expand(real)]
    assert ours == theirs
    assert (times.last_token_s > times.arrival_s).all()


def _renumbered(real, rank, order):
    """The real trace with its requests numbered by arrival, as a replay will number them."""
    from dataclasses import replace

    requests = {name: column[order] for name, column in real.requests.items()}
    return replace(real, requests={**requests, "request": rank[requests["request"]]})


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_answers_do_not_depend_on_policy_or_preemption(tiny, temperature):
    sampling = Sampling(temperature=temperature, top_p=0.95 if temperature else 1.0, seed=7)
    few = Recorded(
        arrival_s=[0.0] * 12, prompt_tokens=list(range(5, 53, 4)), output_tokens=[14] * 12
    )
    answers = []
    for rule in RULES:
        for blocks in (6, 64):
            limits = ReplicaLimits(8, 64, 16, blocks)
            batching = policies("batching")[rule]()
            source = Source(few, 0, 96)
            answers.append(serve(tiny, source, batching, limits, sampler=Sampler(sampling)).answers)
    assert all(answer == answers[0] for answer in answers)


def test_stop_token_ends_an_answer_and_the_trace_says_so(tiny):
    from backends.kv_cache import PagedKVCache
    from backends.replica import Replica

    few = Recorded(arrival_s=[0.0] * 3, prompt_tokens=[9, 12, 20], output_tokens=[10] * 3)

    def answer(stop_token):
        limits = ReplicaLimits(8, 64, 16, 32)
        cache = PagedKVCache(tiny.config, 32, 16)
        replica = Replica(
            model=tiny,
            cache=cache,
            batching=policies("batching")["continuous"](),
            limits=limits,
            prompts=lambda r: [1 + r.request_id] * r.prompt_tokens,
            sampler=Sampler(),
            stop_token=stop_token,
        )
        return replica.serve(Source(few, 0, 96)), replica.answers, cache

    _, forced, _ = answer(None)
    stop = forced[1][4]
    trace, stopped, cache = answer(stop)
    expected = {i: ids[: ids.index(stop) + 1] if stop in ids else ids for i, ids in forced.items()}
    assert stopped == expected
    lengths = dict(zip(trace.requests["request"], trace.requests["output_tokens"], strict=True))
    assert lengths == {i: len(ids) for i, ids in expected.items()}
    assert len(token_times(trace, 1)) == len(expected[1])
    cache.check()
    assert cache.free_blocks == 32
