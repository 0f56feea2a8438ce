"""Files in `retrain.incoming`: which are complete and usable, and their move to `data.root`."""

import filecmp
import logging
import os
import shutil
import time
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from pipeline.config import Data
from pipeline.data.custom import list_folder
from pipeline.data.folders import is_left_behind, walk
from pipeline.data.inspection import inspect
from pipeline.data.layout import UNASSIGNED, UNASSIGNED_TEST
from pipeline.data.manifest import TEST, UNLABELLED, DataError, Item, first_few
from pipeline.files import sync_folder, write_atomically
from pipeline.flow.raw_data import is_utf8
from pipeline.labels import clean_label
from pipeline.protocols import JUNK

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


def visible_files(folder: Path) -> Iterator[Path]:
    """Yield everything except folders, hidden files and files that systems leave behind, sorted by name."""
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        hidden = any(part.startswith(".") or is_left_behind(part) for part in parts)
        if not hidden and (path.is_symlink() or not path.is_dir()):
            yield path


def complete_files(folder: Path) -> list[Path]:
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
    warn_of_files_left(folder, {path: _why_left(path) for path in visible_files(folder) if path not in moving})
    return complete


def _why_left(path: Path) -> str:
    if not is_utf8(str(path)):
        return "its name is not UTF-8, which DVC cannot store; rename it"
    if path.is_symlink():
        return "it is a link; move the file itself there"
    return "it is incomplete" if path.is_file() else "it is not a regular file"


def _candidates(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Yield regular files without a partial suffix, and their state."""
    for path in visible_files(folder):
        if path.is_file() and not path.is_symlink() and not path.name.lower().endswith(PARTIAL_SUFFIXES):
            with suppress(FileNotFoundError):  # renamed meanwhile
                yield path, path.stat()


def warn_of_files_left(folder: Path, left: Mapping[Path, str]) -> None:
    """Log one warning for each reason why files stay in a folder, with an example."""
    for reason, count in Counter(left.values()).items():
        example = next(path for path, other in left.items() if other == reason).relative_to(folder)
        name = os.fsencode(example).decode(errors="backslashreplace")
        files = "1 file stays" if count == 1 else f"{count} files stay"
        log.warning("%s in %s, such as %s: %s", files, folder, name, reason)


def usable_pictures(paths: Sequence[Path], folder: Path) -> list[Path]:
    """Return the pictures that can be decoded; a broken one would stop stage `prepare` in every later retraining."""
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    reasons = dict(inspect([Item(name, "", "", "") for name in names], folder).quarantined)
    warn_of_unusable_files(folder, reasons)
    return [path for name, path in names.items() if name not in reasons]


def warn_of_unusable_files(folder: Path, reasons: Mapping[str, str]) -> None:
    """Log one warning for the files that cannot be used, with the first reason."""
    for name, reason in list(reasons.items())[:1]:  # messages of decoders hold names and numbers, so each may differ
        text = f"it cannot be used ({reason.replace(f' {name!r}', '')}); replace or delete it"
        warn_of_files_left(folder, dict.fromkeys((folder / name for name in reasons), text))


def check_folders(paths: Sequence[Path], folder: Path, root: Path, data: Data) -> None:
    """Check that stage `prepare` can list `root` with the new files in it (source folder).

    Raises:
        DataError: If it cannot, or an identity would be in training and in test.
    """
    names = [path.relative_to(folder).as_posix() for path in paths]
    if any("/" in name for name in names):  # a file outside of a folder of an identity is no image of any
        present, new = walk(root) if root.is_dir() else (), ((name, "") for name in names)
        try:
            check_identities(list_folder(root, [*present, *new], data).items, data)
        except DataError as error:
            raise DataError(f"with the new files, {error}; nothing was moved") from error


def check_identities(items: Iterable[Item], data: Data) -> None:
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


def ingest(paths: Sequence[Path], folder: Path, target: Path) -> list[str]:
    """Move files from below `folder` to the same relative paths below `target`, each atomically.

    If the target has a file with the same content, the new one is deleted; so the next call continues after a crash.

    Returns:
        Relative paths of the files that are new in `target`.

    Raises:
        RefusedError: If the target has a file with different content; nothing is moved then.
    """
    targets = {path: target_of(path.relative_to(folder), target) for path in paths}
    if taken := [new for old, new in targets.items() if new.exists() and not _same(old, new)]:
        raise RefusedError(
            f"{taken[0]} exists with different content ({len(taken)} such files), so nothing was moved; rename the new "
            "files"
        )
    spelled = Counter(nfc(str(new)) for new in targets.values())
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


def target_of(path: Path, folder: Path) -> Path:
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


def nfc(path: str) -> str:
    """Return a path in Unicode normal form C."""
    return unicodedata.normalize("NFC", path)
