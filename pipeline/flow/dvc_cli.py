"""Processes of dvc."""

import json
import re
import subprocess
import sys
from contextlib import AbstractContextManager

from pipeline.system.process import running

DVC = (sys.executable, "-m", "dvc")
ENDED = re.compile(r"failed to run: .*, exited with (-?\d+)")
"""How dvc tells the exit code of a stage."""


class StageError(RuntimeError):
    """A stage failed; what dvc said stands in the log."""


def changes() -> list[str]:
    """Stages whose inputs, outputs or params differ from dvc.lock.

    Raises:
        StageError: If `dvc status` fails.
    """
    done = subprocess.run([*DVC, "status", "--json"], capture_output=True, text=True)
    if done.returncode:
        raise StageError(f"`dvc status` failed: {done.stderr.strip()}")
    return list(json.loads(done.stdout or "{}"))


def dvc(*words: str, hours: float = 1000, **extra: str) -> "AbstractContextManager[subprocess.Popen[str]]":
    """A dvc process; see `running`."""
    return running(*DVC, *words, hours=hours, **extra)
