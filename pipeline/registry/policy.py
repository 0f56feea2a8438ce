"""Promotion rule: decide whether a challenger may replace the champion, from both networks' AP of the same queries."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.retrieval.metrics import Retrieval

RESAMPLES = 10_000
CONFIDENCE = 0.95
"""Level of the two-sided interval whose lower end decides; a network worse by the margin passes in 2.5 % of cases."""
BLOCK = 500
"""Resamples per batch, which bounds the memory."""


@dataclass(frozen=True)
class Difference:
    """Difference in mAP between two networks, and the ends of its confidence interval."""

    mean: float
    low: float
    high: float


def difference(new: Retrieval, old: Retrieval, queries: int, seed: int = 0) -> Difference:
    """Compute the paired difference in mAP with a bootstrap interval.

    Pairing by query removes the variance of query difficulty, which both networks share. Source: Efron and Tibshirani,
    An Introduction to the Bootstrap (percentile intervals).

    Args:
        new: Results of the challenger.
        old: Results of the network in use, for the same queries and gallery.
        queries: Number of queries, including those without a match.
        seed: Seed of the resampling.

    Raises:
        ValueError: If the two were evaluated on different queries.
    """
    new_ap, old_ap = new.ap_of(queries), old.ap_of(queries)
    if not np.array_equal(np.isnan(new_ap), np.isnan(old_ap)):
        raise ValueError("the two networks were evaluated on different queries")
    return interval((new_ap - old_ap)[~np.isnan(new_ap)], seed)


def interval(gains: npt.NDArray[np.float64], seed: int = 0) -> Difference:
    """Compute the bootstrap percentile interval of a mean.

    Args:
        gains: (n,) differences in AP per query, n >= 1.
        seed: Seed of the resampling.
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
    """Comparison of a challenger with a rival: the champion or the best version.

    Attributes:
        map: Difference in mAP on the same test set.
        size_ratio: File size of the challenger / that of the rival.
        latency_ratio: Latency of the challenger / that of the rival for one image, or for the batch that one of them
            fixes; None if it was not measured.
    """

    map: Difference
    size_ratio: float
    latency_ratio: float | None = None


@dataclass(frozen=True)
class Decision:
    """Decision of the promotion rule, with the reason in one sentence."""

    passed: bool
    reason: str


def decide(
    rivals: Mapping[str, Comparison], margin: float, max_size_ratio: float, max_latency_ratio: float
) -> Decision:
    """Pass a challenger whose mAP is not worse than that of any rival by the margin, and that is not too large or slow.

    Args:
        rivals: The champion, and the best version so far, so that small losses do not accumulate over promotions.
        margin: Loss of mAP that the interval must exclude.
        max_size_ratio: Largest file size allowed, as a multiple of the rival's.
        max_latency_ratio: Largest latency allowed, as a multiple of the rival's.
    """
    violations = []
    for name, rival in rivals.items():
        if not rival.map.low > -margin:
            violations.append(
                f"mAP may be {-rival.map.low:.4f} below {name}'s (difference {rival.map.mean:+.4f}, 95 % interval "
                f"{rival.map.low:+.4f} to {rival.map.high:+.4f}; {margin:g} is allowed)"
            )
        if rival.size_ratio > max_size_ratio:
            ratio, limit = rival.size_ratio, max_size_ratio
            violations.append(f"it has {ratio:.2f} times the bytes of {name} ({limit:g} is allowed)")
        if rival.latency_ratio is not None and rival.latency_ratio > max_latency_ratio:
            ratio, limit = rival.latency_ratio, max_latency_ratio
            violations.append(f"it takes {ratio:.2f} times as long as {name} ({limit:g} is allowed)")
    if violations:
        return Decision(False, "; ".join(violations))
    if not rivals:
        return Decision(True, "there is no earlier version")
    differences = ", ".join(
        f"{rival.map.mean:+.4f} against {name} ({rival.map.low:+.4f} to {rival.map.high:+.4f})"
        for name, rival in rivals.items()
    )
    return Decision(True, f"mAP {differences}")
