"""New data, before anything else: from a command of the user's, and from files that were put into a folder."""

import filecmp
import logging
import os
import shlex
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from pipeline.config import Params
from pipeline.files import Files, sync_folder, write_atomically
from pipeline.ops.process import Overtime, running

log = logging.getLogger(__name__)

SETTLED = 10.0
"""Seconds since a file was last written: a younger one may still be written."""
PATIENCE = 120.0
"""Seconds that young files are waited for; what is still written then is taken the next time."""
UNFINISHED = (".part", ".tmp", ".crdownload", ".filepart")
"""Endings of files that something still writes."""


class RefreshError(RuntimeError):
    """New data did not come, or cannot be taken."""

    exit_code = 3


class RefusedError(RefreshError):
    """The same would happen again at once."""


def refresh(files: Files, params: Params) -> list[str]:
    """Run `retrain.refresh`, then move what lies in `retrain.incoming` into `data.root`.

    Args:
        files: Of the checkout.
        params: Of the checkout.

    Returns:
        Paths of the files that were moved, relative to `data.root`.

    Raises:
        RefreshError: If the command fails, or a file would take the place of another; then nothing is moved.
    """
    if params.retrain.refresh:
        _command(params.retrain.refresh, params.retrain.limit_hours)
    folder = files.root / params.retrain.incoming
    if not params.retrain.incoming or not folder.is_dir():
        return []
    came = _arrived(folder)
    if came and params.data.source == "vehicles":
        raise RefusedError(
            f"{folder} holds {len(came)} files, but `data.source` vehicles renders its own images; choose another one"
        )
    return take_in(came, folder, files.root / params.data.root)


def _command(text: str, hours: float) -> None:
    last = ""
    try:
        with running(*shlex.split(text), hours=hours) as process:
            for line in process.stdout or ():
                if line := line.rstrip():
                    last = line
                    log.info(line)
            code = process.wait()
    except Overtime as error:
        raise RefusedError(f"`retrain.refresh`: {error} (`retrain.limit_hours`)") from error
    if code:
        raise RefreshError(f"`retrain.refresh` ended with {code}: {last}")


def _arrived(folder: Path) -> list[Path]:
    """Regular files that nobody writes any more, in the order of their names; young ones are waited for a while."""
    seen: dict[Path, tuple[int, int]] = {}
    deadline = time.monotonic() + PATIENCE
    while True:
        found = dict(_whole(folder))
        young = [
            path
            for path, (size, written) in found.items()
            if time.time() - written / 1e9 < SETTLED and seen.get(path) != (size, written)
        ]
        if not young or time.monotonic() > deadline:
            break
        log.info("%d files may still be written: looking again in %.0f s", len(young), SETTLED)
        time.sleep(SETTLED)
        seen = found
    late = set(young)
    arrived = [path for path in found if path not in late]
    for path in sorted(set(_visible(folder)) - set(arrived)):
        log.warning("%s stays where it is: %s", path, "still written" if _plain(path) else "no plain file")
    return arrived


def _visible(folder: Path) -> Iterator[Path]:
    """Whatever is no folder and not hidden, in the order of names."""
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if not hidden and (path.is_symlink() or not path.is_dir()):
            yield path


def _plain(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _whole(folder: Path) -> Iterator[tuple[Path, tuple[int, int]]]:
    """Regular files that are not named as unfinished, with size and time of the last change (ns)."""
    for path in _visible(folder):
        if _plain(path) and not path.name.lower().endswith(UNFINISHED):
            with suppress(FileNotFoundError):  # renamed by whoever writes it
                found = path.stat()
                yield path, (found.st_size, found.st_mtime_ns)


def take_in(came: list[Path], folder: Path, target: Path) -> list[str]:
    """Move files, each at once; what a crash interrupted goes on at the next call.

    Args:
        came: Files below `folder`.
        folder: Where they lie.
        target: Where they go, under the same relative paths; one that is there with the same content only goes away.

    Returns:
        Relative paths of those that were not there.

    Raises:
        RefreshError: Before anything is moved, if another content is there.
    """
    places = {path: target / path.relative_to(folder) for path in came}
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
    for left in sorted((path for path in folder.rglob("*") if path.is_dir() and not path.is_symlink()), reverse=True):
        if not any(left.iterdir()):
            left.rmdir()
    return moved


def _move(path: Path, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.rename(path, place)
        sync_folder(place.parent)
    except OSError:  # another file system
        write_atomically(place, lambda temporary: shutil.copyfile(path, temporary))
        path.unlink()
