"""One writer at a time, by locks of the system.

`smaller-student retrain` imports this before all else, so that who comes second is told at once: nothing heavy is
imported here, and a library for locks would need as long as all the rest.
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.files import Files, read_json, write_json

if TYPE_CHECKING:
    from datetime import datetime

_PAUSE = 0.02
"""Seconds between two attempts to get a lock."""
_mine: set[Path] = set()
"""Locks that this process holds as `sole_writer`."""


class Busy(RuntimeError):
    """Another process does this already."""

    exit_code = 75


@contextmanager
def locked(path: Path, what: str, patience: float = -1) -> Iterator[None]:
    """Hold a lock that the system gives back when this process and what it forked have ended, however they end.

    Args:
        path: Lock file; it stays, since one that is removed can be locked twice.
        what: What is going on, for the message.
        patience: Seconds to wait for the lock; for ever where negative.

    Raises:
        Busy: Naming the holder, where `sole_writer` holds it.
        OSError: If the file system knows no locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + patience
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        while not _lock(handle):
            if patience >= 0 and until <= time.monotonic():
                raise Busy(f"busy: {what} runs already ({_holder(path.with_suffix('.json'))}); wait for it or end it")
            time.sleep(_PAUSE)
        try:
            yield
        finally:
            _unlock(handle)  # closing is not enough: a child that was forked meanwhile has the file open too
    finally:
        os.close(handle)


@contextmanager
def sole_writer(path: Path, what: str, patience: float = 0) -> Iterator[None]:
    """Hold a lock and say who does, in a file beside it; to take it again within is no harm.

    Args:
        path: Lock file.
        what: What is going on, for the message.
        patience: Seconds to wait for the lock; for ever where negative.

    Raises:
        Busy: Naming the holder's process, host and since when.
    """
    if path in _mine:
        yield
        return
    with locked(path, what, patience):
        from datetime import datetime
        from socket import gethostname

        holder = path.with_suffix(".json")
        try:
            _mine.add(path)
            since = datetime.now().astimezone().isoformat(" ", "seconds")
            write_json(holder, {"pid": os.getpid(), "host": gethostname(), "since": since})
            yield
        finally:
            _mine.discard(path)
            holder.unlink(missing_ok=True)


def is_held(path: Path) -> bool:
    """Whether any process, this one too, holds the lock of `sole_writer`; a killed one holds nothing."""
    try:
        handle = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        if free := _lock(handle):
            _unlock(handle)
        return not free
    finally:
        os.close(handle)


def retraining(files: Files, patience: float = 0) -> AbstractContextManager[None]:
    """Who holds this may retrain the checkout."""
    return sole_writer(files.tracking / "retrain.lock", "retraining", patience)


def running_stage(files: Files, patience: float = 0) -> AbstractContextManager[None]:
    """Who holds this may run a stage; it lies in the working copy, of which `dvc exp run --temp` has one of its own."""
    return sole_writer(files.root / ".tracking" / "stage.lock", "a stage of this checkout", patience)


def retraining_began(files: Files) -> "datetime | None":
    """When the last retraining of the checkout that came to its end began."""
    from datetime import datetime

    try:
        return datetime.fromisoformat(read_json(_last(files))["began"])
    except (OSError, ValueError, KeyError):
        return None


def note_retraining(files: Files, began: "datetime") -> None:
    """One came to its end: whatever was due before it began has nothing left to do."""
    write_json(_last(files), {"began": began.isoformat()})


if sys.platform == "win32":
    import msvcrt

    def _lock(handle: int) -> bool:
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except PermissionError:
            return False
        return True

    def _unlock(handle: int) -> None:
        msvcrt.locking(handle, msvcrt.LK_UNLCK, 1)

else:
    import fcntl

    def _lock(handle: int) -> bool:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _unlock(handle: int) -> None:
        fcntl.flock(handle, fcntl.LOCK_UN)


def _last(files: Files) -> Path:
    return files.tracking / "retraining.json"


def _holder(path: Path) -> str:
    for _ in range(5):  # who has just got the lock has not said so yet
        with suppress(OSError, ValueError, KeyError):
            holder = read_json(path)
            return f"pid {holder['pid']} on {holder['host']} since {holder['since']}"
        time.sleep(0.03)
    return "holder unknown"
