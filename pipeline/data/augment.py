"""Random augmentation of training images, and the normalisation of every image.

The augmentation of an image depends on (seed, view, index) alone, so it is the same for any number of workers or
processes and after a restart. Images stay uint8 until they are on the device.
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
"""ImageNet's mean (RGB), of pixels in [0, 1]."""
STD = (0.229, 0.224, 0.225)
"""ImageNet's standard deviation (RGB), of pixels in [0, 1]."""
ERASED_AREA = 0.02
"""Smallest share of an image that is erased (Zhong et al.)."""
ERASED_ASPECT = (0.3, 1 / 0.3)
"""Range of height / width of the erased rectangle (Zhong et al.)."""

_FILL = [round(255 * mean) for mean in MEAN]  # 0 after normalisation


def as_tensor(pixels: Pixels) -> Tensor:
    """Return images (n, h, w, 3) as a tensor (n, 3, h, w) uint8 that shares their memory."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def normalise(images: Tensor) -> Tensor:
    """Subtract ImageNet's mean and divide by its standard deviation.

    Args:
        images: (B, 3, H, W) uint8, on any device.

    Returns:
        (B, 3, H, W) float32, in the same memory format.
    """
    mean = images.new_tensor([255 * mean for mean in MEAN], dtype=torch.float32)[:, None, None]
    std = images.new_tensor([255 * std for std in STD], dtype=torch.float32)[:, None, None]
    return (images.float() - mean) / std


def augment(images: Tensor, settings: Augment, seed: int, samples: Iterable[tuple[int, int]]) -> Tensor:
    """Flip, pad and crop, and erase a rectangle, at random.

    Source of random erasing: Zhong et al., "Random Erasing Data Augmentation", AAAI 2020; here the rectangle is filled
    with ImageNet's mean colour.

    Args:
        images: (n, 3, H, W) uint8.
        samples: (view, index in the manifest) of each image; the view is the epoch from 0 where none are stored.

    Returns:
        (n, 3, H, W) uint8, a copy.
    """
    size = (images.shape[2], images.shape[3])
    padded = functional.pad(images, [settings.pad], fill=_FILL) if settings.pad else images
    augmented = torch.empty(images.shape, dtype=torch.uint8)
    transforms = _transforms(settings, size)
    for position, (view, index) in enumerate(samples):
        with _torch_seeded_by(f"{seed}/{view}/{index}"):
            augmented[position] = transforms(padded[position])
    return augmented


@lru_cache(maxsize=8)
def _transforms(settings: Augment, size: tuple[int, int]) -> v2.Compose:
    """Compose the transforms of a padded image; `size` (height, width) is the crop."""
    erase = v2.RandomErasing(settings.erase, scale=(ERASED_AREA, settings.erase_area), ratio=ERASED_ASPECT, value=_FILL)
    return v2.Compose([v2.RandomHorizontalFlip(settings.flip), v2.RandomCrop(size), erase])


@contextmanager
def _torch_seeded_by(key: str) -> Iterator[None]:
    """Seed torch's global generator with a key, and restore it: torchvision's transforms accept no other generator."""
    state = torch.default_generator.get_state()
    torch.default_generator.manual_seed(int.from_bytes(hashlib.blake2b(key.encode(), digest_size=7).digest()))
    try:
        yield
    finally:
        torch.default_generator.set_state(state)
