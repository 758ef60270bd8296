"""How near do elastic instances come to LoongServe's published figures?

Every verified figure of the paper (arXiv 2404.09526) that a simulation can have, beside ours. All
systems have the same eight A800 and costs fitted to the authors' measured iterations, so that what
differs is how they schedule. Beside these iterations, vLLM 0.3 has an overhead that is fitted to
four points of its curve on ShareGPT, so that its rates there are no prediction; the others have
none. Lengths of the datasets are assumed where only their ranges are published
(`sim/workload/dataset_lengths.py`).

    python benchmarks/loongserve.py [--scale 1] [--workers 2] [--figures 10,11,12,13]
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from joblib import Parallel, delayed
from loongserve_fit import decode_rows, prefill_rows
from published import Report, at, below
from rich.console import Console
from rich.progress import Progress

from hardware_models.parts import load_scaling
from scenarios.compose import compose_study
from scenarios.study import Study
from sim.deployment import simulate_seed
from sim.length_latency import (
    LOONGSERVE_SLO_TWO_NODES,
    LOONGSERVE_SLOS,
    LatencySlo,
    LengthSlo,
    length_latencies,
    prompt_tokens_of,
)
from sim.max_rate import MaxRate, max_rate
from sim.metrics import request_times
from sim.setup import prepare
from sim.trace import DECODE, Trace
from sim.workload.long_context import Dataset
from sim.workload.recorded import Recorded

STUDY = "loongserve_rate"
CHUNKS = {"sharegpt": 256, "l_eval": 2048, "lv_eval": 16_384, "mixed": 2048}
"""Tokens of a chunk, as the authors set LightLLM for each dataset; 512 for the Zipf mixes."""
REQUESTS = {"sharegpt": 20_000, "l_eval": 3000, "lv_eval": 200, "mixed": 800}
"""Of one run: the most that the authors sent at the rates near the crossing. Means of an overloaded
run grow with its length, so that fewer would find higher rates. 4,000 of a Zipf mix."""
OUT_OF_ORDER = {"sharegpt": 1, "l_eval": 8, "lv_eval": 8, "mixed": 4}
"""Admissions in a row that may pass over an earlier request, as the authors set it for each
dataset; 64 for the Zipf mixes."""
SEATS = {"l_eval": 256, "lv_eval": 256}
"""Of LoongServe, where not 1,024."""
LONGEST = {"sharegpt": 2300, "l_eval": 210_500, "lv_eval": 497_300, "mixed": 497_300}
"""Prompt tokens."""
METRICS = ("per_token_s", "input_s", "output_s")
FIG_10 = {
    # dataset: metric: req/s of LoongServe, vLLM, LightLLM, DistServe; inf: the SLO is never missed.
    "sharegpt": ((29.470, 6.351, 23.128, 10.366), (24.866, 6.224, 22.073, 10.060),
                 (math.inf, 6.457, math.inf, 10.138)),
    "l_eval": ((2.416, 1.144, 1.231, 0.415), (2.249, 1.203, 1.226, 0.629),
               (math.inf, 0.753, 1.225, 0.120)),
    "lv_eval": ((0.201, 0.090, 0.082, None), (0.201, 0.091, 0.083, None),
                (math.inf, 0.024, 0.019, None)),
    "mixed": ((0.553, 0.208, 0.144, None), (0.516, 0.215, 0.153, None),
              (math.inf, 0.114, 0.083, None)),
}  # fmt: skip
NAMES = {
    "elastic_sp": "LoongServe", "vllm": "vLLM", "chunked": "LightLLM SplitFuse",
    "prefill_decode": "DistServe", "static_sp": "static SP", "static_tp": "static TP",
    "replicas": "replicas",
}  # fmt: skip
FIG_10_SYSTEMS = ("elastic_sp", "vllm", "chunked", "prefill_decode")
FIG_11 = {"elastic_sp": (0.825, 0.776), "vllm": (0.443, 0.451), "chunked": (0.245, 0.249)}
"""Two nodes, mixed, per token and input: read off a figure."""
TWO_NODES = {
    "elastic_sp": ("num_replicas=8", "policy.instance_plan.decode_round_s=0.025"),
    "vllm": ("num_replicas=2",),
    "chunked": ("num_replicas=2",),
}
FIG_12 = {
    "1_0": (1.122, 0.405, 0.481, 0.360), "1_2": (2.925, 1.355, 1.478, 1.289),
    "1_4": (8.757, 5.723, 5.447, 5.000),
}  # fmt: skip
FIG_12_SYSTEMS = ("elastic_sp", "static_tp", "static_sp", "replicas")
"""All four are the authors' own engine, whose prompts wait for ten rounds of decoding."""
REPLICAS = 4
MISS_SHARE = 0.1
"""P90 goodput: the rate at which so many miss their SLO."""
NEVER = 1.4
"""Up to so many times the rate of the first metric the others are searched."""


