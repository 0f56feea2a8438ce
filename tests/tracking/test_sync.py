"""After an upload MLflow has complete runs, without duplicates and without runs that seem to be running."""

import hashlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run, ViewType
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import PERMISSION_DENIED

from pipeline.files import Files, write_json, write_text
from pipeline.records import RECORDS
from pipeline.stage.params_file import load
from pipeline.system.locks import locked
from pipeline.tracking import metrics
from pipeline.tracking.errors import TrackingError
from pipeline.tracking.execution import Execution, ProcessId
from pipeline.tracking.recorder import RELEASE_DIGEST, Recorder, complete_last_execution, flatten
from pipeline.tracking.run_record import EXECUTION, ExecutionRecords, Point, all_executions
from pipeline.tracking.store import identify, store_key
from pipeline.tracking.sync import Sync, sync
from tests.fake_stages import NUMBERS, Start, wait_until

HERE = ProcessId.of(os.getpid())
GONE = HERE.model_copy(update={"start": 1})


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One database for all tests of this file, since creating its tables takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"


@pytest.fixture
def here(reported: Files, store: str, monkeypatch: pytest.MonkeyPatch) -> Files:
    """A checkout with its own experiment in that database."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    text = reported.params.read_text()
    assert "experiment: smaller-student" in text
    reported.params.write_text(text.replace("experiment: smaller-student", f"experiment: test-{reported.root.name}"))
    return reported


def dvc(number: int = 0) -> Execution:
    """Return an execution of this process; each number gives another one."""
    return Execution.of("dvc", HERE.model_copy(update={"start": HERE.start + number}))


def record(
    files: Files, stage: str | None, status: str = "FINISHED", owner: Execution | None = None
) -> ExecutionRecords:
    """Record a stage from start to end."""
    recorder = Recorder(files, load(files.params), owner or dvc())
    name = recorder.begin(stage)
    if stage is not None:
        recorder.end(name, status, time.time() + 1)  # type: ignore[arg-type]
    return recorder.records


def client() -> MlflowClient:
    return MlflowClient(os.environ["MLFLOW_TRACKING_URI"])


def runs(files: Files, view: int = ViewType.ACTIVE_ONLY) -> list[Run]:
    experiment = client().get_experiment_by_name(load(files.params).tracking.experiment)
    found = client().search_runs(experiment.experiment_id, run_view_type=view, order_by=["attributes.start_time ASC"])
    return list(found)


def parents(files: Files) -> list[Run]:
    return [run for run in runs(files) if "stage" not in run.data.tags]


def children(files: Files) -> dict[str, Run]:
    found = [run for run in runs(files) if "stage" in run.data.tags]
    assert len({run.data.tags["stage"] for run in found}) == len(found)
    return {run.data.tags["stage"]: run for run in found}


def purge(run: str) -> None:
    """Remove a deleted run from the database."""
    store = os.environ["MLFLOW_TRACKING_URI"]
    words = [sys.executable, "-m", "mlflow", "gc", "--backend-store-uri", store, "--run-ids", run]
    done = subprocess.run(words, capture_output=True)
    assert done.returncode == 0, done.stderr


def points(run: Run, key: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in client().get_metric_history(run.info.run_id, key)]


# --- content of runs --------------------------------------------------------------------------------------------------


def test_a_stage_starts_the_execution_and_records_cached_stages_before_it(here: Files) -> None:
    Recorder(here, load(here.params), dvc()).begin("student")
    sync(here)
    (parent,) = parents(here)
    found = children(here)
    assert list(found) == ["prepare", "teacher", "student"]
    assert {run.data.tags["mlflow.parentRunId"] for run in found.values()} == {parent.info.run_id}
    assert [run.data.tags["cached"] for run in found.values()] == ["true", "true", "false"]
    assert [run.info.status for run in found.values()] == ["FINISHED", "FINISHED", "RUNNING"]
    assert parent.info.status == "RUNNING"
    assert found["teacher"].data.metrics["eval/mAP"] == 0.61
    assert points(found["teacher"], "train/loss") == [(1, 2.5), (2, 1.5)]
    assert points(found["teacher"], "validation/mAP") == [(2, 0.25)]


def test_repeated_uploads_store_each_point_and_each_final_metric_once(
    here: Files,
) -> None:
    recorder = Recorder(here, load(here.params), dvc())
    name = recorder.begin("student")
    for epoch in (1, 2, 3):
        running = recorder.records.read(name)
        assert running is not None
        point = Point(time=time.time(), step=epoch, values={"train/kl": 1 / epoch})
        recorder.records.write(name, running.updated(curve=(*running.curve, point)))
        sync(here)
    ended = time.time() + 1
    recorder.end(name, "FINISHED", ended)
    assert recorder.records.pending(store_key(here))
    assert sync(here)[0] == 1
    assert not recorder.records.pending(store_key(here))
    before = [run.info.run_id for run in runs(here)]
    assert sync(here)[0] == 0
    for _ in range(2):
        assert sync(here, again=True)[0] == 1
    assert [run.info.run_id for run in runs(here)] == before
    run = children(here)["student"]
    assert points(run, "train/kl") == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    for key in metrics.final_metrics(here, "student"):
        assert len(points(run, key)) == 1, key
    assert run.data.metrics["time/total"] == 1.5
    assert (run.info.status, run.info.end_time) == ("FINISHED", int(ended * 1000))


def test_stages_of_one_execution_share_a_parent_run(here: Files) -> None:
    for stage in RECORDS:  # each stage is a new process that has only the records
        record(here, stage)
        sync(here)
    (parent,) = parents(here)
    assert list(children(here)) == list(RECORDS)
    assert all(run.data.tags["cached"] == "false" for run in children(here).values())
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics == metrics.summary(here)
    assert all(len(points(parent, key)) == 1 for key in parent.data.metrics)


def test_the_parent_run_has_params_data_set_and_source(here: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMALLER_STUDENT_FLOW_RUN", "1234")
    write_text(here.root / "dvc.lock", "schema: '2.0'\n")
    records = record(here, "prepare")
    sync(here)
    (parent,) = parents(here)
    assert parent.data.params == dict(flatten(load(here.params).model_dump(mode="json")))
    assert parent.data.params["student.budget.reduction"] == "0.4"
    assert {"params_digest", "git_commit", "dvc_lock_digest"} <= parent.data.tags.keys()
    assert parent.data.tags["execution_id"] == records.id
    assert parent.data.tags["flow_run_id"] == "1234"
    digest = parent.data.tags["data_digest"]
    assert len(digest) == 64
    (dataset_input,) = parent.inputs.dataset_inputs
    assert (dataset_input.dataset.name, dataset_input.dataset.digest) == ("vehicles", digest[:36])
    assert json.loads(dataset_input.dataset.profile)["identities"] == 3


def test_artifacts_are_uploaded_although_a_later_run_overwrote_the_files(here: Files) -> None:
    write_text(here.artifacts("export") / "SHA256SUMS", "1234  model.onnx\n")
    for stage in ("export", "benchmark"):
        records = record(here, stage)
    write_text(here.artifacts("export") / "model.onnx", "another")
    sync(here)
    found = children(here)
    names = [file.path for file in client().list_artifacts(found["export"].info.run_id, "export")]
    (page,) = client().list_artifacts(found["benchmark"].info.run_id, "report")
    assert names == ["export/SHA256SUMS", "export/model.onnx"] and page.path == "report/index.html"
    downloaded = Path(client().download_artifacts(found["export"].info.run_id, "export/model.onnx", str(here.root)))
    assert downloaded.read_text() == "onnx"
    assert len(found["export"].data.tags[RELEASE_DIGEST]) == 64
    assert (here.root / "mlartifacts").is_dir()
    assert [path.name for path in records.files.iterdir()] == ["report"]  # a release is too large to be kept


def test_a_fully_cached_execution_is_complete_and_links_to_the_original_runs(here: Files) -> None:
    record(here, "teacher", owner=dvc(1))
    sync(here)
    (original,) = [run for run in runs(here) if run.data.tags.get("stage") == "teacher"]
    second = record(here, None)
    sync(here)
    (parent,) = [run for run in parents(here) if run.data.tags["execution_id"] == second.id]
    mine = [run for run in runs(here) if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert [run.data.tags["stage"] for run in mine] == list(RECORDS)
    assert {run.data.tags["cached"] for run in mine} == {"true"}
    assert parent.data.metrics == metrics.summary(here)
    assert mine[1].data.tags["original_run"] == original.info.run_id
    assert "original_run" not in mine[2].data.tags  # the student's run was not recorded here


def test_a_cached_stage_with_other_metrics_has_no_original_run(here: Files) -> None:
    record(here, "prepare", owner=dvc(1))
    write_json(here.metrics("prepare"), {**NUMBERS["prepare"], "images": 10})
    record(here, "teacher")
    sync(here)
    (mine,) = [run for run in runs(here) if run.data.tags.get("cached") == "true"]
    assert mine.data.tags["stage"] == "prepare"
    assert "original_run" not in mine.data.tags


@pytest.mark.parametrize("status", ["FAILED", "KILLED"])
def test_a_failed_stage_ends_its_run_and_the_parent_run_with_the_error(here: Files, status: str) -> None:
    recorder = Recorder(here, load(here.params), dvc())
    name = recorder.begin("teacher")
    recorder.end(name, status, time.time() + 1, "out of memory; lower `teacher.batch`\nand more")  # type: ignore[arg-type]
    sync(here)
    assert parents(here)[0].info.status == children(here)["teacher"].info.status == status
    assert children(here)["teacher"].data.tags["error"] == "out of memory; lower `teacher.batch`"


def test_a_retried_stage_has_a_second_run(here: Files) -> None:
    record(here, "teacher", "FAILED")
    record(here, "teacher")
    sync(here)
    tries = [run for run in runs(here) if run.data.tags.get("stage") == "teacher"]
    assert sorted(run.info.status for run in tries) == ["FAILED", "FINISHED"]
    assert parents(here)[0].info.status == "FINISHED"


def test_params_are_flattened() -> None:
    assert dict(flatten({"a": {"b": [1, 2], "c": "x"}, "d": None})) == {"a.b": "[1, 2]", "a.c": "x", "d": "null"}


# --- interruptions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("calls", range(1, 14, 3))
def test_an_interrupted_upload_resumes_without_duplicates(
    here: Files, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    """The interruption comes after a call that MLflow executed and before the state is saved."""
    record(here, "teacher")
    upload, remaining = Sync(here), [calls]
    assert upload.client

    class Interrupted(BaseException):
        pass

    for name in ("create_run", "log_batch", "log_inputs", "set_terminated", "update_run", "log_artifacts"):

        def call(self: MlflowClient, *words: object, _real: object = getattr(MlflowClient, name), **named: object):
            done = _real(self, *words, **named)  # type: ignore[operator]
            remaining[0] -= 1
            if remaining[0] == 0:
                raise Interrupted
            return done

        monkeypatch.setattr(MlflowClient, name, call)
    with pytest.raises(Interrupted):
        upload.upload_all()
    monkeypatch.undo()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", upload.uri)
    sync(here)
    assert list(children(here)) == ["prepare", "teacher"]
    assert len(parents(here)) == 1
    assert points(children(here)["teacher"], "eval/mAP") == [(0, 0.61)]
    assert points(children(here)["teacher"], "time/total") == [(0, 1.5)]
    assert {run.info.status for run in runs(here)} == {"FINISHED"}


def test_sync_ends_the_runs_of_a_dead_stage(here: Files) -> None:
    records = record(here, "prepare", "RUNNING")
    sync(here)
    assert {run.info.status for run in runs(here)} == {"RUNNING"}
    running = records.read("prepare")
    assert running is not None
    records.write("prepare", running.updated(process=GONE, ended=None))
    sync(here)
    assert {run.info.status for run in runs(here)} == {"KILLED"}
    assert children(here)["prepare"].data.tags["error"] == "its process is gone"


@pytest.mark.parametrize("process", [HERE, GONE.model_copy(update={"host": "elsewhere"})], ids=["alive", "elsewhere"])
def test_sync_does_not_end_runs_of_living_processes_or_other_hosts(here: Files, process: ProcessId) -> None:
    records = record(here, "prepare", "RUNNING")
    running = records.read("prepare")
    assert running is not None
    records.write("prepare", running.updated(process=process, ended=None))
    sync(here)
    assert {run.info.status for run in runs(here)} == {"RUNNING"}


# --- other stores -----------------------------------------------------------------------------------------------------


def test_another_store_gets_all_runs_with_their_files_and_the_first_one_keeps_its_own(
    here: Files, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(here, "benchmark", owner=dvc(1))
    sync(here)
    first = [run.info.run_id for run in runs(here)]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'other.db'}")
    record(here, "prepare", owner=dvc(2))
    assert sync(here)[0] == 2
    expected = ["", *RECORDS, "", "prepare"]
    assert [run.data.tags.get("stage", "") for run in runs(here)] == expected
    assert {run.info.status for run in runs(here)} == {"FINISHED"}
    (page,) = client().list_artifacts(runs(here)[len(RECORDS)].info.run_id, "report")
    assert page.path == "report/index.html"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    assert sync(here)[0] == 1  # the second execution
    assert sync(here)[0] == 0
    assert [run.info.run_id for run in runs(here)][: len(first)] == first
    assert [run.data.tags.get("stage", "") for run in runs(here)] == expected


def test_another_address_of_a_store_makes_no_doubles(here: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    record(here, "benchmark")
    sync(here)
    before = [(run.info.run_id, run.data.metrics, run.data.tags) for run in runs(here)]
    client().delete_run(children(here)["prepare"].info.run_id)
    store = os.environ["MLFLOW_TRACKING_URI"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.replace("sqlite:", "sqlite+pysqlite:"))
    uploaded, (notice,) = sync(here)
    assert uploaded == 1 and "was deleted in MLflow" in notice
    assert [(run.info.run_id, run.data.metrics, run.data.tags) for run in runs(here, ViewType.ALL)] == before
    assert sync(here) == (0, [])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    assert sync(here)[0] == 0


def own_database(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Use a copy of the database, which has its tables."""
    path = tmp_path / "own.db"
    shutil.copy2(store.removeprefix("sqlite:///"), path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{path}")
    return path


def test_a_clone_of_a_database_gets_the_executions_that_it_lacks(
    here: Files, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, clone = own_database(store, tmp_path, monkeypatch), tmp_path / "clone.db"
    record(here, "prepare", owner=dvc(1))
    started = record(here, "prepare", owner=dvc(2))
    sync(here)
    shutil.copy2(original, clone)
    record(here, "teacher", owner=dvc(2))  # of an execution that the clone has in part
    record(here, "prepare", owner=dvc(3))
    sync(here)
    first = [run.data.tags["entry"] for run in runs(here)]
    state = {path: path.read_text() for path in (started.folder / "synced").iterdir()}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{clone}")
    assert sync(here) == (3, [])
    assert sorted(run.data.tags["entry"] for run in runs(here)) == sorted(first)
    assert {run.info.status for run in runs(here)} == {"FINISHED"}
    assert sync(here) == (0, [])
    assert {path: path.read_text() for path in state} == state  # the original is not affected
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{original}")
    assert sync(here, again=True) == (3, [])
    assert [run.data.tags["entry"] for run in runs(here)] == first


def test_executions_that_a_restored_backup_lacks_are_reported_and_uploaded_again(
    here: Files, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, backup = own_database(store, tmp_path, monkeypatch), tmp_path / "backup.db"
    record(here, "prepare", owner=dvc(1))
    sync(here)
    shutil.copy2(path, backup)
    for number in (2, 3):
        record(here, "prepare", owner=dvc(number))
    sync(here)
    first = [run.data.tags["entry"] for run in runs(here)]
    with closing(sqlite3.connect(backup)) as old, closing(sqlite3.connect(path)) as new:
        old.backup(new)
    assert len(runs(here)) == 2
    uploaded, (notice,) = sync(here)
    assert uploaded == 0
    assert "is missing in MLflow; if it was not purged but an older backup was restored there, run `smal" in notice
    assert sync(here) == (0, [])
    assert sync(here, again=True) == (3, [])
    assert [run.data.tags["entry"] for run in runs(here)] == first
    assert sync(here) == (0, [])


def test_a_store_keeps_its_state_although_experiment_0_becomes_visible_or_not(
    here: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(client: MlflowClient, number: str) -> None:
        raise MlflowException(f"Permission denied for experiment {number}", PERMISSION_DENIED)

    records = record(here, "prepare")
    with monkeypatch.context() as hidden:
        hidden.setattr(MlflowClient, "get_experiment", denied)
        sync(here)
        address = store_key(here)
    assert sync(here)[0] == 0
    key = store_key(here)
    assert key == f"{address}-{client().get_experiment('0').creation_time}"
    monkeypatch.setattr(MlflowClient, "get_experiment", denied)
    assert sync(here)[0] == 0
    assert store_key(here) == key
    assert [state.stem for state in (records.folder / "synced").iterdir()] == [key]


def test_a_new_store_at_an_old_address_gets_all_runs(
    reported: Files, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    record(reported, "benchmark")
    ids = []
    for _ in range(2):
        process = start(reported, "-m", "pipeline", "sync")  # MLflow keeps the old database open in this process
        out, err = process.communicate(timeout=300)
        assert out == "executions uploaded: 1\n", err
        with sqlite3.connect(reported.mlflow_db) as database:
            ids.append({run for (run,) in database.execute("SELECT run_uuid FROM runs WHERE status = 'FINISHED'")})
        reported.mlflow_db.unlink()
    assert len(ids[0]) == len(ids[1]) == 1 + len(RECORDS)
    assert not ids[0] & ids[1]


def test_the_state_of_version_0_1_0_is_kept(here: Files) -> None:
    records = record(here, "prepare")
    sync(here)
    address = hashlib.sha256(os.environ["MLFLOW_TRACKING_URI"].encode()).hexdigest()[:16]
    (state,) = (records.folder / "synced").iterdir()
    state.rename(state.with_name(f"{address}.json"))
    (here.tracking / "stores" / address).unlink()
    assert sync(here)[0] == 0


def test_the_state_of_version_0_1_0_replaces_no_newer_state_and_two_processes_may_move_it(
    here: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [record(here, "prepare", owner=dvc(number)) for number in range(3)]
    sync(here)
    address, key = hashlib.sha256(os.environ["MLFLOW_TRACKING_URI"].encode()).hexdigest()[:16], store_key(here)
    for records in made[1:]:
        (records.folder / "synced" / f"{key}.json").rename(records.folder / "synced" / f"{address}.json")
    newer = (made[0].folder / "synced" / f"{key}.json").read_text()
    write_text(made[0].folder / "synced" / f"{address}.json", "{}")
    (here.tracking / "stores" / address).unlink()
    rename = Path.rename

    def late(source: Path, target: Path) -> None:
        rename(source, target)  # another process is first
        rename(source, target)

    with monkeypatch.context() as race:
        race.setattr(Path, "rename", late)
        assert identify(here, client()) == key
    assert (made[0].folder / "synced" / f"{key}.json").read_text() == newer
    assert sync(here)[0] == 0


# --- an artifact store that fails -------------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", ["s3", "folder"])
def test_figures_and_statuses_arrive_although_the_artifact_store_fails(
    here: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "missing"))
    in_the_way = tmp_path / "a file"
    in_the_way.write_text("")
    location = "s3://bucket/runs" if broken == "s3" else (in_the_way / "runs").as_uri()
    client().create_experiment(load(here.params).tracking.experiment, location)
    write_text(here.artifacts("export") / "SHA256SUMS", "1234  model.onnx\n")
    for number in (1, 2):
        for stage in ("export", "benchmark"):
            records = record(here, stage, owner=dvc(number))
    reason = "Unable to locate credentials" if broken == "s3" else "Not a directory"
    for _ in range(2):
        with pytest.raises(TrackingError, match=f"^MLflow at .* has all figures and statuses, but .*{reason}.*; the f"):
            sync(here)
        assert len(runs(here)) == 2 * (1 + len(RECORDS))
        assert {run.info.status for run in runs(here)} == {"FINISHED"}
        assert all(run.data.metrics["eval/mAP"] == 0.59 for run in parents(here))
    assert records.pending(store_key(here)) == ["export", "benchmark"]
    if broken == "s3":
        return
    in_the_way.unlink()
    assert sync(here)[0] == 2
    assert len(runs(here)) == 2 * (1 + len(RECORDS))
    for run in runs(here):
        expected = {"export": ["export"], "benchmark": ["report"]}.get(run.data.tags.get("stage", ""), [])
        expected = expected if run.data.tags.get("cached") == "false" else []
        assert [file.path for file in client().list_artifacts(run.info.run_id)] == expected


def test_files_of_new_executions_arrive_although_those_of_old_ones_cannot(
    here: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The artifact location of the old ones is gone, and each failed upload takes long."""
    monkeypatch.setattr("pipeline.tracking.sync.MAX_FILE_SECONDS", 0.0)
    name = load(here.params).tracking.experiment
    write_text(tmp_path / "a file", "")
    client().create_experiment(f"{name}-old", (tmp_path / "a file" / "runs").as_uri())
    text = here.params.read_text()
    here.params.write_text(text.replace(f"experiment: {name}", f"experiment: {name}-old"))
    old = [record(here, "benchmark", owner=dvc(number)) for number in range(4)]
    here.params.write_text(text)
    new = record(here, "benchmark", owner=dvc(5))
    for _ in range(2):
        with pytest.raises(TrackingError, match="has all figures and statuses, but its artifact store failed"):
            sync(here)
        assert [bool(records.pending(store_key(here))) for records in (*old, new)] == [True] * 4 + [False]
    upload = Sync(here)
    upload.upload_all()
    assert len(upload.file_errors) == 1  # the others were not tried


def test_files_of_a_new_execution_arrive_although_some_at_the_same_location_fail(here: Files) -> None:
    old = [record(here, "benchmark", owner=dvc(number)) for number in range(4)]
    for records in old:
        (records.files / "report" / "gone").symlink_to("nowhere")  # cannot be read
    new = record(here, "benchmark", owner=dvc(5))
    with pytest.raises(TrackingError, match="has all figures and statuses, but its artifact store failed"):
        sync(here)
    assert [bool(records.pending(store_key(here))) for records in (*old, new)] == [True] * 4 + [False]


# --- deleted runs -----------------------------------------------------------------------------------------------------


def test_a_deleted_run_is_skipped_and_reported_once_and_others_are_uploaded(here: Files) -> None:
    record(here, "prepare", owner=dvc(1))
    sync(here)
    deleted = children(here)["prepare"].info.run_id
    client().delete_run(deleted)
    record(here, "teacher", owner=dvc(1))  # the same execution goes on
    record(here, "prepare", owner=dvc(2))  # and another one
    first = sync(here)
    assert len(first[1]) == 1 and "was deleted in MLflow; it is not uploaded again" in first[1][0]
    assert sync(here)[1] == []
    assert client().get_run(deleted).info.lifecycle_stage == "deleted"
    stages = [run.data.tags["stage"] for run in runs(here) if "stage" in run.data.tags]
    assert sorted(stages) == ["prepare", "teacher"]  # of the second execution, and of the first
    assert {run.info.status for run in runs(here)} == {"FINISHED"}


def test_an_execution_with_a_deleted_parent_run_is_skipped_and_reported_once(here: Files) -> None:
    record(here, "prepare")
    sync(here)
    for run in runs(here):
        client().delete_run(run.info.run_id)
    notices = []
    for stage in ("teacher", "student", "surgery"):
        record(here, stage)
        notices += sync(here)[1]
    assert len(notices) == 1 and "was deleted in MLflow" in notices[0]
    assert runs(here) == []
    assert len(runs(here, ViewType.ALL)) == 2


def test_a_purged_run_is_not_created_again(here: Files) -> None:
    record(here, "prepare")
    sync(here)
    run = children(here)["prepare"].info.run_id
    client().delete_run(run)
    purge(run)
    (notice,) = sync(here)[1]
    assert "a run of execution" in notice and "is missing in MLflow; if it was not purged but an older b" in notice
    record(here, "teacher")
    assert sync(here)[1] == []
    assert list(children(here)) == ["teacher"]


def test_sync_again_updates_a_restored_run(here: Files) -> None:
    record(here, "prepare")
    sync(here)
    run = children(here)["prepare"].info.run_id
    parent = parents(here)[0].info.run_id
    for deleted in (run, parent):
        client().delete_run(deleted)
    write_text(here.artifacts("export") / "SHA256SUMS", "1234  model.onnx\n")
    record(here, "export")
    sync(here)
    for deleted in (run, parent):
        client().restore_run(deleted)
    assert sync(here)[0] == 0
    sync(here, again=True)
    found = children(here)
    assert {one.info.status for one in found.values()} == {"FINISHED"}
    names = [file.path for file in client().list_artifacts(found["export"].info.run_id, "export")]
    assert names == ["export/SHA256SUMS", "export/model.onnx"]


def test_a_deleted_experiment_is_skipped_and_others_are_uploaded(here: Files) -> None:
    record(here, "prepare", owner=dvc(1))
    sync(here)
    deleted = load(here.params).tracking.experiment
    client().delete_experiment(client().get_experiment_by_name(deleted).experiment_id)
    record(here, "prepare", owner=dvc(2))
    here.params.write_text(here.params.read_text().replace(f"experiment: {deleted}", f"experiment: {deleted}-2"))
    record(here, "prepare", owner=dvc(3))
    first = sync(here)
    assert [notice.partition(";")[0] for notice in first[1]] == [f"experiment {deleted} was deleted in MLflow"]
    assert sync(here)[1] == []
    assert [run.info.status for run in runs(here)] == ["FINISHED", "FINISHED"]
    assert client().get_experiment_by_name(deleted).lifecycle_stage == "deleted"


def test_executions_are_uploaded_although_mlflow_rejects_one(here: Files) -> None:
    records = record(here, "prepare", owner=dvc(1))
    broken = records.read("prepare")
    assert broken is not None
    records.write("prepare", broken.updated(figures={"a key with \n a line": 1.0}))
    record(here, "prepare", owner=dvc(2))
    (notice,) = sync(here)[1]
    assert notice.startswith(f"MLflow rejected part of execution {records.id}")
    finished = [run for run in parents(here) if run.info.status == "FINISHED"]
    assert len(finished) == 1


def test_an_unreachable_store_is_one_error(here: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    record(here, "prepare", owner=dvc(1))
    record(here, "prepare", owner=dvc(2))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(TrackingError, match=r"^MLflow at http://127.0.0.1:9 cannot be reached .*; run records stay on"):
        sync(here)


def test_an_error_of_this_machine_is_not_taken_for_one_of_the_network(here: Files) -> None:
    broken = record(here, "prepare", owner=dvc(1))
    (broken.folder / "synced").write_text("")  # a file in the way, as a full disk would be
    record(here, "prepare", owner=dvc(2))
    with pytest.raises(
        TrackingError, match=r"^MLflow at .* cannot be used \(\[Errno 17\] File exists: .*; run records"
    ):
        sync(here)
    assert len(parents(here)) == 2 and parents(here)[1].info.status == "FINISHED"


# --- concurrent processes ---------------------------------------------------------------------------------------------


def test_only_an_execution_that_another_process_uploads_is_skipped(here: Files) -> None:
    first, second = record(here, "prepare", owner=dvc(1)), record(here, "prepare", owner=dvc(2))
    with locked(first.folder / "sync.lock", "a test"):
        code = (
            "from pathlib import Path; from pipeline.files import Files; from pipeline.tracking.sync import Sync\n"
            "root = Path.cwd(); Sync(Files(root, root)).upload_all()"
        )
        root = Path(__file__).parents[2]
        environment = {**os.environ, "PYTHONPATH": str(root)}
        done = subprocess.run([sys.executable, "-c", code], cwd=here.root, env=environment, capture_output=True)
        assert done.returncode == 0, done.stderr
    assert [run.data.tags["execution_id"] for run in parents(here)] == [second.id]
    sync(here)
    assert {run.data.tags["execution_id"] for run in parents(here)} == {first.id, second.id}


def test_records_of_an_old_execution_that_still_runs_are_kept(here: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.tracking.sync.MAX_EXECUTIONS", 1)
    recorder = Recorder(here, load(here.params), dvc(1))
    name = recorder.begin("prepare")
    record(here, "prepare", owner=dvc(2))
    record(here, "prepare", owner=dvc(3))
    sync(here)
    recorder.end(name, "FINISHED", time.time() + 1)
    sync(here)
    assert [run.info.status for run in parents(here)] == ["FINISHED"] * 3


def test_two_processes_that_complete_an_execution_record_each_stage_once(here: Files) -> None:
    records = record(here, "prepare")
    execution = records.execution()
    assert execution is not None
    records.write(EXECUTION, execution.updated(process=GONE))
    code = (
        "from pathlib import Path; from pipeline.files import Files; from pipeline.stage.params_file import load\n"
        "from pipeline.tracking.recorder import complete_last_execution\n"
        "files = Files(Path.cwd(), Path.cwd()); complete_last_execution(files, load(files.params), list)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    both = [subprocess.Popen([sys.executable, "-c", code], cwd=here.root, env=environment) for _ in range(2)]
    assert [one.wait(60) for one in both] == [0, 0]
    assert list(records.stages()) == list(RECORDS)


def test_old_records_are_deleted_after_their_upload(here: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.tracking.sync.MAX_EXECUTIONS", 2)
    made = [record(here, "prepare", owner=dvc(number)) for number in range(4)]
    sync(here)
    assert [records.folder for records in all_executions(here)] == [records.folder for records in made[2:]]
    assert len(parents(here)) == 4


def test_cached_stages_are_recorded_after_dvc_has_ended(here: Files) -> None:
    records = record(here, "prepare")
    complete_last_execution(here, load(here.params), list)
    assert list(records.statuses()) == ["prepare"]  # the owner is alive, so dvc may still run the others
    execution = records.execution()
    assert execution is not None
    records.write(EXECUTION, execution.updated(process=GONE))
    complete_last_execution(here, load(here.params), lambda: ["surgery"])
    assert list(records.statuses()) == ["prepare", "teacher", "student"]
    complete_last_execution(here, load(here.params), list)
    assert list(records.statuses()) == list(RECORDS)


def test_the_background_upload_ends_the_run_of_a_killed_stage(here: Files) -> None:
    records = record(here, "prepare", "RUNNING")
    order = {"root": str(here.root), "state": str(here.state), "records": str(records.folder), "name": "prepare"}
    child = subprocess.Popen(
        [sys.executable, "-m", "pipeline.tracking.background", json.dumps({**order, "quiet": False})],
        stdin=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    assert child.stdin is not None
    wait_until(lambda: bool(records.synced(store_key(here)).get("prepare", {}).get("fingerprint")), 60)
    running = records.read("prepare")
    assert running is not None
    records.write("prepare", running.updated(process=GONE, ended=None))
    child.stdin.close()
    assert child.wait(60) == 0
    assert {run.info.status for run in runs(here)} == {"KILLED"}


def test_only_one_process_at_a_time_creates_database_tables(reported: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """If two processes do so at once, MLflow leaves a half-migrated database."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    record(reported, "prepare")
    lock = reported.tracking / "store.lock"
    code = (
        "from pathlib import Path; from pipeline.files import Files; from pipeline.tracking.sync import sync\n"
        "print('ready', flush=True); sync(Files(Path.cwd(), Path.cwd()))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with locked(lock, "a test"):
        other = subprocess.Popen(
            [sys.executable, "-c", code], cwd=reported.root, env=environment, stdout=subprocess.PIPE, text=True
        )
        assert other.stdout is not None and other.stdout.readline() == "ready\n"
        time.sleep(4)
        assert not reported.mlflow_db.exists()
    assert other.wait(120) == 0
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{reported.mlflow_db}")
    assert len(parents(reported)) == 1


# --- moved checkouts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("way", "name"), [("moved", "mlflow.db"), ("copied", "mlflow.db"), ("copied", "runs.db")])
def test_a_moved_or_copied_checkout_uses_its_own_artifact_folder(
    reported: Files, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, way: str, name: str
) -> None:
    import shutil

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "" if name == "mlflow.db" else f"sqlite:///{name}")
    record(reported, "export", owner=dvc(1))
    sync(reported)
    target = tmp_path_factory.mktemp("elsewhere") / "a check out"
    (shutil.move if way == "moved" else shutil.copytree)(reported.root, target)
    files = Files(target, target)
    record(files, "export", owner=dvc(2))
    sync(files)
    assert sync(files)[0] == 0
    there = MlflowClient(f"sqlite:///{target / name}")
    experiment = there.get_experiment_by_name("smaller-student").experiment_id
    exported = there.search_runs([experiment], "tags.stage = 'export'")
    assert len(exported) == 2
    for run in exported:
        assert run.info.artifact_uri.startswith(files.mlflow_artifacts.as_uri())
        assert Path(there.download_artifacts(run.info.run_id, "export/model.onnx")).read_text() == "onnx"
    if way == "copied":
        assert len(list((reported.root / "mlartifacts").rglob("model.onnx"))) == 1
    else:
        assert not reported.root.exists()
    with sqlite3.connect(target / name) as database:
        text = "\n".join(database.iterdump())
    assert str(reported.mlflow_artifacts) not in text


def test_sync_shows_messages_of_a_background_upload(here: Files) -> None:
    records = record(here, "prepare")
    sync(here)
    for run in runs(here):
        client().delete_run(run.info.run_id)
    record(here, "teacher")
    order = {"root": str(here.root), "state": str(here.state), "records": str(records.folder), "name": "teacher"}
    code = [sys.executable, "-m", "pipeline.tracking.background", json.dumps({**order, "quiet": True})]
    assert subprocess.run(code, cwd=Path(__file__).parents[2], stdin=subprocess.DEVNULL).returncode == 0
    (notice,) = sync(here)[1]
    assert "was deleted in MLflow" in notice
    assert sync(here)[1] == []
