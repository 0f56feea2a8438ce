"""Batch-hard triplet losses, on each anchor's farthest positive and nearest negative in the batch."""

import torch
from torch import Tensor
from torch.nn import functional


def _hardest(distances: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distance (B,) of each anchor's farthest positive, and (B,) of its nearest negative.

    Args:
        distances: (B, B), between all images of the batch.
        labels: (B,) identities. The positive of an anchor with no other image is the anchor, at distance 0.
    """
    same = labels[:, None] == labels[None, :]
    positive = distances.masked_fill(~same, -torch.inf).amax(dim=1)
    negative = distances.masked_fill(same, torch.inf).amin(dim=1)
    return positive, negative


def hard(embedding: Tensor, labels: Tensor, margin: float) -> Tensor:
    """Compute the batch-hard triplet loss on Euclidean distances.

    Source: Hermans et al., "In Defense of the Triplet Loss for Person Re-Identification", 2017, equation 5.

    Args:
        embedding: (B, D).
        labels: (B,) identities, at least two different ones.
        margin: By how much the nearest negative should be farther than the farthest positive.

    Returns:
        Scalar, the mean over the anchors.
    """
    embedding = embedding.to(torch.float32)
    squared = embedding.square().sum(dim=1)
    # clamped: the square root has an infinite gradient at 0
    distances = (squared[:, None] + squared[None, :] - 2 * embedding @ embedding.T).clamp_min(1e-12).sqrt()
    positive, negative = _hardest(distances, labels)
    return functional.relu(positive - negative + margin).mean()


def soft(embedding: Tensor, labels: Tensor, scale: float) -> Tensor:
    """Compute the batch-hard triplet loss with a soft margin, on cosine distances.

    Source: Hermans et al., 2017, section 3.2 (soft margin), here `4 / scale * softplus(scale * (positive - negative))`:
    the slope for a hard triplet is 4 whatever the scale.

    Args:
        embedding: (B, D), not necessarily normalised.
        labels: (B,) identities, at least two different ones.
        scale: Sharpness of the softplus.

    Returns:
        Scalar, the mean over the anchors.
    """
    unit = functional.normalize(embedding.to(torch.float32))
    positive, negative = _hardest(1 - unit @ unit.T, labels)
    return functional.softplus(scale * (positive - negative)).mean() * (4 / scale)
