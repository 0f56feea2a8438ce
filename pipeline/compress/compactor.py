"""Putting compactors and gates into a network, shrinking their rows, and asking which are left."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from pipeline.models.resnet import RetrievalNet, convert
from pipeline.models.spec import Block, indicator_of


def row_norms(matrix: Tensor) -> Tensor:
    """L2 norms of rows, (C, ...) -> (C,)."""
    return torch.linalg.vector_norm(matrix.reshape(len(matrix), -1), dim=1)


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
    return matrix * by_row((left - 1).clamp_min(0) / left.clamp_min(1), matrix)


def reset_gradients(rows: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Take the retrieval gradient from masked rows, so that only what compresses moves them.

    Source: Xie et al., "Towards a Smaller Student", CVPR 2023, section 3.3.

    Args:
        rows: Weights (C, ...) of indicators, after the backward pass, and which of their rows are masked, (C,) bool.
    """
    for weight, masked in rows:
        if weight.grad is not None:
            on_device = masked.to(weight.grad.device, non_blocking=True)
            weight.grad.masked_fill_(by_row(on_device, weight.grad), 0.0)


def by_row(values: Tensor, like: Tensor) -> Tensor:
    """Values (C,) in a shape that broadcasts over the rows of `like` (C, ...)."""
    return values.reshape(-1, *(1,) * (like.dim() - 1))


def scale_rows(net: RetrievalNet, factors: Mapping[str, Tensor]) -> RetrievalNet:
    """A copy of a network whose indicators' rows are multiplied by factors (C,), by site."""
    state = dict(net.state_dict())
    for site, factor in factors.items():
        name = f"{indicator_of(site)}.weight"
        state[name] = state[name] * by_row(factor, state[name])
    return convert(net, net.spec, state)


def attach(net: RetrievalNet, sites: Iterable[str]) -> RetrievalNet:
    """The same function, with compactors and gates that start as the identity.

    Args:
        net: Network to take the weights from.
        sites: Dimensions that get one, such as ``layer1.0.conv2`` or ``layer1``; those that have one keep it.
    """
    wanted = set(sites) | set(net.spec.indicators)
    ordered = tuple(site for site in net.spec.widths if site in wanted)
    return convert(net, net.spec.model_copy(update={"indicators": ordered}))


def last_norm(block: Block) -> str:
    """Module name of the batch norm that a block adds to its shortcut's output."""
    return f"{block.name}.bn{len(block.sites) + 1}"


def removed_sites(net: RetrievalNet, tolerance: float = 0.0) -> set[str]:
    """Inner sites of blocks that add nothing any more: every row, and scale and shift of the last norm, are zero.

    Args:
        net: Network with indicators.
        tolerance: Largest row norm that counts as zero.
    """
    living, state = living_channels(net, tolerance), net.state_dict()
    found: set[str] = set()
    for block in filter(net.spec.has, net.spec.removable):
        norm = last_norm(block)
        silent = not any(state[f"{norm}.{name}"].any() for name in ("weight", "bias"))
        if silent and all(site in living and not len(living[site]) for site in block.sites):
            found |= set(block.sites)
    return found


def living_channels(net: RetrievalNet, tolerance: float = 0.0) -> dict[str, Tensor]:
    """Channels that a compactor or gate still lets through.

    Args:
        net: Network with indicators.
        tolerance: Largest row norm that counts as zero.

    Returns:
        By site, indices of the rows whose norm exceeds the tolerance, int64, ascending.
    """
    return {
        site: torch.nonzero(row_norms(indicator.matrix.detach()) > tolerance).flatten().cpu()
        for site, indicator in net.indicators().items()
    }
