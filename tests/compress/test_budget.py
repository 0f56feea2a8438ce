"""Budgets end in their window at allowed widths, and unreachable ones are rejected."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.compress.budget import (
    WINDOW,
    BudgetError,
    check_reachable,
    cost_model,
    minimum_widths,
    shrinking_sites,
)
from pipeline.compress.compactor import attach
from pipeline.compress.schedule import cubic_schedule
from pipeline.compress.width_allocation import Site, WidthAllocation
from pipeline.config import Student
from pipeline.models import cost
from pipeline.models.resnet import RetrievalNet
from pipeline.models.spec import ArchSpec
from pipeline.stage.presets import load_preset

SIZE = (64, 64)
ROOT = Path(__file__).parents[2]


def student(sites: tuple[str, ...] = ("conv1", "conv2"), **budget: object) -> Student:
    section = load_preset(ROOT, "vehicles").student
    return section.model_copy(update={"sites": list(sites), "budget": section.budget.model_copy(update=budget)})


def check(spec: ArchSpec, config: Student) -> None:
    check_reachable(spec, config, cost_model(spec, config, SIZE))


def random_sites(spec: ArchSpec, multiple: int, seed: int = 0) -> dict[str, Site]:
    rng = np.random.default_rng(seed)
    minimum = minimum_widths(spec, spec.sites, multiple)
    return {site: Site(minimum[site], np.sort(rng.gamma(2, size=spec.widths[site]))) for site in spec.sites}


@settings(max_examples=60, deadline=None)
@given(
    depth=st.sampled_from([18, 26, 50]),
    of=st.sampled_from(["macs", "params"]),
    multiple=st.sampled_from([1, 8]),
    target=st.floats(0.2, 0.7),
    seed=st.integers(0, 1000),
)
def test_the_reduction_lies_in_its_window_and_widths_are_multiples(
    depth: int, of: str, multiple: int, target: float, seed: int
) -> None:
    spec = ArchSpec.full(depth, 32, 128)
    model = cost.params_model(spec) if of == "params" else cost.macs_model(spec, SIZE)
    allocation = WidthAllocation(model, spec.widths, random_sites(spec, multiple, seed), multiple)
    allocation.finalize(target)
    narrow = spec.model_copy(update={"widths": allocation.widths})
    count = cost.params if of == "params" else lambda s: cost.macs(s, SIZE)
    assert target <= 1 - count(narrow) / count(spec) <= target + WINDOW
    assert all(allocation.widths[site] % multiple == 0 and allocation.widths[site] >= multiple for site in spec.sites)


def test_the_reduction_is_tracked_exactly_while_allocating() -> None:
    spec = ArchSpec.full(26, 32, 128)
    model = cost.macs_model(spec, SIZE)
    allocation = WidthAllocation(model, spec.widths, random_sites(spec, 8), 8)
    for target in (0.1, 0.3, 0.5):
        allocation.allocate(target, limit=0.6)
        assert allocation.reduction == 1 - model(allocation.widths) / model(spec.widths)
        assert target <= allocation.reduction <= 0.6


def test_allocating_never_exceeds_its_limit() -> None:
    spec = ArchSpec.full(14, 16, 32)
    allocation = WidthAllocation(cost.macs_model(spec, SIZE), spec.widths, random_sites(spec, 8), 8)
    allocation.allocate(0.4, limit=0.401)
    assert allocation.reduction <= 0.401


def test_channels_with_the_lowest_importance_are_removed_first() -> None:
    spec = ArchSpec.full(26, 32, 128)
    sites = random_sites(spec, 8)
    unimportant = "layer3.1.conv2"
    sites[unimportant] = Site(8, np.full(128, 1e-9))
    allocation = WidthAllocation(cost.macs_model(spec, SIZE), spec.widths, sites, 8)
    allocation.allocate(0.03, limit=1.0)
    assert {site for site in spec.sites if allocation.widths[site] < spec.widths[site]} == {unimportant}


def test_the_minimum_of_a_site_narrower_than_the_multiple_is_its_width() -> None:
    spec = ArchSpec.full(26, 8, 32)
    spec = spec.model_copy(update={"widths": spec.widths | {"layer1.0.conv1": 5}})
    assert minimum_widths(spec, spec.sites, 8)["layer1.0.conv1"] == 5


@pytest.mark.parametrize(("embedding", "multiple", "minimum"), [(100, 8, 104), (100, 1, 100), (2048, 8, 1024)])
def test_the_last_stream_spans_the_embedding(embedding: int, multiple: int, minimum: int) -> None:
    spec = ArchSpec.full(26, 32, embedding)
    widths = minimum_widths(spec, spec.widths, multiple)
    assert widths.pop("layer4") == minimum and set(widths.values()) == {multiple}


def test_an_unreachable_budget_is_rejected_with_the_largest_reduction_and_the_most_expensive_layers() -> None:
    spec = ArchSpec.full(26, 32, 256)
    with pytest.raises(BudgetError, match=r"0\.8 cannot be reached.*reduction is 0\.7334.*layer4 \d+%"):
        check(spec, student(reduction=0.8))
    check(spec, student(reduction=0.73))
    check(spec, student(reduction=0.75, allow_block_removal=True))
    check(spec, student(("conv1", "conv2", "stream"), reduction=0.97))


def test_sites_that_basic_blocks_lack_are_rejected() -> None:
    with pytest.raises(BudgetError, match=r"`student\.sites` \['conv2'\] names no site of a ResNet-18"):
        shrinking_sites(ArchSpec.full(18, 32, 256), student(("conv2",)))


def test_a_block_with_low_importance_is_removed_first_and_as_a_whole() -> None:
    spec = ArchSpec.full(26, 32, 128)
    sites, block = random_sites(spec, 8), ("layer3.1.conv1", "layer3.1.conv2")
    for site in block:
        sites[site] = Site(8, np.full(128, 1e-6))
    allocation = WidthAllocation(cost.params_model(spec), spec.widths, sites, 8, [block])
    allocation.allocate(0.1, limit=1.0)
    assert [allocation.widths[site] for site in block] == [0, 0]
    narrow = ArchSpec.model_validate({**spec.model_dump(), "widths": allocation.widths})
    assert allocation.reduction == 1 - cost.params(narrow) / cost.params(spec)
    allocation.finalize(0.5)
    narrow = ArchSpec.model_validate({**spec.model_dump(), "widths": allocation.widths})
    assert 0.5 <= 1 - cost.params(narrow) / cost.params(spec) <= 0.5 + WINDOW


def test_compactors_behind_one_or_both_inner_convolutions_reach_their_largest_possible_reduction() -> None:
    # of the MACs of a ResNet-101: at most 70.4 % with one compactor per block, behind the 3x3, and 91.9 % with two
    spec = ArchSpec.full(101, 64, 512)
    model = cost.macs_model(spec, (256, 256))
    for sites, largest in (([s for s in spec.sites if s.endswith("conv2")], 0.704), (list(spec.sites), 0.919)):
        narrowest = {**spec.widths, **minimum_widths(spec, sites, 1)}
        assert 1 - model(narrowest) / model(spec.widths) == pytest.approx(largest, abs=0.006)


def test_the_schedule_rises_from_start_to_end() -> None:
    assert cubic_schedule(0.1, 0.1, 0.5) == 0.0
    assert cubic_schedule(0.3, 0.1, 0.5) == 1 - 0.5**3
    assert cubic_schedule(0.5, 0.1, 0.5) == cubic_schedule(1.0, 0.1, 0.5) == 1.0


def test_a_network_with_removed_blocks_can_shrink_again() -> None:
    spec = ArchSpec.full(26, 16, 24)
    block = spec.removable[0]
    spec = spec.model_copy(update={"widths": spec.widths | dict.fromkeys(block.sites, 0)})
    sites = shrinking_sites(spec, student(("conv1", "conv2", "stream")))
    assert set(sites) == set(spec.widths) - set(block.sites)
    net = attach(RetrievalNet(spec), sites)
    assert set(net.indicators()) == set(sites)
    check(spec, student(("conv1", "conv2", "stream"), reduction=0.5, allow_block_removal=True))
