"""What belongs together: one execution is one dvc process or one flow run, whatever it runs or takes from its cache.

The processes of an execution know each other by its key: kind, pid and start time of the owner.
"""

import os
import platform
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from pipeline.files import Files, read_json, write_json

VARIABLE = "SMALLER_STUDENT_EXECUTION"
"""Environment variable that hands a flow run's key to the dvc processes and stages below it."""


@dataclass(frozen=True)
class Execution:
    """An execution, named after the process that owns it.

    Attributes:
        kind: `dvc`, `flow` or `stage` (a stage that was started by hand).
        pid: Process id of the owner.
        started: Start of the owner, whole seconds since 1970; with the pid it names one process for ever.
    """

    kind: str
    pid: int
    started: int

    @property
    def key(self) -> str:
        return f"{self.kind}-{self.pid}-{self.started}"

    @classmethod
    def parse(cls, key: str) -> "Execution":
        kind, pid, started = key.split("-")
        return cls(kind, int(pid), int(started))

    @classmethod
    def of(cls, kind: str, process: psutil.Process) -> "Execution":
        return cls(kind, process.pid, int(process.create_time()))

    @property
    def alive(self) -> bool:
        return alive(self.pid, self.started)


def alive(pid: int, started: int) -> bool:
    """Whether the process of this number that started then still runs (numbers are used again)."""
    try:
        process = psutil.Process(pid)
        return int(process.create_time()) == started and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def current() -> Execution:
    """The execution that this process is part of."""
    if key := os.environ.get(VARIABLE):
        return Execution.parse(key)
    here = psutil.Process()
    if "DVC_STAGE" in os.environ:
        for ancestor in here.parents():
            if _is_dvc(ancestor):
                return Execution.of("dvc", ancestor)
    return Execution.of("stage", here)


def _is_dvc(process: psutil.Process) -> bool:
    """`dvc repro`, `python /venv/bin/dvc repro` and `python -m dvc repro`, but not `sh -c "dvc repro"`."""
    try:
        command = process.cmdline()
    except psutil.Error:
        return False
    return "dvc" in [Path(part).name.removesuffix(".exe") for part in command[:4]]


# --- one writer -------------------------------------------------------------------------------------------------------


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
            write_json(holder, {"pid": os.getpid(), "host": platform.node(), "since": since})
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


def retraining(files: Files) -> AbstractContextManager[None]:
    """Who holds this may retrain the checkout."""
    return sole_writer(files.tracking / "retrain.lock", "retraining")


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
