"""Raw layouts: how a data set as it is published becomes a list of items."""

import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from pipeline.data.manifest import DataError, Item, some

log = logging.getLogger(__name__)

_VERI776 = {"train": "train", "query": "query", "test": "gallery"}
_VERI776_NAME = re.compile(r"(?P<identity>-?\d+)_(?P<camera>c\d+)_[^/\\]+\.jpe?g", re.IGNORECASE)


def read_source(source: str, root: Path) -> list[Item]:
    """List the images of a data set, with splits `train`, `query` and `gallery`.

    Args:
        source: Name of the layout, as in `data.source`.
        root: Folder of the raw data.

    Raises:
        KeyError: If there is no such layout.
        FileNotFoundError: If a list or an image is missing.
        DataError: If a file name is not in the layout's form.
    """
    if source not in SOURCES:
        raise KeyError(f"there is no source {source!r}; it is one of {', '.join(SOURCES)}")
    return list(SOURCES[source](root))


def _veri776(root: Path) -> Iterator[Item]:
    """VeRi-776: image_train/0001_c001_00016450_0.jpg, with the names of a folder in name_train.txt.

    Query images are among those of image_test too; the `market` protocol removes them there, since identity and camera
    are the same.

    Source: Liu et al., A Deep Learning-Based Approach to Progressive Vehicle Re-identification, ECCV 2016.
    """
    for part, split in _VERI776.items():
        names, folder = root / f"name_{part}.txt", root / f"image_{part}"
        for needed in (names, folder):
            if not needed.exists():
                raise FileNotFoundError(f"{needed} is missing; `data.root` must be the unpacked folder of VeRi-776")
        lines = names.read_text(encoding="utf-8").splitlines()
        listed = [line.strip() for line in lines if line.strip()]
        present = {path.name for path in folder.iterdir() if path.is_file()}
        absent = [name for name in listed if name not in present]
        if absent:
            raise FileNotFoundError(f"{names} lists images that {folder} does not have: {some(absent)}")
        if len(present) > len(listed):
            log.warning("%s: %d files are not in %s and are left out", folder, len(present) - len(listed), names.name)
        for name in listed:
            parts = _VERI776_NAME.fullmatch(name)
            if parts is None:
                raise DataError(f"{names}: {name!r} is not in the form 0001_c001_00016450_0.jpg")
            yield Item(f"{folder.name}/{name}", parts["identity"], parts["camera"], split)


SOURCES: dict[str, Callable[[Path], Iterator[Item]]] = {"vehicles": _veri776, "veri776": _veri776}
"""Layouts by name; `vehicles` is rendered in the layout of VeRi-776."""
