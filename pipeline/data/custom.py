"""Custom data: a folder for each identity, perhaps inside a folder for each split, or a table."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from pipeline.config import Data
from pipeline.data.folders import is_left_behind, walk
from pipeline.data.layout import SPLIT_WORDS, UNASSIGNED, UNASSIGNED_TEST, UNKNOWN, Listing, layout
from pipeline.data.manifest import UNLABELLED, DataError, ImageWarning, Item, first_few, is_inside
from pipeline.data.tables import Row, boxes_of, check_splits, path_of, read_table, split_of
from pipeline.data.unlabelled import is_in, unlabelled_folders, unlabelled_item
from pipeline.labels import clean_label

NOT_IN_IDENTITY = "skipped: not in the folder of an identity"


@layout("folder")
def folder(root: Path, data: Data) -> Listing:
    """List a data set with one folder for each identity, which holds images or one folder for each camera.

    If all folders in `root` are named as splits (`SPLIT_WORDS`), they hold the folders of the identities, and
    `unlabelled` holds images at any depth. Without camera folders, `data.custom.pattern` extracts the camera from the
    file name. The folders of `data.unlabelled` are left out.

    Returns:
        Items sorted by path, and the skipped files.

    Raises:
        FileNotFoundError: If the folder does not exist.
        DataError: If the pattern does not match a file name, only some folders are splits, or there are no images.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is missing; `data.root` must be a folder with one folder for each identity")
    return list_folder(root, walk(root), data)


def list_folder(root: Path, files: Iterable[tuple[str, str]], data: Data) -> Listing:
    """List the files of a data set of source `folder`, which need not exist.

    Args:
        files: (path, reason to skip it or ""), as `walk` yields them.

    Raises:
        DataError: See `folder`.
    """
    skipped, found = list[ImageWarning](), list[list[str]]()
    left_out = unlabelled_folders(root, data)
    for path, reason in files:
        if is_in(path, left_out):
            continue
        parts = path.split("/")
        if reason or len(parts) < 2:
            skipped.append(ImageWarning(path, reason or NOT_IN_IDENTITY))
        else:
            found.append(parts)
    split_by_folder = _splits(root, {parts[0] for parts in found})
    items = []
    for parts in found:
        if split_by_folder.get(parts[0]) == UNLABELLED:
            items.append(unlabelled_item("/".join(parts)))
            continue
        labels = parts[1:] if split_by_folder else parts
        if len(labels) < 2:
            skipped.append(ImageWarning("/".join(parts), NOT_IN_IDENTITY))
            continue
        camera = labels[1] if len(labels) > 2 else _camera(data.custom.pattern, "/".join(parts))
        items.append(Item("/".join(parts), labels[0], camera, split_by_folder.get(parts[0], UNASSIGNED)))
    if not items:
        kinds = Counter(warning.warning for warning in skipped).most_common(1)
        reason = f" ({kinds[0][1]} x {kinds[0][0]})" if kinds else ""
        raise DataError(f"{root} has no images in folders of identities{reason}")
    if not split_by_folder and len({item.identity for item in items}) == 1 and len(found[0]) > 2:
        raise DataError(
            f"all images in {root} are in one folder, `{items[0].identity}`, and so of one identity; point `data.root` "
            "at the folder that holds one folder for each identity"
        )
    return Listing(_with_gallery(items), skipped)


def _splits(root: Path, folders: set[str]) -> dict[str, str]:
    """Return the split of each folder in `root`; empty if they are identities.

    Raises:
        DataError: If only some are splits, or two are the same one.
    """
    words = {name: clean_label(name).lower() for name in sorted(folders)}
    splits = {name: SPLIT_WORDS[word] for name, word in words.items() if word in SPLIT_WORDS}
    if splits and (others := sorted(folders - splits.keys())):
        if set(splits.values()) == {UNLABELLED}:
            raise DataError(
                f"{root} has a folder `{next(iter(splits))}` beside {first_few(others, 2)}: list it in "
                "`data.unlabelled` if its images have no labels, else rename it"
            )
        raise DataError(
            f"{root} has a folder `{next(iter(splits))}` beside {first_few(others, 2)}: folders in `data.root` are "
            "either all splits (train, val, query, gallery, test or unlabelled) or all identities; move or rename one "
            "kind"
        )
    if twice := [split for split, count in Counter(splits.values()).items() if count > 1]:
        names = " and ".join(name for name, split in splits.items() if split == twice[0])
        raise DataError(f"{root} has the folders {names}, which are the same split; join them")
    check_splits(root, splits.values())
    return splits


def _with_gallery(items: list[Item]) -> list[Item]:
    """Make `test` the gallery where there are queries beside it, as data sets of re-identification name it."""
    if {"query", UNASSIGNED_TEST} <= {item.split for item in items}:
        return [replace(item, split="gallery") if item.split == UNASSIGNED_TEST else item for item in items]
    return items


def _camera(pattern: str, path: str) -> str:
    """Find the camera in a file name.

    Raises:
        DataError: If there is a pattern, and it does not match.
    """
    if not pattern:
        return UNKNOWN
    match = re.search(pattern, path.rpartition("/")[2])
    if match is None or not match["camera"]:
        raise DataError(f"{path}: `data.custom.pattern` {pattern!r} finds no camera in this file name")
    return match["camera"]


@layout("csv")
def table(root: Path, data: Data) -> Listing:
    """List the rows of a table (`data.custom.table`): path, identity and, if known, camera, split and box.

    Paths are relative to `root`; see `pipeline.data.tables` for what a table may look like. Splits are those of
    `SPLIT_WORDS`; without the column, `split_test` splits all images. The labels of unlabelled rows are ignored.

    Raises:
        FileNotFoundError: If the file does not exist.
        DataError: If it is not such a table, or is empty.
    """
    content = read_table(root / data.custom.table)
    if not content.rows:
        raise DataError(f"{content.path} lists no images")
    warnings = list[ImageWarning]()
    if content.ignored:
        names = first_few((repr(name) for name in content.ignored), 10)
        warnings.append(ImageWarning(data.custom.table, "columns are ignored", names))

    items = []
    for row, box in zip(content.rows, boxes_of(content), strict=True):
        path = path_of(root, row["path"])
        if not is_inside(path.replace("\\", "/")):
            raise DataError(
                f"{content.path}: {row['path']} is outside of `data.root` ({root}); set it to a folder that holds all "
                "images, and the table"
            )
        if not any(map(is_left_behind, path.split("/"))):  # listed by a program that took it for an image
            split = split_of(row)
            labelled = Item(path, row["identity"], _camera_of(row), split, box)
            items.append(unlabelled_item(path, box) if split == UNLABELLED else labelled)
    return Listing(_with_gallery(items), warnings)


def _camera_of(row: Row) -> str:
    camera = row.get("camera", "")
    return camera if clean_label(camera) else UNKNOWN
