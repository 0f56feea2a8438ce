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
from itertools import islice
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, Metric, Param, Run, RunTag, ViewType

from pipeline.files import Files, write_text
from pipeline.ops import store
from pipeline.ops.locks import Busy, locked
from pipeline.ops.run_record import EXECUTION, Records, RunRecord, executions
from pipeline.ops.store import TrackingError

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
        again: Write everything again that MLflow may have.

    Attributes:
        notices: What the user should read once: runs that somebody deleted, executions that MLflow refused.
        changed: Executions that were not up to date.
    """

    def __init__(self, files: Files, patience: float = 0, again: bool = False) -> None:
        self.files, self.uri, self._patience, self._again = files, store.tracking_uri(files), patience, again
        self.notices: list[str] = []
        self.changed = 0
        self._client: MlflowClient | None = None

    @property
    def client(self) -> MlflowClient:
        """Opened at its first use."""
        if self._client is None:
            self._client = store.open_store(self.files)
        return self._client

    def all(self) -> None:
        """Synchronise all executions, each by itself: one that MLflow refuses holds up no other.

        Raises:
            TrackingError: If the store cannot be reached; what was written until then is remembered.
            Busy: If another process needed longer than `patience` for one of them; the others are done.
        """
        busy: Busy | None = None
        every = list(executions(self.files))
        for records in every:
            try:
                self.one(records)
            except Busy as error:
                busy = error
        for records in every[:-KEPT]:
            if not records.pending(self.uri):
                shutil.rmtree(records.folder, ignore_errors=True)
        if busy is not None and self._patience:
            raise busy

    def one(self, records: Records) -> None:
        """Synchronise one execution, until nothing more has changed meanwhile.

        Raises:
            TrackingError: If the store cannot be reached.
            Busy: If another process does it, and goes on longer than `patience`.
        """
        again, new = self._again, False
        records.end_dead()
        while again or records.pending(self.uri):
            new = True
            with locked(records.folder / "sync.lock", f"the upload of execution {records.id}", self._patience):
                try:
                    self._bring(records, again)
                except Exception as error:
                    self._fail(records, error)
                    return
            again = False
        self.changed += new

    def _fail(self, records: Records, error: Exception) -> None:
        """Go on after an error that concerns one execution; end if the store as a whole is out of reach.

        Raises:
            TrackingError: If it is.
        """
        try:
            if self._client is None:
                raise error
            self._client.search_experiments(max_results=1)
        except Exception as other:
            if isinstance(other, TrackingError):
                raise
            raise TrackingError(
                f"MLflow at {self.uri} cannot be reached ({store.cause(other)}); everything stays on disk"
            ) from error
        self.notices.append(f"MLflow refused a part of execution {records.id} ({store.cause(error)})")

    # --- one execution ------------------------------------------------------------------------------------------------

    def _bring(self, records: Records, again: bool) -> None:
        whole, stages = records.whole(), records.stages()
        if whole is None:
            return
        state = {} if again else records.synced(self.uri)
        experiment = store.experiment(self.client, self.files, whole.experiment)
        if experiment is None:
            self._leave(records, state, [EXECUTION, *stages], f"experiment {whole.experiment} was deleted in MLflow")
            return
        query = f"tags.execution_id = '{records.id}'"
        found = {run.data.tags.get(ENTRY, ""): run for run in self._search(experiment, query)}
        runs: dict[str, Run | None] = {name: found.get(f"{records.id}/{name}") for name in (EXECUTION, *stages)}
        gone = [
            name
            for name, run in runs.items()
            if (run is None and state.get(name, {}).get("run")) or (run is not None and _deleted(run))
        ]
        if EXECUTION in gone:
            gone = list(runs)
        self._leave(records, state, gone, f"a run of execution {whole.title!r} was deleted in MLflow")
        if EXECUTION in gone:
            return
        parent = self._run(records, state, EXECUTION, whole, runs[EXECUTION], experiment, {})
        lineage = {**whole.tags, "mlflow.parentRunId": parent}
        for name, record in stages.items():
            if name not in gone and state.get(name, {}).get("fingerprint") != record.fingerprint:
                tags = {**lineage, "stage": record.stage, **self._original(experiment, record)}
                run = self._run(records, state, name, record, runs[name], experiment, tags)
                self._write(records, state, name, record, run)
        if state[EXECUTION].get("fingerprint") != whole.fingerprint:  # its status at last, when all below is there
            self._write(records, state, EXECUTION, whole, parent)

    def _search(self, experiment: str, query: str) -> list[Run]:
        return list(self.client.search_runs([experiment], query, ViewType.ALL, max_results=1000))

    def _leave(self, records: Records, state: dict[str, dict[str, Any]], names: list[str], reason: str) -> None:
        """Leave alone from now on what somebody has deleted, and report it once."""
        new = [name for name in names if not state.get(name, {}).get("gone")]
        for name in new:
            state[name] = {**state.get(name, {}), "gone": reason}
            self._drop_copies(records, records.read(name))
        if new:
            records.note_synced(self.uri, state)
            self.notices.append(f"{reason}; it is left alone (restore it there and run `smaller-student sync --again`)")

    def _original(self, experiment: str, record: RunRecord) -> dict[str, str]:
        """Tag of a cached stage with the run that computed its figures, if this server has it."""
        source = record.tags.get("original")
        runs = self._search(experiment, f"tags.{ENTRY} = '{source}'") if source else []
        return {"original_run": runs[0].info.run_id} if runs else {}

    def _run(
        self,
        records: Records,
        state: dict[str, dict[str, Any]],
        name: str,
        record: RunRecord,
        run: Run | None,
        experiment: str,
        tags: dict[str, str],
    ) -> str:
        """Id of a record's run, which is made where it is missing."""
        if run is None:
            entry = {ENTRY: f"{records.id}/{name}", "execution_id": records.id, "mlflow.user": _user()}
            run = self.client.create_run(experiment, _ms(record.began), {**tags, **record.tags, **entry}, record.title)
        state[name] = {**state.get(name, {}), "run": run.info.run_id}
        records.note_synced(self.uri, state)
        return str(run.info.run_id)

    def _write(
        self, records: Records, state: dict[str, dict[str, Any]], name: str, record: RunRecord, run: str
    ) -> None:
        """Write what a record holds: figures and status first, since a store of artefacts may fail by itself."""
        seen = state[name]
        for params in _chunks([Param(*pair) for pair in record.params.items()], MOST_PARAMS):
            self.client.log_batch(run, params=params)
        points = [
            Metric(key, value, _ms(point.time), point.step)
            for point in record.curve[seen.get("points", 0) :]
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
        if record.folder and (records.files / record.folder).is_dir():
            self.client.log_artifacts(run, str(records.files / record.folder), record.folder)
            self._drop_copies(records, record)
        state[name] = {**seen, "fingerprint": record.fingerprint, "points": len(record.curve)}
        records.note_synced(self.uri, state)

    @staticmethod
    def _drop_copies(records: Records, record: RunRecord | None) -> None:
        if record is not None and record.folder:
            shutil.rmtree(records.files / record.folder, ignore_errors=True)


def _deleted(run: Run) -> bool:
    return bool(run.info.lifecycle_stage == "deleted")


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


def sync(files: Files, again: bool = False) -> Sync:
    """Synchronise all executions of a checkout, waiting for other processes that do so.

    Args:
        files: Of the checkout.
        again: Write everything again that MLflow may have; nothing is doubled.

    Raises:
        TrackingError: If the store cannot be reached.
        Busy: If another process needs too long.
    """
    work = Sync(files, PATIENCE, again)
    work.all()
    return work


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
            with suppress(Busy):
                work.one(records)
            if not last:
                work.all()
            records.problem.unlink(missing_ok=True)
        except Exception as error:
            write_text(records.problem, f"{store.cause(error)}\n")
        else:
            if work.notices:
                write_text(records.problem, "\n".join(work.notices) + "\n")
            if monitor is None and not ended.is_set():
                monitor = _monitor(records, order["name"], work)
        ended.wait(INTERVAL)
    if monitor is not None:
        monitor.finish()


def _wait_for_end(ended: threading.Event) -> None:
    sys.stdin.buffer.read()
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
