"""The two executors of `failover`: replicas that are really killed, slowed down and replaced."""

import copy
import os
import signal
import threading
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest

from backends import lives as lives_module
from backends import slow_model
from backends.corruption import Corruption
from backends.failover import FailoverRouter, serve_failover
from backends.lives import Lives
from backends.router import ReplicaSpec
from backends.serving import open_model, serve, use_one_thread
from backends.slow_model import SlowModel
from backends.weights import random_model
from scenarios.validation.failing import failing_lines, in_time, run_both_failing
from scenarios.validation.options import with_short_chunks
from scenarios.validation.routed import RoutedCase
from scenarios.validation.verdict import Verdict
from sim.engine import ReplicaLimits
from sim.faults import Fault, Kind, Part
from sim.metrics import request_times, rerouted, token_times
from sim.policies.registry import policies
from sim.slowness import SlowTimes
from sim.trace import State
from sim.workload.closed_loop import ClosedLoop
from sim.workload.poisson import Poisson
from sim.workload.source import Source

RULES = sorted(policies("routing"))
LIMITS = ReplicaLimits(8, 256, 16, 64)
ARCHITECTURE = random_model().config
BATCHING = with_short_chunks(policies("batching")["chunked_prefill"]())


def dead(replica, at_s, until_s=None):
    return Fault(part=Part.node, kind=Kind.dead, replica=replica, at_s=at_s, until_s=until_s)


STRAGGLER = Fault(part=Part.gpu, kind=Kind.slow, replica=0, factor=2.0, at_s=1.0, until_s=6.0)
FAULTS = [STRAGGLER, dead(1, 2.0, 4.0), dead(0, 5.0, 8.0)]


def case(rule, count=2, **given):
    return RoutedCase(policies("routing")[rule](), BATCHING, count, 120, **given)


def spec(*faults):
    return ReplicaSpec(
        weights="random", device="cpu", batching=BATCHING, limits=LIMITS, faults=faults
    )


@cache
def panels(rule, caching):
    """Both panels of a run in which every fault comes."""
    return run_both_failing(case(rule, prefix_caching=caching), FAULTS)


def judge_instead(monkeypatch, both):
    """Let the lines be those of panels that are there already."""
    monkeypatch.setattr("scenarios.validation.failing.run_both_failing", lambda case, faults: both)


@pytest.mark.parametrize(
    ("rule", "caching"),
    [("round_robin", False), ("least_loaded", True), ("prefix_aware", True)],
)
def test_replay_of_deaths_gives_equal_decisions_and_bytes_and_clients_see_no_fault(
    monkeypatch, rule, caching
):
    judge_instead(monkeypatch, panels(rule, caching))
    lines = failing_lines(rule, case(rule, prefix_caching=caching), FAULTS, ARCHITECTURE)
    assert len(lines) == 2 + 3 + 2
    for line in lines:
        assert line.verdict is Verdict.passed, line
    assert "replica 1 died at" in lines[2].note, lines[2]
    assert not lines[3].note.startswith("0 requests"), "a death must find some of them"


def test_every_rule_is_tried_with_deaths():
    assert RULES == ["least_loaded", "prefix_aware", "round_robin"], "name new rules above"


def test_a_corrupted_cache_is_caught_among_deaths_too():
    corrupted = case("round_robin", corruption=Corruption(kind="skip_free", index=3))
    lines = failing_lines("round_robin", corrupted, FAULTS[1:2], ARCHITECTURE)
    assert Verdict.missed in {line.verdict for line in lines}


def test_a_router_that_forgets_the_tokens_it_handed_out_is_caught(monkeypatch):
    send = Lives.send

    def forgetful(self, number, kind, content):
        send(self, number, kind, (content[0], []) if kind == "request" else content)

    monkeypatch.setattr(Lives, "send", forgetful)
    missed: list[str] = []
    for seed in range(4):  # until a death strikes in the middle of an answer
        found = case("round_robin", seed=seed)
        lines = failing_lines("round_robin", found, FAULTS[1:2], ARCHITECTURE)
        missed += [line.metric for line in lines if line.verdict is Verdict.missed]
        if missed:
            break
    assert any("answered twice" in metric for metric in missed)


def test_a_simulated_router_that_sends_to_the_dead_is_caught(monkeypatch):
    both = panels("round_robin", False)
    both = both._replace(simulated=copy.deepcopy(both.simulated))
    both.simulated.routes["replica"][-1] ^= 1
    judge_instead(monkeypatch, both)
    lines = failing_lines("round_robin", case("round_robin"), FAULTS, ARCHITECTURE)
    assert lines[0].verdict is Verdict.missed


def load(count=60, rate=60.0):
    return Source(
        Poisson(rate_per_s=rate, num_requests=count, input_tokens=20, output_tokens=16), 4, 256
    )


