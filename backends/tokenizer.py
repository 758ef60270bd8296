"""Text to token ids and back, and prompts of random ids where the text does not matter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tokenizers import Tokenizer as FastTokenizer

from backends.sampling import counter_hash
from sim.requests import Request

_PROMPTS = 0x70726F6D7074  # sets the draws of prompts apart from those of answers
_PREFIXES = 0x707265666978  # and those of shared blocks apart from both


class Tokenizer:
    """The tokenizer.json of a model folder."""

    def __init__(self, folder: Path) -> None:
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ValueError(f"{folder} has no tokenizer.json; use prompt_token_ids, or add one")
        try:
            self._tokenizer = FastTokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"{path}: cannot be read ({error}); write it again") from error

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, nothing added."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, token_ids: list[int]) -> str:
        """The text of `token_ids`, control tokens included."""
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)


def request_token_ids(seed: int, request: Request, vocab_size: int) -> list[int]:
    """Random token ids of a prompt: equal where its prefix hashes are, its own after them."""
    size, length = request.hash_block_tokens, request.prompt_tokens
    own = prompt_token_ids(seed, request.request_id, length, vocab_size)
    if not request.prefix_hashes:
        return own
    hashes = np.asarray(request.prefix_hashes, np.int64)
    bits = counter_hash(seed ^ _PREFIXES, hashes[:, None], np.arange(size)[None])
    shared = (bits % np.uint64(vocab_size)).astype(np.int64).ravel()[:length].tolist()
    return shared + own[len(shared) :]


def prompt_token_ids(seed: int, request_id: int, num_tokens: int, vocab_size: int) -> list[int]:
    """Random token ids below `vocab_size`; a longer prompt of one request begins with a shorter."""
    positions = np.arange(num_tokens)
    bits = counter_hash(seed ^ _PROMPTS, np.asarray([request_id]), positions)
    return (bits % np.uint64(vocab_size)).astype(np.int64).tolist()
