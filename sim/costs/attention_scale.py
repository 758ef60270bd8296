"""What measured attention is divided by before it is interpolated: a smooth account of the work."""

import numpy as np
from numpy.typing import NDArray

from sim.costs.roofline import RooflineKernels
from sim.models.work import IterationShape

LAUNCH_PERCENTILE = 2.0
"""Of a table's times: the shortest ones are launches, the very shortest may be an outlier."""


class AttentionScale:
    """Launch, thread blocks, computing and moving, one after another.

    A roofline takes the longer of two, and has corners; a kernel overlaps the two in part, and
    where it does so is not where the corner is. Over a sum, ratios of measurements change slowly,
    which is what interpolation between them needs. The launch is that of the table itself.
    """

    def __init__(self, roofline: RooflineKernels, launch_s: float) -> None:
        """Take the model on the device that was measured.

        Args:
            roofline: of them.
            launch_s: seconds of a kernel that has next to nothing to do; see `shortest_s`.
        """
        self._roofline = roofline
        self._launch_s = launch_s
        self._layers = roofline.architecture.num_layers

    def prompts_s(self, shape: IterationShape) -> float:
        """Seconds of attention of an iteration's chunks, in all layers."""
        flops, num_bytes = self._roofline.prompt_work(shape)
        return self._layers * self._seconds(flops, num_bytes)

    def decodes_s(self, num_decodes: float, context: float) -> float:
        """Seconds of attention of requests that read `context` tokens together, in all layers."""
        flops, num_bytes = self._roofline.decode_work(num_decodes, context)
        blocks = num_decodes * self._roofline.architecture.num_kv_heads
        waves_s = self._roofline.model.block_s * blocks / (self._roofline.model.sm_count or np.inf)
        return self._layers * (self._seconds(flops, num_bytes) + waves_s)

    def _seconds(self, flops: float, num_bytes: float) -> float:
        model = self._roofline.model
        return self._launch_s + model.padded_attention_s(flops) + model.moving_s(num_bytes)


def shortest_s(seconds: NDArray[np.float64]) -> float:
    """Seconds of a launch, from measurements of one kernel."""
    return float(np.percentile(seconds, LAUNCH_PERCENTILE))
