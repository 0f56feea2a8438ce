"""Method `budget`: masks, proximal shrinking, and commitment of masked channels."""

import pytest
import torch
from torch.nn.functional import normalize

from pipeline.compress.budget import BudgetError, cost_model
from pipeline.compress.compactor import attach, removed_sites, row_norms, shrink_rows
from pipeline.compress.importance import embedding_scores, magnitude_scores, taylor_scores
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


def new_shrinker(**budget: object) -> Shrinker:
    model = cost.macs_model(SPEC, (32, 32))
    return Shrinker(SPEC, section(**budget), model, STEPS, 0, torch.device("cpu"))


def reduction(shrinker: Shrinker) -> float:
    return 1 - shrinker.cost(shrinker.widths) / shrinker.cost(SPEC.widths)


def scored_shrinker(**budget: object) -> Shrinker:
    shrinker = new_shrinker(**budget)
    generator = torch.Generator().manual_seed(0)
    for masks in shrinker.masks.values():
        masks.score = torch.rand(len(masks.score), generator=generator)
    return shrinker


def student() -> RetrievalNet:
    return attach(RetrievalNet(SPEC), SPEC.sites)


def shrink_only(shrinker: Shrinker, net: RetrievalNet) -> None:
    """A training step without an optimiser step or a revision of the masks."""
    shrinker.shrink(net, lambda: None)


def test_a_multiple_too_coarse_for_the_window_is_rejected_before_training() -> None:
    config = section(reduction=0.1).model_copy(update={"sites": ["stream"], "channel_multiple": 32})
    model = cost_model(SPEC, config, (32, 32))  # the narrowest network reaches the budget
    with pytest.raises(BudgetError, match=r"multiples of 32 give a reduction in \[0\.1, 0\.11\]"):
        Shrinker(SPEC, config, model, STEPS, 0, torch.device("cpu"))


def test_importance_is_the_squared_change_of_the_loss_to_first_order() -> None:
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
    scores = taylor_scores(indicator, level)
    torch.testing.assert_close(scores, (indicator.weight.grad * torch.eye(128)[:, :, None, None]).sum((1, 2, 3)) ** 2)


def test_magnitudes_are_the_scales_of_the_batch_norms_before_the_site() -> None:
    net = RetrievalNet(SPEC)
    with torch.no_grad():
        net.layer1[0].bn1.weight.copy_(torch.linspace(-1, 1, 16))
        net.layer1[0].bn3.weight.fill_(3.0)
        net.layer1[0].downsample[1].weight.fill_(-1.0)
    scores = magnitude_scores(net, ["layer1.0.conv1", "layer1"])
    torch.testing.assert_close(scores["layer1.0.conv1"], torch.linspace(-1, 1, 16).abs())
    # three norms write to the stream; that of the second block has the scale 1
    torch.testing.assert_close(scores["layer1"], torch.full((64,), (3 + 1 + 1) / 3))


def test_a_row_shrinks_by_the_same_amount_in_each_step_and_stays_exactly_zero() -> None:
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


def test_masks_follow_the_schedule_in_multiples_and_end_in_the_window() -> None:
    shrinker, net = scored_shrinker(), student()
    shrinker.revise(net, 2)
    assert reduction(shrinker) == 0.0
    for step in (6, 8, 12, 18):
        shrinker.revise(net, step)
        assert reduction(shrinker) == pytest.approx(shrinker.target_reduction(step / STEPS), abs=0.05)
        assert all(int((~site.masked).sum()) % 8 == 0 for site in shrinker.masks.values())
    shrinker.revise(net, 20)
    assert shrinker.finalized
    assert 0.4 <= reduction(shrinker) <= 0.41


