"""What a channel is worth: by gradients, by its batch norm's scale, or by chance as a control."""

from collections.abc import Iterable

import torch
from torch import Tensor

from pipeline.models.resnet import Indicator, RetrievalNet


def taylor_scores(indicator: Indicator, level: Tensor) -> Tensor:
    """First-order estimate of what the training loss would change, squared, if a row were zero.

    The gradient is that of the whole loss, retrieval and distillation, after the backward pass and before masked rows
    lose it. A row that is fading is scored as if it still had its full length, so that it can come back.

    Source: Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019, equation 8.

    Args:
        indicator: Compactor or gate, with gradients.
        level: (C,), how far each row has faded: 1 for one that has not.

    Returns:
        (C,), from one batch.
    """
    if indicator.weight.grad is None:
        raise ValueError("importance is read after the backward pass")
    products = indicator.weight.grad * indicator.weight.detach()
    effect = products.reshape(len(products), -1).sum(dim=1)
    return (effect / level).square()


def magnitude_scores(net: RetrievalNet, sites: Iterable[str]) -> dict[str, Tensor]:
    """Scales of the batch norms in front of each site, (C,); their mean where several layers write to it.

    Source: Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", ICCV 2017.
    """
    state, found = net.state_dict(), {}
    for site in sites:
        scales = [state[f"{layer.norm}.weight"].abs() for layer in net.spec.layers() if layer.target == site]
        found[site] = torch.stack(scales).mean(dim=0)
    return found


def random_scores(width: int, seed: int) -> Tensor:
    """Random numbers, (width,)."""
    return torch.rand(width, generator=torch.Generator().manual_seed(seed))
