"""Which stages belong to one execution, and which process runs them.

An execution is one dvc process, one flow run, or one stage that was started by hand. All stages of it find the same
identifier: a flow hands it down in the environment, a dvc process is found among the stage's ancestors.
"""

import os
import socket
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from pydantic import BaseModel, ConfigDict

VARIABLE = "SMALLER_STUDENT_EXECUTION"
"""Environment variable with the key of a flow run's execution, for the dvc processes and stages below it."""


class ProcessId(BaseModel):
    """One process among all that any machine ever runs.

    Attributes:
        host: Name of the machine or container.
        boot: Identifier of the machine's last boot; empty where the system has none.
        pid: Process id.
        start: When the process started; on Linux in clock ticks since boot, which a clock that is set does not change.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str
    boot: str
    pid: int
    start: int

    @classmethod
    def of(cls, pid: int) -> "ProcessId":
        """Identify a process of this machine.

        Raises:
            psutil.NoSuchProcess: If no process has this id.
        """
        return cls(host=socket.gethostname(), boot=_boot(), pid=pid, start=_start(pid))

    @property
    def alive(self) -> bool | None:
        """Whether the process runs; None if it belongs to another host, whose processes cannot be seen from here."""
        if self.host != socket.gethostname():
            return None
        try:
            return self.boot == _boot() and self.start == _start(self.pid)
        except psutil.NoSuchProcess:
            return False


def _boot() -> str:
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.is_file() else ""


def _start(pid: int) -> int:
    """Start of a process; psutil's own value for Linux moves when the clock is set, since it adds the time of boot.

    Raises:
        psutil.NoSuchProcess: If no process has this id, or it has ended and nobody has collected it.
    """
    if sys.platform == "linux":
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError) as error:
            raise psutil.NoSuchProcess(pid) from error
        state, *fields = stat.rpartition(")")[2].split()  # proc(5): the name before it may hold anything
        if state in "ZX":
            raise psutil.NoSuchProcess(pid)
        return int(fields[18])
    process = psutil.Process(pid)
    if process.status() == psutil.STATUS_ZOMBIE:
        raise psutil.NoSuchProcess(pid)
    return int(100 * process.create_time())


@dataclass(frozen=True)
class Execution:
    """An execution.

    Attributes:
        kind: `dvc`, `flow` or `stage` (a stage that was started by hand).
        id: 32 hexadecimal digits that no other execution has, on any machine.
        owner: The process that began it.
    """

    kind: str
    id: str
    owner: ProcessId

    @property
    def key(self) -> str:
        """Kind and id in one word."""
        return f"{self.kind}-{self.id}"

    @classmethod
    def of(cls, kind: str, owner: ProcessId) -> "Execution":
        """The one execution of a dvc process, or of a stage that was started by hand."""
        return cls(kind, uuid.uuid5(uuid.NAMESPACE_OID, owner.model_dump_json()).hex, owner)

    @classmethod
    def new_flow(cls) -> "Execution":
        """A new execution of this process, which may have had others before."""
        return cls("flow", uuid.uuid4().hex, ProcessId.of(os.getpid()))


def current() -> Execution:
    """The execution that this process is part of."""
    if key := os.environ.get(VARIABLE):
        kind, _, found = key.partition("-")
        return Execution(kind, found, ProcessId.of(os.getpid()))
    if "DVC_STAGE" in os.environ:
        for ancestor in psutil.Process().parents():
            if _is_dvc(ancestor):
                return Execution.of("dvc", ProcessId.of(ancestor.pid))
    return Execution.of("stage", ProcessId.of(os.getpid()))


def _is_dvc(process: psutil.Process) -> bool:
    try:
        return runs_dvc(process.cmdline())
    except psutil.Error:
        return False


def runs_dvc(command: Sequence[str]) -> bool:
    """`dvc repro`, `python /venv/bin/dvc repro` and `python -m dvc repro`, but not `sh -c "dvc repro"`."""
    return "dvc" in [Path(part).name.removesuffix(".exe") for part in command[:4]]
