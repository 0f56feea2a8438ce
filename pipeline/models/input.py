"""The images that a network from elsewhere expects, computed from those that every network here gets."""

import torch
from torch import Tensor, nn

from pipeline.models.spec import Input


class InputAdapter(nn.Module):
    """Turns images normalised in this project's way into those of a spec.

    It is a part of the network, so its exported file takes the same images as any other.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, expected: Input) -> None:
        super().__init__()
        self.bgr = expected.bgr
        for name, values in (("scale", expected.scale), ("shift", expected.shift)):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Convert normalised images, (B, 3, H, W) -> same."""
        converted = images * self.scale + self.shift
        return converted.flip(1) if self.bgr else converted
