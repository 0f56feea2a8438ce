"""Importance of channels: by gradients, by the scale of the batch norm, or at random as a control."""

from collections.abc import Iterable

import torch
from torch import Tensor

from pipeline.models.resnet import Indicator, RetrievalNet


def taylor_scores(indicator: Indicator, level: Tensor) -> Tensor:
    """Estimate, to first order, the squared change of the training loss if a row were zero.

    The gradient is that of the whole loss, retrieval and distillation, before the gradients of masked rows are reset. A
    fading row is scored as if it had its full length, so that it can be unmasked again.

    Source: Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019, equation 8.

    Args:
        indicator: Compactor or channel gate, after the backward pass.
        level: (C,) in (0, 1], remaining fraction of the norm of each row; 1 for rows that do not fade.

    Returns:
        Scores (C,) of one batch.

    Raises:
        ValueError: If there are no gradients.
    """
    if indicator.weight.grad is None:
        raise ValueError("importance needs gradients; call it after the backward pass")
    products = indicator.weight.grad * indicator.weight.detach()
    effect = products.reshape(len(products), -1).sum(dim=1)
    return (effect / level).square()


def magnitude_scores(net: RetrievalNet, sites: Iterable[str]) -> dict[str, Tensor]:
    """Return the absolute scales (C,) of the batch norm before each site; their mean if several layers write to it.

    Source: Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", ICCV 2017.
    """
    state, scores = net.state_dict(), {}
    for site in sites:
        scales = [state[f"{layer.norm}.weight"].abs() for layer in net.spec.layers() if layer.target == site]
        scores[site] = torch.stack(scales).mean(dim=0)
    return scores


def random_scores(width: int, seed: int) -> Tensor:
    """Draw scores (width,) uniformly from [0, 1)."""
    return torch.rand(width, generator=torch.Generator().manual_seed(seed))
