"""Questions 1 and 2: are all decisions equal under replay, and all KV bytes?

A tiny model of random weights serves hundreds of requests from a KV pool so small that requests are
pre-empted. Its decision instants are replayed on the simulated panel, which decides again.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from backends.kv_cache import Corruption
from backends.serving import Served, serve
from backends.transformer import Transformer
from backends.weights import random_model
from scenarios.validation.verdict import Line, Verdict, judge_exact
from sim.decision_rows import Decision, expand
from sim.engine import ReplicaLimits
from sim.models.architecture import Architecture
from sim.models.parameters import kv_bytes_per_token
from sim.policies.batching.base import Batching
from sim.processes.alone import simulate
from sim.processes.pace import Replayed
from sim.trace import State, Trace
from sim.work_done import work_done
from sim.workload.conversations import Conversations
from sim.workload.lengths import LengthDistribution
from sim.workload.poisson import Poisson
from sim.workload.recorded import replayed
from sim.workload.source import Source

LIMITS = ReplicaLimits(max_num_seqs=16, max_num_batched_tokens=512, block_size=16, num_blocks=24)
"""A pool of 384 tokens for requests of up to 256: it runs out all the time."""
CACHING = LIMITS._replace(num_blocks=48, prefix_caching=True)
"""With prefix caching: room for a few of the shared prefixes, which are dropped all the time."""
CONTEXT = 256
FLOAT32_BYTES = 4
HASH_TOKENS = 16


def tiny_architecture() -> Architecture:
    """Of the model that decides hundreds of requests."""
    return random_model().config


class Real(Protocol):
    """A real run."""

    @property
    def trace(self) -> Trace:
        """What happened."""
        ...


class Panels(NamedTuple):
    """The same requests on both panels."""

    real: Served
    simulated: Trace


class Decided(Protocol):
    """The same requests on both panels, whatever else a panel tells of them."""

    @property
    def real(self) -> Real:
        """The real one."""
        ...

    @property
    def simulated(self) -> Trace:
        """The simulated one."""
        ...


def workload(num_requests: int) -> Poisson:
    """Requests faster than they are served, of all lengths that fit."""
    return Poisson(
        rate_per_s=400.0, num_requests=num_requests, input_tokens=40, output_tokens=24,
        lengths=LengthDistribution.exponential, max_tokens=CONTEXT // 2,
    )  # fmt: skip


def shared_workload(num_requests: int) -> Conversations:
    """The same of conversations, whose turns begin with what was said before."""
    return Conversations(
        rate_per_s=400.0, num_requests=num_requests, input_tokens=16, output_tokens=24,
        lengths=LengthDistribution.exponential, max_tokens=100, turns=6.0, think_time_s=0.1,
        system_tokens=32, num_system_prompts=3, max_prompt_tokens=150,
        hash_block_tokens=HASH_TOKENS,
    )  # fmt: skip


def run_both(
    model: Transformer, batching: Batching, num_requests: int, seed: int,
    corruption: Corruption | None = None, *, prefix_caching: bool = False,
) -> Panels:  # fmt: skip
    """Serve for real, then replay the logged instants on the simulated panel."""
    load = shared_workload(num_requests) if prefix_caching else workload(num_requests)
    limits = CACHING if prefix_caching else LIMITS
    source = Source(load, seed, CONTEXT)
    real = serve(model, source, batching, limits, seed=seed, corruption=corruption)
    hashes = [request.prefix_hashes for request in source.initial()] if prefix_caching else None
    return Panels(real, replay(real.trace, batching, limits, CONTEXT, hashes))


def replay(
    real: Trace, batching: Batching, limits: ReplicaLimits, context: int,
    prefix_hashes: Sequence[Sequence[int]] | None = None, hash_block_tokens: int = HASH_TOKENS,
) -> Trace:  # fmt: skip
    """Simulate the requests of a real trace with its decision instants as boundaries."""
    requests = real.requests
    again = replayed(
        requests["arrival_s"], requests["prompt_tokens"], requests["output_tokens"],
        prefix_hashes=prefix_hashes, hash_block_tokens=hash_block_tokens,
    )  # fmt: skip
    pace = Replayed.of(real)
    return simulate(Source(again, 0, context), batching, limits, pace, one_by_one=True)


def exact_lines(  # noqa: PLR0913  a policy, its load and how it is served
    name: str, model: Transformer, batching: Batching, num_requests: int, seed: int,
    corruption: Corruption | None = None, *, prefix_caching: bool = False,
) -> list[Line]:  # fmt: skip
    """Questions 1 and 2 for one policy.

    A real panel that contradicts itself, as a corrupted cache does, may stop with an error: that is
    a miss as well.
    """
    try:
        panels = run_both(
            model, batching, num_requests, seed, corruption, prefix_caching=prefix_caching
        )
    except ValueError as error:
        return stopped_lines(name, error)
    return [decision_line(name, panels), *byte_lines(name, panels, model.config)]


def stopped_lines(name: str, error: Exception) -> list[Line]:
    """A panel stopped: a miss of both questions."""
    return [
        Line(
            question=question, metric=f"{name}: {what}", simulated="", measured="stopped",
            error=None, accepted=0, verdict=Verdict.missed, note=f"a panel stopped: {error}",
        )
        for question, what in (("decisions", "decisions that differ"), ("bytes", "KV bytes"))
    ]  # fmt: skip


def decision_line(name: str, panels: Decided) -> Line:
    """Question 1 for one policy."""
    measured, simulated = expand(panels.real.trace), expand(panels.simulated)
    pairs = zip(simulated, measured, strict=False)
    differing = [index for index, (ours, theirs) in enumerate(pairs) if ours != theirs]
    count = len(differing) + abs(len(simulated) - len(measured))
    preempted = int((panels.simulated.events["state"] == State.preempted).sum())
    note = f"{preempted} pre-emptions"
    if spared := int(panels.simulated.decision_lists["reused_tokens"].values.sum()):
        note += f", {spared:,} prompt tokens reused"
    if differing:
        at = differing[0]
        note = f"first at decision {at}: {difference(simulated[at], measured[at])}"
    return Line(
        question="decisions", metric=f"{name}: decisions that differ",
        simulated=f"{len(simulated):,}", measured=f"{len(measured):,}", error=count,
        accepted=0, verdict=judge_exact(count), note=note,
    )  # fmt: skip


def difference(simulated: Decision, measured: Decision) -> str:
    """The first field in which two decisions differ."""
    for field, ours, theirs in zip(Decision._fields, simulated, measured, strict=True):
        if ours != theirs:
            return f"{field} {_short(ours)} simulated, {_short(theirs)} measured"
    return "nothing"


def byte_lines(name: str, panels: Panels, config: Architecture) -> list[Line]:
    """Question 2 for one policy: KV bytes written, read and freed.

    The simulated side counts tokens of its own decisions and multiplies by the configuration's
    bytes; all that was written is given back by the end.
    """
    per_token = kv_bytes_per_token(config, FLOAT32_BYTES)
    done = work_done(panels.simulated, config, per_token)
    pairs = {
        "written": (done.kv_bytes_written, panels.real.kv_bytes_written),
        "read": (done.kv_bytes_read, panels.real.kv_bytes_read),
        "freed": (done.kv_bytes_written, panels.real.kv_bytes_freed),
    }
    return [
        Line(
            question="bytes", metric=f"{name}: KV bytes {what}", simulated=f"{ours:,}",
            measured=f"{theirs:,}", error=abs(ours - theirs), accepted=0,
            verdict=judge_exact(abs(ours - theirs)),
        )
        for what, (ours, theirs) in pairs.items()
    ]  # fmt: skip


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
