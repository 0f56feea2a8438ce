"""Record a stage while it runs, and start the process that brings MLflow up to date beside it.

Figures come from the files that a stage wrote, so a stage that ran and one that DVC took from its cache are recorded by
the same lines. `SMALLER_STUDENT_TRACKING=off` switches all of this off.
"""

import hashlib
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pipeline
from pipeline.config import Params
from pipeline.files import Files, read_json
from pipeline.records import RECORDS
from pipeline.system import git_cli
from pipeline.system.locks import locked
from pipeline.tracking import metrics
from pipeline.tracking.execution import Execution, ProcessId
from pipeline.tracking.run_record import EXECUTION, Point, Records, RunRecord, Status, executions
from pipeline.tracking.store import UriError, check_uri, tracking_uri

log = logging.getLogger(__name__)

PICTURES = ("pareto.png", "panel-01.png")
"""Of the report, for the execution itself."""
FLOW_RUN = "SMALLER_STUDENT_FLOW_RUN"
"""Environment variable with the id of a Prefect flow run, for the stages below it."""
RELEASE_DIGEST = "release_digest"
"""Tag of an export run: SHA-256 of its SHA256SUMS, by which `publish` finds the run that holds a release."""
PATIENCE = 2.5
"""Seconds that all stages of an execution together wait for a server, of MLflow or of a database."""
LOCAL_PATIENCE = 120.0
"""Seconds that a stage waits for an SQLite file: the first time its tables are made."""
NICE = 10
"""Priority of uploads: the next stage, which starts meanwhile, goes first."""
QUIET = {"benchmark"}
"""Stages that measure time: nothing is uploaded while they run."""


def enabled() -> bool:
    """Whether anything is recorded at all."""
    return os.environ.get("SMALLER_STUDENT_TRACKING", "").lower() != "off"


