"""A rank's beats in the TCPStore: a number that grows every second while the process runs."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

from torch._C._distributed_c10d import TCPStore

__all__ = ["DONE", "Heartbeat", "TCPStore", "beats", "wants_processor"]

EVERY_S = 1.0
DONE = "0"
"""What a watched rank leaves behind: it will beat no more, and nothing is wrong."""


class Heartbeat:
    """Beats from a thread of its own until it is stopped.

    A rank whose store has gone, because its launcher died, ends itself.
    """

    def __init__(
        self, store: TCPStore, rank: int, watch: int = 0, silent_s: float = float("inf")
    ) -> None:
        """Begin to beat.

        Args:
            store: a connection that nothing else uses: a call that waits would hold the beat back.
            rank: whose beats they are.
            watch: how many ranks to watch; 0: somebody else does.
            silent_s: seconds after which one that was heard before counts as lost.
        """
        self._store, self._rank, self._watch, self._silent_s = store, rank, watch, silent_s
        self._stopped = threading.Event()
        self._heard: dict[int, tuple[int, float]] = {}
        threading.Thread(target=self._beat, daemon=True).start()

    def stop(self) -> None:
        """Beat no more; a watching rank counts this one as done."""
        self._stopped.set()

    def _beat(self) -> None:
        count = 0
        try:
            while not self._stopped.is_set():
                count += 1
                self._store.set(_key(self._rank), str(count))
                self._look(time.monotonic())
                self._stopped.wait(EVERY_S)
            if self._watch:
                self._store.set(_key(self._rank), DONE)
        except Exception:
            if not self._stopped.is_set():
                os._exit(1)

    def _look(self, now_s: float) -> None:
        """End this process when another is lost."""
        for rank, count in beats(self._store, self._watch).items():
            known, since_s = self._heard.get(rank, (-1, now_s))
            self._heard[rank] = (count, now_s if count != known else since_s)
            if count != int(DONE) and now_s - self._heard[rank][1] > self._silent_s:
                sys.stderr.write(
                    f"error: rank {rank} of {self._watch} has not beaten for {self._silent_s:g} s; "
                    f"it died, was stopped or hangs, and rank {self._rank} ends\n"
                )
                sys.stderr.flush()
                os._exit(1)


def beats(store: TCPStore, size: int) -> dict[int, int]:
    """How often each rank has beaten; those that never did are left out."""
    joined = [rank for rank in range(size) if store.check([_key(rank)])]
    return {rank: int(store.get(_key(rank))) for rank in joined}


def wants_processor(pid: int) -> bool:
    """Whether a thread of a process runs, waits for a core or for a disk; where Linux says so.

    A stopped process does not, and neither does one all of whose threads sleep.
    """
    try:
        tasks = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    except OSError:  # it has just ended, or this is no Linux
        return False
    return any(task.rpartition(")")[2].split()[0] in "RD" for task in tasks)


def _key(rank: int) -> str:
    return f"diptych/beat/{rank}"
