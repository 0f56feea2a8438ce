"""The record of stage `benchmark` and latency.csv."""

import pytest

from pipeline.inference.footprint import Footprint
from pipeline.inference.timing import Timing
from pipeline.records import BenchmarkRecord
from pipeline.report.latency import benchmark_record, gains, headline, headline_batch, setting_name, write_csv

FOOTPRINTS = {name: Footprint(number, 100 * number, ()) for number, name in enumerate(("teacher", "student"), start=1)}


def timed(file: str, batch: int, threads: int, *turns: float) -> Timing:
    p50 = turns[len(turns) // 2]
    return Timing(file, batch, threads, p50, 1.1 * p50, 1.2 * p50, 0.1, turns)


def timings():
    return [
        timed("teacher", 1, 0, *[4.0] * 8),
        timed("student", 1, 0, *[2.0] * 8),
        timed("teacher", 32, 2, *[90.0] * 8),
        timed("student", 32, 2, *[30.0] * 4, *[60.0] * 4),
    ]


def test_settings_are_named_by_batch_and_threads():
    assert setting_name(32, 2) == "batch32_threads2"
    assert setting_name(1, 0) == "batch1_threadsall"


def test_the_record_compares_medians_and_macs():
    record = benchmark_record(timings(), FOOTPRINTS, teacher_macs=80, student_macs=20, threads=4)
    assert record.threads == 4
    assert record.speedup == 4.0 / 2.0
    assert (record.speedup_low, record.speedup_high, record.conclusive) == (2.0, 2.0, 1)
    assert record.ideal_speedup == 80 / 20
    assert record.realised == (4.0 / 2.0) / (80 / 20)
    assert record.speedup_by_setting == {"batch1_threadsall": 4.0 / 2.0, "batch32_threads2": 90.0 / 60.0}
    assert record.teacher["batch32_threads2"].p90 == 1.1 * 90.0
    assert record.teacher["batch32_threads2"].p99 == 1.2 * 90.0
    assert record.student["batch1_threadsall"].p50 == 2.0
    assert (record.memory_teacher, record.memory_student) == (100, 200)
    assert (record.int8, record.speedup_int8) == (None, None)
    assert BenchmarkRecord.model_validate(record.model_dump()) == record


def test_the_speedup_is_that_of_the_smallest_batch():
    assert headline_batch(timings()) == 1
    fixed = [timed("teacher", 8, 0, *[9.0] * 8), timed("student", 8, 0, *[3.0] * 8)]
    record = benchmark_record(fixed, FOOTPRINTS, teacher_macs=80, student_macs=20)
    assert (record.speedup, record.realised) == (9.0 / 3.0, (9.0 / 3.0) / (80 / 20))
    assert list(record.student) == ["batch8_threadsall"]


def test_an_int8_file_adds_its_numbers_and_changes_no_others():
    extra = [*timings(), timed("int8", 1, 0, *[1.0] * 8), timed("int8", 32, 2, *[10.0] * 8)]
    record = benchmark_record(extra, FOOTPRINTS, 80, 20)
    assert record.speedup_int8 == 4.0
    assert record.int8["batch32_threads2"].p50 == 10.0
    without = benchmark_record(timings(), FOOTPRINTS, 80, 20)
    assert record.model_copy(update={"int8": None, "speedup_int8": None}) == without


def test_the_student_is_also_compared_with_its_own_network_before_compression():
    extra = [*timings(), timed("uncompressed", 1, 0, *[5.0] * 8), timed("uncompressed", 32, 2, *[120.0] * 8)]
    record = benchmark_record(extra, FOOTPRINTS, 80, 20)
    assert record.speedup_over_uncompressed == 5.0 / 2.0
    assert record.uncompressed["batch32_threads2"].p50 == 120.0
    assert set(gains(extra)) == {"student"}
    without = benchmark_record(timings(), FOOTPRINTS, 80, 20)
    assert (without.speedup_over_uncompressed, headline(timings(), "uncompressed")) == (None, None)
    assert record.model_copy(update={"uncompressed": None, "speedup_over_uncompressed": None}) == without


def test_noisy_timings_are_inconclusive():
    speedups = gains(timings())["student"]
    assert speedups["batch1_threadsall"].conclusive
    assert (speedups["batch32_threads2"].low, speedups["batch32_threads2"].high) == (1.5, 3.0)
    assert not speedups["batch32_threads2"].conclusive


def test_the_error_names_a_setting_that_was_timed_for_one_file_only():
    for missing in (2, 3):
        with pytest.raises(KeyError, match="batch32_threads2"):
            remaining = [timing for number, timing in enumerate(timings()) if number != missing]
            benchmark_record(remaining, FOOTPRINTS, 80, 20)


def test_the_csv_has_a_row_per_file_and_setting(tmp_path):
    write_csv(timings()[:3], tmp_path / "latency.csv")
    assert (tmp_path / "latency.csv").read_text() == (
        "file,batch,threads,p50_ms,p90_ms,p99_ms,spread,images_per_second\n"
        "teacher,1,all,4.0000,4.4000,4.8000,0.1000,250.0000\n"
        "student,1,all,2.0000,2.2000,2.4000,0.1000,500.0000\n"
        "teacher,32,2,90.0000,99.0000,108.0000,0.1000,355.5556\n"
    )
