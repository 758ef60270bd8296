"""How fast does the real panel generate, beside transformers' own batched `generate`?

SmolLM2-135M in float32, one thread, greedy, the same prompts in one static batch; the whole engine
is timed from the first prompt to the last token, and the repeats of both are interleaved. Time per
token is the median of repeats.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from backends.kv_cache import PagedKVCache
from backends.replica import Replica
from backends.sampling import Sampler
from backends.tokenizer import prompt_token_ids
from backends.transformer import Transformer
from backends.weights import load_model
from sim.engine import ReplicaLimits
from sim.policies.batching.static import Static
from sim.workload.recorded import Recorded
from sim.workload.source import Source

BATCHES = (1, 4, 8, 16)
PROMPT_TOKENS, NEW_TOKENS, REPEATS = 32, 32, 5


def ours(model: Transformer, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy answers of the whole engine: policy, paged cache, forward passes, sampling, trace."""
    count, size = len(prompts), 16
    limits = ReplicaLimits(count, count * PROMPT_TOKENS, size, size * count)
    together = Recorded(
        arrival_s=[0.0] * count,
        prompt_tokens=[len(prompt) for prompt in prompts],
        output_tokens=[NEW_TOKENS] * count,
    )
    replica = Replica(
        model=model,
        cache=PagedKVCache(model.config, limits.num_blocks, size),
        batching=Static(),
        limits=limits,
        prompts=lambda request: prompts[request.request_id],
        sampler=Sampler(),
    )
    replica.serve(Source(together, 0, model.max_context))
    return [replica.answers[index] for index in range(count)]


def transformers_answers(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    """The same by `generate`, which may not stop early."""
    tokens = torch.tensor(prompts)
    with torch.inference_mode():
        output: Tensor = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return output[:, tokens.shape[1] :].tolist()


def seconds(function: Callable[..., Any], *arguments: Any) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def compare(batch: int, model: Transformer, reference: Any) -> tuple[float, float, int]:
    """Median tokens a second of both, and how many of the answers are equal."""
    vocab = model.config.vocab_size
    prompts = [prompt_token_ids(0, request, PROMPT_TOKENS, vocab) for request in range(batch)]
    pairs = zip(ours(model, prompts), transformers_answers(reference, prompts), strict=True)
    equal = sum(mine == theirs for mine, theirs in pairs)  # the first call of both is the warm-up
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(REPEATS):
        times[0].append(seconds(ours, model, prompts))
        times[1].append(seconds(transformers_answers, reference, prompts))
    speeds = [batch * NEW_TOKENS / statistics.median(series) for series in times]
    return speeds[0], speeds[1], equal


def main() -> None:
    """Print the table and the JSON line."""
    torch.set_num_threads(1)
    loaded = load_model("smollm2")
    model = Transformer(loaded.config, loaded.weights)
    reference = AutoModelForCausalLM.from_pretrained(loaded.folder, dtype=torch.float32).eval()
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {commit}")
    print(
        f"{'batch':>5} {'ours tok/s':>11} {'transformers':>13} {'ratio':>6} {'equal answers':>14}"
    )
    rows = []
    for batch in BATCHES:
        mine, theirs, equal = compare(batch, model, reference)
        rows.append((mine, theirs))
        print(f"{batch:5} {mine:11.1f} {theirs:13.1f} {mine / theirs:6.2f} {equal:11}/{batch}")
    result = {
        "ours_tokens_per_s": {batch: mine for batch, (mine, _) in zip(BATCHES, rows, strict=True)},
        "transformers_tokens_per_s": {
            batch: theirs for batch, (_, theirs) in zip(BATCHES, rows, strict=True)
        },
        "ratio": statistics.geometric_mean(mine / theirs for mine, theirs in rows),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
