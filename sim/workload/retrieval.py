"""Questions about a corpus whose documents differ in popularity, with a search in stages.

RAGCache (TOCS 2025), its characterisation and evaluation: 0.3 million pages of Wikipedia of 3,718
tokens on average, 3 % of which get 60 % of the requests, Poisson arrivals. MMLU answers with one
token; Natural Questions with six on average, 99 % with at most 32: `output_tokens=6
lengths=exponential max_output_tokens=32`. How documents go together is ours: see `candidates.py`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sim.seeding import generator
from sim.workload.base import CHUNK_ROWS, RequestColumns
from sim.workload.candidates import Companions, distinct, stage_lists
from sim.workload.checks import require_count, require_not_negative
from sim.workload.knowledge import Documents, KnowledgeWorkload
from sim.workload.lengths import MAX_TOKENS, LengthDistribution, lognormal
from sim.workload.poisson import Poisson
from sim.workload.zipf import Zipf, zipf_exponent

MOST_PER_REQUEST = 64
"""Documents, stages and companions: a chunk holds them for each of its requests."""


@dataclass(kw_only=True)
class Retrieval(KnowledgeWorkload):
    """Poisson arrivals of questions, each of which retrieves `top_k` documents.

    A document's number is its popularity rank at the start, 0 the most popular; its length does not
    depend on it. The first document of a request is its topic, the others are companions of it.
    """

    rate_per_s: float
    """Mean requests per second."""
    num_requests: int | None = None
    """How many requests come; either this or `duration_s`."""
    duration_s: float | None = None
    """How long requests come (seconds); either this or `num_requests`."""
    num_documents: int = 300_000
    """Documents of the corpus."""
    popular_share: float = 0.03
    """Share of the documents, the most popular ones, that `popular_requests` is about (ratio)."""
    popular_requests: float = 0.6
    """Share of the requests whose topic is one of them; equal to `popular_share`: all documents
    are as popular (ratio)."""
    requests_per_new_document: int | None = None
    """After so many requests another document, asked for least until then, becomes the most popular
    one, and all others move down a rank; null: popularity never changes. An assumption."""
    document_tokens: int = 3718
    """Mean length of a document, before the limit (tokens)."""
    document_cv: float = 0.5
    """Standard deviation over mean of the lengths, lognormal; 0: all the same. An assumption: the
    paper states the mean only (ratio)."""
    max_document_tokens: int | None = 8192
    """Longer documents are cut to it; null cuts none (tokens)."""
    system_tokens: int = 0
    """Length of the system prompt in front of every prompt; 0: none (tokens)."""
    question_tokens: int = 100
    """Length of every question (tokens)."""
    output_tokens: int = 1
    """Mean length of an answer, before the limit (tokens)."""
    lengths: LengthDistribution = LengthDistribution.fixed
    """Distribution of the answers' lengths: fixed, uniform, exponential or lognormal."""
    length_cv: float | None = None
    """Standard deviation over mean of them; uniform and lognormal need it (ratio)."""
    top_k: int = 2
    """Documents that a request retrieves."""
    neighbours: int = 8
    """Companions of a topic that the other documents of its requests are drawn from; a corpus with
    fewer other documents has fewer."""
    num_stages: int = 4
    """Stages of the search; after each it shows a provisional list."""
    found_per_stage: float = 0.9
    """Chance that a stage finds a document of the answer that was not found before; the last finds
    all (ratio). `benchmarks/search_stages.py` measures 0.9 for the first of four stages."""

    def __post_init__(self) -> None:
        """Refuses counts, lengths and shares out of range, and a corpus too small for its lists."""
        super().__post_init__()
        for name in ("num_documents", "document_tokens", "max_document_tokens",
                     "question_tokens", "top_k", "neighbours", "num_stages"):  # fmt: skip
            require_count(name, getattr(self, name), getattr(Retrieval, name))
        require_count("requests_per_new_document", self.requests_per_new_document, 20)
        for name in ("top_k", "neighbours", "num_stages"):
            if getattr(self, name) > MOST_PER_REQUEST:
                raise ValueError(
                    f"{name}={getattr(self, name)} must be at most {MOST_PER_REQUEST}; "
                    f"try {name}={getattr(Retrieval, name)}"
                )
        require_not_negative("document_cv", self.document_cv)
        require_not_negative("system_tokens", self.system_tokens)
        if not 0 < self.found_per_stage <= 1:
            raise ValueError(
                f"found_per_stage={self.found_per_stage} must be above 0 and at most 1; "
                "try found_per_stage=0.9"
            )
        self._check_corpus()
        self._load()

    def _check_corpus(self) -> None:
        # Before the last stage a list may show nothing of the answer yet.
        lists = min(self.num_stages, 2)
        needed = self.top_k * lists
        if self.num_documents < needed:
            raise ValueError(
                f"top_k={self.top_k} with num_stages={self.num_stages} needs {needed} documents "
                f"and num_documents={self.num_documents} must be as many at least; "
                f"try top_k={max(1, self.num_documents // lists)} or num_documents={needed}"
            )
        if self.neighbours < self.top_k - 1:
            raise ValueError(
                f"neighbours={self.neighbours} must be at least top_k - 1 = {self.top_k - 1}, as a "
                f"request's other documents come from them; try neighbours={self.top_k}"
            )
        top = MAX_TOKENS if self.max_document_tokens is None else self.max_document_tokens
        if self.document_tokens > top:
            raise ValueError(
                f"document_tokens={self.document_tokens} is a mean and must not exceed "
                f"max_document_tokens={top}; try max_document_tokens={2 * self.document_tokens}"
            )
        zipf_exponent(self.num_documents, self.popular_share, self.popular_requests)

    def _load(self) -> Poisson:
        """Arrivals and answers; its prompts are of no use, as questions are all as long."""
        return Poisson(
            rate_per_s=self.rate_per_s, num_requests=self.num_requests, duration_s=self.duration_s,
            input_tokens=1, output_tokens=self.output_tokens, lengths=self.lengths,
            length_cv=self.length_cv, max_output_tokens=self.max_output_tokens,
        )  # fmt: skip

    def documents(self, seed: int) -> Documents:
        """The corpus: lengths are lognormal and independent of popularity."""
        rng = generator(seed, "document_lengths")
        drawn = lognormal(rng, self.document_tokens, self.document_cv, self.num_documents)
        top = MAX_TOKENS if self.max_document_tokens is None else self.max_document_tokens
        return Documents(np.clip(np.rint(drawn), 1, top).astype(np.int64), self.system_tokens)

    def columns(self, seed: int, chunk_rows: int = CHUNK_ROWS) -> Iterator[RequestColumns]:
        """All requests in order of arrival, in chunks (see `Workload.columns`)."""
        corpus = self.documents(seed)
        search = _Search(self, seed)
        for load in self._load().columns(seed, chunk_rows):
            stages = search.next(len(load))
            held = corpus.tokens[stages[-1]].sum(axis=1)
            # Columns become tuples in C: rows one by one would take longer than all the rest.
            lists = [zip(*found.T.tolist(), strict=True) for found in stages]
            yield RequestColumns(
                load.arrival_s,
                self.system_tokens + held + self.question_tokens,
                load.output_tokens,
                retrieved=list(zip(*lists, strict=True)),
            )


