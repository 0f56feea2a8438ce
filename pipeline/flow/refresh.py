"""Fetch new data before a retraining: run `retrain.refresh`, and move files from `retrain.incoming` to `data.root`."""

import filecmp
import logging
import os
import shlex
import shutil
import time
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from pipeline.config import Data, Params
from pipeline.data.custom import list_folder
from pipeline.data.folders import is_left_behind, walk
from pipeline.data.inspection import inspect
from pipeline.data.layout import UNASSIGNED, UNASSIGNED_TEST
from pipeline.data.manifest import TEST, UNLABELLED, Box, DataError, Item, first_few, is_inside
from pipeline.data.tables import Row, Table, boxes_of, check_splits, path_of, read_table, split_of
from pipeline.data.unlabelled import unlabelled_item
from pipeline.files import Files, sync_folder, write_atomically, write_text
from pipeline.flow.raw_data import is_utf8, saved_in_dvc
from pipeline.labels import clean_label
from pipeline.protocols import JUNK
from pipeline.system.process import TimeLimitError, child_process

log = logging.getLogger(__name__)

MIN_AGE = 10.0
"""Seconds since the last change of a file below which it may be incomplete."""
MAX_WAIT = 120.0
"""Seconds to wait for incomplete files before they are left for the next run."""
PARTIAL_SUFFIXES = (".part", ".tmp", ".crdownload", ".filepart")
"""Suffixes of files that a download is still writing."""


class RefreshError(RuntimeError):
    """New data could not be fetched or ingested."""

    exit_code = 3


class RefusedError(RefreshError):
    """New data cannot be ingested, and a retry would fail in the same way."""


class IncompleteError(RefreshError):
    """An image is still being written; the message is its path."""


def check_incoming(files: Files, params: Params) -> None:
    """Check that the files in `retrain.incoming` can be ingested.

    Raises:
        RefusedError: If the folder holds files although `data.source` is not `folder` or `csv`, or holds `data.root`.
    """
    folder, root, source = files.root / params.retrain.incoming, files.root / params.data.root, params.data.source
    if not params.retrain.incoming or not folder.is_dir():
        return
    if root.resolve().is_relative_to(folder.resolve()):
        raise RefusedError(f"`data.root` ({root}) is in `retrain.incoming` ({folder}); set one to another folder")
    if source not in ("folder", "csv") and (count := len(list(_visible(folder)))):
        why = "renders its own images" if source == "vehicles" else "has a published list of its images"
        raise RefusedError(
            f"{folder} holds {count} new files, but `data.source` {source} {why}; move them away, or set `data.source` "
            "to folder or csv"
        )


def refresh(files: Files, params: Params) -> list[str]:
    """Run `retrain.refresh`, move the files of `retrain.incoming` to `data.root`, and save them in DVC if it is there.

    Returns:
        Paths of the new files, relative to `data.root`.

    Raises:
        RefreshError: If the command fails.
        RefusedError: If the files cannot be ingested, or `data.root` is not as its .dvc file lists it; nothing is moved
            then.
        StageError: If dvc fails.
    """
    try:
        with saved_in_dvc(files, params) as check_saved:
            if params.retrain.refresh:
                _run(params.retrain.refresh, params.retrain.limit_hours)
            check_saved()
            return _take_incoming(files, params)
    except DataError as error:
        raise RefusedError(str(error)) from error


def _take_incoming(files: Files, params: Params) -> list[str]:
    check_incoming(files, params)  # again, since the command may have added files
    folder, root = files.root / params.retrain.incoming, files.root / params.data.root
    if not params.retrain.incoming or not folder.is_dir():
        return []
    paths = _complete_files(folder)
    try:
        if params.data.source == "csv":
            moved = _ingest_with_table(paths, folder, root, params.data)
        else:
            usable = _usable(paths, folder)
            _check_folders(usable, folder, root, params.data)
            moved = ingest(usable, folder, root)
    except OSError as error:
        reason = f"{error.strerror}: {error.filename}" if error.filename else str(error)
        raise RefreshError(
            f"new files could not be moved to {root} ({reason}); repair that, the next run moves the others"
        ) from error
    subfolders = [path for path in folder.rglob("*") if path.is_dir() and not path.is_symlink()]
    for subfolder in sorted(subfolders, reverse=True):
        if not is_left_behind(subfolder.name):
            with suppress(OSError):  # not empty
                subfolder.rmdir()
    return moved


