"""Figures as people read them: units, intervals, rich tables."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from sim.result import Figure

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

LATENCIES = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2e": "end to end"}
STATISTICS = ("mean", "p50", "p90", "p99")
TTFT_PARTS = {
    "exposed_search_mean_s": "search not hidden",
    "queue_mean_s": "queue",
    "prefill_mean_s": "prefill",
    "interference_mean_s": "interference",
}
OTHERS = {
    "throughput_requests_per_s": "throughput",
    "throughput_tokens_per_s": "output",
    "goodput_requests_per_s": "goodput",
    "slo_share": "met the SLO",
    "per_token_latency_mean_s": "end to end, per token of prompt and answer",
    "input_latency_mean_s": "TTFT, per token of the prompt",
    "busy_share": "busy",
    "prefix_hit_share": "of prompt tokens from the prefix cache",
    "document_hit_share": "of retrieved documents cached",
    "gpu_hit_share": "of them on the GPU",
    "host_hit_share": "of them in host memory",
    "search_mean_s": "search, from arrival to its end",
    "num_speculations_stopped": "generations stopped for other documents",
    "num_clients_left": "clients that left without a full answer",
    "num_gpu_losses": "losses of all KV on the GPU",
    "kv_bytes_swapped_out": "KV copied to host memory",
    "kv_bytes_loaded": "KV loaded from host memory",
    "hand_over_mean_s": "from first token to decoding elsewhere",
    "kv_bytes_moved": "KV moved between instances",
    "flops_utilisation": "of peak FLOP/s",
    "num_preemptions": "pre-emptions",
    "num_rerouted": "requests sent again after a death",
    "rerouted_tokens": "their tokens, prompt and answer so far",
    "usd_per_hour": "price of the GPUs per hour",
    "usd_per_million_output_tokens": "price per 1 M output tokens",
    "joules_per_output_token_at_power_limit": "energy per output token at the power limit",
    "duration_s": "simulated time",
}
"""What a run's table shows besides latencies."""

ONLY_AFTER_MISHAPS = ("num_rerouted", "rerouted_tokens", "num_clients_left", "num_gpu_losses")
"""Left out where they are zero."""


def console(*, errors: bool = False) -> Console:
    """Where tables go; wide enough for them where the output is no terminal."""
    from rich.console import Console

    stream = sys.stderr if errors else sys.stdout
    width = None if stream.isatty() else 140
    return Console(file=stream, width=width, highlight=False, soft_wrap=False)


def grid(title: str | None, *columns: str, left: int = 1) -> Table:
    """A plain table; all but the first `left` columns hold numbers."""
    from rich import box
    from rich.table import Table

    table = Table(
        title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold",
        pad_edge=False, header_style="bold",
    )  # fmt: skip
    for place, name in enumerate(columns):
        table.add_column(name, justify="left" if place < left else "right", no_wrap=True)
    return table


def heading(figure: str) -> str:
    """A figure over a column: TTFT p99."""
    first, _, rest = figure.removesuffix("_s").partition("_")
    return f"{LATENCIES.get(first, first)} {rest.replace('_', ' ')}".replace("usd", "USD")


def number(value: float) -> str:
    """Three digits that matter; whole numbers in full."""
    if not math.isfinite(value):
        return "-"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if 0 < abs(value) < 1e-9:
        return "0"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"


def unit(name: str, value: float) -> tuple[float, str]:
    """By what to multiply a figure of this name, and what to write behind it."""
    if name.endswith("_per_s"):
        return 1.0, f" {name.split('_')[-3]}/s"
    if name.endswith("_s"):
        scales = ((1.0, " s"), (1e-3, " ms"), (1e-6, " µs"))
        fitting = ((1 / scale, text) for scale, text in scales if abs(value) >= scale)
        return next(fitting, (1.0, " s") if value == 0 else (1e6, " µs"))
    if name.endswith(("_share", "utilisation")):
        return 100.0, " %"
    if "bytes" in name:
        return 2.0**-30, " GiB"
    if name == "flops":
        return 1e-12, " TFLOP"
    return 1.0, {"usd": " USD", "joules": " J"}.get(name.partition("_")[0], "")


def quantity(name: str, value: float) -> str:
    """A figure of a summary with its unit, which follows from its name."""
    if not math.isfinite(value):
        return "-"
    scale, text = unit(name, value)
    return number(value * scale) + text


def seconds(value: float) -> str:
    """A time in the unit that suits it."""
    return quantity("time_s", value)


def with_interval(name: str, figure: Figure) -> str:
    """A figure and half of its 95 % interval, in one unit."""
    if not figure.half or not math.isfinite(figure.half):
        return quantity(name, figure.mean)
    scale, text = unit(name, figure.mean)
    return f"{number(figure.mean * scale)} ± {number(figure.half * scale)}{text}"


def latency_table(figures: Mapping[str, Figure]) -> Table:
    """TTFT, TPOT, ITL and end-to-end latency, mean and percentiles."""
    table = grid(None, "", *STATISTICS)
    for key, label in LATENCIES.items():
        names = [f"{key}_{statistic}_s" for statistic in STATISTICS]
        table.add_row(label, *(with_interval(name, figures[name]) for name in names))
    return table


def other_table(figures: Mapping[str, Figure]) -> Table:
    """Rates, shares, price and energy; what is not known is left out."""
    table = grid(None, "", "")
    table.show_header = False
    for name, label in OTHERS.items():
        # Results that were saved before a figure was there lack it.
        if name not in figures or (name in ONLY_AFTER_MISHAPS and not figures[name].mean):
            continue
        if not math.isnan(figures[name].mean):
            table.add_row(label, with_interval(name, figures[name]))
    return table


def show_result(
    figures: Mapping[str, Figure], overloaded: str, shares: Mapping[str, float]
) -> None:
    """Print the figures of one result.

    Args:
        figures: by name, as `sim.summary` gives them.
        overloaded: why there are no latencies, or an empty string.
        shares: of the simulated time, by where its costs come from.
    """
    out = console()
    if overloaded:
        out.print(f"[bold red]overloaded[/]: {overloaded}")
    else:
        out.print(latency_table(figures))
        known = {name: figures[name].mean for name in TTFT_PARTS if name in figures}
        parts = [
            f"{TTFT_PARTS[name]} {seconds(mean)}"
            for name, mean in known.items()
            if not math.isnan(mean)
        ]
        out.print(f"mean TTFT = {' + '.join(parts)}")
    out.print(other_table(figures))
    out.print("costs: " + ", ".join(f"{share:.0%} {source}" for source, share in shares.items()))


def overload_reason(num_overloaded: int, num_seeds: int) -> str:
    """What to print instead of latencies, or an empty string."""
    if not num_overloaded:
        return ""
    where = f" in {num_overloaded} of {num_seeds} seeds" if num_seeds > 1 else ""
    return (
        f"requests came in faster than they were answered{where}, so there is no steady state and "
        "latencies depend on how long one waits; lower the rate or add capacity"
    )


def clip(texts: Sequence[str], most: int = 4) -> str:
    """The first few of many, with their number."""
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + more
