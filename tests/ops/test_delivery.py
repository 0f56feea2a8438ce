"""What stands in MLflow after a journal was told: complete, comparable, nothing twice, nothing left running."""

import json
import os
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from pipeline.files import Files, write_json, write_text
from pipeline.ops import figures
from pipeline.ops.delivery import Delivery, chunks
from pipeline.ops.execution import Execution
from pipeline.ops.journal import Journal
from pipeline.ops.params import load
from pipeline.ops.process import identity
from pipeline.ops.recording import Recording, flatten
from pipeline.ops.tracking import tracking_uri
from pipeline.records import RECORDS
from tests.fake_stages import NUMBERS


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One database for all tests of this file: making its tables takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"


@pytest.fixture
def here(reported: Files, store: str, monkeypatch: pytest.MonkeyPatch) -> Files:
    """A checkout with an experiment of its own in that database."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    text = reported.params.read_text()
    assert "experiment: smaller-student" in text
    reported.params.write_text(text.replace("experiment: smaller-student", f"experiment: test-{reported.root.name}"))
    return reported


def recording(files: Files, stage: str | None, owner: Execution | None = None) -> Recording:
    journal = Journal.of(files, owner or Execution("dvc", *identity()))
    return Recording(files, load(files.params), journal, stage)


def tell(files: Files, journal: Journal, again: bool = False) -> int:
    return Delivery(files, load(files.params).tracking.experiment).tell(journal, again)


def record(files: Files, stage: str | None, status: str = "FINISHED", owner: Execution | None = None) -> Recording:
    """A stage from its beginning to its end, and MLflow told."""
    live = recording(files, stage, owner)
    live.begin()
    live.end(status)
    tell(files, live.journal)
    return live


def runs(files: Files) -> list[Run]:
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    experiment = client.get_experiment_by_name(load(files.params).tracking.experiment)
    return list(client.search_runs(experiment.experiment_id, order_by=["attributes.start_time ASC"]))


def parents(files: Files) -> list[Run]:
    return [run for run in runs(files) if "stage" not in run.data.tags]


def children(files: Files) -> dict[str, Run]:
    found = [run for run in runs(files) if "stage" in run.data.tags]
    assert len({run.data.tags["stage"] for run in found}) == len(found)
    return {run.data.tags["stage"]: run for run in found}


def points(run: Run, key: str) -> list[tuple[int, float]]:
    history = MlflowClient(os.environ["MLFLOW_TRACKING_URI"]).get_metric_history(run.info.run_id, key)
    return [(point.step, point.value) for point in history]


def test_a_stage_opens_the_execution_and_replays_what_dvc_did_not_run(here: Files) -> None:
    live = recording(here, "student")
    live.begin()
    tell(here, live.journal)
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


def test_curves_have_steps_and_final_figures_are_single_points_however_often_they_are_told(here: Files) -> None:
    live = recording(here, "student")
    live.begin()
    for epoch in (1, 2, 3):
        live.curve({"train/kl": 1 / epoch}, epoch)
    live.end("FINISHED")
    told = tell(here, live.journal)
    assert told == len(live.journal.events()) and not live.journal.pending(os.environ["MLFLOW_TRACKING_URI"])
    before = [run.info.run_id for run in runs(here)]
    assert tell(here, live.journal) == 0
    for _ in range(2):
        assert tell(here, live.journal, again=True) == told
    assert [run.info.run_id for run in runs(here)] == before
    run = children(here)["student"]
    assert points(run, "train/kl") == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    for key in figures.finals(here, "student"):
        assert len(points(run, key)) == 1, key
    assert run.data.metrics["time/total"] == 1.5
    ended = live.journal.events()[-1][1]
    assert (run.info.status, run.info.end_time) == ("FINISHED", int(ended.time * 1000))


def test_the_stages_of_one_execution_share_a_parent_and_are_recorded_once(here: Files) -> None:
    for stage in RECORDS:  # each in a process of its own, which knows no more than the journal
        record(here, stage)
    (parent,) = parents(here)
    assert list(children(here)) == list(RECORDS)
    assert all(run.data.tags["cached"] == "false" for run in children(here).values())
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics == figures.summary(here)
    assert all(len(points(parent, key)) == 1 for key in parent.data.metrics)


def test_the_parent_holds_all_params_the_data_set_and_where_the_run_comes_from(
    here: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMALLER_STUDENT_FLOW_RUN", "1234")
    write_text(here.root / "dvc.lock", "schema: '2.0'\n")
    record(here, "prepare")
    (parent,) = parents(here)
    assert parent.data.params == dict(flatten(load(here.params).model_dump(mode="json")))
    assert parent.data.params["student.budget.reduction"] == "0.4"
    assert {"params_digest", "git_commit", "execution", "dvc_lock_digest"} <= parent.data.tags.keys()
    assert parent.data.tags["flow_run_id"] == "1234"
    digest = parent.data.tags["data_digest"]
    assert len(digest) == 64
    (given,) = parent.inputs.dataset_inputs
    assert (given.dataset.name, given.dataset.digest) == ("vehicles", digest[:36])
    assert json.loads(given.dataset.profile)["identities"] == 3


def test_export_and_benchmark_upload_what_people_look_for_though_a_later_run_overwrote_it(here: Files) -> None:
    live = []
    for stage in ("export", "benchmark"):
        live.append(recording(here, stage))
        live[-1].begin()
        live[-1].end("FINISHED")
    write_text(here.artifacts("export") / "model.onnx", "another")
    tell(here, live[0].journal)
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    found = children(here)
    (onnx,) = client.list_artifacts(found["export"].info.run_id, "export")
    (page,) = client.list_artifacts(found["benchmark"].info.run_id, "report")
    assert (onnx.path, page.path) == ("export/model.onnx", "report/index.html")
    downloaded = Path(client.download_artifacts(found["export"].info.run_id, "export/model.onnx", str(here.root)))
    assert downloaded.read_text() == "onnx"
    assert (here.root / "mlartifacts").is_dir()


def test_a_wholly_cached_execution_is_complete_and_names_the_runs_that_computed_it(here: Files) -> None:
    record(here, "teacher", owner=Execution("dvc", 1, 1))
    (original,) = [run for run in runs(here) if run.data.tags.get("stage") == "teacher"]
    second = record(here, None)
    (parent,) = [run for run in parents(here) if run.data.tags["execution"] == second.journal.owner.key]
    mine = [run for run in runs(here) if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert [run.data.tags["stage"] for run in mine] == list(RECORDS)
    assert {run.data.tags["cached"] for run in mine} == {"true"}
    assert parent.data.metrics == figures.summary(here)
    assert mine[1].data.tags["original_run"] == original.info.run_id
    assert "original_run" not in mine[2].data.tags  # the student ran where nobody recorded it


def test_figures_that_another_run_computed_are_not_ascribed_to_this_one(here: Files) -> None:
    record(here, "prepare", owner=Execution("dvc", 1, 1))
    write_json(here.metrics("prepare"), {**NUMBERS["prepare"], "images": 10})
    record(here, "teacher")
    (mine,) = [run for run in runs(here) if run.data.tags.get("cached") == "true"]
    assert mine.data.tags["stage"] == "prepare"
    assert "original_run" not in mine.data.tags


@pytest.mark.parametrize("status", ["FAILED", "KILLED"])
def test_a_stage_that_fails_ends_its_run_and_the_parent_with_the_reason(here: Files, status: str) -> None:
    live = recording(here, "teacher")
    live.begin()
    live.end(status, "out of memory; lower `teacher.batch`\nand more")
    tell(here, live.journal)
    assert parents(here)[0].info.status == children(here)["teacher"].info.status == status
    assert children(here)["teacher"].data.tags["error"] == "out of memory; lower `teacher.batch`"


def test_a_stage_that_is_tried_again_is_not_taken_from_the_failed_try(here: Files) -> None:
    record(here, "teacher", "FAILED")
    record(here, "teacher")
    tries = [run for run in runs(here) if run.data.tags.get("stage") == "teacher"]
    assert sorted(run.info.status for run in tries) == ["FAILED", "FINISHED"]
    assert parents(here)[0].info.status == "FINISHED"


def left_behind(files: Files, pid: int, started: int) -> Journal:
    """A stage that began in a process of that number and said no more."""
    journal = Journal.of(files, Execution("dvc", os.getpid(), 1))
    journal.open("left", {}, {})
    journal.append("begin", stage="teacher", pid=pid, started=started)
    tell(files, journal)
    return journal


def test_what_a_dead_stage_left_running_is_ended_by_the_next_delivery(here: Files) -> None:
    left_behind(here, 1, 1)
    Delivery(here, load(here.params).tracking.experiment).sync()
    assert {run.info.status for run in runs(here)} == {"KILLED"}


def test_what_a_living_stage_is_about_to_end_is_left_alone(here: Files) -> None:
    left_behind(here, *identity())
    Delivery(here, load(here.params).tracking.experiment).sync()
    assert {run.info.status for run in runs(here)} == {"RUNNING"}


@pytest.mark.parametrize("lines", range(0, 12, 3))
def test_a_delivery_that_broke_off_goes_on_without_doubles(here: Files, lines: int) -> None:
    """Killed after MLflow was told and before that was noted."""
    live = record(here, "teacher")
    uri = os.environ["MLFLOW_TRACKING_URI"]
    first = {run.info.run_id: run.data.metrics for run in runs(here)}
    done = live.journal.delivered(uri)
    live.journal.note(
        done.model_copy(update={"lines": lines, "runs": {n: r for n, r in done.runs.items() if n < lines}})
    )
    tell(here, live.journal)
    assert {run.info.run_id: run.data.metrics for run in runs(here)} == first
    assert points(children(here)["teacher"], "eval/mAP") == [(0, 0.61)]


def test_another_server_is_told_everything_anew(here: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record(here, "prepare")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'other.db'}")
    record(here, "teacher")
    assert list(children(here)) == ["prepare", "teacher"]


def test_the_default_store_lies_beside_the_state(here: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert tracking_uri(here) == f"sqlite:///{here.root}/mlflow.db"


def test_params_are_flattened_and_cut_into_calls() -> None:
    assert dict(flatten({"a": {"b": [1, 2], "c": "x"}, "d": None})) == {"a.b": "[1, 2]", "a.c": "x", "d": "null"}
    assert list(chunks(range(5), 2)) == [[0, 1], [2, 3], [4]]
