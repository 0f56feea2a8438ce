"""Batch-hard triplet losses: each anchor against its farthest positive and its nearest negative."""

import torch
from torch import Tensor
from torch.nn import functional


def _hardest(distances: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Distance of each anchor's farthest positive and nearest negative, both (B,).

    An anchor without another image of its identity is its own positive at distance 0.
    """
    same = labels[:, None] == labels[None, :]
    positive = distances.masked_fill(~same, -torch.inf).amax(dim=1)
    negative = distances.masked_fill(same, torch.inf).amin(dim=1)
    return positive, negative


def hard(embedding: Tensor, labels: Tensor, margin: float) -> Tensor:
    """Batch-hard triplet loss on Euclidean distances.

    Source: Hermans et al., "In Defense of the Triplet Loss", 2017, equation 5.

    Args:
        embedding: (B, D).
        labels: (B,), identities; at least two different ones.
        margin: Distance by which negatives shall be farther than positives.

    Returns:
        Mean over the anchors, a scalar.
    """
    embedding = embedding.to(torch.float32)
    squared = embedding.square().sum(dim=1)
    # clamped away from 0, where the square root has no gradient
    distances = (squared[:, None] + squared[None, :] - 2 * embedding @ embedding.T).clamp_min(1e-12).sqrt()
    positive, negative = _hardest(distances, labels)
    return functional.relu(positive - negative + margin).mean()


def soft(embedding: Tensor, labels: Tensor, scale: float) -> Tensor:
    """Batch-hard triplet loss with a soft margin, on cosine distances.

    Source: Hermans et al., 2017, section 3.2 (soft margin), here `4 / scale * softplus(scale * (positive - negative))`:
    the slope for a hard triplet is 4 whatever the scale.

    Args:
        embedding: (B, D), of any length.
        labels: (B,), identities; at least two different ones.
        scale: Sharpness.

    Returns:
        Mean over the anchors, a scalar.
    """
    unit = functional.normalize(embedding.to(torch.float32))
    positive, negative = _hardest(1 - unit @ unit.T, labels)
    return functional.softplus(scale * (positive - negative)).mean() * (4 / scale)
