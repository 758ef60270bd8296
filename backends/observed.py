"""What a real replica's tensors show at a decision, and the requests that they belong to."""

from collections.abc import Callable
from collections.abc import Sequence as AnySequence
from dataclasses import dataclass, field

from sim.engine import ReplicaLimits
from sim.requests import Request, RequestView, RunningView
from sim.state.prefix_cache import CachedPrefix


@dataclass
class Sequence:
    """A request on the replica: its tokens, prompt first, and how far they are computed."""

    request: Request
    tokens: list[int]
    hashes: list[bytes] = field(default_factory=list[bytes])
    """Of the whole blocks of its prompt, where prefixes are cached."""
    computed: int = 0
    """Tokens whose KV was computed, or found in the cache, in the present stay."""
    prefill_target: int = 0
    """Tokens to compute before the present stay decodes."""
    first_iteration: int = -1
    """Iteration of the first token of the present stay; -1 before it."""
    decodes: int = 0
    """Decode iterations of the present stay."""

    @property
    def generated(self) -> int:
        """Tokens of the answer so far."""
        return len(self.tokens) - self.request.prompt_tokens

    @property
    def prefill_left(self) -> int:
        """Tokens to compute before it decodes; 0: it decodes."""
        return max(self.prefill_target - self.computed, 0)

    def begin_stay(self, reused: int = 0) -> None:
        """Take a seat: what is not cached is to be computed, the answer so far included."""
        self.computed = reused
        self.prefill_target = len(self.tokens)
        self.first_iteration = -1
        self.decodes = 0


@dataclass
class ObservedView:
    """A `ReplicaView` of counts that were read from tensors."""

    limits: ReplicaLimits
    waiting: AnySequence[RequestView]
    free_blocks: int
    seats: list[RunningView]
    find_prefix: Callable[[RequestView], CachedPrefix]
    count_given_up: Callable[[tuple[int, ...]], int]
    prefilling: list[RunningView] = field(init=False)
    num_decoding: int = field(init=False)
    decode_blocks: int = field(init=False)

    def __post_init__(self) -> None:
        self.prefilling = [seat for seat in self.seats if seat.prefill_left]
        decoding = [seat for seat in self.seats if not seat.prefill_left]
        self.num_decoding = len(decoding)
        size = self.limits.block_size
        self.decode_blocks = sum(seat.context_tokens % size == 0 for seat in decoding)

    @property
    def num_running(self) -> int:
        """Requests that hold a seat."""
        return len(self.seats)

    def cached_prefix(self, request: RequestView) -> CachedPrefix:
        """What of a waiting request's prompt is cached."""
        return self.find_prefix(request)

    def given_up(self, request_ids: tuple[int, ...]) -> int:
        """Blocks that become free when these running requests are pre-empted together."""
        return self.count_given_up(request_ids)

    def running(self) -> list[RunningView]:
        """All running requests in order of admission."""
        return self.seats
