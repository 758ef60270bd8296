"""How processes are started: forked from a server that has imported torch, once for all of them.

Importing torch takes seconds of a processor, in which replicas and ranks would load one after the
other on a small machine. The server imports and does nothing else: it has no threads, no model and
no CUDA context to inherit. Where there is none (Windows), each process imports for itself.
"""

import multiprocessing
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
