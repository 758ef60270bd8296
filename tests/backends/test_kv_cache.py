import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from backends.forward_batch import Chunk, ForwardBatch
from backends.kv_cache import FREE, Corruption, PagedKVCache
from backends.kv_layout import gather_pieces, head_rows, scatter_rows
from backends.transformer import Transformer
from backends.weights import random_model

TINY = random_model()
TRANSFORMER = Transformer(TINY.config, TINY.weights)
BLOCKS, SIZE = 12, 4


class Allocation(RuleBasedStateMachine):
    """Any order of growing, writing and freeing keeps the laws of the pool."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = PagedKVCache(TINY.config, BLOCKS, SIZE)
        self.tokens: dict[int, int] = {}
        self.freed = 0

    @rule(request_id=st.integers(0, 4), more=st.integers(1, 9))
    def grow(self, request_id, more):
        before = self.tokens.get(request_id, 0)
        free, needed = self.cache.free_blocks, self.cache.blocks_needed(request_id, before + more)
        if needed > free:
            with pytest.raises(ValueError, match="free a request first"):
                self.cache.allocate(request_id, before + more)
            assert self.cache.free_blocks == free
            return
        self.cache.allocate(request_id, before + more)
        slots = torch.tensor(self.cache.slots(request_id, before, more))
        assert torch.equal(self.cache.begin_write(slots), slots)
        self.tokens[request_id] = before + more

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def free(self, data):
        request_id = data.draw(st.sampled_from(sorted(self.tokens)))
        self.freed += self.tokens.pop(request_id)
        self.cache.free(request_id)

    @invariant()
    def blocks_are_owned_once_and_conserved(self):
        self.cache.check()
        owned = [block for request in self.tokens for block in self.cache.block_table(request)]
        assert len(set(map(int, owned))) == len(owned)
        assert self.cache.free_blocks + len(owned) == BLOCKS

    @invariant()
    def tokens_are_conserved(self):
        cache = self.cache
        assert {request: cache.stored_tokens(request) for request in self.tokens} == self.tokens
        assert cache.cached_tokens == sum(self.tokens.values())
        assert cache.written_tokens == cache.cached_tokens + self.freed
        assert cache.freed_tokens == self.freed


TestAllocation = Allocation.TestCase
TestAllocation.settings = settings(max_examples=30, stateful_step_count=30)


def forward(cache, chunks):
    for chunk in chunks:
        cache.allocate(chunk.request_id, chunk.start + len(chunk.token_ids))
    return TRANSFORMER.forward(ForwardBatch.build(cache, chunks), cache)


def test_bytes_are_those_of_the_tensors():
    cache = PagedKVCache(TINY.config, 8, SIZE)
    forward(cache, [Chunk(0, list(range(10)), 0)])
    forward(cache, [Chunk(0, [1], 10), Chunk(1, [2, 3], 0)])
    token_bytes = 2 * 2 * 4 * 8 * 4
    assert cache.token_bytes == token_bytes
    assert cache.written_bytes == 13 * token_bytes
    assert cache.read_bytes == (10 + 11 + 2) * token_bytes
    cache.free(0)
    assert cache.freed_bytes == 11 * token_bytes


def test_only_the_slots_of_the_tokens_are_written():
    cache = PagedKVCache(TINY.config, 8, SIZE)
    cache.allocate(9, 4)
    forward(cache, [Chunk(0, list(range(6)), 0)])
    held = set(cache.slots(0, 0, 6))
    for kv in cache.layers:
        for part in kv:
            rows = part.flatten(2).flatten(0, 1).abs().sum(1)
            assert set(rows.nonzero()[:, 0].tolist()) == held


def test_a_skipped_free_leaves_its_blocks_owned():
    cache = PagedKVCache(TINY.config, 8, SIZE)
    cache.corrupt = Corruption(kind="skip_free", index=1)
    for request_id in range(3):
        cache.allocate(request_id, 8)
    for request_id in range(3):
        cache.free(request_id)
    assert cache.free_blocks == 6
    assert int((cache.owner == 1).sum()) == 2
    assert cache.requests() == []
    with pytest.raises(AssertionError, match="owned by no live request"):
        cache.check()


def test_a_dropped_copy_is_missing_from_tensors_counts_and_logits():
    whole, torn = (PagedKVCache(TINY.config, 8, SIZE) for _ in range(2))
    torn.corrupt = Corruption(kind="drop_copy", index=12)
    logits = []
    for cache in (whole, torn):
        forward(cache, [Chunk(0, list(range(10)), 0)])
        logits.append(forward(cache, [Chunk(1, list(range(5)), 0), Chunk(0, [1], 10)]))
    assert torn.written_tokens == whole.written_tokens - 1
    assert torn.stored_tokens(1) == 4
    # The decode is the first row of the batch, so the dropped token is the second of request 1.
    slot = torn.slots(1, 1, 1)[0]
    assert not torn.layers[0].key[slot // SIZE, slot % SIZE].any()
    assert not torch.allclose(logits[0][0], logits[1][0], atol=1e-3)
    torch.testing.assert_close(logits[0][1], logits[1][1])


def test_rows_scattered_head_by_head_are_where_the_shape_says():
    pool = PagedKVCache(TINY.config, 5, SIZE).layers[0].key
    slots, values = torch.tensor([7, 0, 18]), torch.randn(3, 4, 8)
    scatter_rows(pool, head_rows(slots, SIZE, 4), values)
    for slot, value in zip(slots.tolist(), values, strict=True):
        assert torch.equal(pool[slot // SIZE, slot % SIZE], value)
    piece = gather_pieces(pool, torch.tensor([4 * 4 + 3])).view(SIZE, 8)
    assert torch.equal(piece[2], values[2, 3])


def test_slots_that_are_not_stored_are_neither_counted_nor_written():
    cache = PagedKVCache(TINY.config, 4, SIZE)
    cache.begin_write(torch.tensor([3, FREE, 5]))
    assert cache.written_tokens == 2
    assert cache.written.flatten().nonzero()[:, 0].tolist() == [3, 5]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda cache: cache.free(3), "request 3 holds no blocks"),
        (lambda cache: cache.slots(0, 6, 3), "allocate 9 tokens first"),
        (lambda cache: cache.allocate(-1, 3), "request_id=-1"),
        (lambda cache: cache.allocate(1, 99), "free_blocks=6 of 8"),
        (lambda cache: PagedKVCache(TINY.config, 0), "num_blocks=0"),
        (lambda cache: Corruption(kind="skip_free", index=-1), "index=-1"),
        (lambda cache: Corruption(kind="other"), "kind='other'"),
    ],
)
def test_a_wrong_call_is_refused(call, message):
    cache = PagedKVCache(TINY.config, 8, SIZE)
    cache.allocate(0, 8)
    with pytest.raises(ValueError, match=message):
        call(cache)
