"""From timings to the record and latency.csv."""

import pytest

from pipeline.benchmark.latency import Timing
from pipeline.benchmark.table import HEADLINE, benchmark_record, setting, write_csv
from pipeline.records import BenchmarkRecord


def timings():
    return [
        Timing("teacher", 1, 0, 4.0, 4.4, 0.1),
        Timing("student", 1, 0, 2.0, 2.6, 0.3),
        Timing("teacher", 32, 2, 90.0, 99.0, 0.1),
        Timing("student", 32, 2, 30.0, 31.0, 0.1),
    ]


def test_settings_are_named_by_batch_and_threads():
    assert setting(32, 2) == "batch32_threads2"
    assert setting(1, 0) == HEADLINE == "batch1_threadsall"


def test_the_record_compares_the_medians_with_the_macs():
    record = benchmark_record(timings(), teacher_macs=80, student_macs=20)
    assert record.speedup == 4.0 / 2.0
    assert record.ideal_speedup == 80 / 20
    assert record.realised == (4.0 / 2.0) / (80 / 20)
    assert record.speedup_by_setting == {"batch1_threadsall": 4.0 / 2.0, "batch32_threads2": 90.0 / 30.0}
    assert record.teacher["batch32_threads2"].p90 == 99.0
    assert record.student["batch1_threadsall"].p50 == 2.0
    assert BenchmarkRecord.model_validate(record.model_dump()) == record


def test_files_beside_teacher_and_student_change_nothing():
    extra = [*timings(), Timing("int8", 1, 0, 1.0, 1.0, 0.0)]
    assert benchmark_record(extra, 80, 20) == benchmark_record(timings(), 80, 20)


def test_a_setting_timed_for_one_of_them_is_named():
    for missing in (2, 3):
        with pytest.raises(KeyError, match="batch32_threads2"):
            benchmark_record([timing for n, timing in enumerate(timings()) if n != missing], 80, 20)


def test_the_csv_has_a_line_a_file_and_setting(tmp_path):
    write_csv(timings()[:3], tmp_path / "latency.csv")
    assert (tmp_path / "latency.csv").read_text() == (
        "file,batch,threads,p50_ms,p90_ms,images_per_second\n"
        "teacher,1,all,4.0000,4.4000,250.0000\n"
        "student,1,all,2.0000,2.6000,500.0000\n"
        "teacher,32,2,90.0000,99.0000,355.5556\n"
    )
