"""Putting compactors into a network, shrinking their rows, and asking which are left."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from pipeline.models.resnet import RetrievalNet, convert
from pipeline.models.spec import compactor_of


def row_norms(matrix: Tensor) -> Tensor:
    """L2 norms of rows, (C, ...) -> (C,)."""
    return torch.linalg.vector_norm(matrix.flatten(start_dim=1), dim=1)


def shrink_rows(matrix: Tensor, left: Tensor) -> Tensor:
    """Proximal step of the group lasso on rows that must be zero after a given number of steps.

    Block soft thresholding, `W_r <- W_r * max(0, 1 - threshold / ||W_r||)`, takes the same from a row's norm in every
    step. With `threshold = ||W_r|| / left` that is `W_r * (left - 1) / left`, which needs no norm: nothing divides by
    zero, and the last step leaves exactly zero whatever rounding did before.

    Source: Parikh and Boyd, "Proximal Algorithms", 2014, section 6.5.4.

    Args:
        matrix: (C, ...), rows to shrink.
        left: (C,) int, steps each row has left, this one counted; 0 for a row of zeros.

    Returns:
        The shrunken rows, same shape.
    """
    return scaled(matrix, (left - 1).clamp_min(0) / left.clamp_min(1))


def scaled(matrix: Tensor, factors: Tensor) -> Tensor:
    """Rows (C, ...) times factors (C,)."""
    return matrix * factors.to(matrix).reshape(-1, *(1,) * (matrix.dim() - 1))


def scale_rows(net: RetrievalNet, factors: Mapping[str, Tensor]) -> RetrievalNet:
    """A copy of a network whose compactor rows are multiplied by factors (C,), by site."""
    state = dict(net.state_dict())
    for site, factor in factors.items():
        name = f"{compactor_of(site)}.weight"
        state[name] = scaled(state[name], factor)
    return convert(net, net.spec, state)


def attach(net: RetrievalNet, sites: Iterable[str]) -> RetrievalNet:
    """The same function, with compactors that start as the identity.

    Args:
        net: Network to take the weights from.
        sites: Dimensions that get a compactor, such as ``layer1.0.conv2``; those that have one keep it.
    """
    wanted = set(sites) | set(net.spec.compactors)
    ordered = tuple(site for site in net.spec.sites if site in wanted)
    return convert(net, net.spec.model_copy(update={"compactors": ordered}))


def alive(net: RetrievalNet, tolerance: float = 0.0) -> dict[str, Tensor]:
    """Channels that a compactor still lets through.

    Args:
        net: Network with compactors.
        tolerance: Largest row norm that counts as zero.

    Returns:
        By site, indices of the rows whose norm exceeds the tolerance, int64, ascending.
    """
    return {
        site: torch.nonzero(row_norms(compactor.matrix.detach()) > tolerance).flatten().cpu()
        for site, compactor in net.compactors().items()
    }
