"""Build the report of a run, a page with pictures, from what the stages measured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline.files import write_text
from pipeline.inference.footprint import Footprint
from pipeline.inference.timing import Timing
from pipeline.protocols import PROTOCOLS
from pipeline.records import BenchmarkRecord, ExportRecord, PrepareRecord, StudentRecord, SurgeryRecord, TeacherRecord
from pipeline.report.curves import Curves, capacity, training
from pipeline.report.latency import HEADLINE, STUDENT, TEACHER, gains, setting
from pipeline.report.panels import PanelQuery, Ranking, choose, describe, panel, rank
from pipeline.report.pareto import Point, pareto
from pipeline.report.render import render
from pipeline.report.style import save
from pipeline.report.widths import widths
from pipeline.retrieval.evaluate import Images, Manifest, evaluate_embedder, sides
from pipeline.retrieval.metrics import Retrieval
from pipeline.retrieval.scoring import positives

PAGE = "index.html"


@dataclass(frozen=True)
class RunResults:
    """What the stages of a run measured: their records, and what the pictures are drawn from.

    Attributes:
        data: Name and image size of the data set, for the reader.
        protocol: Name of the evaluation protocol of every mAP.
        machine: Software and hardware that latencies were measured on, for the reader.
        timings: Latencies that `benchmark` sums up.
        footprints: Size and memory of the timed files.
        curves: Training curves of teacher and student.
        widths: Channels by dimension name, of teacher and of the student after surgery.
        sites: Dimensions that could be cut, from input to output; empty if none could.
        embeddings: (query + gallery, D) by ONNX Runtime, of teacher and student.
        manifest: Labels of all images.
        images: Pixels of all images.
        panels: Number of queries to show.
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


@dataclass(frozen=True)
class PanelPicture:
    """A panel on the page: its PNG, its content in words for readers who cannot see it, and the text below it."""

    file: str
    alt: str
    caption: str


def write_report(folder: Path, run: RunResults) -> None:
    """Write index.html and the PNG files beside it; remove the PNG files of an earlier report.

    Args:
        folder: Where they go.
        run: What was measured.
    """
    for old in folder.glob("*.png"):
        old.unlink()
    teacher, student, export = run.teacher, run.student, run.export
    points = [
        Point("teacher", teacher.map, teacher.macs),
        Point("student", student.map, student.macs),
        Point("model.onnx", export.map, export.macs),
    ]
    save(pareto(points), folder / "pareto.png")
    save(capacity(run.curves[STUDENT]), folder / "capacity.png")
    save(training(run.curves[TEACHER], run.curves[STUDENT]), folder / "training.png")
    if run.sites:
        save(widths(run.widths[TEACHER], run.widths[STUDENT], run.sites), folder / "widths.png")
    retrievals = {name: _retrieval(run, name) for name in (TEACHER, STUDENT)}
    speedups = gains(run.timings)
    html = render(
        "report.html.jinja",
        run=run,
        points=points,
        panels=_panels(folder, run, retrievals),
        rank1={name: retrieval.rank(1) for name, retrieval in retrievals.items()},
        protocol=PROTOCOLS[run.protocol],
        gains=speedups,
        headline=speedups[STUDENT][HEADLINE],
        setting=setting,
    )
    write_text(folder / PAGE, html)


def _retrieval(run: RunResults, name: str) -> Retrieval:
    found = run.embeddings[name]
    return evaluate_embedder(lambda _: found, run.manifest, "query", "gallery", run.protocol)


def _panels(folder: Path, run: RunResults, retrievals: Mapping[str, Retrieval]) -> list[PanelPicture]:
    """Draw the ranked panels."""
    ap = {name: retrieval.ap_of(run.prepare.query) for name, retrieval in retrievals.items()}
    pictures = []
    for number, choice in enumerate(choose(ap[TEACHER], ap[STUDENT], run.panels), start=1):
        row = run.manifest.indices("query")[[choice.query]]
        rankings = [_ranking(run, name, choice, ap[name]) for name in (TEACHER, STUDENT)]
        file = f"panel-{number:02d}.png"
        save(panel(run.images.batch(row)[0], rankings), folder / file)
        label = str(run.manifest.identities(row)[0])
        if PROTOCOLS[run.protocol].cameras:
            label += f", camera {run.manifest.cameras(row)[0]}"
        alt = f"Identity {label}. " + "; ".join(map(describe, rankings))
        caption = f"Query {choice.query + 1}: identity {label}. Picked: {choice.reason}."
        pictures.append(PanelPicture(file, alt, caption))
    return pictures


def _ranking(run: RunResults, name: str, choice: PanelQuery, ap: npt.NDArray[np.float64]) -> Ranking:
    rows = run.manifest.indices("gallery")
    query, gallery = sides(run.embeddings[name], run.manifest, "query", "gallery", run.protocol)
    if gallery is None:  # all images are queries of each other, also where the scores come from random galleries
        rows, gallery = run.manifest.indices("query"), query
    right, left_out = positives(PROTOCOLS[run.protocol], query, choice.query, gallery)
    top = rank(query.vectors[choice.query], gallery.vectors, right, left_out)
    return Ranking(name, run.images.batch(rows[top]), float(ap[choice.query]), right[top])
