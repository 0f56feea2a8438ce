"""mAP, CMC and mINP from embeddings, exactly as the public definitions have them.

All of them follow from the ranks of the positives alone, so nothing is ever argsorted: similarities are computed a
block of queries at a time, and each row of them is sorted by value, in place.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.records import Scores

JUNK = "-1"
"""Identity of gallery images that no query may be charged for (Market-1501's convention; "0" is a distractor)."""

Labels = npt.NDArray[np.str_]
"""Identities or cameras, (n,); strings, so that "007" stays what it is."""


@dataclass(frozen=True)
class Retrieval:
    """How well every single query did.

    Attributes:
        ap: (Q,) average precision; NaN where the query has no valid match.
        first_rank: (Q,) rank of the first positive, from 1; 0 where there is none.
        inp: (Q,) inverse negative penalty: number of positives / rank of the hardest; NaN where there is none.
    """

    ap: npt.NDArray[np.float64]
    first_rank: npt.NDArray[np.int64]
    inp: npt.NDArray[np.float64]

    @property
    def dropped(self) -> int:
        """Queries without a valid match: out of every mean, but counted."""
        return int(np.count_nonzero(self.first_rank == 0))

    def rank(self, k: int) -> float:
        """Share of the queries with a positive among the first `k` (CMC)."""
        first = self.first_rank[self.first_rank > 0]
        return float(np.mean(first <= k))

    def scores(self) -> Scores:
        """Means over the queries that have a match."""
        valid = self.first_rank > 0
        return Scores(
            map=float(self.ap[valid].mean()),
            rank1=self.rank(1),
            rank5=self.rank(5),
            rank10=self.rank(10),
            minp=float(self.inp[valid].mean()),
            queries=len(self.ap),
            dropped=self.dropped,
        )


def evaluate_market(
    query: npt.NDArray[np.floating],
    gallery: npt.NDArray[np.floating],
    query_ids: Labels,
    gallery_ids: Labels,
    query_cameras: Labels,
    gallery_cameras: Labels,
    block: int = 256,
) -> Retrieval:
    """Score a retrieval under the protocol of Market-1501, VeRi-776 and MSMT17 (Zheng et al., ICCV 2015, section 4).

    Ranked by cosine. Out of a query's gallery are images of its identity from its own camera, and junk; the rest of its
    camera stays. AP is the mean over positives of (i / rank of the i-th). Of images with equal similarity the negatives
    come first, so that neither the gallery's order nor a collapsed network is rewarded.

    Args:
        query: (Q, D) embeddings, of any length; normalised here, in float32.
        gallery: (G, D) embeddings.
        query_ids: (Q,) identities.
        gallery_ids: (G,) identities; "-1" is junk.
        query_cameras: (Q,) cameras.
        gallery_cameras: (G,) cameras.
        block: Queries a matrix product. Another block can change the last bit of a similarity.

    Raises:
        ValueError: If shapes disagree, an embedding is not finite (naming its row), or no query has a valid match.
    """
    query_ids, gallery_ids, query_cameras, gallery_cameras = (
        np.asarray(labels).astype(np.str_) for labels in (query_ids, gallery_ids, query_cameras, gallery_cameras)
    )
    _check("query", query, query_ids, query_cameras)
    _check("gallery", gallery, gallery_ids, gallery_cameras)
    if query.shape[1] != gallery.shape[1]:
        raise ValueError(f"query embeddings have {query.shape[1]} dimensions, gallery embeddings {gallery.shape[1]}")

    real = np.flatnonzero(gallery_ids != JUNK)
    order, copies = _canonical(normalise(gallery[real]))
    real = real[order]
    gallery_ids, gallery_cameras = gallery_ids[real], gallery_cameras[real]
    distinct = normalise(gallery[real[np.cumsum(copies) - copies]])  # (U, D), the first of each group of equals
    by_identity = np.argsort(gallery_ids, kind="stable")
    starts = np.searchsorted(gallery_ids[by_identity], query_ids, side="left")
    stops = np.searchsorted(gallery_ids[by_identity], query_ids, side="right")

    count = len(query)
    ap = np.full(count, np.nan)
    inp = np.full(count, np.nan)
    first_rank = np.zeros(count, dtype=np.int64)
    for start in range(0, count, block):
        similarity = normalise(query[start : start + block]) @ distinct.T  # (block, U)
        if len(distinct) < len(real):
            similarity = np.repeat(similarity, copies, axis=1)  # (block, G)
        for row, similarities in enumerate(similarity, start=start):
            same = by_identity[starts[row] : stops[row]]
            positives = same[gallery_cameras[same] != query_cameras[row]]
            if not len(positives):
                continue
            ranks = positive_ranks(similarities, positives, same)
            ap[row] = np.mean(np.arange(1, len(ranks) + 1) / ranks)
            inp[row] = len(ranks) / ranks[-1]
            first_rank[row] = ranks[0]
    if not first_rank.any():
        raise ValueError(
            f"none of {count} queries has a match in the gallery of {len(real)}: an image of the same identity from "
            "another camera; check identities and cameras in the manifest"
        )
    return Retrieval(ap, first_rank, inp)


def positive_ranks(
    similarities: npt.NDArray[np.float32], positives: npt.NDArray[np.int64], same: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Ranks of a query's positives, ascending, from 1; tied negatives come before them.

    Args:
        similarities: (G,) to every gallery image; overwritten.
        positives: (P,) gallery rows of the positives, P >= 1.
        same: Gallery rows that are no negatives: the positives and what is left out for this query.
    """
    values = np.sort(similarities[positives])[::-1]
    similarities[same] = -np.inf
    similarities.sort()
    ahead = len(similarities) - np.searchsorted(similarities, values, side="left")  # negatives at least as similar
    return ahead + np.arange(1, len(values) + 1)


def normalise(embeddings: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
    """Embeddings (n, D) at length 1 in float32; a zero vector stays zero, and ties with everything."""
    embeddings = np.asarray(embeddings, dtype=np.float32)
    lengths = np.linalg.norm(embeddings, axis=1, keepdims=True)
    unit: npt.NDArray[np.float32] = embeddings / np.maximum(lengths, np.float32(1e-12))
    return unit


def _canonical(embeddings: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """An order of the gallery that follows from its content, and how many equal rows stand together in it.

    A matrix product may round one and the same row differently in another column, which would break ties between
    duplicates, and decide near ties, by the order of the gallery's files.

    Args:
        embeddings: (G, D).

    Returns:
        Order (G,) and copies (U,), summing to G.
    """
    if not len(embeddings):
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    rows = np.ascontiguousarray(embeddings + np.float32(0))  # -0 becomes 0: equal numbers are to be equal bytes
    rows = rows.view(np.dtype((np.void, rows.itemsize * rows.shape[1])))[:, 0]
    order = np.argsort(rows, kind="stable")
    starts = np.flatnonzero(np.concatenate([[True], rows[order[1:]] != rows[order[:-1]]]))
    return order, np.diff(np.append(starts, len(rows)))


def _check(name: str, embeddings: npt.NDArray[np.floating], ids: Labels, cameras: Labels) -> None:
    if embeddings.ndim != 2 or not len(embeddings):
        raise ValueError(f"{name} embeddings must have the shape (n >= 1, D), got {embeddings.shape}")
    if not len(embeddings) == len(ids) == len(cameras):
        raise ValueError(f"{name}: {len(embeddings)} embeddings, {len(ids)} identities and {len(cameras)} cameras")
    broken = np.flatnonzero(~np.isfinite(embeddings).all(axis=1))
    if len(broken):
        raise ValueError(
            f"{name} embedding in row {broken[0]} is not finite ({len(broken)} of {len(embeddings)}); "
            "the network diverged or its input is broken"
        )
