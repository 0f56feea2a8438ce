"""From embeddings of whatever runs a network to scores."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pipeline.protocols import PROTOCOLS
from pipeline.retrieval import scoring
from pipeline.retrieval.metrics import Retrieval
from pipeline.retrieval.scoring import Side

Indices = npt.NDArray[np.int64]
"""Indices of the manifest, (n,)."""

Embedder = Callable[[Indices], npt.NDArray[np.float32]]
"""Embeddings (n, D) of the images in these rows, whatever runs the network."""


class Images(Protocol):
    """Pictures by their row in the manifest."""

    def batch(self, rows: Indices) -> npt.NDArray[np.uint8]:
        """Images (n, h, w, 3) of these rows, RGB."""


class Manifest(Protocol):
    """What is evaluated on: `items[row].path`, rows of splits, and labels of rows."""

    @property
    def items(self) -> Sequence[Any]:
        """The images, in the order of their rows."""

    def indices(self, *splits: str) -> Indices:
        """Indices of these splits."""

    def identities(self, rows: Indices) -> npt.NDArray[np.str_]:
        """Identities (n,) of these rows."""

    def cameras(self, rows: Indices) -> npt.NDArray[np.str_]:
        """Cameras (n,) of these rows."""


def evaluate_embedder(
    embedder: Embedder, manifest: Manifest, query_split: str, gallery_split: str, protocol: str
) -> Retrieval:
    """Score whatever turns rows into embeddings on two splits of the manifest.

    Where the protocol has no gallery of its own, all images are in the split of the queries.

    Raises:
        ValueError: If an embedding is not finite, naming its image, or no query has a match.
    """
    query, gallery = manifest.indices(query_split), manifest.indices(gallery_split)
    embeddings = embedder(np.concatenate([query, gallery]))
    broken = np.flatnonzero(~np.isfinite(embeddings).all(axis=1))
    if len(broken):
        path = manifest.items[np.concatenate([query, gallery])[broken[0]]].path
        raise ValueError(
            f"embedding of {path} is not finite ({len(broken)} of {len(embeddings)} images); the network diverged"
        )
    return scoring.evaluate(protocol, *sides(embeddings, manifest, query_split, gallery_split, protocol))


def sides(
    embeddings: npt.NDArray[np.float32], manifest: Manifest, query_split: str, gallery_split: str, protocol: str
) -> tuple[Side, Side | None]:
    """Queries and gallery for `scoring.evaluate`; no gallery where the protocol has none of its own.

    Args:
        embeddings: (query + gallery, D), in the order of the splits' rows.
        manifest: Knows their labels.
        query_split: Name of the queries' split.
        gallery_split: Of the gallery's.
        protocol: Name in `PROTOCOLS`.
    """
    query, gallery = manifest.indices(query_split), manifest.indices(gallery_split)
    asking, asked = (
        Side(found, manifest.identities(rows), manifest.cameras(rows))
        for found, rows in ((embeddings[: len(query)], query), (embeddings[len(query) :], gallery))
    )
    return asking, asked if PROTOCOLS[protocol].gallery == "given" else None