def flatten(params: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted names and texts of all values."""
    for key, value in params.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)


class Recorder:
    """Writes the records of one execution."""

    def __init__(self, files: Files, params: Params, execution: Execution) -> None:
        self._files, self._params, self._execution = files, params, execution
        self.records = Records.of(files, execution)

    def begin(self, stage: str | None, changed: Collection[str] = ()) -> str:
        """Begin the execution if no stage has, record the stages before this one that it did not run, and begin.

        Args:
            stage: The stage; None records from disk all stages that the execution has not recorded.
            changed: Stages whose files are not, or no longer, what this execution led to.

        Returns:
            Name of the stage's record; empty for None.
        """
        # `sync` may complete the execution at the same moment.
        with locked(self.records.folder / "begin.lock", "the beginning of a stage", patience=-1):
            if self.records.execution() is None:
                self._begin_execution()
            outcomes = self.records.outcomes()
            for earlier in RECORDS:
                if earlier == stage or earlier in changed:
                    break
                if outcomes.get(earlier) != "FINISHED" and self._files.metrics(earlier).is_file():
                    self._record_cached(earlier)
            if stage is None:
                self._sum_up()
                return ""
            name = self.records.new_name(stage)
            self.records.write(name, self._new(stage, {"cached": "false"}))
            return name

    def end(self, name: str, status: Status, ended: float, error: str = "") -> None:
        """Record how a stage ended."""
        record = self.records.read(name)
        if record is None:
            return
        if error:
            record = record.changed(tags={**record.tags, "error": error.splitlines()[0][:500]})
        if status == "FINISHED":
            seconds = read_json(self._files.timings(record.stage))["seconds"]
            times = {f"time/{part}": value for part, value in seconds.items()}
            record = self._with_results(record, times)
            left = {"export": self._files.artifacts("export"), "benchmark": self._files.report}.get(record.stage)
            if left is not None and left.is_dir():
                names = sorted(path.name for path in left.iterdir())
                record = record.changed(folder=self.records.keep(left, names, left.name))
        self.records.write(name, record.changed(status=status, ended=ended))
        if status == "FINISHED":
            self._sum_up()

    # --- the execution ------------------------------------------------------------------------------------------------

    def _begin_execution(self) -> None:
        budget, data = self._params.student.budget, self._params.data
        goal = f"-{budget.reduction:.0%} {budget.of}" if self._params.student.budgeted else "uncompressed"
        params = self._params.model_dump(mode="json")
        tags = {
            "mlflow.source.name": self._files.root.name,
            "mlflow.source.type": "PROJECT",
            "params_digest": hashlib.sha256(json.dumps(params, sort_keys=True).encode()).hexdigest(),
            **_sources(self._files.root),
            **({"flow_run_id": os.environ[FLOW_RUN]} if os.environ.get(FLOW_RUN) else {}),
        }
        record = RunRecord(
            title=f"{data.source}, {goal}, {datetime.now():%m-%d %H:%M}",  # by which charts distinguish executions
            process=self._execution.owner,
            began=self.records.moment(),
            tags=tags,
            params=dict(flatten(params)),
            experiment=self._params.tracking.experiment,
            root=str(self._files.root),
        )
        self.records.write(EXECUTION, record)

    def _sum_up(self) -> None:
        """Record what the execution learned from, and at its end what it led to."""
        record = self.records.execution()
        if record is None:
            return
        lock = self._files.root / "dvc.lock"
        tags = {"dvc_lock_digest": _sha256(lock)} if lock.is_file() else {}
        if "prepare" in self.records.outcomes() and self._files.manifest.is_file():
            digest, source = _sha256(self._files.manifest), self._params.data.source
            tags["data_digest"] = digest
            dataset = {
                "name": source,
                "digest": digest[:36],  # as many characters as MLflow takes
                "source_type": "local",
                "source": json.dumps({"uri": str(self._params.data.root)}),
                "profile": json.dumps(metrics.record(self._files, "prepare")),
            }
            record = record.changed(dataset=dataset)
        if self.records.outcomes().get("benchmark") == "FINISHED":
            pictures = [name for name in PICTURES if (self._files.report / name).is_file()]
            folder = self.records.keep(self._files.report, pictures, "pictures") if pictures else ""
            record = record.changed(figures=metrics.summary(self._files), folder=folder)
        self.records.write(EXECUTION, record.changed(tags={**record.tags, **tags}))

    # --- stages -------------------------------------------------------------------------------------------------------

    def _new(self, stage: str, tags: dict[str, str]) -> RunRecord:
        here = ProcessId.of(os.getpid())
        return RunRecord(title=stage, stage=stage, process=here, began=self.records.moment(), tags=tags)

    def _with_results(self, record: RunRecord, more: Mapping[str, float]) -> RunRecord:
        """A stage's record with the figures of the files that it left."""
        tags = dict(record.tags)
        sums = self._files.artifacts("export") / "SHA256SUMS"
        if record.stage == "export" and sums.is_file():
            tags[RELEASE_DIGEST] = _sha256(sums)
        digest = _sha256(self._files.metrics(record.stage))
        return record.changed(
            figures={**metrics.final_metrics(self._files, record.stage), **more}, digest=digest, tags=tags
        )

    def _record_cached(self, stage: str) -> None:
        """Record a stage that did not run in this execution, from the files that it left."""
        original = self._original(stage)
        record = self._new(stage, {"cached": "true", **({"original": original} if original else {})})
        rows = metrics.curves(self._files.plots(stage))
        curve = tuple(
            Point(time=record.began, step=int(row["epoch"]), values=found)
            for row in rows
            if (found := metrics.curve(row))
        )
        record = self._with_results(record, {}).changed(curve=curve, status="FINISHED", ended=record.began)
        self.records.write(self.records.new_name(stage), record)

    def _original(self, stage: str) -> str | None:
        """Which record holds the run that computed what lies in metrics/<stage>.json, if it ran here."""
        digest = _sha256(self._files.metrics(stage))
        for records in reversed(list(executions(self._files))):
            for name, record in records.stages().items():
                if record.stage == stage and record.digest == digest and record.tags.get("cached") == "false":
                    return f"{records.id}/{name}"
        return None


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _sources(root: Path) -> dict[str, str]:
    """Tags with the commit of the sources."""
    found, changed = git_cli.commit(root)
    if changed is None:
        return {"git_commit": found}
    return {"mlflow.source.git.commit": found, "git_commit": found, "git_dirty": str(changed).lower()}


# --- a stage that runs ------------------------------------------------------------------------------------------------


class StageRun:
    """Records one stage while it runs; a context manager whose exit records how it ended."""

    def __init__(self, files: Files, params: Params, execution: Execution, stage: str) -> None:
        self._files, self._stage, self._uri = files, stage, tracking_uri(files)
        self._recorder = Recorder(files, params, execution) if enabled() else None
        self._upload: subprocess.Popen[bytes] | None = None
        self._name = ""

    def __enter__(self) -> Self:
        if self._recorder is not None:
            self._name = self._recorder.begin(self._stage)
            self._clock = time.monotonic()
            self._start_upload(self._recorder.records)
        return self

    def curve(self, row: Mapping[str, float]) -> None:
        """Record one row of the curve, as of now."""
        if self._recorder is not None and (record := self._recorder.records.read(self._name)):
            point = Point(time=self._now(record), step=int(row.get("epoch", 0)), values=metrics.curve(row))
            self._recorder.records.write(self._name, record.changed(curve=(*record.curve, point)))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._recorder is None or (record := self._recorder.records.read(self._name)) is None:
            return
        status: Status = "FINISHED" if kind is None else "FAILED" if issubclass(kind, Exception) else "KILLED"
        self._recorder.end(self._name, status, self._now(record), str(error or ""))
        if self._upload is None:
            return
        assert self._upload.stdin is not None  # noqa: S101 - opened as a pipe
        with suppress(OSError):  # it may have been killed
            self._upload.stdin.write(b"\n")  # closing alone ends nothing while forked image loaders hold the pipe, too
            self._upload.stdin.close()
        if status != "KILLED":  # a stage that is stopped ends at once
            self._wait(self._recorder.records, self._upload)

    def _now(self, record: RunRecord) -> float:
        """The time by the clock of the record's beginning, whatever happened to the system's clock since."""
        return record.began + time.monotonic() - self._clock

    def _start_upload(self, records: Records) -> None:
        """Start the process that brings MLflow up to date; it may go on for a while after the stage."""
        try:
            check_uri(self._uri)
        except UriError as error:
            log.warning("%s; nothing is uploaded", error)
            return
        order = {
            "root": str(self._files.root),
            "state": str(self._files.state),
            "records": str(records.folder),
            "name": self._name,
            "quiet": self._stage in QUIET,
        }
        # It runs the code that this process runs, whatever else is installed.
        search = os.pathsep.join(filter(None, [str(Path(pipeline.__file__).parents[1]), os.environ.get("PYTHONPATH")]))
        self._upload = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "pipeline.tracking.sync", json.dumps(order)],
            stdin=subprocess.PIPE,  # ends with the stage, even if it is killed
            stdout=subprocess.DEVNULL,  # a reader of the stage's output must not wait for it
            stderr=subprocess.DEVNULL,
            cwd=self._files.root,
            env={**os.environ, "PYTHONPATH": search},
            start_new_session=True,  # Ctrl-C is for the stage
        )
        if hasattr(os, "setpriority"):
            with suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, self._upload.pid, NICE)

    def _wait(self, records: Records, upload: "subprocess.Popen[bytes]") -> None:
        """Wait until MLflow has everything, but not for long: `sync` uploads the rest later."""
        spent = sum(record.waited for record in records.stages().values())
        local = self._uri.startswith("sqlite")
        limit = LOCAL_PATIENCE if local else max(0.0, PATIENCE - spent)
        began = time.monotonic()
        while upload.poll() is None and records.pending(self._uri) and time.monotonic() - began < limit:
            time.sleep(0.1)
        if records.pending(self._uri):
            problem = records.problem.read_text(encoding="utf-8").strip() if records.problem.is_file() else "it is slow"
            log.warning("MLflow at %s does not have all of this yet (%s); `smaller-student sync` uploads the rest",
                        self._uri, problem)  # fmt: skip
        for notice in records.take_notices():
            log.warning("MLflow at %s: %s", self._uri, notice)
        if (record := records.read(self._name)) is not None and not local:
            records.write(self._name, record.changed(waited=time.monotonic() - began))


