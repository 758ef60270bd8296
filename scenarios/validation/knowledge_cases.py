"""Corpora, questions and searches of the validation of knowledge caches.

Documents are found twice by a search in stages: once here, for the simulated panel, and again in
the background of the real one. Both must find the same, or decisions differ.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from backends.corpus import Corpus, generated, python_topics, questions
from backends.embeddings import HashedFeatures
from backends.knowledge_cache import Searcher, Texts
from backends.search_pool import SearchPool, Wanted
from backends.staged_search import StagedSearch
from backends.tokenizer import Tokenizer
from sim.engine import ReplicaLimits
from sim.generations import Question
from sim.knowledge_rules import Tiers
from sim.requests import Request
from sim.seeding import generator
from sim.workload.knowledge import Documents
from sim.workload.zipf import Zipf, zipf_exponent

NUM_DOCUMENTS = 200
WORDS = 40
"""Of a document of the tiny case, on average."""
QUESTION_TOKENS = 9
SYSTEM_TOKENS = 20
OUTPUT_TOKENS = 4
NUM_STAGES = 4
LIMITS = ReplicaLimits(max_num_seqs=6, max_num_batched_tokens=512, block_size=16, num_blocks=48)
HOST_BLOCKS = 90
"""Both tiers overflow: 200 documents of three blocks in pairs, against 48 and 90 blocks."""
RATE_PER_S = 300.0
TIMED_DOCUMENTS = 60
TIMED_LIMITS = ReplicaLimits(2, 256, 16, num_blocks=30)
TIMED_HOST_BLOCKS = 12
"""So small that in a hundred requests rules already differ by some per cent of TTFT."""
CONTEXT = 256
"""That no request of the skewed cases exceeds."""
READABLE_TOKENS = 60
"""Of a passage of the readable case, about."""
NUM_PASSAGES = 20

Estimate = Callable[[int, int], float]


class Case(NamedTuple):
    """Questions about a corpus, and the engine that answers them."""

    questions: list[Question]
    limits: ReplicaLimits
    tiers: Tiers
    search: StagedSearch
    embedded: np.ndarray
    """Of every question, [questions, dimension]."""
    system_tokens: int

    def searcher(self, stage_s: float = 0.0) -> Searcher:
        """A search in the background, at the arrival of each question.

        Args:
            stage_s: a stage takes at least so long.
        """
        return SearchPool(
            self.search,
            [
                Wanted(request_id=number, arrival_s=one.request.arrival_s, query=query)
                for number, (one, query) in enumerate(
                    zip(self.questions, self.embedded, strict=True)
                )
            ],
            stage_s=stage_s,
        )

    def paced(self, rate_per_s: float) -> "Case":
        """The same questions, arriving at another mean rate."""
        scale = len(self.questions) / self.questions[-1].request.arrival_s / rate_per_s
        return self._replace(
            questions=[
                one._replace(request=one.request._replace(arrival_s=scale * one.request.arrival_s))
                for one in self.questions
            ]
        )

    def texts(self, vocabulary: int, seed: int) -> Texts:
        """Random token ids of documents and questions."""
        stream = generator(seed, "texts")

        def ids(count: int) -> list[int]:
            return stream.integers(1, vocabulary, count).tolist()

        return Texts(
            [ids(int(count)) for count in self.tiers.documents.tokens],
            [ids(one.own_tokens - self.system_tokens) for one in self.questions],
            ids(self.system_tokens),
        )


def estimated_s(cached_tokens: int, new_tokens: int) -> float:
    """What the rules take for the seconds of a prefill: of a made-up machine, on both panels."""
    return 1e-3 + 1e-5 * new_tokens + 1e-8 * new_tokens * (cached_tokens + new_tokens / 2)


def tiny(num_requests: int, seed: int) -> Case:
    """Thousands of short requests of a skewed popularity, which overflow both tiers."""
    return _skewed(num_requests, seed, NUM_DOCUMENTS, LIMITS, HOST_BLOCKS, estimated_s)


def timed(num_requests: int, seed: int, prefill_s: Estimate) -> Case:
    """Requests of the same kind about fewer documents, for runs that are timed.

    Args:
        num_requests: how many.
        seed: of corpus, popularity and arrivals.
        prefill_s: what the rules know of a prefill's seconds, by (cached, new) tokens.
    """
    return _skewed(num_requests, seed, TIMED_DOCUMENTS, TIMED_LIMITS, TIMED_HOST_BLOCKS, prefill_s)


def _skewed(
    num_requests: int, seed: int, num_documents: int, limits: ReplicaLimits, host_blocks: int,
    prefill_s: Estimate,
) -> Case:  # fmt: skip
    corpus = generated(seed, num_documents, WORDS)
    lengths = [min(len(text.split()), 2 * WORDS) for text in corpus.texts]
    asked = _popular(num_requests, len(corpus), seed)
    gaps_s = generator(seed, "arrivals").standard_exponential(num_requests) / RATE_PER_S
    search, embedded = _search(corpus, questions(corpus, seed, asked), top_k=2)
    documents = Documents(np.array(lengths, np.int64), SYSTEM_TOKENS)
    return Case(
        _questions(search, embedded, np.cumsum(gaps_s), documents, [QUESTION_TOKENS] * num_requests,
                   OUTPUT_TOKENS),
        limits, Tiers(documents, host_blocks, prefill_s, lambda blocks: 0.0), search, embedded,
        SYSTEM_TOKENS,
    )  # fmt: skip


def readable(
    tokenizer: Tokenizer, num_requests: int, new_tokens: int, seed: int
) -> tuple[Case, Texts]:
    """Questions about passages of Python's own documentation, all at once."""
    every = python_topics(READABLE_TOKENS, tokenizer)
    # So few that most are asked for again, and so many that they do not fit into a tier.
    corpus = Corpus(texts=every.texts[:NUM_PASSAGES])
    asked = _popular(num_requests, len(corpus), seed)
    texts = questions(corpus, seed, asked)
    search, embedded = _search(corpus, texts, top_k=2)
    system = tokenizer.encode("Answer from these passages.\n")
    passages = [tokenizer.encode(f"{text}\n") for text in corpus.texts]
    asked_ids = [tokenizer.encode(f"Question: {text}?\nAnswer:") for text in texts]
    documents = Documents(np.array([len(ids) for ids in passages], np.int64), len(system))
    arrivals_s = np.zeros(num_requests)
    found = _questions(
        search, embedded, arrivals_s, documents, [len(ids) for ids in asked_ids], new_tokens
    )
    longest = max(one.request.prompt_tokens for one in found) + new_tokens
    # Room for two requests on the device: what others cached is often in host memory by then.
    blocks = 2 * -(-longest // 16)
    limits = ReplicaLimits(2, max(512, longest), 16, blocks)
    tiers = Tiers(documents, 4 * blocks, estimated_s, lambda count: 0.0)
    return (
        Case(found, limits, tiers, search, embedded, len(system)),
        Texts(passages, asked_ids, system),
    )


def _popular(count: int, num_documents: int, seed: int) -> list[int]:
    """Documents that questions are made from: the top 3 % get 60 % (RAGCache, section 3)."""
    zipf = Zipf(num_documents, zipf_exponent(max(num_documents, 100), 0.03, 0.6))
    return zipf.ranks(generator(seed, "popularity").random(count)).tolist()


def _search(corpus: Corpus, texts: Sequence[str], top_k: int) -> tuple[StagedSearch, np.ndarray]:
    embedder = HashedFeatures()
    search = StagedSearch(
        embedder.embed(corpus.texts), num_clusters=16, num_probed=8, num_stages=NUM_STAGES,
        top_k=top_k,
    )  # fmt: skip
    return search, embedder.embed(texts)


def _questions(
    search: StagedSearch, embedded: np.ndarray, arrivals_s: np.ndarray, documents: Documents,
    own_tokens: Sequence[int], output_tokens: int,
) -> list[Question]:  # fmt: skip
    """What the search finds for each question, stage by stage."""
    found: list[Question] = []
    for number, (query, arrival_s, own) in enumerate(
        zip(embedded, arrivals_s.tolist(), own_tokens, strict=True)
    ):
        stages = tuple(search.stages(query))
        own_all = documents.system_tokens + own
        prompt = own_all + int(documents.tokens[list(stages[-1])].sum())
        request = Request(number, arrival_s, prompt, output_tokens, output_tokens)
        found.append(Question(request, stages, own_all))
    return found
