"""Repair DVC's lock table (`.dvc/tmp/rwlock`) in the two cases that DVC does not repair itself.

DVC drops entries whose process is gone, but does not notice that the process id of a killed dvc was reused, which
happens within seconds in a restarted container: it then fails until the table is deleted. And if a dvc was killed while
it wrote the table, the table is damaged and every dvc command fails without naming a remedy.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil

from pipeline.files import Files
from pipeline.system.locks import BusyError, retrain_lock, stage_lock
from pipeline.tracking.execution import is_dvc_command


def defects(files: Files) -> list[str]:
    """Return a sentence for each defect of the table that blocks DVC; empty if a dvc in the table is running."""
    path = _table(files)
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        read = [entry for readers in held.get("read", {}).values() for entry in readers]
        commands = {int(entry["pid"]): str(entry["cmd"]) for entry in [*held.get("write", {}).values(), *read]}
    except FileNotFoundError:
        return []
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        return [f"{path} is damaged ({type(error).__name__}: {error})"]
    alive = {pid: command for pid, command in commands.items() if psutil.pid_exists(pid)}
    if any(map(_is_dvc, alive)):
        return []
    return [f"process {pid} (`{command}`) is gone" for pid, command in alive.items()]


def release_dead(files: Files) -> list[str]:
    """Delete a table that blocks DVC although no process works in the checkout.

    Returns:
        One sentence for each repaired defect.

    Raises:
        BusyError: If a process works in the checkout.
    """
    if not defects(files):
        return []
    with _idle_checkout(files):
        if found := defects(files):
            _table(files).unlink()  # the remedy that DVC documents
        return [f"{sentence}: its locks are released" for sentence in found]


def _table(files: Files) -> Path:
    return files.root / ".dvc" / "tmp" / "rwlock"


def _is_dvc(pid: int) -> bool:
    try:
        return is_dvc_command(psutil.Process(pid).cmdline())
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:  # a process of another user: assume that it is dvc
        return True


@contextmanager
def _idle_checkout(files: Files) -> Iterator[None]:
    """Hold every lock that a process working in the checkout would hold.

    Process ids of other containers mean nothing here, but their file locks are visible: those of a retraining, of a
    stage, and of DVC, which holds its own except while a stage runs.

    Raises:
        BusyError: If another process holds one of them.
    """
    from dvc.config import Config  # takes a second
    from dvc.lock import LockError, make_lock

    folder = _table(files).parent
    hardlink = bool(Config(str(files.root / ".dvc"))["core"].get("hardlink_lock", False))  # for NFS
    with retrain_lock(files), stage_lock(files), ExitStack() as held:
        try:
            for name in ("lock", "rwlock.lock"):
                held.enter_context(make_lock(str(folder / name), tmp_dir=str(folder), hardlink_lock=hardlink))
        except LockError as error:
            raise BusyError("busy: dvc is running in this checkout; wait for it or end it") from error
        yield
