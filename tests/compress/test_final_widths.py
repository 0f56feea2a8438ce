"""A latency budget ends in its window by the timed network, whatever the layer table predicts."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch

from pipeline.compress import final_widths as search
from pipeline.compress.budget import WINDOW, BudgetError, BudgetMissedError, cost_model
from pipeline.compress.final_widths import ATTEMPTS
from pipeline.compress.methods import build_compression
from pipeline.compress.shrinker import Shrinker
from pipeline.models.cost import CostModel, macs_model, params_model
from pipeline.models.resnet import RetrievalNet
from tests.compress.test_shrinker import SPEC, STEPS, scored_shrinker, section, student

TABLE = macs_model(SPEC, (32, 32))
Share = Callable[[Mapping[str, int]], float]


def predicted(widths: Mapping[str, int]) -> float:
    return TABLE.reduction(SPEC.widths, widths)


def timed(share: Share) -> tuple[CostModel, list[float]]:
    """A layer table with a fake timing, and a list that receives the timed savings."""
    savings: list[float] = []

    def measured(widths: Mapping[str, int]) -> float:
        savings.append(1 - share(widths))
        return 1 - savings[-1]

    return replace(TABLE, measured=measured), savings


def chosen(
    share: Share, method: str = "budget", reduction: float = 0.4
) -> tuple[dict[str, int], CostModel, list[float]]:
    """Final widths of a method, the corrected cost model, and the savings timed in the last search."""
    model, savings = timed(share)
    config = section(reduction=reduction).model_copy(update={"method": method})
    compression = build_compression(config, RetrievalNet(SPEC), SPEC, model, STEPS, 0, torch.device("cpu"))
    if isinstance(compression, Shrinker):
        for masks in compression.masks.values():
            masks.score = torch.rand(len(masks.score), generator=torch.Generator().manual_seed(0))
        savings.clear()
        compression.revise(student(), compression.schedule.final_step)
        return compression.widths, compression.cost, savings
    widths = {**SPEC.widths, **{name: len(channels) for name, channels in compression.kept.items()}}
    return widths, compression.cost, savings


SHARES: dict[str, Share] = {
    "exact": lambda widths: 1 - predicted(widths),
    "saves less": lambda widths: (1 - predicted(widths)) ** 0.8,
    "saves half": lambda widths: 1 - 0.55 * predicted(widths),
    "saves a fixed part more": lambda widths: 0.95 * (1 - predicted(widths)),
    "saves twice as much": lambda widths: (1 - predicted(widths)) ** 2,
}


@pytest.mark.parametrize("method", ["budget", "static-magnitude", "static-random"])
@pytest.mark.parametrize("name", SHARES)
def test_the_timed_network_lies_in_the_window(name: str, method: str) -> None:
    widths, model, savings = chosen(SHARES[name], method, 0.3)
    assert 0.3 <= 1 - SHARES[name](widths) <= 0.3 + WINDOW
    assert model.reduction(SPEC.widths, widths) == pytest.approx(1 - SHARES[name](widths))
    assert len(savings) <= 4


def test_a_budget_that_the_table_calls_unreachable_is_kept_if_the_timed_network_keeps_it() -> None:
    config = section(reduction=0.8)
    with pytest.raises(BudgetError, match=r"0\.8 cannot be reached: with every site at its minimum"):
        cost_model(SPEC, config, (32, 32))
    share = SHARES["saves twice as much"]
    widths, _, _ = chosen(share, reduction=0.8)
    assert 0.8 <= 1 - share(widths) <= 0.8 + WINDOW


@pytest.mark.parametrize(("factor", "warns"), [(3.0, True), (0.45, True), (1.9, False), (0.6, False)])
def test_a_disagreement_of_table_and_timing_by_more_than_a_factor_of_two_is_logged(
    factor: float, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    widths, _, _ = chosen(lambda widths: 1 - factor * predicted(widths), reduction=0.25)
    assert 0.25 <= factor * predicted(widths) <= 0.25 + WINDOW
    assert ("which counts" in caplog.text) == warns


def test_with_noisy_timing_the_closest_network_that_saves_enough_is_taken() -> None:
    noise = iter([0.35, 0.47, 0.38, 0.45, 0.39, 0.52])
    calls: list[Mapping[str, int]] = []

    def share(widths: Mapping[str, int]) -> float:
        calls.append(widths)
        return 1 - next(noise)

    widths, model = search.final_widths(lambda cost: choose(cost, 0.4), SPEC, section(reduction=0.4), timed(share)[0])
    assert len(calls) == ATTEMPTS
    assert widths == calls[3]
    assert model.reduction(SPEC.widths, widths) == pytest.approx(0.45)


def choose(cost: CostModel, target: float) -> dict[str, int]:
    """The largest widths that reach the target with one factor on all inner sites."""
    for share in range(1000, 0, -1):
        widths = {**SPEC.widths, **{site: SPEC.widths[site] * share / 1000 for site in SPEC.sites}}
        if cost.reduction(SPEC.widths, widths) >= target:
            return widths
    raise BudgetError("no widths are narrow enough")


def test_a_latency_budget_that_no_timed_network_keeps_is_rejected_before_training() -> None:
    model, savings = timed(lambda widths: 1 - 0.3 * predicted(widths))
    with pytest.raises(
        BudgetError, match=r"0\.4 of the latency cannot be reached: of \d timed networks .* saves 0\.19\d+;"
    ):
        Shrinker(SPEC, section(), model, STEPS, 0, torch.device("cpu"))
    assert savings


def test_a_network_that_is_timed_as_slower_than_the_full_one_is_rejected() -> None:
    with pytest.raises(BudgetError, match=r"the fastest saves -0\.1000"):
        chosen(lambda widths: 1.1)


def test_the_correction_is_measured_before_the_first_step_and_restored() -> None:
    model, _ = timed(SHARES["saves less"])
    trained = Shrinker(SPEC, section(), model, STEPS, 0, torch.device("cpu"))
    assert trained.cost.correction < 0.95
    trained.revise(student(), STEPS)
    resumed = Shrinker(SPEC, section(), model, STEPS, 0, torch.device("cpu"))
    resumed.load_state_dict(trained.state_dict())
    assert resumed.cost(trained.widths) == trained.cost(trained.widths)
    resumed.check(trained.widths)


def test_a_reduction_beyond_the_window_is_accepted_if_removed_channels_saved_more_than_estimated() -> None:
    shrinker, net = scored_shrinker(), student()
    shrinker.revise(net, 18)
    for site in shrinker.masks.values():
        site.committed = site.masked.clone()
    removed = shrinker.widths
    shrinker.table = timed(SHARES["saves twice as much"])[0]
    shrinker.revise(net, STEPS)
    assert shrinker.widths == removed
    assert shrinker.cost.reduction(SPEC.widths, removed) > 0.5
    shrinker.check(removed)
    with pytest.raises(BudgetMissedError, match="unmasked channels are zero or masked ones are not"):
        shrinker.check({**removed, "layer3.0.conv1": removed["layer3.0.conv1"] - 8})


def test_a_correction_does_not_change_the_cost_of_the_full_network() -> None:
    model = params_model(SPEC)
    narrow = {**SPEC.widths, "layer3": 64}
    corrected = model.corrected(SPEC.widths, 0.75)
    assert corrected(SPEC.widths) == pytest.approx(model(SPEC.widths))
    assert corrected.reduction(SPEC.widths, narrow) == pytest.approx(0.75 * model.reduction(SPEC.widths, narrow))


def test_budgets_of_macs_and_params_are_not_corrected() -> None:
    shrinker = scored_shrinker()
    shrinker.revise(student(), STEPS)
    assert shrinker.cost is shrinker.table


def test_a_budget_of_zero_needs_no_timing() -> None:
    model, savings = timed(SHARES["exact"])
    compression = build_compression(
        section(reduction=0.0), RetrievalNet(SPEC), SPEC, model, STEPS, 0, torch.device("cpu")
    )
    assert compression.cost is model and not savings
