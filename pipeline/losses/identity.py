"""Classification losses over the training identities."""

import torch
from torch import Tensor
from torch.nn import functional


def cosine_margin(cosines: Tensor, labels: Tensor, scale: float, margin: float) -> Tensor:
    """Compute the cross entropy of scaled cosines, after subtracting a margin from that of the true identity.

    Source: Wang et al., "CosFace", CVPR 2018, equation 4.

    Args:
        cosines: (B, identities), in [-1, 1].
        labels: (B,) class numbers of the true identities.

    Returns:
        Scalar, the mean over the batch.
    """
    true = functional.one_hot(labels, cosines.shape[1])
    return functional.cross_entropy(scale * (cosines - margin * true), labels)


def smoothed(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Compute the cross entropy with label smoothing (0.1 in Xie et al., CVPR 2023).

    Args:
        logits: (B, identities).
        labels: (B,) class numbers of the true identities.
        smoothing: Probability that is spread evenly over all identities, in [0, 1).

    Returns:
        Scalar, the mean over the batch.
    """
    return functional.cross_entropy(logits.to(torch.float32), labels, label_smoothing=smoothing)
