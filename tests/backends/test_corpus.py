import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.corpus import (
    QUESTION_WORDS,
    Corpus,
    corpus_of,
    generated,
    python_topics,
    questions,
)

TEXTS = st.lists(st.text("ab", min_size=1, max_size=2), min_size=1, max_size=12)


class Letters:
    """A tokenizer with a token for each character."""

    def encode(self, text):
        return [ord(letter) for letter in text]


@given(TEXTS)
def test_of_equal_texts_the_first_stays_and_the_others_are_counted(texts):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        corpus = corpus_of(texts)
    assert sorted(corpus.texts, key=texts.index) == corpus.texts
    assert set(corpus.texts) == set(texts)
    dropped = len(texts) - len(set(texts))
    assert [str(warning.message).split(" repeat")[0] for warning in caught] == (
        [f"{dropped} of {len(texts)} documents"] if dropped else []
    )


def test_the_warning_names_the_first_pair():
    with pytest.warns(UserWarning, match="document 2, which repeats document 1; later documents"):
        assert corpus_of(["a", "b", "b", "a"]).texts == ["a", "b"]


def test_a_tokenizer_gives_the_tokens_of_every_document():
    assert corpus_of(["ab", "c"], Letters()).token_ids == [[97, 98], [99]]
    assert corpus_of(["ab", "c"]).token_ids is None


def test_passages_are_whole_paragraphs_of_about_the_size_asked_for():
    from pydoc_data.topics import topics

    corpus = python_topics(passage_tokens=100)
    assert corpus.texts == python_topics(passage_tokens=100).texts
    pages = list(topics.values())
    assert all(len(text) <= 400 or "\n\n" not in text for text in corpus.texts)
    assert {part for text in corpus.texts for part in text.split("\n\n")} <= {
        part.strip("\n") for page in pages for part in page.split("\n\n")
    }


def test_the_tokenizer_measures_passages():
    corpus = python_topics(500, Letters())
    assert corpus.token_ids is not None
    assert all(len(text) <= 500 or "\n\n" not in text for text in corpus.texts)
    assert list(map(len, corpus.token_ids)) == list(map(len, corpus.texts))


def test_a_longer_generated_corpus_begins_with_a_shorter():
    longer = generated(3, 60, 40)
    assert longer.texts[:20] == generated(3, 20, 40).texts
    assert longer.texts[:20] != generated(4, 20, 40).texts
    assert {len(text.split()) for text in longer.texts} == {40}


def test_generated_documents_differ_or_are_refused():
    assert len(set(generated(0, 400, 2).texts)) == 400
    with pytest.raises(ValueError, match="words=1 is too short for num_documents=4000: document"):
        generated(0, 4000, 1)


def test_a_question_is_a_run_of_words_of_its_document():
    corpus = generated(1, 30, 50)
    documents = [4, 9, 9, 0, 29]
    asked = questions(corpus, 7, documents)
    assert asked == questions(corpus, 7, documents)
    assert asked != questions(corpus, 8, documents)
    assert asked[1] != asked[2]
    for text, number in zip(asked, documents, strict=True):
        assert len(text.split()) == QUESTION_WORDS
        assert text in corpus.texts[number]
    assert questions(corpus_of(["one - two"]), 0, [0]) == ["one two"]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: corpus_of([]), "0 documents: a corpus needs at least 1"),
        (lambda: corpus_of(["a", " -- "]), r"document 1 \(' -- '\) needs a letter or digit"),
        (lambda: Corpus(texts=["a", "b", "a"]), "document 2 repeats document 0.*corpus_of drops"),
        (lambda: Corpus(texts=["a"], token_ids=[]), "0 lists of token ids must be as many as"),
        (lambda: generated(0, 0, 5), "0 documents"),
        (lambda: generated(-1, 5, 5), "seed=-1 must be at least 0"),
        (lambda: generated(0, 5, 0), "words=0 must be at least 1; try 100"),
        (lambda: python_topics(0), "passage_tokens=0 must be at least 1"),
        (lambda: questions(corpus_of(["a"]), 0, [1]), "document 1 must be one of the 1 of"),
        (lambda: questions(corpus_of(["a"]), -1, [0]), "seed=-1 must not be negative"),
    ],
)
def test_what_cannot_be_a_corpus_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
