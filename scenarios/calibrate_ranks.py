"""What ranks of this machine send each other, measured and fitted: `diptych calibrate ranks=2`."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hardware_models.calibration import FittedCollective
from hardware_models.schema import Node
from scenarios.tables import console, grid
from sim.costs.collective_fitting import HELDOUT_BYTES, TRAINING_BYTES, fit_alpha_beta

RUNS = 2
"""Launches of the ranks: what one makes of the other is how exact any prediction can be."""
PERCENTILE = 10
"""Of the calls with one payload: what the machine does when nothing else is in the way."""
ACCEPTED = 0.25
"""Largest relative error on held-out payloads, unless runs differ by more."""

BUSY_TOKENS, BUSY_CONTEXT, BUSY_ROUNDS = 32, 256, 9
"""What attention and experts compute while it is seen whether they slow each other down."""
BUSY_NOTICED = 1.05
"""Above it they do: less is the machine's noise."""

Seconds = dict[tuple[str, int], float]
"""The percentile by operation and payload."""


def measure(ranks: int, device: str, rounds: int) -> dict[str, FittedCollective]:
    """Time all operations in `RUNS` launches of `ranks` ranks, and fit each; keys as in a node.

    Raises:
        ValueError: fewer GPUs than ranks.
        ChildProcessError: a rank was lost.
    """
    from backends.collective_timing import time_collectives

    runs: list[Seconds] = []
    for _ in range(RUNS):
        timings = time_collectives(ranks, TRAINING_BYTES + HELDOUT_BYTES, rounds, device=device)
        runs.append(
            {
                (timing.operation, timing.payload_bytes): float(
                    np.percentile(timing.seconds, PERCENTILE)
                )
                for timing in timings
            }
        )
    backend = "nccl" if device == "cuda" else "gloo"
    operations = dict.fromkeys(operation for operation, _ in runs[0])
    return {
        f"{operation}_{ranks}": fit(runs, operation, ranks, backend) for operation in operations
    }


def fit(runs: Sequence[Seconds], operation: str, ranks: int, backend: str) -> FittedCollective:
    """Fit one operation on every other of its payloads, and judge it on those between.

    Args:
        runs: seconds of every launch.
        operation: which.
        ranks: in the group.
        backend: what moved the bytes.
    """
    payloads = sorted(payload for name, payload in runs[0] if name == operation)
    table = np.array([[run[operation, payload] for payload in payloads] for run in runs])
    seconds = table.mean(axis=0)
    found = fit_alpha_beta(payloads[::2], seconds[::2].tolist())
    predicted = np.array([found.seconds(payload) for payload in payloads[1::2]])
    errors = np.abs(predicted / seconds[1::2] - 1)
    apart = table.max(axis=0) / table.min(axis=0) - 1
    return FittedCollective(
        operation=operation,
        ranks=ranks,
        backend=backend,
        latency_s=found.latency_s,
        bandwidth_bytes_per_s=found.bandwidth_bytes_per_s,
        heldout_median_error=float(np.median(errors)),
        heldout_worst_error=float(errors.max()),
        run_to_run=float(np.median(apart)),
        max_payload_bytes=payloads[-1],
        num_payloads=len(payloads[::2]),
        num_heldout=len(errors),
    )


def is_within(fitted: FittedCollective) -> bool:
    """Whether held-out payloads are predicted as well as is asked, or as runs agree."""
    return fitted.heldout_median_error <= max(ACCEPTED, fitted.run_to_run)


def show(node: Node, path: Path) -> None:
    """Print all collectives that the node knows."""
    assert node.calibration is not None
    table = grid(
        f"Collectives of {node.calibration.fingerprint}", "operation", "ranks", "backend",
        "latency", "bandwidth", "held-out error, median", "worst", "run to run",
        left=1,
    )  # fmt: skip
    for one in node.calibration.collectives.values():
        table.add_row(
            one.operation, str(one.ranks), one.backend, f"{one.latency_s * 1e6:.0f} us",
            f"{one.bandwidth_bytes_per_s / 1e9:.2f} GB/s", f"{one.heldout_median_error:.1%}",
            f"{one.heldout_worst_error:.1%}", f"{one.run_to_run:.1%}",
        )  # fmt: skip
    console().print(table)
    console().print(f"written to {path}")


def show_busy() -> None:
    """Print whether two busy ranks slow each other down, as those of an expert pipeline might."""
    from backends.expert_timing import time_together

    busy = time_together(BUSY_TOKENS, BUSY_CONTEXT, BUSY_ROUNDS)
    slowed = max(busy) > BUSY_NOTICED
    told = "slow each other down" if slowed else "do not slow each other down"
    console().print(
        f"two busy ranks {told} here: attention takes {busy.attention:.3f} times as long beside "
        f"experts, experts {busy.experts:.3f} times as long beside attention"
    )
