"""Repair DVC's lock table (`.dvc/tmp/rwlock`) in the two cases that DVC does not repair itself.

DVC drops entries whose process is gone. It cannot know that another program got the process id of a killed dvc, which
happens within seconds in a container that restarts: it then refuses to run until somebody deletes the table. And a
table that it cannot read, because a dvc was killed while writing it, ends every command without naming a remedy.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil

from pipeline.files import Files
from pipeline.system.locks import BusyError, retraining, running_stage
from pipeline.tracking.execution import runs_dvc


def defects(files: Files) -> list[str]:
    """Say in one sentence each what in the table stops DVC; empty where a dvc of the table is alive."""
    path = _table(files)
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        read = [entry for readers in held.get("read", {}).values() for entry in readers]
        noted = {int(entry["pid"]): str(entry["cmd"]) for entry in [*held.get("write", {}).values(), *read]}
    except FileNotFoundError:
        return []
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        return [f"{path} is damaged ({type(error).__name__}: {error})"]
    alive = {pid: command for pid, command in noted.items() if psutil.pid_exists(pid)}
    if any(map(_is_dvc, alive)):
        return []
    return [f"process {pid} (`{command}`) is gone" for pid, command in alive.items()]


def release_dead(files: Files) -> list[str]:
    """Remove a table that stops DVC although nobody works in the checkout.

    Returns:
        What was wrong, one sentence each; empty where there was nothing to do.

    Raises:
        BusyError: If somebody works in this checkout.
    """
    if not defects(files):
        return []
    with _at_rest(files):
        if found := defects(files):
            _table(files).unlink()  # what DVC's own message advises
        return [f"{sentence}: its locks are released" for sentence in found]


def _table(files: Files) -> Path:
    return files.root / ".dvc" / "tmp" / "rwlock"


def _is_dvc(pid: int) -> bool:
    try:
        return runs_dvc(psutil.Process(pid).cmdline())
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:  # of another user: assume that it is one
        return True


@contextmanager
def _at_rest(files: Files) -> Iterator[None]:
    """Hold every lock that somebody who works in this checkout would hold.

    The process ids of another container mean nothing here, but its file locks are visible: that of a retraining, that
    of a stage, and DVC's own, which it holds except while a stage runs.
    """
    from dvc.config import Config  # takes a second
    from dvc.lock import LockError, make_lock

    folder = _table(files).parent
    hardlink = bool(Config(str(files.root / ".dvc"))["core"].get("hardlink_lock", False))  # for NFS
    with retraining(files), running_stage(files), ExitStack() as held:
        try:
            for name in ("lock", "rwlock.lock"):
                held.enter_context(make_lock(str(folder / name), tmp_dir=str(folder), hardlink_lock=hardlink))
        except LockError as error:
            raise BusyError("busy: a dvc works in this checkout; wait for it or end it") from error
        yield
