"""`smaller-student doctor`: what stands in the way, why, and what to do; `--fix` removes what is certainly dead."""

import importlib.metadata
import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from pipeline.files import Files, write_json
from pipeline.ops import git
from pipeline.ops.params import ParamsError, load
from pipeline.runtime import available_threads

GIB = 2**30
ROOM = 5 * GIB
"""Free bytes below which a training may end before it is done."""
SWITCHES = {
    "DVC": "DVC_NO_ANALYTICS",
    "MLflow": "MLFLOW_DISABLE_TELEMETRY",
    "Prefect": "PREFECT_SERVER_ANALYTICS_ENABLED",
}
"""Environment variable that turns telemetry off; DO_NOT_TRACK does for MLflow and Prefect."""


@dataclass(frozen=True)
class Finding:
    """What one look found.

    Attributes:
        topic: In one or two words.
        good: Whether all is well; None for something to know, which stands in nobody's way.
        text: What is.
        remedy: What to do; empty where nothing is to be done.
        fix: Does it, where that is safe.
    """

    topic: str
    good: bool | None
    text: str
    remedy: str = ""
    fix: Callable[[], object] | None = None


def examine(files: Files) -> Iterator[Finding]:
    """Look at everything, one thing after the other.

    Args:
        files: Of the checkout.
    """
    from pipeline.ops import doctor_services  # imports mlflow and prefect

    for look in (environment, space, sources, dvc_locks, own_locks, telemetry, *doctor_services.LOOKS):
        try:
            yield from look(files)
        except Exception as error:  # the next look may still find what is wrong
            yield Finding(
                look.__name__.replace("_", " "), False, f"cannot be looked at: {type(error).__name__}: {error}"
            )


def environment(files: Files) -> Iterator[Finding]:
    """Python, and the libraries against the lock file."""
    python = f"Python {platform.python_version()}, {available_threads()} threads, {platform.machine()}"
    yield Finding("machine", sys.version_info >= (3, 11), python, "" if sys.version_info >= (3, 11) else "use 3.11")
    locked: dict[str, list[str]] = {}  # a library may have several versions, for other Pythons and systems
    for name, version in re.findall(r"^([A-Za-z0-9._-]+)==([^ ;\\]+)", _text(files.root / "requirements.lock"), re.M):
        locked.setdefault(name, []).append(version)
    installed = {
        re.sub(r"[-_.]+", "-", found.name).lower(): found.version for found in importlib.metadata.distributions()
    }
    other = [
        f"{name} {installed[name]} (locked {' or '.join(versions)})"
        for name, versions in locked.items()
        if name in installed and installed[name].split("+")[0] not in versions
    ]
    text = f"{len(locked)} versions are locked" + (f"; others are installed: {', '.join(other[:5])}" if other else "")
    yield Finding("libraries", not other, text, "run `make setup`" if other else "")


def space(files: Files) -> Iterator[Finding]:
    """Room on the disk of the checkout, and in the folder for temporary files."""
    for what, folder in (("disk", files.root), ("temporary", Path(os.environ.get("TMPDIR", "/tmp")))):  # noqa: S108
        if folder.is_dir():
            free = shutil.disk_usage(folder).free
            enough = free >= ROOM
            text = f"{free / GIB:.1f} GiB are free in {folder}"
            yield Finding(
                what,
                enough,
                text,
                ""
                if enough
                else "make room; `dvc gc --workspace --all-branches --all-tags --all-experiments` drops old outputs",
            )
    if not os.access(files.root, os.W_OK):
        yield Finding("disk", False, f"{files.root} cannot be written", "run as its owner")


def sources(files: Files) -> Iterator[Finding]:
    """params.yaml, dvc.lock and Git."""
    try:
        load(files.params)
        yield Finding("params.yaml", True, "can be run")
    except (ParamsError, OSError) as error:
        yield Finding("params.yaml", False, str(error).splitlines()[0], "correct it, or `smaller-student preset NAME`")
    for name in ("dvc.lock", "dvc.yaml", "params.yaml"):
        for number, line in enumerate(_text(files.root / name).splitlines(), start=1):
            if line.startswith(("<<<<<<<", ">>>>>>>")):
                yield Finding(name, False, f"a merge left its marks in line {number}", f"`git checkout --ours {name}`")
                break
    commit, changed = git.commit(files.root)
    if changed is None:
        yield Finding("git", None, "this is no Git checkout, so runs do not tell their commit")
    else:
        yield Finding("git", None, f"commit {commit[:12]}" + (", with changes" if changed else ""))


