"""Small sets of images that the tests of this room share."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data.manifest import Item, Manifest

SPLITS = ("train", "train", "query", "gallery", "gallery")


def picture(path: Path, seed: int, size: tuple[int, int] = (20, 30)) -> None:
    """Write random pixels, losslessly unless the name says otherwise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    """Five PNG files of 20 x 30 pixels: identities 1, 1 | 2, 2, 3."""
    items = []
    for number, (split, identity) in enumerate(zip(SPLITS, "11223", strict=True)):
        picture(tmp_path / f"{number}.png", number)
        items.append(Item(f"{number}.png", identity, f"c{number % 2}", split))
    return Manifest(items, tmp_path)
