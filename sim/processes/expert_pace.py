"""How long an iteration of attention and expert nodes lasts: simulated once a state, then known.

The state of a decode iteration is how many requests the largest micro-batch has on a node and how
much context they read. Contexts lie on a grid between whose points seconds are straight lines.
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
        self._known_s: dict[tuple[int, int], float] = {}
        self._expert_times: dict[tuple[int, ...], tuple[Floats, Floats]] = {}

    def all_nodes_s(self, now_s: float, batches: Sequence[NodeBatch]) -> float:
        """See `PipelinePace`."""
        shapes = [[self._shape(batch.part(at)) for batch in batches] for at in range(self._count)]
        only_decodes = not any(one.prefill_tokens for part in shapes for one in part)
        if only_decodes and self._watch is None:
            tokens = max(one.num_decodes for part in shapes for one in part)
            context = max(one.decode_context for part in shapes for one in part)
            return now_s + self._overhead_s + self._decoding_s(tokens, context)
        times = self._times(shapes)
        if self._watch is not None:
            self._watch(now_s, times)
        return now_s + self._overhead_s + iteration_s(times)

    def _decoding_s(self, tokens: int, context: int) -> float:
        """Seconds with so many requests, and so much context, in every micro-batch on each node."""
        step = floor(STEPS_AN_OCTAVE * log2(context))
        low, high = (int(2 ** ((step + more) / STEPS_AN_OCTAVE)) for more in (0, 1))
        low_s = self._at_context_s(tokens, low)
        if context == low:
            return low_s
        high_s = self._at_context_s(tokens, high)
        return low_s + (context - low) / (high - low) * (high_s - low_s)

    def _at_context_s(self, tokens: int, context: int) -> float:
        found = self._known_s.get((tokens, context))
        if found is None:
            shape = decodes(tokens, context)
            times = self._times([[shape] * self._num_nodes] * self._count)
            found = self._known_s[tokens, context] = iteration_s(times)
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
            np.broadcast_to(attention_s, (layers, self._count)), way_s, expert_s, way_s, outside_s
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
        if self._loads.drawn:
            stream = np.random.default_rng((self._loads.seed, tokens, micro_batch))
            rows = stream.multinomial(choices, shares).astype(np.float64)
        held = placement.physical_to_logical
        copies = np.stack([np.bincount(row, minlength=shares.shape[1]) for row in held])
        return np.take_along_axis(rows / copies, held, axis=1)