class Outcome(NamedTuple):
    """One run."""

    latencies: tuple[float, ...]
    """Per token, of the input and of the output, in seconds: means over all requests."""
    missed: float
    """Share of the requests that miss the SLO in proportion to their length."""
    scale_ups_per_10_s: float
    took_s: float


def overrides(system: str, workload: str, rate: float, scale: float) -> list[str]:
    """What a point sets in the study."""
    count = max(round(scale * REQUESTS.get(workload, 4000)), 40)
    found = [
        f"workload={workload}", f"workload.rate_per_s={rate}", f"workload.num_requests={count}",
    ]  # fmt: skip
    if system != "replicas":
        found.append(f"serving={system}")
    if system == "elastic_sp":
        skips = OUT_OF_ORDER.get(workload, 64)
        found.append(f"policy.instance_plan.max_out_of_order={skips}")
        found.append(f"engine.max_num_seqs={SEATS.get(workload, 1024)}")
    if system == "chunked":
        found.append(f"engine.max_num_batched_tokens={max(CHUNKS.get(workload, 512), 1024)}")
        found.append(f"policy.batching.chunk_tokens={CHUNKS.get(workload, 512)}")
    return found


def simulate(settings: Sequence[str]) -> Outcome:
    """Run a point of the study."""
    return _outcome(compose_study(STUDY, settings))


def simulate_replicas(settings: Sequence[str]) -> Outcome:
    """Single instances, each of which gets every fourth request: round robin."""
    study = compose_study(STUDY, ["serving=static_sp", *settings, "num_replicas=1"])
    (columns,) = study.workload.columns(study.seeds[0])
    found: list[Outcome] = []
    for place in range(REPLICAS):
        study.workload = Recorded(
            arrival_s=columns.arrival_s[place::REPLICAS].tolist(),
            prompt_tokens=columns.prompt_tokens[place::REPLICAS].tolist(),
            output_tokens=columns.output_tokens[place::REPLICAS].tolist(),
            max_output_tokens=study.workload.max_output_tokens,
        )
        found.append(_outcome(study))
    per_token_s, input_s, output_s = (
        sum(one) / REPLICAS for one in zip(*(each.latencies for each in found), strict=True)
    )
    missed = sum(one.missed for one in found) / REPLICAS
    took_s = sum(one.took_s for one in found)
    return Outcome((per_token_s, input_s, output_s), missed, 0.0, took_s)


def _outcome(scenario: Study) -> Outcome:
    setup = prepare(scenario)
    begin_s = time.perf_counter()
    trace = simulate_seed(scenario, setup, scenario.seeds[0])
    took_s = time.perf_counter() - begin_s
    times = request_times(trace)
    prompts = prompt_tokens_of(trace, times)
    slo = LengthSlo(scaling=load_scaling("lwm_7b_a800_tp2"))
    return Outcome(
        tuple(length_latencies(times, prompts)), 1 - slo.attainment(times, prompts),
        _scale_ups(trace) / float(trace.iterations["end_s"].max()) * 10, took_s,
    )  # fmt: skip


def _scale_ups(trace: Trace) -> int:
    """Masters that had no KV of their batch before."""
    members = trace.members
    new = (members["kind"] == DECODE) & (members["requests"] > 0) & (members["tokens"] == 0)
    return int(new.sum())