def test_a_mask_may_be_revised_until_one_of_its_rows_is_zero() -> None:
    shrinker = scored_shrinker()
    net = student()
    shrinker.revise(net, 12)
    first = {name: site.masked.clone() for name, site in shrinker.masks.items()}
    chosen = next(name for name, mask in first.items() if mask.any())
    other = next(name for name, mask in first.items() if mask.any() and name != chosen)
    shrink_only(shrinker, net)
    assert not shrinker.masks[chosen].committed.any()
    row = int(torch.nonzero(first[chosen])[0])
    shrinker.masks[chosen].steps_left[row] = 1  # zero after the next step
    shrink_only(shrinker, net)
    for name in (chosen, other):  # masked channels become important
        shrinker.masks[name].score[first[name]] = 100.0
    faded = row_norms(net.indicators()[other].matrix.detach())[first[other]]
    assert faded.max() < 1
    shrinker.revise(net, 12)
    assert shrinker.masks[chosen].masked[first[chosen]].all()
    unmasked = first[other] & ~shrinker.masks[other].masked
    assert unmasked.any()
    norms = row_norms(net.indicators()[other].matrix.detach())  # unmasked rows have full length again
    torch.testing.assert_close(norms[unmasked], torch.ones(int(unmasked.sum())))
    torch.testing.assert_close(norms[first[other] & ~unmasked], faded[~unmasked[first[other]]])
    assert not shrinker.masks[other].full_norm[~shrinker.masks[other].masked].any()


def test_a_group_masked_after_another_one_became_zero_can_still_be_revised() -> None:
    shrinker, net = scored_shrinker(), student()
    compactors = net.indicators()
    name = "layer4.0.conv1"
    site = shrinker.masks[name]
    site.masked[:8] = site.committed[:8] = True
    with torch.no_grad():
        compactors[name].weight[:8] = 0.0
    site.masked[8:16] = True
    site.steps_left[8:16] = 4
    committed = []
    for _ in range(4):
        shrink_only(shrinker, net)
        committed.append(int(shrinker.masks[name].committed.sum()))
    assert committed == [8, 8, 8, 16]


def test_rows_fade_in_the_same_number_of_steps_at_any_norm() -> None:
    shrinker, net = scored_shrinker(), student()
    compactors = net.indicators()
    with torch.no_grad():
        for compactor in compactors.values():
            compactor.weight *= torch.linspace(0.1, 7.0, len(compactor.weight))[:, None, None, None]
    shrinker.revise(net, 40)
    for step in range(FADE):
        assert all((row_norms(compactors[name].matrix)[site.masked] > 0).all() for name, site in shrinker.masks.items())
        shrink_only(shrinker, net)
        left = 1 - (step + 1) / FADE
        for name, site in shrinker.masks.items():
            expected = torch.where(site.masked & (step < FADE - 1), left, 1.0)
            torch.testing.assert_close(site.level(compactors[name].matrix), expected)
    for name, site in shrinker.masks.items():
        assert torch.equal(row_norms(compactors[name].matrix) == 0, site.masked)
        assert torch.equal(site.committed, site.masked)


def test_masked_rows_move_by_the_proximal_step_only() -> None:
    shrinker = scored_shrinker()
    net = student()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.0)
    compactors = net.indicators()
    for _ in range(3):
        optimizer.zero_grad()
        net(torch.randn(4, 3, 32, 32)).embedding.square().sum().backward()
        shrinker.step(net, optimizer.step, 0.4)
    assert any(site.masked.any() for site in shrinker.masks.values())
    for name, site in shrinker.masks.items():
        norms = row_norms(compactors[name].matrix.detach())
        torch.testing.assert_close(
            norms[site.masked], site.full_norm[site.masked] * site.steps_left[site.masked] / FADE
        )
        if not site.masked.all():
            assert (norms[~site.masked] != 1.0).any()


def test_a_shrinker_is_restored_from_its_state_dict() -> None:
    shrinker, net = scored_shrinker(), student()
    shrinker.revise(net, 12)
    restored = new_shrinker()
    restored.load_state_dict(shrinker.state_dict())
    assert restored.state_dict().keys() == shrinker.state_dict().keys()
    assert all(torch.equal(value, restored.state_dict()[name]) for name, value in shrinker.state_dict().items())
    assert reduction(restored) == reduction(shrinker)


