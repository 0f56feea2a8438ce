"""Run the comparison as DVC experiments, and store the result of each in evidence/results/.

A result file holds a digest of its params and sources. An experiment with an up-to-date result does not run again, even
if the comparison resumes on another machine.
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

from benchmarks.evidence.page import Result, plot, render_page
from pipeline.config import Params
from pipeline.files import csv_text, write_json, write_text
from pipeline.inference.timing import gain, measure
from pipeline.inference.timing_graph import timing_graph
from pipeline.models.spec import ArchSpec
from pipeline.records import SurgeryRecord, TeacherRecord
from pipeline.stage.params_file import load
from pipeline.stage.presets import load_preset

log = logging.getLogger(__name__)

BUDGETED = ("budget", "static-magnitude", "static-random")  # methods with a target
TARGETS = (0.5, 0.65, 0.8, 0.9)
SEEDS = (1, 2, 3)  # seed 0 chose the preset
LEARNING_RATES = {"static-magnitude": 0.008, "static-random": 0.008}
"""Learning rates of methods that do not use the preset's.

Each budgeted method has the best of several rates by validation mAP (seed 0, -80 %, 12 epochs of 48 images, before
there were further images and stored views): 0.0005 to 0.003 for `budget`, 0.001 to 0.016 for `static-magnitude`, 0.002
to 0.016 for `static-random`. Methods `paper` and `none` use that of `budget`.
"""
STAGES = ("prepare", "teacher", "student", "surgery")
"""Stages of an experiment."""
REPEATS = 200
"""Timed calls per network."""
POLL = 5.0
"""Seconds between two polls of DVC's queue."""


class EvidenceError(RuntimeError):
    """The experiments cannot run, or their results cannot be compared."""


@dataclass(frozen=True)
class Experiment:
    """A student to train.

    Attributes:
        method: `student.method`.
        target: `student.budget.reduction`; None for methods without a target.
        seed: Seed of data, teacher and student.
    """

    method: str
    target: float | None
    seed: int

    @property
    def name(self) -> str:
        return "-".join([self.method, *([f"{100 * self.target:g}"] if self.target else []), f"seed{self.seed}"])

    @property
    def settings(self) -> dict[str, str]:
        """Params that differ from preset `evidence`."""
        settings = {"seed": str(self.seed), "student.method": self.method}
        if self.target:
            settings["student.budget.reduction"] = str(self.target)
        if self.method in LEARNING_RATES:
            settings["student.optimizer.lr"] = str(LEARNING_RATES[self.method])
        if self.method == "paper":
            settings |= {
                # One compactor per block, after the 3x3 convolution; images with labels only, the teacher in each step.
                "student.sites": "[conv2]",
                "student.batch.unlabelled": "0",
                "student.distill.views": "0",
                "student.distill.average_views": "false",
                "student.distill.feature": "0.5",
                "student.distill.embedding": "0",
                "student.freeze_norms_at": "1",
                "student.freeze_head_norms_at": "1",
            }
        return settings


def grid(seeds: Sequence[int], targets: Sequence[float]) -> Iterator[Experiment]:
    """Yield all experiments seed by seed, so that an interruption leaves complete comparisons."""
    for seed in seeds:
        yield Experiment("none", None, seed)
        for target in targets:
            yield from (Experiment(method, target, seed) for method in BUDGETED)
        yield Experiment("paper", None, seed)


def compare_methods(root: Path, experiments: Sequence[Experiment]) -> Path:
    """Run the experiments without a result, time all networks in turns, and write evidence/.

    Args:
        root: Root of the repository; its params.yaml has the values of preset `evidence`.
        experiments: Experiments to run; the page also shows the results of earlier calls.

    Returns:
        Path of the page.

    Raises:
        EvidenceError: If params.yaml has other values, sources are not committed, or an experiment fails; the results
            of the others are kept.
    """
    params = load(root / "params.yaml")
    if params != preset_params(root):
        raise EvidenceError("params.yaml is not the preset `evidence`; run `smaller-student preset evidence` first")
    sources = tracked_sources(root)
    digests = {experiment: digest(params, experiment, sources) for experiment in experiments}
    names = {experiment: f"evidence-{experiment.name}-{sha[:8]}" for experiment, sha in digests.items()}
    missing = [experiment for experiment in experiments if _stored_digest(root, experiment) != digests[experiment]]
    run({names[experiment]: experiment.settings for experiment in missing}, root)
    failed = []
    for experiment in missing:
        if revision := revision_of(names[experiment], root):
            content = {"sources": digests[experiment], **_read_experiment(root, experiment, revision)}
            write_json(_path(root, experiment), content)
        else:
            failed.append(names[experiment])
    if failed:
        raise EvidenceError(f"{', '.join(failed)} failed; see `dvc queue logs NAME`, the other results are kept")
    return write(root, read_results(root, params, sources), params)


def preset_params(root: Path) -> Params:
    """Load preset `evidence`."""
    return load_preset(root, "evidence")


def run(experiments: Mapping[str, Mapping[str, str]], root: Path) -> None:
    """Run experiments in DVC's queue, one at a time, and wait for them.

    Experiments that finished or were queued by an earlier call are not queued again.

    Args:
        experiments: Changed params by name of the experiment.
        root: Root of the repository.
    """
    queued, orphaned = _queue(root)
    for name in orphaned & set(experiments):
        _dvc(root, "queue", "kill", name)  # marks it as failed
    for name, settings in experiments.items():
        if name not in queued and not revision_of(name, root):
            changes = [part for key, value in settings.items() for part in ("-S", f"{key}={value}")]
            _dvc(root, "exp", "run", "--queue", "--name", name, *changes, STAGES[-1])
    # `dvc exp run --run-all` would also wait for experiments whose worker was killed, and never return.
    while set(experiments) & _queue(root)[0]:
        _dvc(root, "queue", "start", "--jobs", "1")  # no effect while a worker runs
        time.sleep(POLL)


