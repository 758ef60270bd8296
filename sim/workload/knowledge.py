"""The contract of retrieval-augmented generation: documents are put in front of each question.

RAGCache (TOCS 2025): a prompt is the system prompt, the documents found in order of their
rank, and the question; the search yields a provisional list after each of its stages.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from sim.workload.base import RequestColumns, Workload


@dataclass(frozen=True, slots=True)
class Documents:
    """The corpus: what may be retrieved, and what stands in front of it."""

    tokens: NDArray[np.int64]
    """Length of every document by its number, shape (documents,) (tokens)."""
    system_tokens: int = 0
    """Length of the system prompt that every prompt begins with; 0: none (tokens)."""

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(kw_only=True)
class KnowledgeWorkload(Workload, ABC):
    """Questions whose prompts hold documents of one corpus.

    Every chunk of `columns(seed)` has `retrieved`: per request the list of documents after each
    stage of its search, best rank first, none twice in a list, the last list being the answer. Its
    prompt is `system_tokens`, the documents of that answer, and at least one token of question.
    """

    @abstractmethod
    def documents(self, seed: int) -> Documents:
        """The corpus that the same seed's requests refer to.

        Raises:
            ValueError: the file that describes it is broken (file and line named).
        """


def check_retrieved(columns: RequestColumns, documents: Documents, start: int = 0) -> None:
    """Refuses requests that break the contract of a `KnowledgeWorkload`.

    Args:
        columns: consecutive requests of one.
        documents: its corpus.
        start: number of the first of them, for the messages.

    Raises:
        ValueError: a request has no stages, an empty list, a document that is not in the corpus or
            is listed twice, or a prompt too short for its documents.
    """
    retrieved = columns.retrieved
    if retrieved is None or len(retrieved) != len(columns):
        found = "none" if retrieved is None else f"those of {len(retrieved)}"
        raise ValueError(
            f"requests {start} to {start + len(columns) - 1} have retrieved documents for {found} "
            "and must have them for all; fill the column retrieved"
        )
    if not retrieved:
        return
    num_stages = np.fromiter(map(len, retrieved), np.int64, len(retrieved))
    if not num_stages.all():
        _refuse(start + int(np.argmin(num_stages)), "retrieved=()", "must have one stage at least",
                "give it the answer as its only stage")  # fmt: skip
    lists = list(chain.from_iterable(retrieved))
    owners = np.repeat(np.arange(start, start + len(retrieved)), num_stages)
    flat, sizes = _check_lists(lists, owners, len(documents))
    reached = np.concatenate(([0], np.cumsum(documents.tokens[flat])))
    answers = np.cumsum(num_stages) - 1
    ends = np.cumsum(sizes)[answers]
    held = reached[ends] - reached[ends - sizes[answers]]
    least = documents.system_tokens + held + 1
    short = np.flatnonzero(columns.prompt_tokens < least)
    if len(short):
        at = int(short[0])
        _refuse(
            start + at,
            f"prompt_tokens={columns.prompt_tokens[at]}",
            f"must be at least {least[at]}: system prompt, documents and a token of question",
            "add them up from documents(seed)",
        )


def _check_lists(
    lists: Sequence[tuple[int, ...]], owners: NDArray[np.int64], num_documents: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """All documents in a row, and how many each list has."""
    sizes = np.fromiter(map(len, lists), np.int64, len(lists))
    if not sizes.all():
        _refuse(int(owners[np.argmin(sizes)]), "an empty list of documents", "must name one at "
                "least", "leave the stage out until the search has found something")  # fmt: skip
    distinct = np.fromiter(map(len, map(set, lists)), np.int64, len(lists))
    if (distinct < sizes).any():
        at = int(np.argmax(distinct < sizes))
        _refuse(int(owners[at]), f"the list {lists[at]}", "must name no document twice",
                "keep the first of them and move the others up")  # fmt: skip
    flat = np.fromiter(chain.from_iterable(lists), np.int64, int(sizes.sum()))
    outside = np.flatnonzero((flat < 0) | (flat >= num_documents))
    if len(outside):
        place = int(outside[0])
        owner = int(owners[np.searchsorted(np.cumsum(sizes), place, side="right")])
        _refuse(owner, f"document {flat[place]}", f"must be from 0 to {num_documents - 1}",
                "number documents as documents(seed).tokens does")  # fmt: skip
    return flat, sizes


def _refuse(request: int, value: str, rule: str, way_out: str) -> None:
    raise ValueError(f"request {request} has {value}, which {rule}; {way_out}")
