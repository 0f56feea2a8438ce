"""A latency budget keeps its window by the timed network, whatever the layer table predicts."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch

from pipeline.compress import final_widths as search
from pipeline.compress.budget import WINDOW, BudgetError, BudgetMissedError, cost_model
from pipeline.compress.final_widths import ATTEMPTS
from pipeline.compress.methods import compression
from pipeline.compress.shrinker import Shrinker
from pipeline.models.cost import CostModel, macs_model, params_model
from pipeline.models.resnet import RetrievalNet
from tests.compress.test_capacity import SPEC, STEPS, capacity, section, student

TABLE = macs_model(SPEC, (32, 32))
Share = Callable[[Mapping[str, int]], float]


def predicted(widths: Mapping[str, int]) -> float:
    return TABLE.reduction(SPEC.widths, widths)


def timed(share: Share) -> tuple[CostModel, list[float]]:
    """A layer table, what timing says instead, and the savings that were timed."""
    savings: list[float] = []

    def measured(widths: Mapping[str, int]) -> float:
        savings.append(1 - share(widths))
        return 1 - savings[-1]

    return replace(TABLE, measured=measured), savings


def chosen(
    share: Share, method: str = "budget", reduction: float = 0.4
) -> tuple[dict[str, int], CostModel, list[float]]:
    """Widths that a whole schedule ends with, the corrected cost model, and the savings that were timed last."""
    model, savings = timed(share)
    config = section(reduction=reduction).model_copy(update={"method": method})
    made = compression(config, RetrievalNet(SPEC), model, STEPS, 0, torch.device("cpu"))
    if isinstance(made, Shrinker):
        for site in made.masks.values():
            site.score = torch.rand(len(site.score), generator=torch.Generator().manual_seed(0))
        savings.clear()
        made.revise(student(), made.schedule.final_step)
        return made.widths, made.cost, savings
    widths = {**SPEC.widths, **{name: len(channels) for name, channels in made.kept.items()}}
    return widths, made.cost, savings


SHARES: dict[str, Share] = {
    "exact": lambda widths: 1 - predicted(widths),
    "saves less": lambda widths: (1 - predicted(widths)) ** 0.8,
    "saves half": lambda widths: 1 - 0.55 * predicted(widths),
    "saves a fixed part more": lambda widths: 0.95 * (1 - predicted(widths)),
    "saves twice as much": lambda widths: (1 - predicted(widths)) ** 2,
}


@pytest.mark.parametrize("method", ["budget", "static-magnitude", "static-random"])
@pytest.mark.parametrize("name", SHARES)
def test_the_final_widths_keep_the_window_by_the_timed_network(name: str, method: str) -> None:
    widths, model, savings = chosen(SHARES[name], method, 0.3)
    assert 0.3 <= 1 - SHARES[name](widths) <= 0.3 + WINDOW
    assert model.reduction(SPEC.widths, widths) == pytest.approx(1 - SHARES[name](widths))
    assert len(savings) <= 4


def test_a_budget_that_the_table_calls_unreachable_is_kept_where_the_timed_network_allows_it() -> None:
    config = section(reduction=0.8)
    with pytest.raises(BudgetError, match=r"0\.8 cannot be reached: with every site at its least"):
        cost_model(SPEC, config, (32, 32))
    share = SHARES["saves twice as much"]
    widths, _, _ = chosen(share, reduction=0.8)
    assert 0.8 <= 1 - share(widths) <= 0.8 + WINDOW


@pytest.mark.parametrize(("factor", "warns"), [(3.0, True), (0.45, True), (1.9, False), (0.6, False)])
def test_table_and_timing_that_disagree_by_more_than_a_factor_of_two_are_named(
    factor: float, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    widths, _, _ = chosen(lambda widths: 1 - factor * predicted(widths), reduction=0.25)
    assert 0.25 <= factor * predicted(widths) <= 0.25 + WINDOW
    assert ("which counts" in caplog.text) == warns


def test_the_closest_choice_that_saves_enough_is_taken_where_timing_is_too_noisy() -> None:
    noise = iter([0.35, 0.47, 0.38, 0.45, 0.39, 0.52])
    calls: list[Mapping[str, int]] = []

    def share(widths: Mapping[str, int]) -> float:
        calls.append(widths)
        return 1 - next(noise)

    widths, model = search.final_widths(
        lambda cost: choose(cost, 0.4), timed(share)[0], SPEC.widths, dict.fromkeys(SPEC.widths, 8), 0.4
    )
    assert len(calls) == ATTEMPTS
    assert widths == calls[3]
    assert model.reduction(SPEC.widths, widths) == pytest.approx(0.45)


def choose(cost: CostModel, asked: float) -> dict[str, int]:
    """The same share of every inner site, as fine as that goes."""
    for share in range(1000, 0, -1):
        widths = {**SPEC.widths, **{site: SPEC.widths[site] * share / 1000 for site in SPEC.sites}}
        if cost.reduction(SPEC.widths, widths) >= asked:
            return widths
    raise BudgetError("nothing is narrow enough")


def test_a_latency_budget_that_no_timed_network_keeps_is_refused_before_training() -> None:
    model, savings = timed(lambda widths: 1 - 0.3 * predicted(widths))
    with pytest.raises(BudgetError, match=r"0\.4 of the latency cannot be reached: of \d networks .* saves 0\.19\d+;"):
        Shrinker(SPEC, section(), model, STEPS, 0, torch.device("cpu"))
    assert savings


def test_a_network_that_is_timed_as_slower_than_the_full_one_is_refused() -> None:
    with pytest.raises(BudgetError, match=r"the fastest saves -0\.1000"):
        chosen(lambda widths: 1.1)


def test_the_correction_is_known_from_the_first_step_and_restored() -> None:
    model, _ = timed(SHARES["saves less"])
    trained = Shrinker(SPEC, section(), model, STEPS, 0, torch.device("cpu"))
    assert trained.cost.correction < 0.95
    trained.revise(student(), STEPS)
    resumed = Shrinker(SPEC, section(), model, STEPS, 0, torch.device("cpu"))
    resumed.load_state_dict(trained.state_dict())
    assert resumed.cost(trained.widths) == trained.cost(trained.widths)
    resumed.check(trained.widths)


def test_channels_that_are_gone_and_save_more_than_estimated_are_no_reason_to_refuse() -> None:
    tested, net = capacity(), student()
    tested.revise(net, 18)
    for site in tested.masks.values():
        site.committed = site.masked.clone()
    gone = tested.widths
    tested.table = timed(SHARES["saves twice as much"])[0]
    tested.revise(net, STEPS)
    assert tested.widths == gone
    assert tested.cost.reduction(SPEC.widths, gone) > 0.5
    tested.check(gone)
    with pytest.raises(BudgetMissedError, match="rows that were not chosen are zero"):
        tested.check({**gone, "layer3.0.conv1": gone["layer3.0.conv1"] - 8})


def test_a_corrected_model_leaves_the_cost_of_the_whole_as_it_is() -> None:
    model = params_model(SPEC)
    narrow = {**SPEC.widths, "layer3": 64}
    corrected = model.corrected(SPEC.widths, 0.75)
    assert corrected(SPEC.widths) == pytest.approx(model(SPEC.widths))
    assert corrected.reduction(SPEC.widths, narrow) == pytest.approx(0.75 * model.reduction(SPEC.widths, narrow))


def test_a_budget_that_is_counted_is_not_corrected() -> None:
    tested = capacity()
    tested.revise(student(), STEPS)
    assert tested.cost is tested.table


def test_nothing_is_timed_where_nothing_is_asked() -> None:
    model, savings = timed(SHARES["exact"])
    made = compression(section(reduction=0.0), RetrievalNet(SPEC), model, STEPS, 0, torch.device("cpu"))
    assert made.cost is model and not savings
