"""The two executors of `hand_over`: real instances decide, move and answer like simulated ones."""

import os
import signal
import threading
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from backends.emulated_link import EmulatedLink
from backends.hand_over import Instances, InstanceSpec, serve_handed_over
from backends.instance_timing import MovePlan
from backends.kv_cache import PagedKVCache
from backends.kv_link import empty_pack, pack, unpack
from backends.serving import open_model, serve, use_one_thread
from backends.weights import random_model
from scenarios.validation.ask import Plan
from scenarios.validation.handed_over import exact_lines
from scenarios.validation.options import Fault, Options, with_short_chunks
from scenarios.validation.verdict import Verdict
from sim import metrics
from sim.engine import ReplicaLimits
from sim.models.parameters import kv_bytes_per_token
from sim.policies.instance_plan.prefill_decode import PrefillDecode
from sim.policies.registry import policies
from sim.trace import State
from sim.workload.closed_loop import ClosedLoop
from sim.workload.poisson import Poisson
from sim.workload.source import Source

LIMITS = ReplicaLimits(8, 256, 16, 64)
LEAST_LOADED = policies("routing")["least_loaded"]()
SPEC = InstanceSpec(
    weights="random", device="cpu", batching=policies("batching")["continuous"](), limits=LIMITS,
    plan=PrefillDecode(), num_instances=2,
)  # fmt: skip
LOAD = Poisson(rate_per_s=200.0, num_requests=40, input_tokens=40, output_tokens=12)


def plan(count, *, num_prefill=1, caching=False, requests=80, fault=Fault.none):
    options = Options(decision_requests=requests, corrupt=fault)
    return Plan(
        "test", options, {}, {}, None, caching, count, {"least_loaded": LEAST_LOADED},
        instance_plan=PrefillDecode(num_prefill=num_prefill),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "asked"),
    [("static", plan(2)), ("continuous", plan(3, num_prefill=2)), ("chunked_prefill", plan(3)),
     ("chunked_prefill", plan(2, caching=True))],
)  # fmt: skip
def test_replayed_decisions_hand_overs_and_bytes_are_equal(name, asked):
    batching = with_short_chunks(policies("batching")[name]())
    lines = exact_lines(name, batching, asked)
    assert [line.question for line in lines].count("decisions") == 3
    assert [line.question for line in lines].count("bytes") == 4
    for line in lines:
        assert line.verdict is Verdict.passed, line
        assert int(line.measured.replace(",", "")) > 0


@pytest.mark.parametrize("fault", [Fault.skip_free, Fault.drop_copy])
def test_a_corrupted_cache_of_the_instance_that_decodes_is_a_miss(fault):
    batching = policies("batching")["continuous"]()
    lines = exact_lines("continuous", batching, plan(2, fault=fault))
    assert any(line.verdict is Verdict.missed for line in lines)


