"""Run the comparison as DVC experiments, and keep the result of each in evidence/results/.

A result holds a digest of the params and sources that it comes from. An experiment whose result is there does not run
again, on whichever machine the comparison goes on.
"""

import hashlib
import json
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ruamel.yaml import YAML

from benchmarks.evidence.page import Result, draw, page
from pipeline.config import Params
from pipeline.files import csv_text, write_json, write_text
from pipeline.inference.timing import gain, measure
from pipeline.inference.timing_graph import timing_graph
from pipeline.models.spec import ArchSpec
from pipeline.records import SurgeryRecord, TeacherRecord
from pipeline.stage.params_file import load
from pipeline.stage.presets import load_preset

log = logging.getLogger(__name__)

BUDGETED = ("budget", "static-magnitude", "static-random")  # methods that take a target
TARGETS = (0.5, 0.65, 0.8, 0.9)
SEEDS = (0, 1, 2)
LEARNING_RATES = {"static-magnitude": 0.008, "static-random": 0.008}
"""Where a method has another than the preset's. For each the best by validation of those tried (seed 0, -80 %, 12
epochs): 0.0005 to 0.003 where it shrinks, 0.001 to 0.016 where it was cut before, 0.002 to 0.016 where it starts anew.
Methods `paper` and `none` take ours.
"""
STAGES = ("prepare", "teacher", "student", "surgery")
"""Stages that an experiment runs."""
REPEATS = 200
"""Timed calls of each network."""
POLL = 5.0
"""Seconds between two looks at DVC's queue."""


class EvidenceError(RuntimeError):
    """The experiments cannot be run, or cannot be compared."""


@dataclass(frozen=True)
class Cell:
    """One experiment.

    Attributes:
        method: `student.method`.
        target: Reduction of the budget; None where the method takes none.
        seed: Of data, teacher and student.
    """

    method: str
    target: float | None
    seed: int

    @property
    def name(self) -> str:
        return "-".join([self.method, *([f"{100 * self.target:g}"] if self.target else []), f"seed{self.seed}"])

    @property
    def settings(self) -> dict[str, str]:
        """Params that differ from the preset's."""
        found = {"seed": str(self.seed), "student.method": self.method}
        if self.target:
            found["student.budget.reduction"] = str(self.target)
        if self.method in LEARNING_RATES:
            found["student.optimizer.lr"] = str(LEARNING_RATES[self.method])
        if self.method == "paper":
            found["student.sites"] = "[conv2]"  # as published: one compactor a block, behind the 3x3
        return found


def grid(seeds: Sequence[int], targets: Sequence[float]) -> Iterator[Cell]:
    """Yield all experiments, seed by seed, so that a stop leaves whole comparisons."""
    for seed in seeds:
        yield Cell("none", None, seed)
        for target in targets:
            yield from (Cell(method, target, seed) for method in BUDGETED)
        yield Cell("paper", None, seed)


def gather(root: Path, cells: Sequence[Cell]) -> Path:
    """Run the experiments that have no result, time all networks side by side, and write evidence/.

    Args:
        root: The repository; its params.yaml has the preset's values.
        cells: What to compare; the page shows the results of earlier calls too.

    Returns:
        The page.

    Raises:
        EvidenceError: If params.yaml has other values, sources differ from the commit that experiments start from, or
            an experiment fails; the results of the others are kept.
    """
    params = load(root / "params.yaml")
    if params != preset_params(root):
        raise EvidenceError("params.yaml is not the preset `evidence`; run `smaller-student preset evidence` first")
    sources = tracked_sources(root)
    digests = {cell: digest(params, cell, sources) for cell in cells}
    names = {cell: f"evidence-{cell.name}-{found[:8]}" for cell, found in digests.items()}
    missing = [cell for cell in cells if _stored_digest(root, cell) != digests[cell]]
    run({names[cell]: cell.settings for cell in missing}, root)
    for cell in missing:
        if revision := revision_of(names[cell], root):
            write_json(_path(root, cell), {"sources": digests[cell], **_result(root, cell, revision)})
    if failed := [names[cell] for cell in missing if not revision_of(names[cell], root)]:
        raise EvidenceError(f"{', '.join(failed)} failed; `dvc queue logs NAME` shows why, the others are kept")
    return write(root, known_results(root, params, sources), params)


def preset_params(root: Path) -> Params:
    """Read the values of preset `evidence`."""
    return load_preset(root, "evidence")


def run(experiments: Mapping[str, Mapping[str, str]], root: Path) -> None:
    """Run experiments in DVC's queue, one at a time, and wait for them.

    Those that have finished, or that wait in the queue from an earlier call, are not queued again.

    Args:
        experiments: Params by name of the experiment.
        root: The repository.
    """
    waiting, lost = _queue(root)
    for name in lost & set(experiments):
        _dvc(root, "queue", "kill", name)  # marks it as failed
    for name, settings in experiments.items():
        if name not in waiting and not revision_of(name, root):
            changes = [part for key, value in settings.items() for part in ("-S", f"{key}={value}")]
            _dvc(root, "exp", "run", "--queue", "--name", name, *changes, STAGES[-1])
    # `dvc exp run --run-all` would wait for experiments whose worker was killed, too, and so for ever.
    while set(experiments) & _queue(root)[0]:
        _dvc(root, "queue", "start", "--jobs", "1")  # does nothing while a worker runs
        time.sleep(POLL)


