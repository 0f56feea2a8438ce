"""Random images, and a small manifest."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data.manifest import Item, Manifest


@pytest.fixture
def picture() -> Callable[..., None]:
    """Return a function that writes random pixels, in the format of the file's suffix."""

    def write(path: Path, seed: int, size: tuple[int, int] = (20, 30)) -> None:
        pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)

    return write


@pytest.fixture
def manifest(tmp_path: Path, picture: Callable[..., None]) -> Manifest:
    """Five PNG files of 20 x 30 pixels: identities 1, 1 | 2, 2, 3."""
    items = []
    for number, split in enumerate(("train", "train", "query", "gallery", "gallery")):
        picture(tmp_path / f"{number}.png", number)
        items.append(Item(f"{number}.png", "11223"[number], f"c{number % 2}", split))
    return Manifest(items, tmp_path)
