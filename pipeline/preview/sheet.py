"""The contact sheet: a few images as the network sees them, with their labels."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib import font_manager

from pipeline.data.images import decode
from pipeline.data.manifest import SPLITS, UNLABELLED, Item
from pipeline.preview.survey import evenly
from pipeline.report.style import new_figure, save, styled

IMAGES, COLUMNS = 24, 6
WIDTH = 1.6
"""Width of an image, inches."""
LONGEST = 22
"""Characters of a label; longer ones lose their middle."""


def chosen(items: Sequence[Item]) -> list[Item]:
    """Choose the images to show: equally many of each split, as far as it has them, split by split."""
    by_split = [part for name in SPLITS if (part := [item for item in items if item.split == name])]
    shown: list[Item] = []
    for number, part in enumerate(sorted(by_split, key=len)):  # what a small split leaves goes to the larger ones
        shown += evenly(part, (IMAGES - len(shown)) // (len(by_split) - number))
    return sorted(shown, key=lambda item: SPLITS.index(item.split))


def write_sheet(path: Path, items: Sequence[Item], root: Path, size: tuple[int, int]) -> int:
    """Write a PNG with images at the size (height, width) that the network sees; returns their number.

    Raises:
        DataError: If an image cannot be used.
        OSError: If an image cannot be decoded.
    """
    shown = chosen(items)
    rows, aspect = max(1, -(-len(shown) // COLUMNS)), size[0] / size[1]
    with styled(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # such a character is drawn as a box
        installed = {font.name for font in font_manager.fontManager.ttflist if "CJK" in font.name}
        matplotlib.rcParams["font.family"] = ["DejaVu Sans", *sorted(installed)]
        figure = new_figure(WIDTH * rows * (aspect + 0.4), WIDTH * COLUMNS)
        axes = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
        for chart in axes:
            chart.axis("off")
        for chart, item in zip(axes, shown, strict=False):
            chart.imshow(decode(root / item.path, size, item.box))
            labels = () if item.split == UNLABELLED else (shortened(item.identity), shortened(item.camera))
            label = "\n".join([*labels, item.split])
            chart.set_title(label, fontsize=8, weight="normal", loc="left", parse_math=False)
        save(figure, path)
    return len(shown)


def shortened(label: str) -> str:
    """Return a label of at most `LONGEST` characters."""
    half = LONGEST // 2 - 1
    return label if len(label) <= LONGEST else f"{label[:half]}..{label[-half:]}"
