"""Fetch new data before a retraining: run `retrain.refresh`, and move files from `retrain.incoming` to `data.root`."""

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
    """Run `retrain.refresh`, then move the files of `retrain.incoming` to `data.root`.

    Returns:
        Paths of the new files, relative to `data.root`.

    Raises:
        RefreshError: If the command fails.
        RefusedError: If the files cannot be ingested; nothing is moved then.
    """
    if params.retrain.refresh:
        _run(params.retrain.refresh, params.retrain.limit_hours)
    check_incoming(files, params)  # again, since the command may have added files
    folder, root = files.root / params.retrain.incoming, files.root / params.data.root
    if not params.retrain.incoming or not folder.is_dir():
        return []
    paths = _complete_files(folder)
    table = params.data.custom.table
    moved = (
        _ingest_with_table(paths, folder, root, table) if params.data.source == "csv" else ingest(paths, folder, root)
    )
    subfolders = [path for path in folder.rglob("*") if path.is_dir() and not path.is_symlink()]
    for subfolder in sorted(subfolders, reverse=True):
        if not any(subfolder.iterdir()):
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
    complete = [path for path in states if path not in incomplete]
    for path in sorted(set(_visible(folder)) - set(complete)):
        regular = path.is_file() and not path.is_symlink()
        log.warning("%s is not ingested: it is %s", path, "incomplete" if regular else "not a regular file")
    return complete


def _visible(folder: Path) -> Iterator[Path]:
    """Yield everything except folders and hidden files, sorted by name."""
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
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
    targets = {path: target / path.relative_to(folder) for path in paths}
    if taken := [new for old, new in targets.items() if new.exists() and not filecmp.cmp(old, new, False)]:
        raise RefusedError(
            f"{taken[0]} exists with different content ({len(taken)} such files), so nothing was moved; rename the new "
            "files"
        )
    moved = []
    for old, new in targets.items():
        if new.exists():
            old.unlink()
            continue
        _move(old, new)
        moved.append(new.relative_to(target).as_posix())
    return moved


def _move(old: Path, new: Path) -> None:
    new.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.rename(old, new)
        sync_folder(new.parent)
    except OSError:  # another file system
        write_atomically(new, lambda temporary: shutil.copyfile(old, temporary))
        old.unlink()


def _ingest_with_table(paths: Sequence[Path], folder: Path, root: Path, name: str) -> list[str]:
    """Move images, and append the rows of the table that came with them to the table in `root` (source csv).

    Without a table the images stay where they are. Images are moved first, then rows are appended, then the new table
    is deleted; after an interruption the next call skips what is done. Both tables are called `name`.

    Raises:
        RefusedError: If the tables contradict each other or an image is missing; nothing is moved then.
    """
    new, table = folder / name, root / name
    images = {path.relative_to(folder).as_posix(): path for path in paths if path != new}
    if new not in paths:
        if images:
            log.warning("%d files stay in %s: their table %s is missing or incomplete", len(images), folder, new)
        return []
    try:
        columns, rows = custom.read_rows(new)
        old_columns, old_rows = custom.read_rows(table) if table.exists() else (columns, [])
        if set(columns) != set(old_columns):
            raise DataError(f"{new} has the columns {columns}, but {table} has {old_columns}")
        labels, added = {row["path"]: row for row in old_rows}, []
        for row in rows:
            path = row["path"]
            partial = [folder / f"{path}{suffix}" for suffix in ("", *PARTIAL_SUFFIXES)]
            if is_inside(path) and path not in images and any(file.is_file() for file in partial):
                log.warning("%d files stay in %s: image %s is incomplete", len(images) + 1, folder, path)
                return []
            if not is_inside(path) or not (path in images or (root / path).is_file()):
                raise DataError(f"{new}: the image of row {','.join(row.values())} is missing")
            if labels.setdefault(path, row) is row:
                added.append(row)
            elif labels[path] != row:
                raise DataError(f"{new}: {path} is listed already, as {','.join(labels[path].values())}")
        custom.check_splits(new, labels.values())
    except DataError as error:
        raise RefusedError(f"{error}; nothing was moved; correct the table") from error
    if unlisted := sorted(images.keys() - labels):
        log.warning("%d files stay in %s: the table does not list them, such as %s", len(unlisted), folder, unlisted[0])
    moved = ingest([path for name, path in images.items() if name in labels], folder, root)
    if added:
        text = csv_text(old_columns, ([row[column] for column in old_columns] for row in added))
        if table.exists():  # keep its text unchanged
            before = table.read_bytes().decode()
            text = before + ("" if before.endswith("\n") else "\n") + text.partition("\n")[2]
        write_text(table, text)
    new.unlink()
    return moved
