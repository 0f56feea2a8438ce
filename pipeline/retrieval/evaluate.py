"""Score the embeddings of the manifest's images, whatever runs the network."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pipeline.protocols import PROTOCOLS
from pipeline.retrieval import scoring
from pipeline.retrieval.metrics import Retrieval
from pipeline.retrieval.scoring import Side

Indices = npt.NDArray[np.int64]
"""Positions of images in the manifest, (n,)."""

Embedder = Callable[[Indices], npt.NDArray[np.float32]]
"""Returns the embeddings (n, D) of images."""


class Images(Protocol):
    """Decoded images by index; see `pipeline.data.images.Images`."""

    def batch(self, indices: Indices) -> npt.NDArray[np.uint8]:
        """Return RGB images (n, h, w, 3)."""


class Manifest(Protocol):
    """Splits and labels of images; see `pipeline.data.manifest.Manifest`."""

    @property
    def items(self) -> Sequence[Any]:
        """All images, each with a `name` for messages."""

    def indices(self, *splits: str) -> Indices:
        """Return the indices of all images in these splits."""

    def identities(self, indices: Indices) -> npt.NDArray[np.str_]:
        """Return the identities (n,) of images."""

    def cameras(self, indices: Indices) -> npt.NDArray[np.str_]:
        """Return the cameras (n,) of images."""


def evaluate_embedder(
    embedder: Embedder, manifest: Manifest, query_split: str, gallery_split: str, protocol: str
) -> Retrieval:
    """Embed and score two splits of the manifest; if the protocol takes no gallery, `gallery_split` must be empty.

    Raises:
        ValueError: If an embedding is not finite, naming its image, or no query has a match.
    """
    indices = np.concatenate([manifest.indices(query_split), manifest.indices(gallery_split)])
    embeddings = embedder(indices)
    broken = np.flatnonzero(~np.isfinite(embeddings).all(axis=1))
    if len(broken):
        name = manifest.items[indices[broken[0]]].name
        raise ValueError(
            f"embedding of {name} is not finite ({len(broken)} of {len(embeddings)} images); the network diverged"
        )
    return scoring.evaluate(protocol, *sides(embeddings, manifest, query_split, gallery_split, protocol))


def sides(
    embeddings: npt.NDArray[np.float32], manifest: Manifest, query_split: str, gallery_split: str, protocol: str
) -> tuple[Side, Side | None]:
    """Label embeddings and divide them into queries and gallery (None if the protocol takes none).

    Args:
        embeddings: (query + gallery, D), in the order of `manifest.indices` of the two splits.
        protocol: Name in `PROTOCOLS`.
    """
    query_indices, gallery_indices = manifest.indices(query_split), manifest.indices(gallery_split)
    query, gallery = (
        Side(vectors, manifest.identities(indices), manifest.cameras(indices))
        for vectors, indices in (
            (embeddings[: len(query_indices)], query_indices),
            (embeddings[len(query_indices) :], gallery_indices),
        )
    )
    return query, gallery if PROTOCOLS[protocol].gallery == "given" else None
