"""Recorded searches: JSON Lines of a corpus, then of each request and what its search showed.

The first line is `{"document_tokens": [...], "system_tokens": n}`, each following one
`{"arrival_s": t, "question_tokens": n, "output_tokens": n, "stages": [[3, 8], [3, 5]]}`. The stages
of one search are those of RAGCache (TOCS 2025): provisional lists of documents, the last final.
"""

import gzip
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TextIO, cast

import numpy as np

from sim.files import whole_file
from sim.workload.knowledge import Documents, KnowledgeWorkload
from sim.workload.trace_lines import broken, json_fields, json_time, read_lines, token_count
from sim.workload.trace_replay import TraceReplay, TraceRow

HEADER = ("document_tokens", "system_tokens")


class RetrievedRequest(NamedTuple):
    """One request of a retrieval trace; its fields are those of a line."""

    arrival_s: float
    """Seconds since the start, not decreasing."""
    question_tokens: int
    output_tokens: int
    stages: tuple[tuple[int, ...], ...]
    """Documents by rank after each stage of its search; the last entry is the answer."""


@dataclass(kw_only=True)
class RetrievalTrace(TraceReplay, KnowledgeWorkload):
    """Replay of a retrieval trace. Its prompts cannot be cut, as that would cut documents."""

    def __post_init__(self) -> None:
        """Refuses factors and limits out of range, and any `max_input_tokens`."""
        super().__post_init__()
        if self.max_input_tokens is not None:
            raise ValueError(
                f"max_input_tokens={self.max_input_tokens} would cut the documents of a prompt; "
                "set it to null and shorten document_tokens in the trace"
            )

    @property
    def ticks_per_s(self) -> int:
        """Seconds."""
        return 1

    def documents(self, seed: int) -> Documents:
        """The corpus of the first line; the seed changes nothing."""
        lines = read_lines(self.path)
        return self._corpus(*next(lines))

    def rows(self, seed: int) -> Iterator[TraceRow]:
        """The lines after the first in order."""
        lines = read_lines(self.path)
        corpus = self._corpus(*next(lines))
        tokens: list[int] = corpus.tokens.tolist()
        for number, line in lines:
            fields = json_fields(self.path, number, line, RetrievedRequest._fields)
            stages = self._stages(number, fields[3], len(corpus))
            held = corpus.system_tokens + sum(tokens[one] for one in stages[-1])
            yield TraceRow(
                number,
                json_time(self.path, number, "arrival_s", fields[0], "seconds"),
                held + token_count(self.path, number, "question_tokens", fields[1]),
                token_count(self.path, number, "output_tokens", fields[2]),
                retrieved=stages,
            )

    def _corpus(self, number: int, line: str) -> Documents:
        listed, system = json_fields(self.path, number, line, HEADER)
        if not isinstance(listed, list) or not listed:
            problem = f"document_tokens={str(cast(Any, listed))[:40]} must be a list of lengths"
            raise broken(self.path, number, problem, "give the length of every document")
        lengths = [
            token_count(self.path, number, f"document_tokens[{at}]", value)
            for at, value in enumerate(cast(list[object], listed))
        ]
        system_tokens = token_count(self.path, number, "system_tokens", system, least=0)
        return Documents(np.array(lengths, np.int64), system_tokens)

    def _stages(self, number: int, value: object, count: int) -> tuple[tuple[int, ...], ...]:
        stages = cast(list[object], value if isinstance(value, list) else [])
        for listed in stages or [None]:
            documents = cast(list[int], listed if isinstance(listed, list) else [])
            known = all(type(one) is int and 0 <= one < count for one in documents)
            if not documents or not known or len(set(documents)) < len(documents):
                shown = str(cast(Any, value))[:80]
                problem = (
                    f"stages={shown} must be lists of documents from 0 to {count - 1}, "
                    "one list and one document in each at least, none twice in a list"
                )
                raise broken(self.path, number, problem, "correct or remove the line")
        return tuple(map(tuple, cast(list[list[int]], stages)))


def write_retrieval_trace(
    path: Path, documents: Documents, rows: Iterable[RetrievedRequest]
) -> None:
    """Writes what `RetrievalTrace` reads: complete or not at all, compressed where named `.gz`.

    Args:
        path: the file; it takes its name when all is written.
        documents: the corpus.
        rows: the requests in order of arrival, read as a stream.

    Raises:
        ValueError: a row's arrival is not finite.
    """
    header = {
        "document_tokens": documents.tokens.tolist(),
        "system_tokens": documents.system_tokens,
    }
    with whole_file(path) as building, _opened(building, path.suffix == ".gz") as file:
        file.write(json.dumps(header) + "\n")
        for row in rows:
            file.write(json.dumps(row._asdict(), allow_nan=False) + "\n")


def _opened(path: Path, compressed: bool) -> TextIO:
    if compressed:
        return cast(TextIO, gzip.open(path, "wt", encoding="utf-8"))
    return path.open("w", encoding="utf-8")
