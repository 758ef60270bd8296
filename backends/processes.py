"""How processes are started: forked from a server that has imported torch, once for all of them.

Importing torch takes seconds of a processor, in which replicas and ranks would load one after the
other on a small machine. The server imports and does nothing else: it has no threads, no model and
no CUDA context to inherit. Where there is none (Windows), each process imports for itself.
"""

import multiprocessing
import os
from collections.abc import Callable, Mapping
from multiprocessing.context import ForkServerContext, SpawnContext

START_METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
_PRELOADED = ["backends.serving"]


def process_context() -> "ForkServerContext | SpawnContext":
    """What processes and their pipes are made by."""
    if START_METHOD == "spawn":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


def adopt_environment(environment: Mapping[str, str]) -> None:
    """Called first in a process: take over its parent's variables of now.

    The server has those of the time at which it was started. What torch read while it was
    imported there, such as OMP_NUM_THREADS, stays as it was then.
    """
    os.environ.clear()
    os.environ.update(environment)


def in_environment(
    environment: Mapping[str, str], work: Callable[..., object], *arguments: object
) -> None:
    """What a process does whose parent has these variables: `work(*arguments)`."""
    adopt_environment(environment)
    work(*arguments)