def _run(command: str, hours: float) -> None:
    last = ""
    try:
        with child_process(*shlex.split(command), hours=hours) as process:
            for line in process.stdout or ():
                if line := line.rstrip():
                    last = line
                    log.info(line)
            code = process.wait()
    except TimeLimitError as error:
        raise RefusedError(f"`retrain.refresh`: {error}; raise `retrain.limit_hours`, or make it faster") from error
    if code:
        raise RefreshError(f"`retrain.refresh` failed with exit code {code}: {last}")


def _complete_files(folder: Path) -> list[Path]:
    """Return the complete regular files, sorted by name; wait up to MAX_WAIT seconds for incomplete ones."""
    before: dict[Path, tuple[int, int]] = {}
    deadline = time.monotonic() + MAX_WAIT
    while True:
        states = {path: (state.st_size, state.st_mtime_ns) for path, state in _candidates(folder)}
        # An unchanged file is complete even if its time lies in the future: another machine's clock may be ahead.
        incomplete = {
            path
            for path, state in states.items()
            if time.time() - state[1] / 1e9 < MIN_AGE and before.get(path) != state
        }
        if not incomplete or time.monotonic() > deadline:
            break
        log.info("%d new files may be incomplete; checking again in %.0f s", len(incomplete), MIN_AGE)
        time.sleep(MIN_AGE)
        before = states
    complete = [path for path in states if path not in incomplete and is_utf8(str(path))]
    moving = set(complete)
    _report_left(folder, {path: _why_left(path) for path in _visible(folder) if path not in moving})
    return complete


def _why_left(path: Path) -> str:
    if not is_utf8(str(path)):
        return "its name is not UTF-8, which DVC cannot store; rename it"
    if path.is_symlink():
        return "it is a link; move the file itself there"
    return "it is incomplete" if path.is_file() else "it is not a regular file"


def _report_left(folder: Path, left: Mapping[Path, str]) -> None:
    """Log one warning for each reason why files stay in a folder, with an example."""
    for reason, count in Counter(left.values()).items():
        example = next(path for path, other in left.items() if other == reason).relative_to(folder)
        name = os.fsencode(example).decode(errors="backslashreplace")
        files = "1 file stays" if count == 1 else f"{count} files stay"
        log.warning("%s in %s, such as %s: %s", files, folder, name, reason)


def _usable(paths: Sequence[Path], folder: Path) -> list[Path]:
    """Return the pictures that can be decoded; a broken one would stop stage `prepare` in every later retraining."""
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    reasons = dict(inspect([Item(name, "", "", "") for name in names], folder).quarantined)
    _report_unusable(folder, reasons)
    return [path for name, path in names.items() if name not in reasons]


def _report_unusable(folder: Path, reasons: Mapping[str, str]) -> None:
    for name, reason in list(reasons.items())[:1]:  # messages of decoders hold names and numbers, so each may differ
        text = f"it cannot be used ({reason.replace(f' {name!r}', '')}); replace or delete it"
        _report_left(folder, dict.fromkeys((folder / name for name in reasons), text))


def _check_folders(paths: Sequence[Path], folder: Path, root: Path, data: Data) -> None:
    """Check that stage `prepare` can list `root` with the new files in it (source folder).

    Raises:
        DataError: If it cannot, or an identity would be in training and in test.
    """
    names = [path.relative_to(folder).as_posix() for path in paths]
    if any("/" in name for name in names):  # a file outside of a folder of an identity is no image of any
        present, new = walk(root) if root.is_dir() else (), ((name, "") for name in names)
        try:
            _check_identities(list_folder(root, [*present, *new], data).items, data)
        except DataError as error:
            raise DataError(f"with the new files, {error}; nothing was moved") from error


def _check_identities(items: Iterable[Item], data: Data) -> None:
    """Check that no identity is in training and in test, unless `data.closed_set` allows it.

    Raises:
        DataError: Naming the identities.
    """
    trained, tested = set[str](), set[str]()
    for item in items:
        if item.split not in (UNASSIGNED, UNLABELLED):
            is_test = item.split in (*TEST, UNASSIGNED_TEST)
            (tested if is_test else trained).add(clean_label(item.identity))
    if not data.closed_set and (shared := sorted((trained & tested) - {JUNK})):
        raise DataError(
            f"identities would be in training and in test: {first_few(shared)}; put each into one of the two, or set "
            "`data.closed_set` to true"
        )


