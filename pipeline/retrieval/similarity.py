"""Cosine similarities of queries to a gallery, computed so that equal gallery vectors have equal similarities."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

BLOCK = 256
"""Queries in a matrix product, if its result is not too large."""
LARGEST = 2**26
"""Similarities in a block (256 MiB). The shape of the matrix product must follow from the gallery's size alone: another
shape would round the last bits of a similarity differently, and so order near ties differently."""

CHUNK = 2**16
"""Vectors that are compared at a time."""

Vectors = npt.NDArray[np.floating]
Indices = npt.NDArray[np.int64]


class Similarity(Protocol):
    """Similarities of queries to a gallery.

    Attributes:
        order: (G,) gallery index of each column.
    """

    order: Indices

    def __call__(self, start: int, stop: int) -> npt.NDArray[np.floating]:
        """Return the similarities (stop - start, G) of queries `start` to `stop`; the caller may overwrite them."""


def block_size(gallery: int) -> int:
    """Return the number of queries in a matrix product with a gallery of this size."""
    return max(1, min(BLOCK, LARGEST // max(gallery, 1)))


def normalise(embeddings: Vectors) -> npt.NDArray[np.float32]:
    """L2-normalise embeddings (n, D) in float32, into a copy; a zero vector stays zero, and ties with everything.

    Finite vectors of any length keep their direction: they are first scaled by powers of two, which does not round.
    """
    vectors = np.asarray(embeddings)
    vectors = vectors if vectors.dtype in (np.float32, np.float64) else vectors.astype(np.float32)
    largest = np.maximum(vectors.max(axis=1, initial=0), -vectors.min(axis=1, initial=0))
    exponents = np.clip(np.frexp(largest)[1], np.finfo(vectors.dtype).minexp, np.finfo(vectors.dtype).maxexp)
    unit = (vectors * np.ldexp(vectors.dtype.type(1), -exponents)[:, None]).astype(np.float32, copy=False)
    unit /= np.maximum(np.sqrt(np.einsum("nd,nd->n", unit, unit)), np.float32(1e-12))[:, None]
    unit += np.float32(0)  # turns -0 into 0, since equal vectors are recognised by their bytes
    return unit


@dataclass(frozen=True)
class _DistinctVectors:
    """The distinct vectors of a gallery, sorted by their bytes.

    A matrix product may round the same vector differently in another column, so the order of the gallery's files would
    break ties between duplicates and decide near ties. Here, columns follow from the vectors alone.

    Attributes:
        vectors: (U, D) float32.
        copies: (U,) how often each vector occurs; the sum is G.
        order: (G,) gallery index of each vector after repeating the duplicates.
    """

    vectors: npt.NDArray[np.float32]
    copies: Indices
    order: Indices

    @classmethod
    def of(cls, unit: npt.NDArray[np.float32]) -> "_DistinctVectors":
        if not len(unit):
            return cls(unit, np.zeros(0, np.int64), np.zeros(0, np.int64))
        as_bytes = unit.view(np.dtype((np.void, unit.itemsize * unit.shape[1])))[:, 0]
        order = np.argsort(as_bytes, kind="stable")
        differs = np.ones(len(order), bool)  # from the vector before it
        for start in range(1, len(order), CHUNK):  # in one step, it would copy the whole gallery twice
            chunk = slice(start, start + CHUNK)
            differs[chunk] = as_bytes[order[chunk]] != as_bytes[order[start - 1 : start - 1 + len(differs[chunk])]]
        starts = np.flatnonzero(differs)
        return cls(unit[order[starts]], np.diff(np.append(starts, len(order))), order)


class Cosine:
    """Cosine similarity; a `Similarity`.

    Args:
        query: (Q, D), not necessarily normalised.
        gallery: (G, D), not necessarily normalised.
    """

    def __init__(self, query: Vectors, gallery: Vectors) -> None:
        self._query = query
        self._gallery = _DistinctVectors.of(normalise(gallery))
        self.order = self._gallery.order

    def __call__(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Return the similarities (stop - start, G) of queries `start` to `stop`."""
        cosines: npt.NDArray[np.float32] = normalise(self._query[start:stop]) @ self._gallery.vectors.T  # (b, U)
        all_distinct = len(self._gallery.vectors) == len(self.order)
        return cosines if all_distinct else np.repeat(cosines, self._gallery.copies, axis=1)  # (b, G)
