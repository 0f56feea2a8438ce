"""The report of a run: pictures and page from what the stages measured, and nothing else."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline.benchmark.footprint import Footprint
from pipeline.benchmark.table import STUDENT, TEACHER
from pipeline.files import write_text
from pipeline.inference.timing import Timing
from pipeline.records import BenchmarkRecord, ExportRecord, PrepareRecord, StudentRecord, SurgeryRecord, TeacherRecord
from pipeline.report import speed
from pipeline.report.curves import Curves, capacity, training
from pipeline.report.html import Picture, Section, Table, Tile, page
from pipeline.report.numbers import MINUS, TO, count, percent, times
from pipeline.report.panels import Choice, Ranking, choose, describe, panel, rank
from pipeline.report.pareto import Point, pareto
from pipeline.report.style import save
from pipeline.report.widths import widths
from pipeline.retrieval.evaluate import Images, Manifest, evaluate_embedder
from pipeline.retrieval.metrics import Retrieval
from pipeline.retrieval.protocols import PROTOCOLS, Side

PAGE = "index.html"


@dataclass(frozen=True)
class Evidence:
    """What the stages measured.

    Attributes:
        data: What was trained on, in a few words.
        protocol: That every mAP was computed by.
        machine: What latencies were measured with, in a few words.
        seed: Seed of the run.
        prepare: Record of the stage, as the five after it.
        teacher: See `prepare`.
        student: See `prepare`.
        surgery: See `prepare`.
        export: See `prepare`.
        benchmark: See `prepare`.
        timings: Latencies that `benchmark` sums up.
        footprints: Size and memory of the timed files.
        curves: Training curves of teacher and student.
        widths: Channels by dimension name, of teacher and of the student after surgery.
        sites: Dimensions that could be cut, from input to output.
        embeddings: (query + gallery, D) by ONNX Runtime, of teacher and student; rows as in `rows`.
        manifest: Labels of all images.
        images: Pixels of all images.
        panels: Queries to show.
    """

    data: str
    protocol: str
    machine: str
    seed: int
    prepare: PrepareRecord
    teacher: TeacherRecord
    student: StudentRecord
    surgery: SurgeryRecord
    export: ExportRecord
    benchmark: BenchmarkRecord
    timings: Sequence[Timing]
    footprints: Mapping[str, Footprint]
    curves: Mapping[str, Curves]
    widths: Mapping[str, Mapping[str, int]]
    sites: Sequence[str]
    embeddings: Mapping[str, npt.NDArray[np.float32]]
    manifest: Manifest
    images: Images
    panels: int


def write_report(folder: Path, evidence: Evidence) -> None:
    """Write index.html and the PNG files beside it; those of an earlier report go.

    Args:
        folder: Where they go.
        evidence: What was measured.
    """
    for old in folder.glob("*.png"):
        old.unlink()
    retrievals = {name: _retrieval(evidence, name) for name in (TEACHER, STUDENT)}
    sections = [
        Section("Stage by stage", STAGES_TEXT, tables=[_stages(evidence, retrievals)]),
        Section("Speed", SPEED_TEXT, tables=_speed(evidence)),
        Section("Quality against cost", PARETO_TEXT, pictures=[_pareto(folder, evidence)]),
        Section("What they find", PANELS_TEXT, pictures=_panels(folder, evidence, retrievals)),
        Section("Capacity over epochs", CAPACITY_TEXT, pictures=[_capacity(folder, evidence)]),
        *([Section("Widths per layer", WIDTHS_TEXT, pictures=[_widths(folder, evidence)])] if evidence.sites else []),
        Section("Training", TRAINING_TEXT, pictures=[_training(folder, evidence)]),
    ]
    html = page("A smaller student", _summary(evidence), _tiles(evidence), sections, _notes(evidence))
    write_text(folder / PAGE, html)


STAGES_TEXT = "Surgery and export must change nothing: the three rows of the student should agree."
SPEED_TEXT = (
    "In ONNX Runtime on the CPU. If time followed arithmetic, the student would gain the ratio of MACs. Files take "
    "turns; a ratio is told only if that of most turns is nearly the same, else measure again on a quiet machine."
)
PANELS_TEXT = (
    "Each query with the images of the gallery that either network puts first, best on the left. Green frame and tick: "
    "the same identity. Red frame and cross: another one. What the protocol leaves out of a query's gallery is left "
    "out here too. The queries were picked by rule, not by hand."
)
PARETO_TEXT = "A good student lies left of its teacher, and not below it."
CAPACITY_TEXT = "The student starts as heavy as its teacher and gives capacity up while it learns."
WIDTHS_TEXT = "Where the capacity went, from input to output."
TRAINING_TEXT = "Validation is on training identities that were held out, never on the test set."


def _retrieval(evidence: Evidence, name: str) -> Retrieval:
    found = evidence.embeddings[name]
    return evaluate_embedder(lambda _: found, evidence.manifest, "query", "gallery", evidence.protocol)


def _summary(evidence: Evidence) -> str:
    teacher, export, found = evidence.teacher, evidence.export, speed.headline(evidence.timings)
    range_ = f"between {times(found.low)} and {times(found.high)} as fast (the machine was too busy to tell)"
    fast = f"{times(found.ratio)} as fast" if found.conclusive else range_
    return (
        f"The student reaches mAP {export.map:.3f} where its teacher has {teacher.map:.3f}, with "
        f"{percent(export.macs_reduction)} fewer multiply-accumulates and {percent(export.params_reduction)} fewer "
        f"parameters. On one image it is {fast}; its MACs alone would allow {times(evidence.benchmark.ideal_speedup)}."
    )


def _tiles(evidence: Evidence) -> list[Tile]:
    teacher, export, found = evidence.teacher, evidence.export, speed.headline(evidence.timings)
    return [
        Tile(
            "mAP on the test set",
            f"{teacher.map:.3f} {TO} {export.map:.3f}",
            f"{export.map - teacher.map:+.3f} against the teacher",
        ),
        Tile("MACs", f"{MINUS}{percent(export.macs_reduction)}", f"{count(teacher.macs)} {TO} {count(export.macs)}"),
        Tile(
            "Parameters",
            f"{MINUS}{percent(export.params_reduction)}",
            f"{count(teacher.params)} {TO} {count(export.params)}",
        ),
        Tile(
            "Speed-up, one image",
            speed.told(found),
            f"{speed.interval(found)}, ratio of MACs {times(evidence.benchmark.ideal_speedup)}",
        ),
    ]


def _stages(evidence: Evidence, retrievals: Mapping[str, Retrieval]) -> Table:
    teacher, student, surgery, export = evidence.teacher, evidence.student, evidence.surgery, evidence.export
    rank1 = {name: retrieval.rank(1) for name, retrieval in retrievals.items()}
    rows = [
        ("Teacher", teacher.map, teacher.rank1, teacher.params, teacher.macs),
        ("Student, trained", student.map, student.rank1, student.params, student.macs),
        ("Student, after surgery", surgery.map, surgery.rank1, surgery.params, surgery.macs),
        ("model.onnx (student)", export.map, rank1[STUDENT], export.params, export.macs),
        ("teacher.onnx", export.map_teacher, rank1[TEACHER], teacher.params, teacher.macs),
    ]
    return Table(
        f"{_asked(evidence)}, protocol {evidence.protocol}",
        ("", "mAP", "rank-1", "params", "MACs", "params cut", "MACs cut"),
        [
            (
                name,
                f"{quality:.4f}",
                f"{first:.4f}",
                count(params),
                count(macs),
                percent(1 - params / teacher.params),
                percent(1 - macs / teacher.macs),
            )
            for name, quality, first, params, macs in rows
        ],
    )


def _speed(evidence: Evidence) -> list[Table]:
    return [
        speed.speedups(evidence.timings, evidence.benchmark.ideal_speedup),
        speed.latencies(evidence.timings),
        speed.sizes(evidence.footprints, max(timing.batch for timing in evidence.timings)),
    ]


def _pareto(folder: Path, evidence: Evidence) -> Picture:
    teacher, student, export = evidence.teacher, evidence.student, evidence.export
    points = [
        Point("teacher", teacher.map, teacher.macs, teacher.params),
        Point("student", student.map, student.macs, student.params),
        Point("model.onnx", export.map, export.macs, export.params),
    ]
    save(pareto(points), folder / "pareto.png")
    alt = "; ".join(f"{point.name}: mAP {point.map:.3f} at {count(point.macs)} MACs" for point in points)
    return Picture("pareto.png", alt, "mAP on the test set against multiply-accumulates for one image.")


def _capacity(folder: Path, evidence: Evidence) -> Picture:
    save(capacity(evidence.curves[STUDENT]), folder / "capacity.png")
    macs, params = (percent(1 - cut) for cut in (evidence.student.macs_reduction, evidence.student.params_reduction))
    alt = (
        f"Share of MACs and parameters left by epoch, down to {macs} and {params}; below, the student's validation mAP"
    )
    return Picture("capacity.png", alt, f"The student was asked to give up {percent(evidence.student.target)}.")


def _widths(folder: Path, evidence: Evidence) -> Picture:
    teacher, student = evidence.widths[TEACHER], evidence.widths[STUDENT]
    save(widths(teacher, student, evidence.sites), folder / "widths.png")
    alt = "Channels kept: " + ", ".join(f"{name} {student[name]} of {teacher[name]}" for name in evidence.sites)
    return Picture("widths.png", alt, "Channels of each compressed layer; the axis doubles from mark to mark.")


def _training(folder: Path, evidence: Evidence) -> Picture:
    save(training(evidence.curves[TEACHER], evidence.curves[STUDENT]), folder / "training.png")
    alt = "Validation mAP and each training loss of teacher and student by epoch"
    return Picture("training.png", alt, "Validation mAP and training losses; a loss of one network has one line.")


def _panels(folder: Path, evidence: Evidence, retrievals: Mapping[str, Retrieval]) -> list[Picture]:
    ap = {name: retrieval.ap_of(evidence.prepare.query) for name, retrieval in retrievals.items()}
    pictures = []
    for number, choice in enumerate(choose(ap[TEACHER], ap[STUDENT], evidence.panels), start=1):
        row = evidence.manifest.rows("query")[[choice.query]]
        rankings = [_ranking(evidence, name, choice, ap[name]) for name in (TEACHER, STUDENT)]
        name = f"panel-{number:02d}.png"
        save(panel(evidence.images.batch(row)[0], rankings), folder / name)
        identity, camera = evidence.manifest.identities(row)[0], evidence.manifest.cameras(row)[0]
        seen = f", camera {camera}" if PROTOCOLS[evidence.protocol].cameras else ""
        alt = f"Identity {identity}{seen}. " + "; ".join(describe(ranking) for ranking in rankings)
        caption = f"Query {choice.query + 1}: identity {identity}{seen}. Picked: {choice.reason}."
        pictures.append(Picture(name, alt, caption, wide=True))
    return pictures


def _ranking(evidence: Evidence, name: str, choice: Choice, ap: npt.NDArray[np.float64]) -> Ranking:
    manifest, embeddings = evidence.manifest, evidence.embeddings[name]
    query, gallery = manifest.rows("query"), manifest.rows("gallery")
    asking = Side(embeddings[: len(query)], manifest.identities(query), manifest.cameras(query))
    asked = Side(embeddings[len(query) :], manifest.identities(gallery), manifest.cameras(gallery))
    if not len(gallery):  # all images ask each other, also where the scores come from random galleries
        gallery, asked = query, asking
    right, left_out = PROTOCOLS[evidence.protocol].positives(asking, choice.query, asked)
    top = rank(asking.vectors[choice.query], asked.vectors, right, left_out)
    return Ranking(name, evidence.images.batch(gallery[top]), float(ap[choice.query]), right[top])


def _asked(evidence: Evidence) -> str:
    """Who asks whom."""
    prepare = evidence.prepare
    if not prepare.gallery:
        return f"{prepare.query:,} images asked of each other"
    return f"{prepare.query:,} queries, {prepare.gallery:,} gallery images"


def _notes(evidence: Evidence) -> list[str]:
    prepare = evidence.prepare
    return [
        f"Data: {evidence.data}; {prepare.images:,} images of {prepare.identities:,} identities in {prepare.cameras} "
        f"cameras; no test identity was trained on.",
        f"mAP and rank-1: protocol {evidence.protocol} ({PROTOCOLS[evidence.protocol].summary}).",
        "MACs: multiply-accumulates for one image; like parameters, of backbone and embedding head.",
        f"Latency: {evidence.machine}. Half of the calls took at most p50, nine in ten at most p90; the speed-up is a "
        "ratio of p50. The files take turns, so that all meet the same state of the machine.",
        f"One run with seed {evidence.seed}; another seed gives somewhat other numbers.",
    ]
