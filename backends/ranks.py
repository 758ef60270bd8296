"""Several ranks, one process each: started, watched, and ended with a cause when one is lost.

Each rank beats in the TCPStore every second. Who launched them names a rank that died, that stopped
or that never joined, and ends the others: a lost rank costs seconds, not a hang.
"""

from __future__ import annotations

import os
import pickle
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from backends.collectives import BACKEND
from backends.heartbeat import Heartbeat, TCPStore, beats, wants_processor
from backends.processes import START_METHOD, adopt_environment, process_context

SILENT_S = 6.0
"""A rank that has not beaten for so long, and waits for no processor, has stopped."""
ASLEEP_S = 1.0
"""How long it must be seen not to wait for one."""
STARVED_S = 60.0
"""A rank that has not beaten for so long is lost, even if it waits for a processor."""
WATCH_S = 8.0
"""The same under torchrun, where ranks see each other's beats and nothing else."""
JOIN_S = 9.0
"""A rank that has not joined so long after the first one never will, unless that took longer."""
START_S = 120.0
"""No rank at all has joined after so long."""
POLL_S = 0.1

Work = Callable[..., Any]
"""Run by every rank as work(rank, size, *arguments); it and its arguments can be pickled."""


@dataclass(frozen=True, slots=True)
class _Job:
    """What a rank needs to know to join and to work."""

    work: Work
    arguments: tuple[Any, ...]
    size: int
    port: int
    folder: Path
    device: str
    environment: dict[str, str]


def run_ranks(
    work: Work, size: int, arguments: tuple[Any, ...] = (), device: str = "cpu"
) -> list[Any]:
    """Run `work(rank, size, *arguments)` in a process a rank; what each returned, by rank.

    Raises:
        ValueError: fewer than one rank, fewer GPUs than ranks, or a rank raised one.
        ChildProcessError: a rank was lost or failed; the message names it and says why.
    """
    require_ranks(size, device)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory(prefix="diptych-ranks-") as folder:
        job = _Job(work, arguments, size, store.port, Path(folder), device, dict(os.environ))
        process_context()  # so that what `start_processes` takes by its name imports ahead
        context: Any = start_processes(
            _rank, (job,), nprocs=size, join=False, start_method=START_METHOD
        )
        try:
            _Supervisor(context.processes, store, Path(folder)).wait()
        finally:
            for process in context.processes:
                process.kill()  # not terminate: a stopped process would not hear it
                process.join()
        return [_load(Path(folder) / f"returned-{rank}") for rank in range(size)]


def require_ranks(size: int, device: str) -> None:
    """Refuse a number of ranks that this machine cannot run.

    Raises:
        ValueError: fewer than one rank, or fewer GPUs than ranks.
    """
    if size < 1:
        raise ValueError(f"ranks={size} must be at least 1")
    if device == "cuda" and torch.cuda.device_count() < size:
        raise ValueError(
            f"{size} ranks with device=cuda need a GPU each, and torch sees "
            f"{torch.cuda.device_count()}; take fewer ranks or device=cpu"
        )


def join(rank: int, size: int, store: TCPStore, device: str = "cpu") -> None:
    """Make this process a rank: gloo for CPU tensors, NCCL for CUDA tensors, one thread."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    place = torch.device(device, rank) if device == "cuda" else None
    if place is not None:
        torch.cuda.set_device(place)
    backend = BACKEND if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)


def run_under_torchrun(work: Work, arguments: tuple[Any, ...] = (), device: str = "cpu") -> Any:
    """Run `work` as the rank that torchrun's environment names; what it returns.

    Every rank watches the others' beats and ends with a message when one is lost.

    Raises:
        ValueError: the environment is not torchrun's.
    """
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in os.environ]
    if missing:
        raise ValueError(f"{', '.join(missing)} not in the environment; start this by torchrun")
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

    def connect() -> TCPStore:
        # torchrun's agent holds the store already.
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return TCPStore(host, port, is_master=False, timeout=timedelta(seconds=START_S))

    heart = Heartbeat(connect(), rank, watch=size, silent_s=WATCH_S)
    join(rank, size, connect(), device)
    try:
        return work(rank, size, *arguments)
    finally:
        heart.stop()
        dist.destroy_process_group()


def _rank(rank: int, job: _Job) -> None:
    """A launched process: join, work, leave what came of it in the folder."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the launcher hears it and ends us
    adopt_environment(job.environment)
    wait = timedelta(seconds=START_S)
    try:
        heart = Heartbeat(TCPStore("127.0.0.1", job.port, is_master=False, timeout=wait), rank)
        store = TCPStore("127.0.0.1", job.port, is_master=False, timeout=wait)
        join(rank, job.size, store, job.device)
        returned = job.work(rank, job.size, *job.arguments)
        _save(job.folder / f"returned-{rank}", returned)
        dist.barrier()  # nobody's sockets close while another still talks
        dist.destroy_process_group()
        heart.stop()
    except Exception as error:
        _save(job.folder / f"failed-{rank}", (time.monotonic(), _described(error)))
        os._exit(1)  # at once: clean-up would wait for ranks that will not answer


