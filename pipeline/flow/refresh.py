"""Fetch new data before a retraining: run `retrain.refresh`, and move files from `retrain.incoming` to `data.root`."""

import logging
import shlex
from contextlib import suppress

from pipeline.config import Params
from pipeline.data.folders import is_left_behind
from pipeline.data.manifest import DataError
from pipeline.files import Files
from pipeline.flow.incoming import (
    RefreshError,
    RefusedError,
    check_folders,
    complete_files,
    ingest,
    usable_pictures,
    visible_files,
)
from pipeline.flow.incoming_table import ingest_with_table
from pipeline.flow.raw_data import saved_in_dvc
from pipeline.system.process import TimeLimitError, child_process

log = logging.getLogger(__name__)


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
    if source not in ("folder", "csv") and (count := len(list(visible_files(folder)))):
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
    paths = complete_files(folder)
    try:
        if params.data.source == "csv":
            moved = ingest_with_table(paths, folder, root, params.data)
        else:
            pictures = usable_pictures(paths, folder)
            check_folders(pictures, folder, root, params.data)
            moved = ingest(pictures, folder, root)
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
