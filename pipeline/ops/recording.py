"""What a stage says of itself, into the journal of its execution.

Figures come from the files that the stage wrote, so what ran and what is replayed are recorded by the same lines.
"""

import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from pipeline.config import Params
from pipeline.files import Files, read_json, write_json
from pipeline.ops import figures, git_cli
from pipeline.ops.journal import Journal
from pipeline.ops.process import identity
from pipeline.records import RECORDS

UPLOADS = {"export": "export", "benchmark": "report"}
"""Folder in the run's artifacts, for stages whose results are worth a look."""
PICTURES = ("pareto.png", "panel-01.png")
"""Of the report, for the execution itself."""
FLOW_RUN = "SMALLER_STUDENT_FLOW_RUN"
"""Environment variable that hands the id of a Prefect flow run to the stages below it."""


def flatten(params: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted names and texts of all values."""
    for key, value in params.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)


class Recording:
    """Writes one stage into the journal.

    Args:
        files: Paths of the checkout.
        params: Recorded with the execution.
        journal: Of the execution that the stage belongs to.
        stage: Its name; None to record, from disk, all stages that the execution has not recorded.
    """

    def __init__(self, files: Files, params: Params, journal: Journal, stage: str | None) -> None:
        self._files, self._params, self._stage, self.journal = files, params, stage, journal

    def begin(self, changed: Collection[str] = ()) -> None:
        """Open the execution, if nobody has, record what came before, and begin the stage.

        Args:
            changed: Stages whose files are not, or not any more, what this execution led to.
        """
        self._open()
        outcomes = self.journal.outcomes()
        for earlier in RECORDS:
            if earlier == self._stage or earlier in changed:
                break
            if outcomes.get(earlier) != "FINISHED" and self._files.metrics(earlier).is_file():
                self._replay(earlier)
        if self._stage is not None:
            self._begin(self._stage, {"cached": "false"})

    def curve(self, values: Mapping[str, float], step: int) -> None:
        """Record points of curves, as of now."""
        self.journal.append("curve", stage=self._stage, values=dict(values), step=step)

    def end(self, status: str, error: str = "") -> None:
        """Record how it ended, and, of an execution that came to its end, what it led to."""
        if self._stage is not None:
            self._end(self._stage, status, error)
        if status == "FINISHED" and "benchmark" in self.journal.outcomes():
            pictures = [path for name in PICTURES if (path := self._files.report / name).is_file()]
            folder = self.journal.keep(pictures, "pictures") if pictures else ""
            self.journal.append("tag", values=figures.summary(self._files), tags=self._lock(), folder=folder)

    def _open(self) -> None:
        budget, data = self._params.student.budget, self._params.data
        goal = f"-{budget.reduction:.0%} {budget.of}" if self._params.student.budgeted else "uncompressed"
        params = self._params.model_dump(mode="json")
        content = json.dumps(params, sort_keys=True).encode()
        tags = {
            "mlflow.source.name": self._files.root.name,
            "mlflow.source.type": "PROJECT",
            "params_digest": hashlib.sha256(content).hexdigest(),
            "execution": self.journal.owner.key,
            **_sources(self._files.root),
            **({"flow_run_id": os.environ[FLOW_RUN]} if os.environ.get(FLOW_RUN) else {}),
        }
        name = f"{data.source}, {goal}, {datetime.now():%m-%d %H:%M}"  # charts tell executions apart by it
        self.journal.open(name, tags, dict(flatten(params)), self._files.root)

    def _begin(self, stage: str, tags: dict[str, str]) -> None:
        """Of a stage that begins and never ends, this process tells whether it still may."""
        pid, started = identity()
        self.journal.append("begin", stage=stage, tags=tags, pid=pid, started=started)

    def _replay(self, stage: str) -> None:
        """Record a stage that did not run in this execution, from the files that it left."""
        original = self._original(stage)
        tags = {"cached": "true", **({"original": original} if original else {})}
        self._begin(stage, tags)
        for row in figures.curves(self._files.plots(stage)):
            self.journal.append("curve", stage=stage, values=figures.curve(row), step=int(row["epoch"]))
        self.journal.append("end", stage=stage, status="FINISHED", values=figures.finals(self._files, stage))
        if stage == "prepare":
            self._data()

    def _end(self, stage: str, status: str, error: str) -> None:
        values, folder = {}, ""
        if status == "FINISHED":
            timings = read_json(self._files.timings(stage))
            seconds = {f"time/{name}": value for name, value in timings["seconds"].items()}
            values = {**figures.finals(self._files, stage), **seconds}
            if (left := upload_folder(self._files, stage)) and left.is_dir():
                folder = self.journal.keep(left.iterdir(), UPLOADS[stage])
            self._remember(stage)
        tags = {"error": error.splitlines()[0][:500]} if error else {}
        self.journal.append("end", stage=stage, status=status, values=values, tags=tags, folder=folder)
        if stage == "prepare" and status == "FINISHED":
            self._data()

    def _data(self) -> None:
        """The data set that the execution learns from."""
        if not self._files.manifest.is_file():
            return
        digest, source = hashlib.sha256(self._files.manifest.read_bytes()).hexdigest(), self._params.data.source
        dataset = {
            "name": source,
            "digest": digest[:36],  # as many characters as MLflow takes
            "source_type": "local",
            "source": json.dumps({"uri": str(self._params.data.root)}),
            "profile": json.dumps(figures.record(self._files, "prepare")),
        }
        self.journal.append("tag", tags={"data_digest": digest, **self._lock()}, dataset=dataset)

    def _lock(self) -> dict[str, str]:
        """What dvc.lock holds by now: dvc writes it after each stage."""
        path = self._files.root / "dvc.lock"
        return {"dvc_lock_digest": hashlib.sha256(path.read_bytes()).hexdigest()} if path.is_file() else {}

    # --- where cached figures come from -------------------------------------------------------------------------------

    def _remember(self, stage: str) -> None:
        begun = [n for n, event in self.journal.events() if event.kind == "begin" and event.stage == stage]
        entry = f"{self.journal.id}/{begun[-1]}"
        write_json(self._origin(stage), {"digest": self._digest(stage), "entry": entry})

    def _original(self, stage: str) -> str | None:
        """The event of what computed what now lies in metrics/<stage>.json, if it was here."""
        try:
            origin = read_json(self._origin(stage))
            return str(origin["entry"]) if origin["digest"] == self._digest(stage) else None
        except (OSError, ValueError, KeyError):
            return None

    def _origin(self, stage: str) -> Path:
        return self._files.tracking / "origins" / f"{stage}.json"

    def _digest(self, stage: str) -> str:
        return hashlib.sha256(self._files.metrics(stage).read_bytes()).hexdigest()


def upload_folder(files: Files, stage: str) -> Path | None:
    """What a stage uploads: the ONNX files with their papers, the report with its pictures."""
    return {"export": files.artifacts("export"), "benchmark": files.report}.get(stage)


def _sources(root: Path) -> dict[str, str]:
    """Tags that tell what the run was made from."""
    found, changed = git_cli.commit(root)
    if changed is None:
        return {"git_commit": found}
    return {"mlflow.source.git.commit": found, "git_commit": found, "git_dirty": str(changed).lower()}