def _queue(root: Path) -> tuple[set[str], set[str]]:
    """Return the queued or running experiments, and those whose worker was killed, which DVC still lists as running."""
    command = [sys.executable, "-m", "dvc", "queue", "status"]
    status = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, text=True, check=True).stdout
    rows = [line.split() for line in status.splitlines() if len(line.split()) > 2]
    names = {state: {row[1] for row in rows if row[-1] == state} for state in ("Queued", "Running")}
    if "Worker status: 0 active" in status:
        return names["Queued"], names["Running"]
    return names["Queued"] | names["Running"], set()


def _dvc(root: Path, *arguments: str) -> None:
    if subprocess.run([sys.executable, "-m", "dvc", *arguments], cwd=root, check=False).returncode:
        raise EvidenceError(f"`dvc {' '.join(arguments)}` failed; see its output above")


def revision_of(name: str, root: Path) -> str:
    """Return the commit of a finished experiment, from whichever commit it started; empty if there is none."""
    return _git(root, "for-each-ref", "--count=1", "--format=%(objectname)", f"refs/exps/*/*/{name}")


def tracked_sources(root: Path) -> str:
    """List the dependencies of the stages that Git tracks, with their object ids at HEAD (`git ls-tree`).

    Raises:
        EvidenceError: If they have uncommitted changes.
    """
    pipeline = YAML(typ="safe", pure=True).load((root / "dvc.yaml").read_text(encoding="utf-8"))
    dependencies = {dependency for stage in STAGES for dependency in pipeline["stages"][stage]["deps"]}
    sources = sorted(path for path in dependencies if not path.startswith(("artifacts/", "${")))
    if changed := _git(root, "status", "--porcelain", "--", *sources):
        raise EvidenceError(f"experiments start from HEAD, but there are uncommitted changes; commit first:\n{changed}")
    return _git(root, "ls-tree", "HEAD", "--", *sources)


def digest(params: Params, experiment: Experiment, sources: str) -> str:
    """Compute the SHA-256 of everything that decides the result of an experiment: params, settings and sources."""
    runtime = dict.fromkeys(("devices", "nodes", "precision"), True)
    decisive = params.model_dump(
        include={"data": True, "teacher": True, "student": True, "surgery": True, "runtime": runtime}
    )
    text = json.dumps([decisive, experiment.settings, sources], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def read_results(root: Path, params: Params, sources: str) -> list[Result]:
    """Read all stored results that were made with these params and sources.

    Raises:
        EvidenceError: If students of one seed had different teachers.
    """
    results, teachers = [], dict[int, float]()
    for path in sorted((root / "evidence" / "results").glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        stored, result = content.pop("sources"), Result.model_validate(content)
        if stored != digest(params, Experiment(result.method, result.target, result.seed), sources):
            log.warning("%s was made with other sources and is ignored", path.name)
        elif teachers.setdefault(result.seed, result.teacher_map) != result.teacher_map:
            raise EvidenceError(
                f"{path.name} has another teacher than the other results of seed {result.seed}, as happens on another "
                "machine; remove the results of one machine"
            )
        else:
            results.append(result)
    return results


def write(root: Path, results: Sequence[Result], params: Params) -> Path:
    """Time all networks; write results.csv, pareto.png and README.md to evidence/."""
    full = ArchSpec.of(params.teacher)
    size = (params.data.image_size[0], params.data.image_size[1])
    timed = _add_speedups(results, full, size)
    folder = root / "evidence"
    rows = [result.row() for result in timed]
    write_text(folder / "results.csv", csv_text(list(rows[0]), [list(row.values()) for row in rows]))
    plot(timed, folder / "pareto.png")
    write_text(folder / "README.md", render_page(timed, f"{params.data.source}, {size[0]} x {size[1]} pixels"))
    return folder / "README.md"


def _path(root: Path, experiment: Experiment) -> Path:
    return root / "evidence" / "results" / f"{experiment.name}.json"


def _stored_digest(root: Path, experiment: Experiment) -> str:
    path = _path(root, experiment)
    return str(json.loads(path.read_text(encoding="utf-8"))["sources"]) if path.is_file() else ""


def _read_experiment(root: Path, experiment: Experiment, revision: str) -> dict[str, object]:
    """Read the result of a finished experiment from its commit."""
    surgery = SurgeryRecord.model_validate_json(_git(root, "show", f"{revision}:metrics/surgery.json"))
    teacher = TeacherRecord.model_validate_json(_git(root, "show", f"{revision}:metrics/teacher.json"))
    result = Result(
        method=experiment.method,
        target=experiment.target,
        seed=experiment.seed,
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
        ["git", *arguments],  # noqa: S607 - git is found on PATH
        cwd=root, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return done.stdout.strip()


def _add_speedups(results: Sequence[Result], full: ArchSpec, size: tuple[int, int]) -> list[Result]:
    """Time each network and the teacher in turns, and add the speed-ups to the results."""
    with tempfile.TemporaryDirectory() as folder:
        paths = {}
        for number, widths in enumerate([full.widths, *(result.widths for result in results)]):
            paths[str(number)] = Path(folder) / f"{number}.onnx"
            paths[str(number)].write_bytes(timing_graph(full.narrowed(widths), size))
        timings = measure(paths, size, batches=[1], threads=[0], repeats=REPEATS)
    teacher, *students = timings
    gains = [gain(teacher, student) for student in students]
    return [
        result.model_copy(update={"speedup": speedup.ratio if speedup.conclusive else None})
        for result, speedup in zip(results, gains, strict=True)
    ]
