"""A request, seen twice: by the executors, which know how long its answer gets, and by policies."""

from typing import NamedTuple

HASH_BLOCK_TOKENS = 512
"""Prompt tokens behind one prefix hash, unless a workload says otherwise: Mooncake's."""


class RequestView(NamedTuple):
    """What a policy may know of a waiting request. The final output length is not among it."""

    request_id: int
    arrival_s: float
    prompt_tokens: int
    max_output_tokens: int
    """The limit that the user set, or what the context window leaves: never the hidden length."""
    generated_tokens: int = 0
    """Tokens already answered. Above zero after a pre-emption by recomputation."""
    prefix_hashes: tuple[int, ...] = ()
    """Chain hashes of the leading blocks of the prompt: two prompts with the same one are equal up
    to its end. The last may stand for a block that the prompt fills in part."""
    hash_block_tokens: int = HASH_BLOCK_TOKENS
    """Prompt tokens that one of them stands for."""

    @property
    def prefill_tokens(self) -> int:
        """Tokens before the next one can be sampled; what a prefix cache holds is in it."""
        return self.prompt_tokens + self.generated_tokens


class RunningView(NamedTuple):
    """A request that holds KV blocks."""

    request_id: int
    context_tokens: int
    """Tokens whose KV is stored."""
    prefill_left: int
    """Tokens to compute before it decodes; 0: it decodes."""


class Request(NamedTuple):
    """One request as the executors know it."""

    request_id: int
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    """Tokens that the answer will have. Hidden from every policy."""
    max_output_tokens: int
    prefix_hashes: tuple[int, ...] = ()
    hash_block_tokens: int = HASH_BLOCK_TOKENS

    def view(self, generated_tokens: int = 0) -> RequestView:
        """The policy's view of this request after `generated_tokens` tokens of its answer."""
        return RequestView(
            self.request_id,
            self.arrival_s,
            self.prompt_tokens,
            self.max_output_tokens,
            generated_tokens,
            self.prefix_hashes,
            self.hash_block_tokens,
        )
