"""Run a stage: validate params, track the run, write metrics, and report an error in one line.

Exit codes: 0 success, 1 other error, 2 params.yaml, 3 data, 4 a check failed (parity, surgery), 75 busy, 128 + signal
number (130 Ctrl-C, 143 SIGTERM). An exception sets its exit code with an attribute `exit_code`.
"""

import hashlib
import importlib.metadata
import json
import logging
import math
import os
import platform
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TextIO

from ruamel.yaml import YAML

from pipeline.config import Params
from pipeline.files import Files, csv_text, write_json, write_text
from pipeline.records import Record
from pipeline.runtime import available_threads, limit_threads
from pipeline.stage import params_file
from pipeline.system import git_cli
from pipeline.system.locks import stage_lock
from pipeline.system.process import Stopped, die_with_parent, peak_memory, signals_raise_stopped
from pipeline.tracking.execution import current_execution
from pipeline.tracking.recorder import StageRun

if TYPE_CHECKING:
    from pipeline.training.state import Checkpoints

log = logging.getLogger(__name__)

DEBUG = "SMALLER_STUDENT_DEBUG"
"""Environment variable that enables tracebacks, like the option `--debug`."""
LIBRARIES = ("torch", "torchvision", "numpy", "pillow", "onnx", "onnxruntime", "dvc", "mlflow")
"""Libraries whose versions are written with the timings."""
LOCK_TIMEOUT = 10.0
"""Seconds to wait for the stage lock: image loaders of a killed stage hold it until they notice that it is gone."""


class Run:
    """Argument of a stage function: params, paths, and methods that report results.

    Attributes:
        out: Existing folder for the stage's artifacts; a temporary one in all but the main process of a training.
    """

    def __init__(
        self,
        stage: str,
        params: Params,
        files: Files,
        out: Path,
        tracked: StageRun | None = None,
    ) -> None:
        self.stage, self.params, self.files, self.out = stage, params, files, out
        self.out.mkdir(parents=True, exist_ok=True)
        self.rows: list[dict[str, float]] = []
        self.seconds: dict[str, float] = {}
        self._tracked = tracked
        self._checkpoints: list[Checkpoints] = []

    def curve(self, row: Mapping[str, float]) -> None:
        """Log the losses and metrics of one epoch; `epoch` is the step in MLflow. All rows go to plots/<stage>.csv."""
        self.rows.append(dict(row))
        if self._tracked is not None:
            self._tracked.curve(row)

    @property
    def commit(self) -> str:
        """Commit of the sources, with a plus sign if they have uncommitted changes; `unknown` outside of Git."""
        commit, changed = git_cli.head_commit(self.files.root)
        return f"{commit}+" if changed else commit

    def timing(self, name: str, seconds: float) -> None:
        """Add the duration of a part of the stage to timings/<stage>.json."""
        self.seconds[name] = seconds

    def checkpoints(self, *sections: str) -> "Checkpoints":
        """Return the store of training states; only a training with the same params, inputs and code resumes them.

        The number of threads may differ: it only changes how sums are rounded, and hours of training are worth more.

        Args:
            sections: Sections of params.yaml that the training depends on, in addition to `seed` and `runtime`.
        """
        from pipeline.training.state import Checkpoints  # imports torch

        chosen = {name: self.params.model_dump(mode="json")[name] for name in sections}
        runtime = self.params.runtime.model_dump(include={"precision", "devices", "nodes"})
        identity = {
            "params": {"seed": self.params.seed, "runtime": runtime, **chosen},
            "inputs": self.inputs_digest,
        }
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        checkpoints = Checkpoints(self.files.checkpoints / self.stage / digest[:16])
        self._checkpoints.append(checkpoints)
        return checkpoints

    @cached_property
    def inputs_digest(self) -> str:
        """Digest of the files that the stage depends on, code among them, and of the libraries' versions."""
        found = dict(_fingerprints(self.files.root, _dependencies(self.files.root, self.stage)))
        return hashlib.sha256(json.dumps([found, _versions()], sort_keys=True).encode()).hexdigest()

    def write(self, record: Record, seconds: float) -> None:
        """Write metrics, plots and timings, and delete the training states.

        Raises:
            ValueError: If a metric is NaN or infinite.
        """
        numbers = record.model_dump(exclude_none=True)
        if invalid := [name for name, value in record.flat().items() if not math.isfinite(value)]:
            raise ValueError(f"stage {self.stage} computed NaN or infinity for {', '.join(invalid)}")
        if self.rows:
            write_text(self.files.plots(self.stage), curves_csv(self.rows))
        timings = {
            "seconds": {"total": seconds, **self.seconds},
            "peak_memory_bytes": peak_memory(),
            "threads": available_threads(),
            "host": platform.node(),
            "platform": platform.platform(),
            "versions": _versions(),
        }
        write_json(self.files.timings(self.stage), timings)
        write_json(self.files.metrics(self.stage), numbers)
        for checkpoints in self._checkpoints:
            checkpoints.clear()


