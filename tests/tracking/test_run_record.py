import json
import os
import time
from pathlib import Path

import pytest

from pipeline.files import Files
from pipeline.tracking.execution import Execution, ProcessId
from pipeline.tracking.run_record import EXECUTION, ExecutionRecords, RunRecord, all_executions

HERE = ProcessId.of(os.getpid())


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path, tmp_path)


def opened(files: Files, number: int = 0) -> ExecutionRecords:
    owner = HERE.model_copy(update={"start": HERE.start + number})
    records = ExecutionRecords.of(files, Execution.of("dvc", owner))
    records.write(EXECUTION, RunRecord(title="an execution", process=owner, began=records.next_start()))
    return records


def begin(records: ExecutionRecords, stage: str, **fields: object) -> str:
    name = records.new_name(stage)
    record = RunRecord(title=stage, stage=stage, process=HERE, began=records.next_start()).updated(**fields)
    records.write(name, record)
    return name


def test_a_record_is_read_back_unchanged(files: Files) -> None:
    records = opened(files)
    name = begin(records, "teacher", figures={"eval/mAP": 0.1 + 0.2}, tags={"a": "b"})
    record = records.read(name)
    assert record is not None and record.figures["eval/mAP"] == 0.1 + 0.2
    assert record.status == "RUNNING" and record.ended is None


@pytest.mark.parametrize("content", ["", "{", "[]", '{"title": "a"}', '{"title": 1, "later": "version"}'])
def test_a_damaged_or_incompatible_record_is_ignored(files: Files, content: str) -> None:
    records = opened(files)
    (records.folder / "teacher.json").write_text(content)
    assert records.read("teacher") is None
    assert records.stages() == {}


def test_a_stage_that_runs_twice_has_two_records_and_the_latest_counts(files: Files) -> None:
    records = opened(files)
    assert begin(records, "teacher", status="FAILED", ended=1.0) == "teacher"
    assert begin(records, "teacher") == "teacher-2"
    assert list(records.stages()) == ["teacher", "teacher-2"]
    assert records.statuses() == {"teacher": "RUNNING"}


def test_start_times_increase_even_if_the_clock_is_set_back(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    records = opened(files)
    begin(records, "prepare")
    monkeypatch.setattr(time, "time", lambda: 1000.0)
    begin(records, "teacher")
    began = [record.began for record in records.stages().values()]
    execution = records.execution()
    assert execution is not None and execution.began < began[0] < began[1]


def test_an_execution_has_the_status_of_its_last_stage_even_if_the_clock_was_set_back(files: Files) -> None:
    records = opened(files)
    begin(records, "prepare", status="FINISHED", ended=9e9)
    begin(records, "teacher", status="KILLED", ended=8e9)
    parent = records.parent_record()
    assert parent is not None and (parent.status, parent.ended) == ("KILLED", 9e9)


def test_an_execution_has_the_status_of_its_last_stage(files: Files) -> None:
    records = opened(files)
    begin(records, "prepare", status="FINISHED", ended=10.0)
    name = begin(records, "teacher")
    parent = records.parent_record()
    assert parent is not None and (parent.status, parent.ended) == ("RUNNING", None)
    record = records.read(name)
    assert record is not None
    records.write(name, record.updated(status="FAILED", ended=20.0))
    parent = records.parent_record()
    assert parent is not None and (parent.status, parent.ended) == ("FAILED", 20.0)


def test_a_stage_whose_process_is_gone_is_killed_as_of_its_last_point(files: Files) -> None:
    records = opened(files)
    gone = HERE.model_copy(update={"start": 1})
    curve = [{"time": 4e9, "step": 1, "values": {"a": 1.0}}]
    dead, alive = begin(records, "teacher", process=gone, curve=curve), begin(records, "student")
    elsewhere = begin(records, "surgery", process=gone.model_copy(update={"host": "elsewhere"}))
    records.mark_killed()
    found = records.stages()
    assert (found[dead].status, found[dead].ended) == ("KILLED", 4e9)
    assert found[alive].status == found[elsewhere].status == "RUNNING"


def test_records_are_pending_until_their_present_state_is_uploaded(files: Files) -> None:
    records = opened(files)
    name = begin(records, "teacher")
    assert records.pending("here") == [EXECUTION, name]
    parent, record = records.parent_record(), records.read(name)
    assert parent is not None and record is not None
    state = {EXECUTION: {"fingerprint": parent.fingerprint}, name: {"fingerprint": record.fingerprint}}
    records.save_synced("here", state)
    assert records.pending("here") == []
    assert records.pending("there") == [EXECUTION, name]
    records.write(name, record.updated(waited=3.0))  # not uploaded
    assert records.pending("here") == []
    records.write(name, record.updated(tags={"a": "b"}))
    assert records.pending("here") == [name]
    records.save_synced("here", {**state, name: {"gone": "deleted"}})
    assert records.pending("here") == []


def test_files_to_upload_are_copies(files: Files) -> None:
    records = opened(files)
    (files.root / "source" / "below").mkdir(parents=True)
    (files.root / "source" / "model.onnx").write_text("first")
    (files.root / "source" / "below" / "a.txt").write_text("a")
    assert records.copy_for_upload(files.root / "source", ["model.onnx", "below"], "export") == "export"
    (files.root / "source" / "model.onnx").write_text("second")
    assert (records.files / "export" / "model.onnx").read_text() == "first"
    assert (records.files / "export" / "below" / "a.txt").read_text() == "a"


def test_a_failed_copy_does_not_fail_the_stage(files: Files, caplog: pytest.LogCaptureFixture) -> None:
    assert opened(files).copy_for_upload(files.root, ["missing"], "export") == ""
    assert "is not uploaded to MLflow: it cannot be copied" in caplog.text


def test_executions_are_ordered_by_start_time(files: Files) -> None:
    made = [opened(files, number) for number in range(3)]
    first = made[0].execution()
    assert first is not None
    made[0].write(EXECUTION, first.updated(began=first.began + 1000))
    assert [records.folder for records in all_executions(files)] == [made[1].folder, made[2].folder, made[0].folder]


def test_a_record_omits_default_values(files: Files) -> None:
    records = opened(files)
    begin(records, "teacher")
    content = json.loads((records.folder / "teacher.json").read_text())
    assert set(content) == {"title", "stage", "process", "began"}
