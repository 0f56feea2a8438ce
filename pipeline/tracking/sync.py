"""Bring MLflow to what the records hold: one parent run an execution, one child run a stage.

One operation, which may be repeated at any time and after any interruption: runs are found by the tag `entry`, and
points of a metric are the same to MLflow if time, step and value are. It runs beside each stage (`main`, in a process
of its own: importing mlflow takes seconds and must not happen in a process that forks image loaders), in
`smaller-student sync` and in the flow. Beside a stage it leaves an execution alone that another process synchronises.
"""

import getpass
import json
import logging
import os
import shutil
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, Metric, Param, Run, RunTag, ViewType

from pipeline.files import Files, write_text
from pipeline.system.locks import BusyError, locked
from pipeline.tracking import store
from pipeline.tracking.run_record import EXECUTION, Records, RunRecord, executions
from pipeline.tracking.store import TrackingError

log = logging.getLogger(__name__)

ENTRY = "entry"
"""Tag with the execution's id and the record's name: names a run among those of all machines."""
MOST_PARAMS, MOST_TAGS, MOST_METRICS = 100, 100, 1000
"""What MLflow takes in one call."""
INTERVAL = 60.0
"""Seconds between two synchronisations during a stage."""
PATIENCE = 45.0
"""Seconds that a command waits for another process to finish with an execution."""
KEPT = 200
"""Executions whose records are kept; older ones only until MLflow has them."""


class Sync:
    """Brings one store to what the records of a checkout hold.

    Args:
        files: Of the checkout.
        patience: Seconds to wait for another process that synchronises the same execution.
        again: Write everything again that MLflow may have; nothing is doubled.

    Attributes:
        changed: Executions that were not up to date.
    """

    def __init__(self, files: Files, patience: float = 0, again: bool = False) -> None:
        self.files, self.uri, self._patience, self._again = files, store.tracking_uri(files), patience, again
        self.changed = 0

    @cached_property
    def client(self) -> MlflowClient:
        """Opened at its first use, which may fail."""
        return store.open_store(self.files)

    def all(self) -> None:
        """Synchronise all executions, each by itself: one that MLflow refuses holds up no other.

        Raises:
            TrackingError: If the store cannot be reached; what was written until then is remembered.
            BusyError: If another process needed longer than `patience` for one of them; the others are done.
        """
        every, busy = list(executions(self.files)), None
        for records in every:
            try:
                self.one(records)
            except BusyError as error:
                busy = error
        for records in every[:-KEPT]:
            if (whole := records.whole()) and whole.ended is not None and not records.pending(self.uri):
                shutil.rmtree(records.folder, ignore_errors=True)
        if busy is not None and self._patience:
            raise busy

    def one(self, records: Records) -> None:
        """Synchronise one execution, until nothing has changed meanwhile.

        Raises:
            TrackingError: If the store cannot be reached.
            BusyError: If another process does it, and goes on longer than `patience`.
        """
        again, new = self._again, False
        records.end_dead()
        while again or records.pending(self.uri):
            new = True
            with locked(records.folder / "sync.lock", f"the upload of execution {records.id}", self._patience):
                try:
                    _Upload(self, records, again).run()
                except Exception as error:
                    self._check_store(error)
                    records.add_notice(f"MLflow refused a part of execution {records.id} ({store.cause(error)})")
                    return
            again = False
        self.changed += new

    def _check_store(self, error: Exception) -> None:
        """Find out after an error whether the store as a whole is out of reach.

        Raises:
            TrackingError: If it is.
        """
        try:
            self.client.search_experiments(max_results=1)
        except TrackingError:
            raise
        except Exception as other:
            raise TrackingError(
                f"MLflow at {self.uri} cannot be reached ({store.cause(other)}); everything stays on disk"
            ) from error


