"""Are messages from M ranks to N faster than an all-to-all of all of them, uneven or padded?

Every attention rank has rows for every expert rank, of another number each time: between half and
one and a half of the mean, and padding holds the most. Timed one way, from when the last attention
rank hands in its rows to when the last expert rank has all of its own; ranks of one machine read
one clock. All ways and sizes take turns, so that a slow minute touches all of them.

    python benchmarks/m2n.py [--senders 2] [--receivers 2] [--rounds 300]
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from backends.collectives import Collectives, Sent, Tally
from backends.m2n import DISPATCH, Channel, Format, all_to_all_rows, padded_all_to_all_rows
from backends.ranks import run_ranks
from sim.provenance import commit, machine

HIDDEN = 128
MEAN_BYTES = (2**11, 2**13, 2**15, 2**17, 2**20)
"""Of the rows that one rank has for one other."""
WAYS = ("messages", "uneven", "padded")


class Job(NamedTuple):
    """One exchange, in one way."""

    way: str
    mean_bytes: int

    @property
    def mean_rows(self) -> int:
        """Of one message."""
        return self.mean_bytes // (4 * HIDDEN)

    @property
    def most_rows(self) -> int:
        """Of one message."""
        return -(-3 * self.mean_rows // 2)


JOBS = [Job(way, size) for size in MEAN_BYTES for way in WAYS]


def main() -> None:
    """Measure, print the table and, last, one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--senders", type=int, default=2)
    parser.add_argument("--receivers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=300)
    options = parser.parse_args()
    senders, size = options.senders, options.senders + options.receivers
    ranks = run_ranks(work, size, (senders, options.rounds))
    begun_s = np.max([instants for instants, _ in ranks[:senders]], axis=0)
    ended_s = np.max([instants for instants, _ in ranks[senders:]], axis=0)
    sent = [row for _, rows in ranks for row in rows]
    figures = {
        job: figures_of(job, ended_s[:, at] - begun_s[:, at], sent, size)
        for at, job in enumerate(JOBS)
    }
    title = f"{senders} ranks to {options.receivers}, gloo\n{machine()}, commit {commit()}"
    Console(width=110).print(table_of(title, figures))
    print(json.dumps({
        "senders": senders, "receivers": options.receivers, "rounds": options.rounds,
        "exchanges": [job._asdict() | row for job, row in figures.items()],
    }))  # fmt: skip


def figures_of(job: Job, seconds: Any, sent: list[Sent], size: int) -> dict[str, float]:
    """Latencies, and messages and payload bytes of all ranks in one exchange, on average."""
    rows = [one for one in sent if one.name.startswith(name_of(job))]
    # A collective of P ranks is P - 1 messages of each.
    messages = sum(one.calls * (size - 1 if one.peer == -1 else 1) for one in rows)
    rounds = len(seconds)
    return {
        "p50_s": float(np.percentile(seconds, 50)),
        "p90_s": float(np.percentile(seconds, 90)),
        "messages": messages / rounds,
        "payload_bytes": sum(one.payload_bytes for one in rows) / rounds,
    }


def table_of(title: str, figures: dict[Job, dict[str, float]]) -> Table:
    """A line a size and way, with how much longer it takes than messages."""
    table = Table(title=title)
    for name in ("mean message", "way", "p50 us", "p90 us", "messages", "payload bytes", "p50, x"):
        table.add_column(name, justify="left" if name == "way" else "right")
    for job, row in figures.items():
        ratio = row["p50_s"] / figures[Job("messages", job.mean_bytes)]["p50_s"]
        table.add_row(
            f"{job.mean_bytes // 1024:,} KiB", job.way, f"{row['p50_s'] * 1e6:,.0f}",
            f"{row['p90_s'] * 1e6:,.0f}", f"{row['messages']:.0f}", f"{row['payload_bytes']:,.0f}",
            f"{ratio:.2f}", end_section=job.way == WAYS[-1],
        )  # fmt: skip
    return table


def name_of(job: Job) -> str:
    """Under which its payload is counted, and the sizes of it."""
    return f"{job.way}/{job.mean_bytes}/"


def work(rank: int, size: int, senders: int, rounds: int) -> tuple[Any, list[Sent]]:
    """Instants [rounds, jobs] at which this rank began, or had everything, and what it sent."""
    tally = Tally(rank)
    world = Collectives(range(size), tally)
    bodies = [body_of(world, job, senders) for job in JOBS]
    instants = np.zeros((rounds + 1, len(JOBS)))
    stream = np.random.default_rng(0)  # the same on every rank
    for turn in range(rounds + 1):
        if turn == 1:  # the first touches its pages
            tally.clear()
        for at in stream.permutation(len(JOBS)).tolist():
            job = JOBS[at]
            least, most = job.mean_rows // 2, job.most_rows
            counts = np.zeros((size, size), np.int64)
            counts[:senders, senders:] = stream.integers(least, most + 1, (senders, size - senders))
            rows = torch.ones(int(counts[rank].sum()), HIDDEN)
            prepare, exchange = bodies[at]
            prepare()
            world.all_reduce(torch.zeros(1), "barrier")
            begun_s = time.perf_counter()
            exchange(rows, counts[rank].tolist())
            instants[turn, at] = begun_s if rank < senders else time.perf_counter()
    return instants[1:], tally.sent()


def body_of(
    world: Collectives, job: Job, senders: int
) -> tuple[Callable[[], None], Callable[[torch.Tensor, list[int]], object]]:
    """What this rank does before the barrier, and what is timed."""
    name = f"{name_of(job)}rows"
    if job.way == "uneven":
        return nothing, partial(all_to_all_rows, world, name=name)
    if job.way == "padded":
        return nothing, partial(padded_all_to_all_rows, world, capacity=job.most_rows, name=name)
    layout = Format(HIDDEN, torch.float32, 1, job.most_rows)
    sends = world.place < senders
    peers = range(senders, world.size) if sends else range(senders)
    channels = {peer: Channel(world, peer, layout, 1, DISPATCH) for peer in peers}

    def post() -> None:
        if not sends:
            for channel in channels.values():
                channel.post()

    def exchange(rows: torch.Tensor, counts: list[int]) -> None:
        parts = rows.split(counts)
        for peer, channel in channels.items():
            if sends:
                channel.send(parts[peer], [len(parts[peer])], name)
            else:
                channel.receive()

    return post, exchange


def nothing() -> None:
    """An all-to-all prepares nothing."""


if __name__ == "__main__":
    main()
