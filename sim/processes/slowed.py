"""The pace of a replica with slow parts: each iteration takes as long as they let it."""

from collections.abc import Callable, Sequence

from sim.costs.base import IterationCost
from sim.costs.kernel_cost import KernelCost
from sim.faults import Fault
from sim.models.split import stage_layers
from sim.models.work import IterationShape
from sim.processes.pace import AtOnce, Costed, Pace
from sim.slowness import Apart, SlowTimes

Split = Callable[[int, int], Apart]
"""What of an iteration of (tokens, sampled positions) is not the computing of layers."""


class Slowed(AtOnce):
    """As `Costed`, while parts of the replica are slow.

    It takes a cost and not another pace: the seconds of an iteration cannot be had back from two
    boundaries without a rounding, and slow by a factor must mean that factor exactly.
    """

    start_s = 0.0

    def __init__(self, cost: IterationCost, times: SlowTimes, split: Split) -> None:
        self._cost = cost
        self._times = times
        self._split = split
        self._apart: dict[tuple[int, int], Apart] = {}

    def iteration(self, now_s: float, shape: IterationShape) -> list[float]:
        """`[now_s, end]` of one iteration."""
        total_s = self._cost.iteration_s(shape)
        apart = self._apart_of(shape.tokens, shape.sampled_tokens)
        return [now_s, self._times.end_s(now_s, total_s, apart)]

    def decode_run(
        self, now_s: float, num_decodes: int, decode_context: int, iterations: int
    ) -> list[float]:
        """Boundaries of `iterations` decode-only iterations, `now_s` first."""
        totals_s = self._cost.decode_run_s(num_decodes, decode_context, iterations)
        apart = self._apart_of(num_decodes, num_decodes)
        return self._times.boundaries(now_s, totals_s, apart)

    def _apart_of(self, tokens: int, sampled: int) -> Apart:
        key = (tokens, sampled)
        if key not in self._apart:
            self._apart[key] = self._split(tokens, sampled)
        return self._apart[key]


def split_of(cost: IterationCost) -> Split:
    """How a cost splits; one that was measured as a whole counts as computing."""
    if not isinstance(cost, KernelCost):
        return lambda tokens, sampled: Apart()

    def split(tokens: int, sampled: int) -> Apart:
        communication_s = cost.communication(tokens, sampled).total
        return Apart(communication_s, cost.overhead_s, cost.kernels.sampled(sampled).total)

    return split


def slowed_paces(
    faults: Sequence[Fault], cost: IterationCost, num_replicas: int, num_layers: int,
    sizes: tuple[int, int],
) -> list[Pace]:  # fmt: skip
    """The paces of replicas on `tp_size, pp_size` ranks; those without a slow part are `Costed`."""
    tp_size, pp_size = sizes
    layers = [len(stage) for stage in stage_layers(num_layers, pp_size)]
    paces: list[Pace] = []
    for number in range(num_replicas):
        mine = [one for one in faults if one.replica == number and not one.kills]
        slow = Slowed(cost, SlowTimes(mine, layers, tp_size), split_of(cost)) if mine else None
        paces.append(slow or Costed(cost))
    return paces
