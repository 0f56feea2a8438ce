"""From timings to what the stage reports."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from pipeline.benchmark.latency import Timing
from pipeline.files import write_text
from pipeline.records import BenchmarkRecord, Latency

TEACHER, STUDENT = "teacher", "student"
COLUMNS = ("file", "batch", "threads", "p50_ms", "p90_ms", "images_per_second")


def setting(batch: int, threads: int) -> str:
    """Name of a setting: ``batch1_threadsall``, ``batch32_threads2``."""
    return f"batch{batch}_threads{threads or 'all'}"


HEADLINE = setting(batch=1, threads=0)
"""The setting that `speedup` is told for."""


def benchmark_record(timings: Sequence[Timing], teacher_macs: int, student_macs: int) -> BenchmarkRecord:
    """Compare the student's latency with the teacher's, and with what its MACs promise.

    Args:
        timings: Of files `teacher` and `student`, at the same settings, the headline's among them.
        teacher_macs: Multiply-accumulates of the teacher for one image.
        student_macs: The same of the student.

    Raises:
        KeyError: If a setting was timed for one of them only, or the headline's was not timed.
    """
    tables: dict[str, dict[str, Latency]] = {TEACHER: {}, STUDENT: {}}
    for timing in timings:
        name = setting(timing.batch, timing.threads)
        tables.setdefault(timing.file, {})[name] = Latency(p50=timing.p50_ms, p90=timing.p90_ms)
    teacher, student = tables[TEACHER], tables[STUDENT]
    if lonely := set(teacher) ^ set(student):
        raise KeyError(f"timed for only one of teacher and student: {', '.join(sorted(lonely))}")
    speedups = {name: latency.p50 / student[name].p50 for name, latency in teacher.items()}
    ideal = teacher_macs / student_macs
    return BenchmarkRecord(
        speedup=speedups[HEADLINE],
        speedup_by_setting=speedups,
        ideal_speedup=ideal,
        realised=speedups[HEADLINE] / ideal,
        teacher=teacher,
        student=student,
    )


def write_csv(timings: Sequence[Timing], path: Path) -> None:
    """Write latency.csv: one line a file and setting; threads `all` or a number."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for timing in timings:
        numbers = (timing.p50_ms, timing.p90_ms, timing.images_per_second)
        writer.writerow((timing.file, timing.batch, timing.threads or "all", *(f"{number:.4f}" for number in numbers)))
    write_text(path, text.getvalue())
