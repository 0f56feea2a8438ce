"""Records of what ran: one JSON file for each stage in each execution, and one for the execution itself.

Stages write nothing else, whatever becomes of MLflow; `sync` brings MLflow to what the records hold. A record is
replaced as a whole, so a reader sees the old one or the new one.
"""

import hashlib
import logging
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from pipeline.files import Files, read_json, write_json, write_text
from pipeline.tracking.execution import Execution, ProcessId

log = logging.getLogger(__name__)

EXECUTION = "execution"
"""Name of the record of the execution itself."""
TICK = 0.002
"""Seconds between the starts of two runs at least: MLflow sorts runs by their start, in milliseconds."""

Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]


class Point(BaseModel):
    """One row of a curve: values by metric key at a step, and when they were measured (seconds since 1970)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    time: float
    step: int
    values: dict[str, float]


class RunRecord(BaseModel):
    """What one MLflow run shows: a stage of an execution, or the execution.

    Attributes:
        title: Name of the run.
        stage: Empty for the execution.
        process: Runs the stage; owns the execution.
        status: That of an execution follows from its stages, so its record has none but RUNNING.
        began: Seconds since 1970, as all times.
        ended: None while it runs.
        tags: Tags of the run, among them where it comes from (commit, digests).
        params: All params.yaml keys by dotted name; of the execution only.
        figures: Final figures by metric key.
        curve: Figures with steps.
        dataset: Fields of MLflow's `Dataset`; of the execution only.
        folder: Folder below `Records.files` to upload, under the same name.
        digest: SHA-256 of metrics/<stage>.json, by which a later execution recognises where its figures come from.
        experiment: MLflow experiment; of the execution only.
        root: Working copy; of the execution only.
        waited: Seconds that the stage waited for MLflow.
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

    def text(self) -> str:
        """The record as JSON."""
        return self.model_dump_json(indent=1, exclude_defaults=True) + "\n"

    @property
    def fingerprint(self) -> str:
        """Changes with what is uploaded."""
        return hashlib.sha256(self.changed(waited=0.0).text().encode()).hexdigest()

    def changed(self, **fields: Any) -> "RunRecord":
        """A copy with other values, checked like a new one."""
        return RunRecord.model_validate({**dict(self), **fields})


