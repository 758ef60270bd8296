"""Blocks of the real cache that several requests hold, or that stay when nobody does."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from backends.kv_cache import PagedKVCache
from backends.prefix_cache import block_hashes
from backends.tokenizer import prompt_token_ids, request_token_ids
from backends.weights import random_model
from sim.requests import Request

CONFIG = random_model().config
BLOCKS, SIZE = 10, 4
PROMPTS = [
    [0] * 9, [0] * 12, [0] * 8 + [1] * 8, [0] * 4 + [2] * 7, [3] * 16, [0] * 8 + [1] * 4, [4] * 3
]  # fmt: skip


class Sharing(RuleBasedStateMachine):
    """Any order of beginning, computing and ending requests keeps the laws of the pool."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = PagedKVCache(CONFIG, BLOCKS, SIZE)
        self.computed: dict[int, int] = {}

    @precondition(lambda self: len(self.computed) < len(PROMPTS))
    @rule(data=st.data())
    def begin(self, data):
        at = data.draw(st.sampled_from(sorted(set(range(len(PROMPTS))) - set(self.computed))))
        hashes = block_hashes(PROMPTS[at], SIZE)
        blocks = self.cache.prefixes.find(hashes[: (len(PROMPTS[at]) - 1) // SIZE])
        if blocks:
            self.cache.hold(at, blocks)
        self.computed[at] = len(blocks) * SIZE

    @precondition(lambda self: self.computed)
    @rule(data=st.data(), more=st.integers(1, 9))
    def compute(self, data, more):
        at = data.draw(st.sampled_from(sorted(self.computed)))
        before = self.computed[at]
        more = min(more, len(PROMPTS[at]) + 3 - before)
        if not more or self.cache.blocks_needed(at, before + more) > self.cache.free_blocks:
            return
        self.cache.allocate(at, before + more)
        self.cache.begin_write(torch.tensor(self.cache.slots(at, before, more)))
        self.computed[at] = before + more
        self.cache.store(at, block_hashes(PROMPTS[at], SIZE), before + more)

    @precondition(lambda self: any(self.computed.values()))
    @rule(data=st.data())
    def end(self, data):
        some = sorted(at for at, tokens in self.computed.items() if tokens)
        at = data.draw(st.sampled_from(some))
        free, expected = self.cache.free_blocks, self.cache.given_up((at,))
        self.cache.free(at)
        del self.computed[at]
        assert self.cache.free_blocks == free + expected

    @invariant()
    def tables_and_tensors_agree(self):
        self.cache.check()
        for at, tokens in self.computed.items():
            assert (self.cache.stored_tokens(at) if tokens else 0) == tokens

    @invariant()
    def tokens_are_conserved(self):
        cache = self.cache
        assert cache.written_tokens == cache.cached_tokens + cache.freed_tokens

    @invariant()
    def everything_that_is_held_is_given_up_together(self):
        running = [at for at, tokens in self.computed.items() if tokens]
        held = BLOCKS - self.cache.free_blocks
        assert self.cache.given_up(running) == held


TestSharing = Sharing.TestCase
TestSharing.settings = settings(max_examples=60, stateful_step_count=40)


def test_a_flush_leaves_nothing():
    cache = PagedKVCache(CONFIG, BLOCKS, SIZE)
    cache.allocate(0, 16)
    cache.begin_write(torch.tensor(cache.slots(0, 0, 16)))
    cache.store(0, block_hashes([3] * 16, SIZE), 16)
    cache.free(0)
    assert (cache.cached_blocks, cache.free_blocks, cache.cached_tokens) == (4, BLOCKS, 16)
    cache.flush()
    assert (cache.cached_blocks, cache.free_blocks, cache.cached_tokens) == (0, BLOCKS, 0)
    cache.check()


def test_hashes_are_of_whole_blocks_and_of_all_tokens_before():
    one, other = block_hashes([1] * 4 + [2] * 5, SIZE), block_hashes([7] * 4 + [2] * 4, SIZE)
    assert len(one) == len(other) == 2
    assert one[0] != one[1] != other[1]
    assert block_hashes([1] * 4 + [2] * 4 + [3], SIZE) == one


@pytest.mark.parametrize("tokens", [24, 20, 30])
def test_prompts_have_equal_tokens_where_their_hashes_are_equal(tokens):
    one = request_token_ids(5, Request(0, 0.0, tokens, 1, 9, (7, 8), 12), 512)
    other = request_token_ids(5, Request(1, 0.0, tokens, 1, 9, (7, 9), 12), 512)
    assert len(one) == tokens
    assert one[:12] == other[:12]
    assert one[12:] != other[12:]
    assert one[24:] == prompt_token_ids(5, 0, tokens, 512)[24:]
    assert request_token_ids(5, Request(2, 0.0, tokens, 1, 9, (7, 8), 12), 512)[:24] == one[:24]
