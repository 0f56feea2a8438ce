"""The gate: what is worse by the margin gets through one time in forty, what is as good gets through."""

import numpy as np
import pytest

from pipeline.registry.policy import CONFIDENCE, RESAMPLES, Comparison, Difference, decide, difference, interval
from pipeline.retrieval.metrics import Retrieval

MARGIN = 0.005


def answers(ap: list[float]) -> Retrieval:
    ranks = np.where(np.isnan(ap), 0, 1)
    count = len(ap)
    return Retrieval(np.array(ap), ranks, np.array(ap), np.arange(count), np.zeros(count, np.int64))


def test_queries_are_compared_one_by_one_and_those_without_a_match_count_for_nobody() -> None:
    old = [0.1, 0.9, float("nan"), 0.5]
    found = difference(answers([ap + 0.1 for ap in old]), answers(old), 4)
    assert (found.mean, found.low, found.high) == pytest.approx((0.1, 0.1, 0.1))
    with pytest.raises(ValueError, match="same queries"):
        difference(answers([0.1, 0.9, 0.2, 0.5]), answers(old), 4)


def test_the_interval_is_that_of_the_resampled_means() -> None:
    gains = np.random.default_rng(1).normal(0.01, 0.1, 80)
    random, means = np.random.default_rng(7), []
    for _ in range(RESAMPLES):  # literal, by another stream of random numbers
        means.append(np.mean(random.choice(gains, 80)))
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    found = interval(gains)
    assert found.low == pytest.approx(low, abs=0.001)
    assert found.high == pytest.approx(high, abs=0.001)


def promoted(worse_by: float, seed: int, queries: int = 300) -> bool:
    """Does a network pass whose true mAP lies so much below; AP differs by query as it does on the default data."""
    random = np.random.default_rng(seed)
    gains = random.normal(0, 0.12, queries) * random.integers(0, 2, queries)  # half of the queries are the same to both
    rival = Comparison(interval(gains - worse_by, seed), 1.0)
    return decide({"the champion": rival}, MARGIN, 1.1, 1.1).passed


def test_few_that_are_worse_by_the_margin_pass_and_some_that_are_better_do() -> None:
    bad = sum(promoted(MARGIN, 10 * seed) for seed in range(200))
    good = sum(promoted(-0.02, 10 * seed) for seed in range(50))
    assert bad <= 10
    assert good >= 45


@pytest.mark.parametrize(
    ("rival", "told"),
    [
        (Comparison(Difference(0.0, -0.006, 0.006), 1.0), "mAP may be 0.0060 below the champion's"),
        (Comparison(Difference(0.0, -0.001, 0.006), 1.2), "1.20 times the bytes of the champion"),
        (Comparison(Difference(0.0, -0.001, 0.006), 1.0, 1.3), "1.30 times as long as the champion"),
    ],
)
def test_who_is_refused_is_told_why(rival: Comparison, told: str) -> None:
    verdict = decide({"the champion": rival}, MARGIN, 1.1, 1.1)
    assert not verdict.passed
    assert told in verdict.reason


def test_small_losses_do_not_add_up() -> None:
    """Each step loses less than the margin against the champion; the best there was remembers."""
    step = Comparison(Difference(-0.002, -0.004, 0.0), 1.0)
    best = Comparison(Difference(-0.006, -0.008, -0.004), 1.0)
    assert decide({"the champion": step}, MARGIN, 1.1, 1.1).passed
    assert not decide({"the champion": step, "the best there was": best}, MARGIN, 1.1, 1.1).passed


def test_the_first_model_passes() -> None:
    assert decide({}, MARGIN, 1.1, 1.1).passed
