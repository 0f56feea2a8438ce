"""Cosine similarities of queries to a gallery, a block of queries at a time, with ties that are ties."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

BLOCK = 256
"""Queries in a matrix product, as long as its result stays small."""
LARGEST = 2**26
"""Similarities in a block (256 MiB). The shape of the product must follow from the sizes alone: another one rounds the
last bits of a similarity otherwise, and so orders near ties otherwise."""

CHUNK = 2**16
"""Indices that are compared at a time."""

Vectors = npt.NDArray[np.floating]
Indices = npt.NDArray[np.int64]


class Similarity(Protocol):
    """How alike queries and gallery are.

    Attributes:
        order: (G,) which row of the gallery each column shows.
    """

    order: Indices

    def __call__(self, start: int, stop: int) -> npt.NDArray[np.floating]:
        """Similarities (stop - start, G) of these queries; the caller may overwrite them."""


def block_of(gallery: int) -> int:
    """Queries at a time for a gallery of this size."""
    return max(1, min(BLOCK, LARGEST // max(gallery, 1)))


def normalise(embeddings: Vectors) -> npt.NDArray[np.float32]:
    """Embeddings (n, D) at length 1 in float32, a copy; a zero vector stays zero, and ties with everything.

    Finite numbers of any size keep their direction: they are scaled by powers of two first, which rounds nothing.
    """
    given = np.asarray(embeddings)
    given = given if given.dtype in (np.float32, np.float64) else given.astype(np.float32)
    largest = np.maximum(given.max(axis=1, initial=0), -given.min(axis=1, initial=0))
    exponents = np.clip(np.frexp(largest)[1], np.finfo(given.dtype).minexp, np.finfo(given.dtype).maxexp)
    unit = (given * np.ldexp(given.dtype.type(1), -exponents)[:, None]).astype(np.float32, copy=False)
    unit /= np.maximum(np.sqrt(np.einsum("nd,nd->n", unit, unit)), np.float32(1e-12))[:, None]
    unit += np.float32(0)  # -0 becomes 0: equal numbers are to be equal bytes
    return unit


@dataclass(frozen=True)
class _Distinct:
    """The gallery in an order that follows from its content, each of several equal vectors kept once.

    A matrix product may round one and the same row differently in another column, which would break ties between
    duplicates, and decide near ties, by the order of the gallery's files.

    Attributes:
        vectors: (U, D) float32.
        copies: (U,) how many rows have each; they sum to G.
        order: (G,) which row of the gallery each place shows.
    """

    vectors: npt.NDArray[np.float32]
    copies: Indices
    order: Indices

    @classmethod
    def of(cls, unit: npt.NDArray[np.float32]) -> "_Distinct":
        if not len(unit):
            return cls(unit, np.zeros(0, np.int64), np.zeros(0, np.int64))
        rows = unit.view(np.dtype((np.void, unit.itemsize * unit.shape[1])))[:, 0]
        order = np.argsort(rows, kind="stable")
        new = np.ones(len(rows), bool)
        for start in range(1, len(rows), CHUNK):  # whole copies would need as much memory as all that is kept
            some = slice(start, start + CHUNK)
            new[some] = rows[order[some]] != rows[order[start - 1 : start - 1 + len(new[some])]]
        starts = np.flatnonzero(new)
        return cls(unit[order[starts]], np.diff(np.append(starts, len(rows))), order)


class Cosine:
    """Cosine similarity.

    Args:
        query: (Q, D), of any length.
        gallery: (G, D), of any length.
    """

    def __init__(self, query: Vectors, gallery: Vectors) -> None:
        self._query = query
        self._gallery = _Distinct.of(normalise(gallery))
        self.order = self._gallery.order

    def __call__(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Similarities (stop - start, G) of these queries."""
        found: npt.NDArray[np.float32] = normalise(self._query[start:stop]) @ self._gallery.vectors.T  # (b, U)
        alone = len(self._gallery.vectors) == len(self.order)
        return found if alone else np.repeat(found, self._gallery.copies, axis=1)  # (b, G)