class Records:
    """Records of one execution, in a folder that is named after its key."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def of(cls, files: Files, execution: Execution) -> "Records":
        """The records of an execution, written or not."""
        return cls(_home(files) / execution.key)

    @property
    def id(self) -> str:
        """Identifier of the execution."""
        return self.folder.name.partition("-")[2]

    @property
    def kind(self) -> str:
        """`dvc`, `flow` or `stage`."""
        return self.folder.name.partition("-")[0]

    @property
    def files(self) -> Path:
        """Folder of copies that wait for upload: a later run replaces the originals."""
        return self.folder / "files"

    @property
    def problem(self) -> Path:
        """Why the last upload beside a stage failed, in one sentence; missing where it did not fail."""
        return self.folder / "problem.txt"

    def add_notice(self, notice: str) -> None:
        """Keep what the user should read once, until a stage or a command shows it."""
        write_text(self.folder / "notices.txt", "\n".join(dict.fromkeys([*self._notices(), notice])) + "\n")

    def take_notices(self) -> list[str]:
        """Return what nobody has shown yet, and forget it."""
        found = self._notices()
        (self.folder / "notices.txt").unlink(missing_ok=True)
        return found

    def _notices(self) -> list[str]:
        path = self.folder / "notices.txt"
        return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []

    # --- reading and writing ------------------------------------------------------------------------------------------

    def read(self, name: str) -> RunRecord | None:
        """A record; None where there is none that this version understands."""
        try:
            return RunRecord.model_validate_json((self.folder / f"{name}.json").read_bytes())
        except (OSError, ValueError):
            return None

    def write(self, name: str, record: RunRecord) -> None:
        """Write a record atomically."""
        write_text(self.folder / f"{name}.json", record.text())

    def execution(self) -> RunRecord | None:
        """The record of the execution."""
        return self.read(EXECUTION)

    def stages(self) -> dict[str, RunRecord]:
        """Records of stages by name, in the order in which they began; a stage that ran twice has two."""
        names = [path.stem for path in self.folder.glob("*.json") if path.stem != EXECUTION]
        found = {name: record for name in names if (record := self.read(name)) is not None and record.stage}
        return dict(sorted(found.items(), key=lambda item: item[1].began))

    def new_name(self, stage: str) -> str:
        """Name for another record of a stage."""
        number = 1
        name = stage
        while (self.folder / f"{name}.json").exists():
            number += 1
            name = f"{stage}-{number}"
        return name

    def moment(self) -> float:
        """The time for a new record: now, but after all others began, even if the clock was set back."""
        began = [record.began for record in (self.execution(), *self.stages().values()) if record]
        return max([time.time(), *(moment + TICK for moment in began)])

    def outcomes(self) -> dict[str, Status]:
        """How each stage ended, the latest record of it counts."""
        return {record.stage: record.status for record in self.stages().values()}

    def keep(self, source: Path, names: list[str], folder: str) -> str:
        """Copy files and folders below `source` to `files`/`folder`, until they are uploaded.

        Returns:
            `folder`, or an empty text if the copying failed: a full disk must not turn into a failed stage.
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

    # --- what ran until when ------------------------------------------------------------------------------------------

    def end_dead(self) -> None:
        """Mark as KILLED the stages whose process is gone; those of other hosts cannot be seen and are left alone."""
        for name, record in self.stages().items():
            if record.status == "RUNNING" and record.process.alive is False:
                last = self.read(name)  # a process that is gone changes nothing any more, but may have done so just now
                if last is not None and last.status == "RUNNING":
                    sign = max([last.began, *(point.time for point in last.curve)])
                    tags = {**last.tags, "error": "its process is gone"}
                    self.write(name, last.changed(status="KILLED", ended=sign, tags=tags))

    # --- what MLflow has ----------------------------------------------------------------------------------------------

    def synced(self, uri: str) -> dict[str, dict[str, Any]]:
        """What a server has, by record name: `run`, `fingerprint`, `points` of the curve, `gone` with the reason."""
        try:
            return dict(read_json(self._synced(uri)))
        except (OSError, ValueError):
            return {}

    def note_synced(self, uri: str, state: dict[str, dict[str, Any]]) -> None:
        """Remember what a server has."""
        write_json(self._synced(uri), state)

    def _synced(self, uri: str) -> Path:
        return self.folder / "synced" / f"{hashlib.sha256(uri.encode()).hexdigest()[:16]}.json"

    def whole(self) -> RunRecord | None:
        """The execution's record with the status that follows from its stages."""
        record, stages = self.execution(), list(self.stages().values())
        if record is None or not stages:
            return record
        if any(stage.status == "RUNNING" for stage in stages):
            return record
        return record.changed(status=stages[-1].status, ended=max(stage.ended or 0.0 for stage in stages))

    def pending(self, uri: str) -> list[str]:
        """Names of the records that a server does not have as they are."""
        state, whole = self.synced(uri), self.whole()
        if whole is None:
            return []
        found = {EXECUTION: whole, **self.stages()}
        seen = {name: state.get(name, {}) for name in found}
        return [
            name
            for name, record in found.items()
            if not seen[name].get("gone") and seen[name].get("fingerprint") != record.fingerprint
        ]


def executions(files: Files) -> Iterator[Records]:
    """Records of all executions, the oldest first."""
    found = [Records(path.parent) for path in _home(files).glob(f"*/{EXECUTION}.json")]
    begun = [(record.began, number) for number, one in enumerate(found) if (record := one.execution())]
    yield from (found[number] for _, number in sorted(begun))


def _home(files: Files) -> Path:
    return files.tracking / "runs"
