"""Scores of embeddings under an evaluation protocol."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace

import numpy as np
import numpy.typing as npt

from pipeline.protocols import JUNK, PROTOCOLS, Protocol
from pipeline.records import Scores
from pipeline.retrieval.metrics import Groups, Retrieval, Ties, retrieve
from pipeline.retrieval.similarity import Cosine, Indices, Similarity, Vectors, block_of

DRAWS = 10
"""Random galleries of protocol `vehicleid`."""

Labels = npt.NDArray[np.str_]
"""Identities or cameras, (n,); strings, so that "007" stays what it is."""


@dataclass(frozen=True)
class Side:
    """Queries, or a gallery.

    Attributes:
        vectors: (n, D) embeddings, of any length; compared by cosine, in float32.
        identities: (n,), as text.
        cameras: (n,), as text; None where they are not known.
    """

    vectors: Vectors
    identities: Labels
    cameras: Labels | None = None

    def take(self, rows: Indices) -> "Side":
        """Some of them."""
        cameras = None if self.cameras is None else np.asarray(self.cameras)[rows]
        return Side(np.asarray(self.vectors)[rows], np.asarray(self.identities)[rows], cameras)


def positives(
    protocol: Protocol, query: Side, row: int, gallery: Side
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Find the gallery images that are right for one query and those that are left out, (G,) each."""
    identities = np.asarray(gallery.identities)
    same = identities == query.identities[row]
    out = np.zeros(len(identities), bool)  # a drawn gallery never holds the query: among all, it is left out
    if protocol.cameras:
        out = (identities == JUNK) | (same & (_cameras(gallery) == _cameras(query)[row]))
    elif protocol.all_query:
        out[row] = True
    return same & ~out, out


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
    """Score a retrieval.

    Of images with equal similarity the negatives come first, so that neither the gallery's order nor a collapsed
    network is rewarded.

    Args:
        protocol: Name in `PROTOCOLS`.
        query: What is asked; all there is where the protocol has no gallery of its own.
        gallery: What is asked of. Where the protocol has none of its own: the same images as the queries', as another
            network embeds them; None for the queries themselves.
        similarity: How alike queries (Q, D) and gallery (G, D) are; `search.reranking.Reranked` is another one, whose
            near ties at the edge of a neighbourhood do follow the gallery's order.
        ties: Which of equally similar images come first.
        block: Queries a matrix product; None for what suits the gallery's size.
        seed: Of the random galleries.

    Raises:
        ValueError: If the protocol needs what is not there, shapes disagree, an embedding is not finite (naming its
            row), or no query has a valid match.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"there is no protocol {protocol!r}; there are {', '.join(PROTOCOLS)}")
    rules = PROTOCOLS[protocol]
    query = _checked("query", query, rules)
    if gallery is None:
        if rules.gallery == "given":
            raise ValueError(f"protocol {protocol} needs a gallery")
        gallery = query
    gallery = _checked("gallery", gallery, rules, query.vectors.shape[1])
    if rules.gallery != "given" and not np.array_equal(gallery.identities, query.identities):
        raise ValueError(f"protocol {protocol} takes no gallery, all images are queries")
    parts = []
    for draw, (rows, asked) in enumerate(_galleries(rules, gallery, len(query.identities), seed)):
        asking = query.take(rows) if rules.gallery == "drawn" else query
        found = _score(rules, asking, asked, similarity, ties, block)
        parts.append(replace(found, query=rows, draw=np.full(len(rows), draw)))
    names = [field.name for field in fields(Retrieval)]
    whole = Retrieval(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})
    if not whole.first_rank.any():
        raise ValueError(
            f"none of {len(query.identities)} queries has a match in the gallery under protocol {protocol}: an image "
            f"of the same identity{' from another camera' if rules.cameras else ''}; check identities and cameras"
        )
    return whole


def scores(protocol: str, found: Retrieval) -> Scores:
    """Means over the queries that have a match."""
    rules = PROTOCOLS[protocol]
    return Scores(
        map=found.map,
        rank1=found.rank(1),
        rank5=found.rank(5),
        rank10=found.rank(10),
        minp=found.minp,
        queries=found.queries,
        dropped=found.dropped,
        recall={str(k): found.rank(k) for k in rules.ranks} if rules.recall else None,
        map_deviation=found.map_deviation,
    )


def figures(protocol: str, found: Retrieval) -> dict[str, str | float | int]:
    """What is quoted, by the names of the field."""
    quoted = scores(protocol, found)
    rules = PROTOCOLS[protocol]
    shares = {f"{'recall@' if rules.recall else 'rank'}{k}": found.rank(k) for k in rules.ranks}
    deviation = {} if quoted.map_deviation is None else {"map_deviation": quoted.map_deviation}
    counts: dict[str, float | int] = {"queries": quoted.queries, "dropped": quoted.dropped}
    if quoted.dropped:
        counts["map_if_dropped_were_0"] = quoted.map * (1 - quoted.dropped / quoted.queries)
    return {"protocol": protocol, "map": quoted.map, **deviation, "minp": quoted.minp, **shares, **counts}


def _galleries(rules: Protocol, gallery: Side, queries: int, seed: int) -> Iterator[tuple[Indices, Side]]:
    """Indices of the queries, and what they are asked of."""
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
    kind: Callable[[Vectors, Vectors], Similarity],
    ties: Ties,
    block: int | None,
) -> Retrieval:
    """One gallery."""
    if rules.cameras and (gallery.identities == JUNK).any():
        gallery = gallery.take(np.flatnonzero(gallery.identities != JUNK))
    similarity = kind(query.vectors, gallery.vectors)
    size = block or block_of(len(gallery.identities))
    return retrieve(len(query.identities), similarity, _groups(rules, query, gallery, similarity.order), size,
                    rules.trapezoid, ties)  # fmt: skip


def _groups(rules: Protocol, query: Side, gallery: Side, order: Indices) -> Groups:
    """Who is right, wrong and left out, by the places of the gallery's rows in `order`."""
    identities = gallery.identities[order]
    by_identity = np.argsort(identities, kind="stable")
    starts, stops = (np.searchsorted(identities[by_identity], query.identities, side) for side in ("left", "right"))
    cameras = _cameras(gallery)[order] if rules.cameras else None

    def groups(row: int) -> tuple[Indices, Indices]:
        same = by_identity[starts[row] : stops[row]]
        if cameras is not None:
            return same[cameras[same] != _cameras(query)[row]], same
        return (same[order[same] != row] if rules.gallery == "itself" else same), same

    return groups


def _cameras(side: Side) -> Labels:
    if side.cameras is None:
        raise ValueError("this protocol needs to know the cameras")
    return side.cameras


def _checked(name: str, side: Side, rules: Protocol, dimensions: int | None = None) -> Side:
    """The same with arrays of text, once it is sure that they fit together."""
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
