"""The only place that knows a path, and the only way a file is written.

Everything a stage writes goes through `write_atomically`: a temporary file beside the target, flushed to the disk,
moved over it, and the folder flushed too, so that a reader sees the old file or the new one and never half of either.
"""

import csv
import io
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

_UMASK = os.umask(0o022)
os.umask(_UMASK)


class Files(NamedTuple):
    """Paths of one checkout.

    Attributes:
        root: Folder that holds dvc.yaml; stages run there.
        state: Folder for local state that must survive `dvc exp run --temp` (the repository's own root).
    """

    root: Path
    state: Path

    @classmethod
    def here(cls) -> "Files":
        """The checkout that the current process runs in; `DVC_ROOT` names the state's when DVC runs it."""
        root = Path.cwd()
        return cls(root, Path(os.environ.get("DVC_ROOT", root)))

    @property
    def params(self) -> Path:
        return self.root / "params.yaml"

    def artifacts(self, stage: str) -> Path:
        """Folder with the outs of a stage."""
        return self.root / "artifacts" / stage

    def metrics(self, stage: str) -> Path:
        return self.root / "metrics" / f"{stage}.json"

    def plots(self, stage: str) -> Path:
        return self.root / "plots" / f"{stage}.csv"

    def timings(self, stage: str) -> Path:
        return self.root / "timings" / f"{stage}.json"

    @property
    def checkpoints(self) -> Path:
        """Training states, outside of DVC's outs: DVC deletes those before a stage runs."""
        return self.state / ".checkpoints"

    @property
    def teacher_outputs(self) -> Path:
        """Cached outputs of teachers, reused by later trainings with the same teacher and images."""
        return self.checkpoints / "answers"

    @property
    def tracking(self) -> Path:
        """Records of what ran, locks, and downloaded models."""
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
        """What is odd about images, and copies that look alike."""
        return self.artifacts("warnings.csv")

    @property
    def quarantine(self) -> Path:
        return self.artifacts("prepare") / "quarantine.csv"

    @property
    def image_cache(self) -> Path:
        return self.artifacts("prepare") / "images.npy"

    @property
    def report(self) -> Path:
        return self.artifacts("benchmark") / "report"


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file so that it is either there in full or not at all.

    Args:
        path: Target; its folder is made where it is missing.
        write: Called with a temporary path in the same folder (a rename across file systems is a copy).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        temporary.chmod(0o666 & ~_UMASK)  # some writers (safetensors) make files that only their owner may read
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut."""
    if os.name == "nt":  # Windows has no handle on a folder to flush
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text with Unix line ends, atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8", newline="\n"))


def csv_text(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """CSV with Unix line ends."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON in the order of `content`, atomically."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        FileNotFoundError: Naming the stage's remedy, where there is no such file.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is missing; run `dvc repro` or `dvc pull` first") from error
