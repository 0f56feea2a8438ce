"""Upload run records to MLflow: one parent run per execution, one child run per stage.

The upload is idempotent and may be interrupted at any point: runs are found by the tag `entry`, and MLflow stores
points of a metric with the same time, step and value once. It runs beside each stage (`background`), in the command
`smaller-student sync` and in the flow.
"""

import getpass
import logging
import shutil
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import islice
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, Metric, Param, Run, RunTag, ViewType

from pipeline.files import Files
from pipeline.system.locks import BusyError
from pipeline.tracking import errors, store
from pipeline.tracking.errors import TrackingError
from pipeline.tracking.run_record import EXECUTION, ExecutionRecords, RunRecord, all_executions

log = logging.getLogger(__name__)

ENTRY = "entry"
"""Tag that identifies a run across machines: `execution id/record name`."""
MAX_PARAMS, MAX_TAGS, MAX_METRICS = 100, 100, 1000
"""MLflow's limits for one call of `log_batch`."""
LOCK_TIMEOUT = 45.0
"""Seconds that a command waits for another process that uploads the same execution."""
LARGE = {"export"}
"""Stages whose files are deleted after their upload; `publish` uploads a release to another store."""
MAX_FILE_SECONDS = 30.0
"""Seconds that failed uploads to one artifact location may take before its other files are left to a later call."""
RESTORE = "it is not uploaded again (to undo this, restore it there and run `smaller-student sync --again`)"
UPLOAD_AGAIN = "if it was not purged but an older backup was restored there, run `smaller-student sync --again`"
"""What a user can do about a run in the trash of MLflow, and about one that MLflow does not have at all."""
MAX_EXECUTIONS = 200
"""Number of executions whose records are kept; older records are deleted after their upload."""


class Sync:
    """Uploads the run records of a checkout to its MLflow store.

    Args:
        timeout: Seconds to wait for another process that uploads the same execution; 0 skips the execution.
        again: Upload everything again, except runs in the trash of MLflow; it keeps no duplicates.

    Attributes:
        uploaded: Number of executions that were not up to date, except deleted ones.
        file_errors: Errors of the artifact store.
        file_seconds: Seconds that failed uploads of files took, by artifact location.
        failed: First error that a login, or another attempt, may not have.
    """

    def __init__(self, files: Files, timeout: float = 0, again: bool = False) -> None:
        self.files, self.uri, self._timeout, self._again = files, store.tracking_uri(files), timeout, again
        self.uploaded, self.file_errors, self.file_seconds = 0, list[str](), defaultdict[str, float](float)
        self.failed: TrackingError | None = None

    @cached_property
    def client(self) -> MlflowClient:
        return store.open_store(self.files)

    @cached_property
    def store(self) -> str:
        """Identity of the store.

        Raises:
            TrackingError: If the store cannot be reached.
        """
        try:
            return store.identify(self.files, self.client)
        except TrackingError:
            raise
        except Exception as error:
            raise self._failed(error) from error

    def upload_all(self) -> None:
        """Upload all executions; if MLflow rejects one, the others are still uploaded.

        Raises:
            TrackingError: If the store cannot be reached; the next call continues from there.
            BusyError: If another process uploaded an execution for longer than the timeout; the others are uploaded.
        """
        every, busy = list(all_executions(self.files)), None
        for records in every:
            try:  # a store that was restored from a backup lacks the last execution
                self.upload(records, verify=bool(self._timeout) and records is every[-1])
            except BusyError as error:
                busy = error
        for records in every[:-MAX_EXECUTIONS]:
            if (parent := records.parent_record()) and parent.ended is not None and not records.pending(self.store):
                shutil.rmtree(records.folder, ignore_errors=True)
        if busy is not None and self._timeout:
            raise busy

    def upload(self, records: ExecutionRecords, verify: bool = False) -> None:
        """Upload one execution, and repeat while its records change.

        Args:
            records: Records of the execution.
            verify: Check that the store has its runs even if it is up to date.

        Raises:
            TrackingError: If the store cannot be reached.
            BusyError: If another process uploads the execution for longer than the timeout.
        """
        again, uploaded, repeated = self._again, False, False
        records.mark_killed()
        while (pending := again or bool(records.pending(self.store))) or verify:
            with records.upload_lock(self._timeout):
                try:
                    uploaded |= _Upload(self, records, again).run() and pending
                except Exception as error:
                    self._check_store(error)
                    if errors.is_network_error(error) and not repeated:
                        repeated = True
                        continue
                    if errors.http_status(error) == 403:
                        denied = errors.failure(self.uri, error).problem.removeprefix("it ")
                        records.add_notice(f"experiment {records.experiment}: MLflow {denied}")
                    elif errors.http_status(error) == 401 or errors.is_os_error(error):
                        self.failed = self.failed or self._failed(error)
                    else:
                        cause = errors.root_cause(error)
                        records.add_notice(f"MLflow rejected part of execution {records.id} ({cause})")
                    return
            again = verify = False
            if self.file_errors:
                break
        self.uploaded += uploaded

    def check(self) -> None:
        """Check that MLflow and its artifact store accepted everything.

        Raises:
            TrackingError: If they did not.
        """
        if self.failed is not None:
            raise self.failed
        if self.file_errors:
            place, problem = f"MLflow at {errors.shown(self.uri)}", f"its artifact store failed: {self.file_errors[0]}"
            remedy = "the files stay on disk, and `smaller-student sync` uploads them later"
            raise TrackingError(f"{place} has all figures and statuses, but {problem}; {remedy}", problem)

    def _check_store(self, error: Exception) -> None:
        """Check after an error whether the store can be reached at all.

        Raises:
            TrackingError: If it cannot.
        """
        try:
            self.client.search_experiments(max_results=1)
        except TrackingError:
            raise
        except Exception as cause:
            raise self._failed(cause) from error

    def _failed(self, cause: Exception) -> TrackingError:
        error = errors.failure(self.uri, cause)
        return TrackingError(f"{error}; run records stay on disk", error.problem)


