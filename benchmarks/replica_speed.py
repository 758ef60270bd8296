"""How fast is the simulation of one replica?

Llama-3-8B on one A100, Poisson at 8 requests a second, 512 tokens in, 128 out, continuous batching.
The alternative beside it is the same process with one SimPy event an iteration, as event simulators
of serving systems commonly run.

    python benchmarks/replica_speed.py [--requests 10000] [--million 1000000] [--repeats 5]
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from hardware_models.parts import load_gpu
from sim.engine import Engine
from sim.models.work import IterationShape
from sim.policies.batching.chunked_prefill import ChunkedPrefill
from sim.policies.batching.continuous import Continuous
from sim.processes.alone import simulate
from sim.processes.pace import Costed
from sim.provenance import commit, machine
from sim.scenario import CostFamily, Model, Policies, Scenario
from sim.setup import prepare
from sim.workload.poisson import Poisson
from sim.workload.source import Source


def main() -> None:
    """Measure, print the table and, last, one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--million", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    macro, single, chunked, profiled = [], [], [], []
    for _ in range(options.repeats):  # interleaved: the machine may be shared
        macro.append(simulated_s(options.requests, Continuous()))
        single.append(simulated_s(options.requests, Continuous(), one_by_one=True))
        chunked.append(simulated_s(options.requests, ChunkedPrefill()))
        profiled.append(simulated_s(options.requests, ChunkedPrefill(), cost=CostFamily.profiled))
    process_s, peak_mb = whole_process(options.requests)
    million_s, million_peak_mb = in_child(options.million)
    sim_s = statistics.median(macro)
    ratio = (million_s / options.million) / (sim_s / options.requests)
    table = Table(title=f"Simulating one replica\n{machine()}, commit {commit()}")
    for column in ("what", "requests", "seconds", "requests/s", "peak MB"):
        table.add_column(column, justify="left" if column == "what" else "right")

    def row(what: str, requests: int, seconds: float, peak: float | None = None) -> None:
        shown = "" if peak is None else f"{peak:.0f}"
        table.add_row(what, f"{requests:,}", f"{seconds:.3f}", f"{requests / seconds:,.0f}", shown)

    row("simulation, continuous", options.requests, sim_s)
    row("simulation, chunked_prefill", options.requests, statistics.median(chunked))
    row(
        "simulation, chunked_prefill, measured tables",
        options.requests,
        statistics.median(profiled),
    )
    row("one event an iteration, continuous", options.requests, statistics.median(single))
    row("whole process: diptych run", options.requests, process_s, peak_mb)
    row("simulation, continuous", options.million, million_s, million_peak_mb)
    console = Console(width=110)
    console.print(table)
    console.print(f"time per request, {options.million:,} over {options.requests:,}: {ratio:.2f}")
    figures = {
        "requests": options.requests, "sim_s": sim_s, "process_s": process_s, "peak_mb": peak_mb,
        "million_ratio": ratio, "million_peak_mb": million_peak_mb,
        "one_by_one_s": statistics.median(single), "chunked_prefill_s": statistics.median(chunked),
        "measured_tables_s": statistics.median(profiled), **costs_of_tables(),
    }  # fmt: skip
    print(json.dumps(figures))


def costs_of_tables() -> dict[str, float]:
    """Seconds to read the tables of a GPU, and of one iteration's cost once they are warm."""
    start = time.perf_counter()
    cost = prepare(study(1, CostFamily.profiled)).cost
    load_s = time.perf_counter() - start
    shapes = [IterationShape.of([(1800 - n, n)], [500 + n] * n, n + 1) for n in range(1, 200)]
    for shape in shapes:
        cost.iteration_s(shape)
    start = time.perf_counter()
    for shape in shapes:
        cost.iteration_s(shape)
    return {
        "tables_load_s": load_s,
        "mixed_iteration_s": (time.perf_counter() - start) / len(shapes),
    }


def study(num_requests: int, cost: CostFamily = CostFamily.roofline) -> Scenario:
    """The scenario that is timed."""
    return Scenario(
        name="replica_speed",
        cost=cost,
        model=Model(name="llama_3_8b"),
        gpu=load_gpu("a100_80g"),
        engine=Engine(max_num_batched_tokens=2048),
        policy=Policies(batching=Continuous()),
        workload=Poisson(
            rate_per_s=8.0, num_requests=num_requests, input_tokens=512, output_tokens=128
        ),
    )


def simulated_s(
    num_requests: int, batching: Continuous | ChunkedPrefill,
    cost: CostFamily = CostFamily.roofline, **options: bool,
) -> float:  # fmt: skip
    """Seconds of one simulation, from the first request to the trace."""
    scenario = study(num_requests, cost)
    setup = prepare(scenario)
    source = Source(scenario.workload, 0, setup.max_model_tokens)
    start = time.perf_counter()
    simulate(source, batching, setup.limits, Costed(setup.cost), **options)
    return time.perf_counter() - start


def whole_process(num_requests: int) -> tuple[float, float]:
    """Seconds and peak memory of `diptych run`, results on disk included."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "scenarios.cli", "run", "-cn", "replica",
            "workload=poisson", "workload.input_tokens=512", "workload.output_tokens=128",
            "workload.rate_per_s=8", f"workload.num_requests={num_requests}", "seeds=[0]",
            f"out={Path(folder) / 'result'}",
        ]  # fmt: skip
        seconds: list[float] = []
        for _ in range(3):
            start = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            seconds.append(time.perf_counter() - start)
    peak_kb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return statistics.median(seconds), peak_kb / 1024


def in_child(num_requests: int) -> tuple[float, float]:
    """Seconds and peak memory of one simulation in a process of its own."""
    code = (
        "import resource, sys; sys.path.insert(0, 'benchmarks'); import replica_speed as b;"
        f"s = b.simulated_s({num_requests}, b.Continuous());"
        "print(s, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
    )
    folder = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=folder
    )
    seconds, peak_mb = done.stdout.split()
    return float(seconds), float(peak_mb)


if __name__ == "__main__":
    main()
