"""Fetch new data before a retraining: run `retrain.refresh`, and move files from `retrain.incoming` to `data.root`."""

import csv
import filecmp
import io
import logging
import os
import shlex
import shutil
import time
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from pipeline.config import Params
from pipeline.data import custom
from pipeline.data.images import open_image, upright_rgb
from pipeline.data.manifest import DataError, is_inside
from pipeline.data.parallel import in_threads
from pipeline.files import Files, csv_text, sync_folder, write_atomically, write_text
from pipeline.flow.raw_data import check_root, is_utf8, tracking_file
from pipeline.system.process import TimeLimitError, child_process

log = logging.getLogger(__name__)

MIN_AGE = 10.0
"""Seconds since the last change of a file below which it may be incomplete."""
MAX_WAIT = 120.0
"""Seconds to wait for incomplete files before they are left for the next run."""
PARTIAL_SUFFIXES = (".part", ".tmp", ".crdownload", ".filepart")
"""Suffixes of files that a download is still writing."""
SYSTEM_FILES = custom.SYSTEM_FILES | {"@eadir"}
"""Names in lower case of files and folders that systems leave behind; hidden ones need no entry."""
BOX = ("x", "y", "width", "height", "x1", "y1", "x2", "y2")
"""Columns of a box: a picture may have several rows, one for each box."""


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
    try:
        if tracking_file(files, params) and not root.is_dir():  # or the new images alone would become the data set
            check_root(files, params)
        if params.data.source == "csv":
            moved = _ingest_with_table(paths, folder, root, table)
        else:
            moved = ingest(_decodable(paths, folder), folder, root)
    except DataError as error:
        raise RefusedError(str(error)) from error
    except OSError as error:
        reason = f"{error.strerror}: {error.filename}" if error.filename else str(error)
        raise RefreshError(
            f"new files could not be moved to {root} ({reason}); repair that, the next run moves the others"
        ) from error
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


def _decodable(paths: Sequence[Path], folder: Path) -> list[Path]:
    """Return the pictures that can be decoded; a broken one would stop stage `prepare` in every later retraining."""
    reasons = dict(zip(paths, in_threads(_why_undecodable, paths), strict=True))
    broken = {path: reason for path, reason in reasons.items() if reason}
    for reason in list(broken.values())[:1]:  # messages of decoders hold numbers, so each may differ
        _report_left(folder, dict.fromkeys(broken, f"it cannot be decoded ({reason}); replace or delete it"))
    return [path for path in paths if path not in broken]


def _why_undecodable(path: Path) -> str:
    try:
        with open_image(path) as image:
            upright_rgb(image)
    except Exception as error:  # decoders raise any
        text = str(error).replace(f" {str(path)!r}", "").replace(str(path), "the file")
        return text or type(error).__name__
    return ""


def _visible(folder: Path) -> Iterator[Path]:
    """Yield everything except folders, hidden files and files that systems leave behind, sorted by name."""
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        hidden = any(part.startswith(".") or part.lower() in SYSTEM_FILES for part in parts)
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
    spelled = Counter(unicodedata.normalize("NFC", str(new)) for new in targets.values())
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
        labels, added = {_key(row): row for row in old_rows}, []
        for row in rows:
            path = row["path"]
            partial = [folder / f"{path}{suffix}" for suffix in ("", *PARTIAL_SUFFIXES)]
            if is_inside(path) and path not in images and any(file.is_file() for file in partial):
                log.warning("%d files stay in %s: image %s is incomplete", len(images) + 1, folder, path)
                return []
            if not is_inside(path) or not (path in images or (root / path).is_file()):
                raise DataError(f"{new}: the image of row {','.join(row.values())} is missing")
            if labels.setdefault(_key(row), row) is row:
                added.append(row)
            elif labels[_key(row)] != row:
                raise DataError(f"{new}: {path} is listed already, as {','.join(labels[_key(row)].values())}")
        custom.check_splits(new, labels.values())
    except DataError as error:
        raise RefusedError(f"{error}; nothing was moved; correct the table") from error
    listed = {row["path"] for row in labels.values()}
    _report_left(folder, {images[name]: "the table does not list it" for name in sorted(images.keys() - listed)})
    wanted = [path for name, path in images.items() if name in listed]
    if len(_decodable(wanted, folder)) < len(wanted):
        log.warning("the table %s waits for the pictures that cannot be decoded", new)
        return []
    moved = ingest(wanted, folder, root)
    if added:
        if table.exists():
            write_text(table, _appended(table.read_bytes().decode(), added))
        else:
            write_text(table, csv_text(columns, ([row[column] for column in columns] for row in added)))
    new.unlink()
    return moved


def _key(row: custom.Row) -> tuple[str, ...]:
    """Return what may occur only once in a table: a picture, or a box in it."""
    return (row["path"], *(row.get(column, "") for column in BOX))


def _appended(text: str, rows: Sequence[custom.Row]) -> str:
    """Return the text of a table with further rows, which get its delimiter and columns; the text stays as it is."""
    header = text.lstrip("\ufeff").splitlines()[0]
    delimiter = max(",;\t", key=header.count)
    columns = [column.strip().lower() for column in next(csv.reader([header], delimiter=delimiter))]
    added = io.StringIO(newline="")
    writer = csv.writer(added, delimiter=delimiter, lineterminator="\n")
    writer.writerows([row.get(column, "") for column in columns] for row in rows)
    return text + ("" if text.endswith("\n") else "\n") + added.getvalue()
