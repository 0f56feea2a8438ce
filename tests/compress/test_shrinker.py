"""Masks, proximal shrinking, commitment: what happens to a row between being chosen and being zero."""

import pytest
import torch

from pipeline.compress.budget import BudgetError, cost_model
from pipeline.compress.compactor import attach, removed_sites, row_norms, shrink_rows
from pipeline.compress.importance import magnitude_scores, taylor_scores
from pipeline.compress.shrinker import Shrinker
from pipeline.compress.surgery import fold_and_cut, largest_difference, plan_cut
from pipeline.config import Student
from pipeline.models import cost
from pipeline.models.resnet import RetrievalNet
from pipeline.models.spec import ArchSpec
from pipeline.stage.presets import load_preset
from tests.imports import ROOT

SPEC = ArchSpec.full(26, 16, 32)
STEPS, FADE = 40, 4


def section(**budget: object) -> Student:
    student = load_preset(ROOT, "vehicles").student.model_dump()
    student["budget"] |= {"reduction": 0.4, "start": 0.1, "end": 0.5, "fade": 0.1, "every": 1} | budget
    student["sites"], student["resetting"]["momentum"] = ["conv1", "conv2"], 0.5
    return Student.model_validate(student)


def fresh(**budget: object) -> Shrinker:
    model = cost.macs_model(SPEC, (32, 32))
    return Shrinker(SPEC, section(**budget), model, STEPS, 0, torch.device("cpu"))


def reduction(tested: Shrinker) -> float:
    return 1 - tested.cost(tested.widths) / tested.cost(SPEC.widths)


def capacity(**budget: object) -> Shrinker:
    made = fresh(**budget)
    generator = torch.Generator().manual_seed(0)
    for site in made.masks.values():
        site.score = torch.rand(len(site.score), generator=generator)
    return made


def student() -> RetrievalNet:
    return attach(RetrievalNet(SPEC), SPEC.sites)


def idle(tested: Shrinker, net: RetrievalNet) -> None:
    """A step in which the optimiser does nothing and no mask is revised."""
    tested.shrink(net, lambda: None)


def test_widths_too_coarse_for_the_window_are_refused_before_training() -> None:
    config = section(reduction=0.1).model_copy(update={"sites": ["stream"], "channel_multiple": 32})
    model = cost_model(SPEC, config, (32, 32))  # the narrowest network would do
    with pytest.raises(BudgetError, match=r"multiples of 32 give a reduction in \[0\.1, 0\.11\]"):
        Shrinker(SPEC, config, model, STEPS, 0, torch.device("cpu"))


def test_importance_is_what_the_loss_would_change_to_first_order_squared() -> None:
    net = student().eval().double()
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    net(images).embedding.sum().backward()
    indicator = net.indicators()["layer2.0.conv2"]
    scores = taylor_scores(indicator, torch.ones(32, dtype=torch.float64))
    before = net(images).embedding.sum()
    for row in (0, 7, 31):
        with torch.no_grad():
            kept = indicator.weight[row].clone()
            indicator.weight[row] *= 1 - 1e-6
            change = float(net(images).embedding.sum() - before) / 1e-6
            indicator.weight[row] = kept
        assert float(scores[row]) == pytest.approx(change**2, rel=1e-3)


def test_a_fading_row_is_scored_at_full_length() -> None:
    net = student().eval().double()
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    indicator = net.indicators()["layer4.1.conv2"]
    level = torch.linspace(0.1, 1.0, 128, dtype=torch.float64)
    with torch.no_grad():
        indicator.weight *= level[:, None, None, None]
    net(images).embedding.sum().backward()
    found = taylor_scores(indicator, level)
    torch.testing.assert_close(found, (indicator.weight.grad * torch.eye(128)[:, :, None, None]).sum((1, 2, 3)) ** 2)


def test_magnitudes_are_scales_of_the_norms_in_front() -> None:
    net = RetrievalNet(SPEC)
    with torch.no_grad():
        net.layer1[0].bn1.weight.copy_(torch.linspace(-1, 1, 16))
        net.layer1[0].bn3.weight.fill_(3.0)
        net.layer1[0].downsample[1].weight.fill_(-1.0)
    found = magnitude_scores(net, ["layer1.0.conv1", "layer1"])
    torch.testing.assert_close(found["layer1.0.conv1"], torch.linspace(-1, 1, 16).abs())
    torch.testing.assert_close(found["layer1"], torch.full((64,), (3 + 1 + 1) / 3))  # the second block's is 1


