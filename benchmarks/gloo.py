"""How well do a latency and a bandwidth predict what ranks of this machine send each other?

Fitted on every other payload, judged on those between, by the 10th percentile of the calls. The
last line compares our all-reduce, which counts its payload, with torch's own.

    python benchmarks/gloo.py [--ranks 2] [--rounds 30]
"""

import argparse
import json
import statistics

import numpy as np
from rich.console import Console
from rich.table import Table

from backends.collective_timing import BARE, time_collectives
from scenarios.calibrate_ranks import ACCEPTED, PERCENTILE, is_within, measure
from sim.provenance import commit, machine

SMALL_BYTES = 4096


def main() -> None:
    """Measure, print the table and, last, one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    fits = measure(options.ranks, "cpu", options.rounds)
    ours_s, bare_s = wrapper(options.ranks, 10 * options.rounds)
    table = Table(title=f"Gloo, {options.ranks} ranks\n{machine()}, commit {commit()}")
    for name in ("operation", "latency us", "GB/s", "held-out median", "worst", "run to run", ""):
        table.add_column(name, justify="left" if name == "operation" else "right")
    for one in fits.values():
        table.add_row(
            one.operation, f"{one.latency_s * 1e6:.0f}", f"{one.bandwidth_bytes_per_s / 1e9:.2f}",
            f"{one.heldout_median_error:.1%}", f"{one.heldout_worst_error:.1%}",
            f"{one.run_to_run:.1%}", "within" if is_within(one) else "missed",
        )  # fmt: skip
    console = Console(width=110)
    console.print(table)
    console.print(f"accepted: {ACCEPTED:.0%} or run to run, whichever is larger")
    console.print(
        f"all_reduce of {SMALL_BYTES} bytes, p{PERCENTILE}: ours {ours_s * 1e6:.0f} us, "
        f"torch's {bare_s * 1e6:.0f} us"
    )
    errors = [one.heldout_median_error for one in fits.values()]
    figures = {
        "ranks": options.ranks,
        "heldout_median_error": {one.operation: one.heldout_median_error for one in fits.values()},
        "heldout_worst_error": {one.operation: one.heldout_worst_error for one in fits.values()},
        "run_to_run": {one.operation: one.run_to_run for one in fits.values()},
        "median_of_medians": statistics.median(errors),
        "within": all(is_within(one) for one in fits.values()),
        "wrapper_s": ours_s,
        "bare_s": bare_s,
    }
    print(json.dumps(figures))


def wrapper(ranks: int, rounds: int) -> tuple[float, float]:
    """Seconds of a small all-reduce: ours, and torch's own."""
    operations = ("all_reduce", BARE)
    timings = time_collectives(ranks, [SMALL_BYTES], rounds, operations)
    ours, bare = (float(np.percentile(timing.seconds, PERCENTILE)) for timing in timings)
    return ours, bare


if __name__ == "__main__":
    main()
