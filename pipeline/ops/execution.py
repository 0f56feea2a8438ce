"""What belongs together: one execution is one dvc process or one flow run, whatever it runs or takes from its cache.

The processes of an execution know each other by its key: kind, pid and start time of the owner.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

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
    try:
        return runs_dvc(process.cmdline())
    except psutil.Error:
        return False


def runs_dvc(command: Sequence[str]) -> bool:
    """`dvc repro`, `python /venv/bin/dvc repro` and `python -m dvc repro`, but not `sh -c "dvc repro"`."""
    return "dvc" in [Path(part).name.removesuffix(".exe") for part in command[:4]]
