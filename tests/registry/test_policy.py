"""The promotion rule passes few networks that are worse by the margin, and most that are better."""

import numpy as np
import pytest

from pipeline.registry.policy import CONFIDENCE, RESAMPLES, Comparison, Difference, decide, difference, interval
from pipeline.retrieval.metrics import Retrieval

MARGIN = 0.005


def retrieval(ap: list[float]) -> Retrieval:
    ranks = np.where(np.isnan(ap), 0, 1)
    count = len(ap)
    return Retrieval(np.array(ap), ranks, np.array(ap), np.arange(count), np.zeros(count, np.int64))


def test_the_difference_is_paired_by_query_and_ignores_queries_without_a_match() -> None:
    old = [0.1, 0.9, float("nan"), 0.5]
    found = difference(retrieval([ap + 0.1 for ap in old]), retrieval(old), 4)
    assert (found.mean, found.low, found.high) == pytest.approx((0.1, 0.1, 0.1))
    with pytest.raises(ValueError, match="different queries"):
        difference(retrieval([0.1, 0.9, 0.2, 0.5]), retrieval(old), 4)


def test_the_interval_equals_that_of_a_literal_bootstrap() -> None:
    gains = np.random.default_rng(1).normal(0.01, 0.1, 80)
    random, means = np.random.default_rng(7), []
    for _ in range(RESAMPLES):  # literal, with another random stream
        means.append(np.mean(random.choice(gains, 80)))
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    found = interval(gains)
    assert found.low == pytest.approx(low, abs=0.001)
    assert found.high == pytest.approx(high, abs=0.001)


def promoted(worse_by: float, seed: int, queries: int = 300) -> bool:
    """Return whether a network with mAP lower by `worse_by` passes; AP varies by query as on the default data."""
    random = np.random.default_rng(seed)
    gains = random.normal(0, 0.12, queries) * random.integers(0, 2, queries)  # half of the queries have equal AP
    rival = Comparison(interval(gains - worse_by, seed), 1.0)
    return decide({"the champion": rival}, MARGIN, 1.1, 1.1).passed


def test_few_networks_worse_by_the_margin_pass_and_most_better_ones_do() -> None:
    bad = sum(promoted(MARGIN, 10 * seed) for seed in range(200))
    good = sum(promoted(-0.02, 10 * seed) for seed in range(50))
    assert bad <= 10
    assert good >= 45


@pytest.mark.parametrize(
    ("rival", "reason"),
    [
        (Comparison(Difference(0.0, -0.006, 0.006), 1.0), "mAP may be 0.0060 below the champion's"),
        (Comparison(Difference(0.0, -0.001, 0.006), 1.2), "1.20 times the bytes of the champion"),
        (Comparison(Difference(0.0, -0.001, 0.006), 1.0, 1.3), "1.30 times as long as the champion"),
    ],
)
def test_a_rejection_has_its_reason(rival: Comparison, reason: str) -> None:
    decision = decide({"the champion": rival}, MARGIN, 1.1, 1.1)
    assert not decision.passed
    assert reason in decision.reason


def test_small_losses_do_not_accumulate() -> None:
    """Each step loses less than the margin against the champion, but more against the best version."""
    step = Comparison(Difference(-0.002, -0.004, 0.0), 1.0)
    best = Comparison(Difference(-0.006, -0.008, -0.004), 1.0)
    assert decide({"the champion": step}, MARGIN, 1.1, 1.1).passed
    assert not decide({"the champion": step, "the best version": best}, MARGIN, 1.1, 1.1).passed


def test_the_first_version_passes() -> None:
    assert decide({}, MARGIN, 1.1, 1.1).passed
