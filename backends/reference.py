"""Plain references of the replica's numbers: transformers' own model, and one rank for several."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from backends.forward_batch import Chunk, ForwardBatch
from backends.sampling import Sampler
from backends.transformer import Transformer


class KeepLogits(Sampler):
    """Samples as its parent does and keeps the logits that it saw, by request and position."""

    def __init__(self) -> None:
        super().__init__()
        self.logits: dict[tuple[int, int], NDArray[np.float32]] = {}

    def __call__(
        self, logits: Tensor, request_ids: Sequence[int], positions: Sequence[int]
    ) -> list[int]:
        """See `Sampler`."""
        rows = logits.float().cpu().numpy()
        for request_id, position, row in zip(request_ids, positions, rows, strict=True):
            self.logits[request_id, position] = row.copy()
        return super().__call__(logits, request_ids, positions)


class Reference:
    """A model folder as transformers runs it, in float32 without TF32."""

    def __init__(self, folder: Path, device: str) -> None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()

        torch.backends.cuda.matmul.allow_tf32 = False
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self._model.to(device).eval()
        # Lengths are forced on both sides: no token ends an answer.
        self._model.generation_config.eos_token_id = None
        self._model.generation_config.pad_token_id = 0
        self._device = device

    def generate(self, prompts: Sequence[list[int]], new_tokens: int) -> list[list[int]]:
        """Greedy answers of one batched `generate`, padded on the left."""
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=self._device)
        mask = torch.tensor(
            [[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self._device
        )
        with torch.inference_mode():
            out: Tensor = self._model.generate(
                input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=new_tokens
            )
        return out[:, width:].tolist()

    def logits(self, prompt: list[int], answer: list[int]) -> NDArray[np.float32]:
        """Logits [answer, vocab] before each token of an answer, given the tokens before it."""
        ids = torch.tensor([[*prompt, *answer[:-1]]], device=self._device)
        with torch.inference_mode():
            out: Tensor = self._model(input_ids=ids).logits
        return out[0, len(prompt) - 1 :].float().cpu().numpy()


class OneRank:
    """The same weights whole on one rank: the plain reference of several ranks.

    One request at a time, one token at a time, without a replica's loop.
    """

    def __init__(self, model: Transformer) -> None:
        self._model = model

    def generate(self, prompts: Sequence[list[int]], new_tokens: int) -> list[list[int]]:
        """Greedy answers."""
        return [self._answer(prompt, [], new_tokens)[0] for prompt in prompts]

    def logits(self, prompt: list[int], answer: list[int]) -> NDArray[np.float32]:
        """Logits [answer, vocab] before each token of an answer, given the tokens before it."""
        return np.stack(self._answer(prompt, answer, len(answer))[1])

    def _answer(
        self, prompt: list[int], forced: list[int], new_tokens: int
    ) -> tuple[list[int], list[NDArray[np.float32]]]:
        """Tokens, greedy where none is forced, and the logits before each."""
        total = len(prompt) + new_tokens
        cache = self._model.new_cache(-(-total // 16), 16)
        cache.allocate(0, total)
        rows: list[NDArray[np.float32]] = []
        answer: list[int] = []
        ids, start = list(prompt), 0
        for step in range(new_tokens):
            batch = ForwardBatch.build(cache, [Chunk(0, ids, start)])
            rows.append(self._model.forward(batch, cache)[0].cpu().numpy())
            start += len(ids)
            ids = [forced[step] if forced else int(rows[-1].argmax())]
            answer += ids
        return answer, rows