def _queue(root: Path) -> tuple[set[str], set[str]]:
    """List the experiments that wait or run, and those whose worker is gone, which DVC shows as running for ever."""
    command = [sys.executable, "-m", "dvc", "queue", "status"]
    status = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, text=True, check=True).stdout
    rows = [line.split() for line in status.splitlines() if len(line.split()) > 2]
    names = {state: {row[1] for row in rows if row[-1] == state} for state in ("Queued", "Running")}
    if "Worker status: 0 active" in status:
        return names["Queued"], names["Running"]
    return names["Queued"] | names["Running"], set()


def _dvc(root: Path, *arguments: str) -> None:
    if subprocess.run([sys.executable, "-m", "dvc", *arguments], cwd=root, check=False).returncode:
        raise EvidenceError(f"`dvc {' '.join(arguments)}` failed, see above")


def revision_of(name: str, root: Path) -> str:
    """Commit of a finished experiment, whichever commit it started from; empty if there is none."""
    return _git(root, "for-each-ref", "--count=1", "--format=%(objectname)", f"refs/exps/*/*/{name}")


def tracked_sources(root: Path) -> str:
    """List what the stages depend on that Git keeps, as objects of the present commit.

    Raises:
        EvidenceError: If these sources differ from the commit that experiments start from.
    """
    pipeline = YAML(typ="safe", pure=True).load((root / "dvc.yaml").read_text(encoding="utf-8"))
    found = {dependency for stage in STAGES for dependency in pipeline["stages"][stage]["deps"]}
    sources = sorted(path for path in found if not path.startswith(("artifacts/", "${")))
    if changed := _git(root, "status", "--porcelain", "--", *sources):
        raise EvidenceError(f"sources differ from the commit that experiments start from; commit first:\n{changed}")
    return _git(root, "ls-tree", "HEAD", "--", *sources)


def digest(params: Params, cell: Cell, sources: str) -> str:
    """Hash what decides an experiment's figures: params, settings and sources."""
    runtime = dict.fromkeys(("devices", "nodes", "precision"), True)
    chosen = params.model_dump(
        include={"data": True, "teacher": True, "student": True, "surgery": True, "runtime": runtime}
    )
    text = json.dumps([chosen, cell.settings, sources], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def known_results(root: Path, params: Params, sources: str) -> list[Result]:
    """Read all results of the present sources, earlier calls' included.

    Raises:
        EvidenceError: If students of one seed had different teachers.
    """
    found, teachers = [], dict[int, float]()
    for path in sorted((root / "evidence" / "results").glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        stored, result = content.pop("sources"), Result.model_validate(content)
        if stored != digest(params, Cell(result.method, result.target, result.seed), sources):
            log.warning("%s comes from other sources and is left out", path.name)
        elif teachers.setdefault(result.seed, result.teacher_map) != result.teacher_map:
            raise EvidenceError(
                f"{path.name} had another teacher than others of seed {result.seed}, made on another machine; remove "
                "those of one of them"
            )
        else:
            found.append(result)
    return found


def write(root: Path, results: Sequence[Result], params: Params) -> Path:
    """Time all networks and write results.csv, pareto.png and README.md to evidence/."""
    teacher = params.teacher
    full = ArchSpec.full(teacher.depth, teacher.width, teacher.embedding_dim, teacher.last_stride)
    size = (params.data.image_size[0], params.data.image_size[1])
    timed = _timed(results, full, size)
    folder = root / "evidence"
    rows = [result.row() for result in timed]
    write_text(folder / "results.csv", csv_text(list(rows[0]), [list(row.values()) for row in rows]))
    draw(timed, folder / "pareto.png")
    write_text(folder / "README.md", page(timed, f"{params.data.source}, {size[0]} x {size[1]} pixels"))
    return folder / "README.md"


def _path(root: Path, cell: Cell) -> Path:
    return root / "evidence" / "results" / f"{cell.name}.json"


def _stored_digest(root: Path, cell: Cell) -> str:
    path = _path(root, cell)
    return str(json.loads(path.read_text(encoding="utf-8"))["sources"]) if path.is_file() else ""


def _result(root: Path, cell: Cell, revision: str) -> dict[str, object]:
    """Result of an experiment, read from its commit."""
    surgery = SurgeryRecord.model_validate_json(_git(root, "show", f"{revision}:metrics/surgery.json"))
    teacher = TeacherRecord.model_validate_json(_git(root, "show", f"{revision}:metrics/teacher.json"))
    result = Result(
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
    return result.model_dump(exclude={"speedup"})


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments],  # noqa: S607 - the user's git
        cwd=root, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return done.stdout.strip()


def _timed(results: Sequence[Result], full: ArchSpec, size: tuple[int, int]) -> list[Result]:
    """Results with the latency of each network beside the teacher's."""
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
