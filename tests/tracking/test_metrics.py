import json
from pathlib import Path

import pytest

from pipeline.files import Files, write_json, write_text
from pipeline.records import RECORDS
from pipeline.tracking import metrics


def test_the_same_quantity_has_the_same_key_in_every_stage(reported: Files) -> None:
    shared = {"eval/mAP", "model/params", "model/macs", "model/params_reduction", "model/flops_reduction"}
    for stage in ("teacher", "student", "surgery", "export", "benchmark"):
        assert shared <= metrics.final_metrics(reported, stage).keys(), stage
    for stage in ("teacher", "student", "surgery"):
        assert {"eval/rank1", "eval/rank5", "eval/rank10", "eval/mINP"} <= metrics.final_metrics(reported, stage).keys()


def test_the_reductions_of_a_teacher_are_zero(reported: Files) -> None:
    teacher = metrics.final_metrics(reported, "teacher")
    assert teacher["model/params_reduction"] == teacher["model/flops_reduction"] == 0


def test_the_benchmark_includes_the_metrics_of_the_file_that_it_times(reported: Files) -> None:
    found = metrics.final_metrics(reported, "benchmark")
    assert found["eval/mAP"] == 0.59
    assert found["latency/speedup"] == 2.0
    assert found["latency/student_batch1_threadsall_p50"] == 2.0


@pytest.mark.parametrize("stage", RECORDS)
def test_every_metric_except_widths_has_a_key_with_a_section(reported: Files, stage: str) -> None:
    record = {name for name in metrics.load_metrics(reported, stage) if not name.startswith("widths.")}
    found = metrics.final_metrics(reported, stage)
    assert len(found) >= len(record)
    assert all(key.count("/") == 1 for key in found)


def test_the_summary_has_the_exported_model_and_the_teacher(reported: Files) -> None:
    found = metrics.summary(reported)
    assert found["eval/mAP"] == 0.59  # of the ONNX file
    assert found["eval/rank1"] == 0.7  # of the network after surgery, since export does not measure it
    assert found["teacher/mAP"] == 0.61
    assert found["teacher/macs"] == 20_000_000
    assert found["latency/speedup"] == 2.0


def test_the_summary_of_an_incomplete_execution_has_its_last_stage(reported: Files) -> None:
    for stage in ("surgery", "export", "benchmark"):
        reported.metrics(stage).unlink()
    assert metrics.summary(reported)["eval/mAP"] == 0.6


def test_losses_validation_and_capacity_are_separate_curves() -> None:
    row = {"epoch": 3, "loss": 0.5, "kl": 0.1, "validation_map": 0.4, "macs_reduction": 0.3}
    assert metrics.curve_metrics(row) == {
        "train/loss": 0.5,
        "train/kl": 0.1,
        "validation/mAP": 0.4,
        "capacity/macs_reduction": 0.3,
    }


def test_empty_cells_of_a_curve_are_omitted(tmp_path: Path) -> None:
    path = tmp_path / "teacher.csv"
    write_text(path, "epoch,loss,validation_map\n1,0.5,\n2,0.25,0.75\n")
    assert metrics.load_curves(path) == [{"epoch": 1, "loss": 0.5}, {"epoch": 2, "loss": 0.25, "validation_map": 0.75}]
    assert metrics.load_curves(tmp_path / "none.csv") == []


def test_a_metrics_file_with_other_fields_is_rejected(reported: Files) -> None:
    write_json(reported.metrics("prepare"), {"images": 3})
    with pytest.raises(ValueError, match="identities"):
        metrics.final_metrics(reported, "prepare")


def test_the_result_table_has_a_row_for_each_network(reported: Files) -> None:
    rows = metrics.result_table(reported)
    assert [row["stage"] for row in rows] == ["teacher", "student", "surgery", "export"]
    assert {tuple(row) for row in rows} == {tuple(rows[0])}
    assert rows[1] == {
        "stage": "student",
        "mAP": "0.6000",
        "rank-1": "0.7000",
        "params": "0.50 M",
        "MACs": "9.0 M",
        "params cut": "50.0%",
        "MACs cut": "55.0%",
        "p50": "",
    }
    assert [row["p50"] for row in rows] == ["4.00 ms", "", "", "2.00 ms"]
    text = reported.metrics("benchmark").read_text().replace("batch1_", "batch8_")
    assert metrics.timed_batch(reported) == 1
    write_text(reported.metrics("benchmark"), text)  # of files with a fixed batch
    assert metrics.timed_batch(reported) == 8
    assert [row["p50"] for row in metrics.result_table(reported)] == ["4.00 ms", "", "", "2.00 ms"]
    assert json.dumps(rows)
