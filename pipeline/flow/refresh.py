"""Bring new data in before a retraining: run the user's command, and move files from a folder into `data.root`."""

import filecmp
import logging
import os
import shlex
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from pipeline.config import Params
from pipeline.data import custom
from pipeline.data.manifest import DataError, is_inside
from pipeline.files import Files, csv_text, sync_folder, write_atomically, write_text
from pipeline.system.process import TimeLimitError, running

log = logging.getLogger(__name__)

MIN_AGE = 10.0
"""Seconds since the last change of a file: a younger one may still be written."""
MAX_WAIT = 120.0
"""Seconds to wait for young files; what is still written then is left for the next run."""
UNFINISHED = (".part", ".tmp", ".crdownload", ".filepart")
"""Endings of files that something still writes."""


class RefreshError(RuntimeError):
    """New data did not come, or cannot be ingested."""

    exit_code = 3


class RefusedError(RefreshError):
    """The same would happen again at once."""


def check_incoming(files: Files, params: Params) -> None:
    """Refuse files in `retrain.incoming` that no run can ingest.

    Raises:
        RefusedError: If `data.source` is not `folder` or `csv` and files lie there, or if `data.root` does.
    """
    folder, root, source = files.root / params.retrain.incoming, files.root / params.data.root, params.data.source
    if not params.retrain.incoming or not folder.is_dir():
        return
    if root.resolve().is_relative_to(folder.resolve()):
        raise RefusedError(f"`data.root` ({root}) is or lies in `retrain.incoming` ({folder}); name another folder")
    if source not in ("folder", "csv") and (count := len(list(_visible(folder)))):
        why = "renders its own images" if source == "vehicles" else "has published lists that name its images"
        raise RefusedError(
            f"{folder} holds {count} files, but `data.source` {source} {why}; move them away, or set `data.source` to "
            "folder or csv"
        )


def refresh(files: Files, params: Params) -> list[str]:
    """Run `retrain.refresh`, then ingest what lies in `retrain.incoming`.

    Returns:
        Paths of the files that were moved, relative to `data.root`.

    Raises:
        RefreshError: If the command fails.
        RefusedError: If the files cannot be ingested; then nothing is moved.
    """
    if params.retrain.refresh:
        _run(params.retrain.refresh, params.retrain.limit_hours)
    check_incoming(files, params)  # after the command, which may have brought some
    folder, root = files.root / params.retrain.incoming, files.root / params.data.root
    if not params.retrain.incoming or not folder.is_dir():
        return []
    paths = _complete_files(folder)
    table = params.data.custom.table
    moved = (
        _ingest_with_table(paths, folder, root, table) if params.data.source == "csv" else ingest(paths, folder, root)
    )
    for left in sorted((path for path in folder.rglob("*") if path.is_dir() and not path.is_symlink()), reverse=True):
        if not any(left.iterdir()):
            left.rmdir()
    return moved


def _run(command: str, hours: float) -> None:
    last = ""
    try:
        with running(*shlex.split(command), hours=hours) as process:
            for line in process.stdout or ():
                if line := line.rstrip():
                    last = line
                    log.info(line)
            code = process.wait()
    except TimeLimitError as error:
        raise RefusedError(f"`retrain.refresh`: {error} (`retrain.limit_hours`)") from error
    if code:
        raise RefreshError(f"`retrain.refresh` ended with {code}: {last}")


def _complete_files(folder: Path) -> list[Path]:
    """List regular files that nobody writes any more, by name; wait for young ones for a while."""
    before: dict[Path, tuple[int, int]] = {}
    deadline = time.monotonic() + MAX_WAIT
    while True:
        found = {path: (state.st_size, state.st_mtime_ns) for path, state in _finished(folder)}
        # A file that has not changed between two looks is complete too: another machine's clock may be ahead.
        young = {
            path
            for path, state in found.items()
            if time.time() - state[1] / 1e9 < MIN_AGE and before.get(path) != state
        }
        if not young or time.monotonic() > deadline:
            break
        log.info("%d files may still be written: looking again in %.0f s", len(young), MIN_AGE)
        time.sleep(MIN_AGE)
        before = found
    complete = [path for path in found if path not in young]
    for path in sorted(set(_visible(folder)) - set(complete)):
        plain = path.is_file() and not path.is_symlink()
        log.warning("%s stays where it is: %s", path, "still written" if plain else "no plain file")
    return complete


