"""How close is a simulated vLLM to a real one, request by request?

Replays a recorded run (format of LLMServingSim's `bench`: `config.json`, `vllm/meta.json`,
`vllm/requests.jsonl`) with the engine's own settings and compares latencies. TTFT counts from the
instant at which the engine queued the request. Nothing is fitted on the run that is judged.

    python benchmarks/real_requests.py --bench FOLDER [--layers FOLDER | --silicon GPU]
                                       [--gpu GPU] [--model MODEL] [--overhead SECONDS]
                                       [--pool predicted] [--fit]

`--layers`: tables of profiled layers. `--silicon`: NVIDIA's tables of a GPU. Neither: datasheet
roofline. Where the log states the KV pool, the engine gets that one, and the predicted pool is a
line of its own; `--pool predicted` simulates with the latter. `--fit` also prints the overhead of
an iteration with which the mean TPOT would be exact.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from hardware_models.names import alternatives
from hardware_models.parts import load_gpu, names
from sim.api import check
from sim.cost_shares import cost_shares
from sim.costs.collective_silicon import SYSTEMS
from sim.costs.kernel_cost import KernelCost
from sim.engine import Engine
from sim.engine_profiles import VLLM_V1
from sim.metrics import request_times
from sim.models.architecture import known_architectures
from sim.policies.batching.chunked_prefill import ChunkedPrefill
from sim.processes.alone import simulate
from sim.processes.pace import Costed
from sim.provenance import commit, machine
from sim.scenario import CostFamily, Dtype, Model, Policies, Scenario
from sim.setup import Setup
from sim.trace import Trace
from sim.workload.recorded import Recorded, replayed
from sim.workload.source import Source

UNQUEUED_S = 0.05
"""Requests that were scheduled within this time of being queued are a line of their own."""
DTYPES = {"bfloat16": Dtype.bf16, "float16": Dtype.fp16, "auto": Dtype.bf16, "fp8": Dtype.fp8}

Columns = dict[str, NDArray[np.float64]]


def main() -> None:
    """Simulate, print the table and, last, one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bench", type=Path, required=True)
    parser.add_argument("--layers", type=Path)
    parser.add_argument("--silicon")
    parser.add_argument("--gpu")
    parser.add_argument("--model")
    parser.add_argument("--overhead", type=float, default=VLLM_V1.iteration_overhead_s)
    parser.add_argument("--pool", choices=("stated", "predicted"), default="stated")
    parser.add_argument("--fit", action="store_true")
    options = parser.parse_args()
    try:
        run(options)
    except (ValueError, OSError) as error:
        parser.error(str(error))


def run(options: argparse.Namespace) -> None:
    """Compare one recorded run."""
    if options.layers and options.silicon:
        raise ValueError("--layers and --silicon are both given; give one")
    folder = next(iter(sorted(options.bench.rglob("requests.jsonl"))), None)
    if folder is None:
        raise ValueError(f"--bench={options.bench} has no requests.jsonl below it")
    meta = json.loads((folder.parent / "meta.json").read_text(encoding="utf-8"))
    measured = read_requests(folder)
    scenario = scenario_of(options, meta, measured)
    setup = check(scenario)
    stated = meta.get("kv_cache", {}).get("num_gpu_blocks")
    predicted = pool(setup, stated)
    if options.pool == "stated" and stated:
        setup = replace(setup, limits=setup.limits._replace(num_blocks=stated))
    trace = serve(scenario, setup, options.overhead)
    errors = {**compare(trace, measured), **predicted}
    shares = cost_shares(with_overhead(setup, options.overhead), [trace])
    show(options, scenario, errors, shares)
    figures = {name: error for name, (_, _, error) in errors.items()}
    figures["share_measured"] = (
        1 - shares.get("datasheet roofline", 0) - shares.get("extrapolated", 0)
    )
    if options.fit:
        figures["overhead_of_exact_tpot_s"] = fit(scenario, setup, measured)
    print(json.dumps({name: round(value, 5) for name, value in figures.items()}))


