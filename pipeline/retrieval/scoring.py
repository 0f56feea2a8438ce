"""Score embeddings under an evaluation protocol."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace

import numpy as np
import numpy.typing as npt

from pipeline.protocols import JUNK, PROTOCOLS, Protocol
from pipeline.records import Scores
from pipeline.retrieval.metrics import Groups, Retrieval, Ties, retrieve
from pipeline.retrieval.similarity import Cosine, Indices, Similarity, Vectors, block_size

DRAWS = 10
"""Number of random galleries of protocol `vehicleid`."""

Labels = npt.NDArray[np.str_]
"""Identities or cameras (n,) as text, so that "007" differs from "7"."""


@dataclass(frozen=True)
class Side:
    """Labelled embeddings of one side of a retrieval: of the queries, or of the gallery.

    Attributes:
        vectors: (n, D) embeddings, not necessarily normalised; compared by cosine in float32.
        identities: (n,) text.
        cameras: (n,) text; None if unknown.
    """

    vectors: Vectors
    identities: Labels
    cameras: Labels | None = None

    def take(self, indices: Indices) -> "Side":
        """Return a subset."""
        cameras = None if self.cameras is None else np.asarray(self.cameras)[indices]
        return Side(np.asarray(self.vectors)[indices], np.asarray(self.identities)[indices], cameras)


def positives(
    protocol: Protocol, query: Side, index: int, gallery: Side
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Return the masks (G,) of the positives of query number `index`, and of the ignored gallery images.

    Under protocols without a gallery, `gallery` is all images, and the query itself is ignored.
    """
    identities = np.asarray(gallery.identities)
    same = identities == query.identities[index]
    ignored = np.zeros(len(identities), bool)
    if protocol.cameras:
        ignored = (identities == JUNK) | (same & (_cameras(gallery) == _cameras(query)[index]))
    elif protocol.all_query:
        ignored[index] = True
    return same & ~ignored, ignored


def evaluate(
    protocol: str,
    query: Side,
    gallery: Side | None = None,
    *,
    similarity: Callable[[Vectors, Vectors], Similarity] = Cosine,
    ties: Ties = "negatives first",
    block: int | None = None,
    seed: int = 0,
) -> Retrieval:
    """Score every query under a protocol.

    Among equally similar images negatives come first by default, so that neither the gallery's order nor a collapsed
    network improves the score.

    Args:
        protocol: Name in `PROTOCOLS`.
        query: All images, if the protocol takes no gallery.
        gallery: If the protocol takes no gallery, either None, or the query images embedded by another network.
        similarity: Similarity of queries (Q, D) to gallery (G, D). With `search.reranking.Reranked`, near ties at the
            edge of a neighbourhood depend on the gallery's order.
        block: Queries in a matrix product; None chooses by the size of the gallery.
        seed: Seed of the random galleries.

    Raises:
        ValueError: If the protocol needs a gallery or cameras that are missing, shapes disagree, an embedding is not
            finite, or no query has a match.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"there is no protocol {protocol!r}; use one of {', '.join(PROTOCOLS)}")
    rules = PROTOCOLS[protocol]
    query = _checked("query", query, rules)
    if gallery is None:
        if rules.gallery == "given":
            raise ValueError(f"protocol {protocol} needs a gallery; use loo without one")
        gallery = query
    gallery = _checked("gallery", gallery, rules, query.vectors.shape[1])
    if rules.gallery != "given" and not np.array_equal(gallery.identities, query.identities):
        raise ValueError(f"protocol {protocol} takes no gallery: all images must be queries")
    parts = []
    for draw, (indices, drawn_gallery) in enumerate(_galleries(rules, gallery, len(query.identities), seed)):
        drawn_query = query.take(indices) if rules.gallery == "drawn" else query
        part = _score(rules, drawn_query, drawn_gallery, similarity, ties, block)
        parts.append(replace(part, query=indices, draw=np.full(len(indices), draw)))
    names = [field.name for field in fields(Retrieval)]
    retrieval = Retrieval(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})
    if not retrieval.first_rank.any():
        raise ValueError(
            f"none of {len(query.identities)} queries has a match in the gallery under protocol {protocol}: an image "
            f"of the same identity{' from another camera' if rules.cameras else ''}; check identities and cameras"
        )
    return retrieval


def scores(protocol: str, retrieval: Retrieval) -> Scores:
    """Return the scores of a stage's metrics file: means over the queries that have a match."""
    rules = PROTOCOLS[protocol]
    return Scores(
        map=retrieval.map,
        rank1=retrieval.rank(1),
        rank5=retrieval.rank(5),
        rank10=retrieval.rank(10),
        minp=retrieval.minp,
        queries=retrieval.queries,
        dropped=retrieval.dropped,
        recall={str(k): retrieval.rank(k) for k in rules.ranks} if rules.recall else None,
        map_deviation=retrieval.map_deviation,
    )


