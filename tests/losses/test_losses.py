"""Losses against slow, literal loops."""

import math

import pytest
import torch

from pipeline.losses import distill, identity, triplet

DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def batch(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(8, 5, generator=generator).to(dtype), torch.tensor([0, 0, 1, 1, 2, 2, 2, 3])


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return math.sqrt(max(sum((x - y) ** 2 for x, y in zip(a.tolist(), b.tolist(), strict=True)), 1e-12))


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    dot = sum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True))
    return dot / math.sqrt(sum(x * x for x in a.tolist())) / math.sqrt(sum(y * y for y in b.tolist()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_hard_triplet_loss_takes_the_farthest_positive_and_the_nearest_negative(dtype: torch.dtype) -> None:
    embedding, labels = batch(dtype)
    total = 0.0
    for i in range(8):
        positive = max(distance(embedding[i], embedding[j]) for j in range(8) if labels[j] == labels[i])
        negative = min(distance(embedding[i], embedding[j]) for j in range(8) if labels[j] != labels[i])
        total += max(0.0, positive - negative + 0.35)
    assert float(triplet.hard(embedding, labels, 0.35)) == pytest.approx(total / 8, rel=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_soft_triplet_loss_compares_cosine_distances(dtype: torch.dtype) -> None:
    embedding, labels = batch(dtype)
    total = 0.0
    for i in range(8):
        positive = max(1 - cosine(embedding[i], embedding[j]) for j in range(8) if labels[j] == labels[i])
        negative = min(1 - cosine(embedding[i], embedding[j]) for j in range(8) if labels[j] != labels[i])
        total += 4 / 16 * math.log1p(math.exp(16 * (positive - negative)))
    assert float(triplet.soft(embedding, labels, 16.0)) == pytest.approx(total / 8, rel=1e-4)


def test_identical_embeddings_have_a_finite_gradient() -> None:
    embedding = torch.ones(4, 3, requires_grad=True)
    triplet.hard(embedding, torch.tensor([0, 0, 1, 1]), 0.35).backward()
    assert torch.isfinite(embedding.grad).all()


def test_the_cosine_margin_is_subtracted_from_the_true_identity_only() -> None:
    cosines, labels = torch.tensor([[0.5, 0.1, -0.2], [0.3, 0.9, 0.0]]), torch.tensor([0, 1])
    total = 0.0
    for row, label in zip(cosines.tolist(), labels.tolist(), strict=True):
        logits = [16 * (c - (0.2 if k == label else 0.0)) for k, c in enumerate(row)]
        total += math.log(sum(math.exp(x) for x in logits)) - logits[label]
    assert float(identity.cosine_margin(cosines, labels, 16.0, 0.2)) == pytest.approx(total / 2, rel=1e-5)


def test_label_smoothing_spreads_probability_over_all_identities() -> None:
    logits, labels = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([0])
    log_sum = math.log(math.exp(2) + 1 + math.exp(-1))
    expected = sum(w * (log_sum - x) for w, x in zip([0.9 + 0.1 / 3, 0.1 / 3, 0.1 / 3], [2.0, 0.0, -1.0], strict=True))
    assert float(identity.smoothed(logits, labels, 0.1)) == pytest.approx(expected, rel=1e-5)


def test_soft_targets_are_the_kl_divergence_times_the_squared_temperature() -> None:
    student, teacher = torch.tensor([[1.0, -1.0]]), torch.tensor([[0.0, 2.0]])
    p = [math.exp(x / 2) / (math.exp(0) + math.exp(1)) for x in (0.0, 2.0)]
    q = [math.exp(x / 2) / (math.exp(0.5) + math.exp(-0.5)) for x in (1.0, -1.0)]
    expected = 4 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert float(distill.soft_targets(student, teacher, 2.0)) == pytest.approx(expected, rel=1e-5)
    assert float(distill.soft_targets(teacher, teacher, 2.0)) == pytest.approx(0, abs=1e-6)


def test_features_are_compared_by_their_l2_distance() -> None:
    student, teacher = torch.zeros(2, 2), torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    assert float(distill.features(student, teacher)) == pytest.approx((5 + 2) / 2)
    second = torch.tensor([False, True])
    assert float(distill.features(student, teacher, second)) == pytest.approx((4 + 2) / 2)


def test_embeddings_are_compared_by_their_cosine() -> None:
    student = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    teacher = torch.tensor([[0.0, 5.0], [0.0, 0.1]])
    assert float(distill.embeddings(student, teacher)) == pytest.approx(((1 - 0.8) + 0) / 2, abs=1e-6)
    assert bool(torch.isfinite(distill.embeddings(torch.zeros(1, 2), teacher[:1])))
