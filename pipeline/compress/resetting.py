"""Retrieval-guided gradient resetting: which channels does retrieval need, and who may still move them.

Source: Xie et al., "Towards a Smaller Student", CVPR 2023, section 3.3, restated for any batch size.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.compress.compactor import by_row
from pipeline.models.resnet import Indicator


def nearest(embedding: Tensor, neighbours: int) -> Tensor:
    """The nearest other images of a batch by cosine.

    Args:
        embedding: (B, D), the teacher's; B at least 2.
        neighbours: k; fewer where the batch is smaller.

    Returns:
        Indices (B, min(k, B - 1)).
    """
    unit = functional.normalize(embedding.to(torch.float32))
    similarity = (unit @ unit.T).fill_diagonal_(-torch.inf)
    return similarity.topk(min(neighbours, len(unit) - 1), dim=1).indices


def contributions(student: Tensor, teacher: Tensor, neighbours: Tensor) -> Tensor:
    """How much each channel adds to the match of an image with its teacher's neighbours.

    The contribution of channel c to the match of image i with neighbour n is |t[n, c] * s[i, c]|, both features
    L2-normalised over the channels (method `paper` thresholds it, ours averages it). Times the number of channels, so
    that sites of different widths compare.

    Args:
        student: (B, C), pooled student features of a site.
        teacher: (B, C), pooled teacher features of the same channels.
        neighbours: (B, k), from `nearest`.

    Returns:
        Mean over images and neighbours, (C,).
    """
    student = functional.normalize(student.to(torch.float32))
    teacher = functional.normalize(teacher.to(torch.float32))
    matches = teacher[neighbours].abs().mean(dim=1)  # (B, k, C) -> (B, C)
    return (matches * student.abs()).mean(dim=0) * student.shape[1]


def reset_gradients(indicators: Mapping[str, Indicator], masked: Mapping[str, Tensor]) -> None:
    """Take the retrieval gradient from masked rows, so that only the proximal step moves them.

    Args:
        indicators: By site, after the backward pass.
        masked: By site, (C,) bool.
    """
    for site, indicator in indicators.items():
        gradient = indicator.weight.grad
        if gradient is not None:
            gradient.masked_fill_(by_row(masked[site], gradient), 0.0)
