"""Attention and expert ranks: one process's tokens and logits, and every decision replayed."""

from functools import cache

import numpy as np
import pytest

from backends.emulated_link import EmulatedLink
from backends.expert_serving import TINY, ExpertRun, layout_of, serve_experts
from backends.kv_cache import Corruption
from backends.reference import KeepLogits, Reference
from backends.sampling import Sampler, Sampling
from backends.serving import open_model, serve, use_one_thread
from backends.weights import random_model, shipped_config
from scenarios.validation import decisions, experts
from scenarios.validation.options import with_short_chunks
from scenarios.validation.verdict import Verdict
from sim.dispatch_log import first_turn, noted
from sim.engine import ReplicaLimits
from sim.policies.registry import load_file, policies
from sim.state.expert_dispatch import dispatch
from sim.trace import State
from sim.workload.recorded import Recorded
from sim.workload.source import Source

pytestmark = pytest.mark.slow
ALL_CHOSEN = shipped_config(TINY) | {"num_experts_per_tok": 8}
ONE_CHOSEN = shipped_config(TINY) | {"num_experts_per_tok": 1}
SKEWED = [[64.0, 32, 16, 8, 4, 2, 1, 1], [1.0, 1, 2, 4, 8, 16, 32, 64]]
FEW = Recorded(arrival_s=[0.0] * 12, prompt_tokens=list(range(5, 53, 4)), output_tokens=[14] * 12)
FEW_LIMITS = ReplicaLimits(8, 64, 16, 12)


def rule(family, name, **options):
    return policies(family)[name](**options)


def batching(name):
    return with_short_chunks(rule("batching", name))


def run_of(num_attention, num_expert_ranks, **changed):
    fields = {
        "workload": decisions.workload(40), "limits": decisions.LIMITS,
        "batching": batching("continuous"), "num_attention": num_attention,
        "num_expert_ranks": num_expert_ranks,
    }  # fmt: skip
    return ExpertRun(**(fields | changed))


def few(num_attention, num_expert_ranks, **changed):
    """A run of a few requests whose KV does not fit at once."""
    small = {"workload": FEW, "limits": FEW_LIMITS, "batching": batching("chunked_prefill")}
    return run_of(num_attention, num_expert_ranks, **(small | changed))


COMBINATIONS = {
    "2x2 continuous": run_of(2, 2),
    "1x2 chunked_prefill, whole batches": run_of(
        1, 2, batching=batching("chunked_prefill"),
        micro_batching=rule("micro_batching", "none"),
    ),
    "2x2 replicas of hot experts": run_of(
        2, 2, batching=batching("chunked_prefill"), num_micro_batches=2, slots_per_node=5,
        expert_balance=rule("expert_balance", "replicate_hot"), loads=SKEWED,
    ),
    "2x1 least_loaded": run_of(
        2, 1, num_micro_batches=4, routing=rule("routing", "least_loaded"),
    ),
    "1x2 static, every expert chosen": run_of(
        1, 2, batching=batching("static"), config=ALL_CHOSEN, num_micro_batches=1,
    ),
    "1x4 one expert chosen": run_of(1, 4, config=ONE_CHOSEN, keeps_spans=True),
}  # fmt: skip


@cache
def alone(chosen, sampling=None):
    """Answers and logits of a single process, with so many experts a token."""
    use_one_thread()
    kept = KeepLogits()
    config = shipped_config(TINY) | {"num_experts_per_tok": chosen}
    model = open_model("random", "cpu", config=config)[1]
    source = Source(decisions.workload(40), 0, decisions.CONTEXT)
    return serve(model, source, batching("continuous"), decisions.LIMITS, sampler=kept), kept.logits


def logits_of(served):
    """Logits of every token that any attention rank drew."""
    return {place: row for kept in served.samplers for place, row in kept.logits.items()}


def furthest(found, reference):
    assert set(found) == set(reference)
    return max(float(np.abs(found[place] - row).max()) for place, row in reference.items())


@pytest.fixture(scope="module", params=COMBINATIONS)
def panels(request):
    from dataclasses import replace

    run = replace(COMBINATIONS[request.param], sampler=KeepLogits())
    return request.param, run, experts.run_both(run)


def test_decisions_dispatch_lists_and_bytes_equal_the_simulated_ones(panels):
    name, run, both = panels
    lines = experts.judge(name, run, both)
    for line in lines:
        assert line.verdict is Verdict.passed, line
        assert line.simulated == line.measured != "0"
    pairs = 2 * run.num_attention * run.num_expert_ranks
    assert len(lines) == 3 + 3 + pairs, "every rank must send to every one of the other kind"
    nodes = both.real.trace.routes["replica"]
    assert set(nodes.tolist()) == set(range(run.num_attention))


def test_answers_and_logits_are_those_of_a_single_process(panels):
    _, run, both = panels
    served, logits = alone(experts.architecture_of(run).experts_per_token)
    assert both.real.answers == served.answers
    assert (both.real.trace.events["state"] == State.preempted).any(), "a pool must run out"
    assert furthest(logits_of(both.real), logits) < 1e-4