def test_a_row_loses_the_same_in_each_step_until_it_is_exactly_zero_and_stays_so() -> None:
    row = torch.tensor([[0.6, 0.8], [0.0, 0.0]], dtype=torch.float64)
    norms = []
    for left in (4, 3, 2, 1, 0):
        expected = row * (1 - 0.25 / row_norms(row).clamp_min(0.25))[:, None]  # block soft thresholding
        row = shrink_rows(row, torch.tensor([left, 0]))
        torch.testing.assert_close(row, expected)
        norms.append(float(row_norms(row)[0]))
    assert norms == pytest.approx([0.75, 0.5, 0.25, 0.0, 0.0])
    assert norms[3] == 0.0
    assert torch.equal(row, torch.zeros_like(row))
    assert torch.isfinite(row).all()


def test_masks_follow_the_schedule_in_whole_groups_and_end_in_the_window() -> None:
    tested, net = capacity(), student()
    tested.revise(net, 2)
    assert reduction(tested) == 0.0
    for step in (6, 8, 12, 18):
        tested.revise(net, step)
        assert reduction(tested) == pytest.approx(tested.due(step / STEPS), abs=0.05)
        assert all(int((~site.masked).sum()) % 8 == 0 for site in tested.masks.values())
    tested.revise(net, 20)
    assert tested.finalized
    assert 0.4 <= reduction(tested) <= 0.41


def test_a_mask_is_revised_until_a_row_is_zero_and_kept_from_then_on() -> None:
    tested = capacity()
    net = student()
    tested.revise(net, 12)
    first = {name: site.masked.clone() for name, site in tested.masks.items()}
    chosen = next(name for name, mask in first.items() if mask.any())
    other = next(name for name, mask in first.items() if mask.any() and name != chosen)
    idle(tested, net)
    assert not tested.masks[chosen].committed.any()
    row = int(torch.nonzero(first[chosen])[0])
    tested.masks[chosen].steps_left[row] = 1  # its next step is its last
    idle(tested, net)
    for name in (chosen, other):  # what was unimportant becomes important
        tested.masks[name].score[first[name]] = 100.0
    faded = row_norms(net.indicators()[other].matrix.detach())[first[other]]
    assert faded.max() < 1
    tested.revise(net, 12)
    assert tested.masks[chosen].masked[first[chosen]].all()
    back = first[other] & ~tested.masks[other].masked
    assert back.any()
    norms = row_norms(net.indicators()[other].matrix.detach())  # it has its length again, and others keep theirs
    torch.testing.assert_close(norms[back], torch.ones(int(back.sum())))
    torch.testing.assert_close(norms[first[other] & ~back], faded[~back[first[other]]])
    assert not tested.masks[other].full_norm[~tested.masks[other].masked].any()


def test_a_group_masked_beside_a_dead_one_can_still_be_revised() -> None:
    tested, net = capacity(), student()
    compactors = net.indicators()
    name = "layer4.0.conv1"
    site = tested.masks[name]
    site.masked[:8] = site.committed[:8] = True
    with torch.no_grad():
        compactors[name].weight[:8] = 0.0
    site.masked[8:16] = True
    site.steps_left[8:16] = 4
    committed = []
    for _ in range(4):
        idle(tested, net)
        committed.append(int(tested.masks[name].committed.sum()))
    assert committed == [8, 8, 8, 16]


def test_rows_fade_in_the_same_number_of_steps_whatever_their_norm() -> None:
    tested, net = capacity(), student()
    compactors = net.indicators()
    with torch.no_grad():
        for compactor in compactors.values():
            compactor.weight *= torch.linspace(0.1, 7.0, len(compactor.weight))[:, None, None, None]
    tested.revise(net, 40)
    for step in range(FADE):
        assert all((row_norms(compactors[name].matrix)[site.masked] > 0).all() for name, site in tested.masks.items())
        idle(tested, net)
        left = 1 - (step + 1) / FADE
        for name, site in tested.masks.items():
            expected = torch.where(site.masked & (step < FADE - 1), left, 1.0)
            torch.testing.assert_close(site.level(compactors[name].matrix), expected)
    for name, site in tested.masks.items():
        assert torch.equal(row_norms(compactors[name].matrix) == 0, site.masked)
        assert torch.equal(site.committed, site.masked)


