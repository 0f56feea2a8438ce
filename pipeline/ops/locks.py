"""One writer at a time, by locks of the system.

`smaller-student retrain` imports this before all else, so that who comes second is told at once: no heavy import here.
"""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from pipeline.files import Files, read_json, write_json


class Busy(RuntimeError):
    """Another process does this already."""

    exit_code = 75


@contextmanager
def sole_writer(path: Path, what: str, patience: float = 0) -> Iterator[None]:
    """Hold a lock that the system gives back when this process ends, however it ends; to hold it twice is no harm.

    Args:
        path: Lock file; who holds it stands beside it.
        what: What is going on, for the message.
        patience: Seconds to wait for the lock.

    Raises:
        Busy: Naming the holder's process, host and since when.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    holder = path.with_suffix(".json")
    lock = FileLock(path, is_singleton=True, thread_local=False)
    try:
        lock.acquire(timeout=patience)
    except Timeout as error:
        raise Busy(f"busy: {what} runs already ({_holder(holder)}); wait for it or end it") from error
    try:
        if lock.lock_counter == 1:
            since = datetime.now().astimezone().isoformat(" ", "seconds")
            write_json(holder, {"pid": os.getpid(), "host": socket.gethostname(), "since": since})
        yield
    finally:
        if lock.lock_counter == 1:
            holder.unlink(missing_ok=True)
        lock.release()


def is_held(path: Path) -> bool:
    """Whether any process, this one too, holds the lock of `sole_writer`; a killed one holds nothing."""
    if not path.is_file():
        return False
    try:
        with FileLock(path, timeout=0):
            return False
    except Timeout:
        return True


def retraining(files: Files, patience: float = 0) -> AbstractContextManager[None]:
    """Who holds this may retrain the checkout."""
    return sole_writer(files.tracking / "retrain.lock", "retraining", patience)


def running_stage(files: Files, patience: float = 0) -> AbstractContextManager[None]:
    """Who holds this may run a stage; it lies in the working copy, of which `dvc exp run --temp` has one of its own."""
    return sole_writer(files.root / ".tracking" / "stage.lock", "a stage of this checkout", patience)


def retraining_began(files: Files) -> datetime | None:
    """When the last retraining of the checkout that came to its end began."""
    try:
        return datetime.fromisoformat(read_json(_last(files))["began"])
    except (OSError, ValueError, KeyError):
        return None


def note_retraining(files: Files, began: datetime) -> None:
    """One came to its end: whatever was due before it began has nothing left to do."""
    write_json(_last(files), {"began": began.isoformat()})


def _last(files: Files) -> Path:
    return files.tracking / "retraining.json"


def _holder(path: Path) -> str:
    for _ in range(5):  # who has just got the lock has not said so yet
        with suppress(OSError, ValueError, KeyError):
            holder = read_json(path)
            return f"pid {holder['pid']} on {holder['host']} since {holder['since']}"
        time.sleep(0.03)
    return "holder unknown"
