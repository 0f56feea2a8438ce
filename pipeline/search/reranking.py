"""Ranking again: images that have neighbours in common are alike.

Source: Zhong et al., "Re-ranking Person Re-identification with k-reciprocal Encoding", CVPR 2017, and its public code.
Distances of all images to all are looked at a block at a time; only each image's neighbours are kept.
"""

import numpy as np
import numpy.typing as npt
from scipy import sparse

from pipeline.retrieval.similarity import Indices, Vectors, block_of, normalise

K1, K2, LAMBDA = 20, 6, 0.3
"""Neighbours that must be mutual, neighbours that are averaged over, and the weight of the original distance."""


class Reranked:
    """Likeness by k-reciprocal neighbours.

    Args:
        query: (Q, D), of any length.
        gallery: (G, D), of any length; the same object where images are asked of each other.
        k1: Neighbours that must be mutual.
        k2: Neighbours that are averaged over.
        weight: Of the original distance, in [0, 1].
    """

    def __init__(self, query: Vectors, gallery: Vectors, k1: int = K1, k2: int = K2, weight: float = LAMBDA) -> None:
        self._unit = normalise(query if query is gallery else np.concatenate([query, gallery]))
        self._first = 0 if query is gallery else len(query)  # of the gallery
        self._weight = weight
        self.order = np.arange(len(gallery))
        neighbours, self._farthest = self._look(k1)
        encoded = self._encode(neighbours, k1)
        near = neighbours[:, :k2]
        count, width = near.shape
        mean = sparse.csr_array(
            (np.full(near.size, 1 / width), near.ravel(), np.arange(0, near.size + 1, width)), (count, count)
        )
        self._rows = (mean @ encoded).tocsr()
        self._columns = self._rows.tocsc()

    def __call__(self, start: int, stop: int) -> npt.NDArray[np.float64]:
        """What is left of 1 after the mixed distance, (stop - start, G), of these queries."""
        distances = self._distances(start, stop)[:, self._first :]
        found = np.empty(distances.shape)
        for row, query in enumerate(range(start, stop)):
            found[row] = self._jaccard(query)[self._first :]
        return 1 - (1 - self._weight) * found - self._weight * distances

    def _distances(self, start: int, stop: int) -> npt.NDArray[np.float64]:
        """Squared distances (stop - start, N) to all images, as shares of the largest."""
        found = 2 - 2 * (self._unit[start:stop] @ self._unit.T).astype(np.float64)
        return np.maximum(found, 0) / self._farthest[start:stop, None]

    def _look(self, k1: int) -> tuple[Indices, npt.NDArray[np.float64]]:
        """Nearest images (N, k1 + 1) of each, itself first, and its largest squared distance (N,)."""
        count = len(self._unit)
        kept = min(k1 + 1, count)
        neighbours, farthest = np.empty((count, kept), np.int64), np.empty(count)
        size = block_of(count)
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
        """Each image as weights of its mutual neighbours and of theirs, (N, N)."""
        half = neighbours[:, : round(k1 / 2) + 1]
        mutual = [_mutual(neighbours, image) for image in range(len(neighbours))]
        mutual_half = [_mutual(half, image) for image in range(len(neighbours))]
        indices, values, ends = [], [], [0]
        for image, found in enumerate(mutual):
            wider = [found]
            for candidate in found:
                theirs = mutual_half[candidate]
                if np.isin(theirs, found).sum() > 2 / 3 * len(theirs):
                    wider.append(theirs)
            place = np.unique(np.concatenate(wider))
            distances = np.maximum(2 - 2 * (self._unit[place] @ self._unit[image]).astype(np.float64), 0)
            weights = np.exp(-distances / self._farthest[image])
            indices.append(place)
            values.append(weights / weights.sum())
            ends.append(ends[-1] + len(place))
        shape = (len(neighbours), len(neighbours))
        return sparse.csr_array((np.concatenate(values), np.concatenate(indices), np.array(ends)), shape)

    def _jaccard(self, query: int) -> npt.NDArray[np.float64]:
        """Jaccard distances (N,) of an encoded image to all."""
        own = slice(self._rows.indptr[query], self._rows.indptr[query + 1])
        shared = self._columns[:, self._rows.indices[own]]
        weights = np.repeat(self._rows.data[own], np.diff(shared.indptr))
        least = np.minimum(shared.data, weights)
        common = np.bincount(shared.indices, weights=least, minlength=len(self._unit))
        return 1 - common / (2 - common)


def _mutual(neighbours: Indices, image: int) -> Indices:
    """Those of an image's neighbours that have it among theirs."""
    forward = neighbours[image]
    return forward[(neighbours[forward] == image).any(axis=1)]
