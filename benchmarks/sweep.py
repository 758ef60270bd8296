"""How long does a sweep of 1,000 points take on each launcher, and are its tables the same?

Llama-3-8B on one L40S: 10 token budgets, 50 rates, 2 batching policies, 100 requests a point. The
alternative beside the launchers is what a user would write: one `compose` and one run a point, in a
loop. It is timed on a share of the points and scaled.

    python benchmarks/sweep.py [--points 1000] [--launchers basic,joblib,ray] [--workers 2]
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from scenarios.compose import compose_study
from scenarios.run import simulate
from sim.provenance import commit, machine

FIXED = ("gpu=l40s", "node=null", "workload=poisson", "workload.input_tokens=512",
         "workload.output_tokens=64", "workload.num_requests=100", "seeds=[0]")  # fmt: skip
POLICIES = ("continuous", "chunked_prefill")
BUDGETS = tuple(512 * (place + 1) for place in range(10))
WORKERS = {"joblib": "hydra.launcher.n_jobs", "ray": "hydra.launcher.num_cpus"}


def main() -> None:
    """Run the sweep on every launcher, print the table and, last, one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=1000)
    parser.add_argument("--launchers", default="basic,joblib,ray")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    launchers = options.launchers.split(",")
    rates = max(1, options.points // (len(POLICIES) * len(BUDGETS)))
    points = rates * len(POLICIES) * len(BUDGETS)
    with tempfile.TemporaryDirectory() as folder:
        seconds = {name: swept_s(name, Path(folder), rates, options.workers) for name in launchers}
        bytes_of = {name: table_digest(Path(folder) / name) for name in launchers}
        done = {name: len(list((Path(folder) / name / "rows").iterdir())) for name in launchers}
    loop_s = by_hand_s(min(20, points), rates) / min(20, points) * points
    identical = len(set(bytes_of.values())) == 1 and set(done.values()) == {points}
    table = Table(title=f"A sweep of {points:,} points\n{machine()}, commit {commit()}")
    for column in ("launcher", "workers", "seconds", "points/s", "same table"):
        table.add_column(column, justify="left" if column == "launcher" else "right")
    for name, wall_s in seconds.items():
        workers = str(options.workers if name in WORKERS else 1)
        same = "yes" if bytes_of[name] == bytes_of[launchers[0]] else "no"
        table.add_row(name, workers, f"{wall_s:.1f}", f"{points / wall_s:.1f}", same)
    table.add_row("compose and run in a loop, scaled", "1", f"{loop_s:.1f}",
                  f"{points / loop_s:.1f}", "")  # fmt: skip
    Console(width=100).print(table)
    figures = {f"{name}_s": wall_s for name, wall_s in seconds.items()}
    print(json.dumps({"points": points, "workers": options.workers, **figures, "loop_s": loop_s,
                      "identical": identical}))  # fmt: skip


def swept_s(launcher: str, folder: Path, rates: int, workers: int) -> float:
    """Seconds of the whole command, start of the workers and tables included."""
    settings = [f"{WORKERS[launcher]}={workers}"] if launcher in WORKERS else []
    command = [
        sys.executable, "-m", "scenarios.cli", "run", "-m", "-cn", "replica", *FIXED,
        f"policy/batching={','.join(POLICIES)}", f"workload.rate_per_s=range(1,{rates + 1})",
        f"engine.max_num_batched_tokens={','.join(map(str, BUDGETS))}",
        f"hydra/launcher={launcher}", *settings, f"out={folder / launcher}",
    ]  # fmt: skip
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def by_hand_s(points: int, rates: int) -> float:
    """Seconds of some of the points, each composed by Hydra and run, without files."""
    start = time.perf_counter()
    for place in range(points):
        chosen = (f"policy/batching={POLICIES[place % 2]}",
                  f"workload.rate_per_s={place % rates + 1}")  # fmt: skip
        simulate(compose_study("replica", [*FIXED, *chosen]).scenario, progress=False)
    return time.perf_counter() - start


def table_digest(folder: Path) -> str:
    """Digest of both files of a table."""
    found = hashlib.sha256()
    for name in ("sweep.csv", "sweep.parquet"):
        found.update((folder / name).read_bytes())
    return found.hexdigest()


if __name__ == "__main__":
    main()
