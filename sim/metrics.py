"""Every metric of the project, computed from a trace: the same code for both panels.

TTFT = first token - arrival. TPOT = (last - first token) / (output tokens - 1). ITL = every gap
between two tokens of a request. Goodput = requests a second that met their SLO.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import isfinite
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sim.lanes import covered_s
from sim.trace import DECODE, Array, State, Trace

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(kw_only=True)
class Slo:
    """What a request must meet to count for goodput. None: no demand."""

    ttft_s: float | None = None
    """Longest time to the first token, in seconds."""
    tpot_s: float | None = None
    """Longest mean time per later token, in seconds."""
    e2e_s: float | None = None
    """Longest time to the last token, in seconds."""

    def __post_init__(self) -> None:
        for name in ("ttft_s", "tpot_s", "e2e_s"):
            value = getattr(self, name)
            if value is not None and not (isfinite(value) and value > 0):
                raise ValueError(
                    f"slo.{name}={value} must be above 0 seconds and finite, or null for no demand"
                )


class RequestTimes(NamedTuple):
    """One entry a finished request, in order of request id."""

    request: Ints
    arrival_s: Floats
    scheduled_s: Floats
    """Start of the first iteration with any of its tokens."""
    first_token_s: Floats
    last_token_s: Floats
    output_tokens: Ints
    num_preemptions: Ints

    @property
    def ttft_s(self) -> Floats:
        """Time to the first token."""
        return self.first_token_s - self.arrival_s

    @property
    def queue_s(self) -> Floats:
        """Wait for the first seat."""
        return self.scheduled_s - self.arrival_s

    @property
    def e2e_s(self) -> Floats:
        """Time to the last token."""
        return self.last_token_s - self.arrival_s

    @property
    def tpot_s(self) -> Floats:
        """Mean time per token after the first; not a number for a single token."""
        gaps = (self.output_tokens - 1).astype(np.float64)
        gaps[gaps == 0] = np.nan
        return (self.last_token_s - self.first_token_s) / gaps


def request_times(trace: Trace) -> RequestTimes:
    """Arrival, first scheduling, first and last token of every finished request.

    Where documents are retrieved, of the generations that count; a token that was computed before
    its documents were certain is there when they are.
    """
    order = np.argsort(trace.requests["request"], kind="stable")
    ids = trace.requests["request"][order]
    events = trace.events
    done = np.sort(_of(events, State.finished))
    searches = trace.searches
    if len(trace.stages["stage"]):
        done = np.intersect1d(done, searches["generation"])
    order = order[np.isin(ids, done)]
    ids = trace.requests["request"][order]
    admitted, admitted_s = _first(events, State.admitted)
    runs = trace.runs
    by_request = _runs_in_order(trace)
    run_request = runs["request"][by_request]
    first = by_request[np.searchsorted(run_request, ids, "left")]
    last = by_request[np.searchsorted(run_request, ids, "right") - 1]
    end_s = trace.iterations["end_s"]
    preempted = np.sort(_of(events, State.preempted))
    certain_s = _certain_s(searches, ids)
    return RequestTimes(
        request=ids,
        arrival_s=trace.requests["arrival_s"][order],
        scheduled_s=admitted_s[np.searchsorted(admitted, ids)],
        first_token_s=np.maximum(end_s[runs["first_iteration"][first]], certain_s),
        last_token_s=np.maximum(end_s[_last_iteration(trace, last)], certain_s),
        output_tokens=trace.requests["output_tokens"][order],
        num_preemptions=np.searchsorted(preempted, ids, "right")
        - np.searchsorted(preempted, ids, "left"),
    )


def _certain_s(searches: Mapping[str, Array], generations: Ints) -> Floats:
    """When the documents of each generation were certain; before all time without a search."""
    if not len(searches["generation"]):
        return np.full(len(generations), -np.inf)
    order = np.argsort(searches["generation"])
    found = order[np.searchsorted(searches["generation"][order], generations)]
    return searches["end_s"][found]


class WeightedGaps(NamedTuple):
    """Gaps between tokens; one that a whole batch shares is listed once."""

    gap_s: Floats
    weight: Ints
    """Requests that saw the gap."""

    def percentile(self, q: float) -> float:
        """The q-th percentile (0 to 100), as numpy's default gives for the full list of gaps."""
        if not self.weight.sum():
            return float("nan")
        order = np.argsort(self.gap_s, kind="stable")
        upto = np.cumsum(self.weight[order])
        rank = q / 100 * (int(upto[-1]) - 1)
        low, share = int(rank), rank - int(rank)
        below = self.gap_s[order][np.searchsorted(upto, low, "right")]
        above = self.gap_s[order][np.searchsorted(upto, min(low + 1, int(upto[-1]) - 1), "right")]
        return float(below + share * (above - below))

    def mean(self) -> float:
        """Mean gap."""
        total = int(self.weight.sum())
        return float((self.gap_s * self.weight).sum() / total) if total else float("nan")


