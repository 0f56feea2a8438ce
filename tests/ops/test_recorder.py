import os
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from pipeline.files import Files, write_json
from pipeline.ops import execution, figures
from pipeline.ops.execution import Child, Execution
from pipeline.ops.params import load
from pipeline.ops.process import identity
from pipeline.ops.recorder import Recorder, chunks, flatten
from pipeline.ops.tracking import tracking_uri
from pipeline.records import RECORDS
from tests.fake_stages import NUMBERS

BEGAN = 1_800_000_000_000


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


def recorder(files: Files, owner: Execution | None = None) -> Recorder:
    params = load(files.params).model_dump(mode="json")
    return Recorder(files, params, owner or Execution("dvc", *identity()), BEGAN)


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
    live = recorder(here)
    live.begin("student")
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


def test_curves_have_steps_and_final_figures_are_single_points(here: Files) -> None:
    live = recorder(here)
    live.begin("student")
    for epoch in (1, 2, 3):
        live.curve("student", {"epoch": epoch, "kl": 1 / epoch}, BEGAN + epoch)
    live.end("student", "FINISHED", moment=BEGAN + 9000)
    run = children(here)["student"]
    assert points(run, "train/kl") == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    for key in figures.finals(here, "student"):
        assert len(points(run, key)) == 1, key
    assert run.data.metrics["time/total"] == 1.5
    assert (run.info.status, run.info.end_time) == ("FINISHED", BEGAN + 9000)


def test_the_stages_of_one_execution_share_a_parent_and_are_recorded_once(here: Files) -> None:
    for stage in RECORDS:  # each in a process of its own, which knows no more than the state on disk
        live = recorder(here)
        live.begin(stage)
        live.end(stage, "FINISHED")
    (parent,) = parents(here)
    assert list(children(here)) == list(RECORDS)
    assert all(run.data.tags["cached"] == "false" for run in children(here).values())
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics == figures.summary(here)
    assert all(len(points(parent, key)) == 1 for key in parent.data.metrics)


def test_the_parent_holds_all_params_and_where_the_run_comes_from(here: Files) -> None:
    recorder(here).begin("prepare")
    (parent,) = parents(here)
    assert parent.data.params == dict(flatten(load(here.params).model_dump(mode="json")))
    assert parent.data.params["student.budget.reduction"] == "0.4"
    assert {"data_digest", "params_digest", "git_commit", "execution"} <= parent.data.tags.keys()
    assert len(parent.data.tags["data_digest"]) == 64


def test_export_and_benchmark_upload_what_people_look_for(here: Files) -> None:
    for stage in ("export", "benchmark"):
        live = recorder(here)
        live.begin(stage)
        live.end(stage, "FINISHED")
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    found = children(here)
    (onnx,) = client.list_artifacts(found["export"].info.run_id, "export")
    (page,) = client.list_artifacts(found["benchmark"].info.run_id, "report")
    assert (onnx.path, page.path) == ("export/model.onnx", "report/index.html")
    assert (here.root / "mlartifacts").is_dir()


def test_a_wholly_cached_execution_is_complete_and_names_the_runs_that_computed_it(here: Files) -> None:
    first = recorder(here, Execution("dvc", 1, 1))
    first.begin("teacher")
    first.end("teacher", "FINISHED")
    (original,) = [run for run in runs(here) if run.data.tags.get("stage") == "teacher"]
    second = recorder(here)
    second.begin(None)
    second.end(None, "FINISHED")
    (parent,) = [run for run in parents(here) if run.data.tags["execution"] == second.key]
    mine = [run for run in runs(here) if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert [run.data.tags["stage"] for run in mine] == list(RECORDS)
    assert {run.data.tags["cached"] for run in mine} == {"true"}
    assert parent.data.metrics == figures.summary(here)
    assert mine[1].data.tags["original_run"] == original.info.run_id
    assert "original_run" not in mine[2].data.tags  # the student ran where nobody recorded it


def test_figures_that_another_run_computed_are_not_ascribed_to_this_one(here: Files) -> None:
    first = recorder(here, Execution("dvc", 1, 1))
    first.begin("prepare")
    first.end("prepare", "FINISHED")
    write_json(here.metrics("prepare"), {**NUMBERS["prepare"], "images": 10})
    second = recorder(here)
    second.begin("teacher")
    (mine,) = [run for run in runs(here) if run.data.tags.get("cached") == "true"]
    assert mine.data.tags["stage"] == "prepare"
    assert "original_run" not in mine.data.tags


@pytest.mark.parametrize("status", ["FAILED", "KILLED"])
def test_a_stage_that_fails_ends_its_run_and_the_parent_with_the_reason(here: Files, status: str) -> None:
    live = recorder(here)
    live.begin("teacher")
    live.end("teacher", status, "out of memory; lower `teacher.batch`\nand more")
    assert parents(here)[0].info.status == children(here)["teacher"].info.status == status
    assert children(here)["teacher"].data.tags["error"] == "out of memory; lower `teacher.batch`"


def test_a_stage_that_is_tried_again_is_not_taken_from_the_failed_try(here: Files) -> None:
    live = recorder(here)
    live.begin("teacher")
    live.end("teacher", "FAILED", "no")
    again = recorder(here)
    again.begin("teacher")
    again.end("teacher", "FINISHED")
    tries = [run for run in runs(here) if run.data.tags.get("stage") == "teacher"]
    assert sorted(run.info.status for run in tries) == ["FAILED", "FINISHED"]
    assert parents(here)[0].info.status == "FINISHED"


def test_what_a_dead_recorder_left_running_is_ended_by_the_next(here: Files) -> None:
    gone = Execution("dvc", os.getpid(), 1)
    left = recorder(here, gone)
    left.begin("teacher")
    left.state.children["teacher"] = Child(run=left.state.children["teacher"].run, status="RUNNING", pid=1, started=1)
    execution.save(here, gone.key, left.state)
    recorder(here)
    dead = [run for run in runs(here) if run.data.tags["execution"] == gone.key]
    ended = {run.data.tags.get("stage", "parent"): run.info.status for run in dead}
    assert {name: ended[name] for name in ("parent", "teacher")} == {"parent": "KILLED", "teacher": "KILLED"}
    assert execution.load(here, gone.key) is None


def test_what_a_living_recorder_is_about_to_end_is_left_alone(here: Files) -> None:
    gone = Execution("dvc", os.getpid(), 1)
    recorder(here, gone).begin("teacher")
    recorder(here)
    assert children(here)["teacher"].info.status == "RUNNING"


def test_another_server_is_told_everything_anew(here: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder(here).begin("prepare")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'other.db'}")
    recorder(here).begin("teacher")
    assert list(children(here)) == ["prepare", "teacher"]


def test_the_default_store_lies_beside_the_state(here: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert tracking_uri(here) == f"sqlite:///{here.root}/mlflow.db"


def test_params_are_flattened_and_cut_into_calls() -> None:
    assert dict(flatten({"a": {"b": [1, 2], "c": "x"}, "d": None})) == {"a.b": "[1, 2]", "a.c": "x", "d": "null"}
    assert list(chunks(range(5), 2)) == [[0, 1], [2, 3], [4]]
