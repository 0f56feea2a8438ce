"""File locks that allow one process at a time; the operating system releases them when the process ends."""

import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from pipeline.files import Files, read_json, write_json

if TYPE_CHECKING:
    from datetime import datetime

_POLL = 0.02
"""Seconds between two attempts to acquire a lock."""


class BusyError(RuntimeError):
    """Another process holds the lock."""

    exit_code = 75


@contextmanager
def locked(path: Path, what: str, timeout: float = 0) -> Iterator[None]:
    """Hold a lock; a process that holds it already may acquire it again.

    Args:
        path: Lock file; it is not deleted.
        what: Work that the lock protects, for the error message.
        timeout: Seconds to wait for the lock; negative: without limit.

    Raises:
        BusyError: If another process holds the lock; names its id, its host and since when it holds it.
        OSError: If the file system does not support locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, is_singleton=True, mode=0o666)
    try:
        lock.acquire(timeout=timeout, poll_interval=_POLL)
    except Timeout:
        raise BusyError(f"busy: {what} is already running ({holder(path)}); wait for it or end it") from None
    try:
        if lock.lock_counter == 1:
            _write_holder(path)
        yield
    finally:
        if lock.lock_counter == 1:
            _holder_file(path).unlink(missing_ok=True)
        lock.release()


def is_held(path: Path) -> bool:
    """Return whether any process, including this one, holds the lock."""
    if not path.is_file():
        return False
    lock = FileLock(path, is_singleton=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False


def retrain_lock(files: Files, timeout: float = 0) -> AbstractContextManager[None]:
    """Hold the lock of a retraining of the checkout."""
    return locked(files.tracking / "retrain.lock", "a retraining", timeout)


def stage_lock(files: Files, timeout: float = 0) -> AbstractContextManager[None]:
    """Hold the lock of a running stage; each working copy of `dvc exp run --temp` has its own."""
    return locked(files.root / ".tracking" / "stage.lock", "a stage of this checkout", timeout)


def last_retraining_start(files: Files) -> "datetime | None":
    """Return when the last completed retraining of the checkout began."""
    from datetime import datetime

    try:
        return datetime.fromisoformat(read_json(_last_retraining(files))["began"])
    except (OSError, ValueError, KeyError):
        return None


def save_retraining_start(files: Files, start: "datetime") -> None:
    """Save when a completed retraining began: runs that were due before then have nothing left to do."""
    write_json(_last_retraining(files), {"began": start.isoformat()})


def _last_retraining(files: Files) -> Path:
    return files.tracking / "retraining.json"


# --- holder of a lock -------------------------------------------------------------------------------------------------


def _holder_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.holder")  # not *.json, the pattern of run records


def _write_holder(path: Path) -> None:
    from datetime import datetime
    from socket import gethostname

    since = datetime.now().astimezone().isoformat(" ", "seconds")
    write_json(_holder_file(path), {"pid": os.getpid(), "host": gethostname(), "since": since})


def holder(path: Path) -> str:
    """Describe the holder of a lock: process id, host and time of acquisition."""
    for _ in range(5):  # a process that has just acquired the lock has not written its file yet
        with suppress(OSError, ValueError, KeyError):
            found = read_json(_holder_file(path))
            return f"pid {found['pid']} on {found['host']} since {found['since']}"
        time.sleep(0.03)
    return "holder unknown"
