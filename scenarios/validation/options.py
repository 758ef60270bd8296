"""What `diptych validate` takes beside the study: profile, device, what to run, where to write."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from scenarios.validation.openings import TEXTS
from sim.policies.batching.base import Batching
from sim.policies.batching.chunked_prefill import ChunkedPrefill


class Profile(Enum):
    """How much is run."""

    quick = "quick"
    full = "full"


class Device(Enum):
    """Where the real panel runs."""

    cpu = "cpu"
    cuda = "cuda"


class Fault(Enum):
    """A fault put into the real panel's KV cache: the validation must then miss."""

    none = "none"
    skip_free = "skip_free"
    drop_copy = "drop_copy"
    stale_block = "stale_block"
    """Needs engine.prefix_caching=true."""


class Question(Enum):
    """The four questions, in their order."""

    decisions = "decisions"
    bytes = "bytes"
    numbers = "numbers"
    time = "time"


@dataclass(kw_only=True)
class Sizes:
    """How large each question is asked."""

    decision_requests: int
    """Requests of the tiny model, for each policy."""
    prompts: int
    """Prompts whose tokens are compared with the reference's."""
    new_tokens: int
    """Tokens of each answer to them."""
    time_requests: int
    """Requests of a timed run."""
    repeats: int
    """Timed runs of each policy."""


CHUNK_TOKENS = 48
"""Token budget of policies that cut prompts: one and a half prompts of the timed runs. Iterations
then differ in size, and a high percentile of the gaps tells of the policy; with a smaller budget
nearly all iterations are full, and it tells of the machine's jitter alone."""

QUICK = Sizes(decision_requests=200, prompts=32, new_tokens=12, time_requests=30, repeats=3)
FULL = Sizes(decision_requests=1000, prompts=64, new_tokens=32, time_requests=200, repeats=5)


@dataclass(kw_only=True)
class Options:
    """Keys of the command line that are not the study's."""

    profile: Profile = Profile.quick
    """quick answers in minutes, full is for reports."""
    device: Device = Device.cpu
    """Where the real panel runs."""
    corrupt: Fault = Fault.none
    """A fault to be caught."""
    only: list[Question] = field(default_factory=lambda: list(Question))
    """Questions to ask; the others are `not run`."""
    seed: int = 0
    """Of the workloads and prompts."""
    weights: str = "smollm2"
    """Model of the numbers and the timed runs: smollm2, random (the tiny one; its numbers are not
    run, for want of a reference) or a Hugging Face folder."""
    load: float = 0.6
    """Offered load of the timed runs, as a share of the calibrated capacity."""
    calibration: str | None = None
    """Node file of `diptych calibrate` to take the costs from; null: calibrate between the timed
    runs, so that both see the same minutes of a shared machine."""
    out: str | None = None
    """Folder of the results; null: runs/<study>/validation."""
    decision_requests: int | None = None
    """Overrides the profile's."""
    prompts: int | None = None
    """Overrides the profile's."""
    new_tokens: int | None = None
    """Overrides the profile's."""
    time_requests: int | None = None
    """Overrides the profile's."""
    repeats: int | None = None
    """Overrides the profile's."""

    def __post_init__(self) -> None:
        if not 0 < self.load < 1:
            raise ValueError(f"load={self.load} must be in (0, 1), a share of capacity; try 0.6")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must not be negative; use 0 or more")
        if not self.only:
            names = ",".join(question.value for question in Question)
            raise ValueError(f"only=[] asks nothing; name some of [{names}]")
        if self.prompts is not None and self.prompts > len(TEXTS):
            raise ValueError(f"prompts={self.prompts} must be at most {len(TEXTS)}; ask for fewer")
        for name in SIZE_NAMES:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1, or null for the profile's")

    @property
    def sizes(self) -> Sizes:
        """The profile's sizes with what was overridden."""
        base = QUICK if self.profile is Profile.quick else FULL
        chosen = {name: getattr(self, name) or getattr(base, name) for name in SIZE_NAMES}
        return Sizes(**chosen)


def with_short_chunks(batching: Batching) -> Batching:
    """The policy, cutting the short prompts of the validation unless the study says otherwise."""
    if isinstance(batching, ChunkedPrefill) and batching.chunk_tokens is None:
        return replace(batching, chunk_tokens=CHUNK_TOKENS)
    return batching


SIZE_NAMES = tuple(item.name for item in fields(Sizes))


def split(overrides: Sequence[str]) -> tuple[Options, list[str]]:
    """Options of the validation, and the overrides that are left for the study.

    Raises:
        ValueError: a value of the wrong type or out of range.
    """
    names = {item.name for item in fields(Options)}
    mine = [text for text in overrides if text.partition("=")[0] in names]
    rest = [text for text in overrides if text not in mine]
    try:
        given = OmegaConf.from_dotlist(mine)
        options: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Options), given))
    except OmegaConfBaseException as error:
        raise ValueError(str(error)) from error
    return options, rest
