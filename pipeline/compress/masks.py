"""Which channels of a site are masked, and how they become zero.

A channel is *present* while it is in the network, *masked* once the budget has chosen it (the retrieval loss no longer
moves it, the proximal step shrinks it), and *committed* when it, or a channel masked beside it, has reached zero. Until
then the choice may be revised; the published method (Xie et al., CVPR 2023, section 3.3) lets masks only grow.

Whatever decides lives on the CPU, so that decisions are plain Python and no step waits for the device. Scores and norms
live on the device; they are read where masks are revised.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from pipeline.compress.compactor import by_row, row_norms, shrink_rows
from pipeline.models.resnet import Indicator


@dataclass
class ChannelMasks:
    """The channels of one site, in the order in which they stand in its compactor or gate.

    Attributes:
        kept: (C,) int64, each channel's index in the uncompressed network; on the device.
        score: (C,) float32, importance; on the device.
        full_norm: (C,) float32, norm of a masked channel's row when it was masked, else 0; on the device.
        masked: (C,) bool, on the CPU.
        committed: (C,) bool, a subset of masked; on the CPU.
        steps_left: (C,) int32, steps until a masked channel is zero, else 0; on the CPU.
    """

    kept: Tensor
    score: Tensor
    full_norm: Tensor
    masked: Tensor
    committed: Tensor
    steps_left: Tensor

    @classmethod
    def start(cls, width: int, device: torch.device) -> "ChannelMasks":
        """Return a site with all of its channels, none of them masked."""
        none, zeros = torch.zeros(width, dtype=torch.bool), torch.zeros(width, device=device)
        return cls(torch.arange(width, device=device), zeros, zeros.clone(), none, none.clone(), none.to(torch.int32))

    def tensors(self) -> dict[str, Tensor]:
        """Return everything by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def select(self, indices: Tensor) -> "ChannelMasks":
        """Return the same for some of the channels."""
        return ChannelMasks(**{name: value[indices.to(value.device)] for name, value in self.tensors().items()})

    def level(self, matrix: Tensor) -> Tensor:
        """Return how far each row has faded.

        Args:
            matrix: (C, n), of the compactor or gate.

        Returns:
            (C,), a share of the norm that the row had when it was masked; 1 for zeros and for rows that do not fade.
        """
        norms = row_norms(matrix.detach())
        return torch.where((norms > 0) & (norms < self.full_norm), norms / self.full_norm, 1.0)

    def revise(self, width: int, fade_steps: int, indicator: Indicator) -> None:
        """Mask the least important channels, committed ones first.

        A channel that is no longer masked gets its norm back at once: there is no time to grow back to it.

        Args:
            width: Channels that stay.
            fade_steps: Steps in which the others become zero.
            indicator: The site's compactor or gate.
        """
        order = torch.argsort(self.score.cpu().masked_fill(self.committed, -torch.inf), stable=True)
        masked = torch.zeros_like(self.masked)
        masked[order[: len(order) - width]] = True
        entering, returning = masked & ~self.masked, self.masked & ~masked
        indicator.weight[returning] /= by_row(self.level(indicator.matrix)[returning], indicator.weight)
        self.full_norm[entering], self.full_norm[returning] = row_norms(indicator.matrix)[entering], 0.0
        self.steps_left[entering], self.steps_left[returning] = fade_steps, 0
        self.masked = masked

    def masked_indices(self) -> Tensor:
        """Return the positions of the masked channels, (M,) int64 on the device; the copy does not wait for it."""
        return torch.nonzero(self.masked).flatten().to(self.score.device, non_blocking=True)

    def shrunk_rows(self, weight: Tensor) -> Tensor:
        """Return what the masked rows (M, ...) of a weight (C, ...) are after the next proximal step."""
        steps_left = self.steps_left[self.masked].to(weight.device, non_blocking=True)
        return shrink_rows(weight[self.masked_indices()], steps_left)

    def count_step(self) -> None:
        """Count one proximal step; where a channel has just reached zero, those masked by now are committed."""
        self.steps_left = (self.steps_left - 1).clamp_min(0)
        if (self.masked & ~self.committed & (self.steps_left == 0)).any():
            self.committed = self.masked.clone()
