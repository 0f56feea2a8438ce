"""One writer at a time, by locks of the operating system that end with the process that holds them."""

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
"""Seconds between two attempts to get a lock."""


class BusyError(RuntimeError):
    """Another process does this already."""

    exit_code = 75


@contextmanager
def locked(path: Path, what: str, patience: float = 0) -> Iterator[None]:
    """Hold a lock; a process that holds it already may take it again.

    Args:
        path: Lock file; it stays.
        what: What the holder does, for the message.
        patience: Seconds to wait for the lock; for ever where negative.

    Raises:
        BusyError: Naming the holder's process, host and since when.
        OSError: If the file system has no locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, is_singleton=True, mode=0o666)
    try:
        lock.acquire(timeout=patience, poll_interval=_POLL)
    except Timeout:
        raise BusyError(f"busy: {what} runs already ({holder(path)}); wait for it or end it") from None
    try:
        if lock.lock_counter == 1:
            _sign(path)
        yield
    finally:
        if lock.lock_counter == 1:
            _signature(path).unlink(missing_ok=True)
        lock.release()


def is_held(path: Path) -> bool:
    """Whether a process holds the lock, this one included."""
    if not path.is_file():
        return False
    lock = FileLock(path, is_singleton=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False


def retraining(files: Files, patience: float = 0) -> AbstractContextManager[None]:
    """Hold the right to retrain the checkout."""
    return locked(files.tracking / "retrain.lock", "retraining", patience)


def running_stage(files: Files, patience: float = 0) -> AbstractContextManager[None]:
    """Hold the right to run a stage in this working copy; each run of `dvc exp run --temp` has one of its own."""
    return locked(files.root / ".tracking" / "stage.lock", "a stage of this checkout", patience)


def retraining_began(files: Files) -> "datetime | None":
    """When the last retraining of the checkout that came to its end began."""
    from datetime import datetime

    try:
        return datetime.fromisoformat(read_json(_last(files))["began"])
    except (OSError, ValueError, KeyError):
        return None


def note_retraining(files: Files, began: "datetime") -> None:
    """Note that a retraining came to its end: whatever was due before it began has nothing left to do."""
    write_json(_last(files), {"began": began.isoformat()})


def _last(files: Files) -> Path:
    return files.tracking / "retraining.json"


# --- who holds a lock -------------------------------------------------------------------------------------------------


def _signature(path: Path) -> Path:
    return path.with_name(f"{path.name}.holder")  # no *.json, which records are


def _sign(path: Path) -> None:
    from datetime import datetime
    from socket import gethostname

    since = datetime.now().astimezone().isoformat(" ", "seconds")
    write_json(_signature(path), {"pid": os.getpid(), "host": gethostname(), "since": since})


def holder(path: Path) -> str:
    """Process, host and beginning of whoever holds a lock, in words."""
    for _ in range(5):  # a process that has just got the lock has not written its name yet
        with suppress(OSError, ValueError, KeyError):
            found = read_json(_signature(path))
            return f"pid {found['pid']} on {found['host']} since {found['since']}"
        time.sleep(0.03)
    return "holder unknown"