# --- stages that ran no code ------------------------------------------------------------------------------------------


def complete(files: Files, params: Params, execution: Execution, changed: Collection[str] = ()) -> None:
    """Record from disk the stages that an execution did not run; `changed` as in `Recorder.begin`."""
    recorder = Recorder(files, params, execution)
    if enabled() and any(stage not in recorder.records.outcomes() for stage in RECORDS):
        recorder.begin(None, changed)


def complete_last(files: Files, params: Params, changed: Callable[[], Collection[str]]) -> None:
    """Complete the checkout's last execution: at the end of a plain `dvc repro`, cached stages run no code.

    Args:
        files: Paths of the checkout.
        params: Params of the checkout.
        changed: Returns the stages that are stale, as in `Recorder.begin`; called only where stages are missing, since
            `dvc status` takes long and fails while a stage runs.
    """
    mine = [one for one in executions(files) if (record := one.execution()) and record.root == str(files.root)]
    if not mine or mine[-1].kind == "flow" or (record := mine[-1].execution()) is None:
        return
    outcomes = mine[-1].outcomes()
    missing = any(stage not in outcomes for stage in RECORDS)
    if missing and record.process.alive is False and set(outcomes.values()) == {"FINISHED"}:
        complete(files, params, Execution(mine[-1].kind, mine[-1].id, record.process), changed())
