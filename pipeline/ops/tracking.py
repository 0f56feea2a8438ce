"""The stage's end of MLflow: start a recorder beside the stage, hand it what happens, never wait long for it.

`recorder` imports mlflow and talks to the server, in a process of its own. So neither the import (2-3 s) nor a server
that is slow or down costs the stage anything, and even after SIGKILL the recorder sees the pipe close and sets the run
KILLED. `SMALLER_STUDENT_TRACKING=off` does without.
"""

import contextlib
import json
import logging
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import pipeline
from pipeline.config import Params
from pipeline.files import Files
from pipeline.ops.execution import Execution, load
from pipeline.records import RECORDS

log = logging.getLogger(__name__)

PATIENCE = 5.0
"""Seconds that a finished stage waits for a server, upload apart."""
START = 15.0
"""Seconds that a recorder may take to import mlflow beside a busy stage; only very short stages notice."""
LOCAL = 120.0
"""Seconds to wait for a database on this machine: never kill it while it makes its tables."""
SLOWEST_UPLOAD = 2e6
"""Bytes a second; an upload that is slower is given up."""
CALM = {"benchmark"}
"""Stages that begin only once the recorder has nothing more to do: they measure time."""
UPLOADS = {"export": "export", "benchmark": "report"}
"""Folder in the run's artifacts, for stages whose results are worth a look."""
LIMITS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "2"}
"""By default a dead server costs four minutes a call."""


def tracking_uri(files: Files) -> str:
    """The user's server, or a database in the repository's root."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{files.mlflow_db.resolve()}"


def upload_folder(files: Files, stage: str) -> Path | None:
    """What a stage uploads: the ONNX files with their papers, the report with its pictures."""
    return {"export": files.artifacts("export"), "benchmark": files.report}.get(stage)


class Tracker:
    """Records one stage, or completes an execution; a context manager whose exit tells how it went.

    Args:
        files: Paths of the checkout.
        params: Recorded with the execution.
        execution: What the stage belongs to.
        stage: Its name; None to replay, from disk, all stages that the execution has not recorded.
    """

    def __init__(self, files: Files, params: Params, execution: Execution, stage: str | None) -> None:
        self._files, self._stage = files, stage
        self._recorder: subprocess.Popen[str] | None = None
        self._order = {
            "root": str(files.root),
            "state": str(files.state),
            "execution": execution.key,
            "stage": stage,
            "params": params.model_dump(mode="json"),
        }

    def __enter__(self) -> Self:
        if os.environ.get("SMALLER_STUDENT_TRACKING", "").lower() == "off":
            return self
        # The recorder runs the code that this process runs, whatever else is installed.
        search = os.pathsep.join(filter(None, [str(Path(pipeline.__file__).parents[1]), os.environ.get("PYTHONPATH")]))
        self._recorder = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "pipeline.ops.recorder"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            cwd=self._files.root,
            env={**LIMITS, **os.environ, "PYTHONPATH": search},
            start_new_session=True,  # Ctrl-C is for the stage; the recorder then has something to record
        )
        if hasattr(os, "register_at_fork"):  # a worker that outlives the stage must not hold the pipe open
            os.register_at_fork(after_in_child=self._close)
        self._start = time.monotonic()
        self._say(self._order)
        if self._stage in CALM and self._recorder.stdout and os.name != "nt":  # Windows cannot wait for a pipe so
            select.select([self._recorder.stdout.fileno()], [], [], START)
        return self

    def curve(self, row: Mapping[str, float]) -> None:
        """Hand over one row of the curve, as of now."""
        self._say({"curve": dict(row)})

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._recorder is None:
            return
        status = "FINISHED" if kind is None else "FAILED" if issubclass(kind, Exception) else "KILLED"
        self._say({"end": status, "error": str(error or "")})
        self._close()
        if status == "KILLED":
            return  # whoever stopped the stage wants it gone; the recorder writes that down and leaves by itself
        patience = self._patience(status)
        try:
            self._recorder.wait(patience)
        except subprocess.TimeoutExpired:
            self._recorder.kill()
            self._recorder.wait()
            log.warning("MLflow took longer than %.0f s; what it has of this stage is incomplete", patience)

    def _patience(self, status: str) -> float:
        """Seconds to wait for the recorder from now on."""
        if not tracking_uri(self._files).startswith("http"):
            return LOCAL
        folder = upload_folder(self._files, self._stage or "") if status == "FINISHED" else None
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder else 0
        return max(PATIENCE, self._start + START - time.monotonic()) + size / SLOWEST_UPLOAD

    def _say(self, message: Mapping[str, object]) -> None:
        if self._recorder is None or self._recorder.stdin is None or self._recorder.stdin.closed:
            return
        try:
            self._recorder.stdin.write(json.dumps({**message, "time": time.time()}) + "\n")
            self._recorder.stdin.flush()
        except OSError:  # the recorder gave up, and said why
            self._close()

    def _close(self) -> None:
        if self._recorder is not None and self._recorder.stdin is not None:
            with contextlib.suppress(OSError):
                self._recorder.stdin.close()


def complete(files: Files, params: Params, execution: Execution) -> None:
    """Replay from disk what an execution did not run, so that it stands in MLflow as a whole."""
    state = load(files, execution.key)
    if state is None or any(stage not in state.children for stage in RECORDS):
        with Tracker(files, params, execution, stage=None):
            pass
