"""One dictionary of figures for a run: what tables, sweeps and comparisons show."""

import numpy as np

from sim import metrics
from sim.knowledge_metrics import clients_left, knowledge_figures, mean_search_s
from sim.metrics import RequestTimes, Slo
from sim.scenario import Scenario
from sim.setup import Setup
from sim.trace import Trace
from sim.work_done import work_done

PERCENTILES = (50, 90, 99)


def summarise(scenario: Scenario, setup: Setup, trace: Trace) -> dict[str, float]:
    """All figures of one run. Latencies are of the steady window; see `metrics.steady_window`.

    An overloaded run has no steady state: its latencies are not a number, and `overloaded` is 1.
    """
    times = metrics.request_times(trace)
    overloaded = metrics.is_overloaded(times)
    window = metrics.steady_window(times, scenario.warm_up, scenario.drain)
    counted = RequestTimes._make(column[window] for column in times)
    duration_s = float(trace.iterations["end_s"].max() - times.arrival_s.min())
    figures: dict[str, float] = {
        "num_requests": len(times.request),
        "counted_requests": len(counted.request),
        "overloaded": float(overloaded),
        "duration_s": duration_s,
        **_rates(times, scenario.slo, duration_s, clients_left(trace)),
        **latencies(trace, counted, steady=not overloaded),
        "num_preemptions": int(times.num_preemptions.sum()),
        **metrics.rerouted(trace),
        "num_iterations": trace.num_iterations,
        "num_decisions": len(trace.decisions["repeat"]),
        "busy_share": metrics.busy_share(trace, scenario.num_replicas, setup.lanes),
        **_transfers(trace, setup),
        "prefix_hit_share": (
            metrics.reused_share(trace) if scenario.engine.prefix_caching else float("nan")
        ),
        **knowledge_figures(trace, setup.limits.block_size * setup.kv_bytes_per_token),
        **_efficiency(scenario, setup, trace, duration_s),
    }
    return figures


def latencies(trace: Trace, times: RequestTimes, *, steady: bool = True) -> dict[str, float]:
    """Mean and percentiles of TTFT, TPOT, ITL and end-to-end latency, and the parts of TTFT."""
    parts = metrics.ttft_parts(trace, times)
    columns = {"ttft": times.ttft_s, "tpot": times.tpot_s, "e2e": times.e2e_s}
    figures: dict[str, float] = {}
    for name, values in columns.items():
        known = values[~np.isnan(values)]
        figures[f"{name}_mean_s"] = float(known.mean()) if len(known) else float("nan")
        for q in PERCENTILES:
            figures[f"{name}_p{q}_s"] = float(np.percentile(known, q)) if len(known) else np.nan
    gaps = metrics.inter_token_gaps(trace, times.request)
    figures["itl_mean_s"] = gaps.mean()
    figures |= {f"itl_p{q}_s": gaps.percentile(q) for q in PERCENTILES}
    names = ("exposed_search", "queue", "prefill", "interference")
    figures |= {
        f"{name}_mean_s": float(values.mean()) if len(values) else float("nan")
        for name, values in zip(names, parts, strict=True)
    }
    figures["search_mean_s"] = mean_search_s(trace, times.request)
    if np.isnan(figures["search_mean_s"]):
        figures["exposed_search_mean_s"] = float("nan")
    return figures if steady else dict.fromkeys(figures, float("nan"))


def _transfers(trace: Trace, setup: Setup) -> dict[str, float]:
    """How long requests took from their first token to decoding elsewhere, and what KV moved."""
    tokens = trace.hand_overs["kv_tokens"].tolist()
    names = ("hand_over_mean_s", "hand_over_p99_s", "kv_bytes_moved")
    if not tokens:
        return dict.fromkeys(names, float("nan"))
    took_s = metrics.hand_over_s(trace)
    moved = sum(map(setup.kv_bytes_moved, tokens))
    return dict(zip(names, (float(took_s.mean()), float(np.percentile(took_s, 99)), moved),
                    strict=True))  # fmt: skip


def _rates(times: RequestTimes, slo: Slo, duration_s: float, num_left: int) -> dict[str, float]:
    """Rates, and the share that met the SLO: a client that left is one that did not."""
    met = metrics.met_slo(times, slo)
    return {
        "throughput_requests_per_s": len(times.request) / duration_s,
        "throughput_tokens_per_s": float(times.output_tokens.sum()) / duration_s,
        "goodput_requests_per_s": float(met.sum()) / duration_s,
        "slo_share": float(met.sum()) / (len(met) + num_left),
    }


def _efficiency(
    scenario: Scenario, setup: Setup, trace: Trace, duration_s: float
) -> dict[str, float]:
    """FLOPs, bytes, and what time on the device costs where price and power are published."""
    done = work_done(trace, setup.architecture, setup.kv_bytes_per_token)
    gpu = scenario.gpu or (scenario.machine.gpu if scenario.machine else None)
    output = int(trace.requests["output_tokens"].sum())
    devices = max(num_gpus(scenario), 1)
    busy = metrics.busy_share(trace, scenario.num_replicas, setup.lanes)
    price = gpu.price.usd_per_hour if gpu and gpu.price else None
    rent = price * num_gpus(scenario) if price else None
    power_w = gpu.power.limit_w if gpu and gpu.power else None
    peak = gpu.peak.flops_per_s.get(scenario.model.dtype.value) if gpu else None
    return {
        "flops": done.flops,
        "flops_utilisation": done.flops / duration_s / peak / devices if peak else float("nan"),
        "kv_bytes_written": done.kv_bytes_written,
        "kv_bytes_read": done.kv_bytes_read,
        "num_gpus": num_gpus(scenario),
        "usd_per_hour": rent if rent else float("nan"),
        "usd_per_million_output_tokens": (
            rent * duration_s / 3600 / output * 1e6 if rent else float("nan")
        ),
        "joules_per_output_token_at_power_limit": (
            power_w * devices * busy * duration_s / output if power_w else float("nan")
        ),
    }


def num_gpus(scenario: Scenario) -> int:
    """GPUs that are paid for: those that serve, however many more their nodes have."""
    if not (scenario.gpu or (scenario.machine and scenario.machine.gpu)):
        return 0
    return scenario.num_replicas * scenario.tp_size * scenario.pp_size
