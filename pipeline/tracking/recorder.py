"""Write run records of stages, and start the background process that uploads them to MLflow.

Final metrics are read from the files of a stage, so the same code records stages that ran and stages that DVC took from
its cache. `SMALLER_STUDENT_TRACKING=off` disables tracking.
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
from pipeline.tracking.errors import UriError, shown
from pipeline.tracking.execution import Execution, ProcessId
from pipeline.tracking.run_record import EXECUTION, ExecutionRecords, Point, RunRecord, Status, all_executions
from pipeline.tracking.store import check_uri, store_key, tracking_uri

log = logging.getLogger(__name__)

PICTURES = ("pareto.png", "panel-01.png")
"""Pictures of the report that are uploaded to the parent run."""
FLOW_RUN = "SMALLER_STUDENT_FLOW_RUN"
"""Environment variable by which a flow run passes its Prefect id to its stages."""
RELEASE_DIGEST = "release_digest"
"""Tag of an export run: SHA-256 of its SHA256SUMS, by which `publish` finds the run with the files of a release."""
SERVER_TIMEOUT = 2.5
"""Seconds that all stages of an execution together wait for uploads to a server (MLflow or a database)."""
SQLITE_TIMEOUT = 120.0
"""Seconds that a stage waits for uploads to an SQLite file, whose tables are created by the first upload."""
NICE = 10
"""Niceness of the upload process, so that it does not slow down the next stage."""
TIMED_STAGES = {"benchmark"}
"""Stages that measure latencies, during which nothing is uploaded."""


def enabled() -> bool:
    """Return whether tracking is enabled."""
    return os.environ.get("SMALLER_STUDENT_TRACKING", "").lower() != "off"


def flatten(params: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the dotted name of each value, and the value as text."""
    for key, value in params.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)