def inter_token_gaps(trace: Trace, requests: Ints | None = None) -> WeightedGaps:
    """Every ITL, without listing the tokens: a gap is shared by a whole batch.

    Args:
        trace: of one replica.
        requests: ids of the requests that count; None: all.
    """
    if requests is not None:
        mine = np.isin(trace.runs["request"], requests)
        trace = replace(trace, runs={name: column[mine] for name, column in trace.runs.items()})
    end_s = trace.iterations["end_s"]
    decoding = np.flatnonzero(trace.iterations["kind"] & DECODE)
    first, count = trace.runs["first_iteration"], trace.runs["count"]
    start = np.searchsorted(decoding, first, "right")
    went_on = count > 0
    # Gap i lies between decode iterations i and i + 1, seen by the runs that take part in both.
    change = np.zeros(len(decoding) + 1, np.int64)
    np.add.at(change, start[went_on], 1)
    np.add.at(change, (start + count - 1)[went_on], -1)
    shared = np.cumsum(change)[: max(len(decoding) - 1, 0)]
    between = np.diff(end_s[decoding])
    opening = end_s[decoding[start[went_on]]] - end_s[first[went_on]]
    resumed = _resumption_gaps(trace)
    gaps = np.concatenate((between, opening, resumed))
    counts = np.concatenate((shared, np.ones(len(opening) + len(resumed), np.int64)))
    return WeightedGaps(gaps, counts)


def token_times(trace: Trace, request_id: int) -> Floats:
    """The instant of every token of one request, in order."""
    end_s = trace.iterations["end_s"]
    decoding = np.flatnonzero(trace.iterations["kind"] & DECODE)
    mine = np.flatnonzero(trace.runs["request"] == request_id)
    pieces: list[Floats] = []
    for run in mine[np.argsort(end_s[trace.runs["first_iteration"][mine]])]:
        first = trace.runs["first_iteration"][run]
        start = int(np.searchsorted(decoding, first, "right"))
        pieces.append(end_s[[first]])
        pieces.append(end_s[decoding[start : start + int(trace.runs["count"][run])]])
    return np.concatenate(pieces) if pieces else np.zeros(0)


class TtftParts(NamedTuple):
    """TTFT = search + queue + prefill + interference, one entry a request in order of id."""

    search_s: Floats
    """Of the search for its documents, what no prefill of its own hid: until it was admitted or
    the search was over, and from its computed first token until the search was. 0 without one."""
    queue_s: Floats
    """From the arrival, or from the end of its search, to its seat. 0 where that came before."""
    prefill_s: Floats
    """Of the iterations that computed its prompt, the share that its tokens had in the batch."""
    interference_s: Floats
    """The rest: other requests' tokens in the same iterations, and iterations in between."""


def ttft_parts(trace: Trace, times: RequestTimes) -> TtftParts:
    """Why the first token took as long as it did."""
    decisions, lists = trace.decisions, trace.decision_lists
    repeat = decisions["repeat"]
    iteration = np.append(0, np.cumsum(repeat))[:-1]
    duration_s = (trace.iterations["end_s"] - trace.iterations["start_s"])[iteration]
    tokens = decisions["prefill_tokens"] + decisions["num_decodes"]
    row = np.repeat(np.arange(len(repeat)), lists["prefilled"].counts())
    who = lists["prefilled"].values
    share_s = duration_s[row] * lists["prefilled_tokens"].values / np.maximum(tokens[row], 1)
    position = np.clip(np.searchsorted(times.request, who), 0, max(len(times.request) - 1, 0))
    if len(times.request) == 0:
        return TtftParts(*[np.zeros(0)] * len(TtftParts._fields))
    computed_s = _computed_s(trace, times.request)
    before_first = trace.iterations["start_s"][iteration[row]] < computed_s[position]
    counted = (times.request[position] == who) & before_first
    prefill_s = np.zeros(len(times.request))
    np.add.at(prefill_s, position[counted], share_s[counted])
    certain_s = np.maximum(_certain_s(trace.searches, times.request), times.arrival_s)
    queue_s = np.maximum(times.scheduled_s - certain_s, 0.0)
    early_s = times.queue_s - queue_s
    search_s = early_s + np.maximum(certain_s - computed_s, 0.0)
    return TtftParts(search_s, queue_s, prefill_s, times.ttft_s - search_s - queue_s - prefill_s)


