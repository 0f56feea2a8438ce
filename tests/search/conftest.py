"""A release with a student and a teacher, and a gallery of pictures in folders."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.export.metadata import finish
from pipeline.export.release import write_release
from pipeline.export.to_onnx import to_onnx
from tests.export.tiny_network import METADATA, SIZE, tiny_net

LARGE = (64, 48)
"""Height and width of the gallery's pictures."""


def picture(number: int) -> Image.Image:
    """Return a smooth picture that looks like no other."""
    rng = np.random.default_rng(number)
    return Image.fromarray(rng.integers(0, 256, (5, 4, 3), dtype=np.uint8)).resize(LARGE[::-1])


@pytest.fixture(scope="session")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two networks of the same size with different weights."""
    folder = tmp_path_factory.mktemp("release")
    files = {
        name: finish(to_onnx(tiny_net(seed), SIZE, 18), METADATA) for seed, name in enumerate(("model", "teacher"))
    }
    write_release(folder, {f"{name}.onnx": content for name, content in files.items()})
    return folder


@pytest.fixture(scope="session")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty pictures in three folders, and some files that are not pictures."""
    folder = tmp_path_factory.mktemp("gallery")
    for number in range(40):
        path = folder / f"{number % 3}" / f"auto {number:02d} \N{LATIN SMALL LETTER E WITH ACUTE}.png"
        path.parent.mkdir(exist_ok=True)
        picture(number).save(path)
    (folder / "0" / "cut.jpg").write_bytes(b"\xff\xd8\xff\xe0 no more")
    (folder / "notes.txt").write_text("no picture")
    (folder / ".hidden.png").write_bytes(b"")
    return folder