class Search(NamedTuple):
    """One system on one workload: its highest rates."""

    system: str
    workload: str
    start_per_s: float
    scale: float
    slo: LatencySlo | None
    """None: the SLO in proportion to the length, of which a tenth may miss."""
    more: tuple[str, ...] = ()
    """Further settings."""

    def rates(self) -> list[MaxRate]:
        """The highest rate under each latency of the SLO, or under the SLO by length."""
        known: dict[float, Outcome] = {}

        def outcome(rate: float) -> Outcome:
            if rate not in known:
                settings = overrides(self.system, self.workload, rate, self.scale)
                run = simulate_replicas if self.system == "replicas" else simulate
                known[rate] = run([*settings, *self.more])
            return known[rate]

        if self.slo is None:
            return [max_rate(lambda rate: outcome(rate).missed / MISS_SHARE, self.start_per_s)]
        limits = [getattr(self.slo, name) for name in METRICS]
        found: list[MaxRate] = []
        for place, limit in enumerate(limits):
            highest = None
            if found and math.isfinite(found[0].rate_per_s) and found[0].rate_per_s:
                highest = max(NEVER * found[0].rate_per_s, self.start_per_s)
            found.append(
                max_rate(
                    lambda rate, place=place, limit=limit: outcome(rate).latencies[place] / limit,
                    self.start_per_s, highest_per_s=highest,
                )
            )  # fmt: skip
        return found


def refused(system: str, dataset: str) -> bool:
    """Whether a system has no room for the longest prompt of a dataset."""
    setup = prepare(compose_study(STUDY, overrides(system, dataset, 1.0, 1.0)))
    slots = setup.limits.num_blocks * setup.limits.block_size
    if setup.elastic is not None:
        slots = setup.elastic.slots
    return slots < LONGEST[dataset]


def searches(figures: Sequence[int], scale: float) -> dict[tuple[int, str, str], Search]:
    """What is searched for, by figure, workload and system. What is refused is left out."""
    found: dict[tuple[int, str, str], Search] = {}
    if 10 in figures:
        for dataset, rows in FIG_10.items():
            for place, system in enumerate(FIG_10_SYSTEMS):
                if not refused(system, dataset):
                    slo = LOONGSERVE_SLOS[Dataset(dataset)]
                    start = rows[0][place] or rows[0][0]
                    found[10, dataset, system] = Search(system, dataset, start, scale, slo)
    if 11 in figures:
        for system, (start, _) in FIG_11.items():
            more = (*TWO_NODES[system], "cluster=a800_80g_x8_by_2", "node=null")
            slo = LOONGSERVE_SLO_TWO_NODES
            found[11, "mixed", system] = Search(system, "mixed", start, scale, slo, more)
    if 12 in figures:
        for alpha, published in FIG_12.items():
            for system, start in zip(FIG_12_SYSTEMS, published, strict=True):
                found[12, alpha, system] = Search(system, f"zipf_{alpha}", start, scale, None)
    if 13 in figures:
        for name, more in {"with": (), "without": ("policy.instance_plan.scale_up=false",)}.items():
            found[13, "sharegpt", name] = Search("elastic_sp", "sharegpt", 20.0, scale, None, more)
    return found


Rates = dict[tuple[int, str, str], list[MaxRate]]


def figure_10(report: Report, rates: Rates) -> None:
    """The highest rate under each SLO, and what LoongServe gains over each other."""
    for dataset, rows in FIG_10.items():
        for metric, published in zip(METRICS, rows, strict=True):
            ours = [_rate(rates, (10, dataset, one), metric) for one in FIG_10_SYSTEMS]
            where = f"Fig. 10 {dataset} {metric.removesuffix('_s').replace('_', ' ')}"
            for system, theirs, value in zip(FIG_10_SYSTEMS, published, ours, strict=True):
                _row(report, where, f"{NAMES[system]}, req/s", theirs, value)
            for system, theirs, value in list(zip(FIG_10_SYSTEMS, published, ours, strict=True))[
                1:
            ]:
                if theirs and value and math.isfinite(published[0]) and math.isfinite(ours[0] or 0):
                    gain, our_gain = published[0] / theirs, (ours[0] or 0) / value
                    report.add(where, f"over {NAMES[system]}", at(gain), our_gain)


def _rate(rates: Rates, key: tuple[int, str, str], metric: str) -> float | None:
    """None: refused."""
    if key not in rates:
        return None
    return rates[key][METRICS.index(metric)].rate_per_s


def _row(report: Report, where: str, what: str, theirs: float | None, ours: float | None) -> None:
    """A rate; one that is never reached, or refused, is said in words."""
    if theirs is not None and ours is not None and math.isfinite(theirs) and math.isfinite(ours):
        report.add(where, what, at(theirs), ours, "{:.3f}")
        return
    said = [_word(theirs), _word(ours)]
    agree = "as published" if said[0] == said[1] else "other"
    report.rows.append((where, what, *said, agree))
    if ours is not None and math.isfinite(ours):
        report.note(f"{where} {what}", ours)