class _Upload:
    """Upload of one execution to one store."""

    def __init__(self, sync: Sync, records: ExecutionRecords, again: bool) -> None:
        self.sync, self.client, self.records = sync, sync.client, records
        self.state = {} if again else records.synced(sync.store)
        self._locations: dict[str, str] = {}

    def run(self) -> bool:
        """Upload all records that the store does not have in their present state; False if the execution is deleted."""
        parent, stages = self.records.parent_record(), self.records.stages()
        if parent is None:
            return False
        names = [EXECUTION, *stages]
        experiment = store.experiment_id(self.client, self.sync.files, parent.experiment)
        if experiment is None:
            self._skip(names, f"experiment {parent.experiment} was deleted in MLflow", RESTORE)
            return False
        existing = {
            run.data.tags.get(ENTRY, ""): run for run in self._search(experiment, "execution_id", self.records.id)
        }
        runs = {name: existing.get(f"{self.records.id}/{name}") for name in names}
        deleted = [name for name, run in runs.items() if run is not None and run.info.lifecycle_stage == "deleted"]
        missing = [name for name, run in runs.items() if run is None and "run" in self.state.get(name, {})]
        for found, reason, remedy in ((deleted, "was deleted", RESTORE), (missing, "is missing", UPLOAD_AGAIN)):
            reason = f"a run of execution {parent.title!r} {reason} in MLflow"
            self._skip(names if EXECUTION in found else found, reason, remedy)
        skipped = {*deleted, *missing}
        if EXECUTION in skipped:
            return False
        parent_id = self._run_id(EXECUTION, parent, runs[EXECUTION], experiment, {})
        for name, record in stages.items():
            if name not in skipped and not self._is_synced(name, record):
                tags = {**parent.tags, "mlflow.parentRunId": parent_id, "stage": record.stage}
                if entry := record.tags.get("original"):
                    for original in self._search(experiment, ENTRY, entry):
                        tags["original_run"] = original.info.run_id
                self._write(name, record, self._run_id(name, record, runs[name], experiment, tags))
        if not self._is_synced(EXECUTION, parent):  # after the stages; files follow
            self._write(EXECUTION, parent, parent_id)
        self._upload_files({**stages, EXECUTION: parent})
        return True

    def _search(self, experiment: str, tag: str, value: str) -> list[Run]:
        return list(self.client.search_runs([experiment], f"tags.{tag} = '{value}'", ViewType.ALL, max_results=1000))

    def _is_synced(self, name: str, record: RunRecord) -> bool:
        return self.records.is_synced(record, self.state.get(name, {}))

    def _save_state(self, name: str, **state: Any) -> None:
        self.state[name] = {**self.state.get(name, {}), **state}
        self.records.save_synced(self.sync.store, self.state)

    def _skip(self, names: list[str], reason: str, remedy: str) -> None:
        """Stop uploading runs that MLflow does not have any more; report a parent run once, and not its stages."""
        reported = "gone" in self.state.get(EXECUTION, {})
        new = [name for name in names if "gone" not in self.state.get(name, {})]
        if new and not reported:
            self.records.add_notice(f"{reason}; {remedy}")
        for name in new:
            self._save_state(name, gone=reason)

    def _run_id(self, name: str, record: RunRecord, run: Run | None, experiment: str, tags: dict[str, str]) -> str:
        """Return the id of a record's run, creating the run if it is missing."""
        if run is None:
            entry = {ENTRY: f"{self.records.id}/{name}", "execution_id": self.records.id, "mlflow.user": _user()}
            run = self.client.create_run(experiment, _ms(record.began), {**tags, **record.tags, **entry}, record.title)
        self._save_state(name, run=run.info.run_id)
        self._locations[name] = run.info.artifact_uri.removesuffix(f"/{run.info.run_id}/artifacts")
        return str(run.info.run_id)

    def _write(self, name: str, record: RunRecord, run: str) -> None:
        """Upload a record without its files."""
        for params in _chunks([Param(*pair) for pair in record.params.items()], MAX_PARAMS):
            self.client.log_batch(run, params=params)
        points = [
            Metric(key, value, _ms(point.time), point.step)
            for point in record.curve[self.state[name].get("points", 0) :]
            for key, value in point.values.items()
        ]
        if record.ended is not None:
            points += [Metric(key, value, _ms(record.ended), 0) for key, value in record.figures.items()]
        for metrics in _chunks(points, MAX_METRICS):
            self.client.log_batch(run, metrics=metrics)
        for tags in _chunks([RunTag(*pair) for pair in record.tags.items()], MAX_TAGS):
            self.client.log_batch(run, tags=tags)
        if record.dataset:
            self.client.log_inputs(run, [DatasetInput(Dataset(**record.dataset), [])])
        if record.ended is None:
            self.client.update_run(run, status="RUNNING")
        else:
            self.client.set_terminated(run, record.status, _ms(record.ended))
        self._save_state(name, fingerprint=record.fingerprint, points=len(record.curve))

    def _upload_files(self, records: dict[str, RunRecord]) -> None:
        """Upload the files of all records, after everything else, since the artifact store may fail on its own."""
        for name, record in records.items():
            seen = self.state.get(name, {})
            if "gone" in seen or self.records.is_synced(record, seen) or not self.records.has_files(record):
                continue
            location = self._locations[name]  # an experiment whose location is gone must not stop the others
            if self.sync.file_seconds[location] > MAX_FILE_SECONDS:
                return
            folder, started = self.records.files / record.folder, time.monotonic()
            try:
                self.client.log_artifacts(seen["run"], str(folder), record.folder)
            except Exception as error:  # of any artifact store
                self.sync.file_errors.append(errors.root_cause(error))
                self.sync.file_seconds[location] += time.monotonic() - started
                return
            self._save_state(name, files=record.fingerprint)
            if record.stage in LARGE:
                shutil.rmtree(folder, ignore_errors=True)


def _chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    rest = iter(items)
    while chunk := list(islice(rest, size)):
        yield chunk


def _ms(seconds: float) -> int:
    return int(seconds * 1000)


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # the user of a container may have no name
        return "unknown"


def sync(files: Files, again: bool = False) -> tuple[int, list[str]]:
    """Upload all executions of a checkout, waiting for other processes that upload the same ones.

    Returns:
        Number of executions that were not up to date, and messages for the user: runs that were deleted in MLflow,
        executions that MLflow rejected, and experiments that it denies to this login.

    Raises:
        TrackingError: If the store cannot be reached, or its artifact store fails.
        BusyError: If another process uploads an execution for longer than LOCK_TIMEOUT.
    """
    upload = Sync(files, LOCK_TIMEOUT, again)
    upload.upload_all()
    upload.check()
    notices = [notice for records in all_executions(files) for notice in records.take_notices()]
    return upload.uploaded, list(dict.fromkeys(notices))
