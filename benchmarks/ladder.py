"""Train students of one teacher that differ in a few params: `python -m benchmarks.ladder LADDER --seed N`.

The stages run in a clone of the last commit, `.ladder/LADDER-N`, with one thread; run the command again to resume after
an interruption. It writes a line for each student to evidence/ladder/LADDER-N.csv, and the average precision of each
test identity to LADDER-N-ap.csv; for method `paper` also curves and a chart of them.
"""

import argparse
import hashlib
import json
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

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.nodes import ScalarNode

from benchmarks.ladder_chart import plot_rows
from benchmarks.ladder_scores import measure, read
from benchmarks.short import ROOT, with_values
from pipeline import checkpoint
from pipeline.config import Params
from pipeline.data.splits import draw_test
from pipeline.files import Files, csv_text, write_atomically, write_text
from pipeline.report.curves import read_curves
from pipeline.report.style import save
from pipeline.runtime import limit_threads
from pipeline.stage.params_file import load
from pipeline.stage.params_problems import problems_of
from pipeline.stage.presets import load_preset
from pipeline.system.git_cli import head_commit
from pipeline.system.locks import locked

CODE = ("pipeline", "stages", "presets", "requirements.lock")
"""What decides the results; while a ladder is trained, it must stay as it is in the clone."""
COLUMNS = (
    "student", "teacher_map", "map", "difference", "standard_error", "distance_seen", "distance_unseen",
    "distance_unseen_to_mirrored_mean", "teacher_with_mirror_map", "macs_reduction", "params_reduction", "layer4_width",
    "core_minutes", "teacher", "params", "commit", "processor",
)  # fmt: skip
SHORT = {
    "student.epochs": 24,
    "student.budget.start": 0.03,
    "student.budget.end": 0.3,
    "student.budget.fade": 0.05,
}
"""Half as long as preset `evidence`, and as many epochs until the budget is met."""
CLOSE = {
    "student.distill.feature": 2.0,
    "student.distill.embedding": 40.0,
    "student.distill.average_views": False,
    "student.resetting.importance": "taylor",
}
"""Losses and importance with which preset `evidence` began."""
PRODUCTS = {
    "data.image_size": [48, 48],
    "teacher.width": 32,
    "teacher.stem": 64,
    "teacher.augment.pad": 4,
    "student.augment.pad": 4,
    "runtime.workers": 0,
}
"""Photographs of products, in sizes for a CPU."""


@dataclass(frozen=True)
class Ladder:
    """Students of one teacher.

    Attributes:
        preset: Params of all of them.
        students: Params that differ from it, by dotted name, for each student; the most important ones come first.
        settings: Params of teacher and students that differ from the preset.
        half_unlabelled: Whether half of the training identities have no labels (source `folder`).
    """

    preset: str
    students: Mapping[str, Mapping[str, Any]]
    settings: Mapping[str, Any] = field(default_factory=dict)
    half_unlabelled: bool = False


LADDERS = {
    "vehicles": Ladder(
        "evidence",
        {
            "ours-65": {},
            "ours-80": {"student.budget.reduction": 0.8},
            "ours-90": {"student.budget.reduction": 0.9},
            "none-12": {"student.method": "none", "student.epochs": 12},  # 48 epochs take an hour
            "mean-65": SHORT,
            "embedding-65": {**SHORT, "student.distill.average_views": False},
            "others-65": {**SHORT, **CLOSE},
            "labels-65": {**SHORT, **CLOSE, "student.batch.unlabelled": 0, "student.distill.views": 0},
            "taylor-90": {"student.budget.reduction": 0.9, "student.resetting.importance": "taylor"},
            "triplets-90": {
                "student.budget.reduction": 0.9,
                "student.distill.extra_losses": {"asymmetric_triplet": {"weight": 10.0, "margin": 0.1}},
            },
            "one-view-65": {"student.distill.average_views": False},
            "train-only-65": {"data.vehicles.unlabelled_identities": 0},
        },
    ),
    # Photographs, from a pre-trained half-width ResNet-50: --params data.root=... teacher.weights=...
    "products": Ladder("own-r50", {"ours-65": {}}, PRODUCTS),
    # The same without the labels of half of the training products. An epoch has half of the steps, so the student has
    # twice the epochs; the teacher has 1.5 times (with seed 1, validation gained nothing after 40 epochs).
    "products-half": Ladder(
        "own-r50",
        {"ours-65": {}},
        {**PRODUCTS, "teacher.epochs": 60, "student.epochs": 40},
        half_unlabelled=True,
    ),
    # The method as published, from a pre-trained half-width ResNet-50: --params data.root=... teacher.weights=...
    "paper": Ladder(
        "sop-r50",
        {
            "one-sided": {"student.sites": ["conv2"]},
            "two-sided": {"student.sites": ["conv1", "conv2"]},
        },
        {
            **PRODUCTS,
            "data.source": "folder",
            "data.image_size": [32, 32],
            "data.validation": 0.1,
            "teacher.epochs": 60,
            "teacher.batch.instances": 6,
            "student.batch.instances": 6,
            "teacher.augment.pad": 2,
            "student.augment.pad": 2,
            "student.method": "paper",
            "student.freeze_norms_at": 1.0,
            "student.freeze_head_norms_at": 1.0,
            # About 6,400 steps with 2,700 training images, in which lasso and SGD shorten a compactor row by up to 1.6
            # (in the 120 epochs of the paper by 0.9); its norm begins at 1.
            "student.epochs": 214,
        },
    ),
}


