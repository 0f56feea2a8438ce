"""Run the dvc command."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from shlex import quote

from pipeline.system.process import child_process

DVC = (sys.executable, "-m", "dvc")
STAGE_FAILED = re.compile(r"failed to run: .*, exited with (-?\d+)")
"""Message by which dvc reports the exit code of a stage."""


EXPLANATIONS: dict[str, Callable[[str], str]] = {
    r"'\./(.+)' is invalid \(possible merge conflicts\)": lambda path: (
        f"{path} has merge markers; keep one side by `git checkout --ours {quote(path)}`"
    ),
    "()Unable to acquire lock": lambda _: "dvc is already running in this checkout; wait for it, or end it",
    "()surrogates not allowed": lambda _: "a file name is not UTF-8; `smaller-student doctor` names it",
    "missing data 'source': (.+)$": lambda path: (
        f"{path} is in DVC, but not in this checkout; run `dvc pull {quote(f'{path}.dvc')}`"
    ),
}
"""Sentences with the remedy, by messages of dvc that do not name it; they may contain a path."""


class StageError(RuntimeError):
    """A stage or a dvc command failed."""


def reason(output: str) -> str:
    """Return why a dvc command failed, in one line."""
    for pattern, sentence in EXPLANATIONS.items():
        if match := re.search(pattern, output, re.M):
            return sentence(match[1])
    lines = output.strip().splitlines() or ["it has no output"]
    return next((line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")), lines[-1])


def changed(*targets: str) -> list[str]:
    """Return the stages and .dvc files whose dependencies, outputs or params differ from dvc.lock or the file.

    Args:
        targets: Stages and .dvc files to compare; all if there are none.

    Raises:
        StageError: If `dvc status` fails.
    """
    return list(json.loads(_output("status", "--json", *targets) or "{}"))


def changed_stages() -> list[str]:
    """Return the stages whose dependencies, outputs or params differ from dvc.lock.

    Raises:
        StageError: If `dvc status` fails.
    """
    return [name for name in changed() if not name.endswith(".dvc")]


def commit(file: str) -> None:
    """Save the present files of a folder that a .dvc file tracks in DVC's cache, and write their hash to the file.

    Raises:
        StageError: If `dvc commit` fails.
    """
    _output("commit", "--force", file)


def _output(command: str, *words: str) -> str:
    done = subprocess.run([*DVC, command, *words], capture_output=True, text=True)
    if done.returncode:
        raise StageError(f"`dvc {command}` failed: {reason(done.stderr)}")
    return done.stdout


def dvc(*words: str, hours: float = 1000, **extra: str) -> "AbstractContextManager[subprocess.Popen[str]]":
    """Start a dvc process; see `child_process`."""
    return child_process(*DVC, *words, hours=hours, **extra)
