"""How long do the decisions of elastic instances take, and what do bounds on splits cost?

The dynamic programme that forms batches (LoongServe, section 5.3), exact and with the paper's
bounds: time by requests and instances, and over random cases how often and by how much the
bounded one misses the least. Then whole decisions at the end of a round, with none or some waiting.

    python benchmarks/elastic_decisions.py [--cases 300] [--repeats 9]
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

import numpy as np
from numpy.random import Generator
from rich.console import Console
from rich.table import Table

from hardware_models.scaling import DecodeScaling, PrefillScaling, ScalingBase
from sim.engine import ReplicaLimits
from sim.policies.elastic import DecodeBatch
from sim.policies.instance_plan._elastic_batching import Search, partition
from sim.policies.instance_plan.elastic_sp import ElasticSp
from sim.provenance import commit, machine
from sim.requests import RequestView
from sim.units import MS

SLOTS = 210_000
"""Of an instance of two A800."""
SIZES = ((1, 4), (5, 4), (30, 4), (100, 8), (1000, 4), (1000, 16))
"""Requests and instances that are timed."""
SMALL, LARGE = (8, 4), (60, 8)
"""Requests and instances of the cases on which the versions are compared."""
LIMITS = ReplicaLimits(2048, 500_000, 1, SLOTS)
BATCH = 400
"""Requests of each batch that decodes."""
Figures = dict[str, float]


def scaling(degrees: int) -> ScalingBase:
    """LWM-7B on instances of two A800: interpolated from what is published."""
    prefill = [
        PrefillScaling(
            base_s=(10 + 7 * d) * 1e-3,
            token_s=3e-5 / d * (1 + 0.11 * (d - 1)),
            square_s=7.8e-10 / d,
        )
        for d in range(1, degrees + 1)
    ]
    decode = DecodeScaling(
        base_s=9.8e-3, request_s=0.0, master_request_s=1.5e-5, context_token_s=4.76e-8
    )
    return ScalingBase(
        name="a800_tp2", model="lwm_7b", device="a800", tp_size=2, prefill=prefill, decode=decode,
        source="fitted to published iteration times",
    )  # fmt: skip


def case(draws: Generator, size: tuple[int, int]) -> tuple[list[int], list[int]]:
    """Long-tailed lengths that fit, and free slots, both in the order that is asked for."""
    requests, instances = size
    free = np.sort(draws.integers(SLOTS // 2, SLOTS + 1, instances))[::-1]
    lengths = np.exp(draws.uniform(np.log(10), np.log(100_000), requests))
    lengths *= min(1.0, 0.7 * free.sum() / lengths.sum())
    return np.sort(lengths.astype(np.int64) + 1)[::-1].tolist(), free.tolist()


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Median seconds of the processor: others may have it in between."""
    found: list[float] = []
    for _ in range(repeats):
        begin = time.thread_time()
        work()
        found.append(time.thread_time() - begin)
    return median(found)


def timed(search: Search, size: tuple[int, int], repeats: int) -> float:
    """Of one partition; cases change from one repeat to the next."""
    draws, base = np.random.default_rng(0), scaling(size[1])
    cases = iter([case(draws, size) for _ in range(repeats)])
    return seconds(lambda: partition(*next(cases), base, search=search), repeats)


def gaps(size: tuple[int, int], count: int) -> Figures:
    """How far the bounded version is above the least."""
    draws, base = np.random.default_rng(1), scaling(size[1])
    found: list[float] = []
    for _ in range(count):
        lengths, free = case(draws, size)
        exact = partition(lengths, free, base)
        bounded = partition(lengths, free, base, search=Search.monotone)
        if exact is not None and bounded is not None:
            found.append(max(0.0, bounded.cost / exact.cost - 1))
    gap = np.array(found)
    off = float((gap > 1e-9).mean())
    return {"share_off": off, "mean_gap": float(gap.mean()), "worst_gap": float(gap.max())}


@dataclass
class View:
    """Four instances, three of which decode a batch each."""

    waiting: list[RequestView]
    limits: ReplicaLimits = LIMITS
    scaling: ScalingBase = field(default_factory=lambda: scaling(4))
    live: tuple[int, ...] = (0, 1, 2, 3)
    prefilling: frozenset[int] = frozenset()
    decoding: frozenset[int] = frozenset()
    in_round: bool = False
    num_running: int = 3 * BATCH
    rounds: int = 1000
    finished: tuple[int, int] = (1000, 200_000)
    batches: list[DecodeBatch] = field(init=False)
    free_slots: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.batches = [batch(number) for number in range(3)]
        self.free_slots = SLOTS - np.sum([one.tokens for one in self.batches], axis=0)

    def given_up(self, request_id: int) -> np.ndarray:
        """Nobody is pre-empted here."""
        raise AssertionError(request_id)


def batch(number: int) -> DecodeBatch:
    """One that has an instance to itself."""
    draws = np.random.default_rng(number)
    context, generated = draws.integers(4, 400, BATCH), draws.integers(1, 200, BATCH)
    tokens = np.zeros(4, np.int64)
    tokens[number] = context.sum()
    ids = np.arange(BATCH) + number * BATCH
    return DecodeBatch(number, (number,), ids, generated, 1024 - generated, context, tokens)


def step_s(num_waiting: int, repeats: int) -> float:
    """Of one decision at the end of a round, with so many that wait and may be admitted."""
    waiting = [RequestView(10_000 + n, 0.0, 50 + 13 * n, 512) for n in range(num_waiting)]
    plan, view = ElasticSp(), View(waiting)
    memories = iter([plan.init() for _ in range(repeats)])
    return seconds(lambda: plan.step(next(memories), view), repeats)


def main() -> None:
    """Measure, print the table and, last, one JSON line."""
    parser = argparse.ArgumentParser(description="Time of elastic decisions")
    parser.add_argument("--cases", type=int, default=300, help="on which versions are compared")
    parser.add_argument("--repeats", type=int, default=9, help="of each size")
    options = parser.parse_args()
    figures: Figures = {}
    table = Table(title=f"Decisions of elastic instances\n{machine()}, commit {commit()}")
    for column in ("what", "exact", "monotone"):
        table.add_column(column, no_wrap=True)
    for size in SIZES:
        both = [timed(search, size, options.repeats) / MS for search in Search]
        name = f"{size[0]} requests, {size[1]} instances"
        table.add_row(f"batches of {name} (ms)", *[f"{one:.2f}" for one in both])
        figures |= {
            f"{s.value}_{size[0]}x{size[1]}_ms": t for s, t in zip(Search, both, strict=True)
        }
    for size in (SMALL, LARGE):
        found = gaps(size, options.cases)
        for name, value in found.items():
            label = f"{name.replace('_', ' ')}, {size[0]} requests, {size[1]} instances"
            table.add_row(label, "0", f"{value:.2%}")
            figures[f"{name}_{size[0]}x{size[1]}"] = value
    for waiting in (0, 1, 5, 50):
        took = step_s(waiting, 20 * options.repeats) / MS
        table.add_row(f"a decision, {waiting} wait (ms)", f"{took:.3f}", "")
        figures[f"step_{waiting}_waiting_ms"] = took
    Console(width=120).print(table)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
