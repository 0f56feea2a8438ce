"""Train students of one teacher that differ in one thing: `python -m benchmarks.ladder STUDENTS --seed N`.

The stages run in a clone of the last commit, `.ladder/STUDENTS-N`; run the command again to resume after an
interruption. Each finished student is a row of evidence/ladder/STUDENTS-N.csv. With one thread, the default, two seeds
can run side by side.
"""

import argparse
import csv
import hashlib
import os
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from ruamel.yaml import YAML
from torch import Tensor

from benchmarks.short import ROOT, with_values
from pipeline import checkpoint
from pipeline.config import Params
from pipeline.data.augment import normalise
from pipeline.data.images import open_images
from pipeline.files import Files, csv_text, write_atomically, write_text
from pipeline.models import cost
from pipeline.retrieval import scoring
from pipeline.retrieval.embed import embed
from pipeline.retrieval.evaluate import sides
from pipeline.stage.params_file import load
from pipeline.stage.presets import load_preset

Vectors = npt.NDArray[np.float32]

SHORT = {
    "student.epochs": 24,
    "student.budget.start": 0.03,
    "student.budget.end": 0.3,
    "student.budget.fade": 0.05,
}
CLOSE = {
    "student.distill.feature": 2.0,
    "student.distill.embedding": 40.0,
    "student.distill.average_views": False,
    "student.resetting.importance": "taylor",
}


@dataclass(frozen=True)
class Set:
    """Students of one teacher.

    Attributes:
        preset: Params of all of them.
        rows: Params that differ from it, by dotted name, for each student; the first are the most important.
        settings: Params of teacher and students that differ from the preset.
    """

    preset: str
    rows: Mapping[str, Mapping[str, Any]]
    settings: Mapping[str, Any] = field(default_factory=dict)


SETS = {
    "vehicles": Set(
        "evidence",
        {
            "ours-65": {},
            "ours-80": {"student.budget.reduction": 0.8},
            "ours-90": {"student.budget.reduction": 0.9},
            "none-12": {"student.method": "none", "student.epochs": 12},  # 48 take an hour
            "mean-65": SHORT,
            "embedding-65": {**SHORT, "student.distill.average_views": False},
            "others-65": {**SHORT, **CLOSE},
            "labels-65": {**SHORT, **CLOSE, "student.batch.unlabelled": 0, "student.distill.views": 0},
            "taylor-90": {"student.budget.reduction": 0.9, "student.resetting.importance": "taylor"},
            "one-view-65": {"student.distill.average_views": False},
            "train-only-65": {"data.vehicles.unlabelled_identities": 0},
        },
    ),
    # The method as published, from a pre-trained half-width ResNet-50: --set data.root=... teacher.weights=...
    "paper": Set(
        "sop-r50",
        {
            "one-sided": {"student.sites": ["conv2"]},
            "two-sided": {"student.sites": ["conv1", "conv2"]},
        },
        {
            "data.source": "folder",
            "data.image_size": [64, 64],
            "data.validation": 0.1,
            "teacher.width": 32,
            "teacher.stem": 64,
            "teacher.epochs": 60,
            "teacher.augment.pad": 3,
            "student.augment.pad": 3,
            "student.method": "paper",
            "student.epochs": 267,  # lasso and learning rate move a row by 1.5 in 7,500 steps, by 0.4 in 2,000
        },
    ),
}


@dataclass(frozen=True)
class Embeddings:
    """Embeddings (n, D) of a network: images of training identities, and of the test set, queries first."""

    seen: Vectors
    unseen: Vectors


