"""One way to run a stage: check params, log, record, write what it reports, and end with one clear line if it fails.

Exit codes: 0 done, 1 other error, 2 params.yaml, 3 data, 4 a gate (parity, surgery) did not hold, 75 busy, 128 + number
of a signal (130 Ctrl-C, 143 SIGTERM). An exception tells its own by an attribute `exit_code`.
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
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TextIO

from ruamel.yaml import YAML

from pipeline.config import Params
from pipeline.files import Files, csv_text, write_json, write_text
from pipeline.records import Record
from pipeline.stage import params_file
from pipeline.system import git_cli
from pipeline.system.locks import running_stage
from pipeline.system.process import Stopped, die_with_parent, peak_memory, stoppable
from pipeline.tracking.execution import current
from pipeline.tracking.recorder import StageRun

if TYPE_CHECKING:
    from pipeline.training.state import Checkpoints

log = logging.getLogger(__name__)

DEBUG = "SMALLER_STUDENT_DEBUG"
"""Environment variable that asks for tracebacks, as `--debug` does."""
LIBRARIES = ("torch", "numpy", "pillow", "onnx", "onnxruntime", "dvc", "mlflow")
"""Versions that are noted beside the timings."""
LAST_WORKERS = 10.0
"""Seconds in which the image loaders of a killed stage, which still hold its lock, notice that it is gone."""


class Run:
    """What a stage function gets.

    Attributes:
        stage: Its name.
        params: Checked content of params.yaml.
        files: Paths of the checkout.
        out: Folder of what it writes, which exists: its artifacts', or one that is thrown away where another process
            of the same training leads.
    """

    def __init__(
        self,
        stage: str,
        params: Params,
        files: Files,
        out: Path,
        recorded: StageRun | None = None,
    ) -> None:
        self.stage, self.params, self.files, self.out = stage, params, files, out
        self.out.mkdir(parents=True, exist_ok=True)
        self.rows: list[dict[str, float]] = []
        self.seconds: dict[str, float] = {}
        self._recorded = recorded
        self._checkpoints: list[Checkpoints] = []

    def curve(self, row: Mapping[str, float]) -> None:
        """Report one row of the curve, whose `epoch` is the step; all of them become plots/<stage>.csv."""
        self.rows.append(dict(row))
        if self._recorded is not None:
            self._recorded.curve(row)

    @property
    def commit(self) -> str:
        """Commit of the sources, with a plus sign where they differ from it; `unknown` outside of Git."""
        found, changed = git_cli.commit(self.files.root)
        return f"{found}+" if changed else found

    def timing(self, name: str, seconds: float) -> None:
        """Note how long a part took, for timings/<stage>.json."""
        self.seconds[name] = seconds

    def checkpoints(self, *sections: str) -> "Checkpoints":
        """Where this training saves its states: found again only by one with the same params, inputs and code.

        Args:
            sections: Sections of params.yaml that the training depends on, beside the seed.
        """
        from pipeline.training.state import Checkpoints  # imports torch

        chosen = {name: self.params.model_dump(mode="json")[name] for name in sections}
        runtime = self.params.runtime.model_dump(include={"precision", "devices", "nodes"})
        identity = {
            "params": {"seed": self.params.seed, "runtime": runtime, **chosen},
            "inputs": dict(_fingerprints(self.files.root, self.stage)),
            "versions": _versions(),
        }
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        found = Checkpoints(self.files.checkpoints / self.stage / digest[:16])
        self._checkpoints.append(found)
        return found

    def write(self, record: Record, seconds: float) -> None:
        """Write metrics, plots and timings; the training states are then of no more use.

        Raises:
            ValueError: If the record holds anything but finite numbers.
        """
        numbers = record.model_dump(exclude_none=True)
        if wrong := [name for name, value in record.flat().items() if not math.isfinite(value)]:
            raise ValueError(f"stage {self.stage} reports no finite number for {', '.join(wrong)}")
        if self.rows:
            write_text(self.files.plots(self.stage), table(self.rows))
        timings = {
            "seconds": {"total": seconds, **self.seconds},
            "peak_memory_bytes": peak_memory(),
            "host": platform.node(),
            "platform": platform.platform(),
            "versions": _versions(),
        }
        write_json(self.files.timings(self.stage), timings)
        write_json(self.files.metrics(self.stage), numbers)
        for checkpoints in self._checkpoints:
            checkpoints.clear()


def table(rows: list[dict[str, float]]) -> str:
    """CSV of all columns in the order in which they came up; a cell is empty where a row has no value."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return csv_text(columns, [[repr(row[name]) if name in row else "" for name in columns] for row in rows])


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def _fingerprints(root: Path, stage: str) -> Iterator[tuple[str, str]]:
    """Hashes of the dependencies of a stage, as dvc.yaml names them."""
    pipeline = YAML(typ="safe", pure=True).load((root / "dvc.yaml").read_text(encoding="utf-8"))
    known = dict(_outputs(root)) if "DVC_STAGE" in os.environ else {}  # dvc has just compared them with the files
    for dependency in pipeline["stages"][stage]["deps"]:
        top = root / dependency
        if dependency in known:
            yield dependency, known[dependency]
            continue
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if path.is_file() and path.suffix != ".pyc":
                with path.open("rb") as file:
                    yield path.relative_to(root).as_posix(), hashlib.file_digest(file, "sha256").hexdigest()