def read_requests(path: Path) -> Columns:
    """Columns of the log, in order of queueing, in seconds from the first one queued.

    Raises:
        ValueError: a line is not a request, with file and line.
    """
    needed = (
        "input_toks", "output_toks", "queued_ts", "scheduled_ts", "first_token_ts",
        "last_token_ts",
    )  # fmt: skip
    rows: list[list[float]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row: dict[str, Any] = json.loads(line)
            rows.append([float(row[name]) for name in needed])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}:{number}: not a request of the log ({error!r})") from error
    table = np.array(sorted(rows, key=lambda row: row[2]))
    columns = dict(zip(needed, table.T, strict=True))
    start_s = columns["queued_ts"][0]
    for name in needed[2:]:
        columns[name] = columns[name] - start_s
    return columns


def scenario_of(options: argparse.Namespace, meta: dict[str, Any], measured: Columns) -> Scenario:
    """The engine as the log says that it was set, on the GPU that it ran on."""
    settings, cache = meta["engine_kwargs"], meta.get("kv_cache", {})
    asked = options.silicon or options.gpu
    gpu = our_name(asked) if asked else gpu_name(options.bench, meta)
    engine = replace(
        VLLM_V1,
        max_num_seqs=settings.get("max_num_seqs"),
        max_num_batched_tokens=settings.get("max_num_batched_tokens"),
        max_model_len=settings.get("max_model_len"),
        memory_utilization=cache.get("gpu_memory_utilization", VLLM_V1.memory_utilization),
        prefix_caching=cache.get("enable_prefix_caching", True),
    )
    return Scenario(
        name="real_requests",
        model=Model(
            name=options.model or model_name(meta["model"]),
            dtype=DTYPES[settings.get("dtype", "auto")],
        ),
        engine=engine,
        workload=workload_of(measured),
        policy=Policies(batching=ChunkedPrefill()),
        gpu=load_gpu(gpu),
        tp_size=settings.get("tensor_parallel_size", 1),
        cost=CostFamily.profiled if options.layers or options.silicon else CostFamily.roofline,
        cost_tables=str(options.layers) if options.layers else None,
    )


def workload_of(measured: Columns) -> Recorded:
    """The requests as they were queued."""
    return replayed(measured["queued_ts"], measured["input_toks"], measured["output_toks"])


def model_name(published: str) -> str:
    """Our name of a model of the Hugging Face hub.

    Raises:
        ValueError: there is no such model here.
    """
    wanted = _letters(published.rsplit("/", 1)[-1])
    known = {_letters(name): name for name in known_architectures()}
    found = [key for key in known if wanted.removeprefix("meta").startswith(key)]
    if not found:
        raise ValueError(
            f"model {published} of the log is not known; give --model NAME or a config.json; "
            f"{alternatives(published, list(known.values()))}"
        )
    return known[max(found, key=len)]


def _letters(name: str) -> str:
    return "".join(filter(str.isalnum, name.lower()))


def our_name(asked: str) -> str:
    """Our name of a GPU that is asked for by ours, in another spelling, or by the tables' own."""
    known = {_letters(name): name for name in names("gpu")}
    known |= {_letters(theirs): ours for ours, theirs in SYSTEMS.items()}
    return known.get(_letters(asked), asked)


def gpu_name(folder: Path, meta: dict[str, Any]) -> str:
    """Our name of the GPU that the log names, or the folder that it lies in."""
    told = meta.get("hardware", {}).get("device_name", "") + " ".join(folder.resolve().parts[-3:])
    text = _letters(told)
    keys = {name: name.removesuffix("_sxm").removesuffix("_80g").replace("_", "") for name in
            names("gpu")}  # fmt: skip
    found = [name for name, key in keys.items() if key in text]
    if not found:
        raise ValueError(f"no GPU is named in {told!r}; give --gpu: {alternatives('', list(keys))}")
    return max(found, key=lambda name: len(keys[name]))


def with_overhead(setup: Setup, overhead_s: float) -> KernelCost:
    """The cost with another overhead of an iteration."""
    cost = setup.cost
    assert isinstance(cost, KernelCost)
    return KernelCost(cost.kernels, overhead_s, cost.communication)