class Recorder:
    """Writes the run records of one execution."""

    def __init__(self, files: Files, params: Params, execution: Execution) -> None:
        self._files, self._params, self._execution = files, params, execution
        self.records = ExecutionRecords.of(files, execution)

    def begin(self, stage: str | None, changed: Collection[str] = ()) -> str:
        """Write the record of a stage that starts, and those of the execution and of cached stages before it.

        Args:
            stage: Name of the stage; None records only the cached stages.
            changed: Stages whose files on disk do not belong to this execution; neither they nor later stages are
                recorded as cached.

        Returns:
            Name of the stage's record; "" if `stage` is None.
        """
        # `sync` may record cached stages of the same execution at the same time.
        with locked(self.records.folder / "begin.lock", "recording a stage", timeout=-1):
            if self.records.execution() is None:
                self._begin_execution()
            statuses = self.records.statuses()
            for earlier in RECORDS:
                if earlier == stage or earlier in changed:
                    break
                if statuses.get(earlier) != "FINISHED" and self._files.metrics(earlier).is_file():
                    self._record_cached(earlier)
            if stage is None:
                self._update_execution()
                return ""
            name = self.records.new_name(stage)
            self.records.write(name, self._new_record(stage, {"cached": "false"}))
            return name

    def end(self, name: str, status: Status, ended: float, error: str = "") -> None:
        """Write the final record of a stage, with its metrics and artifacts if it succeeded."""
        record = self.records.read(name)
        if record is None:
            return
        if error:
            record = record.updated(tags={**record.tags, "error": error.splitlines()[0][:500]})
        if status == "FINISHED":
            seconds = read_json(self._files.timings(record.stage))["seconds"]
            times = {f"time/{part}": value for part, value in seconds.items()}
            record = self._with_results(record, times)
            folder = {"export": self._files.artifacts("export"), "benchmark": self._files.report}.get(record.stage)
            if folder is not None and folder.is_dir():
                names = sorted(path.name for path in folder.iterdir())
                record = record.updated(folder=self.records.copy_for_upload(folder, names, folder.name))
        self.records.write(name, record.updated(status=status, ended=ended))
        if status == "FINISHED":
            self._update_execution()

    def _begin_execution(self) -> None:
        budget, data = self._params.student.budget, self._params.data
        target = f"-{budget.reduction:.0%} {budget.of}" if self._params.student.budgeted else "uncompressed"
        params = self._params.model_dump(mode="json")
        tags = {
            "mlflow.source.name": self._files.root.name,
            "mlflow.source.type": "PROJECT",
            "params_digest": hashlib.sha256(json.dumps(params, sort_keys=True).encode()).hexdigest(),
            **_git_tags(self._files.root),
            **({"flow_run_id": os.environ[FLOW_RUN]} if os.environ.get(FLOW_RUN) else {}),
        }
        record = RunRecord(
            title=f"{data.source}, {target}, {datetime.now():%m-%d %H:%M}",  # the legend of charts in MLflow
            process=self._execution.owner,
            began=self.records.next_start(),
            tags=tags,
            params=dict(flatten(params)),
            experiment=self._params.tracking.experiment,
            root=str(self._files.root),
        )
        self.records.write(EXECUTION, record)

    def _update_execution(self) -> None:
        """Add the data set to the record of the execution, and after `benchmark` its metrics and pictures."""
        record = self.records.execution()
        if record is None:
            return
        lock = self._files.root / "dvc.lock"
        tags = {"dvc_lock_digest": _sha256(lock)} if lock.is_file() else {}
        if "prepare" in self.records.statuses() and self._files.manifest.is_file():
            digest, source = _sha256(self._files.manifest), self._params.data.source
            tags["data_digest"] = digest
            tags["protocol"] = metrics.shown_protocol(self._files, self._params.data.protocol)
            dataset = {
                "name": source,
                "digest": digest[:36],  # MLflow's limit
                "source_type": "local",
                "source": json.dumps({"uri": str(self._params.data.root)}),
                "profile": json.dumps(metrics.load_metrics(self._files, "prepare")),
            }
            record = record.updated(dataset=dataset)
        if self.records.statuses().get("benchmark") == "FINISHED":
            pictures = [name for name in PICTURES if (self._files.report / name).is_file()]
            folder = self.records.copy_for_upload(self._files.report, pictures, "pictures") if pictures else ""
            record = record.updated(figures=metrics.summary(self._files), folder=folder)
        self.records.write(EXECUTION, record.updated(tags={**record.tags, **tags}))

    def _new_record(self, stage: str, tags: dict[str, str]) -> RunRecord:
        here = ProcessId.of(os.getpid())
        return RunRecord(title=stage, stage=stage, process=here, began=self.records.next_start(), tags=tags)

    def _with_results(self, record: RunRecord, times: Mapping[str, float]) -> RunRecord:
        """Add the final metrics of a stage, read from its files, to its record."""
        tags = dict(record.tags)
        sums = self._files.artifacts("export") / "SHA256SUMS"
        if record.stage == "export" and sums.is_file():
            tags[RELEASE_DIGEST] = _sha256(sums)
        if record.stage != "prepare":
            tags["protocol"] = metrics.shown_protocol(self._files, self._params.data.protocol)
        digest = _sha256(self._files.metrics(record.stage))
        figures = {**metrics.final_metrics(self._files, record.stage), **times}
        return record.updated(figures=figures, digest=digest, tags=tags)

    def _record_cached(self, stage: str) -> None:
        """Record a stage that did not run in this execution from its files on disk."""
        original = self._find_original(stage)
        record = self._new_record(stage, {"cached": "true", **({"original": original} if original else {})})
        curve = tuple(
            Point(time=record.began, step=int(row["epoch"]), values=values)
            for row in metrics.load_curves(self._files.plots(stage))
            if (values := metrics.curve_metrics(row))
        )
        record = self._with_results(record, {}).updated(curve=curve, status="FINISHED", ended=record.began)
        self.records.write(self.records.new_name(stage), record)

    def _find_original(self, stage: str) -> str | None:
        """Return `execution id/record name` of the run that computed metrics/<stage>.json, if it ran here."""
        digest = _sha256(self._files.metrics(stage))
        for records in reversed(list(all_executions(self._files))):
            for name, record in records.stages().items():
                if record.stage == stage and record.digest == digest and record.tags.get("cached") == "false":
                    return f"{records.id}/{name}"
        return None


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _git_tags(root: Path) -> dict[str, str]:
    commit, changed = git_cli.head_commit(root)
    if changed is None:
        return {"git_commit": commit}
    return {"mlflow.source.git.commit": commit, "git_commit": commit, "git_dirty": str(changed).lower()}


# --- running stages ---------------------------------------------------------------------------------------------------


