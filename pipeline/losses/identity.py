"""Loss of telling training identities apart."""

import torch
from torch import Tensor
from torch.nn import functional


def cosine_margin(cosines: Tensor, labels: Tensor, scale: float, margin: float) -> Tensor:
    """Cross entropy of scaled cosines, the true identity's lowered by a margin.

    Source: Wang et al., "CosFace", CVPR 2018, equation 4.

    Args:
        cosines: (B, identities), in [-1, 1].
        labels: (B,), true identities.
        scale: Factor on the cosines.
        margin: What the true identity's cosine is lowered by.

    Returns:
        Mean over the batch, a scalar.
    """
    true = functional.one_hot(labels, cosines.shape[1])
    return functional.cross_entropy(scale * (cosines - margin * true), labels)


def smoothed(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Cross entropy with label smoothing (0.1 in Xie et al., CVPR 2023).

    Args:
        logits: (B, identities).
        labels: (B,), true identities.
        smoothing: Probability spread evenly over all identities.

    Returns:
        Mean over the batch, a scalar.
    """
    return functional.cross_entropy(logits.to(torch.float32), labels, label_smoothing=smoothing)