class _Search:
    """The random streams of what the requests of one seed find."""

    def __init__(self, load: Retrieval, seed: int) -> None:
        self._load = load
        count, head = load.num_documents, (load.popular_share, load.popular_requests)
        self._zipf = Zipf(count, zipf_exponent(count, *head))
        key = int(generator(seed, "companions").integers(2**64, dtype=np.uint64))
        drifts = load.requests_per_new_document is not None
        self._companions = Companions(self._zipf, count, load.neighbours, key, drifts=drifts)
        self._streams = {
            name: generator(seed, name)
            for name in ("topics", "chosen_companions", "other_candidates", "found_stages")
        }
        self._num_asked = 0
        missed = (1 - load.found_per_stage) ** np.arange(1, load.num_stages)
        self._found_up_to = 1 - missed

    def next(self, count: int) -> list[NDArray[np.int64]]:
        """What the next requests find up to each stage, each of shape (count, top_k)."""
        load = self._load
        top_k = load.top_k
        moved = self._moved(count)
        ranks = self._zipf.ranks(self._streams["topics"].random(count))
        topics = (ranks - moved) % load.num_documents
        # Companions that the answer leaves over are what its search shows first instead.
        num_others = top_k if load.num_stages > 1 else 0
        num_chosen = min(top_k - 1 + num_others, self._companions.count)
        shown = self._with_companions(topics, num_chosen)
        missing = top_k + num_others - shown.shape[1]
        others = self._zipf.ranks(self._streams["other_candidates"].random((count, missing)))
        others = (others - moved[:, None]) % load.num_documents
        shown = distinct(others, shown, load.num_documents)
        uniforms = self._streams["found_stages"].random((count, top_k))
        found_at = np.searchsorted(self._found_up_to, uniforms, side="right")
        return stage_lists(shown[:, :top_k], shown[:, top_k:], found_at, load.num_stages)

    def _moved(self, count: int) -> NDArray[np.int64]:
        """By how many ranks documents have sunk when each of the next requests comes."""
        every, first = self._load.requests_per_new_document, self._num_asked
        self._num_asked += count
        return np.arange(first, self._num_asked) // every if every else np.zeros(count, np.int64)

    def _with_companions(self, topics: NDArray[np.int64], num_chosen: int) -> NDArray[np.int64]:
        """Each topic and some of its companions, all as likely, shape (topics, 1 + num_chosen)."""
        neighbours = self._companions.count
        uniforms = self._streams["chosen_companions"].random((len(topics), num_chosen))
        slots = (uniforms * neighbours).astype(np.int64)
        slots = distinct(slots, np.empty((len(topics), 0), np.int64), neighbours)
        different, where = np.unique(topics, return_inverse=True)
        companions = self._companions.of(different)[where[:, None], slots]
        return np.concatenate((topics[:, None], companions), axis=1)
