"""The cost of an iteration whose kernels run one after another, whoever knows their seconds."""

from collections.abc import Callable
from typing import Protocol

from sim.costs.curve import Curve
from sim.costs.seconds import NOTHING, Seconds
from sim.models.work import IterationShape

Communication = Callable[[int, int], Seconds]
"""Seconds of the collectives of an iteration of (tokens, sampled positions)."""


class Kernels(Protocol):
    """Seconds of the kernels of one model on one device, all layers together."""

    def tokens(self, tokens: int) -> Seconds:
        """All that depends on the number of tokens alone: products, norms, activations."""
        ...

    def sampled(self, positions: int) -> Seconds:
        """The lm_head and sampling for so many positions, which may be none."""
        ...

    def prompt_attention(self, shape: IterationShape) -> Seconds:
        """Attention of an iteration that has prompt chunks, its decoding requests included."""
        ...

    def decode_attention(self, num_decodes: int) -> Curve:
        """Attention of so many decoding requests, by the tokens that they read together."""
        ...

    def decode_source(self, num_decodes: int, context: float) -> Seconds:
        """As `decode_attention(num_decodes).at(context)`, split by what it rests on."""
        ...


def no_communication(tokens: int, sampled: int) -> Seconds:
    """Of a replica on one device."""
    del tokens, sampled
    return NOTHING


class KernelCost:
    """A `StagedCost` from kernels, collectives and what an engine adds."""

    slow_down = 1.0
    """Every stage has devices of its own."""

    def __init__(
        self,
        kernels: Kernels,
        overhead_s: float = 0.0,
        communication: Communication = no_communication,
    ) -> None:
        """Take the parts.

        Args:
            kernels: of the model's part that one device holds.
            overhead_s: scheduling, input preparation and launches that no kernel hides.
            communication: of the ranks that share the model.
        """
        self.kernels = kernels
        self.overhead_s = overhead_s
        self.communication = communication
        self._fixed_s: dict[tuple[int, int], float] = {}
        self._bodies: dict[int, Seconds] = {}
        self._heads: dict[int, Seconds] = {}
        self._sampled_s: dict[int, float] = {}
        self._curves: dict[int, Curve] = {}

    def iteration_s(self, shape: IterationShape) -> float:
        """Seconds of one iteration."""
        decodes = shape.num_decodes
        fixed = self._fixed(shape.prefill_tokens + decodes, shape.sampled_tokens)
        if shape.prefill_tokens:
            return fixed + self.kernels.prompt_attention(shape).total
        return fixed + self._curve(decodes).at(shape.decode_context) if decodes else fixed

    def decode_run_s(self, num_decodes: int, decode_context: int, iterations: int) -> list[float]:
        """Seconds of each iteration of a decode stretch."""
        fixed = self._fixed(num_decodes, num_decodes)
        return self._curve(num_decodes).run(fixed, decode_context, num_decodes, iterations)

    def sampled_s(self, positions: int) -> float:
        """Of these, the seconds of the lm_head, of sampling, and of bringing both together."""
        found = self._sampled_s.get(positions)
        if found is None:
            apart = self.communication(0, positions)
            found = self._sampled_s[positions] = self.kernels.sampled(positions).plus(apart).total
        return found

    def sources(self, shape: IterationShape) -> Seconds:
        """As `iteration_s`, split by what it rests on."""
        seconds = self._parts(shape.tokens, shape.sampled_tokens)
        if shape.prefill_tokens:
            return seconds.plus(self.kernels.prompt_attention(shape))
        if shape.num_decodes:
            split = self.kernels.decode_source(shape.num_decodes, shape.decode_context)
            # The curve is straight between the points that it is drawn through.
            curve_s = self._curve(shape.num_decodes).at(shape.decode_context)
            return seconds.plus(split.times(curve_s / split.total))
        return seconds

    def _parts(self, tokens: int, sampled: int) -> Seconds:
        # Each is asked once: batches differ in the pair far more than in either number.
        if (body := self._bodies.get(tokens)) is None:
            body = self._bodies[tokens] = self.kernels.tokens(tokens)
        if (head := self._heads.get(sampled)) is None:
            head = self._heads[sampled] = self.kernels.sampled(sampled)
        kernels = body.plus(head)
        around = Seconds(datasheet=self.overhead_s).plus(self.communication(tokens, sampled))
        return kernels.plus(around)

    def _fixed(self, tokens: int, sampled: int) -> float:
        key = (tokens, sampled)
        found = self._fixed_s.get(key)
        if found is None:
            found = self._fixed_s[key] = self._parts(tokens, sampled).total
        return found

    def _curve(self, num_decodes: int) -> Curve:
        curve = self._curves.get(num_decodes)
        if curve is None:
            curve = self._curves[num_decodes] = self.kernels.decode_attention(num_decodes)
        return curve
