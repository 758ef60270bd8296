"""Documents to retrieve from, and questions whose answer is known to lie in one of them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.random import Generator

NUM_TOPICS = 32
"""Topics of a generated corpus: documents of one topic share many of their words."""
TOPIC_WORDS = 64
"""Words that a topic prefers."""
TOPIC_SHARE = 0.7
"""Words of a generated document that are drawn from its topic; the others from all words."""
SENTENCE_WORDS = 12
"""Words of a generated sentence."""
QUESTION_WORDS = 12
"""Words of a question, or fewer where its document has fewer."""

_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"
_VOCABULARY_WORDS = 2048
_CHARACTERS_PER_TOKEN = 4
_REDRAWS = 100


class Encoder(Protocol):
    """Text to token ids, as `backends.tokenizer.Tokenizer` does it."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, nothing added."""
        ...


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Documents by number: different texts, each with at least one letter or digit."""

    texts: list[str]
    token_ids: list[list[int]] | None = None
    """Token ids of each text, where a tokenizer was given."""

    def __post_init__(self) -> None:
        if not self.texts:
            raise ValueError("0 documents: a corpus needs at least 1; give it texts")
        for number, text in enumerate(self.texts):
            if not _has_words(text):
                raise ValueError(
                    f"document {number} ({text[:40]!r}) needs a letter or digit; leave it out"
                )
        if repeats := _repeats(self.texts):
            raise ValueError(
                f"document {repeats[0][0]} repeats document {repeats[0][1]}: texts must differ; "
                "corpus_of drops those that repeat"
            )
        if self.token_ids is not None and len(self.token_ids) != len(self.texts):
            raise ValueError(
                f"{len(self.token_ids)} lists of token ids must be as many as the "
                f"{len(self.texts)} documents; leave them out, or give one for each"
            )

    def __len__(self) -> int:
        return len(self.texts)


def corpus_of(texts: Sequence[str], tokenizer: Encoder | None = None) -> Corpus:
    """The corpus of these texts. Of equal texts the first stays; a warning counts the others.

    Args:
        texts: the documents, in the order of their numbers.
        tokenizer: makes the token ids; without it there are none.

    Raises:
        ValueError: there is no text, or one without a letter or digit.
    """
    if repeats := _repeats(texts):
        later, first = repeats[0]
        warnings.warn(
            f"{len(repeats)} of {len(texts)} documents repeat an earlier one and are dropped, the "
            f"first of them document {later}, which repeats document {first}; later documents "
            "move up",
            stacklevel=2,
        )
    kept = list(dict.fromkeys(texts))
    token_ids = None if tokenizer is None else [tokenizer.encode(text) for text in kept]
    return Corpus(texts=kept, token_ids=token_ids)


def python_topics(passage_tokens: int = 200, tokenizer: Encoder | None = None) -> Corpus:
    """Passages of Python's language reference, from `pydoc_data.topics`, which comes with Python.

    Pages in order of their names, each cut into runs of whole paragraphs. A passage ends before
    the paragraph with which it would be longer than `passage_tokens`; a longer paragraph is a
    passage by itself. Some pages contain others, so passages that repeat are left out without a
    warning. Another version of Python has other pages.

    Args:
        passage_tokens: tokens of a passage; without a tokenizer four characters count as one.
        tokenizer: counts tokens, and makes the token ids.

    Raises:
        ValueError: `passage_tokens` is below 1.
    """
    from pydoc_data.topics import topics

    if passage_tokens < 1:
        raise ValueError(f"passage_tokens={passage_tokens} must be at least 1; try 200")
    passages = (
        passage
        for name in sorted(topics)
        for passage in _passages(topics[name], passage_tokens, tokenizer)
    )
    return corpus_of(list(dict.fromkeys(filter(_has_words, passages))), tokenizer)


def generated(
    seed: int, num_documents: int, words: int, tokenizer: Encoder | None = None
) -> Corpus:
    """Documents of made-up words, as many as asked for; a longer corpus begins with a shorter.

    Each document has a topic. It draws most of its words from those that its topic prefers and the
    others from all, by Zipf's law, so that documents of a topic are near each other.

    Args:
        seed: decides the words, the topics and the documents.
        num_documents: how many.
        words: in each document.
        tokenizer: makes the token ids; without it there are none.

    Raises:
        ValueError: a number is out of range, or so many documents so short cannot all differ.
    """
    for name, value, least in (("seed", seed, 0), ("words", words, 1)):
        if value < least:
            raise ValueError(f"{name}={value} must be at least {least}; try {max(least, 100)}")
    language = _Language(seed)
    texts: dict[str, None] = {}
    for number in range(num_documents):
        stream = np.random.default_rng((seed, 1, number))
        drawn = (language.document(stream, words) for _ in range(_REDRAWS))
        text = next((text for text in drawn if text not in texts), None)
        if text is None:
            raise ValueError(
                f"words={words} is too short for num_documents={num_documents}: document {number} "
                f"repeated others {_REDRAWS} times, and they must differ; ask for more words"
            )
        texts[text] = None
    return corpus_of(list(texts), tokenizer)


def questions(corpus: Corpus, seed: int, documents: Sequence[int]) -> list[str]:
    """A question about each of these documents: a run of its words, so that it is found near it.

    Asked about twice, a document gives two draws: its place in `documents` takes part in them.

    Args:
        corpus: the documents.
        seed: decides where in its document a question begins.
        documents: number of the document of each question.

    Raises:
        ValueError: there is no such document, or the seed is negative.
    """
    if seed < 0:
        raise ValueError(f"seed={seed} must not be negative; use 0 or more")
    asked: list[str] = []
    for place, number in enumerate(documents):
        if not 0 <= number < len(corpus):
            raise ValueError(
                f"document {number} must be one of the {len(corpus)} of the corpus; they are "
                f"numbered 0 to {len(corpus) - 1}"
            )
        words = [word for word in corpus.texts[number].split() if _has_words(word)]
        stream = np.random.default_rng((seed, place, number))
        first = int(stream.integers(max(len(words) - QUESTION_WORDS, 0) + 1))
        asked.append(" ".join(words[first : first + QUESTION_WORDS]))
    return asked


class _Language:
    """Made-up words, and how often each topic uses them."""

    def __init__(self, seed: int) -> None:
        stream = np.random.default_rng((seed, 0))
        syllables = [first + second for first in _CONSONANTS for second in _VOWELS]
        numbers = stream.permutation(len(syllables) ** 2)[:_VOCABULARY_WORDS]
        pairs = [divmod(int(number), len(syllables)) for number in numbers]
        self._words = np.array([syllables[first] + syllables[second] for first, second in pairs])
        self._topics = [
            stream.permutation(_VOCABULARY_WORDS)[:TOPIC_WORDS] for _ in range(NUM_TOPICS)
        ]
        self._of_all, self._of_topic = _zipf(_VOCABULARY_WORDS), _zipf(TOPIC_WORDS)

    def document(self, stream: Generator, words: int) -> str:
        """A document of so many words, in sentences."""
        preferred = self._topics[stream.integers(NUM_TOPICS)]
        chosen = np.where(
            stream.random(words) < TOPIC_SHARE,
            preferred[stream.choice(TOPIC_WORDS, words, p=self._of_topic)],
            stream.choice(_VOCABULARY_WORDS, words, p=self._of_all),
        )
        text = self._words[chosen].tolist()
        starts = range(0, words, SENTENCE_WORDS)
        sentences = (" ".join(text[start : start + SENTENCE_WORDS]) for start in starts)
        return " ".join(f"{sentence.capitalize()}." for sentence in sentences)


def _zipf(num_words: int) -> np.ndarray:
    weights = 1.0 / np.arange(1, num_words + 1)
    return weights / weights.sum()


def _passages(page: str, passage_tokens: int, tokenizer: Encoder | None) -> Iterator[str]:
    passage = ""
    for paragraph in filter(None, (part.strip("\n") for part in page.split("\n\n"))):
        longer = f"{passage}\n\n{paragraph}" if passage else paragraph
        if passage and _num_tokens(longer, tokenizer) > passage_tokens:
            yield passage
            longer = paragraph
        passage = longer
    if passage:
        yield passage


def _num_tokens(text: str, tokenizer: Encoder | None) -> float:
    return len(text) / _CHARACTERS_PER_TOKEN if tokenizer is None else len(tokenizer.encode(text))


def _has_words(text: str) -> bool:
    return any(character.isalnum() for character in text)


def _repeats(texts: Sequence[str]) -> list[tuple[int, int]]:
    """Numbers of the texts that repeat an earlier one, each with the number of the first such."""
    first = {text: number for number, text in reversed(list(enumerate(texts)))}
    return [(number, first[text]) for number, text in enumerate(texts) if first[text] != number]
