"""What ranks do in the tests; a spawned process imports it by name."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import torch

from backends.collectives import Collectives, Tally
from backends.emulated_link import EmulatedLink


def tensor_of(rank: int, rows: int, seed: int = 0) -> torch.Tensor:
    """What a rank hands in, float64 [rows, 3]: any process can make it."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    return torch.randint(-50, 50, (rows, 3), generator=generator).double()


def everything(rank: int, size: int, send_rows: list[list[int]]) -> dict[str, object]:
    """Every operation once; send_rows[i][j] rows go from i to j in the uneven exchange."""
    tally = Tally(rank)
    group = Collectives(range(size), tally)
    assert tally.sent() == []
    rows, mine = 2 * size, tensor_of(rank, 2 * size)
    uneven = tensor_of(rank, sum(send_rows[rank]), seed=1)
    found: dict[str, object] = {
        "all_reduce": group.all_reduce(mine.clone(), "sum"),
        "reduce_scatter": group.reduce_scatter(mine, "part"),
        "all_gather": group.all_gather(mine, "whole"),
        "all_to_all": group.all_to_all(mine, "even"),
        "uneven": group.all_to_all(
            uneven, "uneven", send_rows[rank], [row[rank] for row in send_rows]
        ),
        "broadcast": group.broadcast(mine.clone(), "from_last", size - 1),
    }
    if size > 1:
        group.send(mine, "ring", (rank + 1) % size)
        found["receive"] = group.receive(torch.empty(rows, 3).double(), (rank - 1) % size)
        group.flush()
    found["sent"] = tally.sent()
    return found


def in_halves(rank: int, size: int) -> torch.Tensor:
    """Two groups at once: the sum over the half that this rank is in."""
    halves = [range(size // 2), range(size // 2, size)]
    tally = Tally(rank)
    groups = [Collectives(half, tally) for half in halves]
    mine = next(group for group in groups if group.place >= 0)
    return mine.all_reduce(torch.tensor([2.0**rank]), "half")


def over_a_slow_link(rank: int, size: int, latency_s: float) -> dict[str, object]:
    """What arrives over an emulated link, how late, and how much of the wait was computing."""
    link = EmulatedLink(latency_s=latency_s, bandwidth_bytes_per_s=1e6)
    group = Collectives(range(size), Tally(rank), link=link)
    payload = torch.full((25_000,), float(rank))  # 0.1 s at that bandwidth
    start_s, busy_s = time.monotonic(), time.process_time()
    if rank == 0:
        group.send(payload, "one", 1)
        group.send(payload + 7, "two", 1)
        waits = [time.monotonic() - start_s]
        values = []
    else:
        values, waits = [], []
        for _ in range(2):
            values.append(float(group.receive(torch.empty(25_000), 0)[-1]))
            waits.append(time.monotonic() - start_s)
    before_s = time.monotonic()
    total = group.all_reduce(payload.clone(), "sum")
    return {
        "values": values,
        "waits": waits,
        "sum": float(total[0]),
        "all_reduce_s": time.monotonic() - before_s,
        "busy_s": time.process_time() - busy_s,
    }


def lose(rank: int, size: int, who: int, how: str) -> None:
    """One rank is lost while the others wait for it."""
    group = Collectives(range(size), Tally(rank))
    if rank == who:
        if how == "raise":
            raise ValueError("tokens=-1 must not be negative")
        if how == "fail":
            raise RuntimeError("out of luck")
        if how == "leave":
            os._exit(7)
        os.kill(os.getpid(), getattr(signal, how))
    group.all_reduce(torch.ones(4), "wait")


def stop_for_a_while(rank: int, size: int) -> None:
    """The last rank is stopped, and killed much later, when torchrun would wait for it longer."""
    group = Collectives(range(size), Tally(rank))
    if rank == size - 1:
        command = ["sh", "-c", f"sleep 13; kill -9 {os.getpid()}"]
        subprocess.Popen(command, start_new_session=True)
        os.kill(os.getpid(), signal.SIGSTOP)
    group.all_reduce(torch.ones(4), "wait")


def sum_of_ranks(rank: int, size: int) -> float:
    group = Collectives(range(size), Tally(rank))
    return float(group.all_reduce(torch.tensor([float(rank)]), "sum"))


def wait_for_ever(rank: int, size: int, folder: str) -> None:
    """Says which process it is, and stays."""
    del rank, size
    (Path(folder) / f"pid-{os.getpid()}").touch()
    time.sleep(1000)


def variable(rank: int, size: int, name: str) -> str | None:
    """A variable of the environment, as this process sees it."""
    del rank, size
    return os.environ.get(name)
