"""Stage `benchmark`: time the ONNX files of teacher and student, and of the student before it shrank; write the report.

Reads   artifacts/prepare/, artifacts/student/full.json, artifacts/surgery/spec.json, artifacts/surgery/plan.json,
        artifacts/export/, metrics/*.json, plots/teacher.csv, plots/student.csv
Writes  artifacts/benchmark/latency.csv, artifacts/benchmark/report/, metrics/benchmark.json
"""

import platform
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import numpy as np

from pipeline import checkpoint
from pipeline.data.augment import MEAN, STD
from pipeline.data.images import open_images
from pipeline.data.requirements import check_requirements
from pipeline.export.embed import embed
from pipeline.export.metadata import serialise
from pipeline.export.release import read_release
from pipeline.export.to_onnx import to_onnx
from pipeline.files import read_json
from pipeline.inference.footprint import footprints
from pipeline.inference.session import open_session
from pipeline.inference.timing import measure
from pipeline.models.resnet import RetrievalNet
from pipeline.models.spec import ArchSpec
from pipeline.records import (
    BenchmarkRecord,
    ExportRecord,
    PrepareRecord,
    Record,
    StudentRecord,
    SurgeryRecord,
    TeacherRecord,
)
from pipeline.report.build import RunResults, write_report
from pipeline.report.curves import read_curves
from pipeline.report.latency import INT8, STUDENT, TEACHER, UNCOMPRESSED, benchmark_record, write_csv
from pipeline.runtime import available_threads
from pipeline.stage.run import Run, run_stage

R = TypeVar("R", bound=Record)

FILES = {TEACHER: "teacher.onnx", STUDENT: "model.onnx", INT8: "model.int8.onnx"}


def benchmark(run: Run) -> BenchmarkRecord:
    """Time the files, embed the test set with student and teacher, and write latency.csv and the report."""
    params, files = run.params, run.files
    height, width = params.data.image_size
    settings = params.benchmark
    manifest, images = open_images(files, params)
    check_requirements(manifest.items, params)

    def read(stage: str, record: type[R]) -> R:
        return record.model_validate(read_json(files.metrics(stage)))

    teacher, export = read("teacher", TeacherRecord), read("export", ExportRecord)
    read_release(files.artifacts("export"))  # only files with the hashes that stage `export` wrote are timed
    onnx = {name: files.artifacts("export") / file for name, file in FILES.items()}
    if not export.int8_published:
        del onnx[INT8]
    full = checkpoint.load_spec(files.artifacts("student"), checkpoint.FULL)
    with tempfile.TemporaryDirectory() as folder:
        if params.student.architecture.depth:
            onnx[UNCOMPRESSED] = Path(folder) / "uncompressed.onnx"
            onnx[UNCOMPRESSED].write_bytes(
                untrained(full, (height, width), params.export.opset, params.export.fixed_batch)
            )
        timings = measure(onnx, (height, width), settings.batches, settings.threads, settings.repeats)
        sizes = footprints(onnx, (height, width), max(settings.batches))
    record = benchmark_record(timings, sizes, teacher.macs, export.macs, available_threads())
    write_csv(timings, run.out / "latency.csv")

    test = np.concatenate([manifest.indices("query"), manifest.indices("gallery")])
    specs = {UNCOMPRESSED: full, STUDENT: checkpoint.load_spec(files.artifacts("surgery"))}
    kept = read_json(files.artifacts("surgery") / "plan.json")["kept"]
    results = RunResults(
        protocol=params.data.protocol,
        data=f"{params.data.source}, {height} x {width} pixels",
        machine=f"ONNX Runtime {version('onnxruntime')}, {platform.machine()}, {available_threads()} threads",
        seed=params.seed,
        prepare=read("prepare", PrepareRecord),
        teacher=teacher,
        student=read("student", StudentRecord),
        surgery=read("surgery", SurgeryRecord),
        export=export,
        benchmark=record,
        timings=timings,
        footprints=sizes,
        curves={name: read_curves(files.plots(name)) for name in (TEACHER, STUDENT)},
        widths={name: spec.widths for name, spec in specs.items()},
        sites=[site for site in full.widths if site in kept],
        embeddings={name: embed(open_session(onnx[name]), images, test, MEAN, STD) for name in (TEACHER, STUDENT)},
        manifest=manifest,
        images=images,
        panels=settings.panels,
    )
    write_report(files.report, results)
    return record


def untrained(spec: ArchSpec, image_size: tuple[int, int], opset: int, batch: int | None) -> bytes:
    """Return an ONNX file of a network with random weights, whose latency is that of any weights."""
    return serialise(to_onnx(RetrievalNet(spec.bare()), image_size, opset, batch))


if __name__ == "__main__":
    run_stage(benchmark)
