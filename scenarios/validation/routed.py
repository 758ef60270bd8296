"""Questions 1 and 2 for several replicas behind a router, each real one a process of its own.

The simulated router takes over when the real one routed each request, when its replica had it, and
of which answers it knew. It chooses again, from its own counts; the replicas decide again too.
"""

from collections.abc import Sequence
from typing import NamedTuple

from backends.corruption import Corruption
from backends.router import ReplicaSpec, RoutedRun, serve_routed
from scenarios.validation.decisions import (
    CACHING,
    CONTEXT,
    FLOAT32_BYTES,
    HASH_TOKENS,
    LIMITS,
    difference,
    shared_workload,
    workload,
)
from scenarios.validation.verdict import Line, Verdict, judge_exact
from sim.decision_rows import expand
from sim.models.architecture import Architecture
from sim.models.parameters import kv_bytes_per_token
from sim.policies.batching.base import Batching
from sim.policies.routing.base import Routing
from sim.processes.pace import Replayed
from sim.processes.router import Engines, RouterLog, simulate_replicas
from sim.trace import Trace
from sim.trace_merge import of_replica
from sim.work_done import work_done
from sim.workload.recorded import replayed
from sim.workload.source import Source

COMPARED = (
    "request", "replica", "outstanding_requests", "outstanding_tokens", "chosen_requests",
    "answers", "generated_tokens",
)  # fmt: skip


class RoutedPanels(NamedTuple):
    """The same requests on both panels."""

    real: RoutedRun
    simulated: Trace
    num_replicas: int


class RoutedCase(NamedTuple):
    """What both panels run."""

    routing: Routing
    batching: Batching
    num_replicas: int
    num_requests: int
    prefix_caching: bool = False
    seed: int = 0
    corruption: Corruption | None = None
    device: str = "cpu"


def run_both_routed(case: RoutedCase) -> RoutedPanels:
    """Serve on real replicas, then replay the log on simulated ones."""
    caching = case.prefix_caching
    load = (shared_workload if caching else workload)(case.num_requests)
    limits = CACHING if caching else LIMITS
    spec = ReplicaSpec(
        weights="random", device=case.device, batching=case.batching, limits=limits,
        seed=case.seed, corruption=case.corruption,
    )  # fmt: skip
    source = Source(load, case.seed, CONTEXT)
    real = serve_routed(spec, source, case.routing, case.num_replicas)
    requests = real.trace.requests
    hashes = [request.prefix_hashes for request in source.initial()] if caching else None
    again = replayed(
        requests["arrival_s"], requests["prompt_tokens"], requests["output_tokens"],
        prefix_hashes=hashes, hash_block_tokens=HASH_TOKENS,
    )  # fmt: skip
    paces = [Replayed.of(of_replica(real.trace, at)) for at in range(case.num_replicas)]
    engines = Engines(batching=case.batching, limits=limits, paces=paces, one_by_one=True)
    simulated = simulate_replicas(
        Source(again, 0, CONTEXT), case.routing, engines, RouterLog.of(real.trace)
    )
    return RoutedPanels(real, simulated, case.num_replicas)


def routed_lines(name: str, case: RoutedCase, architecture: Architecture) -> list[Line]:
    """Routing decisions, batching decisions of all replicas, and KV bytes, for one routing rule."""
    try:
        panels = run_both_routed(case)
    except (ValueError, RuntimeError) as error:
        return stopped(f"{name}, {case.num_replicas} replicas", error)
    return [
        route_line(name, panels), batching_line(name, panels),
        *routed_byte_lines(name, panels, architecture),
    ]  # fmt: skip


def stopped(metric: str, error: Exception) -> list[Line]:
    """A panel stopped: a miss of both questions."""
    return [
        Line(
            question=question, metric=metric, simulated="", measured="stopped", error=None,
            accepted=0, verdict=Verdict.missed, note=f"a panel stopped: {error}",
        )
        for question in ("decisions", "bytes")
    ]  # fmt: skip


def route_line(name: str, panels: RoutedPanels) -> Line:
    """Question 1 for the router: which replica, and what it had observed before."""
    return choice_line(name, "routing", "routes", COMPARED, panels)


def choice_line(
    name: str, what: str, table: str, columns: Sequence[str], panels: RoutedPanels
) -> Line:
    """Question 1 for a table of decisions, one request a row, by the columns that are decided."""
    tables = [getattr(trace, table) for trace in (panels.simulated, panels.real.trace)]
    ours, theirs = (
        list(zip(*(rows[column].tolist() for column in columns), strict=True)) for rows in tables
    )
    wrong = [at for at, (one, other) in enumerate(zip(ours, theirs, strict=False)) if one != other]
    count = len(wrong) + abs(len(ours) - len(theirs))
    chosen = tables[1]["replica"]
    shares = [int((chosen == at).sum()) for at in range(panels.num_replicas)]
    note = f"requests of each replica: {', '.join(map(str, shares))}"
    if wrong:
        at = wrong[0]
        note = f"first at request {theirs[at][0]}: {ours[at]} simulated, {theirs[at]} measured"
    return Line(
        question="decisions", metric=f"{name}: {what} decisions that differ",
        simulated=f"{len(ours):,}", measured=f"{len(theirs):,}", error=count, accepted=0,
        verdict=judge_exact(count), note=note,
    )  # fmt: skip


def batching_line(name: str, panels: RoutedPanels) -> Line:
    """Question 1 for the replicas behind the router, added up."""
    counts = [0, 0]
    count, note = 0, ""
    for at in range(panels.num_replicas):
        ours, theirs = (
            expand(of_replica(trace, at)) for trace in (panels.simulated, panels.real.trace)
        )
        counts = [counts[0] + len(ours), counts[1] + len(theirs)]
        wrong = [i for i, (one, two) in enumerate(zip(ours, theirs, strict=False)) if one != two]
        count += len(wrong) + abs(len(ours) - len(theirs))
        if wrong and not note:
            text = difference(ours[wrong[0]], theirs[wrong[0]])
            note = f"first at decision {wrong[0]} of replica {at}: {text}"
    return Line(
        question="decisions", metric=f"{name}: decisions of its replicas that differ",
        simulated=f"{counts[0]:,}", measured=f"{counts[1]:,}", error=count, accepted=0,
        verdict=judge_exact(count), note=note,
    )  # fmt: skip


def routed_byte_lines(name: str, panels: RoutedPanels, architecture: Architecture) -> list[Line]:
    """Question 2: KV bytes of all replicas together."""
    done = work_done(
        panels.simulated, architecture, kv_bytes_per_token(architecture, FLOAT32_BYTES)
    )  # fmt: skip
    real = panels.real
    pairs = {
        "written": (done.kv_bytes_written, real.kv_bytes_written),
        "read": (done.kv_bytes_read, real.kv_bytes_read),
        "freed": (done.kv_bytes_written, real.kv_bytes_freed),
    }
    return [
        Line(
            question="bytes", metric=f"{name}: KV bytes {what} by all replicas",
            simulated=f"{ours:,}", measured=f"{theirs:,}", error=abs(ours - theirs), accepted=0,
            verdict=judge_exact(abs(ours - theirs)),
        )
        for what, (ours, theirs) in pairs.items()
    ]  # fmt: skip
