"""The process that tells MLflow what a stage does: one parent run an execution, one child run a stage.

Reads JSON lines from its standard input: first the order (see `tracking.Tracker`), then rows of the curve, then how
the stage ended; an input that closes before that means that the stage was killed. Figures come from the files that the
stage wrote, so what is live and what is replayed are recorded by the same lines. At the first failure of MLflow it says
so once and leaves: everything is on disk, and the next stage or execution replays what is missing.
"""

import contextlib
import getpass
import hashlib
import json
import logging
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from filelock import FileLock
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from pipeline.files import Files, read_json, write_json
from pipeline.ops import execution, figures
from pipeline.ops.execution import Child, Execution, State
from pipeline.ops.git import commit
from pipeline.ops.process import identity
from pipeline.ops.tracking import UPLOADS, tracking_uri, upload_folder
from pipeline.records import RECORDS

PARENT = "mlflow.parentRunId"
KIND = {"mlflow.experimentKind": "custom_model_development", "mlflow.experiment.primaryMetric.name": "eval/mAP"}
"""Tags that tell the UI how to show the experiment."""
MOST_PARAMS, MOST_METRICS = 100, 1000
"""What MLflow takes in one call."""


def flatten(params: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted names and texts of all values."""
    for key, value in params.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)


def chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Cut `items` into lists of at most `size`."""
    rest = iter(items)
    while chunk := list(islice(rest, size)):
        yield chunk


def milliseconds(seconds: float) -> int:
    """Seconds since 1970 on MLflow's clock."""
    return int(seconds * 1000)


class Recorder:
    """Writes one execution into MLflow.

    Args:
        files: Paths of the checkout.
        params: Content of params.yaml.
        owner: The execution.
        began: Start of the stage, milliseconds since 1970.
    """

    def __init__(self, files: Files, params: Mapping[str, Any], owner: Execution, began: int) -> None:
        self.files, self.params, self.key, self.began = files, params, owner.key, began
        self.uri = tracking_uri(files)
        files.tracking.mkdir(parents=True, exist_ok=True)
        with FileLock(files.tracking / "store.lock", timeout=60):  # two at once would both migrate the schema
            self.client = MlflowClient(self.uri)
            self.experiment = self._experiment(params["tracking"]["experiment"])
        self._bury_the_dead()
        state = execution.load(files, self.key)
        if state is None or state.uri != self.uri:
            state = State(uri=self.uri, parent=self._open())
            execution.save(files, self.key, state)
        self.state = state

    def _experiment(self, name: str) -> str:
        if found := self.client.get_experiment_by_name(name):
            return found.experiment_id
        # A server keeps artifacts where it likes; a database alone would put them into the current directory.
        home = None if self.uri.startswith("http") else self.files.mlflow_artifacts.resolve().as_uri()
        try:
            return self.client.create_experiment(name, home, KIND)
        except MlflowException:  # another process was faster
            if found := self.client.get_experiment_by_name(name):
                return found.experiment_id
            raise

    def _open(self) -> str:
        budget, data = self.params["student"]["budget"], self.params["data"]
        goal = f"-{budget['reduction']:.0%} {budget['of']}"
        name = f"{data['source']}, {goal if self.params['student']['method'] == 'budget' else 'uncompressed'}"
        tags = {**self._tags(), "execution": self.key, **self._data_digest()}
        parent = self.client.create_run(self.experiment, self.began, tags, name).info.run_id
        for chunk in chunks([Param(*pair) for pair in flatten(self.params)], MOST_PARAMS):
            self.client.log_batch(parent, params=chunk)
        return parent

    def _tags(self) -> dict[str, str]:
        """Where a run comes from."""
        content = json.dumps(self.params, sort_keys=True).encode()
        return {
            "mlflow.user": _user(),
            "mlflow.source.name": self.files.root.name,
            "mlflow.source.type": "PROJECT",
            "params_digest": hashlib.sha256(content).hexdigest(),
            **_sources(self.files.root),
        }

    def _data_digest(self) -> dict[str, str]:
        if not self.files.manifest.is_file():
            return {}
        return {"data_digest": hashlib.sha256(self.files.manifest.read_bytes()).hexdigest()}

    def _bury_the_dead(self) -> None:
        """End what a killed recorder left RUNNING."""
        for key in execution.ended(self.files):
            state = execution.load(self.files, key)
            if state is None or state.uri != self.uri:
                continue
            running = [child for child in state.children.values() if child.status == "RUNNING"]
            if any(execution.alive(child.pid, child.started) for child in running):
                continue  # its recorder is about to end it
            for run in [*(child.run for child in running), *([state.parent] if running else [])]:
                self.client.set_terminated(run, "KILLED")
            execution.forget(self.files, key)

    # --- one stage ----------------------------------------------------------------------------------------------------

    def begin(self, stage: str | None) -> None:
        """Replay what came before and open the stage's run; None replays all stages."""
        self.client.update_run(self.state.parent, status="RUNNING")
        for earlier in RECORDS:
            if earlier == stage:
                break
            done = self.state.children.get(earlier)
            if (done is None or done.status != "FINISHED") and self.files.metrics(earlier).is_file():
                self.replay(earlier)
        if stage is not None:
            self._child(stage, {"cached": "false"})

    def curve(self, stage: str, row: Mapping[str, float], moment: int) -> None:
        """Log one row of a curve at its epoch."""
        step = int(row.get("epoch", 0))
        points = [Metric(key, value, moment, step) for key, value in figures.curve(row).items()]
        self.client.log_batch(self.state.children[stage].run, metrics=points)

    def end(self, stage: str | None, status: str, error: str = "", moment: int | None = None) -> None:
        """Log what the stage wrote and end its run, and the parent's with it until another stage begins."""
        if stage is not None and (child := self.state.children.get(stage)):
            if status == "FINISHED":
                self._finals(stage)
                self._upload(stage, child.run)
                self._remember(stage, child.run)
            elif error:
                self.client.set_tag(child.run, "error", error.splitlines()[0][:500])
            self._end(stage, status, moment)
        if "benchmark" in self.state.children and status == "FINISHED":
            self._summarise()
        self.client.set_terminated(self.state.parent, status, moment)

    def replay(self, stage: str) -> None:
        """Record a stage that did not run in this execution, from the files that it left."""
        original = self._original(stage)
        self._child(stage, {"cached": "true", **({"original_run": original} if original else {})})
        rows = figures.curves(self.files.plots(stage))
        points = [Metric(k, v, self.began, int(row["epoch"])) for row in rows for k, v in figures.curve(row).items()]
        for chunk in chunks(points, MOST_METRICS):
            self.client.log_batch(self.state.children[stage].run, metrics=chunk)
        self._finals(stage, cached=True)
        self._end(stage, "FINISHED", self.began + len(RECORDS))

    def _child(self, stage: str, tags: Mapping[str, str]) -> None:
        tags = {**self._tags(), PARENT: self.state.parent, "stage": stage, "execution": self.key, **tags}
        start = self.began + list(RECORDS).index(stage)  # a millisecond apart, so that the UI lists them in this order
        run = self.client.create_run(self.experiment, start, tags, stage).info.run_id
        pid, started = identity()
        self.state.children[stage] = Child(run=run, status="RUNNING", pid=pid, started=started)
        execution.save(self.files, self.key, self.state)

    def _end(self, stage: str, status: str, moment: int | None) -> None:
        child = self.state.children[stage]
        self.client.set_terminated(child.run, status, moment)
        self.state.children[stage] = Child(run=child.run, status=status)
        execution.save(self.files, self.key, self.state)

    def _finals(self, stage: str, cached: bool = False) -> None:
        """Each figure once, at no step: MLflow then draws a bar, not a line."""
        numbers = figures.finals(self.files, stage)
        if not cached:
            timings = read_json(self.files.timings(stage))
            numbers |= {f"time/{name}": value for name, value in timings["seconds"].items()}
        self._log_once(self.state.children[stage].run, numbers)
        if stage == "prepare":
            tags = [RunTag(*pair) for pair in self._data_digest().items()]
            self.client.log_batch(self.state.parent, tags=tags)

    def _summarise(self) -> None:
        if not self.state.summarised:
            self._log_once(self.state.parent, figures.summary(self.files))
            self.state.summarised = True
            execution.save(self.files, self.key, self.state)

    def _log_once(self, run: str, numbers: Mapping[str, float]) -> None:
        moment = milliseconds(time.time())
        self.client.log_batch(run, metrics=[Metric(key, value, moment, 0) for key, value in numbers.items()])

    def _upload(self, stage: str, run: str) -> None:
        if (folder := upload_folder(self.files, stage)) and folder.is_dir():
            self.client.log_artifacts(run, str(folder), UPLOADS[stage])

    # --- where cached figures come from -------------------------------------------------------------------------------

    def _remember(self, stage: str, run: str) -> None:
        write_json(self._origin(stage), {"digest": self._digest(stage), "run": run})

    def _original(self, stage: str) -> str | None:
        """The run that computed what now lies in metrics/<stage>.json, if it was here."""
        try:
            origin = read_json(self._origin(stage))
            return origin["run"] if origin["digest"] == self._digest(stage) else None
        except (OSError, ValueError, KeyError):
            return None

    def _origin(self, stage: str) -> Path:
        return self.files.tracking / "origins" / f"{stage}.json"

    def _digest(self, stage: str) -> str:
        return hashlib.sha256(self.files.metrics(stage).read_bytes()).hexdigest()


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user need not have a name
        return "unknown"


def _sources(root: Path) -> dict[str, str]:
    """Tags that tell what the run was made from."""
    found, changed = commit(root)
    if changed is None:
        return {"git_commit": found}
    return {"mlflow.source.git.commit": found, "git_commit": found, "git_dirty": str(changed).lower()}


def main() -> None:
    """Record what standard input tells."""
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    order = json.loads(sys.stdin.readline())
    files, stage = Files(Path(order["root"]), Path(order["state"])), order["stage"]
    owner, began = Execution.parse(order["execution"]), milliseconds(order["time"])
    try:
        recorder = Recorder(files, order["params"], owner, began)
        recorder.begin(stage)
        with contextlib.suppress(OSError):
            print(flush=True)  # `Tracker` may wait for this; if it is gone already, its run still wants an end
        for message in map(json.loads, sys.stdin):
            if "end" in message:
                return recorder.end(stage, message["end"], message["error"], milliseconds(message["time"]))
            recorder.curve(stage, message["curve"], milliseconds(message["time"]))
        recorder.end(stage, "KILLED")
    except Exception as error:
        where, what = tracking_uri(files), stage or "this execution"
        print(f"warning: MLflow at {where} does not record {what} ({_cause(error)}); the run goes on", file=sys.stderr)
        sys.exit(1)


def _cause(error: BaseException) -> str:
    """First line of the error that began it: `Connection refused`, not the ten lines around it."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    return (str(error) or type(error).__name__).splitlines()[0][:200]


if __name__ == "__main__":
    main()
