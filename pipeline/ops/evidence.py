"""Every method at every target with every seed, as DVC experiments, and what they show together.

What an experiment led to is a file in evidence/results/, which Git keeps, with a digest of the sources it came from.
Those that have one are not run again, on whichever machine the comparison goes on; the rest finds in DVC's run cache
what an interrupted run had finished.
"""

import hashlib
import json
import logging
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from pipeline.config import Params
from pipeline.files import Files, csv_text, write_json, write_text
from pipeline.inference.graph import timing_graph
from pipeline.inference.timing import gain, measure
from pipeline.models.spec import ArchSpec
from pipeline.ops.params import load
from pipeline.ops.presets import load_preset
from pipeline.records import SurgeryRecord, TeacherRecord
from pipeline.report.evidence import Result, draw, page

log = logging.getLogger(__name__)

PRESET = "evidence"
BUDGETED = ("budget", "static-magnitude", "static-random")  # methods that take a target
TARGETS = (0.5, 0.65, 0.8, 0.9)
SEEDS = (0, 1, 2)
LEARNING_RATES = {"static-magnitude": 0.008, "static-random": 0.008}
"""Where a method has another than the preset's. For each the best by validation of those tried (seed 0, -80 %, 12
epochs): 0.0005 to 0.003 where it shrinks, 0.001 to 0.016 where it was cut before, 0.002 to 0.016 where it starts anew.
Methods `paper` and `none` take ours.
"""
STAGES = ("prepare", "teacher", "student", "surgery")
"""What an experiment runs."""
REPEATS = 200
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
        """Name of its result."""
        return "-".join([self.method, *([f"{100 * self.target:g}"] if self.target else []), f"seed{self.seed}"])

    @property
    def settings(self) -> dict[str, str]:
        """What differs from the preset."""
        found = {"seed": str(self.seed), "student.method": self.method}
        if self.target:
            found["student.budget.reduction"] = str(self.target)
        if self.method in LEARNING_RATES:
            found["student.optimizer.lr"] = str(LEARNING_RATES[self.method])
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
        cells: What to compare; the page shows those of earlier calls too.

    Returns:
        The page.

    Raises:
        EvidenceError: If params.yaml is another one, sources differ from the commit that experiments start from, or an
            experiment fails; those before it are kept.
    """
    params = load(files.params)
    if params != load_preset(files.root, PRESET):
        raise EvidenceError(f"params.yaml is not the preset `{PRESET}`; run `smaller-student preset {PRESET}` first")
    for number, cell in enumerate(cells):
        digest = _digest(params, cell, _sources(files.root))
        if _stored(files.root, cell).get("sources") == digest:
            continue
        log.info("experiment %d of %d: %s", number + 1, len(cells), cell.name)
        found = _result(files.root, cell, _run(files.root, cell, digest))
        write_json(_path(files.root, cell), {"sources": digest, **found.model_dump(exclude={"speedup"})})
    return write(files, _known(files.root, params), params)


def _sources(root: Path) -> str:
    """What the stages depend on that Git keeps, as objects of the present commit.

    Raises:
        EvidenceError: If these sources differ from the commit that experiments start from.
    """
    pipeline = YAML(typ="safe", pure=True).load((root / "dvc.yaml").read_text(encoding="utf-8"))
    found = {dependency for stage in STAGES for dependency in pipeline["stages"][stage]["deps"]}
    sources = sorted(path for path in found if not path.startswith(("artifacts/", "${")))
    if changed := _git(root, "status", "--porcelain", "--", *sources):
        raise EvidenceError(f"sources differ from the commit that experiments start from; commit first:\n{changed}")
    return _git(root, "ls-tree", "HEAD", "--", *sources)


def _digest(params: Params, cell: Cell, sources: str) -> str:
    """Of what decides about an experiment's figures: params, settings and sources."""
    runtime = dict.fromkeys(("devices", "nodes", "precision"), True)
    chosen = params.model_dump(
        include={"data": True, "teacher": True, "student": True, "surgery": True, "runtime": runtime}
    )
    text = json.dumps([chosen, cell.settings, sources], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _path(root: Path, cell: Cell) -> Path:
    return root / PRESET / "results" / f"{cell.name}.json"


def _stored(root: Path, cell: Cell) -> dict[str, Any]:
    """Result of a cell, whatever it comes from; empty where there is none."""
    path = _path(root, cell)
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _known(root: Path, params: Params) -> list[Result]:
    """All results of the present sources, earlier calls' included.

    Raises:
        EvidenceError: If students of one seed had different teachers.
    """
    found, teachers, sources = [], dict[int, float](), _sources(root)
    for path in sorted((root / PRESET / "results").glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        digest, result = content.pop("sources"), Result.model_validate(content)
        if digest != _digest(params, Cell(result.method, result.target, result.seed), sources):
            log.warning("%s comes from other sources and is left out", path.name)
        elif teachers.setdefault(result.seed, result.teacher_map) != result.teacher_map:
            raise EvidenceError(
                f"{path.name} had another teacher than others of seed {result.seed}, made on another machine; remove "
                "those of one of them"
            )
        else:
            found.append(result)
    return found


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


def _run(root: Path, cell: Cell, digest: str) -> str:
    """One experiment, in a folder of its own, up to the narrow network; returns its commit."""
    name = f"{PRESET}-{cell.name}-{digest[:8]}"
    if found := _revision(root, name):
        return found
    settings = [part for key, value in cell.settings.items() for part in ("-S", f"{key}={value}")]
    command = [sys.executable, "-m", "dvc", "exp", "run", "--temp", "--name", name, *settings, STAGES[-1]]
    failed = subprocess.run(command, cwd=root, check=False).returncode
    found = _revision(root, name)
    if failed or found is None:
        raise EvidenceError(f"experiment {name} failed, see above; those before it are kept: mend it and go on")
    return found


def _revision(root: Path, name: str) -> str | None:
    """Commit of an experiment that started from the present commit."""
    head = _git(root, "rev-parse", "HEAD")
    return _git(root, "rev-parse", "--verify", "--quiet", f"refs/exps/{head[:2]}/{head[2:]}/{name}") or None


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments],  # noqa: S607 - the user's git
        cwd=root, stdout=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    return done.stdout.strip()


def _result(root: Path, cell: Cell, revision: str) -> Result:
    """What an experiment led to."""
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
    teacher, *students = timings
    gains = [gain(teacher, student) for student in students]
    return [
        result.model_copy(update={"speedup": found.ratio if found.conclusive else None})
        for result, found in zip(results, gains, strict=True)
    ]


def _table(results: Sequence[Result], path: Path) -> None:
    """One line an experiment."""
    rows = [result.row() for result in results]
    write_text(path, csv_text(list(rows[0]), [list(row.values()) for row in rows]))
