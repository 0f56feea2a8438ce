"""The published method against a slow, literal implementation."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.compress.compactor import attach, row_norms
from pipeline.compress.paper import PaperMethod, PaperSite, lasso_gradient, unimportant_channels
from pipeline.compress.surgery import plan_cut
from pipeline.config import Student
from pipeline.models.cost import macs_model
from pipeline.models.resnet import RetrievalNet
from pipeline.models.spec import ArchSpec
from pipeline.stage.presets import load_preset
from tests.imports import ROOT

SPEC = ArchSpec.full(14, 8, 16)
MACS = macs_model(SPEC, (32, 32))


def unit(vector: list[float]) -> list[float]:
    length = math.sqrt(sum(x * x for x in vector))
    return [x / length for x in vector]


def literal_mask(
    student: list[list[float]], teacher: list[list[float]], memory: list[list[float]], k: int, ratio: float
) -> set[int]:
    """Channels in the lowest `ratio` of the contributions for every image and every one of its k neighbours."""
    channels = len(student[0])
    lowest = int(ratio * channels)
    unimportant = set(range(channels))
    if not memory or not lowest:
        return set()
    for image in range(len(student)):
        s, t = unit(student[image]), unit(teacher[image])
        by_cosine = sorted(memory, key=lambda row: -sum(a * b for a, b in zip(t, row, strict=True)))
        for neighbour in by_cosine[:k]:
            contribution = [abs(neighbour[c] * s[c]) for c in range(channels)]
            unimportant &= set(sorted(range(channels), key=lambda c: contribution[c])[:lowest])
    return unimportant


def batches(seed: int, images: int, channels: int, number: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(-1, 1, channels, dtype=torch.float64)[torch.randperm(channels, generator=generator)]

    def features() -> Tensor:
        return scales * torch.randn(images, channels, generator=generator, dtype=torch.float64)

    return [(features(), features()) for _ in range(number)]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    images=st.integers(1, 9),
    channels=st.integers(1, 24),
    k=st.integers(1, 4),
    ratio=st.floats(0.05, 0.95),
    limit=st.integers(1, 30),
)
def test_masks_equal_those_of_a_literal_implementation(
    seed: int, images: int, channels: int, k: int, ratio: float, limit: int
) -> None:
    empty = torch.zeros(limit, channels, dtype=torch.float64)
    site = PaperSite(torch.zeros(channels, dtype=torch.bool), empty)
    memory: list[list[float]] = []
    mask: set[int] = set()
    for student, teacher in batches(seed, images, channels, 6):
        site.masked |= unimportant_channels(student, teacher, site.filled, k, ratio)
        site.store(torch.nn.functional.normalize(teacher))
        mask |= literal_mask(student.tolist(), teacher.tolist(), memory, k, ratio)
        memory = (memory + [unit(row) for row in teacher.tolist()])[-limit:]
        assert set(torch.nonzero(site.masked).flatten().tolist()) == mask
    assert len(site.filled) == len(memory)


def test_channels_that_tie_are_treated_the_same() -> None:
    student, teacher = torch.ones(2, 4), torch.ones(2, 4)
    assert unimportant_channels(student, teacher, teacher / 2, 2, 0.5).all()
    student[:, 0] = 3.0
    assert unimportant_channels(student, teacher, teacher / 2, 2, 0.5).tolist() == [False, True, True, True]


def test_the_lasso_gradient_has_length_1_for_every_row_and_0_for_zero_rows() -> None:
    matrix = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 1e-20]], dtype=torch.float64)
    expected = torch.tensor([[0.6, 0.8], [0.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(lasso_gradient(matrix), expected)
    free = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    row_norms(free).sum().backward()
    torch.testing.assert_close(lasso_gradient(free.detach()), free.grad)


def section(**paper: object) -> Student:
    student = load_preset(ROOT, "vehicles").student.model_dump()
    student |= {"method": "paper", "sites": ["conv2"]}
    student["paper"] |= paper
    return Student.model_validate(student)


def test_masked_rows_get_the_gradient_of_the_lasso_only_and_other_rows_both() -> None:
    method = PaperMethod(SPEC, section(start=0.0, lasso=0.25), MACS, 10, torch.device("cpu"))
    net = attach(RetrievalNet(SPEC), method.sites)
    assert all(site.endswith("conv2") for site in net.spec.indicators)
    net(torch.randn(4, 3, 32, 32)).embedding.sum().backward()
    site = "layer2.0.conv2"
    weight = net.indicators()[site].weight
    retrieval = weight.grad.clone()
    method.sites[site].masked[3:7] = True
    method.step(net, lambda: None, 0.0)
    lasso = 0.25 * lasso_gradient(weight.detach())
    torch.testing.assert_close(weight.grad[3:7], lasso[3:7])
    torch.testing.assert_close(weight.grad[:3], (retrieval + lasso)[:3])
    assert retrieval[3:7].any()


def test_before_the_start_the_lasso_acts_and_nothing_is_masked() -> None:
    method = PaperMethod(SPEC, section(start=0.5, lasso=0.25), MACS, 10, torch.device("cpu"))
    net = attach(RetrievalNet(SPEC), method.sites)
    features = {name: torch.randn(4, len(site.masked)) for name, site in method.sites.items()}
    for step in range(5):
        method.observe(features, features)
        net(torch.randn(4, 3, 32, 32)).embedding.sum().backward()
        before = {name: indicator.weight.grad.clone() for name, indicator in net.indicators().items()}
        method.step(net, lambda: None, step / 10)
        for name, indicator in net.indicators().items():
            added = indicator.weight.grad - before[name]
            torch.testing.assert_close(row_norms(added), torch.full((len(added),), 0.25))  # rows have norm 1
    assert not any(site.masked.any() for site in method.sites.values())
    method.observe(features, features)
    assert any(site.masked.any() for site in method.sites.values())


@pytest.mark.parametrize(("norms", "width"), [([1.0] * 9 + [1e-7] * 7, 16), ([1.0] * 3 + [1e-7] * 13, 8)])
def test_at_the_end_small_rows_are_zero_and_widths_are_multiples(norms: list[float], width: int) -> None:
    method = PaperMethod(SPEC, section(), MACS, 10, torch.device("cpu"))
    net = attach(RetrievalNet(SPEC), method.sites)
    site = "layer2.0.conv2"
    with torch.no_grad():
        net.indicators()[site].weight *= torch.tensor(norms)[:, None, None, None]
    assert method.remaining_widths(net)[site] == width
    method.step(net, lambda: None, 0.9)
    nonzero = row_norms(net.indicators()[site].matrix.detach()) > 0
    assert int(nonzero.sum()) == width
    assert nonzero[: min(width, norms.count(1.0))].all()
    assert method.remaining_widths(net)[site] == norms.count(1.0) // 8 * 8 + 8
    net = net.eval()
    assert len(plan_cut(net, 1e-6, 8, SPEC).kept[site]) == width


def test_the_method_is_restored_from_its_state_dict() -> None:
    method = PaperMethod(SPEC, section(start=0.0, memory=10), MACS, 10, torch.device("cpu"))
    for _ in range(4):
        features = {name: torch.randn(4, len(site.masked)) for name, site in method.sites.items()}
        method.observe(features, features)
        method.progress += 0.1
    restored = PaperMethod(SPEC, section(start=0.0, memory=10), MACS, 10, torch.device("cpu"))
    restored.load_state_dict(method.state_dict())
    assert all(torch.equal(value, restored.state_dict()[name]) for name, value in method.state_dict().items())
    assert torch.equal(restored.sites["layer1.0.conv2"].memory, method.sites["layer1.0.conv2"].memory)
    assert restored.sites["layer1.0.conv2"].seen == method.sites["layer1.0.conv2"].seen == 16
