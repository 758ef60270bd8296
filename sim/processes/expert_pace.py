"""How long an iteration of attention and expert nodes lasts: simulated once a state, then known.

The state of a decode iteration is how many micro-batches it has, how many requests one of them has
on the fullest node and on the others, and how much context the fullest one reads. Contexts lie on a
grid between whose points seconds are straight lines.
"""

from collections.abc import Callable, Sequence
from math import floor, log2
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sim.expert_costs import DeploymentCosts, decodes
from sim.expert_rows import NodeBatch, as_decodes, shape_of
from sim.models.work import IterationShape
from sim.policies.expert_balance.base import Placement
from sim.policies.parallel_plan.base import Deployment
from sim.processes.pace import AtOnce, Replayed
from sim.processes.stations import StageTimes, iteration_s

MOST_KEPT = 4096
"""Loads of micro-batches whose times are kept: prompts make new ones in every iteration."""
STEPS_AN_OCTAVE = 4
"""Points of the grid of contexts from one length to twice as much."""

Floats = NDArray[np.float64]


class ExpertLoads(NamedTuple):
    """Which share of the rows each expert gets, and where it lies."""

    shares: Floats
    """[layers, experts]; each layer adds up to 1."""
    placement: Placement
    drawn: bool
    """Whether rows are drawn from the shares, or are the shares."""
    seed: int = 0


class State(NamedTuple):
    """How full the micro-batches of an iteration of decodes are."""

    parts: int
    """Micro-batches with any request."""
    fullest: int
    """Requests of one of them on the node that has most."""
    others: int
    """Requests of one of them on any other node, on average and rounded up."""


class ReplayedPipeline(Replayed):
    """A `PipelinePace` that decides and ends when the nodes of another run did: replay."""

    def all_nodes_s(self, now_s: float, batches: Sequence[NodeBatch]) -> float:
        """The logged end of the iteration that was decided now."""
        del batches
        return self._after(now_s)


