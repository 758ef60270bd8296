"""Questions 1 and 2 for elastic instances: steps, groups, decisions, and all bytes.

A tiny model on real instances, one process each, whose slots are so few that groups grow, shrink,
migrate and pre-empt. The simulated panel asks the plan again at the logged instants.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from backends.corruption import Corruption
from backends.elastic_serving import ElasticRun, ElasticServed, serve_elastic
from backends.serving import RANDOM
from hardware_models.scaling import DecodeScaling, PrefillScaling, ScalingBase
from scenarios.validation.decisions import difference, stopped_lines, tiny_architecture
from scenarios.validation.elastic_traffic import CHANGES, FLOAT32_BYTES, Traffic, Watched
from scenarios.validation.verdict import Line, Verdict, judge_exact
from sim.decision_rows import Decision, expand
from sim.elastic_trace import ElasticTables
from sim.engine import ReplicaLimits
from sim.models.parameters import kv_bytes_per_token
from sim.policies.elastic import ElasticPlan
from sim.policies.instance_plan.elastic_sp import ElasticSp
from sim.processes.elastic_instances import Deployment, simulate_elastic
from sim.processes.elastic_pace import LoggedGroups, LoggedTransport
from sim.trace import Trace
from sim.trace_merge import of_replica
from sim.workload.gamma import Gamma
from sim.workload.lengths import LengthDistribution
from sim.workload.recorded import replayed
from sim.workload.source import Source

NUM_INSTANCES = 4
ENOUGH_REQUESTS = 150
"""So many bring every kind of change."""
LIMITS = ReplicaLimits(max_num_seqs=64, max_num_batched_tokens=4096, block_size=1, num_blocks=96)
"""Slots of an instance for fewer tokens than many a prompt has."""
MOST_PROMPT, MOST_ANSWER = 256, 48
COMPARED = {
    "steps": ("instant_s", "waiting", "running", "free_slots", "in_round", "lost", "migrations",
              "prefills", "decodes", "rounds"),
    "members": ("step", "kind", "group", "instance", "requests", "tokens", "digest"),
    "kv_moves": ("step", "request", "source", "target", "tokens"),
}  # fmt: skip
"""Columns of each table. The others are instants at which something began or ended, which replay
takes over: a real group begins a little after its decision."""
SUITED = {
    "attempt_every": 2, "compute_bound_requests": 4, "decode_round_s": 5e-3, "max_prefill_s": 0.3,
    "migration_s_per_token": 1e-7, "prior_output_tokens": 24.0,
}  # fmt: skip
"""Settings of `elastic_sp` for the tiny model, in place of those of a model of 7 billion."""


@dataclass(frozen=True)
class ElasticPanels:
    """The same requests on both panels."""

    real: ElasticServed
    simulated: Trace
    tables: ElasticTables
    """Of the simulated panel."""
    traffic: Traffic
    """What the simulated panel's steps need."""


class Case(NamedTuple):
    """A rule that is asked."""

    name: str
    plan: ElasticPlan
    must_change: bool
    """Whether groups must change in every way, else the comparison shows too little."""


def cases(plans: Mapping[str, ElasticPlan]) -> Iterator[Case]:
    """Each rule, suited to the tiny model, and what of it can be switched off."""
    for name, plan in plans.items():
        if not isinstance(plan, ElasticSp):
            yield Case(name, plan, must_change=False)
            continue
        suited = suited_to_tiny(plan)
        yield Case(name, suited, must_change=suited.scale_up and suited.scale_down_decode)
        for switch in ("scale_up", "scale_down_decode"):
            if getattr(plan, switch):
                off: dict[str, Any] = {switch: False}
                yield Case(f"{name}, {switch}=false", replace(suited, **off), must_change=False)


def suited_to_tiny(plan: ElasticSp) -> ElasticSp:
    """The plan with the settings of a tiny model, except for what its study has set."""
    usual = ElasticSp()
    changed: dict[str, Any] = {
        name: value for name, value in SUITED.items()
        if getattr(plan, name) == getattr(usual, name)
    }  # fmt: skip
    return replace(plan, **changed)


