"""The ping-pong pipeline in closed form: micro-batches between attention and expert nodes.

MegaScale-Infer (arXiv 2504.02263), section 4.1. Attention, the way to the experts, the experts and
the way back are four stations that each serve one micro-batch at a time, layer after layer, in the
order of the micro-batches.
"""

from math import ceil
from typing import NamedTuple

MOST_MICRO_BATCHES = 4
"""More make expert products less efficient than they gain (section 4.2, N_m)."""


class StageSeconds(NamedTuple):
    """Seconds of one micro-batch in one layer, on the slowest node of each kind."""

    attention_s: float
    expert_s: float
    transfer_s: float
    """One way; back takes as long."""

    @property
    def compute_s(self) -> float:
        """T_f: the longer of attention and expert."""
        return max(self.attention_s, self.expert_s)

    @property
    def round_trip_s(self) -> float:
        """A micro-batch alone through one layer."""
        return self.attention_s + self.expert_s + 2 * self.transfer_s


def hides_transfers(stages: StageSeconds, num_micro_batches: int) -> bool:
    """Whether computing never waits: equations 2 and 3, the latter for unequal stages.

    Equation 3 reads m T_f >= 2 (T_f + T_c) for T_a = T_e; in general a micro-batch must be back
    before its turn comes, m T_f >= T_a + T_e + 2 T_c.
    """
    compute_s = stages.compute_s
    back_in_time = num_micro_batches * compute_s >= stages.round_trip_s
    return stages.transfer_s <= compute_s and back_in_time


def hidden_total_s(stages: StageSeconds, num_micro_batches: int, num_layers: int) -> float:
    """T_total of one iteration where `hides_transfers` holds (equation 5)."""
    turns = num_micro_batches * num_layers - 1
    return stages.round_trip_s + stages.compute_s * turns


def total_s(stages: StageSeconds, num_micro_batches: int, num_layers: int) -> float:
    """Seconds of one iteration, whether or not the transfers are hidden; with equal layers.

    A layer begins as often as its slowest station has served all micro-batches, or as one comes
    round, whichever takes longer; equation 5 is the first case.
    """
    slowest_s = max(stages.compute_s, stages.transfer_s)
    layer_s = max(num_micro_batches * slowest_s, stages.round_trip_s)
    return stages.round_trip_s + (num_layers - 1) * layer_s + (num_micro_batches - 1) * slowest_s


def least_micro_batches(transfer_share: float) -> int:
    """Micro-batches that hide the transfers (equation 3): m >= 2 (1 + T_c / T_f).

    Args:
        transfer_share: T_c / T_f with T_a = T_e.

    Raises:
        ValueError: the share is negative or above 1, where no number hides them.
    """
    if not 0 <= transfer_share <= 1:
        raise ValueError(
            f"transfer_share={transfer_share} must be in 0 to 1: a transfer that takes longer than "
            "computing is hidden by no number of micro-batches; take a faster network"
        )
    return ceil(2 * (1 + transfer_share))
