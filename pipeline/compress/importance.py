"""Importance of channels: by their effect on embeddings or loss, by their batch norm, or at random as a control."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.models.resnet import Indicator, RetrievalNet


def embedding_scores(
    indicators: Mapping[str, Indicator], embedding: Tensor, generator: torch.Generator
) -> dict[str, Tensor]:
    """Estimate, to first order, the mean squared change of normalised embeddings if a row were zero.

    With random signs v, independent for each image and dimension, the squared derivative of the sum of v * embedding is
    an unbiased estimate of the sum of all squared derivatives (Hutchinson, 1989), from one backward pass. The signs are
    centred over the batch, since a change that is the same for all images does not change which are similar.

    Unlike the gradient of a loss, the derivative does not vanish at a network that already agrees with its teacher, and
    it means the same at a compactor and at a channel gate.

    Args:
        indicators: Compactors and channel gates by site.
        embedding: (B, D), with its graph, which is kept.
        generator: On the CPU.

    Returns:
        Scores (C,) of one batch by site, for rows as long as they are.
    """
    unit = functional.normalize(embedding.to(torch.float32), dim=1)
    signs = 2.0 * torch.randint(0, 2, unit.shape, generator=generator) - 1
    signs = (signs - signs.mean(dim=0)).to(unit.device)
    weights = [indicator.weight for indicator in indicators.values()]
    gradients = torch.autograd.grad((signs * unit).sum(), weights, retain_graph=True)
    effects = (_effect(gradient, weight) for gradient, weight in zip(gradients, weights, strict=True))
    return {site: effect.square() / len(unit) for site, effect in zip(indicators, effects, strict=True)}


def _effect(gradient: Tensor, weight: Tensor) -> Tensor:
    """Return the change to first order (C,) if each row of a weight (C, ...) were zero, with the opposite sign."""
    products = gradient * weight.detach()
    return products.reshape(len(products), -1).sum(dim=1)


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
    return (_effect(indicator.weight.grad, indicator.weight) / level).square()


def magnitude_scores(net: RetrievalNet, sites: Iterable[str]) -> dict[str, Tensor]:
    """Return the absolute scales (C,) of the batch norm before each site; their mean if several layers write to it.

    Source: Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", ICCV 2017.
    """
    state, scores = net.state_dict(), {}
    for site in sites:
        layers = (layer for layer in net.spec.layers() if layer.target == site)
        scales = [torch.cat([state[f"{norm}.weight"] for norm in net.spec.norm_parts(layer)]).abs() for layer in layers]
        scores[site] = torch.stack(scales).mean(dim=0)
    return scores


def random_scores(width: int, seed: int) -> Tensor:
    """Draw scores (width,) uniformly from [0, 1)."""
    return torch.rand(width, generator=torch.Generator().manual_seed(seed))
