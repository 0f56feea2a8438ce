"""From timings to what the stage reports."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.files import csv_text, write_text
from pipeline.inference.footprint import Footprint
from pipeline.inference.timing import Gain, Timing, gain
from pipeline.records import BenchmarkRecord, Latency

TEACHER, STUDENT, INT8 = "teacher", "student", "int8"


def setting(batch: int, threads: int) -> str:
    """Name of a setting: ``batch1_threadsall``, ``batch32_threads2``."""
    return f"batch{batch}_threads{threads or 'all'}"


COLUMNS = ("file", "batch", "threads", "p50_ms", "p90_ms", "p99_ms", "spread", "images_per_second")

HEADLINE = setting(batch=1, threads=0)
"""The setting that `speedup` is told for."""


def gains(timings: Sequence[Timing]) -> dict[str, dict[str, Gain]]:
    """Compare all files with the teacher at each setting: speed-up by file and setting.

    Raises:
        KeyError: If a setting was timed for some files only.
    """
    found: dict[str, dict[str, Timing]] = {}
    for timing in timings:
        found.setdefault(timing.file, {})[setting(timing.batch, timing.threads)] = timing
    for file, by_setting in found.items():
        if lonely := set(by_setting) ^ set(found[TEACHER]):
            raise KeyError(f"timed for only one of {TEACHER} and {file}: {', '.join(sorted(lonely))}")
    return {
        file: {name: gain(found[TEACHER][name], timing) for name, timing in by_setting.items()}
        for file, by_setting in found.items()
        if file != TEACHER
    }


def benchmark_record(
    timings: Sequence[Timing], footprints: Mapping[str, Footprint], teacher_macs: int, student_macs: int
) -> BenchmarkRecord:
    """Compare the student's latency with the teacher's, and with what its MACs promise.

    Args:
        timings: Of files `teacher` and `student`, perhaps `int8`, at the same settings, the headline's among them.
        footprints: Of the same files.
        teacher_macs: Multiply-accumulates of the teacher for one image.
        student_macs: The same of the student.

    Raises:
        KeyError: If a setting was timed for some of them only, or the headline's was not timed.
    """
    latencies: dict[str, dict[str, Latency]] = {}
    for timing in timings:
        latency = Latency(p50=timing.p50_ms, p90=timing.p90_ms, p99=timing.p99_ms)
        latencies.setdefault(timing.file, {})[setting(timing.batch, timing.threads)] = latency
    compared = gains(timings)
    headline, ideal = compared[STUDENT][HEADLINE], teacher_macs / student_macs
    return BenchmarkRecord(
        speedup=headline.ratio,
        speedup_low=headline.low,
        speedup_high=headline.high,
        conclusive=int(headline.conclusive),
        speedup_by_setting={name: found.ratio for name, found in compared[STUDENT].items()},
        speedup_int8=compared[INT8][HEADLINE].ratio if INT8 in compared else None,
        ideal_speedup=ideal,
        realised=headline.ratio / ideal,
        teacher=latencies[TEACHER],
        student=latencies[STUDENT],
        int8=latencies.get(INT8),
        memory_teacher=footprints[TEACHER].memory,
        memory_student=footprints[STUDENT].memory,
    )


def write_csv(timings: Sequence[Timing], path: Path) -> None:
    """Write latency.csv: one line a file and setting; threads `all` or a number."""
    lines = [
        (timing.file, timing.batch, timing.threads or "all", *(f"{number:.4f}" for number in (
            timing.p50_ms, timing.p90_ms, timing.p99_ms, timing.spread, timing.images_per_second
        )))
        for timing in timings
    ]  # fmt: skip
    write_text(path, csv_text(COLUMNS, lines))