def serve(scenario: Scenario, setup: Setup, overhead_s: float) -> Trace:
    """The simulated run."""
    source = Source(scenario.workload, 0, setup.max_model_tokens)
    pace = Costed(with_overhead(setup, overhead_s))
    ahead = scenario.engine.schedules_ahead
    return simulate(source, scenario.policy.batching, setup.limits, pace, schedules_ahead=ahead)


def compare(trace: Trace, measured: Columns) -> dict[str, tuple[float, float, float]]:
    """(simulated, measured, relative error) of every line."""
    times = request_times(trace)
    real = latencies(measured)
    simulated = {"ttft": times.ttft_s, "tpot": times.tpot_s, "e2e": times.e2e_s}
    found: dict[str, tuple[float, float, float]] = {}
    for name, values in simulated.items():
        known = real[name][~np.isnan(real[name])]
        mine = values[~np.isnan(values)]
        found[f"{name}_mean_error"] = line(mine.mean(), known.mean())
        found[f"{name}_p90_error"] = line(np.percentile(mine, 90), np.percentile(known, 90))
    each = np.abs(simulated["e2e"] / real["e2e"] - 1)
    found["e2e_request_median_error"] = (np.nan, np.nan, float(np.median(each)))
    unqueued = measured["scheduled_ts"] - measured["queued_ts"] < UNQUEUED_S
    if unqueued.any():
        found["ttft_unqueued_error"] = line(
            simulated["ttft"][unqueued].mean(), real["ttft"][unqueued].mean()
        )
    return found


def latencies(measured: Columns) -> Columns:
    """TTFT, TPOT and end-to-end latency of every request of the log."""
    first, last = measured["first_token_ts"], measured["last_token_ts"]
    gaps = np.where(measured["output_toks"] > 1, measured["output_toks"] - 1, np.nan)
    return {
        "ttft": first - measured["queued_ts"],
        "tpot": (last - first) / gaps,
        "e2e": last - measured["queued_ts"],
    }


def line(simulated: float, measured: float) -> tuple[float, float, float]:
    """A line of the table."""
    return float(simulated), float(measured), float(simulated / measured - 1)


def pool(setup: Setup, stated: int | None) -> dict[str, tuple[float, float, float]]:
    """The KV pool against the one that the log states, if it does."""
    if not stated:
        return {}
    return {"kv_blocks_error": line(setup.limits.num_blocks, stated)}


def fit(scenario: Scenario, setup: Setup, measured: Columns) -> float:
    """The overhead of an iteration with which the mean TPOT is exact, by bisection."""
    target_s = float(np.nanmean(latencies(measured)["tpot"]))
    low_s, high_s = 0.0, 5e-3
    for _ in range(9):
        middle_s = (low_s + high_s) / 2
        tpot_s = request_times(serve(scenario, setup, middle_s)).tpot_s
        if float(np.nanmean(tpot_s)) < target_s:
            low_s = middle_s
        else:
            high_s = middle_s
    return (low_s + high_s) / 2


def show(
    options: argparse.Namespace, scenario: Scenario,
    errors: dict[str, tuple[float, float, float]], shares: dict[str, float],
) -> None:  # fmt: skip
    """Print the table."""
    engine: Engine = scenario.engine
    source = options.layers or options.silicon or "datasheet roofline"
    gpu = scenario.gpu.name if scenario.gpu else "-"
    table = Table(
        title=f"{scenario.model.name} on {gpu}, engine {engine.name}, costs: {source}\n"
        f"{machine()}, commit {commit()}"
    )
    for column in ("what", "simulated", "measured", "error"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for name, (simulated, measured, error) in errors.items():
        shown = ["" if np.isnan(value) else f"{value:,.5g}" for value in (simulated, measured)]
        table.add_row(name.removesuffix("_error"), *shown, f"{error:+.2%}")
    console = Console()
    console.print(table)
    console.print("costs: " + ", ".join(f"{part:.0%} {name}" for name, part in shares.items()))


if __name__ == "__main__":
    main()
