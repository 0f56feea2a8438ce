"""Write the HTML report of a run, with its charts and image panels, from the results of all stages."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline.files import write_text
from pipeline.inference.footprint import Footprint
from pipeline.inference.timing import Timing
from pipeline.protocols import PROTOCOLS, conditions, seen_note
from pipeline.records import BenchmarkRecord, ExportRecord, PrepareRecord, StudentRecord, SurgeryRecord, TeacherRecord
from pipeline.report.curves import Curves, plot_capacity, plot_training
from pipeline.report.latency import STUDENT, TEACHER, UNCOMPRESSED, gains, headline, headline_batch, setting_name
from pipeline.report.panels import PanelQuery, Ranking, choose_queries, describe, plot_panel, rank
from pipeline.report.pareto import Point, plot_pareto
from pipeline.report.render import render
from pipeline.report.style import save
from pipeline.report.widths import plot_widths
from pipeline.retrieval.evaluate import Images, Manifest, evaluate_embedder, sides
from pipeline.retrieval.metrics import Retrieval
from pipeline.retrieval.scoring import positives

PAGE = "index.html"


@dataclass(frozen=True)
class RunResults:
    """Results of all stages of a run, and the data for the charts.

    Attributes:
        data: Name and image size of the data set, as shown to the reader.
        protocol: Name of the evaluation protocol of every mAP.
        machine: Software and hardware of the latency measurement, as shown to the reader.
        footprints: Size and memory of each timed file, by name.
        curves: Training curves of teacher and student.
        widths: Channels by dimension name, of the student before it shrank and after surgery.
        sites: Dimensions that could be pruned, from input to output; empty if none could.
        embeddings: (query + gallery, D) by ONNX Runtime, of teacher and student.
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
class PanelFigure:
    """An image panel on the page: its PNG file, its text alternative, and its caption."""

    file: str
    alt: str
    caption: str


def write_report(folder: Path, run: RunResults) -> None:
    """Write index.html and its PNG files to a folder; remove the PNG files of an earlier report."""
    for old in folder.glob("*.png"):
        old.unlink()
    teacher, student, export = run.teacher, run.student, run.export
    points = [
        *([Point("teacher", teacher.map, teacher.macs)] if teacher.macs else []),
        Point("student", student.map, student.macs),
        Point("model.onnx", export.map, export.macs),
    ]
    save(plot_pareto(points), folder / "pareto.png")
    save(plot_capacity(run.curves[STUDENT]), folder / "capacity.png")
    save(plot_training(run.curves[TEACHER], run.curves[STUDENT]), folder / "training.png")
    if run.sites:
        save(plot_widths(run.widths[UNCOMPRESSED], run.widths[STUDENT], run.sites), folder / "widths.png")
    retrievals = {name: _evaluate(run, name) for name in (TEACHER, STUDENT)}
    batch = headline_batch(run.timings)
    html = render(
        "report.html.jinja",
        run=run,
        points=points,
        panels=_write_panels(folder, run, retrievals),
        rank1={name: retrieval.rank(1) for name, retrieval in retrievals.items()},
        protocol=PROTOCOLS[run.protocol],
        conditions=conditions(run.protocol, run.prepare.seen_identities, run.prepare.test_identities),
        seen=seen_note(run.prepare.seen_identities, run.prepare.test_identities),
        gains=gains(run.timings),
        headline=headline(run.timings),
        headline_own=headline(run.timings, UNCOMPRESSED),
        call="one image" if batch == 1 else f"{batch} images",
        setting=setting_name,
    )
    write_text(folder / PAGE, html)


def _evaluate(run: RunResults, name: str) -> Retrieval:
    return evaluate_embedder(lambda _: run.embeddings[name], run.manifest, "query", "gallery", run.protocol)


def _write_panels(folder: Path, run: RunResults, retrievals: Mapping[str, Retrieval]) -> list[PanelFigure]:
    ap = {name: retrieval.ap_of(run.prepare.query) for name, retrieval in retrievals.items()}
    figures = []
    for number, choice in enumerate(choose_queries(ap[TEACHER], ap[STUDENT], run.panels), start=1):
        index = run.manifest.indices("query")[[choice.query]]
        rankings = [_ranking(run, name, choice, ap[name]) for name in (TEACHER, STUDENT)]
        file = f"panel-{number:02d}.png"
        save(plot_panel(run.images.batch(index)[0], rankings), folder / file)
        label = str(run.manifest.identities(index)[0])
        if PROTOCOLS[run.protocol].cameras:
            label += f", camera {run.manifest.cameras(index)[0]}"
        alt = f"Identity {label}. " + "; ".join(map(describe, rankings))
        caption = f"Query {choice.query + 1}: identity {label}. Selection rule: {choice.reason}."
        figures.append(PanelFigure(file, alt, caption))
    return figures


def _ranking(run: RunResults, name: str, choice: PanelQuery, ap: npt.NDArray[np.float64]) -> Ranking:
    indices = run.manifest.indices("gallery")
    query, gallery = sides(run.embeddings[name], run.manifest, "query", "gallery", run.protocol)
    if gallery is None:  # every image is compared with all others; also shown so where scores use random galleries
        indices, gallery = run.manifest.indices("query"), query
    matches, excluded = positives(PROTOCOLS[run.protocol], query, choice.query, gallery)
    top = rank(query.vectors[choice.query], gallery.vectors, matches, excluded)
    return Ranking(name, run.images.batch(indices[top]), float(ap[choice.query]), matches[top])
