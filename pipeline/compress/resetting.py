"""Retrieval-guided gradient resetting: who may still be moved by retrieval."""

from collections.abc import Iterable

from torch import Tensor

from pipeline.compress.compactor import by_row


def reset_gradients(rows: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Take the retrieval gradient from masked rows, so that only what compresses moves them.

    Source: Xie et al., "Towards a Smaller Student", CVPR 2023, section 3.3.

    Args:
        rows: Weights (C, ...) of indicators, after the backward pass, and which of their rows are masked, (C,) bool.
    """
    for weight, masked in rows:
        if weight.grad is not None:
            weight.grad.masked_fill_(by_row(masked, weight.grad), 0.0)
