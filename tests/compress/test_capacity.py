"""Masks, proximal shrinking, commitment: what happens to a row between being chosen and being zero."""

import pytest
import torch

from pipeline.compress.capacity import Capacity
from pipeline.compress.compactor import attach, row_norms, shrink_rows
from pipeline.compress.resetting import contributions, nearest
from pipeline.config import Budget
from pipeline.models import cost
from pipeline.models.resnet import RetrievalNet
from pipeline.models.spec import ArchSpec

SPEC = ArchSpec.full(26, 16, 32)
BUDGET = Budget(of="macs", reduction=0.4, start=0.1, end=0.5, fade=0.1, every=1)
FADE = 4


def fresh() -> Capacity:
    model = cost.macs_model(SPEC, (32, 32))
    return Capacity.start(SPEC, SPEC.sites, model, BUDGET, 8, 0.5, FADE, torch.device("cpu"))


def capacity() -> Capacity:
    made = fresh()
    generator = torch.Generator().manual_seed(0)
    for site in made.sites.values():
        site.score = torch.rand(len(site.score), generator=generator)
    return made


def test_contributions_are_the_mean_product_with_the_neighbours() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(5, 4, generator=generator), torch.randn(5, 4, generator=generator)
    neighbours = nearest(teacher, 2)
    expected = torch.zeros(4)
    for i in range(5):
        order = sorted(
            (j for j in range(5) if j != i),
            key=lambda j: -float(torch.cosine_similarity(teacher[i], teacher[j], dim=0)),
        )
        assert set(neighbours[i].tolist()) == set(order[:2])
        for j in order[:2]:
            for c in range(4):
                t, s = teacher[j] / teacher[j].norm(), student[i] / student[i].norm()
                expected[c] += abs(float(t[c] * s[c])) / (5 * 2) * 4
    torch.testing.assert_close(contributions(student, teacher, neighbours), expected)


@pytest.mark.parametrize("images", [2, 3, 7])
def test_any_batch_size_has_neighbours(images: int) -> None:
    found = nearest(torch.randn(images, 3), 2)
    assert found.shape == (images, min(2, images - 1))
    assert all(i not in found[i].tolist() for i in range(images))


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
    tested = capacity()
    tested.revise(0.05)
    assert tested.reduction == 0.0
    for progress in (0.15, 0.2, 0.3, 0.45):
        tested.revise(progress)
        assert tested.reduction == pytest.approx(tested.due(progress), abs=0.05)
        assert all(int((~site.masked).sum()) % 8 == 0 for site in tested.sites.values())
    tested.revise(0.5)
    assert tested.settled
    assert 0.4 <= tested.reduction <= 0.41


def test_a_mask_is_revised_until_a_row_is_zero_and_kept_from_then_on() -> None:
    tested = capacity()
    compactors = attach(RetrievalNet(SPEC), SPEC.sites).indicators()
    tested.revise(0.3)
    first = {name: site.masked.clone() for name, site in tested.sites.items()}
    chosen = next(name for name, mask in first.items() if mask.any())
    other = next(name for name, mask in first.items() if mask.any() and name != chosen)
    tested.after_step(compactors, tested.before_step(compactors))
    assert not tested.sites[chosen].committed.any()
    row = int(torch.nonzero(first[chosen])[0])
    tested.sites[chosen].left[row] = 1  # its next step is its last
    tested.after_step(compactors, tested.before_step(compactors))
    for name in (chosen, other):  # what was unimportant becomes important
        tested.sites[name].score[first[name]] = 100.0
    tested.revise(0.31)
    assert tested.sites[chosen].masked[first[chosen]].all()
    assert not tested.sites[other].masked[first[other]].all()


def test_a_group_masked_beside_a_dead_one_can_still_be_revised() -> None:
    tested, compactors = capacity(), attach(RetrievalNet(SPEC), SPEC.sites).indicators()
    name = "layer4.0.conv1"
    site = tested.sites[name]
    site.masked[:8] = site.committed[:8] = True
    with torch.no_grad():
        compactors[name].weight[:8] = 0.0
    site.masked[8:16] = True
    site.left[8:16] = 4
    committed = []
    for _ in range(4):
        tested.after_step(compactors, tested.before_step(compactors))
        committed.append(int(tested.sites[name].committed.sum()))
    assert committed == [8, 8, 8, 16]


def test_rows_fade_in_the_same_number_of_steps_whatever_their_norm() -> None:
    tested, compactors = capacity(), attach(RetrievalNet(SPEC), SPEC.sites).indicators()
    with torch.no_grad():
        for compactor in compactors.values():
            compactor.weight *= torch.linspace(0.1, 7.0, len(compactor.weight))[:, None, None, None]
    tested.revise(1.0)
    for step in range(FADE):
        assert all((row_norms(compactors[name].matrix)[site.masked] > 0).all() for name, site in tested.sites.items())
        tested.after_step(compactors, tested.before_step(compactors))
        levels = tested.levels(compactors)
        assert all((levels[name][~site.masked] == 1).all() for name, site in tested.sites.items())
        assert step == FADE - 1 or any((level < 1).any() for level in levels.values())
    for name, site in tested.sites.items():
        assert torch.equal(row_norms(compactors[name].matrix) == 0, site.masked)
        assert torch.equal(site.committed, site.masked)


def test_masked_rows_move_by_the_proximal_step_alone() -> None:
    tested = capacity()
    net = attach(RetrievalNet(SPEC), SPEC.sites)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.0)
    compactors = net.indicators()
    tested.revise(0.4)
    for _ in range(3):
        optimizer.zero_grad()
        net(torch.randn(4, 3, 32, 32)).embedding.square().sum().backward()
        tested.reset(compactors)
        before = tested.before_step(compactors)
        optimizer.step()
        tested.after_step(compactors, before)
    left = 1 - 3 / FADE
    for name, site in tested.sites.items():
        norms = row_norms(compactors[name].matrix.detach())
        torch.testing.assert_close(norms[site.masked], torch.full_like(norms[site.masked], left))
        if not site.masked.all():
            assert (norms[~site.masked] != 1.0).any()


def test_a_capacity_survives_its_state_dict() -> None:
    tested = capacity()
    tested.revise(0.3)
    other = fresh()
    other.load_state_dict(tested.state_dict())
    assert other.state_dict().keys() == tested.state_dict().keys()
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in tested.state_dict().items())
    assert other.reduction == tested.reduction
