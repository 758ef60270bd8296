"""The prefix cache of the simulated replica against one that keeps every block for itself."""

from collections import OrderedDict
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.requests import Request
from sim.state.prefix_cache import NOTHING_CACHED, CachedPrefix, PrefixCache


class EveryBlock:
    """The same cache in its plainest form: a dictionary of blocks, each with a count of holders."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.holders: dict[Any, int] = {}
        self.unheld: OrderedDict[Any, None] = OrderedDict()
        self.held: dict[int, list[Any]] = {}

    def blocks(self, request: Request, generated: int) -> list[Any]:
        """What tells each whole block of a request from all others: all tokens up to its end."""
        tokens: list[Any] = []
        for one in request.prefix_hashes:
            tokens += [(one, at) for at in range(request.hash_block_tokens)]
        tokens = tokens[: request.prompt_tokens]
        own = request.prompt_tokens + generated - len(tokens)
        tokens += [("own", request.request_id, at) for at in range(own)]
        whole = len(tokens) // self.block_size
        return [tuple(tokens[: (at + 1) * self.block_size]) for at in range(whole)]

    def cached(self, request: Request, generated: int) -> CachedPrefix:
        found, most = [], (request.prompt_tokens + generated - 1) // self.block_size
        for block in self.blocks(request, generated)[:most]:
            if block not in self.holders:
                break
            found.append(block)
        free = sum(block in self.unheld for block in found)
        return CachedPrefix(len(found) * self.block_size, free)

    def hold(self, request: Request, generated: int) -> CachedPrefix:
        found = self.cached(request, generated)
        count = found.tokens // self.block_size
        self.held[request.request_id] = self.blocks(request, generated)[:count]
        for block in self.held[request.request_id]:
            self._take(block)
        return found

    def _take(self, block: Any) -> None:
        self.holders[block] = self.holders.get(block, 0) + 1
        self.unheld.pop(block, None)

    def store(self, request: Request, tokens: int) -> tuple[int, int]:
        held = self.held[request.request_id]
        copies = taken = 0
        generated = max(tokens - request.prompt_tokens, 0)
        for block in self.blocks(request, generated)[len(held) : tokens // self.block_size]:
            copies += block in self.holders
            taken += block in self.unheld
            self._take(block)
            held.append(block)
        return copies, taken

    def release(self, request: Request) -> int:
        free = 0
        for block in reversed(self.held.pop(request.request_id)):
            self.holders[block] -= 1
            if not self.holders[block]:
                self.unheld[block] = None
                free += 1
        return free

    def given_up(self, requests: list[Request]) -> int:
        holders: dict[Any, int] = {}
        for request in requests:
            for block in self.held[request.request_id]:
                holders[block] = holders.get(block, 0) + 1
        return sum(self.holders[block] == count for block, count in holders.items())

    def shrink(self, room: int) -> int:
        dropped = 0
        while len(self.unheld) > room:
            del self.holders[self.unheld.popitem(last=False)[0]]
            dropped += 1
        return dropped


@st.composite
def prompts(draw: st.DrawFn) -> list[Request]:
    """Prompts along the paths of a small random tree, some longer than their hashes."""
    size = draw(st.sampled_from([8, 6, 4, 3, 32]))
    parents = [draw(st.integers(-1, at - 1)) for at in range(draw(st.integers(1, 8)))]
    requests: list[Request] = []
    for request_id in range(draw(st.integers(1, 7))):
        path = [draw(st.integers(0, len(parents) - 1))]
        while parents[path[0]] >= 0:
            path.insert(0, parents[path[0]])
        least = (len(path) - 1) * size + 1
        most = draw(st.sampled_from([len(path) * size, least + 20]))
        tokens = draw(st.integers(least, most))
        requests.append(Request(request_id, 0.0, tokens, 9, 99, tuple(path), size))
    return requests


class Beside:
    """A cache and its plain form, told the same things and asked to say the same."""

    def __init__(self, block_size: int) -> None:
        self.fast, self.plain = PrefixCache(block_size), EveryBlock(block_size)
        self.computed: dict[int, int] = {}
        self.generated: dict[int, int] = {}

    def admit(self, request: Request) -> None:
        generated = self.generated.get(request.request_id, 0)
        view = request.view(generated)
        assert self.fast.cached(view) == self.plain.cached(request, generated)
        found = self.fast.hold(view)
        assert found == self.plain.hold(request, generated)
        assert found.tokens < view.prefill_tokens
        self.computed[request.request_id] = found.tokens

    def compute(self, request: Request, tokens: int) -> None:
        at = request.request_id
        self.computed[at] = min(self.computed[at] + tokens, request.prompt_tokens + 11)
        stored = self.computed[at]
        assert self.fast.store(at, stored) == self.plain.store(request, stored)
        assert self.fast.held_blocks(at) == len(self.plain.held[at])

    def leave(self, request: Request, *, for_good: bool) -> None:
        assert self.fast.release(request.request_id) == self.plain.release(request)
        computed = self.computed.pop(request.request_id)
        self.generated[request.request_id] = max(computed - request.prompt_tokens, 0)
        if for_good:
            self.fast.forget(request.request_id)

    def agree(self, requests: list[Request]) -> None:
        assert self.fast.unheld == len(self.plain.unheld)
        for request in requests:
            generated = self.generated.get(request.request_id, 0)
            if request.request_id not in self.computed:
                found = self.fast.cached(request.view(generated))
                assert found == self.plain.cached(request, generated)
        running = [one for one in requests if one.request_id in self.computed]
        for some in (running, running[:1], running[1:]):
            ids = tuple(one.request_id for one in some)
            held = sum(len(self.plain.held[one]) for one in ids)
            assert held - self.fast.shared_blocks(ids) == self.plain.given_up(some)


@settings(max_examples=600)
@given(requests=prompts(), size=st.sampled_from([1, 2, 4, 5]), chance=st.randoms())
def test_runs_of_blocks_behave_like_single_blocks(
    requests: list[Request], size: int, chance: Any
) -> None:
    both = Beside(size)
    for _ in range(40):
        request = chance.choice(requests)
        if request.request_id not in both.computed:
            both.admit(request)
        elif chance.random() < 0.6:
            both.compute(request, chance.randint(1, 20))
        else:
            both.leave(request, for_good=chance.random() < 0.5)
        if chance.random() < 0.3:
            room = chance.randint(0, 12)
            assert both.fast.shrink(room) == both.plain.shrink(room)
        both.agree(requests)


def cache_of(prompt: Request) -> PrefixCache:
    """A cache of blocks of 4 tokens in which one prompt was computed and released."""
    cache = PrefixCache(4)
    cache.hold(prompt.view())
    cache.store(prompt.request_id, prompt.prompt_tokens)
    cache.release(prompt.request_id)
    return cache


def test_the_last_token_of_a_prompt_is_always_computed() -> None:
    cache = cache_of(Request(0, 0.0, 16, 1, 9, (5, 6), 8))
    same, longer = (Request(count, 0.0, count, 1, 9, (5, 6), 8) for count in (16, 17))
    assert cache.cached(same.view()) == CachedPrefix(12, 3)
    assert cache.cached(longer.view()) == CachedPrefix(16, 4)


def test_the_end_of_a_prefix_is_dropped_first_and_what_was_used_last_stays() -> None:
    cache = cache_of(Request(0, 0.0, 16, 1, 9, (5, 6), 8))
    other = Request(1, 0.0, 8, 1, 9, (7,), 8)
    cache.hold(other.view())
    cache.store(1, 8)
    cache.release(1)
    assert cache.shrink(3) == 3
    assert cache.cached(Request(2, 0.0, 17, 1, 9, (5, 6), 8).view()) == CachedPrefix(4, 1)
    assert cache.cached(Request(3, 0.0, 9, 1, 9, (7, 8), 8).view()) == CachedPrefix(8, 2)


def test_blocks_that_are_held_are_never_dropped() -> None:
    cache = cache_of(Request(0, 0.0, 16, 1, 9, (5, 6), 8))
    assert cache.hold(Request(1, 0.0, 9, 1, 9, (5, 9), 8).view()) == CachedPrefix(8, 2)
    assert cache.shrink(0) == 2
    assert cache.cached(Request(2, 0.0, 17, 1, 9, (5, 6), 8).view()) == CachedPrefix(8, 0)


def test_what_no_hash_covers_is_found_again_by_its_own_request_only() -> None:
    prompt = Request(0, 0.0, 16, 5, 9)
    cache = cache_of(prompt)
    assert cache.cached(prompt.view(3)) == CachedPrefix(16, 4)
    assert cache.cached(Request(1, 0.0, 16, 5, 9).view()) == NOTHING_CACHED


def test_an_answer_is_found_again_by_its_own_request_only() -> None:
    prompt = Request(0, 0.0, 10, 9, 99, (3, 4), 8)
    cache = PrefixCache(4)
    cache.hold(prompt.view())
    cache.store(0, 10)
    cache.store(0, 17)
    cache.release(0)
    assert cache.cached(prompt.view(8)) == CachedPrefix(16, 4)
    assert cache.cached(Request(1, 0.0, 18, 9, 99, (3, 4, 5), 8).view()) == CachedPrefix(8, 2)


@pytest.mark.parametrize("size", [6, 8])
def test_a_block_that_reaches_into_another_hash_is_shared_only_with_both(size: int) -> None:
    cache = cache_of(Request(0, 0.0, 3 * size, 1, 9, (1, 2, 3), size))
    fork = Request(1, 0.0, 3 * size, 1, 9, (1, 4, 5), size)
    assert cache.cached(fork.view()).tokens == 4 * (size // 4)
