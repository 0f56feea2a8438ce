"""AP, CMC and INP of every query, exactly as the public definitions have them.

All of them follow from the ranks of the positives alone, so nothing is ever argsorted: similarities are computed a
block of queries at a time, and of each row only those that are not below the last positive are sorted, by value.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from pipeline.retrieval.similarity import Indices, Similarity

Ties = Literal["negatives first", "positives first"]
"""Which of equally similar images come first: the rule is pessimistic, the other gives an optimistic bound."""

Groups = Callable[[int], tuple[Indices, Indices]]
"""For a query: the places of its positives, and of all that are no negatives (the positives, and what is left out)."""


@dataclass(frozen=True)
class Retrieval:
    """How well every single query did.

    Attributes:
        ap: (Q,) average precision; NaN where the query has no valid match.
        first_rank: (Q,) rank of the first positive, from 1; 0 where there is none.
        inp: (Q,) inverse negative penalty: number of positives / rank of the hardest; NaN where there is none.
        query: (Q,) row of each query among those that were given.
        draw: (Q,) number of the random gallery that it was asked of; 0 where there is but one.
    """

    ap: npt.NDArray[np.float64]
    first_rank: Indices
    inp: npt.NDArray[np.float64]
    query: Indices
    draw: Indices

    @property
    def draws(self) -> int:
        """Random galleries that were asked."""
        return len(np.unique(self.draw))

    @property
    def dropped(self) -> int:
        """Queries without a valid match, of a draw: out of every mean, but counted."""
        return int(np.count_nonzero(self.first_rank == 0)) // self.draws

    @property
    def queries(self) -> int:
        """Queries of a draw."""
        return len(self.ap) // self.draws

    def ap_of(self, queries: int) -> npt.NDArray[np.float64]:
        """AP (queries,) by row of the query, the mean over its draws; NaN where it has none."""
        valid = self.first_rank > 0
        asked = np.bincount(self.query[valid], minlength=queries)
        total = np.bincount(self.query[valid], weights=self.ap[valid], minlength=queries)
        return np.where(asked > 0, total / np.maximum(asked, 1), np.nan)

    def rank(self, k: int) -> float:
        """Share of the queries with a positive among the first `k` (CMC, or recall at k)."""
        return float(np.mean(self._by_draw((self.first_rank <= k).astype(np.float64))))

    @property
    def map(self) -> float:
        """Mean of the average precisions."""
        return float(np.mean(self._by_draw(self.ap)))

    @property
    def map_deviation(self) -> float | None:
        """Standard deviation of mAP over the draws of the gallery; None where there is but one."""
        means = self._by_draw(self.ap)
        return float(np.std(means, ddof=1)) if len(means) > 1 else None

    @property
    def minp(self) -> float:
        """Mean of the inverse negative penalties."""
        return float(np.mean(self._by_draw(self.inp)))

    def _by_draw(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Mean over the valid queries of each draw."""
        valid = self.first_rank > 0
        return np.array([values[valid & (self.draw == draw)].mean() for draw in np.unique(self.draw[valid])])


def retrieve(
    queries: int, similarity: Similarity, groups: Groups, block: int, trapezoid: bool, ties: Ties
) -> Retrieval:
    """Rank a gallery for every query.

    Args:
        queries: Their number, Q.
        similarity: Of queries and gallery; places are its columns.
        groups: Who is right, wrong and left out.
        block: Queries at a time.
        trapezoid: Whether AP is the area under the precision-recall curve by trapezoids (the Oxford buildings' rule and
            Market-1501's own script), or else the mean of the precisions at the positives.
        ties: Which of equally similar images come first.
    """
    ap, inp = np.full(queries, np.nan), np.full(queries, np.nan)
    first_rank = np.zeros(queries, np.int64)
    for start in range(0, queries, block):
        rows = range(start, min(start + block, queries))
        for row, similarities in zip(rows, similarity(rows.start, rows.stop), strict=True):
            positives, none = groups(row)
            if not len(positives):
                continue
            ranks = positive_ranks(similarities, positives, none, ties)
            ap[row] = average_precision(ranks, trapezoid)
            inp[row] = len(ranks) / ranks[-1]
            first_rank[row] = ranks[0]
    return Retrieval(ap, first_rank, inp, np.arange(queries), np.zeros(queries, np.int64))


def positive_ranks(similarities: npt.NDArray[np.floating], positives: Indices, none: Indices, ties: Ties) -> Indices:
    """Ranks of a query's positives, ascending, from 1.

    Args:
        similarities: (G,) to every gallery image; overwritten.
        positives: (P,) places of the positives, P >= 1.
        none: Places of all that are no negatives.
        ties: Which of equally similar images come first.
    """
    values = np.sort(similarities[positives])[::-1]
    similarities[none] = -np.inf
    ahead = similarities[similarities >= values[-1]]  # (n,) the only negatives that matter, often few
    ahead.sort()
    side: Literal["left", "right"] = "left" if ties == "negatives first" else "right"
    return len(ahead) - np.searchsorted(ahead, values, side=side) + np.arange(1, len(values) + 1)


def average_precision(ranks: Indices, trapezoid: bool) -> float:
    """AP of a query whose positives have these ranks (P,), ascending, from 1.

    Args:
        ranks: Of the positives.
        trapezoid: As in `retrieve`.
    """
    hits = np.arange(1, len(ranks) + 1)
    precision = hits / ranks
    if trapezoid:
        before = np.where(ranks > 1, (hits - 1) / np.maximum(ranks - 1, 1), 1.0)  # one place further up
        precision = (precision + before) / 2
    return float(precision.mean())