class ExpertPace(AtOnce):
    """A `PipelinePace` from costs."""

    def __init__(
        self, costs: DeploymentCosts, deployment: Deployment, loads: ExpertLoads, *,
        overhead_s: float = 0.0, prefill_here: bool = True,
        watch: Callable[[float, StageTimes], None] | None = None,
    ) -> None:  # fmt: skip
        """Take over a deployment.

        Args:
            costs: of its nodes.
            deployment: where everything lies, and in how many micro-batches a batch goes round.
            loads: of the experts.
            overhead_s: of the engine, once an iteration.
            prefill_here: whether prompts are computed; else their KV comes with them.
            watch: told of each iteration's start and times; every one is then simulated.
        """
        self._costs, self._deployment = costs, deployment
        self._count = deployment.num_micro_batches
        self._loads, self._overhead_s, self._watch = loads, overhead_s, watch
        self._shape = shape_of if prefill_here else as_decodes
        attention = deployment.attention
        self._attention = costs.attention_node(attention[:2], deployment.experts is not None)
        self._num_nodes = attention.num_nodes
        self._known_s: dict[tuple[State, int], float] = {}
        self._expert_times: dict[tuple[int, ...], tuple[Floats, Floats]] = {}

    def all_nodes_s(self, now_s: float, batches: Sequence[NodeBatch]) -> float:
        """See `PipelinePace`."""
        shapes = [[self._shape(batch.part(at)) for batch in batches] for at in range(self._count)]
        only_decodes = not any(one.prefill_tokens for part in shapes for one in part)
        if only_decodes and self._watch is None:
            return now_s + self._overhead_s + self._decoding_s(*self._state_of(shapes))
        times = self._times(_without_empty(shapes))
        if self._watch is not None:
            self._watch(now_s, times)
        return now_s + self._overhead_s + iteration_s(times)

    def _state_of(self, shapes: Sequence[Sequence[IterationShape]]) -> tuple[State, int]:
        """What decides how long an iteration of decodes takes, and the largest context."""
        filled = _without_empty(shapes)
        fullest = max(one.num_decodes for part in filled for one in part)
        context = max(one.decode_context for part in filled for one in part)
        others = 0
        if self._num_nodes > 1:
            rest = sum(sum(one.num_decodes for one in part) - fullest for part in filled)
            others = max(-(-rest // (len(filled) * (self._num_nodes - 1))), 0)
        return State(len(filled), fullest, others), context

    def _decoding_s(self, state: "State", context: int) -> float:
        """Seconds of a state whose fullest node reads so much context for a micro-batch."""
        step = floor(STEPS_AN_OCTAVE * log2(context))
        low, high = (int(2 ** ((step + more) / STEPS_AN_OCTAVE)) for more in (0, 1))
        low_s = self._at_context_s(state, low)
        if context == low:
            return low_s
        high_s = self._at_context_s(state, high)
        return low_s + (context - low) / (high - low) * (high_s - low_s)

    def _at_context_s(self, state: "State", context: int) -> float:
        found = self._known_s.get((state, context))
        if found is None:
            share = state.others / state.fullest
            other = decodes(state.others, context * share)
            part = [decodes(state.fullest, context), *[other] * (self._num_nodes - 1)]
            found = self._known_s[state, context] = iteration_s(self._times([part] * state.parts))
        return found

    def _times(self, shapes: Sequence[Sequence[IterationShape]]) -> StageTimes:
        """Of every station; `shapes` of each node of each micro-batch."""
        layers = self._costs.architecture.num_layers
        attention_s = np.array([max(map(self._attention.layer_s, part)) for part in shapes])
        outside_s = np.array(
            [max(self._attention.outside_s(one.tokens, one.sampled_tokens) for one in part)
             for part in shapes]
        )  # fmt: skip
        tokens = tuple(tuple(one.tokens for one in part) for part in shapes)
        expert_s, way_s = self._experts(tokens)
        return StageTimes(
            np.broadcast_to(attention_s, (layers, len(shapes))), way_s, expert_s, way_s, outside_s
        )

    def _experts(self, tokens: tuple[tuple[int, ...], ...]) -> tuple[Floats, Floats]:
        """Seconds of the slowest expert node and of one way [layers, micro-batches]."""
        key = tuple(one for part in tokens for one in part)
        if (found := self._expert_times.get(key)) is None:
            if len(self._expert_times) >= MOST_KEPT:
                self._expert_times.clear()
            columns = [self._one_part(part, at) for at, part in enumerate(tokens)]
            found = self._expert_times[key] = (
                np.stack([expert_s for expert_s, _ in columns], axis=1),
                np.stack([way_s for _, way_s in columns], axis=1),
            )
        return found

    def _one_part(self, tokens: tuple[int, ...], micro_batch: int) -> tuple[Floats, Floats]:
        """The same of one micro-batch with so many tokens on each node [layers]."""
        rows = self._rows(sum(tokens), micro_batch)
        return self._costs.loaded_s(self._deployment, rows, max(tokens), sum(tokens))

    def _rows(self, tokens: int, micro_batch: int) -> Floats:
        """Rows of every physical expert [layers, slots]."""
        shares, placement = self._loads.shares, self._loads.placement
        choices = tokens * self._costs.architecture.experts_per_token
        rows = choices * shares
        if self._loads.drawn and tokens:
            stream = np.random.default_rng((self._loads.seed, tokens, micro_batch))
            rows = drawn_rows(stream, tokens, self._costs.architecture.experts_per_token, shares)
        held = placement.physical_to_logical
        copies = np.stack([np.bincount(row, minlength=shares.shape[1]) for row in held])
        return np.take_along_axis(rows / copies, held, axis=1)


def _without_empty(
    shapes: Sequence[Sequence[IterationShape]],
) -> list[Sequence[IterationShape]]:
    """The micro-batches in which any node has work: the others are only told of."""
    return [part for part in shapes if any(one.tokens for one in part)]


def drawn_rows(stream: np.random.Generator, tokens: int, top_k: int, shares: Floats) -> Floats:
    """Rows of each expert where every token chooses distinct ones at random.

    Choices drawn one by one would let a token choose an expert twice. Their deviations from the
    mean are as much too large as sqrt((1 - share) / (1 - top_k share)), and are cut by that: the
    variance is then that of a token that has an expert or has not. Rows need not be whole.

    Args:
        stream: of this micro-batch.
        tokens: of it.
        top_k: experts of a token.
        shares: of the rows, by layer and expert [layers, experts].
    """
    choices = tokens * top_k
    mean = choices * shares
    deviation = stream.multinomial(choices, shares) - mean
    narrowed = np.sqrt(np.clip(1 - top_k * shares, 0, None) / np.clip(1 - shares, 1e-12, None))
    rows = np.clip(mean + deviation * narrowed, 0, tokens)
    return rows * (choices / rows.sum(axis=1, keepdims=True))
