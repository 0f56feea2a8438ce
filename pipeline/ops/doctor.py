"""`smaller-student doctor`: what stands in the way, why, and what to do; `--fix` removes what is certainly dead."""

import importlib.metadata
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from pipeline.files import Files
from pipeline.ops import git_cli, rwlock
from pipeline.ops.finding import Finding
from pipeline.ops.locks import is_held
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
    commit, changed = git_cli.commit(files.root)
    if changed is None:
        yield Finding("git", None, "this is no Git checkout, so runs do not tell their commit")
    else:
        yield Finding("git", None, f"commit {commit[:12]}" + (", with changes" if changed else ""))


def dvc_locks(files: Files) -> Iterator[Finding]:
    """DVC's table of who reads and writes what (see `rwlock`)."""
    repair = partial(rwlock.release_dead, files)
    try:
        noted = rwlock.noted(files)
    except rwlock.Damaged as error:
        text = f"{error}: a dvc was killed while it wrote it"
        yield Finding("dvc locks", False, text, "`smaller-student doctor --fix` removes it while no dvc runs", repair)
        return
    for number, command in noted.items():
        if rwlock.is_dvc(number):
            yield Finding("dvc locks", None, f"process {number} works here: {command}")
        else:
            text = f"process {number} (`{command}`) is gone, or one of another container; its locks are left"
            remedy = "`smaller-student doctor --fix` takes them away while nobody works in this checkout"
            yield Finding("dvc locks", False, text, remedy, repair)
    if not noted:
        yield Finding("dvc locks", True, "none are held")


def own_locks(files: Files) -> Iterator[Finding]:
    """Who retrains, or runs a stage. The system gives these locks back, so they are never stale."""
    for name, what in (("retrain", "retraining"), ("stage", "a stage"), ("delivery", "what is told to MLflow")):
        path = files.tracking / f"{name}.lock"
        if is_held(path):
            text = f"{what} is under way: {_text(path.with_suffix('.json')) or 'pid unknown'}"
            yield Finding("locks", None, text)


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
