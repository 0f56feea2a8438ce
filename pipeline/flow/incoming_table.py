"""Files in `retrain.incoming` that come with a table of their labels (source csv)."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from pipeline.config import Data
from pipeline.data.inspection import inspect
from pipeline.data.manifest import UNLABELLED, Box, DataError, Item, is_inside
from pipeline.data.tables import Row, Table, boxes_of, check_splits, path_of, read_table, split_of
from pipeline.data.unlabelled import unlabelled_item
from pipeline.files import write_text
from pipeline.flow.incoming import (
    PARTIAL_SUFFIXES,
    RefreshError,
    RefusedError,
    check_identities,
    ingest,
    nfc,
    target_of,
    warn_of_files_left,
    warn_of_unusable_files,
)
from pipeline.labels import clean_label

log = logging.getLogger(__name__)


class IncompleteError(RefreshError):
    """An image is still being written; the message is its path."""


def ingest_with_table(paths: Sequence[Path], folder: Path, root: Path, data: Data) -> list[str]:
    """Move images, and append the rows of the table that came with them to the table in `root` (source csv).

    Without a table the images stay where they are. Images are moved first, then rows are appended, then the new table
    is deleted; after an interruption the next call skips what is done. Both tables are called `data.custom.table`.

    Raises:
        RefusedError: If the tables contradict each other or an image is missing; nothing is moved then.
    """
    new, table = (place / data.custom.table for place in (folder, root))
    images = {path.relative_to(folder).as_posix(): path for path in paths if path != new}
    if new not in paths:
        if images:
            log.warning("%d files stay in %s: their table %s is missing or incomplete", len(images), folder, new)
        return []
    try:
        new_table = read_table(new)
        old_table = read_table(table) if table.exists() else None
        old_items = list(_items(old_table, root)) if old_table else []
        rows = _new_rows(new_table, old_table, old_items, images, folder, root)
        check_identities([*old_items, *rows], data)
    except IncompleteError as error:
        log.warning("%d files stay in %s: image %s is incomplete", len(images) + 1, folder, error)
        return []
    except DataError as error:
        raise RefusedError(f"{error}; nothing was moved; correct the table") from error
    listed = {item.path for item in (*old_items, *rows)}
    warn_of_files_left(
        folder, {path: "the table does not list it" for name, path in images.items() if nfc(name) not in listed}
    )
    wanted = {name: path for name, path in images.items() if nfc(name) in listed}
    if unusable := _unusable_images(rows, wanted, folder, root):
        warn_of_unusable_files(folder, unusable)
        log.warning("the table %s waits for the pictures that cannot be used", new)
        return []
    moved = ingest(list(wanted.values()), folder, root)
    if rows:
        write_text(table, (old_table or new_table.empty()).with_rows(rows.values()))
    new.unlink()
    return moved


def _unusable_images(rows: Mapping[Item, Row], images: Mapping[str, Path], folder: Path, root: Path) -> dict[str, str]:
    """Return the images of new rows, and other new ones, that cannot be used, and why."""
    new = {nfc(name): name for name in images}
    arrived = [replace(item, path=new[item.path]) for item in rows if item.path in new]
    arrived += [Item(new[name], "", "", "") for name in new.keys() - {item.path for item in rows}]
    moved_before = [replace(item, path=row["path"]) for item, row in rows.items() if item.path not in new]
    return dict([*inspect(arrived, folder).quarantined, *inspect(moved_before, root).quarantined])


def _new_rows(
    new: Table, old: Table | None, old_items: Iterable[Item], images: Mapping[str, Path], folder: Path, root: Path
) -> dict[Item, Row]:
    """Return the rows that `old` lacks, by their items (see `_items`); their paths are those that files get in `root`.

    Raises:
        IncompleteError: If an image is still being written.
        DataError: If the tables contradict each other, or an image is missing.
    """
    if old and set(new.known) != set(old.known):
        raise DataError(f"{new.path} has the columns {', '.join(new.known)}, but {old.path} has {', '.join(old.known)}")
    labels = {item.name: item for item in old_items}
    added: dict[Item, Row] = {}
    for row, box in zip(new.rows, boxes_of(new), strict=True):
        path = path_of(folder, row["path"])
        partial = [folder / f"{path}{suffix}" for suffix in ("", *PARTIAL_SUFFIXES)]
        if is_inside(path) and path not in images and any(file.is_file() for file in partial):
            raise IncompleteError(path)
        if path not in images:
            path = path_of(root, row["path"])  # moved before an interruption
        if not is_inside(path) or not (path in images or (root / path).is_file()):
            raise DataError(f"{new.path}: the image of row {','.join(row.values())} is missing")
        item = _item(path, row, box)
        if item.name not in labels:
            labels[item.name] = item
            added[item] = {**row, "path": target_of(Path(path), root).relative_to(root).as_posix()}
        elif labels[item.name] != item:
            known = labels[item.name]
            text = ", ".join(filter(None, (known.identity, known.camera)))
            raise DataError(f"{new.path}: {row['path']} is listed already, as {text}")
    check_splits(new.path, (item.split for item in labels.values()))
    return added


def _items(table: Table, root: Path) -> Iterator[Item]:
    """Yield the item of each row; paths are in NFC, since a file may be delivered again in another normal form."""
    for row, box in zip(table.rows, boxes_of(table), strict=True):
        yield _item(path_of(root, row["path"]), row, box)


def _item(path: str, row: Row, box: Box | None) -> Item:
    split = split_of(row)
    if split == UNLABELLED:
        return unlabelled_item(nfc(path), box)  # its labels are ignored
    return Item(nfc(path), clean_label(row["identity"]), clean_label(row.get("camera", "")), split, box)