def _computed_s(trace: Trace, requests: Ints) -> Floats:
    """When the first token of each request was computed, however long it waited for its search."""
    by_request = _runs_in_order(trace)
    first = by_request[np.searchsorted(trace.runs["request"][by_request], requests)]
    return trace.iterations["end_s"][trace.runs["first_iteration"][first]]


def steady_window(
    times: RequestTimes, warm_up: float = 0.1, drain: float = 0.1
) -> NDArray[np.bool_]:
    """Which requests count: those that arrive after a first and before a last share of the span.

    Latencies of the first requests see an empty system, those of the last an emptying one. So few
    requests that none would be left all count.
    """
    start, end = times.arrival_s.min(), times.arrival_s.max()
    span = end - start
    inside = (times.arrival_s >= start + warm_up * span) & (times.arrival_s <= end - drain * span)
    return inside if inside.any() else np.ones(len(inside), np.bool_)


def is_overloaded(times: RequestTimes) -> bool:
    """Whether work came in faster than it was done, so that averages say nothing.

    Within the span of arrivals, after its first tenth: fewer than 95 % as many answers as arrivals,
    and the last quarter of the requests waited for their seat over twice as long as the second.
    """
    span = float(times.arrival_s.max() - times.arrival_s.min())
    if span <= 0 or len(times.request) < 20:
        return False
    start, end = times.arrival_s.min() + 0.1 * span, times.arrival_s.max()
    came = int(((times.arrival_s > start) & (times.arrival_s <= end)).sum())
    left = int(((times.last_token_s > start) & (times.last_token_s <= end)).sum())
    waited = times.queue_s[np.argsort(times.arrival_s, kind="stable")]
    quarter = len(waited) // 4
    second, fourth = waited[quarter : 2 * quarter].mean(), waited[-quarter:].mean()
    return bool(left < 0.95 * came and fourth > 2 * second and fourth > times.e2e_s.min())


def met_slo(times: RequestTimes, slo: Slo) -> NDArray[np.bool_]:
    """Which requests met every demand. A single token has no TPOT to miss."""
    met = np.ones(len(times.request), np.bool_)
    if slo.ttft_s is not None:
        met &= times.ttft_s <= slo.ttft_s
    if slo.tpot_s is not None:
        tpot_s = times.tpot_s
        met &= np.isnan(tpot_s) | (tpot_s <= slo.tpot_s)
    if slo.e2e_s is not None:
        met &= times.e2e_s <= slo.e2e_s
    return met


def busy_share(trace: Trace, num_replicas: int = 1, lanes: int = 1) -> float:
    """Share of the time from the first arrival to the last token in which an iteration ran.

    The mean over so many replicas; where each has several lanes, any of them counts.
    """
    iterations = trace.iterations
    if not len(iterations["start_s"]):
        return 0.0
    span = iterations["end_s"].max() - trace.requests["arrival_s"].min()
    members = trace.members
    if len(members["step"]):  # elastic instances: each counts for itself, whatever its group
        known = ~np.isnan(members["end_s"])
        busy_s = (members["end_s"] - members["start_s"])[known].sum()
        return min(float(busy_s / span / num_replicas), 1.0)
    if lanes > 1:
        # The sum of the pieces may exceed the whole by a rounding.
        return min(covered_s(iterations, num_replicas) / float(span) / num_replicas, 1.0)
    busy_s = (iterations["end_s"] - iterations["start_s"]).sum()
    return float(busy_s / span / num_replicas)