def alone(source):
    use_one_thread()
    return serve(open_model("random", "cpu")[1], source, BATCHING, LIMITS).answers


def test_one_replica_that_dies_keeps_its_requests_waiting_for_its_return():
    run = serve_failover(spec(dead(0, 0.3, 0.9)), load(), policies("routing")["round_robin"](), 1)
    assert run.answers == alone(load())
    death = run.deaths[0]
    start_s, end_s = (run.trace.iterations[name] for name in ("start_s", "end_s"))
    assert not ((end_s >= death.at_s) & (start_s < death.back_s)).any()
    assert sorted(run.finished) == list(range(60))
    times = request_times(run.trace)
    for at in times.request.tolist():
        instants_s = token_times(run.trace, at)
        assert len(instants_s) == 16
        assert (np.diff(instants_s) > 0).all()
    found = rerouted(run.trace)
    assert found["num_rerouted"] == (run.trace.events["state"] == State.lost).sum() > 0


def test_a_trace_put_together_from_what_came_in_is_the_one_that_its_replica_kept():
    with Lives(spec(dead(1, 0.3, 0.6)), 2) as processes:
        processes.await_ready()
        router = FailoverRouter(processes, policies("routing")["least_loaded"](), LIMITS)
        router.run(load())
        kept = [processes.result(number) for number in range(2)]
    for number, one in enumerate(kept):
        ours = router.outcome().lives[number][-1]
        for table in ("iterations", "requests", "events", "runs", "decisions"):
            for name, column in getattr(one.trace, table).items():
                np.testing.assert_array_equal(getattr(ours, table)[name], column)
        for name, ragged in one.trace.decision_lists.items():
            assert ours.decision_lists[name].values.tolist() == ragged.values.tolist()


def test_clients_of_a_closed_loop_go_on_after_a_death():
    loop = ClosedLoop(num_clients=4, num_requests=40, input_tokens=20, output_tokens=12)
    run = serve_failover(
        spec(dead(1, 0.1, 0.3)), Source(loop, 3, 256), policies("routing")["least_loaded"](), 2
    )
    assert sorted(run.finished) == list(range(40))
    assert {len(answer) for answer in run.answers.values()} == {12}


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP])
def test_a_replica_that_dies_or_falls_silent_by_itself_is_replaced_by_the_others(monkeypatch, blow):
    monkeypatch.setattr(lives_module, "SILENCE_S", 3.0)
    with Lives(spec(), 2) as processes:
        processes.await_ready()
        router = FailoverRouter(processes, policies("routing")["round_robin"](), LIMITS)
        victim = processes._processes[1].pid
        threading.Timer(0.5, lambda: os.kill(victim, blow)).start()
        router.run(load())
    run = router.outcome()
    assert run.answers == alone(load())
    assert [one.replica for one in run.deaths] == [1]
    assert not any(process.is_alive() for process in processes._processes)


def test_a_death_whose_time_comes_before_the_return_waits_for_it(monkeypatch):
    # A machine so busy that nobody comes back on time.
    on_time = Lives.due_back
    monkeypatch.setattr(Lives, "due_back", lambda self, now_s: on_time(self, now_s - 0.4))
    faults = spec(dead(0, 0.2, 0.4), dead(0, 0.5, 0.7))
    run = serve_failover(faults, load(), policies("routing")["round_robin"](), 1)
    assert [one.replica for one in run.deaths] == [0, 0]
    assert len(run.lives[0]) == 3
    assert run.answers == alone(load())


def test_when_nobody_is_left_the_run_ends_and_says_so():
    with Lives(spec(), 1) as processes:
        processes.await_ready()
        router = FailoverRouter(processes, policies("routing")["round_robin"](), LIMITS)
        processes._processes[0].kill()
        with pytest.raises(RuntimeError, match="all 1 replicas have died and none comes back"):
            router.run(load())


def test_a_slow_pass_ends_when_the_simulated_panel_would_let_it_end(monkeypatch):
    clock = SimpleNamespace(now=100.0, slept_until=[])

    def compute(*_):
        clock.now += 2.0
        return [7]

    monkeypatch.setattr(slow_model.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(slow_model, "sleep_until", clock.slept_until.append)
    model = SlowModel(SimpleNamespace(next_tokens=compute), SlowTimes([STRAGGLER], [1]))
    assert model.next_tokens([], None, None) == [7]  # before t = 0
    model.start = 102.0
    model.next_tokens([], None, None)  # 1 s at full speed, then 1 s at half of it
    assert clock.slept_until == [102.0 + 1.0 + 2.0]


def test_faults_of_a_study_are_moved_into_the_load_of_the_validation():
    moved = in_time(FAULTS, 4.0)
    assert max(one.until_s for one in moved) == pytest.approx(3.0)
    assert [one.at_s / moved[0].at_s for one in moved] == pytest.approx([1.0, 2.0, 5.0])