def _visible(folder: Path) -> Iterator[Path]:
    """Everything that is no folder and not hidden, by name."""
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if not hidden and (path.is_symlink() or not path.is_dir()):
            yield path


def _finished(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Regular files whose names do not say that something still writes them."""
    for path in _visible(folder):
        if path.is_file() and not path.is_symlink() and not path.name.lower().endswith(UNFINISHED):
            with suppress(FileNotFoundError):  # whoever writes it has renamed it
                yield path, path.stat()


def ingest(paths: Sequence[Path], folder: Path, target: Path) -> list[str]:
    """Move files from below one folder to the same relative paths below another, each in one step.

    A file that is there with the same content is only removed, so that after a crash the next call continues.

    Returns:
        Relative paths of those that were not there.

    Raises:
        RefusedError: Before anything is moved, if another content is there.
    """
    places = {path: target / path.relative_to(folder) for path in paths}
    if taken := [place for path, place in places.items() if place.exists() and not filecmp.cmp(path, place, False)]:
        raise RefusedError(
            f"{taken[0]} exists with another content ({len(taken)} such files); nothing was moved: rename the new ones"
        )
    moved = []
    for path, place in places.items():
        if place.exists():
            path.unlink()
            continue
        _move(path, place)
        moved.append(place.relative_to(target).as_posix())
    return moved


def _move(path: Path, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.rename(path, place)
        sync_folder(place.parent)
    except OSError:  # another file system
        write_atomically(place, lambda temporary: shutil.copyfile(path, temporary))
        path.unlink()


def _ingest_with_table(paths: Sequence[Path], folder: Path, root: Path, name: str) -> list[str]:
    """Move images and append the rows of the table that came with them (source csv); without a table all wait for it.

    First the images, then the rows, then the new table goes: interrupted anywhere, the next call finds images and rows
    that are there already, and does the rest. The tables have the same name below `folder` and `root`.

    Raises:
        RefusedError: Before anything is moved, if the tables do not fit together or an image is missing.
    """
    new, table = folder / name, root / name
    images = {path.relative_to(folder).as_posix(): path for path in paths if path != new}
    if new not in paths:
        if images:
            log.warning("%d files stay in %s: there is no complete table %s with their rows", len(images), folder, new)
        return []
    try:
        columns, rows = custom.read_rows(new)
        old_columns, old_rows = custom.read_rows(table) if table.exists() else (columns, [])
        if set(columns) != set(old_columns):
            raise DataError(f"{new} has the columns {columns}, but {table} has {old_columns}")
        labels, added = {row["path"]: row for row in old_rows}, []
        for row in rows:
            path = row["path"]
            unfinished = [folder / f"{path}{ending}" for ending in ("", *UNFINISHED)]
            if is_inside(path) and path not in images and any(other.is_file() for other in unfinished):
                log.warning("%d files stay in %s: %s is still written", len(images) + 1, folder, path)
                return []
            if not is_inside(path) or not (path in images or (root / path).is_file()):
                raise DataError(f"{new}: there is no image for the row {','.join(row.values())}")
            if labels.setdefault(path, row) is row:
                added.append(row)
            elif labels[path] != row:
                raise DataError(f"{new}: {path} is listed already, as {','.join(labels[path].values())}")
        custom.check_splits(new, labels.values())
    except DataError as error:
        raise RefusedError(f"{error}; nothing was moved: correct the table") from error
    if nameless := sorted(images.keys() - labels):
        log.warning("%d files stay in %s: no row names them, such as %s", len(nameless), folder, nameless[0])
    moved = ingest([path for name, path in images.items() if name in labels], folder, root)
    if added:
        text = csv_text(old_columns, ([row[column] for column in old_columns] for row in added))
        if table.exists():  # its text stays as it is
            before = table.read_bytes().decode()
            text = before + ("" if before.endswith("\n") else "\n") + text.partition("\n")[2]
        write_text(table, text)
    new.unlink()
    return moved