def figures(protocol: str, retrieval: Retrieval) -> dict[str, str | float | int]:
    """Return the figures that publications report under this protocol, by name."""
    rules, means = PROTOCOLS[protocol], scores(protocol, retrieval)
    shares = {f"{'recall@' if rules.recall else 'rank'}{k}": retrieval.rank(k) for k in rules.ranks}
    deviation = {} if means.map_deviation is None else {"map_deviation": means.map_deviation}
    counts: dict[str, float | int] = {"queries": means.queries, "dropped": means.dropped}
    if means.dropped:
        counts["map_if_dropped_were_0"] = means.map * (1 - means.dropped / means.queries)
    return {"protocol": protocol, "map": means.map, **deviation, "minp": means.minp, **shares, **counts}


def _galleries(rules: Protocol, gallery: Side, queries: int, seed: int) -> Iterator[tuple[Indices, Side]]:
    """Yield the indices of the queries, and the gallery to search, for each draw."""
    if rules.gallery != "drawn":
        yield np.arange(queries), gallery
        return
    for draw in range(DRAWS):
        order = np.random.default_rng([seed, draw]).permutation(queries)
        _, first = np.unique(gallery.identities[order], return_index=True)
        chosen = np.sort(order[first])
        yield np.setdiff1d(np.arange(queries), chosen), gallery.take(chosen)


def _score(
    rules: Protocol,
    query: Side,
    gallery: Side,
    similarity_type: Callable[[Vectors, Vectors], Similarity],
    ties: Ties,
    block: int | None,
) -> Retrieval:
    """Score all queries in one gallery."""
    if rules.cameras and (gallery.identities == JUNK).any():
        gallery = gallery.take(np.flatnonzero(gallery.identities != JUNK))
    similarity = similarity_type(query.vectors, gallery.vectors)
    groups = _groups(rules, query, gallery, similarity.order)
    size = block or block_size(len(gallery.identities))
    return retrieve(len(query.identities), similarity, groups, size, rules.trapezoid, ties)


def _groups(rules: Protocol, query: Side, gallery: Side, order: Indices) -> Groups:
    """Build the function that finds positives and non-negatives; columns are positions in `order`."""
    identities = gallery.identities[order]
    by_identity = np.argsort(identities, kind="stable")
    starts, stops = (np.searchsorted(identities[by_identity], query.identities, side) for side in ("left", "right"))
    cameras = _cameras(gallery)[order] if rules.cameras else None

    def groups(index: int) -> tuple[Indices, Indices]:
        same = by_identity[starts[index] : stops[index]]
        if cameras is not None:
            return same[cameras[same] != _cameras(query)[index]], same
        return (same[order[same] != index] if rules.gallery == "itself" else same), same

    return groups


def _cameras(side: Side) -> Labels:
    if side.cameras is None:
        raise ValueError("this protocol needs the cameras of all images; without them use query-gallery")
    return side.cameras


def _checked(name: str, side: Side, rules: Protocol, dimensions: int | None = None) -> Side:
    """Check shapes and values, and convert labels to arrays of text."""
    vectors, identities = np.asarray(side.vectors), np.asarray(side.identities).astype(np.str_)
    cameras = None if side.cameras is None else np.asarray(side.cameras).astype(np.str_)
    if vectors.ndim != 2 or not vectors.size:
        raise ValueError(f"{name} embeddings must have the shape (n >= 1, D >= 1), got {vectors.shape}")
    if rules.cameras and cameras is None:
        raise ValueError(f"protocol {rules.name} needs the cameras of the {name}; without them use query-gallery")
    if len(vectors) != len(identities):
        raise ValueError(f"{name}: {len(vectors)} embeddings and {len(identities)} identities")
    if cameras is not None and len(cameras) != len(vectors):
        raise ValueError(f"{name}: {len(vectors)} embeddings and {len(cameras)} cameras")
    if dimensions is not None and vectors.shape[1] != dimensions:
        raise ValueError(f"query embeddings have {dimensions} dimensions, {name} embeddings {vectors.shape[1]}")
    for start in range(0, len(vectors), 2**16):  # a gallery may be as large as memory allows
        broken = np.flatnonzero(~np.isfinite(vectors[start : start + 2**16]).all(axis=1))
        if len(broken):
            raise ValueError(
                f"{name} embedding in row {start + broken[0]} is not finite; the network diverged or its input is "
                "broken"
            )
    return Side(vectors, identities, cameras)
