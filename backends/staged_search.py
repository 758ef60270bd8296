"""Vector search in stages, each with a provisional answer, so that a prefill can begin early.

RAGCache (arXiv 2404.12457), dynamic speculative pipelining: an inverted file (IVF) is searched in
groups of clusters. The index is that of faiss: `pip install 'diptych[rag]'`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

_ROUNDING = 1e-3  # by which the length of a vector may differ from 1


class StagedSearch:
    """Finds the documents whose vectors have the largest inner product with that of a query.

    Training puts the documents into clusters. A query looks into those whose centres are nearest to
    it, and the search is cut after groups of them. Several threads may search at once. The same
    vectors and seed give the same answers: training takes one thread, and so does a query.
    """

    def __init__(
        self,
        vectors: NDArray[np.float32],
        *,
        num_clusters: int,
        num_probed: int,
        num_stages: int,
        top_k: int,
        seed: int = 0,
    ) -> None:
        """Train the clusters on the documents themselves, and fill them.

        Args:
            vectors: float32 [documents, dimension], each of length 1.
            num_clusters: lists of the index.
            num_probed: clusters that a query looks into; all of them: the search is exact.
            num_stages: groups that these are searched in. Their sizes differ by one at most, the
                larger first.
            top_k: documents in an answer.
            seed: of the training, below 2^31.

        Raises:
            ValueError: a number is out of range, a vector is not of length 1, or faiss is missing.
        """
        vectors = np.ascontiguousarray(vectors, np.float32)
        _check_vectors(vectors)
        _check_counts(len(vectors), num_clusters, num_probed, num_stages, top_k)
        if not 0 <= seed < 2**31:
            raise ValueError(f"seed={seed} must lie from 0 to 2^31 - 1, as faiss has it; try 0")
        self.num_stages = num_stages
        self.top_k = top_k
        self._dimension = vectors.shape[1]
        self._num_probed = num_probed
        self.index = _filled(vectors, num_clusters, seed)
        """The faiss index, to be read only."""
        sizes = map(self.index.invlists.list_size, range(num_clusters))
        self._sizes = np.fromiter(sizes, np.int64, num_clusters)
        # The width of the scan's argument: smaller groups are filled up with -1, which is skipped.
        self.index.nprobe = -(-num_probed // num_stages)

    def stages(self, query: NDArray[np.float32]) -> Iterator[tuple[int, ...]]:
        """The documents found so far after each stage, nearest first, equally near by number.

        At most `top_k`; fewer while fewer were scanned. Each stage runs when it is asked for.

        Args:
            query: float32 [dimension], finite.

        Raises:
            ValueError: the query has another shape, or is not finite.
        """
        query = self._row(query)
        best: list[tuple[float, int]] = []
        for group in self._groups(query):
            best = sorted([*best, *self._nearest(query, group)])[: self.top_k]
            yield tuple(number for _, number in best)

    def search(self, query: NDArray[np.float32]) -> tuple[int, ...]:
        """What the last stage finds.

        Args:
            query: float32 [dimension], finite.
        """
        *_, last = self.stages(query)
        return last

    def scanned(self, query: NDArray[np.float32]) -> list[int]:
        """Vectors that each stage compares the query with; nothing is searched but the centres.

        Args:
            query: float32 [dimension], finite.
        """
        return [self._size(group) for group in self._groups(self._row(query))]

    def _row(self, query: NDArray[np.float32]) -> NDArray[np.float32]:
        """The query as float32 [1, dimension]."""
        if query.shape != (self._dimension,) or not np.isfinite(query).all():
            raise ValueError(
                f"query of shape {query.shape} must be finite and of shape ({self._dimension},), "
                "as the vectors of the documents are; embed it by the same embedder"
            )
        return np.ascontiguousarray(query[None], np.float32)

    def _groups(self, query: NDArray[np.float32]) -> list[NDArray[np.int64]]:
        """The clusters that each stage looks into, those with the nearest centres first."""
        _, clusters = self.index.quantizer.search(query, self._num_probed)
        return np.array_split(clusters[0], self.num_stages)

    def _size(self, group: NDArray[np.int64]) -> int:
        return int(self._sizes[group].sum())

    def _nearest(
        self, query: NDArray[np.float32], group: NDArray[np.int64]
    ) -> list[tuple[float, int]]:
        """Minus the product and the number of the nearest documents of these clusters."""
        clusters = np.full((1, self.index.nprobe), -1, np.int64)
        clusters[0, : len(group)] = group
        size = self._size(group)
        count = self.top_k
        while size:
            # One more than needed: where it is as near as the last, faiss' choice among equals is
            # arbitrary, and more are asked for until all equals are there.
            count = min(count + 1, size)
            products, numbers = self.index.search_preassigned(query, count, clusters, None)
            if count == size or products[0, -1] < products[0, self.top_k - 1]:
                found = zip((-products[0]).tolist(), numbers[0].tolist(), strict=True)
                return sorted(found)[: self.top_k]
            count *= 2
        return []


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise ValueError(
            "StagedSearch needs the package faiss-cpu, which is not installed; "
            "pip install 'diptych[rag]'"
        ) from error
    return faiss


def _filled(vectors: NDArray[np.float32], num_clusters: int, seed: int) -> Any:
    """An index trained on the vectors, with them in it."""
    faiss = _faiss()
    index = faiss.index_factory(
        vectors.shape[1], f"IVF{num_clusters},Flat", faiss.METRIC_INNER_PRODUCT
    )
    index.cp.seed = seed
    index.cp.min_points_per_centroid = 1  # else it prints that there are few
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        index.train(vectors)
        index.add(vectors)
    finally:
        faiss.omp_set_num_threads(threads)
    return index


def _check_vectors(vectors: NDArray[np.float32]) -> None:
    if vectors.ndim != 2 or not vectors.size:
        raise ValueError(
            f"vectors of shape {vectors.shape} must be [documents, dimension] with at least one "
            "of each; give the index documents"
        )
    lengths = np.linalg.norm(vectors, axis=1)
    wrong = np.flatnonzero(~(np.abs(lengths - 1) <= _ROUNDING))
    if len(wrong):
        raise ValueError(
            f"the vector of document {wrong[0]} has length {lengths[wrong[0]]:.6g}, and it must "
            "be 1; divide each vector by its length"
        )


def _check_counts(
    num_documents: int, num_clusters: int, num_probed: int, num_stages: int, top_k: int
) -> None:
    """Each count is at least 1 and at most the one that it is taken from."""
    bounds = {
        "num_clusters": (num_clusters, "num_documents", num_documents),
        "num_probed": (num_probed, "num_clusters", num_clusters),
        "num_stages": (num_stages, "num_probed", num_probed),
        "top_k": (top_k, "num_documents", num_documents),
    }
    for name, (value, whole, most) in bounds.items():
        if not 1 <= value <= most:
            raise ValueError(
                f"{name}={value} must be at least 1 and at most {whole}={most}; try {most}"
            )
