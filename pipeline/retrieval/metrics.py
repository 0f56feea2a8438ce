"""AP, CMC and INP of every query, exactly as their published definitions.

All three follow from the ranks of the positives, so no ranking is ever sorted completely: similarities are computed for
a block of queries at a time, and of each query's only those not below the last positive are sorted.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from pipeline.retrieval.similarity import Indices, Similarity

Ties = Literal["negatives first", "positives first"]
"""Order of equally similar images: the pessimistic one, which is the rule, and the optimistic one."""

Groups = Callable[[int], tuple[Indices, Indices]]
"""Maps a query to the columns of its positives, and to those of all non-negatives (positives and ignored images)."""


@dataclass(frozen=True)
class Retrieval:
    """The scores of every query.

    With random galleries (protocol `vehicleid`), Q counts a query once for each gallery that it is compared with.

    Attributes:
        ap: (Q,) average precision; NaN if the query has no match.
        first_rank: (Q,) rank of the first positive, from 1; 0 if there is none.
        inp: (Q,) inverse negative penalty: number of positives / rank of the last positive; NaN if there is none.
        query: (Q,) index of the query.
        draw: (Q,) number of the random gallery, from 0; 0 if there is only one gallery.
    """

    ap: npt.NDArray[np.float64]
    first_rank: Indices
    inp: npt.NDArray[np.float64]
    query: Indices
    draw: Indices

    @property
    def draws(self) -> int:
        """Number of galleries."""
        return len(np.unique(self.draw))

    @property
    def dropped(self) -> int:
        """Queries without a match in one gallery; all means leave them out."""
        return int(np.count_nonzero(self.first_rank == 0)) // self.draws

    @property
    def queries(self) -> int:
        """Queries of one gallery."""
        return len(self.ap) // self.draws

    def ap_of(self, queries: int) -> npt.NDArray[np.float64]:
        """Return the AP (queries,) of each query, averaged over the galleries; NaN if it never has a match."""
        valid = self.first_rank > 0
        count = np.bincount(self.query[valid], minlength=queries)
        total = np.bincount(self.query[valid], weights=self.ap[valid], minlength=queries)
        return np.where(count > 0, total / np.maximum(count, 1), np.nan)

    def rank(self, k: int) -> float:
        """Return the share of the queries with a positive among the first `k` images (CMC, or recall@k)."""
        return float(np.mean(self._mean_by_draw((self.first_rank <= k).astype(np.float64))))

    @property
    def map(self) -> float:
        """Mean average precision."""
        return float(np.mean(self._mean_by_draw(self.ap)))

    @property
    def map_deviation(self) -> float | None:
        """Standard deviation of mAP over the random galleries; None if there is only one gallery."""
        means = self._mean_by_draw(self.ap)
        return float(np.std(means, ddof=1)) if len(means) > 1 else None

    @property
    def minp(self) -> float:
        """Mean inverse negative penalty (Ye et al., "Deep Learning for Person Re-identification", TPAMI 2021)."""
        return float(np.mean(self._mean_by_draw(self.inp)))

    def _mean_by_draw(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Average over the queries of each gallery that have a match."""
        valid = self.first_rank > 0
        return np.array([values[valid & (self.draw == draw)].mean() for draw in np.unique(self.draw[valid])])


def retrieve(
    queries: int, similarity: Similarity, groups: Groups, block: int, trapezoid: bool, ties: Ties
) -> Retrieval:
    """Rank the gallery for every query, and score the rankings.

    Args:
        queries: Number of queries.
        block: Queries in one call of `similarity`.
        trapezoid: Whether AP is the trapezoidal area under the precision-recall curve (as in the scripts of Oxford
            Buildings and Market-1501), or the mean of the precisions at the positives.
    """
    ap, inp = np.full(queries, np.nan), np.full(queries, np.nan)
    first_rank = np.zeros(queries, np.int64)
    for start in range(0, queries, block):
        block_queries = range(start, min(start + block, queries))
        for query, similarities in zip(block_queries, similarity(start, block_queries.stop), strict=True):
            positives, non_negatives = groups(query)
            if not len(positives):
                continue
            ranks = positive_ranks(similarities, positives, non_negatives, ties)
            ap[query] = average_precision(ranks, trapezoid)
            inp[query] = len(ranks) / ranks[-1]
            first_rank[query] = ranks[0]
    return Retrieval(ap, first_rank, inp, np.arange(queries), np.zeros(queries, np.int64))


def positive_ranks(
    similarities: npt.NDArray[np.floating], positives: Indices, non_negatives: Indices, ties: Ties
) -> Indices:
    """Return the ranks (P,) of a query's positives, ascending, from 1; ignored images take no rank.

    Args:
        similarities: (G,) to every gallery image; overwritten.
        positives: (P,) columns of the positives, P >= 1.
        non_negatives: Columns of the positives and of the ignored images.
    """
    values = np.sort(similarities[positives])[::-1]
    similarities[non_negatives] = -np.inf
    ahead = similarities[similarities >= values[-1]]  # (n,) negatives at or above the last positive, often few
    ahead.sort()
    side: Literal["left", "right"] = "left" if ties == "negatives first" else "right"
    return len(ahead) - np.searchsorted(ahead, values, side=side) + np.arange(1, len(values) + 1)


def average_precision(ranks: Indices, trapezoid: bool) -> float:
    """Compute AP from the ranks (P,) of a query's positives, ascending, from 1; for `trapezoid` see `retrieve`."""
    hits = np.arange(1, len(ranks) + 1)
    precision = hits / ranks
    if trapezoid:
        before = np.where(ranks > 1, (hits - 1) / np.maximum(ranks - 1, 1), 1.0)  # precision one rank earlier
        precision = (precision + before) / 2
    return float(precision.mean())