def reused_share(trace: Trace) -> float:
    """Hit rate of prefix caching: of the tokens that prefills needed, those that were cached."""
    reused = int(trace.decision_lists["reused_tokens"].values.sum())
    computed = int(trace.decision_lists["prefilled_tokens"].values.sum())
    return reused / max(reused + computed, 1)


def hand_over_s(trace: Trace) -> Floats:
    """From each hand-over to the decision at which its request decodes elsewhere."""
    moved, events = trace.hand_overs, trace.events
    elsewhere = ~np.isin(events["replica"], moved["source"])
    ids, since_s = _first(
        {name: column[elsewhere] for name, column in events.items()}, State.decoding
    )
    return since_s[np.searchsorted(ids, moved["request"])] - moved["instant_s"]


def rerouted(trace: Trace) -> dict[str, int]:
    """What replicas that died left to others: how often a request was sent again, and its tokens.

    These are of the prompt and of the answer so far; they are to be prefilled again, except for
    what is cached where the request goes. Of elastic instances that died: whoever had KV there.
    """
    if len(trace.steps["lost"]):
        return _recomputed(trace)
    routes = trace.routes
    _, first = np.unique(routes["request"], return_index=True)
    again = np.ones(len(routes["request"]), np.bool_)
    again[first] = False
    ids = np.argsort(trace.requests["request"], kind="stable")
    known = trace.requests["request"][ids]
    rows = ids[np.searchsorted(known, routes["request"][again])]
    prompts = trace.requests["prompt_tokens"][rows]
    tokens = prompts.sum() + routes["generated_tokens"][again].sum()
    return {"num_rerouted": int(again.sum()), "rerouted_tokens": int(tokens)}


def _recomputed(trace: Trace) -> dict[str, int]:
    """Of elastic instances: requests that a loss sent back to the queue, as they were prefilled."""
    events, state = trace.events, trace.events["state"]
    lost = events["request"][state == State.lost]
    when_s = events["instant_s"][state == State.lost]
    lists, decisions = trace.decision_lists, trace.decisions
    row = np.repeat(np.arange(len(decisions["instant_s"])), lists["prefilled"].counts())
    begun_s, who = decisions["instant_s"][row], lists["prefilled"].values
    tokens = lists["prefilled_tokens"].values
    total = 0
    for request, at_s in zip(lost.tolist(), when_s.tolist(), strict=True):
        again = np.flatnonzero((who == request) & (begun_s >= at_s))
        total += int(tokens[again[np.argmin(begun_s[again])]]) if len(again) else 0
    return {"num_rerouted": len(lost), "rerouted_tokens": total}


def _of(events: Mapping[str, Array], state: State) -> Ints:
    return events["request"][events["state"] == state]


def _first(events: Mapping[str, Array], state: State) -> tuple[Ints, Floats]:
    """Requests that reached a state, sorted, and when each did so first."""
    chosen = events["state"] == state
    ids, where = np.unique(events["request"][chosen], return_index=True)
    return ids, events["instant_s"][chosen][where]


def _runs_in_order(trace: Trace) -> Ints:
    """Rows of runs by request, and of each request by time.

    One that lost its replica may go on at one whose iterations lie before, in the trace.
    """
    first = trace.runs["first_iteration"]
    return np.lexsort((first, trace.iterations["end_s"][first], trace.runs["request"]))


def _last_iteration(trace: Trace, run: Ints) -> Ints:
    """The iteration of the last token of runs."""
    decoding = np.flatnonzero(trace.iterations["kind"] & DECODE)
    first, count = trace.runs["first_iteration"][run], trace.runs["count"][run]
    start = np.searchsorted(decoding, first, "right")
    if not len(decoding):
        return first
    following = decoding[np.clip(start + count - 1, 0, len(decoding) - 1)]
    return np.where(count > 0, following, first)


def _resumption_gaps(trace: Trace) -> Floats:
    """Gaps that a pre-emption tore: from the last token before it to the first one after."""
    runs = trace.runs
    order = _runs_in_order(trace)
    again = np.flatnonzero(np.diff(runs["request"][order]) == 0)
    end_s = trace.iterations["end_s"]
    after = end_s[runs["first_iteration"][order[again + 1]]]
    return after - end_s[_last_iteration(trace, order[again])]
