"""What a stage says of itself: into the journal of its execution, from which another process tells MLflow.

The stage only appends lines to a file. Whether a server is there, slow or gone costs it nothing but the little that it
waits in the end, so that whoever looks at MLflow after `dvc repro` finds the run complete.
`SMALLER_STUDENT_TRACKING=off` does without all this.
"""

import contextlib
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

import pipeline
from pipeline.config import Params
from pipeline.files import Files, read_json, write_json
from pipeline.ops import figures
from pipeline.ops.journal import Journal, journals
from pipeline.ops.recording import Recording
from pipeline.records import RECORDS

log = logging.getLogger(__name__)

PATIENCE = 4.5
"""Seconds that all stages of an execution together wait for a server."""
LOCAL = 120.0
"""Seconds to wait for a database on this machine: it may be making its tables."""
CALM = {"benchmark"}
"""Stages that MLflow hears of in the end only: they measure time."""
LIMITS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
"""Of MLflow's client: by default a dead server costs four minutes a call."""
SAMPLE = 10.0
"""Seconds between looks at processor and memory."""


def tracking_uri(files: Files) -> str:
    """The user's server, or a database in the repository's root."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{files.mlflow_db.resolve()}"


def log_path(files: Files) -> Path:
    """Why the last delivery failed; missing where it did not."""
    return files.tracking / "trouble.txt"


def wanted() -> bool:
    """Whether anything is recorded at all."""
    return os.environ.get("SMALLER_STUDENT_TRACKING", "").lower() != "off"


class Tracker:
    """Records one stage; a context manager whose exit tells how it went.

    Args:
        files: Paths of the checkout.
        params: Recorded with the execution.
        journal: Of the execution that the stage belongs to.
        stage: Its name; None to record, from disk, all stages that the execution has not recorded.
        changed: As in `Recording.begin`.
    """

    def __init__(
        self, files: Files, params: Params, journal: Journal, stage: str | None, changed: Collection[str] = ()
    ) -> None:
        self._files, self._stage, self._changed = files, stage, changed
        self._recording = Recording(files, params, journal, stage) if wanted() else None
        self._experiment = params.tracking.experiment
        self._deliverer: subprocess.Popen[bytes] | None = None
        self._ended = threading.Event()

    def __enter__(self) -> Self:
        if self._recording is not None:
            self._recording.begin(self._changed)
            if self._stage is not None and self._stage not in CALM:
                self._deliver(self._recording)
                threading.Thread(target=self._watch, args=(self._recording,), daemon=True).start()
        return self

    def curve(self, row: Mapping[str, float]) -> None:
        """Record one row of the curve, as of now."""
        if self._recording is not None:
            self._recording.curve(figures.curve(row), int(row.get("epoch", 0)))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._recording is None:
            return
        self._ended.set()
        status = "FINISHED" if kind is None else "FAILED" if issubclass(kind, Exception) else "KILLED"
        self._recording.end(status, str(error or ""))
        if self._deliverer is None or self._deliverer.poll() is not None:
            self._deliver(self._recording)
        if status != "KILLED":  # whoever stopped the stage wants it gone
            self._wait(self._recording.journal)

    # --- beside the stage ---------------------------------------------------------------------------------------------

    def _watch(self, recording: Recording) -> None:
        """Note how busy the machine is, under the keys of MLflow's system metrics."""
        step = 0
        psutil.cpu_percent()
        while not self._ended.wait(SAMPLE):
            memory = psutil.virtual_memory()
            values = {
                "system/cpu_utilization_percentage": psutil.cpu_percent(),
                "system/system_memory_usage_megabytes": memory.used / 1e6,
                "system/system_memory_usage_percentage": memory.percent,
            }
            recording.curve(values, step)
            step += 1

    def _deliver(self, recording: Recording) -> None:
        """Start the process that tells MLflow; it outlives the stage where it must."""
        order = {
            "root": str(self._files.root),
            "state": str(self._files.state),
            "experiment": self._experiment,
            "journal": str(recording.journal.folder),
        }
        # It runs the code that this process runs, whatever else is installed.
        search = os.pathsep.join(filter(None, [str(Path(pipeline.__file__).parents[1]), os.environ.get("PYTHONPATH")]))
        self._deliverer = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "pipeline.ops.delivery", json.dumps(order)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # a reader of the stage's output must not wait for it
            stderr=subprocess.DEVNULL,
            cwd=self._files.root,
            env={**LIMITS, **os.environ, "PYTHONPATH": search},
            start_new_session=True,  # Ctrl-C is for the stage
        )

    def _wait(self, journal: Journal) -> None:
        """Wait until MLflow knows, but not for long: what it is not told by now it will be told later."""
        uri = tracking_uri(self._files)
        waited = journal.folder / "waited.json"
        spent = float(read_json(waited)["seconds"]) if waited.is_file() else 0.0
        began = time.monotonic()
        assert self._deliverer is not None  # noqa: S101 - started before
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._deliverer.wait(max(0.0, PATIENCE - spent) if uri.startswith("http") else LOCAL)
        write_json(waited, {"seconds": spent + time.monotonic() - began})
        if journal.pending(uri):
            trouble = log_path(self._files)
            why = trouble.read_text(encoding="utf-8").strip() if trouble.is_file() else "it is slow"
            log.warning("MLflow at %s does not know all of this yet (%s); `smaller-student sync` tells it", uri, why)


def complete(files: Files, params: Params, journal: Journal, changed: Collection[str] = ()) -> None:
    """Record from disk what an execution did not run, so that it stands in MLflow as a whole.

    Args:
        files: Paths of the checkout.
        params: Of the execution.
        journal: Of the execution.
        changed: As in `Recording.begin`.
    """
    if any(stage not in journal.outcomes() for stage in RECORDS):
        with Tracker(files, params, journal, None, changed):
            pass


def complete_last(files: Files, params: Params, changed: Collection[str]) -> None:
    """Complete the last execution of a checkout: of a plain `dvc repro`, stages that come last may have run no code.

    Args:
        files: Paths of the checkout.
        params: Of the checkout.
        changed: Stages that are not up to date any more; what they and later ones led to is not known.
    """
    mine = [one for one in journals(files) if (opening := one.opening) and opening.root == str(files.root)]
    if mine and mine[-1].over and set(mine[-1].outcomes().values()) == {"FINISHED"}:
        complete(files, params, mine[-1], changed)