def test_tokens_are_those_of_one_replica_and_all_kv_that_moves_is_counted():
    use_one_thread()
    run = serve_handed_over(SPEC, Source(LOAD, 3, 256), LEAST_LOADED)
    alone = serve(open_model("random", "cpu")[1], Source(LOAD, 3, 256), SPEC.batching, LIMITS)
    assert run.answers == alone.answers
    moved = run.trace.hand_overs
    assert len(moved["request"]) == 40
    token_bytes = kv_bytes_per_token(random_model().config, 4)
    blocks = -(-moved["kv_tokens"] // 16)
    assert run.sent_bytes == int(blocks.sum()) * 16 * token_bytes
    assert run.kv_bytes_written == alone.kv_bytes_written + moved["kv_tokens"].sum() * token_bytes
    assert run.kv_bytes_freed == run.kv_bytes_written


def test_a_hand_over_goes_through_its_stages_in_order_on_one_clock():
    trace = serve_handed_over(SPEC, Source(LOAD, 3, 256), LEAST_LOADED).trace
    moved = trace.hand_overs
    stages = [
        moved[name] for name in ("instant_s", "announced_s", "fetched_s", "delivered_s")
    ]  # fmt: skip
    for earlier, later in pairwise(stages):
        assert (later >= earlier).all()
    assert (moved["released_s"] > moved["fetched_s"]).all()
    over = trace.events["state"] == State.handed_over
    left = dict(zip(trace.events["request"][over].tolist(), trace.events["instant_s"][over],
                    strict=True))  # fmt: skip
    assert all(left[one] <= at for one, at in zip(moved["request"].tolist(), moved["instant_s"],
                                                  strict=True))  # fmt: skip
    for request in moved["request"].tolist():
        assert (np.diff(metrics.token_times(trace, request)) > 0).all()


def test_an_emulated_link_holds_kv_back_as_long_as_it_says():
    few = replace(LOAD, num_requests=6, rate_per_s=4.0)
    link = EmulatedLink(latency_s=0.2, bandwidth_bytes_per_s=float("inf"))
    trace = serve_handed_over(replace(SPEC, link=link), Source(few, 0, 256), LEAST_LOADED).trace
    assert (trace.hand_overs["delivered_s"] - trace.hand_overs["fetched_s"] >= 0.2).all()


def test_instances_serve_again_and_again_and_time_themselves_in_between():
    with Instances(SPEC) as instances:
        first = instances.serve(Source(LOAD, 3, 256), LEAST_LOADED)
        moves = MovePlan(0, [1, 4, 8])
        instances.tell(0, "hold", moves)
        timed = instances.tell(1, "fetch", moves)
        instances.tell(0, "held", None)
        static = policies("batching")["static"]()
        second = instances.serve(Source(LOAD, 3, 256), LEAST_LOADED, static)
    token_bytes = kv_bytes_per_token(random_model().config, 4)
    assert [count for count, _ in timed] == [blocks * 16 * token_bytes for blocks in (1, 4, 8)]
    assert all(seconds > 0 for _, seconds in timed)
    assert first.answers == second.answers
    assert first.sent_bytes == second.sent_bytes


def test_clients_of_a_closed_loop_go_on_from_instance_to_instance():
    loop = ClosedLoop(num_clients=4, num_requests=16, input_tokens=20, output_tokens=6)
    run = serve_handed_over(SPEC, Source(loop, 3, 256), LEAST_LOADED)
    assert sorted(run.answers) == list(range(16))


def serve_and_kill(instances, pid):
    """Serve for twenty seconds, and kill a process after one."""
    long = replace(LOAD, num_requests=400, rate_per_s=20.0)
    with instances:
        threading.Timer(1.0, lambda: os.kill(pid, signal.SIGKILL)).start()
        instances.serve(Source(long, 0, 256), LEAST_LOADED)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_lost_instance_ends_the_run_by_number_and_nothing_is_left(victim):
    instances = Instances(SPEC)
    processes = instances.processes._processes
    with pytest.raises(RuntimeError, match=f"replica {victim} of 2 .*has died"):
        serve_and_kill(instances, processes[victim].pid)
    assert not any(process.is_alive() for process in processes)


@dataclass(kw_only=True)
class Never(PrefillDecode):
    """Fetches nothing."""

    def fetch(self, memory, handed, view):
        return 0


@dataclass(kw_only=True)
class Greedy(PrefillDecode):
    """Fetches whatever there is, room or not."""

    def fetch(self, memory, handed, view):
        return len(handed)


@pytest.mark.parametrize(
    ("bad", "message"),
    [(Never(), "policy Never left the KV of .* requests where it was prefilled"),
     (Greedy(), "policy Greedy at .* needs .* more blocks .*; mend the policy")],
)  # fmt: skip
def test_a_plan_that_breaks_its_rules_is_named(bad, message):
    limits = LIMITS._replace(num_blocks=8)
    spec = replace(SPEC, plan=bad, limits=limits)
    with pytest.raises(ValueError, match=message):
        serve_handed_over(spec, Source(LOAD, 0, 128), LEAST_LOADED)


def test_unpacked_blocks_hold_what_was_packed():
    config = random_model().config
    ours, theirs = PagedKVCache(config, 8, 16), PagedKVCache(config, 8, 16)
    for layer in ours.layers:
        for part in layer:
            part.copy_(torch.rand(part.shape))
    packed = pack(ours, [5, 2])
    assert packed.shape == empty_pack(theirs, [0, 7]).shape
    unpack(theirs, [0, 7], packed)
    for ours_layer, theirs_layer in zip(ours.layers, theirs.layers, strict=True):
        for one, other in zip(ours_layer, theirs_layer, strict=True):
            assert torch.equal(one[[5, 2]], other[[0, 7]])
            assert not other[1:7].any()