def tiny_scaling(max_degree: int) -> ScalingBase:
    """A base in which longer prompts gain from more instances; not a measurement."""
    degrees = range(1, max_degree + 1)
    return ScalingBase(
        name="validation", model="tiny", device="this machine",
        prefill=[
            PrefillScaling(base_s=1e-3, token_s=4e-4 / d, square_s=4e-6 / d) for d in degrees
        ],
        decode=DecodeScaling(
            base_s=5e-3, request_s=0.0, master_request_s=1e-4, context_token_s=1e-6
        ),
        source="chosen so that all kinds of steps occur",
    )  # fmt: skip


def exact_run(
    plan: ElasticPlan, count: int, seed: int, *, device: str = "cpu",
    corruption: Corruption | None = None, num_instances: int = NUM_INSTANCES,
) -> ElasticRun:  # fmt: skip
    """Of so many requests in bursts: slots run out in them, and instances are idle between."""
    load = Gamma(
        rate_per_s=60.0, burstiness_cv=3.0, num_requests=count, input_tokens=40, output_tokens=200,
        lengths=LengthDistribution.exponential, max_tokens=MOST_PROMPT,
        max_output_tokens=MOST_ANSWER,
    )  # fmt: skip
    return ElasticRun(
        weights=RANDOM, num_instances=num_instances, plan=plan, limits=LIMITS,
        scaling=tiny_scaling(num_instances), workload=load, seed=seed, device=device,
        corruption=corruption,
    )  # fmt: skip


def elastic_lines(case: Case, run: ElasticRun) -> list[Line]:
    """Questions 1 and 2 for one rule; a panel that a fault stops is a miss of both."""
    try:
        panels = run_both(run)
    except ValueError as error:
        return stopped_lines(case.name, error)
    return judge(case, panels)


def judge(case: Case, panels: ElasticPanels) -> list[Line]:
    """Questions 1 and 2 of what both panels did."""
    name = case.name
    found = [*table_lines(name, panels), decision_line(name, panels)]
    if case.must_change:
        found.append(change_line(name, panels.traffic, len(panels.real.answers)))
    return [*found, *byte_lines(name, panels)]


def run_both(run: ElasticRun) -> ElasticPanels:
    """Serve for real, then let the simulated panel decide again at the logged instants.

    Raises:
        ValueError: the plan breaks its rules on either panel.
    """
    real = serve_elastic(run)
    requests = real.trace.requests
    again = replayed(
        requests["arrival_s"], requests["prompt_tokens"], requests["output_tokens"],
        max_output_tokens=run.workload.max_output_tokens,
    )  # fmt: skip
    pace, plan = LoggedGroups(real.tables), Watched(run.plan)
    context = int((requests["prompt_tokens"] + requests["output_tokens"]).max())
    token_bytes = kv_bytes_per_token(tiny_architecture(), FLOAT32_BYTES)
    simulated, tables = simulate_elastic(
        Source(again, 0, max(context, run.num_instances * run.limits.num_blocks + 1)),
        Deployment(plan, run.limits, run.num_instances, run.scaling, token_bytes), pace,
        lambda environment: LoggedTransport(environment, pace), one_by_one=True,
    )  # fmt: skip
    return ElasticPanels(real, simulated, tables, plan.traffic)


def table_lines(name: str, panels: ElasticPanels) -> list[Line]:
    """Whether the plan saw the same and formed the same groups, row by row in order."""
    found: list[Line] = []
    for table, columns in COMPARED.items():
        ours, theirs = getattr(panels.tables, table), getattr(panels.real.tables, table)
        count, note = _rows_that_differ(ours, theirs, columns)
        found.append(
            Line(
                question="decisions", metric=f"{name}: rows of {table} that differ",
                simulated=f"{len(ours[columns[0]]):,}", measured=f"{len(theirs[columns[0]]):,}",
                error=count, accepted=0, verdict=judge_exact(count),
                note=note or _counted(table, panels.traffic),
            )
        )  # fmt: skip
    return found


def _rows_that_differ(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], columns: tuple[str, ...]
) -> tuple[int, str]:
    """How many, and what the first one is."""
    both = min(len(ours[columns[0]]), len(theirs[columns[0]]))
    differ = np.zeros(both, np.bool_)
    for name in columns:
        differ |= ours[name][:both] != theirs[name][:both]
    more = abs(len(ours[columns[0]]) - len(theirs[columns[0]]))
    if not differ.any():
        return more, ""
    at = int(np.argmax(differ))
    name = next(one for one in columns if ours[one][at] != theirs[one][at])
    note = f"first at row {at}: {name} {ours[name][at]} simulated, {theirs[name][at]} measured"
    return int(differ.sum()) + more, note


