"""Data of one's own: a folder of identities, or a table."""

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

UNSPLIT = "unsplit"
"""Split of images that nobody has put into one yet."""
UNDEALT = "test"
"""Split of test images of which nobody has said yet whether they ask or are asked."""
LITTER = {"thumbs.db", "desktop.ini", "__macosx"}
"""Files and folders that systems leave behind; hidden ones are left out too."""

NO_IDENTITIES = {"train", "test", "val", "query", "gallery"}
"""Folders of other people's splits, which would all become one identity."""

Row = dict[str, str]
"""Of a table, by column."""


@layout("folder")
def folder(root: Path, data: Data) -> Listing:
    """List one folder for each identity, in it images or one folder for each camera.

    Where there are no folders for cameras, `data.custom.pattern` finds the camera in a file's name.

    Returns:
        Items in the order of their paths, and what was left out.

    Raises:
        FileNotFoundError: If there is no such folder.
        DataError: If a name has no camera where the pattern looks for one, or nothing is there.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is missing; `data.root` must hold one folder an identity")
    pattern = data.custom.pattern
    form = re.compile(pattern) if pattern else None
    items, warnings = list[Item](), list[ImageWarning]()
    for path, why in walk(root, ""):
        parts = path.split("/")
        if why or len(parts) < 2:
            warnings.append((path, why or "lies in no identity's folder, left out"))
            continue
        camera = parts[1] if len(parts) > 2 else UNKNOWN
        if len(parts) == 2 and form is not None:
            found = form.search(parts[-1])
            if found is None:
                raise DataError(f"{path}: `data.custom.pattern` {pattern!r} finds no camera in this name")
            camera = found["camera"]
        items.append(Item(path, parts[0], camera, UNSPLIT))
    if not items:
        raise DataError(f"{root} holds no images in folders of identities")
    if split := {item.identity.lower() for item in items} & NO_IDENTITIES:
        raise DataError(
            f"{root} has a folder `{min(split)}`: source folder takes folders for identities and splits itself; let "
            "`data.root` name what is inside, or use source csv with a column split"
        )
    return Listing(items, warnings)


def walk(root: Path, inside: str) -> Iterator[tuple[str, str]]:
    """Files below a folder, by relative path, sorted; with a reason where one is left out."""
    with os.scandir(root / inside) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        path = f"{inside}/{entry.name}" if inside else entry.name
        if path != (said := path.encode(errors="backslashreplace").decode()):
            yield said, "its name is no UTF-8, left out"
            continue
        if entry.name.startswith(".") or entry.name.lower() in LITTER:
            yield path, "hidden or left behind by a system, left out"
        elif entry.is_symlink():
            yield path, "a link, left out: only regular files inside the root are read"
        elif entry.is_dir():
            yield from walk(root, path)
        elif entry.is_file():
            yield path, "" if _may_be_image(entry.name) else "no image by its ending, left out"
        else:
            yield path, "no regular file, left out"


def _may_be_image(name: str) -> bool:
    """Whether a file is worth a look: its ending is one of an image, or it has none."""
    ending = Path(name).suffix.lower()
    return not ending or ending in Image.registered_extensions()


@layout("csv")
def table(root: Path, data: Data) -> Listing:
    """Read a CSV file (`data.custom.table`) with columns path and identity, and camera and split where they are known.

    Splits are train, query, gallery, or test for those that the rule shall deal out; without the column all are. Paths
    are relative to `root`.

    Raises:
        FileNotFoundError: If there is no such file.
        DataError: If it is no such table.
    """
    path = root / data.custom.table
    _, rows = read_rows(path)
    if not rows:
        raise DataError(f"{path} lists no images")
    check_splits(path, rows)
    items = [
        Item(row["path"], row["identity"], row.get("camera") or UNKNOWN, row.get("split") or UNSPLIT) for row in rows
    ]
    return Listing(items, [])


def read_rows(path: Path) -> tuple[list[str], list[Row]]:
    """Read the columns and the rows of such a table.

    Raises:
        FileNotFoundError: If there is no such file.
        DataError: If it has other columns, or a row has too few or too many fields, or an unknown split.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is missing; `data.custom.table` names the table of source csv") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no UTF-8 text") from error
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
        if (split := row.get("split") or UNSPLIT) not in ("train", "query", "gallery", UNDEALT, UNSPLIT):
            raise DataError(f"{path}, line {reader.line_num}: {split!r} is none of train, query, gallery and test")
        rows.append(row)
    return columns, rows


def check_splits(path: Path, rows: Iterable[Row]) -> None:
    """Refuse rows of which some have a split and others have none.

    Raises:
        DataError: Naming the table.
    """
    splits = {row.get("split") or UNSPLIT for row in rows}
    if (UNSPLIT in splits and len(splits) > 1) or (UNDEALT in splits and splits & {"query", "gallery"}):
        raise DataError(f"{path}: some images have a split and others have none; give all one, or none")