def main() -> None:
    """Train what is missing, and print each row."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ladder", description=__doc__)
    parser.add_argument("students", choices=SETS, help="which students")
    parser.add_argument("--seed", type=int, required=True, help="seed of data, teacher and students")
    parser.add_argument("--rows", nargs="+", help="students to train, in this order (default: all)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="params of all, such as data.root")
    options = parser.parse_args()
    chosen = SETS[options.students]
    names = options.rows or list(chosen.rows)
    name = f"{options.students}-{options.seed}"
    folder, table = ROOT / ".ladder" / name, ROOT / "evidence" / "ladder" / f"{name}.csv"
    given = {key: YAML(typ="safe").load(value) for key, value in (pair.split("=", 1) for pair in options.set)}
    settings = {"seed": options.seed, "runtime.threads": 1, **chosen.settings, **given}
    params = with_values(load_preset(ROOT, chosen.preset), settings)
    clone(folder)
    for row in names:
        if row not in (done["row"] for done in read(table)):
            student = with_values(params, dict(chosen.rows[row]))
            result = train(folder, params, student)
            if student.student.method == "paper":  # whose rows shrink over the whole training
                shutil.copyfile(Files(folder, folder).plots("student"), table.with_name(f"{name}-{row}.csv"))
            rows = [*read(table), {"row": row, **result}]
            write_text(table, csv_text(list(rows[0]), [list(line.values()) for line in rows]))
            print(f"{row}: {result['difference']} mAP, {result['core_minutes']} core-minutes", flush=True)


def clone(folder: Path) -> None:
    """Clone this repository, unless an earlier call has done so; a set is finished at the commit where it began."""
    if not folder.is_dir():
        subprocess.run(["git", "clone", "--quiet", ROOT, folder], check=True)  # noqa: S607 - git is found on PATH


def read(table: Path) -> list[dict[str, str]]:
    """Return the finished rows."""
    if not table.is_file():
        return []
    with table.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def train(folder: Path, base: Params, params: Params) -> dict[str, str]:
    """Train a student in a clone, cut it, and compare it with the teacher; the teacher is trained if it is missing.

    Args:
        base: Params of the teacher.
        params: Params of the student.
    """
    files = Files(folder, folder)
    if not files.metrics("teacher").is_file():
        prepare(files, base)
        run("teacher", folder, base)
    prepare(files, params)
    seconds = run("student", folder, params)
    run("surgery", folder, params)
    return {**measure(files, params), "core_minutes": f"{seconds / 60:.1f}", **origin(folder)}


def prepare(files: Files, params: Params) -> None:
    """Prepare the data, unless they are there; the labelled images of a seed are the same for all students."""
    finished = files.metrics("prepare")
    if finished.is_file() and load(files.params).data == params.data:
        return
    finished.unlink(missing_ok=True)
    run("prepare", files.root, params)


def run(stage: str, folder: Path, params: Params) -> float:
    """Run a stage, and return the seconds of computing that it took, on all cores together."""
    yaml = YAML()
    write_atomically(folder / "params.yaml", lambda path: yaml.dump(params.model_dump(mode="json"), path))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": str(params.runtime.threads)}
    subprocess.run([sys.executable, "-m", f"stages.{stage}"], cwd=folder, env=environment, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(files: Files, params: Params) -> dict[str, str]:
    """Compare the cut student with its teacher on the test set; distances are the mean of 1 - cosine."""
    protocol, (height, width) = params.data.protocol, params.data.image_size
    manifest, images = open_images(files, params)
    test = np.concatenate([manifest.indices("query"), manifest.indices("gallery")])

    def embeddings(stage: str, mirror: bool = False) -> Embeddings:
        net = checkpoint.load(files.artifacts(stage))

        def preprocess(batch: Tensor) -> Tensor:
            return normalise(batch.flip(3) if mirror else batch)

        return Embeddings(
            embed(net, images, manifest.indices("train"), preprocess), embed(net, images, test, preprocess)
        )

    def average_precision(vectors: Vectors) -> npt.NDArray[np.float64]:
        return scoring.evaluate(protocol, *sides(vectors, manifest, "query", "gallery", protocol)).ap

    teacher, student = embeddings("teacher"), embeddings("surgery")
    both = unit(teacher.unseen + embeddings("teacher", mirror=True).unseen)
    of_teacher, of_student = average_precision(teacher.unseen), average_precision(student.unseen)
    differences = of_student - of_teacher
    differences = differences[np.isfinite(differences)]
    specs = [checkpoint.load_spec(files.artifacts(stage)) for stage in ("teacher", "surgery")]
    macs = [cost.macs(spec, (height, width)) for spec in specs]
    weights = [cost.params(spec) for spec in specs]
    return {
        "teacher_map": f"{np.nanmean(of_teacher):.5f}",
        "map": f"{np.nanmean(of_student):.5f}",
        "difference": f"{differences.mean():+.5f}",
        "standard_error": f"{differences.std(ddof=1) / len(differences) ** 0.5:.5f}",
        "distance_seen": f"{distance(student.seen, teacher.seen):.4f}",
        "distance_unseen": f"{distance(student.unseen, teacher.unseen):.4f}",
        "distance_unseen_to_mirrored_mean": f"{distance(student.unseen, both):.4f}",
        "teacher_with_mirror_map": f"{np.nanmean(average_precision(both)):.5f}",
        "macs_reduction": f"{1 - macs[1] / macs[0]:.4f}",
        "params_reduction": f"{1 - weights[1] / weights[0]:.4f}",
        "layer4_width": str(specs[1].widths["layer4"]),
    }


def unit(vectors: Vectors) -> Vectors:
    """Divide vectors (n, D) by their lengths."""
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def distance(first: Vectors, second: Vectors) -> float:
    """Return the mean of 1 - cosine of pairs of unit vectors (n, D)."""
    return float(1 - np.einsum("nd,nd->n", first, second).mean())


def origin(folder: Path) -> dict[str, str]:
    """Return what the row was made of: a digest of the teacher's weights, the commit, and the processor."""
    command: Sequence[str] = ("git", "rev-parse", "--short", "HEAD")
    commit = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    weights = (Files(folder, folder).artifacts("teacher") / checkpoint.WEIGHTS).read_bytes()
    info = Path("/proc/cpuinfo")
    models = [line for line in info.read_text().splitlines() if "model name" in line] if info.is_file() else []
    processor = models[0].split(":")[1].strip() if models else platform.processor()
    return {"teacher": hashlib.sha256(weights).hexdigest()[:12], "commit": commit, "processor": processor}


if __name__ == "__main__":
    main()