class _Upload:
    """One execution on its way to one store; `again` forgets what the store has."""

    def __init__(self, sync: Sync, records: Records, again: bool) -> None:
        self.sync, self.client, self.records = sync, sync.client, records
        self.state = records.synced(sync.uri)
        if again:  # whatever the runs hold; a run that was purged stays known as gone
            self.state = {name: {"run": seen["run"]} for name, seen in self.state.items() if "run" in seen}

    def run(self) -> None:
        """Write what the store does not have."""
        whole, stages = self.records.whole(), self.records.stages()
        if whole is None:
            return
        names = [EXECUTION, *stages]
        experiment = store.experiment(self.client, self.sync.files, whole.experiment)
        if experiment is None:
            self._leave(names, f"experiment {whole.experiment} was deleted in MLflow")
            return
        runs = {run.data.tags.get(ENTRY, ""): run for run in self._runs(experiment, "execution_id", self.records.id)}
        known = {name: runs.get(f"{self.records.id}/{name}") for name in names}
        gone = [name for name, run in known.items() if self._is_gone(name, run)]
        gone = names if EXECUTION in gone else gone
        self._leave(gone, f"a run of execution {whole.title!r} was deleted in MLflow")
        if EXECUTION in gone:
            return
        parent = self._id(EXECUTION, whole, known[EXECUTION], experiment, {})
        for name, record in stages.items():
            if name not in gone and not self._has(name, record):
                tags = {**whole.tags, "mlflow.parentRunId": parent, "stage": record.stage}
                if source := record.tags.get("original"):
                    for original in self._runs(experiment, ENTRY, source):
                        tags["original_run"] = original.info.run_id
                self._write(name, record, self._id(name, record, known[name], experiment, tags))
        if not self._has(EXECUTION, whole):  # its status comes last, when all below it is there
            self._write(EXECUTION, whole, parent)

    def _runs(self, experiment: str, tag: str, value: str) -> list[Run]:
        return list(self.client.search_runs([experiment], f"tags.{tag} = '{value}'", ViewType.ALL, max_results=1000))

    def _is_gone(self, name: str, run: Run | None) -> bool:
        """Whether somebody has deleted a run, or purged one that was there."""
        return "run" in self.state.get(name, {}) if run is None else bool(run.info.lifecycle_stage == "deleted")

    def _has(self, name: str, record: RunRecord) -> bool:
        return bool(self.state.get(name, {}).get("fingerprint") == record.fingerprint)

    def _note(self, name: str, **found: Any) -> None:
        self.state[name] = {**self.state.get(name, {}), **found}
        self.records.note_synced(self.sync.uri, self.state)

    def _leave(self, names: list[str], reason: str) -> None:
        """Leave alone from now on what somebody has deleted, and report it once: a parent stands for its stages."""
        known = "gone" in self.state.get(EXECUTION, {})
        new = [name for name in names if "gone" not in self.state.get(name, {})]
        if new and not known:
            remedy = "it is left alone (restore it there and run `smaller-student sync --again`)"
            self.records.add_notice(f"{reason}; {remedy}")
        for name in new:
            self._note(name, gone=reason)

    def _id(self, name: str, record: RunRecord, run: Run | None, experiment: str, tags: dict[str, str]) -> str:
        """Id of a record's run, which is made where it is missing."""
        if run is None:
            entry = {ENTRY: f"{self.records.id}/{name}", "execution_id": self.records.id, "mlflow.user": _user()}
            run = self.client.create_run(experiment, _ms(record.began), {**tags, **record.tags, **entry}, record.title)
        self._note(name, run=run.info.run_id)
        return str(run.info.run_id)

    def _write(self, name: str, record: RunRecord, run: str) -> None:
        """Write what a record holds: figures and status first, since a store of artefacts may fail by itself."""
        for params in _chunks([Param(*pair) for pair in record.params.items()], MOST_PARAMS):
            self.client.log_batch(run, params=params)
        points = [
            Metric(key, value, _ms(point.time), point.step)
            for point in record.curve[self.state[name].get("points", 0) :]
            for key, value in point.values.items()
        ]
        if record.ended is not None:
            points += [Metric(key, value, _ms(record.ended), 0) for key, value in record.figures.items()]
        for metrics in _chunks(points, MOST_METRICS):
            self.client.log_batch(run, metrics=metrics)
        for tags in _chunks([RunTag(*pair) for pair in record.tags.items()], MOST_TAGS):
            self.client.log_batch(run, tags=tags)
        if record.dataset:
            self.client.log_inputs(run, [DatasetInput(Dataset(**record.dataset), [])])
        if record.ended is None:
            self.client.update_run(run, status="RUNNING")
        else:
            self.client.set_terminated(run, record.status, _ms(record.ended))
        if record.folder and (self.records.files / record.folder).is_dir():
            self.client.log_artifacts(run, str(self.records.files / record.folder), record.folder)
            shutil.rmtree(self.records.files / record.folder, ignore_errors=True)
        self._note(name, fingerprint=record.fingerprint, points=len(record.curve))


def _chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    rest = iter(items)
    while chunk := list(islice(rest, size)):
        yield chunk


def _ms(seconds: float) -> int:
    """Seconds since 1970 as MLflow counts time."""
    return int(seconds * 1000)


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user need not have a name
        return "unknown"


def sync(files: Files, again: bool = False) -> tuple[int, list[str]]:
    """Synchronise all executions of a checkout, waiting for other processes that do so.

    Returns:
        How many executions were not up to date, and what the user should read once: runs that somebody deleted,
        executions that MLflow refused.

    Raises:
        TrackingError: If the store cannot be reached.
        BusyError: If another process needs too long.
    """
    work = Sync(files, PATIENCE, again)
    work.all()
    notices = [notice for records in executions(files) for notice in records.take_notices()]
    return work.changed, list(dict.fromkeys(notices))


# --- beside a stage ---------------------------------------------------------------------------------------------------


def main() -> None:
    """Synchronise now and then until the stage that started this process ends, which closes standard input."""
    order = json.loads(sys.argv[1])
    files = Files(Path(order["root"]), Path(order["state"]))
    records = Records(Path(order["records"]))
    ended = threading.Event()
    threading.Thread(target=_wait_for_end, args=(ended,), daemon=True).start()
    if order["quiet"]:
        ended.wait()
    monitor: Any = None
    last = False
    while not last:
        last = ended.is_set()
        work = Sync(files)
        try:
            with suppress(BusyError):
                work.one(records)
            if not last:
                work.all()
            records.problem.unlink(missing_ok=True)
        except Exception as error:
            write_text(records.problem, f"{store.cause(error)}\n")
        if monitor is None and not ended.is_set():
            monitor = _monitor(records, order["name"], work)
        ended.wait(INTERVAL)
    if monitor is not None:
        monitor.finish()


def _wait_for_end(ended: threading.Event) -> None:
    sys.stdin.buffer.read(1)  # a byte, or nothing at the end of a stage that was killed
    ended.set()


def _monitor(records: Records, name: str, work: Sync) -> Any:
    """MLflow's own system metrics of the stage's run, as long as it runs; MLflow's variables for them count."""
    run = records.synced(work.uri).get(name, {}).get("run")
    if run is None or os.environ.get("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true").lower() == "false":
        return None
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitor: Any = SystemMetricsMonitor(run, tracking_uri=work.uri)  # type: ignore[no-untyped-call]
    monitor.start()
    return monitor


if __name__ == "__main__":
    main()
