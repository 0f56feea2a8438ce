"""Images without labels (`data.unlabelled`), for distillation: it compares two networks, whatever an image shows."""

from collections.abc import Iterable, Set
from pathlib import Path, PurePosixPath
from unicodedata import normalize

from pipeline.config import Data
from pipeline.data.folders import walk
from pipeline.data.layout import UNKNOWN, Listing
from pipeline.data.manifest import UNLABELLED, Box, DataError, ImageWarning, Item
from pipeline.data.tables import path_of

RENDERED = f"image_{UNLABELLED}"
"""Folder of the default set, which renders its unlabelled images."""


def unlabelled_item(path: str, box: Box | None = None) -> Item:
    """Return an item without labels."""
    return Item(path, UNLABELLED, UNKNOWN, UNLABELLED, box)


def unlabelled_folders(root: Path, data: Data) -> list[str]:
    """Return the folders of unlabelled images, relative to `root` and sorted, in the Unicode form of the disk."""
    if data.source == "vehicles":
        return [RENDERED] if data.vehicles.unlabelled_identities else []
    return sorted(path_of(root, folder) for folder in data.unlabelled)


def is_in(path: str, folders: Iterable[str]) -> bool:
    """Return whether a path is below one of the folders, whatever the Unicode form of both."""
    return any(normalize("NFC", path).startswith(f"{normalize('NFC', folder)}/") for folder in folders)


def list_unlabelled(root: Path, data: Data, listed: Set[str]) -> Listing:
    """List all images below the folders of unlabelled images, except those that the data set lists itself.

    Args:
        listed: Paths of the images that the data set lists.

    Raises:
        FileNotFoundError: If a folder does not exist.
        DataError: If one is a file, is reached by a link, or holds no images.
    """
    items, warnings = list[Item](), list[ImageWarning]()
    for folder in unlabelled_folders(root, data):
        _check_folder(root, folder)
        files = [(path, reason) for path, reason in walk(root, folder) if path not in listed]
        found = [unlabelled_item(path) for path, reason in files if not reason]
        warnings += [ImageWarning(path, reason) for path, reason in files if reason]
        if not found:
            others = " that the data set does not list itself" if any(is_in(path, [folder]) for path in listed) else ""
            raise DataError(f"`data.unlabelled`: {root / folder} holds no images{others}; add some or remove the entry")
        items += found
    return Listing(items, warnings)


def _check_folder(root: Path, folder: str) -> None:
    path = root
    for part in PurePosixPath(folder).parts:
        path = path / part
        if path.is_symlink():
            raise DataError(
                f"`data.unlabelled`: {path} is a link, and DVC tracks nothing in a linked folder; copy its files"
            )
    if not path.exists():
        raise FileNotFoundError(f"`data.unlabelled`: {path} is missing; entries are folders relative to `data.root`")
    if not path.is_dir():
        raise DataError(f"`data.unlabelled`: {path} is a file; list the folder that it is in")
