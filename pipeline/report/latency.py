"""Summarise timings as the record of stage `benchmark` and as latency.csv."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.files import csv_text, write_text
from pipeline.inference.footprint import Footprint
from pipeline.inference.timing import Gain, Timing, gain
from pipeline.records import BenchmarkRecord, Latency

TEACHER, STUDENT, INT8 = "teacher", "student", "int8"
UNCOMPRESSED = "uncompressed"
"""The network that the student was before it shrank, timed if that is not the teacher."""


def setting_name(batch: int, threads: int) -> str:
    """Return the name of a setting: ``batch1_threadsall``, ``batch32_threads2``."""
    return f"batch{batch}_threads{threads or 'all'}"


COLUMNS = ("file", "batch", "threads", "p50_ms", "p90_ms", "p99_ms", "spread", "images_per_second")


def headline_batch(timings: Sequence[Timing]) -> int:
    """Return the batch size of metric `speedup`: the smallest, which is 1 unless the files fix another."""
    return min(timing.batch for timing in timings)


def gains(timings: Sequence[Timing], reference: str = TEACHER) -> dict[str, dict[str, Gain]]:
    """Compute the speed-up of student and int8 file over another file, by file and setting.

    Raises:
        KeyError: If a setting was timed for some files only.
    """
    by_file: dict[str, dict[str, Timing]] = {}
    for timing in timings:
        by_file.setdefault(timing.file, {})[setting_name(timing.batch, timing.threads)] = timing
    for file, by_setting in by_file.items():
        if unpaired := set(by_setting) ^ set(by_file[reference]):
            raise KeyError(f"timed for only one of {reference} and {file}: {', '.join(sorted(unpaired))}")
    return {
        file: {name: gain(by_file[reference][name], timing) for name, timing in by_file[file].items()}
        for file in (STUDENT, INT8)
        if file in by_file
    }


def headline(timings: Sequence[Timing], reference: str = TEACHER) -> Gain | None:
    """Return the speed-up of the student over another file, at the smallest batch with all threads.

    Returns:
        None if the other file was not timed.

    Raises:
        KeyError: If all threads were not timed.
    """
    if not any(timing.file == reference for timing in timings):
        return None
    return gains(timings, reference)[STUDENT][setting_name(headline_batch(timings), threads=0)]


def benchmark_record(
    timings: Sequence[Timing],
    footprints: Mapping[str, Footprint],
    teacher_macs: int | None,
    student_macs: int,
    threads: int | None = None,
) -> BenchmarkRecord:
    """Compare the latency of the student with that of the teacher, and the speed-up with the ratio of MACs.

    Args:
        timings: Of files `teacher` and `student`, optionally `int8` and `uncompressed`, at the same settings, also with
            all threads.
        footprints: Of the same files.
        teacher_macs: Multiply-accumulates per image; None if they are not known.
        student_macs: Multiply-accumulates per image.
        threads: The number that 0 stood for; None if it is not known.

    Raises:
        KeyError: If a setting was timed for some files only, or all threads were not timed.
    """
    latencies: dict[str, dict[str, Latency]] = {}
    for timing in timings:
        latency = Latency(p50=timing.p50_ms, p90=timing.p90_ms, p99=timing.p99_ms)
        latencies.setdefault(timing.file, {})[setting_name(timing.batch, timing.threads)] = latency
    speedups = gains(timings)
    setting = setting_name(headline_batch(timings), threads=0)
    first, ideal = speedups[STUDENT][setting], teacher_macs / student_macs if teacher_macs else None
    own = headline(timings, UNCOMPRESSED)
    return BenchmarkRecord(
        speedup=first.ratio,
        speedup_low=first.low,
        speedup_high=first.high,
        conclusive=int(first.conclusive),
        speedup_by_setting={name: speedup.ratio for name, speedup in speedups[STUDENT].items()},
        speedup_int8=speedups[INT8][setting].ratio if INT8 in speedups else None,
        speedup_over_uncompressed=None if own is None else own.ratio,
        ideal_speedup=ideal,
        realised=first.ratio / ideal if ideal else None,
        threads=threads,
        teacher=latencies[TEACHER],
        student=latencies[STUDENT],
        int8=latencies.get(INT8),
        uncompressed=latencies.get(UNCOMPRESSED),
        memory_teacher=footprints[TEACHER].memory,
        memory_student=footprints[STUDENT].memory,
    )


def write_csv(timings: Sequence[Timing], path: Path) -> None:
    """Write latency.csv, one row per file and setting; threads are `all` or a number."""
    rows = [
        (timing.file, timing.batch, timing.threads or "all", *(f"{number:.4f}" for number in (
            timing.p50_ms, timing.p90_ms, timing.p99_ms, timing.spread, timing.images_per_second
        )))
        for timing in timings
    ]  # fmt: skip
    write_text(path, csv_text(COLUMNS, rows))
