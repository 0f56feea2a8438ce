"""A tiny network and a few random images for the tests of the export."""

import numpy as np
import torch

from pipeline.export.metadata import Metadata
from pipeline.models.resnet import RetrievalNet
from pipeline.models.spec import ArchSpec

SIZE = (32, 24)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
METADATA = Metadata(
    data="vehicles",
    data_digest="d" * 64,
    params_digest="p" * 64,
    git_commit="c" * 40,
    licence="as you like",
    protocol="market",
    map=0.625,
    image_size=SIZE,
    mean=MEAN,
    std=STD,
    embedding_dim=16,
    params=1234,
    macs=56789,
)


def tiny_net(seed: int) -> RetrievalNet:
    """Build four bottlenecks with non-trivial batch norms and a classifier of 7 identities, in train mode."""
    generator = torch.Generator().manual_seed(seed)
    net = RetrievalNet(ArchSpec.full(depth=14, width=8, embedding_dim=16, identities=7))
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2.0, generator=generator)
            elif tensor.ndim == 1:
                tensor.normal_(0.2, 0.5, generator=generator)
            elif tensor.ndim > 1:
                tensor.normal_(0.0, (2 / tensor[0].numel()) ** 0.5, generator=generator)
    return net


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """Normalise uint8 images, (B, 3, h, w), by the textbook formula."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return (pixels.float() / 255 - mean) / std


class Pictures:
    """Twelve images of random pixels."""

    pixels = np.random.default_rng(0).integers(0, 256, size=(12, *SIZE, 3), dtype=np.uint8)

    def batch(self, indices: np.ndarray) -> np.ndarray:
        return self.pixels[indices]
