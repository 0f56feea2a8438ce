"""Whether a new network may take the place of the one in use, by both networks' answers to the same queries."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.retrieval.metrics import Retrieval

RESAMPLES = 10_000
CONFIDENCE = 0.95
"""Of the two-sided interval whose lower end decides: a network that is worse by the margin passes one time in forty."""
BLOCK = 500
"""Resamples at a time."""


@dataclass(frozen=True)
class Difference:
    """mAP of one network less another's.

    Attributes:
        mean: Over the queries that have a match.
        low: Lower end of the interval.
        high: Upper end.
    """

    mean: float
    low: float
    high: float


def difference(new: Retrieval, old: Retrieval, queries: int, seed: int = 0) -> Difference:
    """Compare per query, so that hard queries, which are hard for both, do not blur it.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (percentile intervals, paired).

    Args:
        new: Of the network that shall replace the other.
        old: Of the other, for the same queries and gallery.
        queries: Their number.
        seed: Of the resampling.

    Raises:
        ValueError: If they were not asked the same.
    """
    ours, theirs = new.ap_of(queries), old.ap_of(queries)
    if not np.array_equal(np.isnan(ours), np.isnan(theirs)):
        raise ValueError("the two networks were not asked the same queries")
    return interval((ours - theirs)[~np.isnan(ours)], seed)


def interval(gains: npt.NDArray[np.float64], seed: int = 0) -> Difference:
    """Bootstrap interval of a mean.

    Args:
        gains: (n,) differences, n >= 1.
        seed: Of the resampling.
    """
    random = np.random.default_rng(seed)
    means = np.concatenate(
        [
            gains[random.integers(0, len(gains), (min(BLOCK, RESAMPLES - start), len(gains)))].mean(axis=1)
            for start in range(0, RESAMPLES, BLOCK)
        ]
    )
    low, high = np.quantile(means, ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)).tolist()
    return Difference(float(gains.mean()), low, high)


@dataclass(frozen=True)
class Comparison:
    """How a challenger stands beside a network that is or was in use.

    Attributes:
        map: Difference of their mAP on the same test set.
        bytes: The challenger's size as a multiple of the other's.
        latency: Its time for one image, likewise; None where that was not measured.
    """

    map: Difference
    bytes: float
    latency: float | None = None


@dataclass(frozen=True)
class Decision:
    """What the gate says.

    Attributes:
        passed: Whether the challenger may be promoted.
        reason: Why, in one sentence.
    """

    passed: bool
    reason: str


def decide(rivals: Mapping[str, Comparison], margin: float, larger: float, slower: float) -> Decision:
    """Let a challenger pass if it is surely not worse by the margin, nor larger or slower than is allowed.

    Args:
        rivals: The champion, and the best there ever was, against which small losses add up.
        margin: mAP that may be lost.
        larger: Size that is allowed, as a multiple.
        slower: Time that is allowed, as a multiple.
    """
    complaints = []
    for name, rival in rivals.items():
        if not rival.map.low > -margin:
            complaints.append(
                f"mAP may be {-rival.map.low:.4f} below {name}'s (difference {rival.map.mean:+.4f}, 95 % interval "
                f"{rival.map.low:+.4f} to {rival.map.high:+.4f}; {margin:g} is allowed)"
            )
        if rival.bytes > larger:
            complaints.append(f"it has {rival.bytes:.2f} times the bytes of {name} ({larger:g} is allowed)")
        if rival.latency is not None and rival.latency > slower:
            complaints.append(f"it takes {rival.latency:.2f} times as long as {name} ({slower:g} is allowed)")
    if complaints:
        return Decision(False, "; ".join(complaints))
    if not rivals:
        return Decision(True, "there was none before it")
    found = ", ".join(
        f"{rival.map.mean:+.4f} against {name} ({rival.map.low:+.4f} to {rival.map.high:+.4f})"
        for name, rival in rivals.items()
    )
    return Decision(True, f"mAP {found}")