def _visible(folder: Path) -> Iterator[Path]:
    """Yield everything except folders, hidden files and files that systems leave behind, sorted by name."""
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        hidden = any(part.startswith(".") or is_left_behind(part) for part in parts)
        if not hidden and (path.is_symlink() or not path.is_dir()):
            yield path


def _candidates(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Yield regular files without a partial suffix, and their state."""
    for path in _visible(folder):
        if path.is_file() and not path.is_symlink() and not path.name.lower().endswith(PARTIAL_SUFFIXES):
            with suppress(FileNotFoundError):  # renamed meanwhile
                yield path, path.stat()


def ingest(paths: Sequence[Path], folder: Path, target: Path) -> list[str]:
    """Move files from below `folder` to the same relative paths below `target`, each atomically.

    If the target has a file with the same content, the new one is deleted; so the next call continues after a crash.

    Returns:
        Relative paths of the files that are new in `target`.

    Raises:
        RefusedError: If the target has a file with different content; nothing is moved then.
    """
    targets = {path: _target(path.relative_to(folder), target) for path in paths}
    if taken := [new for old, new in targets.items() if new.exists() and not _same(old, new)]:
        raise RefusedError(
            f"{taken[0]} exists with different content ({len(taken)} such files), so nothing was moved; rename the new "
            "files"
        )
    spelled = Counter(_nfc(str(new)) for new in targets.values())
    if twice := [name for name, count in spelled.items() if count > 1]:
        raise RefusedError(
            f"{folder} holds {Path(twice[0]).name} twice, in two Unicode normal forms, so nothing was moved; rename one"
        )
    moved = []
    for old, new in targets.items():
        if new.exists():
            old.unlink()
            continue
        _move(old, new)
        moved.append(new.relative_to(target).as_posix())
    return moved


def _target(path: Path, folder: Path) -> Path:
    """Return where a new file belongs; if the name exists in another Unicode normal form, that is the same name."""
    spellings = [str(path), *(unicodedata.normalize(form, str(path)) for form in ("NFC", "NFD"))]
    return next((folder / name for name in spellings if (folder / name).exists()), folder / path)


def _same(old: Path, new: Path) -> bool:
    return new.is_file() and filecmp.cmp(old, new, shallow=False)


def _move(old: Path, new: Path) -> None:
    new.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.rename(old, new)
    except OSError:  # another file system
        write_atomically(new, lambda temporary: shutil.copyfile(old, temporary))
        old.unlink()
    sync_folder(new.parent)


def _ingest_with_table(paths: Sequence[Path], folder: Path, root: Path, data: Data) -> list[str]:
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
        _check_identities([*old_items, *rows], data)
    except IncompleteError as error:
        log.warning("%d files stay in %s: image %s is incomplete", len(images) + 1, folder, error)
        return []
    except DataError as error:
        raise RefusedError(f"{error}; nothing was moved; correct the table") from error
    listed = {item.path for item in (*old_items, *rows)}
    _report_left(
        folder, {path: "the table does not list it" for name, path in images.items() if _nfc(name) not in listed}
    )
    wanted = {name: path for name, path in images.items() if _nfc(name) in listed}
    if unusable := _unusable_images(rows, wanted, folder, root):
        _report_unusable(folder, unusable)
        log.warning("the table %s waits for the pictures that cannot be used", new)
        return []
    moved = ingest(list(wanted.values()), folder, root)
    if rows:
        write_text(table, (old_table or new_table.empty()).with_rows(rows.values()))
    new.unlink()
    return moved


def _unusable_images(rows: Mapping[Item, Row], images: Mapping[str, Path], folder: Path, root: Path) -> dict[str, str]:
    """Return the images of new rows, and other new ones, that cannot be used, and why."""
    new = {_nfc(name): name for name in images}
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
            added[item] = {**row, "path": _target(Path(path), root).relative_to(root).as_posix()}
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
        return unlabelled_item(_nfc(path), box)  # its labels are ignored
    return Item(_nfc(path), clean_label(row["identity"]), clean_label(row.get("camera", "")), split, box)


def _nfc(path: str) -> str:
    return unicodedata.normalize("NFC", path)
