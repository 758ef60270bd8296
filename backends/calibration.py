"""Times iterations of the real replica batch by batch, through the loop that serves requests."""

import math
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from backends.arrivals import Arrivals
from backends.executor import Executor
from backends.observed import Sequence as Stay
from backends.replica import Replica
from backends.sampling import Sampler
from backends.tokenizer import prompt_token_ids
from backends.transformer import synchronise
from sim.costs.calibration_plan import BatchPlan
from sim.costs.fitting import STALL, Measured
from sim.engine import ReplicaLimits
from sim.policies.batching.base import Batch, Batching, ReplicaView
from sim.provenance import processor
from sim.requests import Request
from sim.workload.recorded import Recorded
from sim.workload.source import Source

BLOCK_SIZE = 16
NEVER_ENDS = 1 << 20
"""Output tokens of a request whose iteration is timed: it must not finish."""

Advance = Callable[[], None]


@dataclass(kw_only=True)
class Scripted(Batching):
    """Returns one given batch: what to time is not decided but asked for."""

    batch: Batch

    def next_batch(self, memory: Any, view: ReplicaView) -> Batch:
        """The batch that was asked for."""
        del memory, view
        return self.batch


class Passes:
    """Timings of planned batches, pass by pass, so that they can be spread over time.

    A slow minute of a shared machine then touches all batches, or none of them much.
    """

    def __init__(self, model: Executor, plans: Sequence[BatchPlan], advance: Advance) -> None:
        """Time every batch once without keeping it: first calls of a shape are slower.

        Args:
            model: what the replica runs.
            plans: the batches.
            advance: called after each timing.
        """
        self._model = model
        self._plans = plans
        self._advance = advance
        self._seconds: list[list[float]] = [[] for _ in plans]
        model.warm_up(
            {plan.shape.tokens for plan in plans},
            {plan.shape.sampled_tokens for plan in plans} - {0},
        )
        for plan in plans:
            time_batch(model, plan)
            advance()

    def time(self, part: int = 0, parts: int = 1) -> None:
        """Time every batch once more, or every `parts`-th one from `part` on."""
        for index in range(part, len(self._plans), parts):
            self._seconds[index].append(time_batch(self._model, self._plans[index]))
            self._advance()

    def measured(self, first: int = 0) -> list[Measured]:
        """Mean seconds of each batch over the passes from `first` on, in order of the plans.

        The mean, because a request's latency is a sum; without stalls, which say nothing about the
        batch that they met.
        """
        return [
            Measured(plan.shape, _mean_without_stalls(seconds[first:]))
            for plan, seconds in zip(self._plans, self._seconds, strict=True)
        ]

    def spread(self) -> float:
        """By how much the same batch differs from its mean when it is timed again, the median."""
        repeated = [np.array(seconds) for seconds in self._seconds if len(seconds) > 1]
        deviations = [np.abs(seconds / seconds.mean() - 1) for seconds in repeated]
        return float(np.median(np.concatenate(deviations))) if deviations else 0.0

    def jitter(self) -> list[float]:
        """Every timing over the mean of its batch, as if there were passes without number.

        A pass that is slow as a whole is no jitter. Empty after a single pass.
        """
        num_passes = min(map(len, self._seconds))
        if num_passes < 2:
            return []
        seconds = np.array([timings[:num_passes] for timings in self._seconds])
        ratios = seconds / np.median(seconds, axis=1, keepdims=True)
        ratios /= np.median(ratios, axis=0)
        # Few timings lie closer to their own middle than to the mean of many: Bessel's correction.
        ratios = 1 + (ratios - 1) * math.sqrt(num_passes / (num_passes - 1))
        ratios = np.maximum(ratios, 0.0) / ratios[ratios <= STALL].mean()
        return ratios.ravel().tolist()


def _mean_without_stalls(seconds: Sequence[float]) -> float:
    limit = STALL * statistics.median(seconds)
    return statistics.mean(value for value in seconds if value <= limit)


def time_batch(model: Executor, plan: BatchPlan) -> float:
    """Seconds of one iteration of a fresh replica that computes exactly this batch."""
    stays = _stays(model, plan)
    chunks = tuple((index, tokens) for index, (tokens, _) in enumerate(plan.chunks))
    batch = Batch(prefill=chunks, decode=bool(plan.contexts))
    tokens = [len(stay.tokens) + 1 for stay in stays]
    num_blocks = sum(-(-count // BLOCK_SIZE) for count in tokens)
    limits = ReplicaLimits(len(stays), sum(tokens), BLOCK_SIZE, num_blocks)
    replica = Replica(
        model=model,
        cache=model.new_cache(num_blocks, BLOCK_SIZE),
        batching=Scripted(batch=batch),
        limits=limits,
        prompts=lambda _: [],
        sampler=Sampler(),
    )
    for stay in stays:
        replica.seat(stay)
    idle = Arrivals(Source(Recorded(arrival_s=[0.0], prompt_tokens=[1], output_tokens=[1]), 0, 2))
    synchronise(model.device)
    start = time.perf_counter()
    replica.step(0.0, start, idle)
    return time.perf_counter() - start


def _stays(model: Executor, plan: BatchPlan) -> list[Stay]:
    """Requests in the state in which the batch finds them, chunks first."""
    rest = 0 if plan.ends else 1  # a token of the prompt that the chunk leaves for later
    wanted = [(before + tokens + rest, before) for tokens, before in plan.chunks]
    wanted += [(context, context - 1) for context in plan.contexts]
    vocabulary = model.config.vocab_size
    stays: list[Stay] = []
    for index, (tokens, computed) in enumerate(wanted):
        decodes = index >= len(plan.chunks)
        stays.append(
            Stay(
                request=Request(index, 0.0, tokens - decodes, NEVER_ENDS, NEVER_ENDS),
                tokens=prompt_token_ids(0, index, tokens, vocabulary),
                computed=computed,
                prefill_target=tokens - decodes,
            )
        )
    return stays


def fingerprint(device: str) -> str:
    """What must be the same for a calibration to hold: processor or GPU, system, device."""
    name = torch.cuda.get_device_name() if device == "cuda" else processor()
    return f"{name} | {platform.system()} {platform.machine()} | {device}"


def copy_bandwidth_bytes_per_s() -> float:
    """Bytes read and written a second by one thread that copies memory, best of five."""
    source = torch.ones(32 * 2**20)
    target = torch.empty_like(source)
    seconds = min(_timed(lambda: target.copy_(source)) for _ in range(5))
    return 2 * source.numel() * source.element_size() / seconds


def matmul_flops_per_s() -> float:
    """FLOP/s of one thread in a float32 matrix product, best of five."""
    size = 1024
    left, right = torch.ones(size, size), torch.ones(size, size)
    return 2 * size**3 / min(_timed(lambda: left @ right) for _ in range(5))


def torch_version() -> str:
    """Version of torch: another one has other kernels, and makes a calibration void."""
    return str(torch.__version__)


def num_threads() -> int:
    """Threads that torch computes with."""
    return torch.get_num_threads()


def gpu_name() -> str:
    """What CUDA calls the device."""
    return torch.cuda.get_device_name()


def _timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