def dvc_locks(files: Files) -> Iterator[Finding]:
    """DVC's table of who reads and writes what, which holds numbers of processes.

    A process that was killed stays in it. Its number may be another's by now, and DVC then waits for that one for ever.
    """
    path = files.root / ".dvc" / "tmp" / "rwlock"
    if not (text := _text(path)):
        if path.is_file():
            yield _corrupt(path, "is empty")
        else:
            yield Finding("dvc locks", True, "none are held")
        return
    try:
        held = json.loads(text)
        writers = [(place, one) for place, one in held.get("write", {}).items()]
        readers = [(place, one) for place, several in held.get("read", {}).items() for one in several]
        dead = {one["pid"]: one["cmd"] for _, one in writers + readers if not _is_dvc(one["pid"])}
        living = {one["pid"]: one["cmd"] for _, one in writers + readers if _is_dvc(one["pid"])}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        yield _corrupt(path, f"is damaged ({error})")
        return
    for number, command in living.items():
        yield Finding("dvc locks", None, f"process {number} works here: {command}")
    for number, command in dead.items():
        yield Finding(
            "dvc locks",
            False,
            f"process {number} (`{command}`) is gone, and its locks are left",
            "`smaller-student doctor --fix` takes them away; one of another container may live, look there first",
            partial(_release, path, number),
        )
    if not living and not dead:
        yield Finding("dvc locks", True, "none are held")


def _corrupt(path: Path, what: str) -> Finding:
    fix = None if _any_dvc() else path.unlink
    remedy = "wait for the dvc that runs" if fix is None else "`smaller-student doctor --fix` removes it: no dvc runs"
    return Finding("dvc locks", False, f"{path} {what}: a dvc was killed while it wrote it", remedy, fix)


def _is_dvc(number: int) -> bool:
    """Whether a process of that number lives that may be the dvc that was noted; in doubt it is."""
    try:
        return any("dvc" in Path(word).name or word == "dvc" for word in psutil.Process(number).cmdline())
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True


def _any_dvc() -> bool:
    return any(_is_dvc(number) for number in psutil.pids())


def _release(path: Path, number: int) -> None:
    """Take one process out of the table, as DVC does, under DVC's own lock."""
    from dvc.lock import make_lock  # imports much

    with make_lock(str(path.with_name("rwlock.lock")), tmp_dir=str(path.parent)):
        if _is_dvc(number):
            return
        held = json.loads(_text(path))
        write = {place: one for place, one in held.get("write", {}).items() if one["pid"] != number}
        read = {
            place: [one for one in several if one["pid"] != number] for place, several in held.get("read", {}).items()
        }
        write_json(path, {"write": write, "read": {place: several for place, several in read.items() if several}})


def own_locks(files: Files) -> Iterator[Finding]:
    """Who retrains, or runs a stage. The system gives these locks back, so they are never stale."""
    for name, what in (("retrain", "retraining"), ("stage", "a stage"), ("delivery", "what is told to MLflow")):
        path = files.tracking / f"{name}.lock"
        if path.is_file():
            try:
                with FileLock(path, timeout=0, is_singleton=True):
                    pass
            except Timeout:
                yield Finding(
                    "locks", None, f"{what} is under way: {_text(path.with_suffix('.json')) or 'pid unknown'}"
                )


def telemetry(files: Files) -> Iterator[Finding]:
    """Switches of those that would tell others what is done here."""
    silent = os.environ.get("DO_NOT_TRACK", "").lower() in ("1", "true")
    config = _text(files.root / ".dvc" / "config")
    on = []
    for name, variable in SWITCHES.items():
        value = os.environ.get(variable, "").lower()
        off = value in ("0", "false") if variable.endswith("ENABLED") else value in ("1", "true")
        if not (off or (silent and name != "DVC") or (name == "DVC" and "analytics = false" in config)):
            on.append(f"{name} ({variable})")
    text = f"on for {', '.join(on)}" if on else "off"
    yield Finding("telemetry", None if on else True, text, "the Makefile's targets turn it off" if on else "")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
