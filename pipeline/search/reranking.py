"""Re-ranking by k-reciprocal encoding: images with common mutual neighbours are similar.

Source: Zhong et al., "Re-ranking Person Re-identification with k-reciprocal Encoding", CVPR 2017, and its public code.
The distances between all images are computed a block at a time; only the nearest neighbours of each image are kept.
"""

import numpy as np
import numpy.typing as npt
from scipy import sparse

from pipeline.retrieval.similarity import Indices, Vectors, block_size, normalise

K1, K2, LAMBDA = 20, 6, 0.3
"""Defaults of the paper; see `Reranked`."""


class Reranked:
    """Similarity by k-reciprocal neighbours; a `pipeline.retrieval.similarity.Similarity`.

    Args:
        query: (Q, D), not necessarily normalised.
        gallery: (G, D), not necessarily normalised; the same object as `query` if all images are both.
        k1: Number of neighbours among which two images must have each other.
        k2: Number of neighbours whose encodings are averaged (local query expansion).
        weight: Weight of the original distance, in [0, 1].
    """

    def __init__(self, query: Vectors, gallery: Vectors, k1: int = K1, k2: int = K2, weight: float = LAMBDA) -> None:
        self._unit = normalise(query if query is gallery else np.concatenate([query, gallery]))
        self._gallery_start = 0 if query is gallery else len(query)
        self._weight = weight
        self.order = np.arange(len(gallery))
        neighbours, self._farthest = self._nearest(k1)
        encoded = self._encode(neighbours, k1)
        near = neighbours[:, :k2]
        count, width = near.shape
        mean = sparse.csr_array(
            (np.full(near.size, 1 / width), near.ravel(), np.arange(0, near.size + 1, width)), (count, count)
        )
        self._rows = (mean @ encoded).tocsr()
        self._columns = self._rows.tocsc()

    def __call__(self, start: int, stop: int) -> npt.NDArray[np.float64]:
        """Return 1 - the weighted distance (stop - start, G) of the queries from `start` to `stop`."""
        distances = self._distances(start, stop)[:, self._gallery_start :]
        jaccard = np.empty(distances.shape)
        for row, query in enumerate(range(start, stop)):
            jaccard[row] = self._jaccard(query)[self._gallery_start :]
        return 1 - (1 - self._weight) * jaccard - self._weight * distances

    def _distances(self, start: int, stop: int) -> npt.NDArray[np.float64]:
        """Return squared distances (stop - start, N) to all images, divided by the largest of each image."""
        squared = 2 - 2 * (self._unit[start:stop] @ self._unit.T).astype(np.float64)
        return np.maximum(squared, 0) / self._farthest[start:stop, None]

    def _nearest(self, k1: int) -> tuple[Indices, npt.NDArray[np.float64]]:
        """Return the nearest images (N, k1 + 1) of each image, itself first, and its largest squared distance (N,)."""
        count = len(self._unit)
        kept = min(k1 + 1, count)
        neighbours, farthest = np.empty((count, kept), np.int64), np.empty(count)
        size = block_size(count)
        for start in range(0, count, size):
            stop = min(start + size, count)
            similarity = self._unit[start:stop] @ self._unit.T
            farthest[start:stop] = np.maximum(2 - 2 * similarity.min(axis=1).astype(np.float64), np.finfo(float).tiny)
            similarity[np.arange(stop - start), np.arange(start, stop)] = np.inf
            near = np.argpartition(-similarity, kept - 1, axis=1)[:, :kept]
            order = np.argsort(-np.take_along_axis(similarity, near, axis=1), axis=1, kind="stable")
            neighbours[start:stop] = np.take_along_axis(near, order, axis=1)
        return neighbours, farthest

    def _encode(self, neighbours: Indices, k1: int) -> sparse.csr_array:
        """Encode each image (N, N) as weights of its mutual neighbours, and of theirs if most of those are shared."""
        half = neighbours[:, : round(k1 / 2) + 1]
        mutual = [_mutual(neighbours, image) for image in range(len(neighbours))]
        mutual_half = [_mutual(half, image) for image in range(len(neighbours))]
        indices, values, ends = [], [], [0]
        for image, reciprocal in enumerate(mutual):
            expansion = [reciprocal]
            for candidate in reciprocal:
                theirs = mutual_half[candidate]
                if np.isin(theirs, reciprocal).sum() > 2 / 3 * len(theirs):
                    expansion.append(theirs)
            columns = np.unique(np.concatenate(expansion))
            distances = np.maximum(2 - 2 * (self._unit[columns] @ self._unit[image]).astype(np.float64), 0)
            weights = np.exp(-distances / self._farthest[image])
            indices.append(columns)
            values.append(weights / weights.sum())
            ends.append(ends[-1] + len(columns))
        shape = (len(neighbours), len(neighbours))
        return sparse.csr_array((np.concatenate(values), np.concatenate(indices), np.array(ends)), shape)

    def _jaccard(self, query: int) -> npt.NDArray[np.float64]:
        """Return the Jaccard distances (N,) of an image's encoding to those of all images."""
        row = slice(self._rows.indptr[query], self._rows.indptr[query + 1])
        shared = self._columns[:, self._rows.indices[row]]
        weights = np.repeat(self._rows.data[row], np.diff(shared.indptr))
        minimum = np.minimum(shared.data, weights)
        common = np.bincount(shared.indices, weights=minimum, minlength=len(self._unit))
        return 1 - common / (2 - common)


def _mutual(neighbours: Indices, image: int) -> Indices:
    """Return the neighbours of an image that have it among their own neighbours."""
    forward = neighbours[image]
    return forward[(neighbours[forward] == image).any(axis=1)]