def _word(rate: float | None) -> str:
    if rate is None:
        return "out of memory"
    return "never missed" if math.isinf(rate) else f"{rate:.3f}"


def figure_11(report: Report, rates: Rates) -> None:
    """Two nodes."""
    for place, metric in enumerate(("per token", "input")):
        ours = {system: rates[11, "mixed", system][place].rate_per_s for system in FIG_11}
        for system, published in FIG_11.items():
            where = f"Fig. 11 {metric}"
            report.add(where, f"{NAMES[system]}, req/s", at(published[place]), ours[system])
            if system != "elastic_sp":
                gain = FIG_11["elastic_sp"][place] / published[place]
                report.add(
                    where, f"over {NAMES[system]}", at(gain), ours["elastic_sp"] / ours[system]
                )


def figure_12(report: Report, rates: Rates) -> None:
    """Goodput of the Zipf mixes."""
    for alpha, published in FIG_12.items():
        where = f"Fig. 12 alpha {alpha.replace('_', '.')}"
        ours = [rates[12, alpha, system][0].rate_per_s for system in FIG_12_SYSTEMS]
        for system, theirs, value in zip(FIG_12_SYSTEMS, published, ours, strict=True):
            report.add(where, f"{NAMES[system]}, req/s", at(theirs), value)
        gain, our_gain = published[0] / max(published[1:]), ours[0] / max(ours[1:])
        report.add(where, "over the best other", at(gain), our_gain)


def figure_13(report: Report, rates: Rates, scale: float) -> None:
    """Scale-up."""
    ours = [rates[13, "sharegpt", name][0].rate_per_s for name in ("with", "without")]
    report.add("Fig. 13", "goodput with scale-up over without", at(2.87), ours[0] / ours[1])
    for name, value in zip(("with", "without"), ours, strict=True):
        report.note(f"Fig. 13 {name} scale-up, req/s", value)
    busy = simulate(overrides("elastic_sp", "sharegpt", 25.0, scale))
    report.add("Fig. 13", "scale-ups in 10 s at 25 req/s", at(7.12), busy.scale_ups_per_10_s)


def fits(report: Report) -> None:
    """How near the coefficients come to what was measured; no prediction."""
    for name, rows, most in (("prefill", prefill_rows(), 0.05), ("decode", decode_rows(), 0.08)):
        for row in rows:
            if row.ratio or not math.isfinite(row.error):
                continue
            largest = 0.20 if "500" in row.label and name == "decode" else most
            report.add(
                f"fit, {name}", f"{row.base} {row.label}", below(largest), abs(row.error), "{:.3f}"
            )
            report.note(f"fit {name} {row.base} {row.label} left out", row.left_out_error)
    ratios = [abs(row.error) for row in decode_rows() if row.ratio]
    report.add("Fig. 14", "largest error of masters' ratios", below(0.10), max(ratios))
    errors = [abs(row.error) for row in prefill_rows()]
    report.add("Fig. 15", "largest error of the prefill model", below(0.10), max(errors))


def main() -> None:
    """Simulate, print the table and, last, one JSON line."""
    parser = argparse.ArgumentParser(description="LoongServe: published, simulated")
    parser.add_argument("--scale", type=float, default=1.0, help="of the requests of each run")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--figures", default="10,11,12,13")
    options = parser.parse_args()
    figures = [int(one) for one in options.figures.split(",")]
    report = Report()
    fits(report)
    wanted = searches(figures, options.scale)
    rates: Rates = {}
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("searching rates", total=len(wanted))
        run = Parallel(n_jobs=options.workers, return_as="generator_unordered")
        searched = run(delayed(_searched)(*item) for item in wanted.items())
        assert searched is not None
        for key, found in searched:
            rates[key] = found
            progress.advance(task)
    shown: dict[int, Callable[[], None]] = {
        10: lambda: figure_10(report, rates),
        11: lambda: figure_11(report, rates),
        12: lambda: figure_12(report, rates),
        13: lambda: figure_13(report, rates, options.scale),
    }
    for figure in figures:
        shown[figure]()
    report.note("runs", sum(one.num_runs for found in rates.values() for one in found))
    report.show(f"LoongServe: published and simulated, {options.scale:g} of the requests of a run")
    print(json.dumps(report.figures))


def _searched(
    key: tuple[int, str, str], search: Search
) -> tuple[tuple[int, str, str], list[MaxRate]]:
    return key, search.rates()


if __name__ == "__main__":
    main()
