"""How fast are published traces simulated?

Azure's conversation trace on one replica, Mooncake's on four with prefix caching and prefix-aware
routing, and 100,000 requests of conversations on four, against 10,000 for the time per request.
Llama-3-8B with the context of Llama-3.1 on H100s, chunked prefill with 8,192 tokens an iteration.
Each case runs in a process of its own; reading the trace is in its seconds. The alternative beside
Mooncake's is one SimPy event an iteration, as event simulators of serving systems commonly run.

    python benchmarks/traces.py [--azure FILE] [--mooncake FILE] [--requests 100000] [--repeats 3]
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
from sim.metrics import reused_share
from sim.policies.batching.chunked_prefill import ChunkedPrefill
from sim.policies.routing.prefix_aware import PrefixAware
from sim.policies.routing.round_robin import RoundRobin
from sim.processes.pace import Costed
from sim.processes.router import Engines, simulate_replicas
from sim.provenance import commit, machine
from sim.scenario import Model, Policies, Scenario
from sim.setup import prepare
from sim.summary import summarise
from sim.workload.azure_trace import AzureTrace
from sim.workload.base import Workload
from sim.workload.conversations import Conversations
from sim.workload.lengths import LengthDistribution
from sim.workload.mooncake_trace import MooncakeTrace
from sim.workload.source import Source

CONTEXT = 131_072
ARCHITECTURE = Path(__file__).parent.parent / "sim" / "models" / "configs" / "llama_3_8b.json"
TARGETS_S = {"azure": 2.0, "mooncake": 5.0}


def main() -> None:
    """Measure each case in a child, print the table and, last, one JSON line."""
    options = parser().parse_args()
    if options.child:
        print(json.dumps(measure(options.child, options)))
        return
    given = {name: getattr(options, name) for name in ("azure", "mooncake")}
    cases = [name for name, path in given.items() if path]
    cases += ["mooncake_one_by_one"] if options.mooncake else []
    cases += ["few", "many"]
    found = {name: [in_child(name) for _ in range(options.repeats)] for name in cases}
    table = Table(title=f"Simulating traces\n{machine()}, commit {commit()}")
    columns = ("case", "replicas", "requests", "iterations", "seconds", "CPU s", "target",
               "requests/s", "peak MB", "hit rate")  # fmt: skip
    for column in columns:
        table.add_column(column, justify="left" if column == "case" else "right")
    figures: dict[str, float] = {}
    for name, runs in found.items():
        seconds, cpu_s = (statistics.median(run[key] for run in runs) for key in ("sim_s", "cpu_s"))
        one = runs[0]
        figures |= {f"{name}_s": seconds, f"{name}_cpu_s": cpu_s}
        figures |= {f"{name}_peak_mb": max(r["peak_mb"] for r in runs)}
        target = TARGETS_S.get(name)
        table.add_row(
            name.replace("_", " "), str(one["replicas"]), f"{one['requests']:,}",
            f"{one['iterations']:,}", f"{seconds:.2f}", f"{cpu_s:.2f}",
            f"{target:g}" if target else "",
            f"{one['requests'] / seconds:,.0f}", f"{figures[f'{name}_peak_mb']:.0f}",
            f"{one['hit_share']:.1%}",
        )  # fmt: skip
    # Of the processor's time: a neighbour on the machine does not lengthen it.
    each = [figures[f"{name}_cpu_s"] / found[name][0]["requests"] for name in ("few", "many")]
    figures["many_ratio"] = each[1] / each[0]
    console = Console(width=120)
    console.print(table)
    console.print(f"time per request, many over few: {figures['many_ratio']:.2f}")
    print(json.dumps(figures))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--azure", help="AzureLLMInferenceTrace_conv.csv")
    made.add_argument("--mooncake", help="mooncake_conversation_trace.jsonl")
    made.add_argument("--requests", type=int, default=100_000)
    made.add_argument("--repeats", type=int, default=3)
    made.add_argument("--child", help=argparse.SUPPRESS)
    return made


def measure(name: str, options: argparse.Namespace) -> dict[str, float]:
    """Simulate one case in this process."""
    replicas = 1 if name == "azure" else 4
    with tempfile.TemporaryDirectory() as folder:
        scenario = study(workload(name, options), replicas, Path(folder))
        setup = prepare(scenario)
    source = Source(scenario.workload, 0, setup.max_model_tokens)
    begin, cpu_begin = time.perf_counter(), time.process_time()
    engines = Engines(
        batching=scenario.policy.batching, limits=setup.limits,
        paces=[Costed(setup.cost)] * replicas, one_by_one=name.endswith("one_by_one"),
    )  # fmt: skip
    trace = simulate_replicas(source, scenario.policy.routing, engines)
    seconds, cpu_s = time.perf_counter() - begin, time.process_time() - cpu_begin
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    figures = summarise(scenario, setup, trace)
    return {
        "sim_s": seconds, "cpu_s": cpu_s, "peak_mb": peak_mb, "replicas": replicas,
        "requests": figures["num_requests"], "iterations": figures["num_iterations"],
        "hit_share": reused_share(trace),
    }  # fmt: skip


def workload(name: str, options: argparse.Namespace) -> Workload:
    """The requests of a case."""
    if name == "azure":
        return AzureTrace(path=options.azure)
    if name.startswith("mooncake"):
        return MooncakeTrace(path=options.mooncake)
    count = options.requests if name == "many" else max(options.requests // 10, 1)
    return Conversations(
        rate_per_s=24.0, num_requests=count, input_tokens=200, output_tokens=150,
        lengths=LengthDistribution.exponential, max_tokens=1500, system_tokens=1024,
        num_system_prompts=16, max_prompt_tokens=6000, hash_block_tokens=128,
    )  # fmt: skip


def study(requests: Workload, replicas: int, folder: Path) -> Scenario:
    """The scenario of a case; a model of this context is written into the folder."""
    config = json.loads(ARCHITECTURE.read_text(encoding="utf-8"))
    path = folder / "config.json"
    path.write_text(json.dumps({**config, "max_position_embeddings": CONTEXT}), encoding="utf-8")
    return Scenario(
        name="traces",
        model=Model(name="llama_3_8b", config=str(path)),
        gpu=load_gpu("h100_sxm"),
        engine=Engine(max_num_batched_tokens=8192, prefix_caching=replicas > 1),
        policy=Policies(
            batching=ChunkedPrefill(), routing=PrefixAware() if replicas > 1 else RoundRobin()
        ),
        workload=requests,
        num_replicas=replicas,
    )


def in_child(name: str) -> dict[str, float]:
    """One case in a process of its own, so that its peak memory is its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--child", name]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


if __name__ == "__main__":
    main()
