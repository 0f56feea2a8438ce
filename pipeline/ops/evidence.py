"""Every method at every target with every seed, as DVC experiments, and what they show together.

An experiment is known by its name and by the commit it started from; those that exist are not run again, and the rest
finds in DVC's run cache what an interrupted run had finished.
"""

import csv
import io
import json
import logging
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.benchmark.latency import measure
from pipeline.config import Params
from pipeline.files import Files, write_text
from pipeline.inference.graph import timing_graph
from pipeline.models.spec import ArchSpec
from pipeline.ops.params import load
from pipeline.records import SurgeryRecord, TeacherRecord
from pipeline.report.evidence import Result, draw, page

log = logging.getLogger(__name__)

PRESET = "evidence"
BUDGETED = ("budget", "static-magnitude", "static-random")  # methods that take a target
TARGETS = (0.5, 0.65, 0.8, 0.9)
SEEDS = (0, 1, 2)
SOURCES = ("pipeline", "stages", "dvc.yaml", "requirements.lock")
REPEATS = 40
"""Timed calls of each network."""


class EvidenceError(RuntimeError):
    """There would be no evidence, or it would be about something else."""

    exit_code = 2


@dataclass(frozen=True)
class Cell:
    """One experiment.

    Attributes:
        method: Of stage `student`.
        target: Reduction that is asked for; None where the method takes none.
        seed: Of data, teacher and student.
    """

    method: str
    target: float | None
    seed: int

    @property
    def name(self) -> str:
        """Name of the experiment."""
        return "-".join([PRESET, self.method, *([f"{100 * self.target:g}"] if self.target else []), f"seed{self.seed}"])

    @property
    def settings(self) -> dict[str, str]:
        """What differs from the preset."""
        found = {"seed": str(self.seed), "student.method": self.method}
        if self.target:
            found["student.budget.reduction"] = str(self.target)
        if self.method == "paper":
            found["student.sites"] = "[conv2]"  # as published: one compactor a block, behind the 3x3
        return found


def grid(seeds: Sequence[int], targets: Sequence[float]) -> Iterator[Cell]:
    """All cells, seed by seed, so that a stop leaves whole comparisons."""
    for seed in seeds:
        yield Cell("none", None, seed)
        for target in targets:
            yield from (Cell(method, target, seed) for method in BUDGETED)
        yield Cell("paper", None, seed)


def gather(files: Files, cells: Sequence[Cell]) -> Path:
    """Run what has not run, time all networks side by side, and write evidence/.

    Args:
        files: Of the repository; its params.yaml is the preset.
        cells: What to compare.

    Returns:
        The page.

    Raises:
        EvidenceError: If params.yaml is another one, sources differ from the commit that experiments are known by, or
            an experiment fails; those before it are kept.
    """
    preset = files.root / "presets" / f"{PRESET}.yaml"
    if files.params.read_text(encoding="utf-8") != preset.read_text(encoding="utf-8"):
        raise EvidenceError(f"params.yaml is not the preset `{PRESET}`; run `smaller-student preset {PRESET}` first")
    if changed := _git(files.root, "status", "--porcelain", "--", *SOURCES):
        raise EvidenceError(f"sources differ from the commit that experiments are known by; commit first:\n{changed}")
    for number, cell in enumerate(cells):
        if _revision(files.root, cell) is None:
            log.info("experiment %d of %d: %s", number + 1, len(cells), cell.name)
            _run(files.root, cell)
    results = [_result(files.root, cell) for cell in cells]
    return write(files, results, load(files.params))


def write(files: Files, results: Sequence[Result], params: Params) -> Path:
    """Time all networks and write results.csv, pareto.png and README.md to evidence/.

    Args:
        files: Of the repository.
        results: One for each experiment.
        params: Of the preset.
    """
    teacher = params.teacher
    full = ArchSpec.full(teacher.depth, teacher.width, teacher.embedding_dim, teacher.last_stride)
    size = (params.data.image_size[0], params.data.image_size[1])
    timed = _timed(results, full, size)
    folder = files.root / PRESET
    _table(timed, folder / "results.csv")
    draw(timed, folder / "pareto.png")
    write_text(folder / "README.md", page(timed, f"{params.data.source}, {size[0]} x {size[1]} pixels"))
    return folder / "README.md"


def _run(root: Path, cell: Cell) -> None:
    """One experiment, in a folder of its own, up to the narrow network."""
    settings = [part for key, value in cell.settings.items() for part in ("-S", f"{key}={value}")]
    command = [sys.executable, "-m", "dvc", "exp", "run", "--temp", "--name", cell.name, *settings, "surgery"]
    if subprocess.run(command, cwd=root, check=False).returncode or _revision(root, cell) is None:
        raise EvidenceError(f"experiment {cell.name} failed, see above; those before it are kept: mend it and go on")


def _revision(root: Path, cell: Cell) -> str | None:
    """Commit of an experiment that started from the present commit."""
    head = _git(root, "rev-parse", "HEAD")
    return _git(root, "rev-parse", "--verify", "--quiet", f"refs/exps/{head[:2]}/{head[2:]}/{cell.name}") or None


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments],  # noqa: S607 - the user's git
        cwd=root, stdout=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    return done.stdout.strip()


def _result(root: Path, cell: Cell) -> Result:
    """What an experiment led to."""
    revision = _revision(root, cell)
    surgery = SurgeryRecord.model_validate(json.loads(_git(root, "show", f"{revision}:metrics/surgery.json")))
    teacher = TeacherRecord.model_validate(json.loads(_git(root, "show", f"{revision}:metrics/teacher.json")))
    return Result(
        method=cell.method,
        target=cell.target,
        seed=cell.seed,
        map=surgery.map,
        rank1=surgery.rank1,
        teacher_map=teacher.map,
        macs_reduction=surgery.macs_reduction,
        params_reduction=surgery.params_reduction,
        widths=surgery.widths,
    )


def _timed(results: Sequence[Result], full: ArchSpec, size: tuple[int, int]) -> list[Result]:
    """The same with the latency of each network next to that of the teacher's."""
    with tempfile.TemporaryDirectory() as folder:
        paths = {}
        for number, widths in enumerate([full.widths, *(result.widths for result in results)]):
            paths[str(number)] = Path(folder) / f"{number}.onnx"
            paths[str(number)].write_bytes(timing_graph(full.model_copy(update={"widths": widths}), size))
        timings = measure(paths, size, batches=[1], threads=[0], repeats=REPEATS)
    teacher, *students = [timing.p50_ms for timing in timings]
    return [result.timed(teacher / student) for result, student in zip(results, students, strict=True)]


def _table(results: Sequence[Result], path: Path) -> None:
    """One line an experiment."""
    rows = [result.row() for result in results]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