def _outputs(root: Path) -> Iterator[tuple[str, str]]:
    """Outputs of all stages and their hashes in dvc.lock: gigabytes of images are not read again."""
    path = root / "dvc.lock"
    lock = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for entry in lock.get("stages", {}).values():
        yield from ((out["path"], out["md5"]) for out in entry.get("outs", ()) if "md5" in out)


# --- running ----------------------------------------------------------------------------------------------------------


def run_stage(function: Callable[[Run], Record]) -> NoReturn:
    """Run a stage as the program, and exit.

    Args:
        function: Does the work and returns what it found; its name is the stage's.
    """
    stage = function.__name__
    log_to_stderr(stage)
    die_with_parent()
    sys.exit(run_guarded(stage, lambda: _run(stage, function)))


def run_guarded(what: str, work: Callable[[], object]) -> int:
    """Do `work` and return an exit code; errors become one line, unless a traceback is asked for.

    Args:
        what: Begins the line.
        work: What is done.
    """
    try:
        with stoppable():
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
    """The exit code of an error; a file that is missing is a matter of data."""
    return getattr(error, "exit_code", 3 if isinstance(error, FileNotFoundError) else 1)


def _sentence(error: Exception) -> str:
    text = str(error).strip()
    if type(error) in (KeyError, TypeError, AttributeError, AssertionError, IndexError) or not text:
        # Nobody wrote this for the user.
        return f"{type(error).__name__}: {text}\n{DEBUG}=1 shows where"
    return text


def _run(stage: str, function: Callable[[Run], Record]) -> None:
    files = Files.here()
    params = params_file.load(files.params)
    if not is_main_process():
        with tempfile.TemporaryDirectory() as scratch:
            function(Run(stage, params, files, Path(scratch)))
        return
    with running_stage(files, LAST_WORKERS), StageRun(files, params, current(), stage) as recorded:
        started = time.monotonic()
        run = Run(stage, params, files, files.artifacts(stage), recorded)
        record = function(run)
        run.write(record, time.monotonic() - started)


def is_main_process() -> bool:
    """Whether this process is the one of its training that writes and records (Fabric starts the others)."""
    return all(int(os.environ.get(rank, "0")) == 0 for rank in ("LOCAL_RANK", "NODE_RANK", "GROUP_RANK"))


class _Stderr(logging.StreamHandler[TextIO]):
    """Writes to what `sys.stderr` is at the moment: a progress bar puts itself between."""

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, value: TextIO) -> None:
        pass


def log_to_stderr(stage: str) -> None:
    """Show what the library says from `info` on, other libraries from `warning` on."""
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
