"""Questions 1 and 2 for replicas that are killed, slowed down and come back, for real.

The simulated panel takes over when replicas died, when the router knew, and when they were back. It
routes again and decides again. What clients got is compared with a run without faults.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from backends.failover import FailoverRun, serve_failover
from backends.router import ReplicaSpec, RoutedRun
from backends.serving import open_model, serve, use_one_thread
from scenarios.validation.decisions import (
    CACHING,
    CONTEXT,
    HASH_TOKENS,
    LIMITS,
    shared_workload,
    workload,
)
from scenarios.validation.routed import (
    RoutedCase,
    RoutedPanels,
    batching_line,
    route_line,
    routed_byte_lines,
    stopped,
)
from scenarios.validation.verdict import Line, judge_exact
from sim.engine import ReplicaLimits
from sim.faults import Fault, Outage
from sim.models.architecture import Architecture
from sim.processes.failover import FailoverLog, Failures, simulate_failures
from sim.processes.pace import Replayed
from sim.processes.router import RouterLog
from sim.trace import Trace
from sim.workload.conversations import Conversations
from sim.workload.poisson import Poisson
from sim.workload.recorded import replayed
from sim.workload.source import Source

RATE_PER_S = 200.0
"""Of requests: as fast as two small replicas serve them, so that a death finds many of them."""


class FailingPanels(NamedTuple):
    """The same requests on both panels, and without faults."""

    real: FailoverRun
    simulated: Trace
    source: Source
    num_replicas: int
    undisturbed: Mapping[int, list[int]]
    """Answers of one replica that nothing happens to."""


def run_both_failing(case: RoutedCase, faults: Sequence[Fault]) -> FailingPanels:
    """Serve on real replicas with faults, replay the log, and serve again without them."""
    source, limits = Source(_load(case), case.seed, CONTEXT), LIMITS
    if case.prefix_caching:
        limits = CACHING
    moved = in_time(faults, case.num_requests / RATE_PER_S)
    spec = ReplicaSpec(
        weights="random", device=case.device, batching=case.batching, limits=limits,
        seed=case.seed, corruption=case.corruption, faults=tuple(moved),
    )  # fmt: skip
    real = serve_failover(spec, source, case.routing, case.num_replicas)
    simulated = replay_failing(real, source, case, limits)
    use_one_thread()
    alone = serve(
        open_model("random", case.device)[1], Source(_load(case), case.seed, CONTEXT),
        case.batching, limits, seed=case.seed,
    )  # fmt: skip
    return FailingPanels(real, simulated, source, case.num_replicas, alone.answers)


def in_time(faults: Sequence[Fault], span_s: float) -> list[Fault]:
    """The faults, moved together so that the last begins or ends at 3/4 of a span of arrivals."""
    instants = [at for one in faults for at in (one.at_s, one.until_s) if at]
    scale = 0.75 * span_s / max(instants, default=1.0)
    return [
        replace(
            one, at_s=one.at_s * scale,
            until_s=None if one.until_s is None else one.until_s * scale,
        )
        for one in faults
    ]  # fmt: skip


def replay_failing(
    real: FailoverRun, source: Source, case: RoutedCase, limits: ReplicaLimits
) -> Trace:
    """Simulate the requests of a real run with its instants, deaths included."""
    requests, routes = real.trace.requests, real.trace.routes
    hashes = [one.prefix_hashes for one in source.initial()] if case.prefix_caching else None
    again = replayed(
        requests["arrival_s"], requests["prompt_tokens"], requests["output_tokens"],
        prefix_hashes=hashes, hash_block_tokens=HASH_TOKENS,
    )  # fmt: skip
    log = FailoverLog(
        RouterLog.of(real.trace), routes["request"].tolist(), [one.known for one in real.deaths]
    )
    failures = Failures(
        [Outage(one.replica, one.at_s, one.back_s) for one in real.deaths],
        [one.noticed_s for one in real.deaths],
    )
    return simulate_failures(
        Source(again, 0, CONTEXT), case.routing, case.batching, limits,
        lambda number, life: _pace(real, number, life), failures,
        num_replicas=case.num_replicas, one_by_one=True, log=log,
    )  # fmt: skip


def _pace(real: FailoverRun, number: int, life: int) -> Replayed:
    """The instants of one life; what it began after its last iteration was lost with it."""
    trace = real.lives[number][life]
    died_s = [one.at_s for one in real.deaths if one.replica == number]
    if life >= len(died_s):
        return Replayed.of(trace)
    rows = trace.iterations
    return Replayed(rows["start_s"].tolist(), rows["end_s"].tolist(), beyond_s=died_s[life] + 1.0)


def failing_lines(
    name: str, case: RoutedCase, faults: Sequence[Fault], architecture: Architecture
) -> list[Line]:
    """Decisions, bytes, and what clients got, for one routing rule under the study's faults."""
    try:
        panels = run_both_failing(case, faults)
    except (ValueError, RuntimeError) as error:
        return stopped(f"{name}, {case.num_replicas} replicas with faults", error)
    name, real = f"{name}, with faults", panels.real
    written, read = real.kv_bytes
    run = RoutedRun(
        real.trace, real.answers, written, read, kv_bytes_freed=0, sent_bytes=0, samplers=[]
    )
    seen = RoutedPanels(run, panels.simulated, case.num_replicas)
    moved = routed_byte_lines(name, seen, architecture)
    return [
        route_line(name, seen), batching_line(name, seen), *answer_lines(name, panels),
        *moved[:2],  # what was freed is not defined: a killed process frees nothing
    ]  # fmt: skip


def answer_lines(name: str, panels: FailingPanels) -> list[Line]:
    """What clients got: every request once, with exactly the tokens of a run without faults."""
    real, wanted = panels.real, {one.request_id: one for one in panels.source.initial()}
    had = {at: real.answers.get(at, []) for at in wanted}
    lost = sum(len(had[at]) < one.output_tokens or at not in real.finished
               for at, one in wanted.items())  # fmt: skip
    twice = sum(max(len(had[at]) - one.output_tokens, 0) for at, one in wanted.items())
    twice += len(real.finished) - len(set(real.finished))
    differ = sum(
        one != other
        for at in wanted
        for one, other in zip(had[at], panels.undisturbed[at], strict=False)
    )
    total = sum(map(len, had.values()))
    again = len(real.trace.routes["request"]) - len(wanted)
    deaths = ", ".join(f"replica {one.replica} died at {one.at_s:.2f} s" for one in real.deaths)
    return [
        _line(f"{name}: requests lost", len(wanted), lost, deaths or "nobody died"),
        _line(f"{name}: requests or tokens answered twice", total, twice,
              f"{again} requests were sent again"),
        _line(f"{name}: tokens that differ from a run without faults", total, differ),
    ]  # fmt: skip


def _line(metric: str, measured: int, count: int, note: str = "") -> Line:
    return Line(
        question="decisions", metric=metric, simulated="", measured=f"{measured:,}", error=count,
        accepted=0, verdict=judge_exact(count), note=note,
    )  # fmt: skip


def _load(case: RoutedCase) -> Poisson | Conversations:
    """The validation's load, slow enough that faults fall into it."""
    load = (shared_workload if case.prefix_caching else workload)(case.num_requests)
    return replace(load, rate_per_s=RATE_PER_S)
