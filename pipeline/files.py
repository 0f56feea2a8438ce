"""Paths of a checkout, and atomic writing of files.

`write_atomically` writes a temporary file beside the target, flushes it to the disk, renames it over the target and
flushes the folder, so a reader sees either the old file or the new one.
"""

import csv
import io
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

_UMASK = os.umask(0o022)
os.umask(_UMASK)


class Files(NamedTuple):
    """Paths of one checkout.

    Attributes:
        root: Folder with dvc.yaml, in which stages run.
        state: Folder for local state that must survive `dvc exp run --temp`: the root of the repository itself.
    """

    root: Path
    state: Path

    @classmethod
    def here(cls) -> "Files":
        """Return the paths of the current directory; under DVC, `DVC_ROOT` is the repository that keeps the state."""
        root = Path.cwd()
        return cls(root, Path(os.environ.get("DVC_ROOT", root)))

    @property
    def params(self) -> Path:
        return self.root / "params.yaml"

    def artifacts(self, stage: str) -> Path:
        return self.root / "artifacts" / stage

    def metrics(self, stage: str) -> Path:
        return self.root / "metrics" / f"{stage}.json"

    def plots(self, stage: str) -> Path:
        return self.root / "plots" / f"{stage}.csv"

    def timings(self, stage: str) -> Path:
        return self.root / "timings" / f"{stage}.json"

    @property
    def checkpoints(self) -> Path:
        """Training states; they are not DVC outs, because DVC deletes outs before a stage runs."""
        return self.state / ".checkpoints"

    @property
    def teacher_outputs(self) -> Path:
        """Stored outputs of teachers, reused by later trainings with the same teacher and images."""
        return self.checkpoints / "teacher-outputs"

    @property
    def tracking(self) -> Path:
        """Run records, locks and downloaded models."""
        return self.state / ".tracking"

    @property
    def mlflow_db(self) -> Path:
        return self.state / "mlflow.db"

    @property
    def mlflow_artifacts(self) -> Path:
        return self.state / "mlartifacts"

    @property
    def vehicles(self) -> Path:
        """Raw images of the default data set, in the layout of VeRi-776."""
        return self.artifacts("prepare") / "vehicles"

    @property
    def manifest(self) -> Path:
        return self.artifacts("prepare") / "manifest.csv"

    @property
    def warnings(self) -> Path:
        """Suspicious images and near-duplicates."""
        return self.root / "artifacts" / "warnings.csv"

    @property
    def quarantine(self) -> Path:
        return self.artifacts("prepare") / "quarantine.csv"

    @property
    def image_cache(self) -> Path:
        return self.artifacts("prepare") / "images.npy"

    @property
    def pixels(self) -> Path:
        """Digest of all decoded images, where no cache holds them: without it, later stages would not see a change."""
        return self.artifacts("prepare") / "pixels.sha256"

    @property
    def report(self) -> Path:
        return self.artifacts("benchmark") / "report"


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file completely or not at all; missing folders are created.

    Args:
        path: Target.
        write: Writes the content to the path that it gets: a temporary file in the folder of `path`, because a rename
            is atomic only within one file system.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        temporary.chmod(0o666 & ~_UMASK)  # safetensors creates files that only their owner may read
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Flush a folder, so that a rename in it survives a power cut, where the system can do that."""
    with suppress(OSError):  # Windows, some network shares and FUSE cannot; the rename is done
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text with Unix line endings atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8", newline="\n"))


def csv_text(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Format a table as CSV with Unix line endings."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON atomically; keys keep their order."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        FileNotFoundError: If there is no such file; the message names the command that creates it.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is missing; run `dvc repro` or `dvc pull` first") from error
