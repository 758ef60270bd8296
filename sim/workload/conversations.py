"""Conversations that begin with a system prompt: each turn's prompt holds all that was said before.

The load that prefix caching is for (Mooncake, FAST 2025, section 4; SGLang, NeurIPS 2024).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sim.seeding import generator
from sim.workload.base import CHUNK_ROWS, RequestColumns
from sim.workload.checks import require_count, require_not_negative, require_positive
from sim.workload.lengths import LengthWorkload

BLOCKS_OF_ONE = 1 << 22
"""Room for the block ids of one system prompt or conversation."""


@dataclass(kw_only=True)
class Conversations(LengthWorkload):
    """Poisson arrivals of conversations; their turns follow after the time it takes to think.

    `input_tokens` is what the user adds in a turn. A turn's prompt is the system prompt, all turns
    and answers before, and this. Turns do not wait for the answer: the load is open.
    """

    rate_per_s: float
    """Mean requests per second, all turns counted, once as many conversations end as begin."""
    num_requests: int
    """How many requests come."""
    turns: float = 4.0
    """Mean number of turns of a conversation; geometric, at least 1."""
    think_time_s: float = 30.0
    """Mean time from one turn of a conversation to the next, exponential (seconds)."""
    system_tokens: int = 512
    """Length of every system prompt; 0: none (tokens)."""
    num_system_prompts: int = 4
    """System prompts, each as likely as the others."""
    max_prompt_tokens: int = 4096
    """A conversation ends before its prompt would be longer (tokens)."""
    hash_block_tokens: int = 16
    """Tokens of a block with a hash of its own."""

    def __post_init__(self) -> None:
        """Refuses rates, counts and times out of range."""
        super().__post_init__()
        require_positive("rate_per_s", self.rate_per_s)
        for name, example in (("num_requests", 100), ("num_system_prompts", 4),
                              ("max_prompt_tokens", 4096), ("hash_block_tokens", 16)):  # fmt: skip
            require_count(name, getattr(self, name), example)
        require_not_negative("think_time_s", self.think_time_s)
        require_not_negative("system_tokens", self.system_tokens)
        if not self.turns >= 1:
            raise ValueError(f"turns={self.turns} is a mean and must be at least 1; try turns=4")
        if self.max_prompt_tokens < self.system_tokens + self.input_tokens:
            raise ValueError(
                f"max_prompt_tokens={self.max_prompt_tokens} must hold system_tokens="
                f"{self.system_tokens} and input_tokens={self.input_tokens}; "
                f"try max_prompt_tokens={4 * (self.system_tokens + self.input_tokens)}"
            )

    def columns(self, seed: int, chunk_rows: int = CHUNK_ROWS) -> Iterator[RequestColumns]:
        """All requests in order of arrival, in chunks (see `Workload.columns`)."""
        # Every conversation has a turn at least, so that so many of them are enough.
        count = self.num_requests
        turns = generator(seed, "turns").geometric(1 / self.turns, count)
        opening = np.cumsum(turns) - turns
        who = np.repeat(np.arange(count), turns)
        first = opening[who]
        arrival_s = self._arrivals(seed, who, opening)
        added, answers = (
            self.draw_lengths(generator(seed, f"{side}_lengths"), mean, len(who))
            for side, mean in (("input", self.input_tokens), ("output", self.output_tokens))
        )
        added, answers = self.whole_tokens(added), self.answers(answers)
        prompts = self.system_tokens + _since(added + answers, first) - answers
        # A first turn always counts: its prompt is cut where what was drawn is too long.
        fits = prompts <= self.max_prompt_tokens
        fits[opening] = True
        kept = np.flatnonzero(fits)
        order = kept[np.argsort(arrival_s[kept], kind="stable")][:count]
        system = generator(seed, "system_prompts").integers(self.num_system_prompts, size=count)
        for start in range(0, count, chunk_rows):
            rows = order[start : start + chunk_rows]
            cut = np.minimum(prompts[rows], self.max_prompt_tokens)
            names = zip(
                who[rows].tolist(), system[who[rows]].tolist(), cut.tolist(), strict=True
            )  # fmt: skip
            yield RequestColumns(
                arrival_s[rows], cut, answers[rows], [self._hashes(*name) for name in names],
                hash_block_tokens=self.hash_block_tokens,
            )  # fmt: skip

    def _arrivals(
        self, seed: int, who: NDArray[np.int64], opening: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """When each turn comes: conversations begin at a rate, and then there is time to think."""
        gaps_s = generator(seed, "arrivals").standard_exponential(self.num_requests)
        starts_s = np.cumsum(gaps_s * self.turns / self.rate_per_s)
        think_s = generator(seed, "think_times").standard_exponential(len(who)) * self.think_time_s
        think_s[opening] = 0.0
        return starts_s[who] + _since(think_s, opening[who])

    def _hashes(self, conversation: int, system: int, prompt_tokens: int) -> tuple[int, ...]:
        """Block ids of a prompt: those of its system prompt, then the conversation's own."""
        blocks = -(-prompt_tokens // self.hash_block_tokens)
        shared = self.system_tokens // self.hash_block_tokens
        mine = (self.num_system_prompts + conversation) * BLOCKS_OF_ONE
        common = system * BLOCKS_OF_ONE
        return (*range(common, common + shared), *range(mine + shared, mine + blocks))


def _since(values: NDArray[Any], first: NDArray[np.int64]) -> NDArray[Any]:
    """Running sums that begin anew at the row that `first` names for each row."""
    sums = np.cumsum(values)
    return sums - (sums - values)[first]
