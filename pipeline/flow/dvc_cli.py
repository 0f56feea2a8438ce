"""Run the dvc command."""

import json
import re
import subprocess
import sys
from contextlib import AbstractContextManager

from pipeline.system.process import child_process

DVC = (sys.executable, "-m", "dvc")
STAGE_FAILED = re.compile(r"failed to run: .*, exited with (-?\d+)")
"""Message by which dvc reports the exit code of a stage."""


class StageError(RuntimeError):
    """A stage or a dvc command failed."""


def changed_stages() -> list[str]:
    """Return the stages whose dependencies, outputs or params differ from dvc.lock.

    Raises:
        StageError: If `dvc status` fails.
    """
    done = subprocess.run([*DVC, "status", "--json"], capture_output=True, text=True)
    if done.returncode:
        raise StageError(f"`dvc status` failed: {done.stderr.strip()}")
    return list(json.loads(done.stdout or "{}"))


def dvc(*words: str, hours: float = 1000, **extra: str) -> "AbstractContextManager[subprocess.Popen[str]]":
    """Start a dvc process; see `child_process`."""
    return child_process(*DVC, *words, hours=hours, **extra)
