"""The two executors of `router`: replicas in processes of their own decide like simulated ones."""

import os
import signal
import threading
from dataclasses import dataclass, replace

import pytest

from backends import replica_processes, router
from backends.corruption import Corruption
from backends.replica_processes import Processes, ReplicaSpec
from backends.router import Router, serve_routed
from backends.serving import open_model, serve, use_one_thread
from backends.weights import random_model
from scenarios.validation.options import with_short_chunks
from scenarios.validation.routed import (
    RoutedCase,
    batching_line,
    route_line,
    routed_byte_lines,
    routed_lines,
    run_both_routed,
)
from scenarios.validation.verdict import Verdict
from sim.engine import ReplicaLimits
from sim.metrics import request_times
from sim.policies.batching.base import Batch, Batching
from sim.policies.registry import policies
from sim.policies.routing.base import Routing
from sim.workload.closed_loop import ClosedLoop
from sim.workload.poisson import Poisson
from sim.workload.source import Source

RULES = sorted(policies("routing"))
LIMITS = ReplicaLimits(8, 256, 16, 64)
SPEC = ReplicaSpec(
    weights="random", device="cpu", batching=policies("batching")["continuous"](), limits=LIMITS
)
ARCHITECTURE = random_model().config


def case(rule, count=2, **given):
    batching = with_short_chunks(policies("batching")["chunked_prefill"]())
    return RoutedCase(policies("routing")[rule](), batching, count, 120, **given)


@pytest.mark.parametrize(
    ("rule", "count", "caching"),
    [("round_robin", 3, False), ("least_loaded", 2, True), ("prefix_aware", 2, True)],
)
def test_replayed_routes_decisions_and_kv_bytes_are_equal(rule, count, caching):
    panels = run_both_routed(case(rule, count, prefix_caching=caching))
    routes = panels.real.trace.routes
    assert set(routes["replica"].tolist()) == set(range(count)), "every replica must serve"
    assert (routes["answers"] > 0).any(), "answers must have come in between"
    lines = [route_line(rule, panels), batching_line(rule, panels)]
    for line in (*lines, *routed_byte_lines(rule, panels, ARCHITECTURE)):
        assert line.verdict is Verdict.passed, line


def test_every_rule_is_tried():
    assert RULES == ["least_loaded", "prefix_aware", "round_robin"], "name new rules above"


def test_a_corrupted_cache_of_one_replica_is_caught():
    fault = Corruption(kind="skip_free", index=5)
    lines = routed_lines("round_robin", case("round_robin", corruption=fault), ARCHITECTURE)
    assert Verdict.missed in {line.verdict for line in lines}


@dataclass(kw_only=True)
class Forgetful(Routing):
    """Another choice every time it is asked about the same request: no pure decision."""

    asked: int = 0

    def choose(self, memory, request, view):
        self.asked += 1
        return self.asked // 7 % view.num_replicas


def test_a_rule_that_keeps_state_on_itself_is_caught():
    lines = routed_lines("forgetful", case("round_robin")._replace(routing=Forgetful()),
                         ARCHITECTURE)  # fmt: skip
    assert lines[0].verdict is Verdict.missed, lines[0]


def test_answers_are_those_of_one_replica_and_instants_are_in_order():
    load = Poisson(rate_per_s=60.0, num_requests=30, input_tokens=20, output_tokens=8)
    routed = serve_routed(SPEC, Source(load, 4, 256), policies("routing")["least_loaded"](), 2)
    use_one_thread()
    alone = serve(open_model("random", "cpu")[1], Source(load, 4, 256), SPEC.batching, LIMITS)
    assert routed.answers == alone.answers
    trace = routed.trace
    arrival_s = trace.requests["arrival_s"]
    routes = trace.routes
    assert routes["request"].tolist() == trace.requests["request"].tolist()
    assert (routes["instant_s"] >= arrival_s).all()
    assert (routes["delivered_s"] >= routes["instant_s"]).all()
    times = request_times(trace)
    assert (times.scheduled_s >= routes["delivered_s"]).all()
    learnt = dict(zip(trace.answers["request"].tolist(), trace.answers["instant_s"], strict=True))
    assert all(learnt[one] >= end for one, end in zip(times.request, times.last_token_s,
                                                      strict=True))  # fmt: skip


def test_clients_of_a_closed_loop_go_on_through_the_router():
    loop = ClosedLoop(num_clients=4, num_requests=16, input_tokens=20, output_tokens=6)
    run = serve_routed(SPEC, Source(loop, 3, 256), policies("routing")["least_loaded"](), 2)
    assert sorted(run.answers) == list(range(16))
    assert set(run.trace.routes["replica"].tolist()) == {0, 1}


def serve_and_strike(processes, blow):
    """Serve for twenty seconds, and strike the process of replica 1 after one."""
    load = Poisson(rate_per_s=20.0, num_requests=400, input_tokens=20, output_tokens=8)
    victim = processes._processes[1].pid
    with processes:
        processes.await_ready()
        threading.Timer(1.0, lambda: os.kill(victim, blow)).start()
        Router(processes, policies("routing")["round_robin"](), LIMITS, range(2)).run(
            Source(load, 0, 256)
        )


@pytest.mark.parametrize(
    ("blow", "message"),
    [(signal.SIGKILL, "replica 1 of 2 .*has died"),
     (signal.SIGSTOP, "replica 1 of 2 .*was silent for 3 s")],
)  # fmt: skip
def test_a_lost_replica_ends_the_run_by_name_and_nothing_is_left(monkeypatch, blow, message):
    monkeypatch.setattr(replica_processes, "SILENCE_S", 3.0)
    processes = Processes(SPEC, 2, router.serve_once)
    with pytest.raises(RuntimeError, match=message):
        serve_and_strike(processes, blow)
    assert not any(process.is_alive() for process in processes._processes)


@dataclass(kw_only=True)
class Idle(Batching):
    """Leaves everyone waiting."""

    def next_batch(self, memory, view):
        return Batch()


def test_what_a_replica_refuses_is_told_with_its_number():
    load = Poisson(rate_per_s=60.0, num_requests=5, input_tokens=20, output_tokens=8)
    with pytest.raises(ValueError, match=r"replica [01]: policy Idle left . requests unserved"):
        serve_routed(replace(SPEC, batching=Idle()), Source(load, 0, 256),
                     policies("routing")["round_robin"](), 2)  # fmt: skip


@dataclass(kw_only=True)
class Elsewhere(Routing):
    """Sends everything to a replica that is not there."""

    def choose(self, memory, request, view):
        return view.num_replicas


def test_a_replica_that_is_not_there_is_refused_in_the_words_of_the_simulated_router():
    load = Poisson(rate_per_s=60.0, num_requests=5, input_tokens=20, output_tokens=8)
    with pytest.raises(ValueError, match=r"Elsewhere at \S+ s: .*=1 .* replicas 0 to 0; mend"):
        serve_routed(SPEC, Source(load, 0, 256), Elsewhere(), 1)
