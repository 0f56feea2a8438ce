"""Random changes to training images, and the normalisation that every image gets.

What happens to an image depends on (seed, epoch, row) alone, so it is the same for any number of workers, devices and
restarts. Images stay uint8 until they are on the device.
"""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from pipeline.config import Augment
from pipeline.data.images import Pixels

MEAN = (0.485, 0.456, 0.406)
"""Mean of ImageNet's colours, as shares (RGB)."""
STD = (0.229, 0.224, 0.225)
"""Standard deviation of ImageNet's colours, as shares (RGB)."""
ERASED_AREA = 0.02
"""Least share of an image that is erased (Zhong et al.)."""
ERASED_ASPECT = (0.3, 1 / 0.3)
"""Range of height / width of what is erased (Zhong et al.)."""

_FILL = [round(255 * mean) for mean in MEAN]  # 0 after normalisation


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


def augment(images: Tensor, augment: Augment, seed: int, samples: Iterable[tuple[int, int]]) -> Tensor:
    """Flip, shift and erase a part, at random.

    Source of erasing: Zhong et al., Random Erasing Data Augmentation, AAAI 2020; here with the mean colour.

    Args:
        images: (n, 3, H, W) uint8.
        augment: Section of params.yaml.
        seed: Of the run.
        samples: Epoch, from 0, and row of the manifest of each image.

    Returns:
        (n, 3, H, W) uint8, a copy.
    """
    size = (images.shape[2], images.shape[3])
    framed = functional.pad(images, [augment.pad], fill=_FILL) if augment.pad else images
    changed = torch.empty(images.shape, dtype=torch.uint8)
    transforms = _transforms(augment, size)
    for place, (epoch, row) in enumerate(samples):
        with _drawn_from(f"{seed}/{epoch}/{row}"):
            changed[place] = transforms(framed[place])
    return changed


@lru_cache(maxsize=8)
def _transforms(augment: Augment, size: tuple[int, int]) -> v2.Compose:
    """What happens to a padded image of this size (height, width), in order."""
    erase = v2.RandomErasing(augment.erase, scale=(ERASED_AREA, augment.erase_area), ratio=ERASED_ASPECT, value=_FILL)
    return v2.Compose([v2.RandomHorizontalFlip(augment.flip), v2.RandomCrop(size), erase])


@contextmanager
def _drawn_from(key: str) -> Iterator[None]:
    """Let torch draw from a key, and go on afterwards as if it had not: its transforms know no other generator."""
    state = torch.default_generator.get_state()
    torch.default_generator.manual_seed(int.from_bytes(hashlib.blake2b(key.encode(), digest_size=7).digest()))
    try:
        yield
    finally:
        torch.default_generator.set_state(state)
