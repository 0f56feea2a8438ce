"""Random changes to training images, and the normalisation that every image gets.

What happens to an image depends on (seed, epoch, row) alone, so it is the same for any number of workers, devices and
restarts. Images stay uint8 until they are on the device.
"""

import numpy as np
import torch
from torch import Tensor

from pipeline.config import Augment
from pipeline.data.images import Pixels

MEAN = (0.485, 0.456, 0.406)
"""Mean of ImageNet's colours, as shares (RGB)."""
STD = (0.229, 0.224, 0.225)
"""Standard deviation of ImageNet's colours, as shares (RGB)."""
ERASED_AREA = (0.02, 0.2)
"""Range of the erased share of an image; Zhong et al. erase up to 0.4, too much of what few pixels show."""
ERASED_ASPECT = (0.3, 1 / 0.3)
"""Range of height / width of what is erased (Zhong et al.)."""

_FILL = torch.tensor([round(255 * mean) for mean in MEAN], dtype=torch.uint8)[:, None, None]  # 0 after normalisation


def as_tensor(pixels: Pixels) -> Tensor:
    """Images (n, h, w, 3) as the network has them, (n, 3, h, w) uint8; shares memory."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def normalise(images: Tensor) -> Tensor:
    """Give images ImageNet's mean and deviation.

    Args:
        images: (B, 3, H, W) uint8, on any device.

    Returns:
        (B, 3, H, W) float32, in the same memory format.
    """
    mean = images.new_tensor([255 * mean for mean in MEAN], dtype=torch.float32)[:, None, None]
    std = images.new_tensor([255 * std for std in STD], dtype=torch.float32)[:, None, None]
    return (images.float() - mean) / std


def augment(image: Tensor, augment: Augment, seed: int, epoch: int, row: int) -> Tensor:
    """Flip, shift and erase a part, at random.

    Source of erasing: Zhong et al., Random Erasing Data Augmentation, AAAI 2020; here with the mean colour.

    Args:
        image: (3, H, W) uint8.
        augment: Section of params.yaml.
        seed: Of the run.
        epoch: From 0.
        row: Of the manifest.

    Returns:
        (3, H, W) uint8, a copy.
    """
    # Philox counts from its counter's first word on, so that streams of other epochs and rows never meet this one's.
    draws = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, epoch, row])).random(8).tolist()
    flips, down, right, erases, area, aspect, top, left = draws
    _, height, width = image.shape
    if flips < augment.flip:
        image = image.flip(2)

    # Padding and a random crop are a shift; what comes in from outside has the mean colour.
    down, right = (int(draw * (2 * augment.pad + 1)) - augment.pad for draw in (down, right))
    changed = _FILL.repeat(1, height, width)
    into = np.s_[:, max(down, 0) : max(height + down, 0), max(right, 0) : max(width + right, 0)]
    out_of = np.s_[:, max(-down, 0) : max(height - down, 0), max(-right, 0) : max(width - right, 0)]
    changed[into] = image[out_of]

    if erases < augment.erase:
        pixels = _between(ERASED_AREA, area) * height * width
        ratio = _between(ERASED_ASPECT, aspect)
        high, wide = min(round((pixels * ratio) ** 0.5), height), min(round((pixels / ratio) ** 0.5), width)
        y, x = int(top * (height - high + 1)), int(left * (width - wide + 1))
        changed[:, y : y + high, x : x + wide] = _FILL
    return changed


def _between(ends: tuple[float, float], share: float) -> float:
    return ends[0] + share * (ends[1] - ends[0])
