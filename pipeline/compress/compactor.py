"""Compactors and channel gates: attaching them, shrinking their rows, and reading which channels are left.

Row c of an indicator's matrix belongs to output channel c; a channel can be removed once its row is zero.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from pipeline.models.resnet import RetrievalNet, convert
from pipeline.models.spec import Block, indicator_name


def row_norms(matrix: Tensor) -> Tensor:
    """Return the L2 norms of the rows, (C, ...) -> (C,)."""
    return torch.linalg.vector_norm(matrix.reshape(len(matrix), -1), dim=1)


def shrink_rows(matrix: Tensor, left: Tensor) -> Tensor:
    """Take a proximal step of the group lasso on rows that must be zero after a given number of steps.

    Block soft thresholding, `W_r <- W_r * max(0, 1 - threshold / ||W_r||)`, subtracts the same amount from the norm in
    every step. With `threshold = ||W_r|| / left` this becomes `W_r * (left - 1) / left`: there is no division by a
    norm, and the last step leaves exact zeros whatever rounding errors came before.

    Source: Parikh and Boyd, "Proximal Algorithms", 2014, section 6.5.4.

    Args:
        matrix: (C, ...), rows to shrink.
        left: (C,) int, remaining steps of each row including this one; 0 for a row of zeros.

    Returns:
        The shrunken rows, same shape.
    """
    return matrix * expand_rows((left - 1).clamp_min(0) / left.clamp_min(1), matrix)


def reset_gradients(indicators: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Zero the gradients of masked rows, so that the losses no longer move them ("gradient resetting").

    Source: Xie et al., "Towards a Smaller Student", CVPR 2023, section 3.3.

    Args:
        indicators: Pairs of a weight (C, ...) after the backward pass and its mask (C,) bool, True for masked rows.
    """
    for weight, masked in indicators:
        if weight.grad is not None:
            on_device = masked.to(weight.grad.device, non_blocking=True)
            weight.grad.masked_fill_(expand_rows(on_device, weight.grad), 0.0)


def expand_rows(values: Tensor, like: Tensor) -> Tensor:
    """Reshape values (C,) so that they broadcast over the rows of `like` (C, ...)."""
    return values.reshape(-1, *(1,) * (like.dim() - 1))


def scale_rows(net: RetrievalNet, factors: Mapping[str, Tensor]) -> RetrievalNet:
    """Return a copy of a network with the rows of its indicators multiplied by factors (C,), by site."""
    state = dict(net.state_dict())
    for site, factor in factors.items():
        name = f"{indicator_name(site)}.weight"
        state[name] = state[name] * expand_rows(factor, state[name])
    return convert(net, net.spec, state)


def attach(net: RetrievalNet, sites: Iterable[str]) -> RetrievalNet:
    """Return the same function with indicators at more sites, initialised to the identity.

    Sites are names such as ``layer1.0.conv2`` (gets a compactor) or ``layer1`` (gets a channel gate); those that have
    one already keep it.
    """
    requested = set(sites) | set(net.spec.indicators)
    ordered = tuple(site for site in net.spec.widths if site in requested)
    return convert(net, net.spec.model_copy(update={"indicators": ordered}))


def last_norm(block: Block) -> str:
    """Return the module name of the batch norm right before the addition of the shortcut."""
    return f"{block.name}.bn{len(block.sites) + 1}"


def removed_sites(net: RetrievalNet, tolerance: float = 0.0) -> set[str]:
    """Return the inner sites of blocks that add nothing: all rows, and scale and shift of the last norm, are zero.

    A row counts as zero if its norm is at most `tolerance`.
    """
    nonzero, state = nonzero_channels(net, tolerance), net.state_dict()
    removed: set[str] = set()
    for block in filter(net.spec.has, net.spec.removable):
        norm = last_norm(block)
        norm_is_zero = not any(state[f"{norm}.{name}"].any() for name in ("weight", "bias"))
        if norm_is_zero and all(site in nonzero and not len(nonzero[site]) for site in block.sites):
            removed |= set(block.sites)
    return removed


def nonzero_channels(net: RetrievalNet, tolerance: float = 0.0) -> dict[str, Tensor]:
    """Return, by site, the channels with a row norm above the tolerance, as ascending int64 indices on the CPU."""
    return {
        site: torch.nonzero(row_norms(indicator.matrix.detach()) > tolerance).flatten().cpu()
        for site, indicator in net.indicators().items()
    }