class LadderError(RuntimeError):
    """The students cannot be trained or compared."""


def main() -> None:
    """Train the students that are missing, and print a line for each."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ladder", description=__doc__)
    parser.add_argument("ladder", choices=LADDERS, help="which students")
    parser.add_argument("--seed", type=int, required=True, help="seed of data, teacher and students")
    parser.add_argument("--students", nargs="+", metavar="NAME", help="only these, in this order")
    parser.add_argument(
        "--params", nargs="+", default=[], type=setting, metavar="KEY=VALUE", help="of all, such as data.root=PATH"
    )
    options = parser.parse_args()
    name, ladder = f"{options.ladder}-{options.seed}", LADDERS[options.ladder]
    settings = {"runtime.threads": 1, **ladder.settings, **dict(options.params), "seed": options.seed}
    try:
        base, students = params_of(ladder, settings)
        if unknown := set(options.students or ()) - set(students):
            parser.error(f"unknown students {', '.join(sorted(unknown))}; there are {', '.join(students)}")
        limit_threads(base.runtime.threads)
        folder, table = ROOT / ".ladder" / name, ROOT / "evidence" / "ladder" / f"{name}.csv"
        with locked(folder.with_suffix(".lock"), f"ladder {name}"):
            missing = [one for one in options.students or students if not is_finished(table, one, students[one])]
            clone(folder)
            teach(folder, base)
            for student in missing:
                line = train(folder, table, student, students[student])
                print(f"{student}: {line['difference']} mAP, {line['core_minutes']} core-minutes", flush=True)
    except (LadderError, subprocess.CalledProcessError) as error:
        sys.exit(f"ladder: {error}")


def params_of(ladder: Ladder, settings: Mapping[str, Any]) -> tuple[Params, dict[str, Params]]:
    """Return the params of the teacher, and of each student by its name.

    Raises:
        LadderError: If `settings` are not valid.
    """
    try:
        base = with_values(load_preset(ROOT, ladder.preset), dict(settings))
        if ladder.half_unlabelled:
            base = with_values(base, {"data.unlabelled": half_of_training(base)})
        return base, {student: with_values(base, dict(changes)) for student, changes in ladder.students.items()}
    except ValidationError as error:
        nowhere = ScalarNode("", "")  # these params have no lines
        found = [problem for detail in error.errors() for problem in problems_of(detail, nowhere)]
        raise LadderError(f"invalid `--params`: {'; '.join(found)}") from None
    except KeyError as error:
        raise LadderError(f"invalid `--params`: {error.args[0]} is unknown") from None


def setting(text: str) -> tuple[str, Any]:
    """Parse `KEY=VALUE`; the value is YAML."""
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    return key, YAML(typ="safe").load(value)


def half_of_training(params: Params) -> list[str]:
    """Return the folders of every other training identity in `data.root`, in alphabetical order.

    Raises:
        LadderError: If `data.root` is not an absolute path of a folder.
    """
    root = Path(params.data.root)
    if not (root.is_absolute() and root.is_dir()):
        raise LadderError(f"data.root must be the absolute path of a folder, got {root}; add `--params data.root=PATH`")
    names = sorted(path.name for path in root.iterdir() if path.is_dir())
    tested = draw_test(names, params.data.custom.test, params.seed)
    return [name for name in names if name not in tested][::2]


def clone(folder: Path) -> None:
    """Clone this repository, unless an earlier call has done so.

    Raises:
        LadderError: If the code here is not that of the clone.
    """
    if not folder.is_dir():
        scratch = folder.with_suffix(".tmp")
        shutil.rmtree(scratch, ignore_errors=True)
        git(ROOT, "clone", "--quiet", str(ROOT), str(scratch))
        scratch.rename(folder)
    if changed := git(ROOT, "diff", "--name-only", head_commit(folder)[0], "--", *CODE):
        raise LadderError(f"code has changed since {folder} was cloned, such as {changed.split()[0]}; delete the clone")


def git(folder: Path, *arguments: str) -> str:
    """Run git in a folder, and return its output."""
    command: Sequence[str] = ("git", *arguments)
    return subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def teach(folder: Path, params: Params) -> None:
    """Train the teacher, unless an earlier call has done so with the same params.

    Raises:
        LadderError: If it was trained with other params.
    """
    files, known = Files(folder, folder), folder / "teacher-params.json"
    if known.is_file() and known.read_text(encoding="utf-8") != params.model_dump_json():
        raise LadderError(f"the teacher in {folder} has other params; delete the folder to train another")
    write_text(known, params.model_dump_json())
    if not files.metrics("teacher").is_file():
        prepare(files, params)
        run("teacher", files, params)


def prepare(files: Files, params: Params) -> None:
    """Prepare the data, unless they are there; the labelled images of a seed are the same for all students."""
    finished = files.metrics("prepare")
    if finished.is_file() and load(files.params).data == params.data:
        return
    finished.unlink(missing_ok=True)
    run("prepare", files, params)


def run(stage: str, files: Files, params: Params) -> float:
    """Run a stage, and return the seconds of computing that it took, on all cores together."""
    yaml = YAML()
    write_atomically(files.params, lambda path: yaml.dump(params.model_dump(mode="json"), path))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "PYTHONPATH": str(files.root), "SMALLER_STUDENT_TRACKING": "off"}
    subprocess.run([sys.executable, "-m", f"stages.{stage}"], cwd=files.root, env=environment, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def is_finished(table: Path, student: str, params: Params) -> bool:
    """Return whether a student has a line.

    Raises:
        LadderError: If it was trained with other params; lines of earlier versions do not have them.
    """
    line = next((line for line in read(table) if line["student"] == student), None)
    if line is not None and line.get("params") not in (None, "", digest(params)):
        raise LadderError(f"{table.name} has {student} with other params; delete its line to train it again")
    return line is not None


def digest(params: Params) -> str:
    """Return a digest of the params that decide about a student, without the places of files."""
    content = params.model_dump(mode="json", include={"seed", "data", "teacher", "student", "surgery"})
    del content["data"]["root"], content["teacher"]["weights"]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def train(folder: Path, table: Path, student: str, params: Params) -> dict[str, str]:
    """Train a student, cut it, compare it with the teacher, and append it to the table.

    Raises:
        LadderError: If the table has students of another teacher.
    """
    files = Files(folder, folder)
    source, lines = origin(files), read(table)
    if lines and lines[0]["teacher"] != source["teacher"]:
        raise LadderError(f"{table.name} has students of another teacher; finish a seed on one machine, or delete it")
    precisions = table.with_name(f"{table.stem}-ap.csv")
    if not lines:
        precisions.unlink(missing_ok=True)  # perhaps of another teacher
    prepare(files, params)
    resumed = any((files.checkpoints / "student").glob("*/*"))
    seconds = run("student", files, params)
    run("surgery", files, params)
    minutes = "" if resumed else f"{seconds / 60:.1f}"
    line = {"student": student, **measure(files, params, student, precisions), "core_minutes": minutes}
    line |= {"params": digest(params), **source}
    if params.student.method == "paper":  # whose compactor rows shrink over the whole training
        curve = files.plots("student").read_text(encoding="utf-8")
        write_text(table.with_name(f"{table.stem}-{student}.csv"), curve)
        draw(table, [*(line["student"] for line in lines), student])
    # Last, since a student with a line is finished.
    write_text(table, csv_text(COLUMNS, [[line.get(name, "") for name in COLUMNS] for line in [*lines, line]]))
    return line


def draw(table: Path, students: Sequence[str]) -> None:
    """Draw the curves of students of method `paper`, to LADDER-N.png."""
    curves = {student: read_curves(table.with_name(f"{table.stem}-{student}.csv")) for student in students}
    save(plot_rows(curves), table.with_suffix(".png"))


def origin(files: Files, name: str = checkpoint.WEIGHTS) -> dict[str, str]:
    """Return what a student is made of: a digest of the teacher's file, the commit, and the processor."""
    weights = (files.artifacts("teacher") / name).read_bytes()
    info = Path("/proc/cpuinfo")
    models = [line for line in info.read_text().splitlines() if "model name" in line] if info.is_file() else []
    return {
        "teacher": hashlib.sha256(weights).hexdigest()[:12],
        "commit": head_commit(files.root)[0][:7],
        "processor": models[0].split(":")[1].strip() if models else platform.processor(),
    }


if __name__ == "__main__":
    main()
