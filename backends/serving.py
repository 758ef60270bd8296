"""Serve a workload for real in one call: what validation and benchmarks run."""

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch

from backends.exchange import Exchange
from backends.executor import Executor
from backends.gguf_conversion import Progress
from backends.kv_cache import Corruption
from backends.replica import Prompts, Replica
from backends.sampling import Sampler
from backends.tokenizer import prompt_token_ids, request_token_ids
from backends.transformer import Transformer
from backends.weights import Model, find_model, load_model, random_model
from sim.engine import ReplicaLimits
from sim.policies.batching.base import Batching
from sim.policies.batching.static import Static
from sim.trace import Trace
from sim.workload.recorded import Recorded
from sim.workload.source import Source

RANDOM = "random"
"""Name of a model of random weights, the tiny one where no configuration is given."""


class Served(NamedTuple):
    """What a real run gives back; bytes as its own tensors counted them."""

    trace: Trace
    answers: dict[int, list[int]]
    """Token ids of every answer."""
    kv_bytes_written: int
    kv_bytes_read: int
    kv_bytes_freed: int


def use_one_thread() -> None:
    """The replica runs on one thread, so that a second core leaves its times alone."""
    torch.set_num_threads(1)


def require_model(source: str, device: str) -> None:
    """Refuse weights or a device that are not there, before anything is computed.

    Raises:
        ValueError: no such model or device.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda needs a CUDA device and torch sees none; take device=cpu")
    if source != RANDOM:
        find_model(source)


def open_model(
    source: str,
    device: str,
    progress: Progress | None = None,
    config: Mapping[str, object] | None = None,
) -> tuple[Model, Transformer]:
    """Load weights and lay them out on a device, in float32.

    Args:
        source: as `load_model` takes it, or `random`.
        device: where the model computes.
        progress: told of each step of a conversion.
        config: of random weights, the values of a config.json; None: that of the tiny model.

    Raises:
        ValueError: no such model, an unreadable checkpoint, or no such device.
    """
    require_model(source, device)
    model = random_model(config) if source == RANDOM else load_model(source, progress=progress)
    return model, Transformer(model.config, model.weights, device, torch.float32)


def serve(  # noqa: PLR0913  the parts of an engine
    model: Executor,
    source: Source,
    batching: Batching,
    limits: ReplicaLimits,
    *,
    seed: int = 0,
    prompts: Prompts | None = None,
    sampler: Sampler | None = None,
    corruption: Corruption | None = None,
    warmed: Callable[[], object] | None = None,
) -> Served:
    """Warm up, then serve a source at its arrival times; t = 0 is after the warm-up.

    Args:
        model: what to run.
        source: requests; their arrival times are kept.
        batching: the policy.
        limits: of the engine.
        seed: of the prompts' tokens.
        prompts: token ids of each prompt; None draws them from the seed.
        sampler: None is greedy.
        corruption: a fault to put into the KV cache.
        warmed: called between the warm-up and t = 0.
    """
    replica = make_replica(
        model, batching, limits, seed=seed, prompts=prompts, sampler=sampler, corruption=corruption
    )
    if warmed is not None:
        warmed()
    with without_collections():
        trace = replica.serve(source)
    cache = replica.cache
    cache.flush()  # all that was written has then been freed, or was lost
    return Served(trace, replica.answers, cache.written_bytes, cache.read_bytes, cache.freed_bytes)


def make_replica(  # noqa: PLR0913  the parts of an engine
    model: Executor,
    batching: Batching,
    limits: ReplicaLimits,
    *,
    seed: int = 0,
    prompts: Prompts | None = None,
    sampler: Sampler | None = None,
    corruption: Corruption | None = None,
    number: int = 0,
) -> Replica:
    """A replica that is warm; see `serve`."""
    warm_up(model, limits)
    return fresh_replica(
        model, batching, limits, seed=seed, prompts=prompts, sampler=sampler,
        corruption=corruption, number=number,
    )  # fmt: skip


def fresh_replica(  # noqa: PLR0913  the parts of an engine
    model: Executor,
    batching: Batching,
    limits: ReplicaLimits,
    *,
    seed: int = 0,
    prompts: Prompts | None = None,
    sampler: Sampler | None = None,
    corruption: Corruption | None = None,
    number: int = 0,
    exchange: Exchange | None = None,
) -> Replica:
    """A replica with an empty cache, of a model that is warm; see `serve`."""
    vocabulary = model.config.vocab_size
    cache = model.new_cache(limits.num_blocks, limits.block_size)
    cache.corrupt = cache.prefixes.corrupt = corruption
    return Replica(
        model=model,
        cache=cache,
        batching=batching,
        limits=limits,
        prompts=prompts or (lambda request: request_token_ids(seed, request, vocabulary)),
        sampler=sampler or Sampler(),
        number=number,
        exchange=exchange,
    )


@contextmanager
def without_collections() -> Iterator[None]:
    """No garbage collection of what is there in mid-run: a stall that no policy caused.

    What is garbage already waits until after the run. Collecting it first would take longer than
    many runs do, and frees little: models and caches are in no cycle.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def warm_up(model: Executor, limits: ReplicaLimits) -> None:
    """Prepare for all sizes of batches, then serve a few requests, so that no first call is timed.

    Above 128 tokens only every 32nd size is prepared: there the first call costs little beside the
    work.
    """
    most = min(limits.max_num_batched_tokens, model.max_context)
    model.warm_up([*range(1, min(most, 128) + 1), *range(160, most + 1, 32)],
                  range(1, limits.max_num_seqs + 1))  # fmt: skip
    blocks = max(min(limits.num_blocks, 64), 4)
    small = ReplicaLimits(8, 256, limits.block_size, blocks)
    tokens = min(16, blocks * limits.block_size // 4)
    few = Recorded(arrival_s=[0.0] * 3, prompt_tokens=[tokens] * 3, output_tokens=[3] * 3)
    Replica(
        model=model,
        cache=model.new_cache(small.num_blocks, small.block_size),
        batching=Static(),
        limits=small,
        prompts=lambda r: prompt_token_ids(0, r.request_id, r.prompt_tokens, 64),
        sampler=Sampler(),
    ).serve(Source(few, 0, model.max_context))