def _described(error: Exception) -> tuple[str, str]:
    return type(error).__name__, str(error)


class _Supervisor:
    """Waits for all ranks, or for the first that is lost."""

    def __init__(self, processes: Any, store: TCPStore, folder: Path) -> None:
        self._processes, self._store, self._folder = processes, store, folder
        self._size = len(processes)
        self._start_s = time.monotonic()
        self._beats: dict[int, int] = {}
        self._heard_s: dict[int, float] = {}
        self._awake_s: dict[int, float] = {}
        self._first_join_s: float | None = None

    def wait(self) -> None:
        """Return when all ranks have ended well.

        Raises:
            ValueError: of a rank.
            ChildProcessError: a rank was lost or failed.
        """
        while True:
            codes = [process.exitcode for process in self._processes]
            if any(codes):
                self._explain_exit()
            if all(code == 0 for code in codes):
                return
            self._listen(codes)
            time.sleep(POLL_S)

    def _listen(self, codes: list[int | None]) -> None:
        """Hear the beats of those that run.

        Raises:
            ChildProcessError: one is silent.
        """
        now_s = time.monotonic()
        for rank, count in beats(self._store, self._size).items():
            if count != self._beats.get(rank):
                self._beats[rank], self._heard_s[rank] = count, now_s
        if self._first_join_s is None and self._beats:
            self._first_join_s = now_s
        for rank, code in enumerate(codes):
            if code is not None:
                continue
            if rank in self._heard_s and self._is_silent(rank, now_s):
                silent_s = now_s - self._heard_s[rank]
                raise self._lost(
                    rank, f"has not beaten for {silent_s:.0f} s; it was stopped or hangs"
                )
            if rank not in self._heard_s and self._is_late(now_s):
                raise self._lost(rank, "never joined")

    def _is_silent(self, rank: int, now_s: float) -> bool:
        """Whether a rank that beat before is lost. On a crowded machine a live one may be late."""
        silent_s = now_s - self._heard_s[rank]
        if silent_s <= SILENT_S or wants_processor(self._processes[rank].pid):
            self._awake_s[rank] = now_s
        return silent_s > STARVED_S or now_s - self._awake_s[rank] > ASLEEP_S

    def _is_late(self, now_s: float) -> bool:
        if self._first_join_s is None:
            return now_s - self._start_s > START_S
        # On a busy machine the first one took long too: the others get as long again.
        allowed_s = max(JOIN_S, self._first_join_s - self._start_s)
        return now_s - self._first_join_s > allowed_s

    def _explain_exit(self) -> None:
        """Say who was lost first: others fail a moment later, for want of it.

        Raises:
            ValueError: the first to fail raised one.
            ChildProcessError: anything else.
        """
        time.sleep(5 * POLL_S)
        codes = [process.exitcode for process in self._processes]
        for rank, code in enumerate(codes):
            if code is not None and code < 0:
                raise self._lost(rank, f"was killed by {signal.Signals(-code).name}")
        failures = []
        for rank, code in enumerate(codes):
            if (path := self._folder / f"failed-{rank}").exists():
                failures.append((*_load(path), rank))
            elif code:
                raise self._lost(rank, f"left with exit code {code}")
        _, (kind, message), rank = min(failures)
        if kind == "ValueError":
            raise ValueError(message)
        raise self._lost(rank, f"failed with {kind}: {message}")

    def _lost(self, rank: int, what: str) -> ChildProcessError:
        after_s = time.monotonic() - self._start_s
        return ChildProcessError(
            f"rank {rank} of {self._size} {what} ({after_s:.0f} s after the start); the run was "
            "ended; start it again, with fewer ranks if it was out of memory"
        )


def _save(path: Path, value: object) -> None:
    path.with_suffix(".part").write_bytes(pickle.dumps(value))
    path.with_suffix(".part").rename(path)


def _load(path: Path) -> Any:
    """What one of our own processes left in our own folder a moment ago."""
    return pickle.loads(path.read_bytes())
