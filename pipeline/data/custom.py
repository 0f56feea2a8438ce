"""Custom data: a folder for each identity, or a CSV table."""

import csv
import io
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from PIL import Image

from pipeline.config import Data
from pipeline.data.layout import UNKNOWN, Listing, layout
from pipeline.data.manifest import DataError, ImageWarning, Item

UNASSIGNED = "unsplit"
"""Split of images that are not in a split yet."""
UNASSIGNED_TEST = "test"
"""Split of test images that are not divided into query and gallery yet."""
SYSTEM_FILES = {"thumbs.db", "desktop.ini", "__macosx"}
"""Files and folders that operating systems create; they are skipped, as hidden ones are."""

SPLIT_FOLDERS = {"train", "test", "val", "query", "gallery"}
"""Folder names that are splits, not identities."""

Row = dict[str, str]
"""One row of a table, by column."""


@layout("folder")
def folder(root: Path, data: Data) -> Listing:
    """List a data set with one folder for each identity, which holds images or one folder for each camera.

    Without camera folders, `data.custom.pattern` extracts the camera from the file name.

    Returns:
        Items sorted by path, and the skipped files.

    Raises:
        FileNotFoundError: If the folder does not exist.
        DataError: If the pattern does not match a file name, a folder is named like a split, or there are no images.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is missing; `data.root` must be a folder with one folder for each identity")
    pattern = data.custom.pattern
    camera_pattern = re.compile(pattern) if pattern else None
    items, warnings = list[Item](), list[ImageWarning]()
    for path, skip_reason in walk(root):
        parts = path.split("/")
        if skip_reason or len(parts) < 2:
            warnings.append((path, skip_reason or "skipped: not in the folder of an identity"))
            continue
        camera = parts[1] if len(parts) > 2 else UNKNOWN
        if len(parts) == 2 and camera_pattern is not None:
            match = camera_pattern.search(parts[-1])
            if match is None:
                raise DataError(f"{path}: `data.custom.pattern` {pattern!r} finds no camera in this file name")
            camera = match["camera"]
        items.append(Item(path, parts[0], camera, UNASSIGNED))
    if not items:
        raise DataError(f"{root} has no images in folders of identities")
    if split := {item.identity.lower() for item in items} & SPLIT_FOLDERS:
        raise DataError(
            f"{root} has a folder `{min(split)}`: source folder takes folders for identities and splits them itself; "
            "point `data.root` at the folder inside it, or use source csv with a column split"
        )
    return Listing(items, warnings)


def walk(root: Path, inside: str = "") -> Iterator[tuple[str, str]]:
    """Yield (path relative to `root`, reason to skip it or "") of all files below `root / inside`, sorted."""
    with os.scandir(root / inside) as scan:
        entries = sorted(scan, key=lambda entry: entry.name)
    for entry in entries:
        path = f"{inside}/{entry.name}" if inside else entry.name
        if path != (escaped := path.encode(errors="backslashreplace").decode()):
            yield escaped, "skipped: its name is not UTF-8"
            continue
        if entry.name == ".gitkeep":  # keeps the folder `data` in Git
            continue
        if entry.name.startswith(".") or entry.name.lower() in SYSTEM_FILES:
            yield path, "skipped: hidden, or a file of the operating system"
        elif entry.is_symlink():
            yield path, "skipped: a link, and only regular files below the root are read"
        elif entry.is_dir():
            yield from walk(root, path)
        elif entry.is_file():
            yield path, "" if _has_image_suffix(entry.name) else "skipped: its suffix is not one of an image"
        else:
            yield path, "skipped: not a regular file"


def _has_image_suffix(name: str) -> bool:
    """Return whether the suffix is one of an image; a name without a suffix passes."""
    suffix = Path(name).suffix.lower()
    return not suffix or suffix in Image.registered_extensions()


@layout("csv")
def table(root: Path, data: Data) -> Listing:
    """List the rows of a CSV file (`data.custom.table`): columns path, identity and, if known, camera and split.

    Splits are train, query, gallery, or test for images that `split_test` divides into query and gallery. Without the
    column, `split_test` splits all images. Paths are relative to `root`.

    Raises:
        FileNotFoundError: If the file does not exist.
        DataError: If it is not such a table.
    """
    path = root / data.custom.table
    _, rows = read_rows(path)
    if not rows:
        raise DataError(f"{path} lists no images")
    check_splits(path, rows)
    items = [
        Item(row["path"], row["identity"], row.get("camera") or UNKNOWN, row.get("split") or UNASSIGNED) for row in rows
    ]
    return Listing(items, [])


def read_rows(path: Path) -> tuple[list[str], list[Row]]:
    """Read the columns and the rows of a table.

    Raises:
        FileNotFoundError: If the file does not exist.
        DataError: If it has other columns, or a row has too few or too many fields, or an unknown split.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is missing; `data.custom.table` must name the table of source csv") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text") from error
    reader = csv.DictReader(io.StringIO(text, newline=""))
    columns = list(reader.fieldnames or ())
    if not {"path", "identity"} <= set(columns) <= {"path", "identity", "camera", "split"}:
        raise DataError(
            f"{path}: columns must be path, identity and, if known, camera and split; got {sorted(columns)}"
        )
    rows = []
    for row in reader:
        if None in row or None in row.values():
            raise DataError(f"{path}, line {reader.line_num}: expected {len(columns)} fields")
        if not (row["path"] and row["identity"]):
            raise DataError(f"{path}, line {reader.line_num}: path or identity is empty")
        split = row.get("split") or UNASSIGNED
        if split not in ("train", "query", "gallery", UNASSIGNED_TEST, UNASSIGNED):
            raise DataError(
                f"{path}, line {reader.line_num}: split must be train, query, gallery or test, got {split!r}"
            )
        rows.append(row)
    return columns, rows


def check_splits(path: Path, rows: Iterable[Row]) -> None:
    """Check that all rows have a split or none has, and that `test` does not occur beside `query` or `gallery`.

    Raises:
        DataError: Naming the table.
    """
    splits = {row.get("split") or UNASSIGNED for row in rows}
    if (UNASSIGNED in splits and len(splits) > 1) or (UNASSIGNED_TEST in splits and splits & {"query", "gallery"}):
        raise DataError(f"{path}: some images have a split and others have none; give all one, or none")