def curves_csv(rows: list[dict[str, float]]) -> str:
    """Format curves as CSV; columns are in order of first appearance, and missing values are empty cells."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return csv_text(columns, [[repr(row[name]) if name in row else "" for name in columns] for row in rows])


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "missing"
    return versions


def _dependencies(root: Path, stage: str) -> list[str]:
    """Return the dependencies of a stage in dvc.yaml."""
    pipeline = YAML(typ="safe", pure=True).load((root / "dvc.yaml").read_text(encoding="utf-8"))
    return list(pipeline["stages"][stage]["deps"])


def _fingerprints(root: Path, dependencies: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield path and hash of dependencies, of each file in a folder unless DVC knows the folder's hash."""
    # DVC has just checked the hashes in dvc.lock; outside of DVC they may be stale.
    known = dict(_output_hashes(root)) if "DVC_STAGE" in os.environ else {}
    for dependency in dependencies:
        top = root / dependency
        if dependency in known:
            yield dependency, known[dependency]
            continue
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if path.is_file() and path.suffix != ".pyc":
                with path.open("rb") as file:
                    yield path.relative_to(root).as_posix(), hashlib.file_digest(file, "sha256").hexdigest()


def _output_hashes(root: Path) -> Iterator[tuple[str, str]]:
    """Yield path and hash of each output in dvc.lock, which saves reading gigabytes of images again."""
    path = root / "dvc.lock"
    lock = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for entry in lock.get("stages", {}).values():
        yield from ((out["path"], out["md5"]) for out in entry.get("outs", ()) if "md5" in out)


def run_stage(function: Callable[[Run], Record]) -> NoReturn:
    """Run a stage as the main program, and exit; the stage is named after the function."""
    stage = function.__name__
    log_to_stderr(stage)
    die_with_parent()
    sys.exit(run_guarded(stage, lambda: _run(stage, function)))


def run_guarded(what: str, work: Callable[[], object]) -> int:
    """Call `work` and return an exit code; an error is printed as one line that begins with `what`.

    `--debug` or SMALLER_STUDENT_DEBUG adds the traceback.
    """
    try:
        with signals_raise_stopped():
            work()
        return 0
    except Stopped as error:
        message, code = str(error), error.exit_code
    except KeyboardInterrupt:
        message, code = "stopped by Ctrl-C", 128 + signal.SIGINT
    except Exception as error:
        if "--debug" in sys.argv or os.environ.get(DEBUG):
            traceback.print_exc()
        message, code = _sentence(error), exit_code(error)
    print(f"{what}: {message}", file=sys.stderr, flush=True)
    return code


def exit_code(error: Exception) -> int:
    """Return the exit code of an error; a missing file counts as a data error."""
    return getattr(error, "exit_code", 3 if isinstance(error, FileNotFoundError) else 1)


BUGS = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError, SyntaxError, TypeError)
"""Errors that no code raises with a message for users."""


def _sentence(error: Exception) -> str:
    text = str(error).strip()
    if isinstance(error, BUGS) or not text:
        # A bug of the pipeline, not a message for users.
        return f"{type(error).__name__}: {text}\n{DEBUG}=1 shows the traceback"
    return text


def _run(stage: str, function: Callable[[Run], Record]) -> None:
    files = Files.here()
    params = params_file.load(files.params)
    limit_threads(params.runtime.threads)
    if not is_main_process():
        with tempfile.TemporaryDirectory() as scratch:
            function(Run(stage, params, files, Path(scratch)))
        return
    with stage_lock(files, LOCK_TIMEOUT), StageRun(files, params, current_execution(), stage) as tracked:
        started = time.monotonic()
        run = Run(stage, params, files, files.artifacts(stage), tracked)
        record = function(run)
        run.write(record, time.monotonic() - started)


def is_main_process() -> bool:
    """Return whether this is rank 0 of a distributed training; Fabric starts the others, which write no files."""
    return all(int(os.environ.get(rank, "0")) == 0 for rank in ("LOCAL_RANK", "NODE_RANK", "GROUP_RANK"))


class _Stderr(logging.StreamHandler[TextIO]):
    """Handler for the current `sys.stderr`, which a progress bar replaces while it is shown."""

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, value: TextIO) -> None:
        pass


def log_to_stderr(stage: str) -> None:
    """Log to stderr: messages of this package from level INFO, of other libraries from WARNING."""
    logging.basicConfig(
        level=logging.WARNING,
        format=f"%(asctime)s {stage}: %(message)s",
        datefmt="%H:%M:%S",
        handlers=[_Stderr()],
        force=True,
    )
    logging.captureWarnings(True)
    for name in ("pipeline", "stages", "__main__"):
        logging.getLogger(name).setLevel(logging.INFO)
