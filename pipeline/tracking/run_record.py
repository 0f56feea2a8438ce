"""Run records: one JSON file for each stage of each execution, and one for the execution itself.

A stage writes only its record, so a tracking server that is down does not affect it; `sync` uploads the records to
MLflow. Records are written atomically.
"""

import hashlib
import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from pipeline.files import Files, read_json, write_json, write_text
from pipeline.system.locks import locked
from pipeline.tracking.execution import Execution, ProcessId

log = logging.getLogger(__name__)

EXECUTION = "execution"
"""Name of the record of the execution itself."""
MIN_START_GAP = 0.002
"""Minimum seconds between the start times of two runs: MLflow sorts runs by start time in milliseconds."""

Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]


class Point(BaseModel):
    """Metric values of one step, by metric key; `time` is in seconds since 1970."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    time: float
    step: int
    values: dict[str, float]


class RunRecord(BaseModel):
    """Content of one MLflow run: a stage, or the execution as its parent run.

    Attributes:
        title: Name of the run.
        stage: Name of the stage; empty for the execution.
        process: Process of the stage, or owner of the execution.
        status: The record of an execution always has RUNNING; `ExecutionRecords.parent_record` derives its status.
        began: Start time in seconds since 1970.
        ended: End time in seconds since 1970; None while the stage runs.
        params: All keys of params.yaml by dotted name; execution only.
        figures: Final metrics by metric key.
        curve: Metrics with steps.
        dataset: Fields of MLflow's `Dataset`; execution only.
        folder: Folder below `ExecutionRecords.files` to upload as artifacts under the same name.
        digest: SHA-256 of metrics/<stage>.json, by which a later execution finds the run that computed it.
        experiment: Name of the MLflow experiment; execution only.
        root: Path of the working copy; execution only.
        waited: Seconds that the stage waited for the upload.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str
    stage: str = ""
    process: ProcessId
    status: Status = "RUNNING"
    began: float
    ended: float | None = None
    tags: dict[str, str] = {}
    params: dict[str, str] = {}
    figures: dict[str, float] = {}
    curve: tuple[Point, ...] = ()
    dataset: dict[str, str] = {}
    folder: str = ""
    digest: str = ""
    experiment: str = ""
    root: str = ""
    waited: float = 0.0

    def to_json(self) -> str:
        return self.model_dump_json(indent=1, exclude_defaults=True) + "\n"

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that is uploaded."""
        return hashlib.sha256(self.updated(waited=0.0).to_json().encode()).hexdigest()

    def updated(self, **fields: Any) -> "RunRecord":
        """Return a validated copy with new values."""
        return RunRecord.model_validate({**dict(self), **fields})


class ExecutionRecords:
    """Run records of one execution, in a folder named after `Execution.key`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def of(cls, files: Files, execution: Execution) -> "ExecutionRecords":
        """Return the records of an execution; the folder need not exist."""
        return cls(_runs_folder(files) / execution.key)

    @property
    def id(self) -> str:
        return self.folder.name.partition("-")[2]

    @property
    def kind(self) -> str:
        return self.folder.name.partition("-")[0]

    @property
    def experiment(self) -> str:
        """Name of the MLflow experiment; empty if the record of the execution is missing."""
        return record.experiment if (record := self.execution()) else ""

    @property
    def files(self) -> Path:
        """Folder of files to upload; they are copies, because a later run replaces the originals."""
        return self.folder / "files"

    @property
    def problem(self) -> Path:
        """File with the error of the last background upload; missing if it succeeded."""
        return self.folder / "problem.txt"

    def add_notice(self, notice: str) -> None:
        """Save a message that a stage or command shows to the user once."""
        write_text(self.folder / "notices.txt", "\n".join(dict.fromkeys([*self._notices(), notice])) + "\n")

    def take_notices(self) -> list[str]:
        """Return the messages that have not been shown yet, and delete them."""
        notices = self._notices()
        (self.folder / "notices.txt").unlink(missing_ok=True)
        return notices

    def _notices(self) -> list[str]:
        path = self.folder / "notices.txt"
        return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []

    def read(self, name: str) -> RunRecord | None:
        """Read a record; None if it is missing, damaged or of an incompatible version."""
        try:
            return RunRecord.model_validate_json((self.folder / f"{name}.json").read_bytes())
        except (OSError, ValueError):
            return None

    def write(self, name: str, record: RunRecord) -> None:
        write_text(self.folder / f"{name}.json", record.to_json())

    def execution(self) -> RunRecord | None:
        """Read the record of the execution; its status is always RUNNING."""
        return self.read(EXECUTION)

    def stages(self) -> dict[str, RunRecord]:
        """Return the records of stages by name, ordered by start time; a stage that ran twice has two."""
        names = [path.stem for path in self.folder.glob("*.json") if path.stem != EXECUTION]
        records = {name: record for name in names if (record := self.read(name)) is not None and record.stage}
        return dict(sorted(records.items(), key=lambda item: item[1].began))

    def new_name(self, stage: str) -> str:
        """Return an unused name for a record of a stage: `teacher`, then `teacher-2`."""
        number = 1
        name = stage
        while (self.folder / f"{name}.json").exists():
            number += 1
            name = f"{stage}-{number}"
        return name

    def next_start(self) -> float:
        """Return the start time of a new record: now, but after all others, even if the clock was set back."""
        starts = [record.began for record in (self.execution(), *self.stages().values()) if record]
        return max([time.time(), *(start + MIN_START_GAP for start in starts)])

    def statuses(self) -> dict[str, Status]:
        """Return the status of the latest record of each stage."""
        return {record.stage: record.status for record in self.stages().values()}

    def copy_for_upload(self, source: Path, names: list[str], folder: str) -> str:
        """Copy files and folders from `source` to `files`/`folder`; the upload deletes large copies.

        Returns:
            `folder`, or "" if copying failed: a full disk must not fail the stage.
        """
        target = self.files / folder
        shutil.rmtree(target, ignore_errors=True)
        try:
            target.mkdir(parents=True)
            for name in names:
                path = source / name
                shutil.copytree(path, target / name) if path.is_dir() else shutil.copy2(path, target / name)
        except OSError as error:
            shutil.rmtree(target, ignore_errors=True)
            log.warning("%s is not uploaded to MLflow: it cannot be copied (%s)", source, error)
            return ""
        return folder

    def mark_killed(self) -> None:
        """Set the status of stages whose process is gone to KILLED; processes of other hosts cannot be checked."""
        for name, record in self.stages().items():
            if record.status == "RUNNING" and record.process.alive is False:
                last = self.read(name)  # again: the process may have written a final record just before it ended
                if last is not None and last.status == "RUNNING":
                    last_seen = max([last.began, *(point.time for point in last.curve)])
                    tags = {**last.tags, "error": "its process is gone"}
                    self.write(name, last.updated(status="KILLED", ended=last_seen, tags=tags))

    def parent_record(self) -> RunRecord | None:
        """Return the record of the execution with the status that follows from its stages."""
        record, stages = self.execution(), list(self.stages().values())
        if record is None or not stages or any(stage.status == "RUNNING" for stage in stages):
            return record
        return record.updated(status=stages[-1].status, ended=max(stage.ended or 0.0 for stage in stages))

    def upload_lock(self, timeout: float) -> AbstractContextManager[None]:
        """Hold the lock of an upload of the execution, waiting so many seconds for another process."""
        return locked(self.folder / "sync.lock", f"the upload of execution {self.id}", timeout)

    # --- state of the upload ------------------------------------------------------------------------------------------

    def synced(self, store: str) -> dict[str, dict[str, Any]]:
        """Return what was uploaded to a store (see `store_key`), by record name.

        Keys are `run` (run id), `fingerprint`, `points` (number of uploaded points), `files` (fingerprint of the record
        whose files were uploaded) and `gone` (why a deleted run is not uploaded again).
        """
        try:
            return dict(read_json(self._synced_file(store)))
        except (OSError, ValueError):
            return {}

    def save_synced(self, store: str, state: dict[str, dict[str, Any]]) -> None:
        write_json(self._synced_file(store), state)

    def _synced_file(self, store: str) -> Path:
        return self.folder / "synced" / f"{store}.json"

    def pending(self, store: str) -> list[str]:
        """Return the names of records that a store does not have in their present state."""
        state, parent = self.synced(store), self.parent_record()
        if parent is None:
            return []
        return [
            name
            for name, record in {EXECUTION: parent, **self.stages()}.items()
            if not (seen := state.get(name, {})).get("gone") and not self.is_synced(record, seen)
        ]

    def is_synced(self, record: RunRecord, seen: dict[str, Any]) -> bool:
        """Return whether a store has a record in its present state, and its files as far as they are still here."""
        present = record.fingerprint
        return seen.get("fingerprint") == present and (seen.get("files") == present or not self.has_files(record))

    def has_files(self, record: RunRecord) -> bool:
        """Return whether files of a record are here to be uploaded."""
        return bool(record.folder) and (self.files / record.folder).is_dir()


def all_executions(files: Files) -> Iterator[ExecutionRecords]:
    """Yield the records of all executions, the oldest first."""
    every = [ExecutionRecords(path.parent) for path in _runs_folder(files).glob(f"*/{EXECUTION}.json")]
    starts = [(record.began, number) for number, records in enumerate(every) if (record := records.execution())]
    yield from (every[number] for _, number in sorted(starts))


def _runs_folder(files: Files) -> Path:
    return files.tracking / "runs"
