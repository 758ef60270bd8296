"""Faults that tests put into the real panel, to see that validation would notice them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Corruption:
    """A fault put into the mechanism on purpose, so that validation can be seen to fail."""

    kind: Literal["skip_free", "drop_copy", "stale_block"]
    """skip_free: a request ends and its blocks stay owned. drop_copy: the keys and values of one
    token are never stored, in any layer. stale_block: blocks that are given to another request stay
    findable by the prefix that they held."""
    index: int = 0
    """Which free, or which token written, or from which eviction on, counted from 0."""

    def __post_init__(self) -> None:
        if self.kind not in ("skip_free", "drop_copy", "stale_block"):
            raise ValueError(f"kind={self.kind!r} must be skip_free, drop_copy or stale_block")
        if self.index < 0:
            raise ValueError(f"index={self.index} must not be negative; 0 is the first")
