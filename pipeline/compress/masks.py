"""The masks of a site: which channels are masked, and how masked channels fade to zero.

A channel is *present* while it is in the network; *masked* once it is selected for removal (its gradient is reset, and
the proximal step shrinks it); *committed* once it, or another uncommitted masked channel of its site, reaches zero.
Until then the selection may be revised; in the published method (Xie et al., CVPR 2023, section 3.3) masks only grow.

Masks and counters stay on the CPU, so no training step waits for the device. Scores and norms stay on the device and
are read only when masks are revised.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from pipeline.compress.compactor import expand_rows, row_norms, shrink_rows
from pipeline.models.resnet import Indicator


@dataclass
class ChannelMasks:
    """The present channels of one site, in the order of the rows of its indicator.

    Attributes:
        kept: (C,) int64, index of each channel in the uncompressed network; on the device.
        score: (C,) float32, importance; on the device.
        full_norm: (C,) float32, norm of the row when the channel was masked, 0 for unmasked channels; on the device.
        masked: (C,) bool; on the CPU.
        committed: (C,) bool, a subset of `masked`; on the CPU.
        steps_left: (C,) int32, steps until a masked channel is zero, 0 for unmasked channels; on the CPU.
    """

    kept: Tensor
    score: Tensor
    full_norm: Tensor
    masked: Tensor
    committed: Tensor
    steps_left: Tensor

    @classmethod
    def start(cls, width: int, device: torch.device) -> "ChannelMasks":
        """Return the masks of a site with all channels, none of them masked."""
        none, zeros = torch.zeros(width, dtype=torch.bool), torch.zeros(width, device=device)
        return cls(torch.arange(width, device=device), zeros, zeros.clone(), none, none.clone(), none.to(torch.int32))

    def tensors(self) -> dict[str, Tensor]:
        """Return all fields by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def select(self, indices: Tensor) -> "ChannelMasks":
        """Return the masks of a subset of the channels."""
        return ChannelMasks(**{name: value[indices.to(value.device)] for name, value in self.tensors().items()})

    def level(self, matrix: Tensor) -> Tensor:
        """Return the remaining fraction (C,) of the norm that each row (C, n) had when it was masked.

        It is 1 for rows that do not fade, and for rows of zeros.
        """
        norms = row_norms(matrix.detach())
        return torch.where((norms > 0) & (norms < self.full_norm), norms / self.full_norm, 1.0)

    def revise(self, width: int, fade_steps: int, indicator: Indicator) -> None:
        """Mask the least important channels, committed ones first.

        A channel that is unmasked gets its norm back at once, because there is no time to learn it again.

        Args:
            width: Channels that stay unmasked.
            fade_steps: Steps until the masked channels are zero.
            indicator: Compactor or channel gate of the site, changed in place.
        """
        order = torch.argsort(self.score.cpu().masked_fill(self.committed, -torch.inf), stable=True)
        masked = torch.zeros_like(self.masked)
        masked[order[: len(order) - width]] = True
        entering, returning = masked & ~self.masked, self.masked & ~masked
        indicator.weight[returning] /= expand_rows(self.level(indicator.matrix)[returning], indicator.weight)
        self.full_norm[entering], self.full_norm[returning] = row_norms(indicator.matrix)[entering], 0.0
        self.steps_left[entering], self.steps_left[returning] = fade_steps, 0
        self.masked = masked

    def masked_indices(self) -> Tensor:
        """Return the indices of the masked channels, (M,) int64, by a copy to the device that does not wait for it."""
        return torch.nonzero(self.masked).flatten().to(self.score.device, non_blocking=True)

    def shrunk_rows(self, weight: Tensor) -> Tensor:
        """Return the masked rows (M, ...) of a weight (C, ...) after the next proximal step."""
        steps_left = self.steps_left[self.masked].to(weight.device, non_blocking=True)
        return shrink_rows(weight[self.masked_indices()], steps_left)

    def count_step(self) -> None:
        """Count one proximal step; if an uncommitted channel has reached zero, commit all masked channels."""
        self.steps_left = (self.steps_left - 1).clamp_min(0)
        if (self.masked & ~self.committed & (self.steps_left == 0)).any():
            self.committed = self.masked.clone()
