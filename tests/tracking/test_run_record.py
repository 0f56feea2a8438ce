import json
import os
import time
from pathlib import Path

import pytest

from pipeline.files import Files
from pipeline.tracking.execution import Execution, ProcessId
from pipeline.tracking.run_record import EXECUTION, Records, RunRecord, executions

HERE = ProcessId.of(os.getpid())


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path, tmp_path)


def opened(files: Files, number: int = 0) -> Records:
    owner = HERE.model_copy(update={"start": HERE.start + number})
    records = Records.of(files, Execution.of("dvc", owner))
    records.write(EXECUTION, RunRecord(title="an execution", process=owner, began=records.moment()))
    return records


def begin(records: Records, stage: str, **fields: object) -> str:
    name = records.new_name(stage)
    record = RunRecord(title=stage, stage=stage, process=HERE, began=records.moment()).changed(**fields)
    records.write(name, record)
    return name


def test_a_record_comes_back_as_it_was(files: Files) -> None:
    records = opened(files)
    name = begin(records, "teacher", figures={"eval/mAP": 0.1 + 0.2}, tags={"a": "b"})
    record = records.read(name)
    assert record is not None and record.figures["eval/mAP"] == 0.1 + 0.2
    assert record.status == "RUNNING" and record.ended is None


@pytest.mark.parametrize("content", ["", "{", "[]", '{"title": "a"}', '{"title": 1, "later": "version"}'])
def test_a_record_of_another_version_or_a_damaged_one_counts_as_none(files: Files, content: str) -> None:
    records = opened(files)
    (records.folder / "teacher.json").write_text(content)
    assert records.read("teacher") is None
    assert records.stages() == {}


def test_a_stage_that_runs_twice_has_two_records_of_which_the_latest_counts(files: Files) -> None:
    records = opened(files)
    assert begin(records, "teacher", status="FAILED", ended=1.0) == "teacher"
    assert begin(records, "teacher") == "teacher-2"
    assert list(records.stages()) == ["teacher", "teacher-2"]
    assert records.outcomes() == {"teacher": "RUNNING"}


def test_runs_begin_one_after_the_other_even_if_the_clock_is_set_back(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = opened(files)
    begin(records, "prepare")
    monkeypatch.setattr(time, "time", lambda: 1000.0)
    begin(records, "teacher")
    began = [record.began for record in records.stages().values()]
    execution = records.execution()
    assert execution is not None and execution.began < began[0] < began[1]


def test_an_execution_ends_as_its_last_stage_did_even_if_the_clock_was_set_back(files: Files) -> None:
    records = opened(files)
    begin(records, "prepare", status="FINISHED", ended=9e9)
    begin(records, "teacher", status="KILLED", ended=8e9)
    whole = records.whole()
    assert whole is not None and (whole.status, whole.ended) == ("KILLED", 9e9)


def test_an_execution_ends_as_its_last_stage_did(files: Files) -> None:
    records = opened(files)
    begin(records, "prepare", status="FINISHED", ended=10.0)
    name = begin(records, "teacher")
    whole = records.whole()
    assert whole is not None and (whole.status, whole.ended) == ("RUNNING", None)
    record = records.read(name)
    assert record is not None
    records.write(name, record.changed(status="FAILED", ended=20.0))
    whole = records.whole()
    assert whole is not None and (whole.status, whole.ended) == ("FAILED", 20.0)


def test_a_stage_whose_process_is_gone_was_killed_at_its_last_sign_of_life(files: Files) -> None:
    records = opened(files)
    gone = HERE.model_copy(update={"start": 1})
    curve = [{"time": 4e9, "step": 1, "values": {"a": 1.0}}]
    dead, alive = begin(records, "teacher", process=gone, curve=curve), begin(records, "student")
    elsewhere = begin(records, "surgery", process=gone.model_copy(update={"host": "elsewhere"}))
    records.end_dead()
    found = records.stages()
    assert (found[dead].status, found[dead].ended) == ("KILLED", 4e9)
    assert found[alive].status == found[elsewhere].status == "RUNNING"


def test_a_server_is_behind_until_it_has_each_record_as_it_is(files: Files) -> None:
    records = opened(files)
    name = begin(records, "teacher")
    assert records.pending("here") == [EXECUTION, name]
    whole, record = records.whole(), records.read(name)
    assert whole is not None and record is not None
    state = {EXECUTION: {"fingerprint": whole.fingerprint}, name: {"fingerprint": record.fingerprint}}
    records.note_synced("here", state)
    assert records.pending("here") == []
    assert records.pending("there") == [EXECUTION, name]
    records.write(name, record.changed(waited=3.0))  # not uploaded
    assert records.pending("here") == []
    records.write(name, record.changed(tags={"a": "b"}))
    assert records.pending("here") == [name]
    records.note_synced("here", {**state, name: {"gone": "deleted"}})
    assert records.pending("here") == []


def test_files_that_are_kept_are_copies(files: Files) -> None:
    records = opened(files)
    (files.root / "left" / "below").mkdir(parents=True)
    (files.root / "left" / "model.onnx").write_text("first")
    (files.root / "left" / "below" / "a.txt").write_text("a")
    assert records.keep(files.root / "left", ["model.onnx", "below"], "export") == "export"
    (files.root / "left" / "model.onnx").write_text("second")
    assert (records.files / "export" / "model.onnx").read_text() == "first"
    assert (records.files / "export" / "below" / "a.txt").read_text() == "a"


def test_files_that_cannot_be_copied_fail_no_stage(files: Files, caplog: pytest.LogCaptureFixture) -> None:
    assert opened(files).keep(files.root, ["missing"], "export") == ""
    assert "is not uploaded to MLflow: it cannot be copied" in caplog.text


def test_executions_come_in_the_order_in_which_they_began(files: Files) -> None:
    made = [opened(files, number) for number in range(3)]
    first = made[0].execution()
    assert first is not None
    made[0].write(EXECUTION, first.changed(began=first.began + 1000))
    assert [one.folder for one in executions(files)] == [made[1].folder, made[2].folder, made[0].folder]


def test_a_record_is_small_and_readable(files: Files) -> None:
    records = opened(files)
    begin(records, "teacher")
    content = json.loads((records.folder / "teacher.json").read_text())
    assert set(content) == {"title", "stage", "process", "began"}
