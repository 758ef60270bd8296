"""One dictionary of figures for a run: what tables, sweeps and comparisons show."""

from collections.abc import Callable

import numpy as np

from hardware_models.schema import Gpu
from sim import metrics
from sim.knowledge_metrics import clients_left, knowledge_figures, mean_search_s
from sim.length_latency import length_latencies, prompt_tokens_of
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
        "busy_share": metrics.busy_share(trace, _executors(scenario, setup), setup.lanes),
        **_transfers(trace, setup),
        "prefix_hit_share": (
            metrics.reused_share(trace) if scenario.engine.prefix_caching else float("nan")
        ),
        **knowledge_figures(trace, setup.limits.block_size * setup.kv_bytes_per_token),
        **_efficiency(scenario, setup, trace, duration_s),
    }
    return figures


def latencies(trace: Trace, times: RequestTimes, *, steady: bool = True) -> dict[str, float]:
    """Mean and percentiles of TTFT, TPOT, ITL and end-to-end latency; what TTFT is made of."""
    parts = metrics.ttft_parts(trace, times)
    columns = {"ttft": times.ttft_s, "tpot": times.tpot_s, "e2e": times.e2e_s}
    figures: dict[str, float] = {}
    for name, values in columns.items():
        known = values[~np.isnan(values)]
        figures[f"{name}_mean_s"] = float(known.mean()) if len(known) else float("nan")
        for q in PERCENTILES:
            figures[f"{name}_p{q}_s"] = float(np.percentile(known, q)) if len(known) else np.nan
    by_length = length_latencies(times, prompt_tokens_of(trace, times))
    figures["per_token_latency_mean_s"] = by_length.per_token_s
    figures["input_latency_mean_s"] = by_length.input_s
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
    if len(trace.steps["instant_s"]):
        moved = int(trace.kv_moves["tokens"].sum()) * setup.kv_bytes_per_token
        never = float("nan")
        return {"hand_over_mean_s": never, "hand_over_p99_s": never, "kv_bytes_moved": moved}
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
    computes = setup.experts is None or scenario.experts.prefill_here
    done = work_done(trace, setup.architecture, setup.kv_bytes_per_token, computes_prompts=computes)
    output = int(trace.requests["output_tokens"].sum())
    busy = metrics.busy_share(trace, _executors(scenario, setup), setup.lanes)
    price = _of_gpus(scenario, setup, lambda gpu: gpu.price and gpu.price.usd_per_hour)
    multiple = _of_gpus(scenario, setup, lambda gpu: gpu.price and gpu.price.relative_to_l20)
    power_w = _of_gpus(scenario, setup, lambda gpu: gpu.power and gpu.power.limit_w)
    dtype = scenario.model.dtype.value
    peak = _of_gpus(scenario, setup, lambda gpu: gpu.peak.flops_per_s.get(dtype))
    count, nan = num_gpus(scenario, setup), float("nan")
    return {
        "flops": done.flops,
        "flops_utilisation": done.flops / duration_s / peak if peak else nan,
        "kv_bytes_written": done.kv_bytes_written,
        "kv_bytes_read": done.kv_bytes_read,
        "num_gpus": count,
        "throughput_tokens_per_s_per_gpu": output / duration_s / count if count else nan,
        "price_of_l20s": multiple or nan,
        "usd_per_hour": price or nan,
        "usd_per_million_output_tokens": (
            price * duration_s / 3600 / output * 1e6 if price else nan
        ),
        "joules_per_output_token_at_power_limit": (
            power_w * busy * duration_s / output if power_w else nan
        ),
    }


def num_gpus(scenario: Scenario, setup: Setup) -> int:
    """GPUs that are paid for: those that serve, however many more their nodes have."""
    if setup.experts is not None:
        return setup.experts.num_gpus
    if not (scenario.gpu or (scenario.machine and scenario.machine.gpu)):
        return 0
    return scenario.num_replicas * scenario.tp_size * scenario.pp_size


def _of_gpus(scenario: Scenario, setup: Setup, of: Callable[[Gpu], float | None]) -> float | None:
    """The sum of something over all GPUs; None where it is not known of one."""
    if setup.experts is not None:
        return setup.experts.total(of)
    gpu = scenario.gpu or (scenario.machine.gpu if scenario.machine else None)
    value = of(gpu) if gpu is not None else None
    return None if value is None else value * num_gpus(scenario, setup)


def _executors(scenario: Scenario, setup: Setup) -> int:
    """What iterations are numbered by: attention nodes, or replicas."""
    if setup.experts is not None:
        return setup.experts.plan.deployment.attention.num_nodes
    return scenario.num_replicas
