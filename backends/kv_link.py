"""Moves the KV blocks of requests between the processes of instances, beside their iterations.

One thread a process sends or receives. The instance that decodes asks for a request over a pipe of
the pair and receives its blocks in one message; the instance that prefilled sends when it is asked.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from multiprocessing.connection import Connection, wait
from typing import NamedTuple

import torch
from torch import Tensor

from backends.collectives import Collectives
from backends.kv_cache import PagedKVCache

NAME = "kv"
"""Under which what is sent is counted."""


class Fetch(NamedTuple):
    """Blocks that come from another instance."""

    request_id: int
    source: int
    blocks: list[int]
    """Where they go, in order."""


def pack(cache: PagedKVCache, blocks: list[int]) -> Tensor:
    """Keys and values of blocks [2 * layers, blocks, ...], each block as it lies in memory."""
    index = torch.tensor(blocks, device=cache.layers[0].key.device)
    return torch.stack([part.index_select(0, index) for part in _pools(cache)])


def unpack(cache: PagedKVCache, blocks: list[int], packed: Tensor) -> None:
    """Write what `pack` gave into other blocks."""
    index = torch.tensor(blocks, device=packed.device)
    for part, rows in zip(_pools(cache), packed, strict=True):
        part.index_copy_(0, index, rows)


def empty_pack(cache: PagedKVCache, blocks: list[int]) -> Tensor:
    """Room for what `pack` gives of so many blocks."""
    pools = _pools(cache)
    return pools[0].new_empty((len(pools), len(blocks), *pools[0].shape[1:]))


def _pools(cache: PagedKVCache) -> list[Tensor]:
    """Keys and values of all layers, blocks first, in the order in which they lie in memory."""
    parts = [part for layer in cache.layers for part in layer]
    return [part if part.is_contiguous() else part.transpose(1, 2) for part in parts]


def _own_stream(device: torch.device) -> AbstractContextManager[object]:
    """Copies and messages do not wait for the iterations of the process, on a GPU either."""
    return torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext()


class Sender:
    """Sends a request's blocks to whoever asks for them."""

    def __init__(
        self, group: Collectives, device: torch.device, pipes: Mapping[int, Connection],
        sent: Callable[[int], object],
    ) -> None:  # fmt: skip
        """Begin to listen.

        Args:
            group: of all instances.
            device: of their caches.
            pipes: to each instance that may ask.
            sent: told of each request whose blocks have arrived, by the thread that sends.
        """
        self._group, self._device, self._pipes, self._sent = group, device, pipes, sent
        self._held: dict[int, tuple[PagedKVCache, list[int]]] = {}
        threading.Thread(target=self._serve, daemon=True).start()

    def hold(self, request_id: int, cache: PagedKVCache, blocks: list[int]) -> None:
        """Keep these blocks ready; they do not change until they were sent."""
        self._held[request_id] = cache, blocks

    def _serve(self) -> None:
        listening = {pipe: target for target, pipe in self._pipes.items()}
        with torch.inference_mode(), _own_stream(self._device):
            while listening:
                for pipe in wait(listening):
                    assert isinstance(pipe, Connection)
                    request_id = pipe.recv()
                    if request_id is None:
                        del listening[pipe]
                        continue
                    cache, blocks = self._held.pop(request_id)
                    self._group.send(pack(cache, blocks), NAME, listening[pipe])
                    self._group.flush()
                    self._sent(request_id)


class Receiver:
    """Fetches requests' blocks, one request after the other."""

    def __init__(
        self, group: Collectives, device: torch.device, pipes: Mapping[int, Connection],
        arrived: Callable[[int], object],
    ) -> None:  # fmt: skip
        """Begin to wait for work.

        Args:
            group: of all instances.
            device: of their caches.
            pipes: to each instance that may be asked.
            arrived: told of each request whose blocks are here, by the thread that receives.
        """
        self._group, self._device, self._pipes, self._arrived = group, device, pipes, arrived
        self._wanted: queue.SimpleQueue[tuple[Fetch, PagedKVCache] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def fetch(self, fetch: Fetch, cache: PagedKVCache) -> None:
        """Begin to copy into blocks that are taken already."""
        self._wanted.put((fetch, cache))

    def stop(self) -> None:
        """No more will be fetched: those who listen end too."""
        self._wanted.put(None)
        self._thread.join()

    def _serve(self) -> None:
        with torch.inference_mode(), _own_stream(self._device):
            while (work := self._wanted.get()) is not None:
                fetch, cache = work
                self._pipes[fetch.source].send(fetch.request_id)
                packed = self._group.receive(empty_pack(cache, fetch.blocks), fetch.source)
                unpack(cache, fetch.blocks, packed)
                if packed.is_cuda:
                    torch.cuda.current_stream().synchronize()
                self._arrived(fetch.request_id)
        for pipe in self._pipes.values():
            pipe.send(None)