def test_a_block_is_removed_as_a_whole_and_then_adds_nothing() -> None:
    shrinker, net = scored_shrinker(allow_block_removal=True), student()
    block = ("layer3.1.conv1", "layer3.1.conv2")
    for name in block:
        shrinker.masks[name].score[:] = 1e-9
    with torch.no_grad():
        net.layer3[1].bn3.weight.normal_()
        net.layer3[1].bn3.bias.normal_()
    norm = net.layer3[1].bn3
    start = norm.weight.detach().clone()
    shrinker.revise(net, 6)
    assert all(shrinker.masks[name].masked.all() for name in block)
    for step in range(FADE):
        assert removed_sites(net) == set()
        shrink_only(shrinker, net)
        torch.testing.assert_close(norm.weight.detach(), start * (1 - (step + 1) / FADE))
    assert removed_sites(net) == set(block)
    assert all(shrinker.masks[name].committed.all() for name in block)
    with torch.no_grad():
        norm.bias += 1.0
    shrink_only(shrinker, net)
    assert not norm.bias.any()
    net = net.double().eval()
    narrow = fold_and_cut(net, plan_cut(net, 0.0, 8, SPEC))
    assert "layer3.1.conv1.weight" not in narrow.state_dict()
    assert largest_difference(net, narrow, torch.randn(2, 3, 32, 32, dtype=torch.float64)) < 1e-12


def test_a_fading_block_can_be_restored_until_one_of_its_rows_is_zero() -> None:
    shrinker, net = scored_shrinker(allow_block_removal=True), student()
    block = ("layer3.1.conv1", "layer3.1.conv2")
    for name in block:
        shrinker.masks[name].score[:] = 1e-9
    norm, indicators = net.layer3[1].bn3, net.indicators()
    start = norm.weight.detach().clone()
    shrinker.revise(net, 6)
    shrink_only(shrinker, net)
    assert (norm.weight < start).all()
    for name in block:
        shrinker.masks[name].score[:] = 100.0
    shrinker.revise(net, 6)
    assert not any(shrinker.masks[name].masked.any() for name in block)
    torch.testing.assert_close(norm.weight.detach(), start)
    for name in block:
        torch.testing.assert_close(row_norms(indicators[name].matrix.detach()), torch.ones(SPEC.widths[name]))
    for name in block:
        shrinker.masks[name].score[:] = 1e-9
    shrinker.revise(net, 7)
    shrinker.masks[block[0]].steps_left[3] = 1
    shrink_only(shrinker, net)
    assert all(shrinker.masks[name].committed.all() for name in block)


def test_the_importance_of_a_row_does_not_change_when_it_is_masked_or_fades() -> None:
    shrinker, net = scored_shrinker(), student().eval()
    name, images = "layer4.1.conv2", torch.randn(4, 3, 32, 32)
    indicator, site = net.indicators()[name], shrinker.masks[name]
    with torch.no_grad():
        indicator.weight[:8] *= 0.3

    def scores() -> torch.Tensor:
        net.zero_grad()
        net(images).embedding[:, 0].sum().backward()
        site.score.zero_()
        shrinker.score(net)
        return site.score[:8].clone()

    before = scores()
    site.score[:] = 100.0
    site.score[:8] = 1e-9
    shrinker.revise(net, 6)
    assert site.masked[:8].all()
    torch.testing.assert_close(scores(), before)
    with torch.no_grad():
        indicator.weight[:8] *= 1e-3  # rows so short that they hardly change the output
    torch.testing.assert_close(row_norms(indicator.matrix.detach())[:8], torch.full((8,), 3e-4))
    assert (site.level(indicator.matrix)[:8] < 2e-3).all()


def test_importance_for_embeddings_is_their_mean_squared_change_to_first_order() -> None:
    """The estimate by random signs approaches the sum over all derivatives, without their mean over the images."""
    torch.manual_seed(0)
    net = attach(RetrievalNet(ArchSpec.full(14, 8, 8)), ["layer2.0.conv2", "layer4"]).eval().double()
    images = torch.randn(6, 3, 32, 32, dtype=torch.float64)
    indicators, generator = net.indicators(), torch.Generator().manual_seed(0)
    draws = []
    for _ in range(400):
        draws.append(embedding_scores(indicators, net(images).embedding, generator))
    for site, indicator in indicators.items():
        estimate = torch.stack([draw[site] for draw in draws]).mean(dim=0)
        for row in (0, 3):
            kept, step = indicator.weight.detach().clone(), 1e-4
            before = normalize(net(images).embedding, dim=1).detach()
            with torch.no_grad():
                indicator.weight[row] *= 1 - step
                change = (normalize(net(images).embedding, dim=1) - before) / step
                indicator.weight.copy_(kept)
            expected = (change - change.mean(dim=0)).square().sum() / len(images)
            assert float(estimate[row]) == pytest.approx(float(expected), rel=0.3)
