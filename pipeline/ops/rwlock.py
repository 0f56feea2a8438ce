"""DVC's table of who reads and writes what: which of its entries are dead, and how they are taken out.

It holds numbers of processes, and one that was killed stays in it. DVC passes over numbers that nobody has; but numbers
are used again, in a container that starts anew within seconds, and then DVC waits for a stranger for ever.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from pipeline.files import Files, write_json
from pipeline.ops.execution import runs_dvc
from pipeline.ops.locks import Busy, retraining, running_stage


class Damaged(ValueError):
    """The table cannot be read: a dvc was killed while it wrote it."""


def table(files: Files) -> Path:
    """Where DVC keeps it."""
    return files.root / ".dvc" / "tmp" / "rwlock"


def noted(files: Files) -> dict[int, str]:
    """Number and command of each process that is in the table.

    Raises:
        Damaged: If it cannot be read.
    """
    held = _read(table(files))
    try:
        ones = [*held["write"].values(), *(one for several in held["read"].values() for one in several)]
        return {int(one["pid"]): str(one["cmd"]) for one in ones}
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise Damaged(f"{table(files)} is damaged ({type(error).__name__}: {error})") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        text = "{}"
    if not text:
        raise Damaged(f"{path} is empty")
    try:
        held = json.loads(text)
    except ValueError as error:
        raise Damaged(f"{path} is damaged ({error})") from error
    if not isinstance(held, dict):
        raise Damaged(f"{path} is damaged (no mapping)")
    return {"write": {}, "read": {}, **held}


def is_dvc(number: int) -> bool:
    """Whether a process of that number lives here that may be the dvc that was noted; in doubt it is."""
    try:
        return runs_dvc(psutil.Process(number).cmdline())
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True


@contextmanager
def at_rest(files: Files) -> Iterator[None]:
    """Hold all that somebody who works in this checkout would hold, in whatever container.

    A dvc of another container cannot be seen, but locks of the system can: of a retraining, of a stage, and DVC's own,
    which it holds except while a stage runs.

    Raises:
        Busy: If somebody works here.
    """
    from dvc.config import Config  # imports much
    from dvc.lock import LockError, make_lock

    folder = table(files).parent
    hardlink = bool(Config(str(files.root / ".dvc"))["core"].get("hardlink_lock", False))  # DVC's, for NFS
    with retraining(files), running_stage(files), ExitStack() as held:
        try:
            for name in ("lock", "rwlock.lock"):
                held.enter_context(make_lock(str(folder / name), tmp_dir=str(folder), hardlink_lock=hardlink))
        except LockError as error:
            raise Busy("busy: a dvc works in this checkout; wait for it or end it") from error
        yield


def release_dead(files: Files) -> list[str]:
    """Take out of the table what is dead, or remove one that cannot be read.

    Args:
        files: Of the checkout.

    Returns:
        What was done, a sentence each; nothing where nothing was dead.

    Raises:
        Busy: If somebody works in this checkout.
    """
    path = table(files)
    with suppress(Damaged):
        if all(map(is_dvc, noted(files))):
            return []
    with at_rest(files):
        try:
            dead = {number: command for number, command in noted(files).items() if not is_dvc(number)}
        except Damaged as error:
            path.unlink()
            return [f"{error}: removed"]
        held = _read(path)
        write = {place: one for place, one in held["write"].items() if one["pid"] not in dead}
        read = {
            place: left
            for place, several in held["read"].items()
            if (left := [one for one in several if one["pid"] not in dead])
        }
        write_json(path, {"write": write, "read": read})
    return [f"process {number} (`{command}`) is gone: its locks are released" for number, command in dead.items()]