def test_masked_rows_move_by_the_proximal_step_alone() -> None:
    tested = capacity()
    net = student()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.0)
    compactors = net.indicators()
    for _ in range(3):
        optimizer.zero_grad()
        net(torch.randn(4, 3, 32, 32)).embedding.square().sum().backward()
        tested.step(net, optimizer.step, 0.4)
    assert any(site.masked.any() for site in tested.masks.values())
    for name, site in tested.masks.items():
        norms = row_norms(compactors[name].matrix.detach())
        torch.testing.assert_close(
            norms[site.masked], site.full_norm[site.masked] * site.steps_left[site.masked] / FADE
        )
        if not site.masked.all():
            assert (norms[~site.masked] != 1.0).any()


def test_a_capacity_survives_its_state_dict() -> None:
    tested, net = capacity(), student()
    tested.revise(net, 12)
    other = fresh()
    other.load_state_dict(tested.state_dict())
    assert other.state_dict().keys() == tested.state_dict().keys()
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in tested.state_dict().items())
    assert reduction(other) == reduction(tested)


def test_a_block_goes_as_a_whole_and_leaves_nothing_behind() -> None:
    tested, net = capacity(allow_block_removal=True), student()
    block = ("layer3.1.conv1", "layer3.1.conv2")
    for name in block:
        tested.masks[name].score[:] = 1e-9
    with torch.no_grad():
        net.layer3[1].bn3.weight.normal_()
        net.layer3[1].bn3.bias.normal_()
    norm = net.layer3[1].bn3
    start = norm.weight.detach().clone()
    tested.revise(net, 6)
    assert all(tested.masks[name].masked.all() for name in block)
    for step in range(FADE):
        assert removed_sites(net) == set()
        idle(tested, net)
        torch.testing.assert_close(norm.weight.detach(), start * (1 - (step + 1) / FADE))
    assert removed_sites(net) == set(block)
    assert all(tested.masks[name].committed.all() for name in block)
    with torch.no_grad():
        norm.bias += 1.0
    idle(tested, net)
    assert not norm.bias.any()
    net = net.double().eval()
    narrow = fold_and_cut(net, plan_cut(net, 0.0, 8, SPEC))
    assert "layer3.1.conv1.weight" not in narrow.state_dict()
    assert largest_difference(net, narrow, torch.randn(2, 3, 32, 32, dtype=torch.float64)) < 1e-12


def test_a_block_that_is_wanted_again_comes_back_whole_until_a_row_of_it_is_zero() -> None:
    tested, net = capacity(allow_block_removal=True), student()
    block = ("layer3.1.conv1", "layer3.1.conv2")
    for name in block:
        tested.masks[name].score[:] = 1e-9
    norm, indicators = net.layer3[1].bn3, net.indicators()
    start = norm.weight.detach().clone()
    tested.revise(net, 6)
    idle(tested, net)
    assert (norm.weight < start).all()
    for name in block:
        tested.masks[name].score[:] = 100.0
    tested.revise(net, 6)
    assert not any(tested.masks[name].masked.any() for name in block)
    torch.testing.assert_close(norm.weight.detach(), start)
    for name in block:
        torch.testing.assert_close(row_norms(indicators[name].matrix.detach()), torch.ones(SPEC.widths[name]))
    for name in block:
        tested.masks[name].score[:] = 1e-9
    tested.revise(net, 7)
    tested.masks[block[0]].steps_left[3] = 1
    idle(tested, net)
    assert all(tested.masks[name].committed.all() for name in block)


def test_a_row_is_worth_the_same_just_before_and_just_after_it_is_masked_and_while_it_fades() -> None:
    tested, net = capacity(), student().eval()
    name, images = "layer4.1.conv2", torch.randn(4, 3, 32, 32)
    indicator, site = net.indicators()[name], tested.masks[name]
    with torch.no_grad():
        indicator.weight[:8] *= 0.3

    def scores() -> torch.Tensor:
        net.zero_grad()
        net(images).embedding[:, 0].sum().backward()
        site.score.zero_()
        tested.score(net)
        return site.score[:8].clone()

    before = scores()
    site.score[:] = 100.0
    site.score[:8] = 1e-9
    tested.revise(net, 6)
    assert site.masked[:8].all()
    torch.testing.assert_close(scores(), before)
    with torch.no_grad():
        indicator.weight[:8] *= 1e-3  # so short that the rest of the network hardly notices
    torch.testing.assert_close(row_norms(indicator.matrix.detach())[:8], torch.full((8,), 3e-4))
    assert (site.level(indicator.matrix)[:8] < 2e-3).all()
