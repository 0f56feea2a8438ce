"""Tells MLflow what the journals hold: one parent run an execution, one child run a stage.

Runs beside a stage, in a process of its own (importing mlflow takes seconds, a server may be slow or down), and as
`smaller-student sync`. Each event may be told again after any crash: runs are found by the tag that names their event,
and points of a metric are the same to MLflow that have the same time, step and value.
"""

import getpass
import json
import logging
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from itertools import islice
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from pipeline.files import Files, write_text
from pipeline.ops.journal import Delivered, Event, Journal, journals, tidy
from pipeline.ops.locks import locked, sole_writer
from pipeline.ops.tracking import log_path, tracking_uri

PARENT, ENTRY = "mlflow.parentRunId", "entry"
KIND = {"mlflow.experimentKind": "custom_model_development", "mlflow.experiment.primaryMetric.name": "eval/mAP"}
"""Tags that tell the UI how to show the experiment."""
MOST_PARAMS, MOST_METRICS = 100, 1000
"""What MLflow takes in one call."""
GLANCE, RETRY, SWEEP = 0.3, 5.0, 60.0
"""Seconds between looks at the journal of a stage that runs, after a failure, and between looks at all others."""


def chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Cut `items` into lists of at most `size`."""
    rest = iter(items)
    while chunk := list(islice(rest, size)):
        yield chunk


class Delivery:
    """Writes journals into one MLflow server or database.

    Args:
        files: Of the checkout.
        experiment: Its name in MLflow.
    """

    def __init__(self, files: Files, experiment: str) -> None:
        self.files, self.uri, self.name = files, tracking_uri(files), experiment
        self._client: MlflowClient | None = None
        self._experiment = ""

    @property
    def client(self) -> MlflowClient:
        """Opened at its first use, which may fail."""
        if self._client is None:
            # Two at once would both migrate the schema.
            with locked(self.files.tracking / "store.lock", "the opening of MLflow's store", patience=60):
                client = MlflowClient(self.uri)
                self._experiment = self._found(client)
            self._client = client
        return self._client

    def _found(self, client: MlflowClient) -> str:
        if found := client.get_experiment_by_name(self.name):
            return found.experiment_id
        # A server keeps artifacts where it likes; a database alone would put them into the current directory.
        home = None if self.uri.startswith("http") else self.files.mlflow_artifacts.resolve().as_uri()
        try:
            return client.create_experiment(self.name, home, KIND)
        except MlflowException:  # another process was faster
            if found := client.get_experiment_by_name(self.name):
                return found.experiment_id
            raise

    def tell(self, journal: Journal, again: bool = False) -> int:
        """Tell everything that was not told yet.

        Args:
            journal: Of an execution.
            again: Begin at the first event.

        Returns:
            How many events there were to tell.

        Raises:
            Exception: Whatever MLflow raises; what was told until then is remembered.
        """
        done = Delivered(uri=self.uri) if again else journal.delivered(self.uri)
        begun: dict[str, int] = {}
        told = 0
        for number, event in journal.events():
            if event.kind == "begin":
                begun[event.stage] = number
            if number < done.lines:
                continue
            if event.kind == "open":
                self._open(journal, done, number, event)
            elif event.kind == "begin":
                self._begin(journal, done, number, event)
            elif event.stage:
                self._report(journal, done, done.runs[begun[event.stage]], event)
            else:
                self._report(journal, done, _parent(done), event)
            done = Delivered(uri=self.uri, lines=number + 1, runs=done.runs)
            journal.note(done)
            told += 1
        return told

    # --- events -------------------------------------------------------------------------------------------------------

    def _run(self, journal: Journal, done: Delivered, number: int, event: Event, tags: dict[str, str]) -> str:
        """The run of an event: found where an attempt that broke off had made it, else made."""
        entry = f"{journal.id}/{number}"
        run = self._known(entry)
        if run is None:
            tags, name = {"mlflow.user": _user(), **tags, ENTRY: entry}, event.stage or event.name
            run = self.client.create_run(self._experiment, _clock(event.time), tags, name).info.run_id
        done.runs[number] = run
        return run

    def _known(self, entry: str) -> str | None:
        """Run of an event, if this server has it."""
        known = self.client.search_runs([self._experiment], f"tags.{ENTRY} = '{entry}'", max_results=1)
        return known[0].info.run_id if known else None

    def _open(self, journal: Journal, done: Delivered, number: int, event: Event) -> None:
        parent = self._run(journal, done, number, event, event.tags)
        for chunk in chunks([Param(*pair) for pair in event.params.items()], MOST_PARAMS):
            self.client.log_batch(parent, params=chunk)

    def _begin(self, journal: Journal, done: Delivered, number: int, event: Event) -> None:
        parent, lineage = _parent(done), journal.events()[0][1].tags
        tags = {**lineage, PARENT: parent, "stage": event.stage, **event.tags}
        if (source := tags.get("original")) and (original := self._known(source)):
            tags["original_run"] = original
        self._run(journal, done, number, event, tags)
        self.client.update_run(parent, status="RUNNING")

    def _report(self, journal: Journal, done: Delivered, run: str, event: Event) -> None:
        """Figures, at the event's time, so that telling them twice adds nothing; then what else there is."""
        points = [Metric(key, value, _clock(event.time), event.step) for key, value in event.values.items()]
        for chunk in chunks(points, MOST_METRICS):
            self.client.log_batch(run, metrics=chunk)
        if event.tags:
            self.client.log_batch(run, tags=[RunTag(*pair) for pair in event.tags.items()])
        if event.dataset:
            self.client.log_inputs(run, [DatasetInput(Dataset(**event.dataset), [])])
        if event.folder and (journal.kept / event.folder).is_dir():
            self.client.log_artifacts(run, str(journal.kept / event.folder), event.folder)
        if event.status:
            for ended in (run, _parent(done)):
                self.client.set_terminated(ended, event.status, _clock(event.time))

    # --- ways to use it -----------------------------------------------------------------------------------------------

    def follow(self, journal: Journal) -> None:
        """Tell what was left behind and what happens until the stage has ended; a failure is tried again.

        Raises:
            Exception: What MLflow raised last, if the stage has ended.
        """
        sweep = 0.0
        while True:
            living = journal.running()
            try:
                if time.monotonic() >= sweep:
                    self.sync(journal)
                    sweep = time.monotonic() + SWEEP
                self.tell(journal)
            except Exception as error:
                self._client = None
                write_text(log_path(self.files), cause(error) + "\n")
                if not living:
                    raise
                _wait(journal, RETRY)
            else:
                log_path(self.files).unlink(missing_ok=True)
                if not living and not journal.pending(self.uri):
                    return
                time.sleep(GLANCE)

    def sync(self, current: Journal | None = None, again: bool = False) -> tuple[int, int]:
        """Tell what all executions left untold.

        Args:
            current: One that is told elsewhere.
            again: Tell everything again.

        Returns:
            How many executions and events there were to tell.
        """
        executions = events = 0
        for journal in journals(self.files):
            if (current is not None and journal.folder == current.folder) or (journal.settled and not again):
                continue
            over = journal.over
            running = journal.running()
            if again or journal.pending(self.uri):
                executions, events = executions + 1, events + self.tell(journal, again)
            if over and not running:
                journal.settle()
        tidy(self.files)
        return executions, events


def _wait(journal: Journal, seconds: float) -> None:
    """Wait before another attempt, but no longer than the stage runs."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and journal.running():
        time.sleep(GLANCE)


def _parent(done: Delivered) -> str:
    return done.runs[min(done.runs)]


def _clock(seconds: float) -> int:
    """Seconds since 1970 on MLflow's clock."""
    return int(seconds * 1000)


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user need not have a name
        return "unknown"


def cause(error: BaseException) -> str:
    """First line of the error that began it: `Connection refused`, not the ten lines around it."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def sole_delivery(files: Files, patience: float = -1) -> AbstractContextManager[None]:
    """One at a time: runs are looked for before they are made.

    Args:
        files: Of the checkout.
        patience: Seconds to wait for another one to end; for ever where negative.

    Raises:
        Busy: If it does not.
    """
    return sole_writer(files.tracking / "delivery.lock", "telling MLflow", patience)


def main() -> None:
    """Follow one execution."""
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    order = json.loads(sys.argv[1])
    files = Files(Path(order["root"]), Path(order["state"]))
    try:
        with sole_delivery(files):
            Delivery(files, order["experiment"]).follow(Journal(Path(order["journal"])))
    except Exception:
        sys.exit(1)


if __name__ == "__main__":
    main()
