"""Kernels of a GPU without tables, from another one's: each kernel's seconds, scaled by a roofline.

A kernel that computes most of its time scales with the peak FLOP/s, one that moves bytes with the
bandwidth, one that is all launch not at all: the ratio of the two GPUs' rooflines of the same
kernel says which. All of it counts as extrapolated.
"""

from sim.costs.curve import Curve
from sim.costs.kernel_cost import Kernels
from sim.costs.roofline import CONTEXTS, RooflineKernels
from sim.costs.seconds import Seconds
from sim.models.work import IterationShape


class Proxied:
    """The kernels of one GPU read off the tables of another."""

    def __init__(self, measured: Kernels, theirs: RooflineKernels, ours: RooflineKernels) -> None:
        """Take the proxy's kernels, its roofline, and that of the GPU it stands in for."""
        self._measured = measured
        self._theirs = theirs
        self._ours = ours

    def tokens(self, tokens: int) -> Seconds:
        """All that depends on the number of tokens alone."""
        return _scaled(
            self._measured.tokens(tokens), self._ours.tokens(tokens), self._theirs.tokens(tokens)
        )

    def sampled(self, positions: int) -> Seconds:
        """The lm_head and sampling."""
        return _scaled(
            self._measured.sampled(positions),
            self._ours.sampled(positions),
            self._theirs.sampled(positions),
        )

    def prompt_attention(self, shape: IterationShape) -> Seconds:
        """Attention of an iteration with chunks."""
        return _scaled(
            self._measured.prompt_attention(shape),
            self._ours.prompt_attention(shape),
            self._theirs.prompt_attention(shape),
        )

    def decode_attention(self, num_decodes: int) -> Curve:
        """Attention of decoding requests by the tokens that they read."""
        knots = [float(num_decodes * length) for length in CONTEXTS]
        return Curve.through(knots, lambda at: self.decode_source(num_decodes, at).total)

    def decode_source(self, num_decodes: int, context: float) -> Seconds:
        """One point of it, split by what it rests on."""
        return _scaled(
            self._measured.decode_source(num_decodes, context),
            self._ours.decode_source(num_decodes, context),
            self._theirs.decode_source(num_decodes, context),
        )


def _scaled(measured: Seconds, ours: Seconds, theirs: Seconds) -> Seconds:
    if not measured.total:
        return measured
    return measured.times(ours.total / theirs.total).as_extrapolated()
