"""Several batches in flight on real stages: one rank's tokens, and every decision replayed."""

from collections import Counter

import numpy as np
import pytest

from backends.emulated_link import EmulatedLink
from backends.kv_cache import Corruption
from backends.parallel_serving import ParallelRun, serve_parallel
from backends.pipeline import Collector
from backends.reference import KeepLogits
from backends.serving import open_model, serve, use_one_thread
from scenarios.validation import decisions, parallel
from scenarios.validation.options import with_short_chunks
from scenarios.validation.verdict import Verdict
from sim.engine import ReplicaLimits
from sim.policies.registry import policies
from sim.trace import State
from sim.trace_merge import num_replicas, of_replica
from sim.workload.recorded import Recorded
from sim.workload.source import Source

pytestmark = pytest.mark.slow
LIMITS = ReplicaLimits(8, 64, 16, 12)
FEW = Recorded(arrival_s=[0.0] * 12, prompt_tokens=list(range(5, 53, 4)), output_tokens=[14] * 12)
CONTEXT = 96
FOUR_LAYERS = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 512,
    "max_position_embeddings": 512,
}  # fmt: skip


@pytest.fixture(scope="module")
def alone():
    """One rank's answers and logits."""
    use_one_thread()
    kept, run = KeepLogits(), run_of()
    model = open_model("random", "cpu")[1]
    return serve(model, Source(FEW, 0, CONTEXT), run.batching, LIMITS, sampler=kept), kept


def run_of(**changed):
    fields = {
        "weights": "random", "workload": FEW, "limits": LIMITS, "max_model_tokens": CONTEXT,
        "batching": policies("batching")["chunked_prefill"](chunk_tokens=24), "pp_size": 2,
    }  # fmt: skip
    return ParallelRun(**(fields | changed))


def test_two_batches_are_in_flight_and_tokens_are_those_of_one_rank(alone):
    served, kept = alone
    found = serve_parallel(run_of(sampler=KeepLogits()))
    trace = found.served.trace
    assert found.served.answers == served.answers
    assert (trace.events["state"] == State.preempted).any(), "the pools must run out"
    assert num_replicas(trace) == 2
    one, other = (of_replica(trace, lane).iterations for lane in range(2))
    begun = np.searchsorted(one["start_s"], other["start_s"], "right") - 1
    overlaps = (begun >= 0) & (other["start_s"] < one["end_s"][begun])
    assert overlaps.mean() > 0.5, "one batch must begin while the other is in flight"
    furthest = max(
        float(np.abs(found.sampler.logits[place] - row).max()) for place, row in kept.logits.items()
    )
    # Other batches: a matrix product of other rows may add up in another order.
    assert furthest < 1e-4


@pytest.mark.parametrize(
    ("rule", "routing", "tp_size", "pp_size"),
    [
        ("static", "round_robin", 1, 2),
        ("continuous", "least_loaded", 1, 2),
        ("chunked_prefill", "round_robin", 2, 2),
        ("chunked_prefill", "least_loaded", 1, 4),
    ],
)
def test_decisions_routes_and_bytes_equal_the_simulated_ones(rule, routing, tp_size, pp_size):
    run = run_of(
        config=FOUR_LAYERS, batching=with_short_chunks(policies("batching")[rule]()),
        routing=policies("routing")[routing](), tp_size=tp_size, pp_size=pp_size,
        workload=decisions.workload(32), limits=parallel.scaled(decisions.LIMITS, pp_size),
        max_model_tokens=decisions.CONTEXT,
    )  # fmt: skip
    found = serve_parallel(run)
    lines = parallel.judge(rule, run, found)
    judged = Counter(line.verdict for line in lines)
    assert judged == {Verdict.passed: len(lines) - 1, Verdict.reported: 1}, lines
    assert len(lines) == 1 + 1 + 3 + (6 if tp_size > 1 else 2) + 1
    assert len(set(found.served.trace.routes["replica"].tolist())) == pp_size


def test_bytes_of_ranks_do_not_depend_on_how_many_batches_are_in_flight():
    one, two = (serve_parallel(run_of(batches_in_flight=lanes)) for lanes in (1, 2))
    assert not len(one.served.trace.routes["request"])
    assert one.served.answers == two.served.answers
    assert one.payload_bytes()["tokens"] == two.payload_bytes()["tokens"]


def test_a_corrupted_cache_of_a_lane_is_caught():
    run = run_of(
        batching=with_short_chunks(policies("batching")["continuous"]()),
        workload=decisions.workload(40), limits=parallel.scaled(decisions.LIMITS, 2),
        max_model_tokens=decisions.CONTEXT, corruption=Corruption(kind="skip_free", index=10),
    )  # fmt: skip
    lines = parallel.parallel_lines("continuous", run)
    assert Verdict.missed in {line.verdict for line in lines}


def test_a_slow_link_changes_no_token(alone):
    link = EmulatedLink(latency_s=2e-3, bandwidth_bytes_per_s=1e9)
    assert serve_parallel(run_of(link=link)).served.answers == alone[0].answers


def test_a_second_batch_uses_the_time_in_which_the_first_is_on_its_way():
    """Nearly all the time goes to deliveries, so that a busy machine changes little."""
    link, one = EmulatedLink(latency_s=0.03, bandwidth_bytes_per_s=1e9), ReplicaLimits(4, 64, 16, 8)
    batching = policies("batching")["continuous"]()
    spans_s = {
        lanes: serve_parallel(
            run_of(link=link, limits=parallel.scaled(one, lanes), batches_in_flight=lanes,
                   batching=batching)
        ).served.trace.iterations["end_s"].max()
        for lanes in (1, 2)
    }  # fmt: skip
    assert 1.5 < spans_s[1] / spans_s[2] < 2.3


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"batches_in_flight": 3}, "batches_in_flight=3 must not exceed pp_size=2"),
        ({"limits": LIMITS._replace(num_blocks=1)}, "do not give one to each of 2 batches"),
        ({"limits": LIMITS._replace(num_blocks=6)}, "mend the policy"),
    ],
)
def test_what_cannot_run_is_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        serve_parallel(run_of(**changed))


def test_an_error_while_waiting_for_tokens_reaches_the_loop():
    def broken(count):
        raise ConnectionError(f"no {count} tokens")

    def ask():
        with Collector(broken) as collector:
            collector.expect(3)
            collector.wait(None)

    with pytest.raises(ConnectionError, match="no 3 tokens"):
        ask()
