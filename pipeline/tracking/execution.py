"""Identify the pipeline execution that a stage belongs to, and the process that owns it.

An execution is one dvc process, one flow run, or one stage started by hand. All its stages get the same identifier: a
flow passes it in the environment, and a dvc process is found among the ancestors of the stage.
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

EXECUTION_VARIABLE = "SMALLER_STUDENT_EXECUTION"
"""Environment variable by which a flow run passes the key of its execution to its dvc processes and stages."""


class ProcessId(BaseModel):
    """Identifier of a process that is unique across machines, reboots and reused process ids.

    Attributes:
        host: Name of the machine or container.
        boot: Boot id of the machine; empty on other systems than Linux.
        start: Start time: on Linux clock ticks since boot, which setting the clock does not change; elsewhere
            hundredths of a second since 1970.
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
        return cls(host=socket.gethostname(), boot=_boot_id(), pid=pid, start=_start_time(pid))

    @property
    def alive(self) -> bool | None:
        """Whether the process runs; None if it runs on another host, which cannot be checked from here."""
        if self.host != socket.gethostname():
            return None
        try:
            return self.boot == _boot_id() and self.start == _start_time(self.pid)
        except psutil.NoSuchProcess:
            return False


def _boot_id() -> str:
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.is_file() else ""


def _start_time(pid: int) -> int:
    """Return the start time of a process; psutil's value changes on Linux when the clock is set.

    Raises:
        psutil.NoSuchProcess: If no process has this id, or it is a zombie.
    """
    if sys.platform == "linux":
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError) as error:
            raise psutil.NoSuchProcess(pid) from error
        state, *fields = stat.rpartition(")")[2].split()  # proc(5): the name before `)` may hold any character
        if state in "ZX":
            raise psutil.NoSuchProcess(pid)
        return int(fields[18])
    process = psutil.Process(pid)
    if process.status() == psutil.STATUS_ZOMBIE:
        raise psutil.NoSuchProcess(pid)
    return int(100 * process.create_time())


@dataclass(frozen=True)
class Execution:
    """One execution of the pipeline.

    Attributes:
        kind: `dvc`, `flow` or `stage` (a stage started by hand).
        id: 32 hexadecimal digits, unique across machines.
        owner: Process that started the execution.
    """

    kind: str
    id: str
    owner: ProcessId

    @property
    def key(self) -> str:
        """Kind and id joined by a hyphen."""
        return f"{self.kind}-{self.id}"

    @classmethod
    def of(cls, kind: str, owner: ProcessId) -> "Execution":
        """Return the execution of a dvc process or of a stage started by hand; its id follows from the process."""
        return cls(kind, uuid.uuid5(uuid.NAMESPACE_OID, owner.model_dump_json()).hex, owner)

    @classmethod
    def new_flow(cls) -> "Execution":
        """Return a new execution of a flow; one process may run several."""
        return cls("flow", uuid.uuid4().hex, ProcessId.of(os.getpid()))


def current_execution() -> Execution:
    """Return the execution that this process is part of."""
    if key := os.environ.get(EXECUTION_VARIABLE):
        kind, _, identifier = key.partition("-")
        return Execution(kind, identifier, ProcessId.of(os.getpid()))
    if "DVC_STAGE" in os.environ:
        for ancestor in psutil.Process().parents():
            if _is_dvc(ancestor):
                return Execution.of("dvc", ProcessId.of(ancestor.pid))
    return Execution.of("stage", ProcessId.of(os.getpid()))


def _is_dvc(process: psutil.Process) -> bool:
    try:
        return is_dvc_command(process.cmdline())
    except psutil.Error:
        return False


def is_dvc_command(command: Sequence[str]) -> bool:
    """Return whether a command runs dvc itself: `python -m dvc repro` does, `sh -c "dvc repro"` does not."""
    return "dvc" in [Path(part).name.removesuffix(".exe") for part in command[:4]]
