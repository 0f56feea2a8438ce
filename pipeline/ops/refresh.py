"""New data, before anything else: from a command of the user's, and from files that were put into a folder."""

import filecmp
import logging
import os
import shlex
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from pipeline.config import Params
from pipeline.files import Files, sync_folder, write_atomically
from pipeline.ops.process import running

log = logging.getLogger(__name__)

SETTLED = 10.0
"""Seconds since a file was last written: a younger one may still be written, and waits for the next time."""
UNFINISHED = (".part", ".tmp", ".crdownload", ".filepart")
"""Endings of files that something still writes."""


class RefreshError(RuntimeError):
    """New data did not come, or cannot be taken."""

    exit_code = 3


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
        _command(params.retrain.refresh)
    folder = files.root / params.retrain.incoming
    if not params.retrain.incoming or not folder.is_dir():
        return []
    came = list(_arrived(folder))
    if came and params.data.source == "vehicles":
        raise RefreshError(
            f"{folder} holds {len(came)} files, but `data.source` vehicles renders its own images; choose another one"
        )
    return take_in(came, folder, files.root / params.data.root)


def _command(text: str) -> None:
    last = ""
    with running(*shlex.split(text)) as process:
        for line in process.stdout or ():
            if line := line.rstrip():
                last = line
                log.info(line)
        code = process.wait()
    if code:
        raise RefreshError(f"`retrain.refresh` ended with {code}: {last}")


def _arrived(folder: Path) -> Iterator[Path]:
    """Regular files that nobody writes any more, in the order of their names; hidden ones are none."""
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if any(part.startswith(".") for part in parts) or (path.is_dir() and not path.is_symlink()):
            continue
        if path.is_symlink() or not path.is_file():
            log.warning("%s is no plain file and stays where it is", path)
        elif path.name.lower().endswith(UNFINISHED) or time.time() - path.stat().st_mtime < SETTLED:
            log.info("%s may still be written and waits for the next time", path)
        else:
            yield path


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
        raise RefreshError(
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