class StageRun:
    """Context manager that records one stage while it runs, and its status and results when it ends."""

    def __init__(self, files: Files, params: Params, execution: Execution, stage: str) -> None:
        self._files, self._stage, self._uri = files, stage, tracking_uri(files)
        self._recorder = Recorder(files, params, execution) if enabled() else None
        self._upload: subprocess.Popen[bytes] | None = None
        self._name = ""

    def __enter__(self) -> Self:
        if self._recorder is not None:
            self._name = self._recorder.begin(self._stage)
            self._started = time.monotonic()
            self._start_upload(self._recorder.records)
        return self

    def curve(self, row: Mapping[str, float]) -> None:
        """Record the metrics of one epoch with the present time."""
        if self._recorder is not None and (record := self._recorder.records.read(self._name)):
            point = Point(time=self._now(record), step=int(row.get("epoch", 0)), values=metrics.curve_metrics(row))
            self._recorder.records.write(self._name, record.updated(curve=(*record.curve, point)))

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
        with suppress(OSError):  # the upload may have been killed
            self._upload.stdin.write(b"\n")  # closing is not enough while forked image loaders hold the pipe too
            self._upload.stdin.close()
        if status != "KILLED":  # a killed stage must end at once
            self._wait(self._recorder.records, self._upload)

    def _now(self, record: RunRecord) -> float:
        """Return the present time, unaffected by changes of the system clock since the stage began."""
        return record.began + time.monotonic() - self._started

    def _start_upload(self, records: ExecutionRecords) -> None:
        """Start the upload process, which may run on for a while after the stage has ended."""
        try:
            check_uri(self._uri)
        except UriError as error:
            log.warning("%s; nothing is uploaded to MLflow", error)
            return
        arguments = {
            "root": str(self._files.root),
            "state": str(self._files.state),
            "records": str(records.folder),
            "name": self._name,
            "quiet": self._stage in TIMED_STAGES,
        }
        # The upload process must import the code of this process, not an installed version.
        root = str(Path(pipeline.__file__).parents[1])
        search_path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        self._upload = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "pipeline.tracking.background", json.dumps(arguments)],
            stdin=subprocess.PIPE,  # closed when the stage ends, even if it is killed
            stdout=subprocess.DEVNULL,  # readers of the stage's output must not wait for the upload
            stderr=subprocess.DEVNULL,
            cwd=self._files.root,
            env={**os.environ, "PYTHONPATH": search_path},
            start_new_session=True,  # Ctrl-C must not end the upload
        )
        if hasattr(os, "setpriority"):
            with suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, self._upload.pid, NICE)

    def _wait(self, records: ExecutionRecords, upload: "subprocess.Popen[bytes]") -> None:
        """Wait a limited time for the upload; `smaller-student sync` uploads the rest later."""
        waited = sum(record.waited for record in records.stages().values())
        local = self._uri.startswith("sqlite")
        timeout = SQLITE_TIMEOUT if local else max(0.0, SERVER_TIMEOUT - waited)
        started = time.monotonic()
        while upload.poll() is None and self._pending(records) and time.monotonic() - started < timeout:
            time.sleep(0.1)
        failed, notices = records.problem.is_file(), records.take_notices()
        if self._pending(records) and (failed or not notices):
            problem = records.problem.read_text(encoding="utf-8").strip() if failed else "it takes longer"
            log.warning("the upload to MLflow at %s is not complete: %s; `smaller-student sync` uploads the rest",
                        shown(self._uri), problem)  # fmt: skip
        for notice in notices:
            log.warning("MLflow at %s: %s", shown(self._uri), notice)
        if (record := records.read(self._name)) is not None and not local:
            records.write(self._name, record.updated(waited=time.monotonic() - started))

    def _pending(self, records: ExecutionRecords) -> list[str]:
        return records.pending(store_key(self._files))  # again each time, since the upload identifies the store


# --- stages that ran no code ------------------------------------------------------------------------------------------


def record_cached_stages(files: Files, params: Params, execution: Execution, changed: Collection[str] = ()) -> None:
    """Record the stages that an execution did not run from their files; `changed` as in `Recorder.begin`."""
    recorder = Recorder(files, params, execution)
    if enabled() and any(stage not in recorder.records.statuses() for stage in RECORDS):
        recorder.begin(None, changed)


def complete_last_execution(files: Files, params: Params, changed: Callable[[], Collection[str]]) -> None:
    """Record the cached stages after the last stage that the checkout's last `dvc repro` ran.

    Cached stages run no code, so `dvc repro` itself cannot record them. `changed` returns the argument of
    `Recorder.begin`; it is called only if stages are missing, since `dvc status` is slow and fails while a stage runs.
    """
    mine = [
        records
        for records in all_executions(files)
        if (record := records.execution()) and record.root == str(files.root)
    ]
    if not mine or mine[-1].kind == "flow" or (record := mine[-1].execution()) is None:
        return
    statuses = mine[-1].statuses()
    missing = any(stage not in statuses for stage in RECORDS)
    if missing and record.process.alive is False and set(statuses.values()) == {"FINISHED"}:
        execution = Execution(mine[-1].kind, mine[-1].id, record.process)
        record_cached_stages(files, params, execution, changed())