def _counted(table: str, traffic: Traffic) -> str:
    if table != "steps":
        return ""
    return ", ".join(f"{traffic.changes[name]} {name}" for name in CHANGES)


def decision_line(name: str, panels: ElasticPanels) -> Line:
    """Whether every lane of the trace has the same decisions in the same order."""
    lanes = 1 + int(panels.real.trace.iterations["replica"].max(initial=0))
    count, total, notes = 0, 0, list[str]()
    for lane in range(lanes):
        ours, theirs = (_decisions(one, lane) for one in (panels.simulated, panels.real.trace))
        pairs = zip(ours, theirs, strict=False)
        differing = [at for at, (mine, other) in enumerate(pairs) if mine != other]
        count += len(differing) + abs(len(ours) - len(theirs))
        total += len(theirs)
        if differing:
            at = differing[0]
            notes.append(f"lane {lane}, decision {at}: {difference(ours[at], theirs[at])}")
    return Line(
        question="decisions", metric=f"{name}: decisions of the trace that differ",
        simulated=f"{panels.simulated.num_decisions:,}", measured=f"{total:,}", error=count,
        accepted=0, verdict=judge_exact(count), note="; ".join(notes[:1]),
    )  # fmt: skip


def _decisions(trace: Trace, lane: int) -> list[Decision]:
    """Of one lane, without their instants: a real group begins a little after it was decided."""
    return [one._replace(instant_s=0.0) for one in expand(of_replica(trace, lane))]


def change_line(name: str, traffic: Traffic, num_requests: int) -> Line:
    """Whether groups changed in every way: what never happened was not compared.

    Of few requests this is reported and no miss: they do not fill the slots.
    """
    missing = [change for change in CHANGES if not traffic.changes[change]]
    few = num_requests < ENOUGH_REQUESTS
    return Line(
        question="decisions", metric=f"{name}: kinds of change that never happened",
        simulated="", measured=f"{len(CHANGES) - len(missing)} of {len(CHANGES)} happened",
        error=len(missing), accepted=None if few else 0,
        verdict=Verdict.reported if few else judge_exact(len(missing)),
        note=f"never: {', '.join(missing)}" if missing else "",
    )  # fmt: skip


def byte_lines(name: str, panels: ElasticPanels) -> list[Line]:
    """What ranks sent, by what it was, and KV written, read and freed."""
    config, traffic = tiny_architecture(), panels.traffic
    sent = panels.real.payload_bytes()
    pairs = {f"bytes sent, {what}": (ours, sent[what])
             for what, ours in traffic.payload_bytes(config).items()}  # fmt: skip
    written, read, freed = panels.real.kv_bytes
    ours = _kv_tokens(panels.simulated)
    token_bytes = kv_bytes_per_token(config, FLOAT32_BYTES)
    stored_bytes = (ours.stored + traffic.moved_tokens) * token_bytes
    pairs |= {
        "KV bytes written": (stored_bytes, written),
        "KV bytes read": (ours.read * token_bytes, read),
        "KV bytes freed": (stored_bytes, freed),
    }
    # A plan that never migrates moves nothing on both panels: no line of its own.
    return [exact_bytes(f"{name}: {what}", *pair) for what, pair in pairs.items() if any(pair)]


def exact_bytes(metric: str, ours: int, theirs: int, note: str = "") -> Line:
    """A line of question 2."""
    error = abs(ours - theirs)
    return Line(
        question="bytes", metric=metric, simulated=f"{ours:,}", measured=f"{theirs:,}",
        error=error, accepted=0, verdict=judge_exact(error), note=note,
    )  # fmt: skip


class _Tokens(NamedTuple):
    stored: int
    """By prefills and rounds, migrations apart."""
    read: int
    """By rounds: a prefill attends to what its ring passes on, and reads no slot."""


def _kv_tokens(trace: Trace) -> _Tokens:
    column = trace.decisions
    assert (column["repeat"] == 1).all(), "a replay decides round by round"
    stored = int((column["prefill_tokens"] + column["num_decodes"]).sum())
    return _Tokens(stored, int(column["decode_context"].sum()))
