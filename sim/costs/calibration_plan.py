"""Which batches `diptych calibrate` measures, and which of them it holds out of the fit.

Contexts are far from those of the validation studies (prompts of 32 tokens, answers of 12), so that
validation asks the fit about shapes that it has never seen.
"""

from typing import NamedTuple

from sim.models.work import IterationShape


class BatchPlan(NamedTuple):
    """A batch to measure: chunks of prompts and decoding requests."""

    chunks: tuple[tuple[int, int], ...] = ()
    """(tokens, tokens of the request before them)."""
    contexts: tuple[int, ...] = ()
    """Tokens of KV that each decoding request reads, its own included."""
    ends: bool = True
    """Whether the chunks end their prompts, so that tokens are sampled."""

    @property
    def shape(self) -> IterationShape:
        """The batch as costs see it."""
        sampled = len(self.chunks) * self.ends + len(self.contexts)
        return IterationShape.of(self.chunks, self.contexts, sampled)


def training_batches() -> list[BatchPlan]:
    """Batches that the fit sees."""
    decodes = [
        BatchPlan(contexts=(context,) * batch)
        for batch in (1, 2, 3, 4, 6, 7, 8, 12, 16, 24)
        for context in (20, 100, 220)
    ]
    prefills = [BatchPlan(chunks=((tokens, 0),)) for tokens in (4, 9, 18, 30, 50, 90, 140, 200)]
    several = [BatchPlan(chunks=((tokens, 0),) * 3) for tokens in (6, 14, 30, 44)]
    later = [BatchPlan(chunks=((tokens, 70),)) for tokens in (10, 26, 60)]
    mixed = [
        BatchPlan(chunks=((tokens, before),), contexts=(context,) * batch)
        for tokens, before in ((6, 0), (13, 20), (28, 0), (60, 30))
        for batch, context in ((1, 90), (3, 24), (6, 60), (12, 25))
    ]
    mixed += [
        BatchPlan(chunks=((first, 0), (second, 0)), contexts=(context,) * batch)
        for first, second in ((20, 11), (30, 13), (29, 25))
        for batch, context in ((1, 70), (4, 25), (8, 48))
    ]
    # Without these, what the layers cost and what the lm_head costs could not be told apart.
    begun = [BatchPlan(chunks=((tokens, 0),), ends=False) for tokens in (3, 7, 14, 27, 55, 110)]
    begun += [BatchPlan(chunks=((12, 40),), contexts=(24,) * 3, ends=False)]
    return [*decodes, *prefills, *several, *later, *mixed, *begun]


def heldout_batches() -> list[BatchPlan]:
    """Batches that judge the fit: other sizes, uneven contexts, other mixtures."""
    decodes = [
        BatchPlan(contexts=tuple(context + 5 * index for index in range(batch)))
        for batch, context in ((1, 60), (2, 150), (5, 62), (7, 80), (10, 55), (14, 90), (20, 70))
    ]
    prefills = [BatchPlan(chunks=((tokens, 0),)) for tokens in (7, 24, 40, 70, 110, 170)]
    several = [
        BatchPlan(chunks=((12, 0), (21, 0))),
        BatchPlan(chunks=((35, 0), (16, 0), (25, 0), (40, 0))),
        BatchPlan(chunks=((22, 40),)),
    ]
    mixed = [
        BatchPlan(chunks=((10, 0),), ends=False),
        BatchPlan(chunks=((36, 20),), ends=False),
        BatchPlan(chunks=((10, 10),), contexts=(50, 60)),
        BatchPlan(chunks=((20, 0),), contexts=(30, 50, 70, 90)),
        BatchPlan(chunks=((14, 30), (9, 0)), contexts=(45, 65)),
        BatchPlan(chunks=((45, 0),), contexts=(35, 40, 45, 50, 55, 60, 65, 70)),
    ]
    return [*decodes, *prefills, *several, *mixed]
