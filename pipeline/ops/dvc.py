"""Processes of dvc."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

DVC = (sys.executable, "-m", "dvc")
STOPPING = ((signal.SIGINT, 18.0), (signal.SIGTERM, 4.0))
"""How a dvc process is asked to end, and how many seconds it has for it; Prefect's worker kills after 30."""


class StageError(RuntimeError):
    """A stage failed; what dvc said stands in the log."""


def changes() -> list[str]:
    """Stages whose inputs, outputs or params differ from dvc.lock.

    Raises:
        StageError: If `dvc status` fails.
    """
    done = subprocess.run([*DVC, "status", "--json"], capture_output=True, text=True, env=_environment())
    if done.returncode:
        raise StageError(f"`dvc status` failed: {done.stderr.strip()}")
    return list(json.loads(done.stdout or "{}"))


def _environment(**extra: str) -> dict[str, str]:
    """The own environment, with the own Python first: dvc.yaml says `python`."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {**os.environ, "PATH": path, "PYTHONUNBUFFERED": "1", **extra}


@contextmanager
def dvc(*words: str, **extra: str) -> Iterator[subprocess.Popen[str]]:
    """A dvc process, in a process group that is ended as a whole when the block is left early.

    Prefect cancels by ending one process; dvc in a group of its own would live on.
    """
    process = subprocess.Popen(
        [*DVC, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=_environment(**extra),
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    """SIGINT, which dvc handles cleanly, then SIGTERM, then SIGKILL, to the whole group."""
    if os.name == "nt":
        process.terminate()
        return
    for number, seconds in STOPPING:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
            return
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
